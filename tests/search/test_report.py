"""The report of a run: complete, self-contained, escaped, and robust against parts that are not there."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from search.report import DEVICE_FIGURES, SHARED_FIGURES, print_front, write_report
from search.report_choices import layers
from search.report_devices import contrast, overview
from search.report_text import PER_DEVICE, measured_where, microseconds, pareto, plus_minus, supernet_cost, takeaway, views
from spaces.errors import UserError

EXAMPLE: dict[str, Any] = json.loads(Path(__file__).with_name("summary_example.json").read_text(encoding="utf-8"))
HOSTILE = "</script><img src=x onerror=alert(1)>\"'&[bold]"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.styles = ""
        self._within = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = tag if tag in ("script", "style") else self._within

    def handle_endtag(self, tag: str) -> None:
        self._within = "" if tag == self._within else self._within

    def handle_data(self, data: str) -> None:
        if self._within == "style":
            self.styles += data
        elif not self._within:
            self.text += data

    def all(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]


def written(summary: dict[str, Any], folder: Path) -> str:
    path = folder / "report.html"
    write_report(summary, path)
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def printed(summary: dict[str, Any], width: int = 100) -> str:
    stream = io.StringIO()
    print_front(summary, Console(file=stream, width=width))
    return stream.getvalue()


def example(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(EXAMPLE), **changes}


def drawn(page: str) -> dict[str, Any]:
    """The figures that the page draws, by name."""
    line = next(line for line in page.splitlines() if "plots = {" in line)
    return dict(json.loads(line[line.index("plots = ") + len("plots = ") :].rstrip(";")))


def places(page: str) -> list[str]:
    """Where figures are drawn."""
    return [name for name in Page(page).all("id") if name.startswith("figure-")]


def hostile(value: Any) -> Any:
    """Every text of a summary, keys of free mappings included, with markup in it."""
    if isinstance(value, dict):
        free = {"torch", "tables", "objectives", "latency@x86"} & set(value)
        return {key: hostile(item) for key, item in value.items()} | {key + HOSTILE: hostile(value[key]) for key in free}
    if isinstance(value, list):
        return [hostile(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the example."""
    return written(example(), tmp_path_factory.mktemp("run"))


# -- the page -------------------------------------------------------------------------------------------------------------


def test_page_loads_nothing_and_carries_plotly_once(text: str) -> None:
    page = Page(text)
    assert not page.all("src")
    assert "link" not in {tag for tag, _ in page.tags}
    assert all(not href.startswith(("http:", "https:", "//", "data:", "javascript:")) for href in page.all("href"))
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    assert any("default-src 'none'" in content for content in page.all("content"))
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    assert len(text.encode()) < 8_000_000


def test_page_is_the_same_for_the_same_summary(text: str, tmp_path: Path) -> None:
    assert written(example(), tmp_path) == text


def test_every_figure_is_drawn_into_its_place(text: str) -> None:
    figures = drawn(text)
    assert set(figures) == {*DEVICE_FIGURES, *SHARED_FIGURES}
    assert sorted(f"figure-{name}" for name in figures) == sorted(places(text))
    assert all(any(trace.get("x") or trace.get("z") for trace in figure["data"]) for figure in figures.values())


def test_front_shows_measured_and_predicted_latency(text: str) -> None:
    traces = {trace.get("name"): trace for trace in drawn(text)["front"]["data"]}
    winners = EXAMPLE["winners"]
    assert traces["winner, measured (number: rank)"]["x"] == [w["measured_us"] for w in winners]
    assert traces["winner, predicted latency"]["x"] == [w["predicted_us"] for w in winners]
    families = {b["family"] for b in EXAMPLE["baselines"]}
    assert sum(name is not None and name.endswith(", measured") for name in traces) == len(families)


def test_heading_counts_winners_and_names_speedups_and_error(text: str) -> None:
    text = Page(text).text
    verified = sum(w["verified"] for w in EXAMPLE["winners"])
    assert f"{verified} of {len(EXAMPLE['winners'])}" in text
    assert f"{EXAMPLE['beats']['uniform_int8']['median_speedup']:.2f}" in text
    assert f"{100 * EXAMPLE['latency_model']['mape']:.1f} %" in text
    assert "Nothing feasible" not in text
    assert EXAMPLE["does_not_pay"][0] in text
    assert EXAMPLE["fingerprints"]["space"] in text
    failed = next(w for w in EXAMPLE["winners"] if w["failures"])
    assert f"Winner {failed['rank']} is not verified" in text
    assert failed["failures"][0] in text


def test_a_verified_winner_that_is_off_its_prediction_is_not_called_unverified(tmp_path: Path) -> None:
    off = {
        **EXAMPLE["winners"][0],
        "verified": True,
        "failures": ["latency 13.1 us: predicted 14.7 us (+12.0%), tolerance 10%"],
    }
    write_report(example(winners=[off]), tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert f"Winner {off['rank']} is off its prediction: latency 13.1 us" in text
    assert "is not verified" not in text


def test_latency_is_told_with_device_runtime_threads_batch_and_statistic(text: str) -> None:
    sections = Page(text).text.split("Every latency here: ")[1:]
    assert len(sections) >= 4
    for section in sections:
        told = section.split("\n")[0]
        for word in ("x86", "onnxruntime 1.31.0", "CPUExecutionProvider", "1 thread", "batch 1", "median over 8 visits"):
            assert word in told


@pytest.mark.parametrize(
    ("where", "told"),
    [
        (("this machine",) * 3, ""),
        (
            ("ssh host pi", "ssh host pi", "here"),
            "latency, outputs and accuracy in the runtime on ssh host pi; the optimized graph on here",
        ),
        (
            ("ssh host pi", "here", "here"),
            "latency on ssh host pi; outputs, accuracy in the runtime and the optimized graph on here",
        ),
    ],
)
def test_where_winners_of_a_device_elsewhere_were_measured_is_told(where: tuple[str, str, str], told: str) -> None:
    measured_on = dict(zip(("latency", "accuracy", "graph"), where, strict=True))
    summary = {"winners": [{"measured_on": measured_on}]}
    assert measured_where(summary) == (f"Of winners and baselines were measured: {told}." if told else "")
    assert measured_where({}) == measured_where({"winners": [{}]}) == ""


def test_page_says_what_the_search_left_out(text: str, tmp_path: Path) -> None:
    assert "left out" not in Page(text).text  # a run of before
    summary = example()
    summary["study"]["left_out"] = {"options": 1, "of": 137, "devices": ["x86"], "what": ["precision 8 of stem"]}
    told = " ".join(Page(written(summary, tmp_path)).text.split())
    assert "The search left out 1 of 137 options, which are nowhere faster on x86" in told
    assert "precision 8 of stem" in told
    summary["study"]["left_out"] = {"options": 0, "of": 137, "devices": ["x86"], "what": []}
    assert "The search left out nothing" in Page(written(summary, tmp_path)).text


def test_the_cost_of_the_supernet_is_told_in_networks_trained_alone() -> None:
    supernet: dict[str, Any] = {"macs": 6e12, "winner_alone_macs": 2e12, "winner_finishing_macs": 0.0, "pays_from_winners": 3}
    text = supernet_cost({"supernet": supernet})
    assert "as much as 3.0 networks" in text
    assert text.endswith("it pays from 3 winners on.")
    assert "Finishing" not in text
    finished = supernet_cost({"supernet": supernet | {"winner_finishing_macs": 3e11, "pays_from_winners": 4}})
    assert "Finishing took 5.0 % of that for each winner" in finished
    assert finished.endswith("it pays from 4 winners on.")
    never = supernet_cost({"supernet": supernet | {"winner_finishing_macs": 3e12, "pays_from_winners": None}})
    assert never.endswith("Finishing costs more than training alone.")
    assert not supernet_cost({})
    assert not supernet_cost({"supernet": {"macs": 6e12}})


def test_no_speedup_is_claimed_where_nothing_is_beaten(tmp_path: Path) -> None:
    beats = {"uniform_int8": {"networks": 7, "beaten": 0, "median_speedup": None, "best_speedup": None}}
    assert "They do not beat uniform int8." in takeaway(example(beats=beats))
    assert "they are" not in takeaway(example(beats=beats))
    assert "0 of 7 networks beaten" in Page(written(example(beats=beats), tmp_path)).text


def test_links_are_relative_and_cannot_run_anything(tmp_path: Path) -> None:
    summary = example()
    summary["winners"][1]["path"] = "javascript:alert(1)"
    links = Page(written(summary, tmp_path)).all("href")
    assert {"winners/x86/1/model.onnx", "winners/x86/1/card.json"} <= set(links)
    assert not any(link.startswith("javascript:") for link in links)


def test_text_of_the_run_is_escaped(text: str, tmp_path: Path) -> None:
    attacked = written(hostile(example()), tmp_path)
    page, plain = Page(attacked), Page(text)
    assert "<img" not in attacked[attacked.index("<body>") :]
    tags = {tag for tag, _ in page.tags}
    assert tags == {tag for tag, _ in plain.tags}
    assert sum(tag == "script" for tag, _ in page.tags) == sum(tag == "script" for tag, _ in plain.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.text.count(HOSTILE) > 40  # shown as the text it is
    # plotly reads HTML of its own in texts: the run's tags must have become entities before
    assert "<img" not in json.dumps(drawn(attacked))


@pytest.mark.parametrize("missing", sorted(EXAMPLE))
def test_every_part_is_optional(missing: str, tmp_path: Path) -> None:
    summary = example()
    del summary[missing]
    assert "<h1>" in written(summary, tmp_path)
    printed(summary)


def test_parts_may_be_empty_or_null_or_not_finite(tmp_path: Path) -> None:
    def weakened(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: weakened(item) for key, item in value.items()}
        if isinstance(value, list):
            return [weakened(item) for item in value]
        return math.nan if isinstance(value, float) else value

    for summary in ({}, dict.fromkeys(EXAMPLE), {key: type(value)() for key, value in EXAMPLE.items()}, weakened(EXAMPLE)):
        page = written(summary, tmp_path)
        assert ">nan" not in page
        printed(summary)


def test_empty_front_leads_with_the_nearest_miss(tmp_path: Path) -> None:
    miss = {"constraint": "latency@x86<=10us", "value": 34.0, "unit": "us", "text": "34.0 us, 3.4 times latency@x86<=10us"}
    summary = example(front=[], winners=[], baselines=[], beats={})
    summary["study"]["nearest_miss"] = miss
    text = Page(written(summary, tmp_path)).text
    assert text.index("Nothing feasible was found") < text.index(miss["text"]) < text.index("The search")
    assert "latency@x86<=10us" in text
    console = printed(summary)
    assert "Nothing feasible" in console
    assert miss["text"] in console


def test_front_without_winners_says_that_it_is_predicted(tmp_path: Path) -> None:
    summary = example(winners=[], baselines=[], beats={})
    text = Page(written(summary, tmp_path)).text
    assert "The predicted front" in text
    assert "Nothing here was exported or timed yet" in text
    assert f"{100 * EXAMPLE['front'][0]['accuracy']:.2f}" in printed(summary)


def test_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = written(example(), tmp_path)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space"):
        write_report(example(name="other"), tmp_path / "report.html")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


# -- several devices ------------------------------------------------------------------------------------------------------


def two_devices() -> dict[str, Any]:
    """The example with a second device, twice as slow, whose winners are float and dense."""
    summary, first = example(), {part: EXAMPLE[part] for part in PER_DEVICE}
    second = copy.deepcopy(first)
    second["table"]["device"] |= {"name": "phone", "runtime": "onnxruntime-web", "threads": 2}
    second["winners"] = second["winners"][:4]
    for winner in second["winners"]:
        winner["measured_us"] *= 2
        winner["predicted_us"] *= 2
        winner["path"] = winner["path"].replace("x86", "phone")
        for layer in winner["layers"]:
            layer |= {"precision": "fp32", "sparsity": "dense"}
    return {**summary, "devices": {"x86": first, "phone": second}}


def test_every_figure_of_a_device_is_drawn_once_per_device_and_what_is_shared_once(tmp_path: Path) -> None:
    page = written(two_devices(), tmp_path)
    figures = drawn(page)
    both = [*DEVICE_FIGURES, *(f"{name}-2" for name in DEVICE_FIGURES)]
    assert sorted(figures) == sorted([*both, *SHARED_FIGURES, "contrast"])
    assert sorted(f"figure-{name}" for name in figures) == sorted(places(page))
    for place, name in enumerate(("x86", "phone")):
        winners = two_devices()["devices"][name]["winners"]
        figure = figures["front" if place == 0 else "front-2"]
        traces = {trace.get("name"): trace for trace in figure["data"]}
        assert traces["winner, measured (number: rank)"]["x"] == [w["measured_us"] for w in winners]


def test_each_device_is_described_and_has_its_own_sections(tmp_path: Path) -> None:
    page = Page(written(two_devices(), tmp_path))
    text = page.text
    assert {"device-1", "device-2", "shared", "provenance"} <= set(page.all("id"))
    assert {"#device-1", "#device-2", "winners/phone/1/model.onnx", "winners/x86/7/model.onnx"} <= set(page.all("href"))
    assert "winners/phone/5/model.onnx" not in page.all("href")
    x86, phone = (told.split("\n")[0] for told in text.split("Every latency of this device: ")[1:])
    assert "x86" in x86
    assert "1 thread," in x86
    assert "phone" in phone
    assert "onnxruntime-web" in phone
    assert "2 threads, batch 1" in phone
    for once in (
        "Where each device's winners differ",
        "Shared by all devices",
        "Accuracy: Kendall tau",
        "Supernet: accuracy over",
    ):
        assert text.count(once) == 1
    for twice in ("What was chosen, layer by layer", "The search\n", "Hypervolume by round", "mean error on"):
        assert text.count(twice) == 2
    for name in ("x86", "phone"):
        assert text.count(f"What pays on {name}, and what does not") == 1
        assert text.count(f"{name}: device and table") == 1
    assert "devices x86, phone" in text


def test_one_device_has_no_word_of_several(text: str) -> None:
    page = Page(text)
    assert "contrast" not in drawn(text)
    for words in ("Where each device", "Shared by all devices", "Every latency of this device"):
        assert words not in page.text
    assert not {"device-1", "shared"} & set(page.all("id"))


def test_the_picture_of_the_difference_counts_winners() -> None:
    def winner(*layers: tuple[str, int, str]) -> dict[str, Any]:
        return {
            "layers": [{"name": name, "precision": precision, "sparsity": sparsity} for name, precision, sparsity in layers]
        }

    x86 = [winner(("stem", "w8a8", "dense"), ("body", "w8a8", "group@1/2")), winner(("stem", "fp32", "dense"))]
    phone = [winner(("stem", "fp32", "dense"), ("body", "fp32", "dense"), ("head", "fp32", "dense"))] * 3
    figure = contrast([{"winners": x86}, {"winners": phone}])
    assert figure is not None
    assert list(figure.layout.xaxis.ticktext) == ["stem", "body", "head"]
    cells = {trace.name: list(zip(trace.x, trace.base, trace.y, strict=True)) for trace in figure.data}
    assert cells["int8"] == [(0, pytest.approx(0.1), pytest.approx(0.4))]  # on float's, half of the winners each
    assert cells["int8, group@1/2"] == [(1, pytest.approx(0.5), pytest.approx(0.4))]
    assert cells["float"] == [
        (0, pytest.approx(0.5), pytest.approx(0.4)),
        *((x, pytest.approx(1.1), pytest.approx(0.8)) for x in (0, 1, 2)),
    ]
    assert contrast([{"winners": x86}]) is None
    assert contrast([{}, {}]) is None


def test_the_overview_has_a_row_per_device() -> None:
    x86, phone = overview(views(two_devices()))
    assert (x86["device"], phone["device"]) == ("x86", "phone")
    assert (phone["precision of their layers"], phone["sparse layers"]) == ("float 100%", "0%")
    assert "int8" in x86["precision of their layers"]
    fastest = min(w["measured_us"] for w in EXAMPLE["winners"][:4])
    assert phone["measured latency, µs"].startswith(microseconds(2 * fastest, "") + " to ")


def test_a_device_without_a_feasible_network_says_so_and_the_other_shows_its_front(tmp_path: Path) -> None:
    summary = two_devices()
    miss = {"constraint": "latency@phone<=1us", "text": "nothing is feasible: latency@phone<=1us binds"}
    summary["devices"]["phone"] |= {"front": [], "winners": [], "baselines": [], "beats": {}}
    summary["devices"]["phone"]["study"] |= {"nearest_miss": miss}
    text = Page(written(summary, tmp_path)).text
    assert text.index("x86") < text.index("Nothing feasible was found") < text.index(miss["text"])
    assert text.count("Nothing feasible was found") == 1
    console = printed(summary, 200)
    assert "Front of mobile-digits-x86-seed0 on x86" in console
    assert "Nothing feasible was found on phone" in console


def test_parts_of_devices_are_optional_and_their_texts_escaped(tmp_path: Path) -> None:
    attacked = hostile(two_devices())
    attacked["devices"] = {name + HOSTILE: device for name, device in attacked["devices"].items()}
    page = written(attacked, tmp_path)
    assert "<img" not in page[page.index("<body>") :]
    assert "<img" not in json.dumps(drawn(page))
    printed(attacked)
    for part in PER_DEVICE:
        summary = two_devices()
        del summary["devices"]["phone"][part]
        chosen = 1 if part == "winners" else 2  # what a device lacks is not taken from another
        assert Page(written(summary, tmp_path)).text.count("What was chosen") == chosen
        printed(summary)
    for empty in ({}, None):
        page = written({**two_devices(), "devices": {"x86": empty, "phone": empty}}, tmp_path)
        assert "<h1>" in page


@pytest.mark.parametrize("width", [80, 120])
def test_console_shows_the_front_of_each_device(width: int) -> None:
    text = printed(two_devices(), width)
    assert text.index("on x86") < text.index("on phone")
    for device in two_devices()["devices"].values():
        for w in device["winners"]:
            assert microseconds(w["measured_us"], "") in text
    assert max(map(len, text.splitlines())) <= width


# -- figures and words ----------------------------------------------------------------------------------------------------


def test_layers_stand_in_the_order_of_the_network_with_gaps() -> None:
    def winner(*names: str) -> dict[str, Any]:
        return {"layers": [{"name": name, "precision": "w8a8", "sparsity": "group@1/4"} for name in names]}

    rows = [winner("stem", "b2", "b10", "head"), winner("stem", "b3", "head"), winner("stem", "b1", "b2")]
    figure = layers({"winners": rows})
    assert figure is not None
    assert list(figure.layout.xaxis.ticktext) == ["stem", "b1", "b2", "b3", "b10", "head"]
    cells = next(trace for trace in figure.data if trace.name == "int8, group@1/4")
    assert list(cells.x) == [0, 2, 4, 5, 0, 3, 5, 0, 1, 2]
    assert cells.y[0] == pytest.approx(0.8 / 4)  # filled to the kept share


def test_pareto_keeps_what_nothing_dominates() -> None:
    assert pareto([(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (3.0, 0.8), (4.0, 0.9)]) == [(1.0, 0.5), (3.0, 0.9)]


def test_latencies_have_four_figures_and_their_spread_the_same_decimals() -> None:
    assert [microseconds(value) for value in (8.2314, 82.314, 823.14, 8231.4, 0.0, None)] == [
        "8.231 µs",
        "82.31 µs",
        "823.1 µs",
        "8,231 µs",
        "0.0 µs",
        "n/a",
    ]
    assert plus_minus(46.65, 0.368) == "46.65 ± 0.37"


# -- the console ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_console_ends_with_the_front_and_its_units(width: int) -> None:
    text = printed(example(), width)
    for unit in ("us", "kB", "%"):
        assert unit in text
    for w in EXAMPLE["winners"]:
        row = next(line for line in text.splitlines() if re.match(rf"\W*{w['rank']}\b", line))
        assert f"{100 * w['accuracy_runtime']:.2f}" in row
        assert microseconds(w["measured_us"], "") in row
        assert ("yes" if w["verified"] else "no") in row
    assert "onnxruntime 1.31.0" in text
    assert "faster than uniform int8" in text.replace("\n", " ").replace("  ", " ")
    assert max(map(len, text.splitlines())) <= width


def test_console_does_not_read_markup_of_the_run() -> None:
    assert "[/bold]" in printed(example(name="a[/bold]b"))


def test_a_gradient_search_is_shown_and_told_when_it_does_not_beat_random(tmp_path: Path) -> None:
    member = {"weight": 0.1, "seconds": 3.0, "cost": 40.0, "accuracy": 0.9}
    summary = example(
        relaxation={"strategy": "tangle", "fits": {"x86": {"cost": "latency", "mape": 0.09}}, "members": [member]}
    )
    summary["study"] |= {"relaxed": [[40.0, 0.9]], "hypervolume_relaxed": [0.4, 0.5]}
    text = written(summary, tmp_path)
    assert "the gradient search tangle was run with 1 weights of the cost, 3 s in all" in Page(text).text
    assert "mean error was 9.0 % for latency" in Page(text).text
    assert "of 0.400, as many random ones 0.500, so tangle does not beat random search" in Page(text).text
    assert "tangle, accuracy measured" in text
    summary["study"]["hypervolume_relaxed"] = [0.6, 0.5]
    assert "does not beat" not in Page(written(summary, tmp_path)).text


def test_a_search_that_does_not_beat_random_search_says_so(tmp_path: Path) -> None:
    found = written(example(), tmp_path)
    assert "+11.2 % over random search at equal budget" in found
    assert "does not beat" not in Page(found).text
    study = {**EXAMPLE["study"], "strategy": "reinforce", "hypervolume": 0.54}
    page = Page(written(example(study=study), tmp_path))
    assert "-2.1 % over random search at equal budget, so reinforce does not beat it" in page.text
