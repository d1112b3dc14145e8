"""Ways to damage results and bundles, each of which has to be noticed.

Checksums are made to fit again, so that they do not help.
"""

import hashlib
import io
import json
import stat
import warnings
import zipfile

from hypothesis import strategies as st

from latency_lut.machine import fingerprint_of

EPOCH = (1980, 1, 1, 0, 0, 0)
NO_TIME = (float("nan"), float("inf"), -float("inf"), -1.0, 0, -0.0, None, "7.5", True, 1e300, 10**400, [], {}, [7.5])
NO_COUNT = (-1, 1.5, None, "1", True, 10**30, [0])
ESCAPES = ("../x", "/etc/x", "a/../../x", "..\\x", "C:\\x", "models/../../x", "x\0y", "./x", "~/x", "models//x", "con\n")


def lines_of(results):
    return [json.loads(line) for line in results.splitlines()]


def joined(lines, fits=True):
    """Results of these lines, with the checksum at the end made to fit, or as it is."""
    content = b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines[:-1])
    if not fits or not isinstance(lines[-1], dict) or "sha256" not in lines[-1]:
        return content + json.dumps(lines[-1]).encode() + b"\n"
    return content + json.dumps({**lines[-1], "sha256": hashlib.sha256(content).hexdigest()}).encode() + b"\n"


def visits(lines):
    return [index for index, line in enumerate(lines) if line["kind"] == "visits"]


@st.composite
def damaged_results(draw, results, anchors):
    """Results with one thing wrong, and what it is."""
    lines = lines_of(results)
    what = draw(st.sampled_from(sorted(RESULT_DAMAGES)))
    changed = RESULT_DAMAGES[what](draw, lines, anchors)
    return what, changed if isinstance(changed, bytes) else joined(changed)


def _time(draw, lines, anchors):
    line = lines[draw(st.sampled_from(visits(lines)))]
    line["us"][draw(st.integers(0, len(line["us"]) - 1))] = draw(st.sampled_from(NO_TIME))
    return lines


def _position(draw, lines, anchors):
    line = lines[draw(st.sampled_from(visits(lines)))]
    line["position"][draw(st.integers(0, len(line["position"]) - 1))] = draw(st.sampled_from(NO_COUNT))
    return lines


def _same_position(draw, lines, anchors):
    index = draw(st.sampled_from(visits(lines)[:-1]))
    if lines[index + 1].get("batch") == lines[index]["batch"]:
        lines[index + 1]["position"] = lines[index]["position"]
        return lines
    return _position(draw, lines, anchors)


def _visit_count(draw, lines, anchors):
    line = lines[draw(st.sampled_from(visits(lines)))]
    more = draw(st.booleans())
    for name in ("us", "position") if draw(st.booleans()) else ("us",):
        line[name] = [*line[name], line[name][0]] if more else line[name][:-1]
    return lines


def _wrong_type(draw, lines, anchors):
    line = lines[draw(st.integers(0, len(lines) - 1))]
    name = draw(st.sampled_from(sorted(line)))
    line[name] = draw(st.sampled_from([None, {}, 1.5, -3, [[]], ["a"], ""]))
    return joined(lines, fits=name != "sha256")  # a checksum that is made to fit is no damage


def _field(draw, lines, anchors):
    line = lines[draw(st.integers(0, len(lines) - 1))]
    if draw(st.booleans()):
        line["comment"] = 1
    else:
        del line[draw(st.sampled_from(sorted(line)))]
    return lines


def _twice(draw, lines, anchors):
    index = draw(st.integers(0, len(lines) - 2))
    return [*lines[: index + 1], *lines[index:]]


def _second_measurement(draw, lines, anchors):
    """A model measured again in a batch of its own, with the anchors as they have to be."""
    others = [index for index in visits(lines) if lines[index]["id"] not in anchors]
    last = lines[others[-1]]
    again = [{**line, "batch": last["batch"] + 1} for line in lines if line.get("batch") == last["batch"]]
    return [*lines[:-1], *again[: len(anchors) + 1], lines[-1]]


def _missing(draw, lines, anchors):
    others = [index for index in visits(lines) if lines[index]["id"] not in anchors]
    del lines[draw(st.sampled_from(others))]
    lines[-1]["measured"] -= 1
    return lines


def _unknown(draw, lines, anchors):
    line = lines[draw(st.sampled_from(visits(lines)))]
    line["id"] = draw(st.sampled_from(["p99999", "", "../p00000", "P00000", "n", "p0000 0"]))
    return lines


def _batch(draw, lines, anchors):
    line = lines[draw(st.sampled_from(visits(lines)))]
    line["batch"] += draw(st.sampled_from([2, 5, -9, 10**20, 0.5]))
    return lines


def _without_anchor(draw, lines, anchors):
    gone = draw(st.sampled_from([index for index in visits(lines) if lines[index]["id"] in anchors]))
    del lines[gone]
    return lines


def _failed_anchor(draw, lines, anchors):
    return [*lines[:-1], {"kind": "failed", "id": anchors[0], "reason": "no"}, {**lines[-1], "failed": 1}]


def _head(draw, lines, anchors):
    name, values = draw(
        st.sampled_from(
            [
                ("unit", ("ms", "s", "US", None)),
                ("schema_version", (0, 2, "1", 1.0, True, None)),
                ("bundle", ("0" * 64, "", "x" * 64, None)),
                ("fingerprint", ("0" * 16, "", None)),
                ("device", ({}, [], None, "x86")),
                ("kind", ("end", "tail", None)),
            ]
        )
    )
    lines[0][name] = draw(st.sampled_from(values))
    return lines


def _device(draw, lines, anchors):
    """Another device, sometimes with the fingerprint that fits."""
    device = lines[0]["device"]
    name = draw(st.sampled_from(["threads", "provider", "runtime", "batch"]))
    device[name] = draw(st.sampled_from([7, "7", None, "x" * 1000, True, -1, "a\nb"]))
    if draw(st.booleans()):
        lines[0]["fingerprint"] = lines[-1]["fingerprint"] = fingerprint_of(device)
    return lines


def _other_machine(draw, lines, anchors):
    lines[0]["device"][draw(st.sampled_from(["cpu", "os", "runtime_version", "cores"]))] = draw(st.sampled_from(["other", 3.5]))
    return lines


def _end(draw, lines, anchors):
    name, values = draw(
        st.sampled_from(
            [("complete", (False, 1, None, "true")), ("measured", (0, 1)), ("failed", (3,)), ("fingerprint", ("0",))]
        )
    )
    lines[-1][name] = draw(st.sampled_from(values))
    return lines


def _no_end(draw, lines, anchors):
    return joined([*lines, None])[: -len(b"null\n")][: -len(json.dumps(lines[-1])) - 1]


def _wrong_sum(draw, lines, anchors):
    content = joined(lines)
    position = content.rindex(b'"sha256": "') + len(b'"sha256": "') + draw(st.integers(0, 63))
    return content[:position] + (b"0" if content[position : position + 1] != b"0" else b"1") + content[position + 1 :]


def _truncated(draw, lines, anchors):
    content = joined(lines)
    return content[: draw(st.integers(0, len(content) - 1))]


def _flipped(draw, lines, anchors):
    content = bytearray(joined(lines))
    content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


def _behind_the_end(draw, lines, anchors):
    return joined(lines) + draw(st.sampled_from([b"\n", b"{}", b'{"kind":"head"}\n', b"\0"]))


def _long_line(draw, lines, anchors):
    index = draw(st.sampled_from(visits(lines)))
    lines[index] = json.dumps(lines[index])[:-1].encode() + b" " * 70_000 + b"}\n"
    return lines


def _no_json(draw, lines, anchors):
    bad = (b"\n", b"[]\n", b"[" * 60_000 + b"\n", b"\xff\xfe\n", b'{"kind":"visits"\n', b'"x"\n', b"9" * 6000 + b"\n")
    index = draw(st.integers(0, len(lines) - 2))
    return [*lines[:index], draw(st.sampled_from(bad)), *lines[index + 1 :]]


def _name_twice(draw, lines, anchors):
    index = draw(st.sampled_from(visits(lines)))
    text = json.dumps(lines[index])
    lines[index] = f'{text[:-1]}, "us": [1.0]}}\n'.encode()
    return lines


RESULT_DAMAGES = {
    name.strip("_").replace("_", " "): function
    for name, function in list(globals().items())
    if name.startswith("_") and callable(function) and not name.startswith("__")
}


# -- bundles ------------------------------------------------------------------------------------------------------------------


def packed(files, names=None):
    """A zip file of these; `names` are `ZipInfo` of other names or attributes."""
    content = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # about names that are there twice
        for name, data in files:
            info = zipfile.ZipInfo("placeholder", EPOCH)
            info.filename = info.orig_filename = name
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = (names or {}).get(name, stat.S_IFREG | 0o644) << 16
            archive.writestr(info, data)
    return content.getvalue()


def with_manifest(files, manifest):
    """The same files with another manifest, of which the results say that they are."""
    content = json.dumps(manifest).encode()
    lines = lines_of(dict(files)["results.jsonl"])
    lines[0]["bundle"] = hashlib.sha256(content).hexdigest()
    changed = {"manifest.json": content, "results.jsonl": joined(lines)}
    return [(name, changed.get(name, data)) for name, data in files]


MANIFEST_DAMAGES = [
    (("unit",), ("ms", None)),
    (("schema_version",), (0, 2, True, 1.0, "1")),
    (("format",), ("zip", None)),
    (("space", "fingerprint"), ("0" * 16, None, "")),
    (("device", "name"), ("../evil", "/evil", "", "a/b", "x" * 300, None, "a\0")),
    (("device", "runtime"), ("torch", "os", "../x", None, 3)),
    (("device", "provider"), ("cpu", "", None, "NoneExecutionProvider")),
    (("device", "threads"), (0, -1, True, 2, "1", 1e3)),
    (("device", "batch"), (0, 2, None)),
    (("seed",), (-1, None, 1.5, 2**70)),
    (("max_pairs",), (0, 1, 12, "all", 2**40)),
    (("protocol", "pair", "rounds"), (0, 2, 7, True, 10**9)),
    (("protocol", "pair", "visit_s"), (0, -1, float("nan"), float("inf"), 1e9, True, "1")),
    (("protocol", "pair", "batch"), (0, -1, None)),
    (("protocol", "network"), (None, {}, [])),
    (("anchors",), ([], ["p00000", "p00000"], ["n00000"], ["../p"], None, [{}], "p00000")),
    (("models",), ([], None, {}, [None], "models")),
    (("models", 3, "id"), ("../../x", "p00002", "", "a/b", None, "é" * 3)),
    (("models", 3, "kind"), ("network", "layer", None)),
    (("models", 3, "spec"), ("{}", "", "[]", None, '{"operator":"conv2d","in_channels":3,"out_channels":5}')),
    (("models", 3, "lowering"), ("warp", None, "torch_fp32", ["fp32"])),
    (("models", 3, "sha256"), ("0" * 64, "0" * 63, None, "g" * 64)),
    (("models", 3, "size_bytes"), (0, -1, 2**60, 17, True)),
    (("models", -1, "architecture"), ("{}", "[]", "", '{"depth":1e999}', None, '{"x":"y"}')),
    (("models", -1, "lowerings"), ([], ["fp32"], ["warp"], None, [[]])),
    (("models", -1, "source"), ("chance", None, {})),
    (("files",), (None, {}, {"../x": {"size_bytes": 1, "sha256": "0" * 64}}, [])),
]


@st.composite
def damaged_bundles(draw, files):
    """A zip file of a bundle with results with one thing wrong, and what it is."""
    what = draw(
        st.sampled_from(["manifest", "name", "link", "twice", "checksum", "gone", "added", "truncated", "around", "bomb"])
    )
    names = [name for name, _ in files]
    model = draw(st.sampled_from([name for name in names if name.startswith("models/")]))
    if what == "manifest":
        path, values = draw(st.sampled_from(MANIFEST_DAMAGES))
        manifest = json.loads(dict(files)["manifest.json"])
        place = manifest
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = draw(st.sampled_from(values))
        return f"{what} {path} {place[path[-1]]!r}"[:100], packed(with_manifest(files, manifest))
    if what == "name":
        return what, packed([*files, (draw(st.sampled_from(ESCAPES)), b"x")])
    if what == "link":
        kind = draw(st.sampled_from([stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK]))
        return what, packed(files, {draw(st.sampled_from(names)): kind | 0o777})
    if what == "twice":
        name = draw(st.sampled_from(names))
        return what, packed([*files, (draw(st.sampled_from([name, name.upper()])), dict(files)[name])])
    if what == "checksum":
        return what, packed([(name, b"x" + data[1:] if name == model else data) for name, data in files])
    if what == "gone":
        name = draw(st.sampled_from([model, "manifest.json", "results.jsonl", "runner.py"]))
        return what, packed([file for file in files if file[0] != name])
    if what == "added":
        return what, packed([*files, (draw(st.sampled_from(["models/extra.onnx", "README", "x/y/z", "empty"])), b"")])
    content = packed(files)
    if what == "truncated":
        return what, content[: draw(st.integers(3, len(content) - 1))]
    if what == "around":
        junk = draw(st.binary(min_size=1, max_size=100))
        return what, junk + content if draw(st.booleans()) and not junk.startswith(b"PK") else content + junk
    return what, _bomb(draw, files, model)


def _bomb(draw, files, model):
    """A file that is far larger than it may be, or says that it is small."""
    name = draw(st.sampled_from(["manifest.json", "results.jsonl", model]))
    content = packed([(n, bytes(2**22) if n == name else data) for n, data in files])
    if draw(st.booleans()):  # its entry in the directory says that it is small
        small = draw(st.sampled_from([0, 100, len(dict(files)[name])])).to_bytes(4, "little")
        at = content.rindex(b"PK\x01\x02", 0, content.rindex(name.encode()))
        content = content[: at + 24] + small + content[at + 28 :]
    return content
