"""Settings of measuring that cannot be are told."""

import pytest

from latency_lut.measuring import MeasuringSettings
from spaces.errors import UserError


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"max_pairs": 0}, "max_pairs is 0"),
        ({"max_pairs": "many"}, "max_pairs is 'many'"),
        ({"networks": -1}, "networks is -1"),
        ({"rounds": 1}, "rounds is 1"),
        ({"seed": -1}, "seed is -1"),
        ({"visit_s": 0.0}, "visit_s is 0.0"),
    ],
)
def test_numbers_out_of_range_are_told(values, said):
    with pytest.raises(UserError, match=said):
        MeasuringSettings(**values)
