"""Importing what was measured elsewhere: the same table as a profile makes; whatever is damaged is refused whole."""

import contextlib
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from latency_lut.__main__ import COMMANDS, FILE_COMMANDS, main
from latency_lut.bundle import write_bundle
from latency_lut.command import run_hydra
from latency_lut.device import Device
from latency_lut.importing import import_results
from latency_lut.measuring import MeasuringSettings
from latency_lut.profile import profile
from latency_lut.table import LatencyTable
from spaces.errors import UserError
from tests.latency_lut import damage

FAR = Device("far", reach="bundle")
QUICK = MeasuringSettings(max_pairs=30, networks=8, rounds=5, visit_s=0.0002)
SHORT = {"latency_lut.bundle.NETWORK_VISIT_S": 0.0002, "latency_lut.session.NETWORK_VISIT_S": 0.0002}


def measured(space, folder, table=None, **options):
    """A bundle and, beside it, its results, measured by a process of its own."""
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SHORT, "latency_lut.bundle.BATCH_PAIRS": 10}.items():
            patch.setattr(name, value)
        write_bundle(space, FAR, table or folder / "none.parquet", folder / "far-bundle.zip", replace(QUICK, **options))
    subprocess.run([sys.executable, "-I", folder / "far-bundle.zip"], check=True, capture_output=True, cwd="/", timeout=120)
    return folder


@pytest.fixture(scope="module")
def far(tiny_space, tmp_path_factory):
    """A folder with a bundle of the tiny space and its results; do not change it."""
    return measured(tiny_space, tmp_path_factory.mktemp("elsewhere") / "far")


@pytest.fixture(scope="module")
def files(far):
    """All files of the bundle and the results, by name."""
    with zipfile.ZipFile(far / "far-bundle.zip") as archive:
        return [
            *((name, archive.read(name)) for name in archive.namelist()),
            ("results.jsonl", (far / "results.jsonl").read_bytes()),
        ]


@pytest.fixture(scope="module")
def anchors(files):
    return json.loads(dict(files)["manifest.json"])["anchors"]


def refusal(space, path, tables, bundles=()):
    """The line with which a file is refused."""
    before = sorted(tables.rglob("*"))
    with pytest.raises(UserError) as raised:
        import_results(space, path, tables, bundles=bundles).save()
    assert "\n" not in str(raised.value)
    assert sorted(tables.rglob("*")) == before
    return str(raised.value)


def test_what_was_measured_elsewhere_makes_the_table_of_a_profile(tiny_space, far, tmp_path, monkeypatch):
    for name, value in SHORT.items():
        monkeypatch.setattr(name, value)
    here, _ = profile(tiny_space, Device("x86"), tmp_path / "x86.parquet", QUICK)
    imported = import_results(tiny_space, far / "results.jsonl", tmp_path)
    imported.save()
    table = LatencyTable.load(tmp_path / "far.parquet")
    table.check(tiny_space, FAR)
    assert set(table.entries) == set(here.entries)
    assert set(table.anchors) == set(here.anchors)
    assert [n.architecture for n in table.networks] == [n.architecture for n in here.networks]
    assert [n.source for n in table.networks] == [n.source for n in here.networks]
    assert (table.device, table.device_fingerprint) == (here.device, here.device_fingerprint)
    assert {entry.count for pair, entry in table.entries.items() if pair not in table.anchors} == {QUICK.rounds}
    ratios = [table.entries[pair].us / here.entries[pair].us for pair in here.entries]
    assert 0.5 < np.median(ratios) < 2


@pytest.mark.parametrize("how", ["zip", "folder", "results beside the bundle", "bundle elsewhere"])
def test_results_come_back_in_several_ways(tiny_space, far, files, tmp_path, how):
    bundles = ()
    if how == "zip":
        path = tmp_path / "back.zip"
        path.write_bytes(damage.packed(files))
    elif how == "folder":
        with zipfile.ZipFile(far / "far-bundle.zip") as archive:
            archive.extractall(tmp_path / "back")
        path = tmp_path / "back"
        shutil.copy(far / "results.jsonl", path)
    elif how == "results beside the bundle":
        path = far / "results.jsonl"
    else:
        path = tmp_path / "r"
        shutil.copy(far / "results.jsonl", path)
        assert "say where it is: bundles=FOLDER" in refusal(tiny_space, path, tmp_path)
        bundles = (tmp_path, far)
    imported = import_results(tiny_space, path, tmp_path, bundles=bundles)
    assert (imported.pairs, imported.failed) == (30, 0)


def test_a_second_bundle_extends_the_table(tiny_space, far, tmp_path):
    import_results(tiny_space, far / "results.jsonl", tmp_path).save()
    first = LatencyTable.load(tmp_path / "far.parquet")
    more = measured(tiny_space, tmp_path / "more", tmp_path / "far.parquet", max_pairs=36, networks=10)
    imported = import_results(tiny_space, more / "results.jsonl", tmp_path)
    assert (imported.pairs, imported.networks) == (len(set(imported.table.entries)) - 30, 2)
    assert imported.pairs >= 6
    imported.save()
    second = LatencyTable.load(tmp_path / "far.parquet")
    assert {pair: second.entries[pair] for pair in first.entries} == first.entries
    assert second.anchors == first.anchors
    again = import_results(tiny_space, more / "results.jsonl", tmp_path)
    assert (again.pairs, again.networks) == (0, 0)
    with pytest.raises(UserError, match="has everything that is asked for"):
        write_bundle(tiny_space, FAR, tmp_path / "far.parquet", tmp_path / "b.zip", replace(QUICK, max_pairs=36, networks=10))


def test_results_of_another_machine_are_not_mixed_in(tiny_space, far, files, anchors, tmp_path):
    import_results(tiny_space, far / "results.jsonl", tmp_path).save()
    lines = damage.lines_of(dict(files)["results.jsonl"])
    lines[0]["device"]["cpu"] = "Other CPU"
    lines[0]["fingerprint"] = lines[-1]["fingerprint"] = damage.fingerprint_of(lines[0]["device"])
    (tmp_path / "results.jsonl").write_bytes(damage.joined(lines))
    said = refusal(tiny_space, tmp_path / "results.jsonl", tmp_path, (far,))
    assert "is of another device than the results" in said
    assert "'Other CPU'" in said


def test_a_run_that_was_cut_between_anchors_is_whole_all_the_same(tiny_space, far, files, anchors, tmp_path):
    lines = damage.lines_of(dict(files)["results.jsonl"])
    last = lines[-2]["batch"]
    torn = [{**line, "batch": last + 1} for line in lines if line.get("batch") == last][:2]
    assert len(torn) < len(anchors)
    (tmp_path / "results.jsonl").write_bytes(damage.joined([*lines[:-1], *torn, lines[-1]]))
    imported = import_results(tiny_space, tmp_path / "results.jsonl", tmp_path, bundles=(far,))
    assert imported.table.entries == import_results(tiny_space, far / "results.jsonl", tmp_path).table.entries


@settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_results_are_refused_in_one_line(data, tiny_space, far, files, anchors, tmp_path):
    what, content = data.draw(damage.damaged_results(dict(files)["results.jsonl"], anchors))
    (tmp_path / "results.jsonl").write_bytes(content)
    (tmp_path / "tables").mkdir(exist_ok=True)
    note(what)
    assert refusal(tiny_space, tmp_path / "results.jsonl", tmp_path / "tables", (far,))


@settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_bundles_are_refused_in_one_line(data, tiny_space, files, tmp_path):
    what, content = data.draw(damage.damaged_bundles(files))
    (tmp_path / "back.zip").write_bytes(content)
    (tmp_path / "tables").mkdir(exist_ok=True)
    note(what)
    assert refusal(tiny_space, tmp_path / "back.zip", tmp_path / "tables")
    assert not (tmp_path.parent / "x").exists()


@settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_flipped_bit_of_a_bundle_changes_nothing_that_is_believed(data, tiny_space, far, files, tmp_path):
    content = bytearray(damage.packed(files))
    content[data.draw(st.integers(2, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "back.zip").write_bytes(content)
    with contextlib.suppress(UserError):  # a bit of a date does no harm
        entries = import_results(tiny_space, tmp_path / "back.zip", tmp_path).table.entries
        assert entries == import_results(tiny_space, far / "results.jsonl", tmp_path).table.entries


def test_links_in_a_folder_are_refused(tiny_space, far, tmp_path):
    with zipfile.ZipFile(far / "far-bundle.zip") as archive:
        archive.extractall(tmp_path / "back")
    (tmp_path / "back" / "results.jsonl").symlink_to(far / "results.jsonl")
    assert "results.jsonl is a link" in refusal(tiny_space, tmp_path / "back", tmp_path)


# -- the command line ---------------------------------------------------------------------------------------------------------

TINY = ["space.stem=[8]", "space.stages=[{widths:[8],depths:[1],stride:2}]", "space.expansions=[2]", "space.kernels=[3]"]
TINY += ["space.head=[16]", "data.resolutions=[8]"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["latency_lut", *map(str, arguments)])
        status = 0
        try:
            run_hydra(main, "latency_lut", COMMANDS, FILE_COMMANDS)
        except SystemExit as stop:
            status = stop.code or 0
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_from_the_command_line_to_a_device_and_back(command, tmp_path, monkeypatch):
    for name, value in SHORT.items():
        monkeypatch.setattr(name, value)
    options = [*TINY, "max_pairs=60", "networks=20", "rounds=3", "visit_s=0.00005"]
    status, out, err = command("bundle", "device=x86", "devices.x86.name=far", *options)
    assert (status, err) == (0, "")
    assert "bundle: far-bundle.zip" in out
    subprocess.run([sys.executable, "-I", tmp_path / "far-bundle.zip"], check=True, capture_output=True, cwd="/", timeout=120)
    status, out, err = command("import", "results.jsonl", *TINY)
    assert (status, err) == (0, "")
    assert "latency model, mean error" in out
    assert "on 10 held-out networks" in out
    assert (tmp_path / "tables" / "far.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import"], "import needs a file: import FILE"),
        (["import", "nowhere.jsonl"], "nowhere.jsonl is refused: there is no such file"),
        (["import", "x" * 300], "cannot read xxx"),
        (["import", "/dev/null"], "/dev/null is refused: it is no file"),
        (["import", "empty"], "empty is refused: line 1: the results end in the middle"),
        (["bundle", "device=[]"], "no device"),
        (["bundle", "device=wasm"], "allowed elsewhere are wasm-browser"),
        (["bundle", "device=torch_cpu"], "torch cannot be sent elsewhere"),
        (["bundle", "target_error=0.1"], "leave target_error and budget_s away"),
        (["bundle", "rounds=1"], "rounds is 1; allowed are integers from 3"),
        (["bungle"], "allowed are report, check, bundle, import, or none"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(command, tmp_path, arguments, said):
    (tmp_path / "empty").touch()
    status, out, err = command(*arguments, *(TINY if len(arguments) > 1 else ()))
    assert (status, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_another_space_is_told(command, far):
    status, _, err = command("import", far / "results.jsonl", *TINY, "space.head=[24]")
    assert status == 2
    assert "give import the options of space and data that bundle was given" in err
