"""Latency tables: what is written comes back, and nothing damaged is believed."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from latency_lut.device import Device
from latency_lut.lowering import applicable
from latency_lut.table import LatencyTable, NetworkTiming, pair_key
from latency_lut.timing import Timing
from spaces.errors import UserError
from spaces.mobile import MobileSpace

DEVICE = Device("x86")


def small_space(**changes):
    stages = [{"widths": [8, 16], "depths": [1, 2], "stride": 2}]
    values = {"channels": 1, "classes": 4, "resolutions": [8], "stem": [8], "stages": stages, "expansions": [2], "kernels": [3]}
    values |= {"head": [16], "precisions": ["w8a8", "fp32"], "sparsities": ["dense", "group@1/2"]}
    return MobileSpace(**(values | changes))


SPACE = small_space()


@pytest.fixture
def table():
    filled = LatencyTable.empty(SPACE, DEVICE)
    rng = np.random.default_rng(0)
    architectures = [SPACE.sample(rng) for _ in range(5)]
    for architecture in architectures:
        for spec in SPACE.layers(architecture):
            for name in applicable(spec):
                filled.entries[pair_key(spec, name)] = Timing(float(rng.uniform(5, 50)), 0.5, 12)
    for architecture, source in zip(architectures, ["random"] * 4 + ["winner"], strict=True):
        lowerings = tuple(applicable(spec)[0] for spec in SPACE.layers(architecture))
        filled.networks.append(NetworkTiming(architecture, lowerings, 123.5, 1.25, 25, source))
    filled.anchors = tuple(filled.entries)[:3]
    return filled


def test_a_saved_table_comes_back(table, tmp_path):
    path = tmp_path / "tables" / "x86.parquet"
    table.save(path)
    loaded = LatencyTable.load(path)
    assert loaded == table
    assert loaded.fingerprint == table.fingerprint
    loaded.check(SPACE, DEVICE)
    assert [entry.name for entry in path.parent.iterdir()] == ["x86.parquet"]


def test_the_fingerprint_changes_with_a_measurement(table):
    before = table.fingerprint
    key = next(iter(table.entries))
    table.entries[key] = replace(table.entries[key], us=table.entries[key].us + 1)
    assert table.fingerprint != before


def test_a_dense_lowering_is_measured_once_for_all_sparsities():
    specs = {s for s in SPACE.layers(SPACE.smallest()) if s.sparsity != "dense" and s.integer}
    spec = specs.pop()
    dense = replace(spec, sparsity="dense")
    assert pair_key(spec, "qdq_u8") == (dense, "qdq_u8")
    assert pair_key(spec, "gather_groups_qdq") == (spec, "gather_groups_qdq")
    table = LatencyTable.empty(SPACE, DEVICE)
    table.entries[dense, "qdq_u8"] = Timing(7.0, 0.1, 12)
    assert table.entry(spec, "qdq_u8").us == 7.0
    assert table.entry(spec, "gather_groups_qdq") is None


def test_the_file_says_unit_and_statistic(table, tmp_path):
    table.save(tmp_path / "x86.parquet")
    metadata = json.loads(pq.read_schema(tmp_path / "x86.parquet").metadata[b"netwright"])
    assert metadata["unit"] == "us"
    assert "median" in metadata["statistic"]
    assert metadata["device"]["runtime"] == "onnxruntime"


def test_check_refuses_another_space_and_another_device(table):
    with pytest.raises(UserError, match="of space mobile") as caught:
        table.check(small_space(head=[24]), DEVICE)
    assert table.space_fingerprint in str(caught.value)
    with pytest.raises(UserError, match="batch 1 -> 2") as caught:
        table.check(SPACE, Device("x86", batch=2))
    assert table.device_fingerprint in str(caught.value)


def damaged(path, change):
    """Rewrite a table's rows and metadata."""
    stored = pq.read_table(path)
    rows, metadata = stored.to_pylist(), json.loads(stored.schema.metadata[b"netwright"])
    change(rows, metadata)
    table = type(stored).from_pylist(rows, schema=stored.schema.with_metadata({"netwright": json.dumps(metadata)}))
    pq.write_table(table, path)


def set_value(kind, name, value):
    def change(rows, metadata):
        next(row for row in rows if row["kind"] == kind)[name] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        set_value("pair", "us", float("nan")),
        set_value("pair", "us", float("inf")),
        set_value("pair", "us", -1.0),
        set_value("pair", "us", 0.0),
        set_value("pair", "us", None),
        set_value("pair", "spread_us", -1.0),
        set_value("pair", "count", 0),
        set_value("pair", "lowering", "nonsense"),
        set_value("pair", "lowering", None),
        set_value("pair", "spec", "{}"),
        set_value("pair", "spec", "not JSON"),
        set_value("pair", "kind", "other"),
        set_value("network", "architecture", "[]"),
        set_value("network", "lowerings", '["nonsense"]'),
        set_value("network", "source", "somewhere"),
        lambda rows, metadata: rows.append(rows[0]),
        lambda rows, metadata: metadata.update(unit="ms"),
        lambda rows, metadata: metadata.update(schema_version=99),
        lambda rows, metadata: metadata.pop("device"),
        lambda rows, metadata: metadata.update(space_name=3),
    ],
)
def test_impossible_content_is_refused_in_one_line(table, tmp_path, change):
    path = tmp_path / "x86.parquet"
    table.save(path)
    damaged(path, change)
    refused(path)


def refused(path):
    with pytest.raises(UserError) as caught:
        LatencyTable.load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert "python -m latency_lut device=x86" in text


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9, 0.999])
def test_a_truncated_file_is_refused(table, tmp_path, share):
    path = tmp_path / "x86.parquet"
    table.save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path)


def test_a_missing_column_and_a_foreign_parquet_are_refused(table, tmp_path):
    path = tmp_path / "x86.parquet"
    table.save(path)
    stored = pq.read_table(path)
    pq.write_table(stored.drop_columns(["us"]), path)
    refused(path)
    pq.write_table(stored.replace_schema_metadata({}), path)
    refused(path)


def test_no_table_names_the_command(tmp_path):
    refused(tmp_path / "x86.parquet")


def test_a_folder_that_cannot_be_written_is_told_and_leaves_the_old_table(table, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        table.save(tmp_path / "file" / "x86.parquet")
    target = tmp_path / "x86.parquet"
    target.mkdir()
    with pytest.raises(UserError, match="cannot write"):
        table.save(target)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "x86.parquet"]
