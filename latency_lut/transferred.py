"""What a device's table holds that was not measured there: predictions from the tables of other devices.

They stand apart from what was measured, in memory and in the file (rows of the kinds `transferred pair` and `transferred
network`, with a standard deviation and no visits), so that nothing takes them for measurements.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from spaces.choice import Architecture
from spaces.layers import LayerSpec

STATISTIC = "mean of a prediction; spread is its standard deviation"


@dataclass(frozen=True)
class Estimate:
    """A predicted timing, and the standard deviation of what a measurement would differ from it by, in microseconds."""

    us: float
    std_us: float


@dataclass(frozen=True)
class TransferredNetwork:
    """A whole network that was not timed; `lowerings`: one per layer."""

    architecture: Architecture
    lowerings: tuple[str, ...]
    estimate: Estimate


@dataclass
class Transferred:
    """Predictions for a device.

    Args:
        sources: names of the devices whose tables they come from, with the fingerprints of these tables.
        pair_samples: measured pairs of the device itself that they were fitted to.
        network_samples: whole networks, likewise.
        pair_error: mean absolute relative error of the measured pairs, each predicted from the others; `None`: too few to tell.
        network_error: of the networks, likewise.
        pairs: by the key of a table's entries; none of them was measured.
        networks: whole networks.
    """

    sources: dict[str, str]
    pair_samples: int
    network_samples: int
    pair_error: float | None
    network_error: float | None
    pairs: dict[tuple[LayerSpec, str], Estimate] = field(default_factory=dict)
    networks: list[TransferredNetwork] = field(default_factory=list)

    def summary(self) -> str:
        """What was predicted from what, in words."""
        samples = f"{self.pair_samples} measured pairs and {self.network_samples} networks"
        return f"{len(self.pairs)} pairs predicted, not measured, from {', '.join(self.sources)} by {samples}"

    def head(self) -> dict[str, object]:
        """All but the predictions, for a file's metadata."""
        return {"statistic": STATISTIC, "sources": self.sources} | {name: getattr(self, name) for name in (*_COUNTS, *_ERRORS)}

    def rows(self) -> Iterator[dict[str, object]]:
        """The predictions as rows of a table's file."""
        for (spec, lowering), e in self.pairs.items():
            values = {"kind": "transferred pair", "spec": spec.to_json(), "lowering": lowering}
            yield values | {"us": e.us, "spread_us": e.std_us, "count": 0}
        for network in self.networks:
            values = {"architecture": network.architecture.to_json(), "lowerings": json.dumps(network.lowerings)}
            yield {"kind": "transferred network", **values} | {
                "us": network.estimate.us,
                "spread_us": network.estimate.std_us,
                "count": 0,
            }

    @staticmethod
    def from_head(head: Mapping[str, object]) -> Transferred:
        """The same from a file's metadata, with no predictions yet.

        Raises:
            ValueError: it says something impossible.
            KeyError: something is missing.
        """
        sources = head["sources"]
        counts: list[Any] = [head[name] for name in _COUNTS]
        errors: list[Any] = [head[name] for name in _ERRORS]
        if not isinstance(sources, dict) or not all(isinstance(text, str) for text in sources.values()):
            raise ValueError(f"transferred from {str(sources)[:80]}")
        if not all(type(count) is int and count >= 1 for count in counts):
            raise ValueError(f"transferred by {counts} samples")
        if not all(error is None or (isinstance(error, float) and 0 <= error < math.inf) for error in errors):
            raise ValueError(f"transferred with errors {errors}")
        return Transferred(sources, counts[0], counts[1], errors[0], errors[1])


_COUNTS = ("pair_samples", "network_samples")
_ERRORS = ("pair_error", "network_error")
