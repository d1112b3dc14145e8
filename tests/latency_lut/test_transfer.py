"""A device's table from the tables of others and a few measurements, on a small space for real."""

import json
import sys
import threading
from functools import partial

import pyarrow.parquet as pq
import pytest

from latency_lut.device import Device
from latency_lut.elsewhere import take_there
from latency_lut.measuring import MeasuringSettings
from latency_lut.profile import profile
from latency_lut.remote import Watch
from latency_lut.table import LatencyTable
from latency_lut.transfer import read_sources, take_here, transfer
from latency_lut.transports import Ssh
from predictors.latency import LatencyPredictor
from predictors.transfer_table import TableTransfer
from spaces.errors import UserError
from spaces.mobile import MobileSpace
from tests.latency_lut import loopback_sshd

ssh = pytest.mark.skipif(bool(loopback_sshd.missing()), reason=loopback_sshd.missing())

STAGES = [{"widths": [8, 16], "depths": [1], "stride": 2}]
SPACE = MobileSpace(1, 4, [8], [8], STAGES, [2], [3, 5], [16], ["w8a8", "fp32"], ["dense", "group@1/2"])
NEW = Device("new", batch=3)
QUICK = {"visit_s": 0.00005, "max_pairs": 60}


@pytest.fixture(autouse=True, scope="module")
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("latency_lut.session.NETWORK_ROUNDS", 4)
        patch.setattr("latency_lut.session.NETWORK_VISIT_S", 0.0002)
        patch.setattr("latency_lut.transfer.PAIR_ROUNDS", 4)
        patch.setattr("predictors.transfer_table.NETWORKS", 20)
        yield


@pytest.fixture(scope="module")
def folder(quick, tmp_path_factory):
    """Tables of two devices, measured."""
    folder = tmp_path_factory.mktemp("tables")
    for device in (Device("one"), Device("two", batch=2)):
        profile(SPACE, device, folder / f"{device.name}.parquet", MeasuringSettings(rounds=3, networks=8, **QUICK))
    return folder


@pytest.fixture(scope="module")
def stored(folder, tmp_path_factory):
    """The file of a transferred table."""
    path = tmp_path_factory.mktemp("new") / "new.parquet"
    transferred(folder, path, 3)
    return path


def transferred(folder, path, samples, device=NEW, watch=None):
    sources = read_sources(folder, ["one", "two"], device, SPACE)
    settings = MeasuringSettings(**QUICK)
    take = partial(take_here, SPACE, device, settings=settings)
    if device.elsewhere:
        take = partial(take_there, SPACE, device, path, settings=settings, watch=watch or Watch())
    numbers = {"samples": samples, "checked_networks": 3, "max_pairs": settings.max_pairs}
    return transfer(SPACE, device, path, sources, TableTransfer, take, **numbers)


def test_few_measurements_make_a_table_that_says_what_was_measured(folder, tmp_path):
    path = tmp_path / "new.parquet"
    table, stats = transferred(folder, path, 10)
    assert (len(table.entries), stats.pairs, stats.networks) == (5, 5, 8)
    assert [network.source for network in table.networks] == ["sample"] * 5 + ["random"] * 3
    told = table.transferred
    assert (told.pair_samples, told.network_samples, list(told.sources)) == (5, 5, ["one", "two"])
    assert not told.pairs.keys() & table.entries.keys()
    assert len(told.pairs) == 55
    assert all(estimate.us > 0 and estimate.std_us > 0 for estimate in told.pairs.values())
    measured = {(network.architecture, network.lowerings) for network in table.networks if network.source == "sample"}
    assert not measured & {(network.architecture, network.lowerings) for network in told.networks}
    assert 0 < told.network_error < 1
    assert set(stats.proposed_pairs) <= told.pairs.keys()
    assert LatencyTable.load(path) == table

    rows = pq.read_table(path).to_pylist()
    assert {row["kind"]: row["count"] > 0 for row in rows} == {
        "pair": True,
        "network": True,
        "transferred pair": False,
        "transferred network": False,
    }

    predictor = LatencyPredictor.fit(table, SPACE)
    assert predictor.quality.n == 3
    for pair, measured in ((next(iter(table.entries)), True), (next(iter(told.pairs)), False)):
        price = next(price for price in predictor.prices(pair[0]) if price.lowering == pair[1])
        assert price.measured is measured
        assert price.us == (table.entries if measured else told.pairs)[pair].us

    more, stats = transferred(folder, path, 14)
    assert (len(more.entries), stats.pairs, stats.networks) == (7, 2, 2)
    assert table.entries.items() <= more.entries.items()
    assert set(stats.proposed_pairs).isdisjoint(more.entries)
    full, stats = profile(SPACE, NEW, path, MeasuringSettings(rounds=3, networks=8, **QUICK))
    assert (len(full.entries), full.transferred) == (60, None)
    assert more.entries.items() <= full.entries.items()
    with pytest.raises(UserError, match="was measured, which is better"):
        transferred(folder, path, 10)


@ssh
def test_a_device_elsewhere_gets_its_table_from_the_same_samples(folder, sshd, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", sshd.path)
    monkeypatch.setattr("latency_lut.bundle.NETWORK_VISIT_S", 0.0002)
    monkeypatch.setattr("latency_lut.bundle.PAIR_ROUNDS", 4)
    monkeypatch.setattr("latency_lut.bundle.BATCH_NETWORKS", 2)
    path, stopped, seen = tmp_path / "tables" / "pi.parquet", threading.Event(), []
    pi = Device("pi", batch=3, reach=Ssh("pi", str(tmp_path / "there"), sys.executable))

    def stop(what, done, total):
        if what == "models" and done > 6:
            stopped.set()

    assert transferred(folder, path, 10, pi, Watch(stop, stopped=stopped)) is None
    assert not path.exists()
    far, stats = transferred(folder, path, 10, pi, Watch(lambda what, done, total: seen.append((what, done))))
    assert next(done for what, done in seen if what == "models") > 6
    assert (stats.pairs, stats.networks) == (5, 8)
    assert LatencyTable.load(path) == far
    assert [file.name for file in path.parent.iterdir()] == ["pi.parquet"]
    assert not [file for file in (tmp_path / "there").rglob("*") if file.is_file()]

    near, _ = transferred(folder, tmp_path / "new.parquet", 10)
    assert far.device == near.device
    assert far.entries.keys() == near.entries.keys()
    assert set(far.anchors) == set(near.anchors)
    assert [(n.architecture, n.source) for n in far.networks] == [(n.architecture, n.source) for n in near.networks]
    assert far.transferred.pairs.keys() == near.transferred.pairs.keys()

    more, stats = transferred(folder, path, 12, pi)
    assert (len(more.entries), stats.pairs, stats.networks) == (6, 1, 1)
    assert more.entries.items() > far.entries.items()
    _, stats = transferred(folder, path, 12, Device("pi", batch=3, reach="bundle"))
    assert (stats.pairs, stats.networks) == (0, 0)
    with pytest.raises(UserError, match="pi is elsewhere and has no transport"):
        transferred(folder, path, 14, Device("pi", batch=3, reach="bundle"))


@pytest.mark.parametrize(
    ("names", "device", "said"),
    [
        (["one", "phone"], NEW, "no table of 'phone' to transfer from; in .* there are one, two; run: "),
        (["one", "one"], NEW, "allowed are at least 2 different devices: in .* there are one, two"),
        (["one", "new"], NEW, "transfer has new, which is the device itself"),
        (["one", "two"], Device("again"), "one is the device again itself under another name"),
        (["one", "../two"], NEW, "no table of '../two'"),
    ],
)
def test_sources_that_cannot_be_are_told(folder, names, device, said):
    with pytest.raises(UserError, match=said) as caught:
        read_sources(folder, names, device, SPACE)
    assert "\n" not in str(caught.value)


def test_a_table_that_was_transferred_or_is_of_another_space_is_no_source(folder, stored, tmp_path):
    for path in (folder / "one.parquet", folder / "two.parquet", stored):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="table of new was transferred, not measured"):
        read_sources(tmp_path, ["one", "new"], Device("other", batch=4), SPACE)
    other = MobileSpace(1, 4, [8], [8], STAGES, [2], [3], [24], ["w8a8", "fp32"], ["dense"])
    with pytest.raises(UserError, match="table of one is of space mobile"):
        read_sources(tmp_path, ["one", "two"], NEW, other)


@pytest.mark.parametrize("samples", [2, -1, 10.5, True, "ten"])
def test_impossible_samples_are_told(folder, tmp_path, samples):
    with pytest.raises(UserError, match=r"samples is .*; allowed are integers from 3 to 1000"):
        transferred(folder, tmp_path / "new.parquet", samples)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        ("transferred pair", "count", 3),
        ("transferred network", "count", 3),
        ("pair", "kind", "transferred pair"),
        ("transferred pair", "kind", "pair"),
        ("transferred pair", "us", 0.0),
        ("transferred pair", "spread_us", float("nan")),
    ],
)
def test_a_prediction_cannot_pass_for_a_measurement(stored, tmp_path, kind, name, value):
    table = pq.read_table(stored)
    rows = table.to_pylist()
    next(row for row in rows if row["kind"] == kind)[name] = value
    pq.write_table(type(table).from_pylist(rows, schema=table.schema), tmp_path / "new.parquet")
    with pytest.raises(UserError, match="damaged"):
        LatencyTable.load(tmp_path / "new.parquet")


@pytest.mark.parametrize("change", [None, {"pair_samples": 0}, {"sources": ["x86"]}, {"network_error": -1.0}])
def test_a_damaged_head_of_predictions_is_refused(stored, tmp_path, change):
    table = pq.read_table(stored)
    metadata = json.loads(table.schema.metadata[b"netwright"])
    head = metadata.pop("transferred")
    if change is not None:
        metadata["transferred"] = head | change
    changed = table.replace_schema_metadata({"netwright": json.dumps(metadata)})
    pq.write_table(changed, tmp_path / "new.parquet")
    with pytest.raises(UserError, match="damaged"):
        LatencyTable.load(tmp_path / "new.parquet")
