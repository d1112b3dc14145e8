"""Bundles: everything that a device elsewhere needs to be measured, in one zip file.

It holds the models, a manifest with checksums and a runner of one file, or for a browser a page. The models are those that
a profile would measure here, except that whole networks get lowerings by chance where it is not known yet which are fast
there. The same input gives the same bytes.
"""

from __future__ import annotations

import ast
import hashlib
import io
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from latency_lut.device import Device, load_runtime
from latency_lut.manifest import KINDS, Manifest, Protocol, Stored
from latency_lut.measuring import DEFAULTS, MeasuringSettings
from latency_lut.models import build_layer
from latency_lut.network import random_weights
from latency_lut.profile import BATCH_NETWORKS, BATCH_PAIRS, draw_graded, draw_networks, pairs_of
from latency_lut.runner import MANIFEST
from latency_lut.session import NETWORK_ROUNDS, NETWORK_VISIT_S, Drawn, anchors_of, build_random
from latency_lut.table import LatencyTable, Pair
from latency_lut.transfer import PAIR_ROUNDS, Samples
from latency_lut.web import package
from spaces.errors import UserError
from spaces.files import write_atomically
from spaces.space import Space

RUNNER, START = "runner.py", "__main__.py"
STARTS_RUNNER = b"import sys\n\nimport runner\n\nsys.exit(runner.main())\n"  # python BUNDLE.zip
STARTS_SERVER = STARTS_RUNNER.replace(b"runner", b"serve")
# For browsers: what is in the bundle, and what it is called here.
PAGE_FILES = {
    "index.html": "measure.html",
    **{name: name for name in ("measure.mjs", "sessions.mjs", "sha256.mjs", "serve.py")},
}
# In one file, in this order; the last one's docstring is that of the file.
RUNNER_MODULES = ("machine", "alone", "ort_session", "visits", "outputs", "results_file", "runner")
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every file, so that the same files give the same bytes

Progress = Callable[[int, int], None]


class NothingMissingError(UserError):
    """A table has all that a bundle would bring."""


def write_bundle(
    space: Space,
    device: Device,
    table: Path,
    path: Path,
    settings: MeasuringSettings = DEFAULTS,
    *,
    on_progress: Progress = lambda done, total: None,
) -> Manifest:
    """Write what is to be measured on a device elsewhere.

    Args:
        space: what can be built.
        device: for which device.
        table: the device's table; when it is there, only what is missing in it comes into the bundle.
        path: of the zip file.
        settings: what is measured, and how.
        on_progress: called with how many models are made, and of how many.

    Raises:
        NothingMissingError: the table has all.
        UserError: the table is of another space or device, the runtime has no
            runner, or the file cannot be written.
    """
    manifest = plan(space, device, table, settings)
    pack(manifest, _models(manifest, space, device), device, path, on_progress=on_progress)
    return manifest


def pack(
    manifest: Manifest,
    models: Iterable[tuple[str, bytes]],
    device: Device,
    path: Path,
    *,
    samples: Mapping[str, bytes] = MappingProxyType({}),
    on_progress: Progress = lambda done, total: None,
) -> None:
    """Write a bundle.

    Args:
        manifest: without checksums, which are filled in.
        models: all that it names, serialized.
        device: for which device.
        path: of the zip file.
        samples: the files that its `outputs` name.
        on_progress: called with how many models are packed, and of how many.

    Raises:
        UserError: the runtime has no runner, or the file cannot be written.
    """
    content, total = io.BytesIO(), len(manifest.pairs) + len(manifest.networks)
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for done, (name, model) in enumerate(models):
            on_progress(done, total)
            manifest.models[name] = _add(archive, f"models/{name}.onnx", model)
        for name, data in (*_runner_files(device), *samples.items()):
            manifest.files[name] = _add(archive, name, data)
        _add(archive, MANIFEST, manifest.to_json().encode())
    on_progress(total, total)
    write_atomically(path, content.getvalue())


def plan(space: Space, device: Device, path: Path, settings: MeasuringSettings) -> Manifest:
    """What is missing in a device's table, without the models."""
    table = LatencyTable.load(path) if path.exists() else LatencyTable.empty(space, device)
    if path.exists():
        table.check(space, device)
    wanted, _ = pairs_of(space, np.random.default_rng(settings.seed), settings.max_pairs, description=table.device)
    anchors = table.anchors or anchors_of(wanted)
    pairs = [*anchors, *(pair for pair in wanted if pair not in table.entries and pair not in anchors)]
    timed = sum(network.source == "random" for network in table.networks)
    drawn = [(network, "random") for network in draw_networks(space, table, settings.seed, settings.networks)[timed:]]
    if drawn and not any(network.source == "graded" for network in table.networks):
        drawn += [(network, "graded") for network in draw_graded(space, table, settings.seed)]
    if len(pairs) == len(table.anchors) and not drawn:
        mend = "ask for more with max_pairs or networks, or delete it to measure anew"
        raise NothingMissingError(f"table {path} has everything that is asked for; {mend}")
    return _manifest(space, device, pairs, len(anchors), drawn, settings)


def write_samples(
    space: Space,
    device: Device,
    table: LatencyTable,
    samples: Samples,
    path: Path,
    settings: MeasuringSettings = DEFAULTS,
    *,
    on_progress: Progress = lambda done, total: None,
) -> Manifest:
    """Write the samples of a transfer that are to be measured on a device elsewhere.

    Args:
        space: what can be built.
        device: for which device.
        table: the device's, with what was measured there so far.
        samples: what is missing in it; pairs are out of those that the settings allow.
        path: of the zip file.
        settings: how it is measured; with `PAIR_ROUNDS` visits of a pair.
        on_progress: called with how many models are made, and of how many.

    Raises:
        UserError: the runtime has no runner, or the file cannot be written.
    """
    anchors = table.anchors or anchors_of(samples.pairs)
    pairs = [*anchors, *(pair for pair in samples.pairs if pair not in anchors)]
    manifest = _manifest(space, device, pairs, len(anchors), samples.networks, replace(settings, rounds=PAIR_ROUNDS))
    pack(manifest, _models(manifest, space, device), device, path, on_progress=on_progress)
    return manifest


def _manifest(
    space: Space,
    device: Device,
    pairs: Sequence[Pair],
    anchors: int,
    networks: Sequence[tuple[Drawn, str]],
    settings: MeasuringSettings,
) -> Manifest:
    """Of pairs, the first ones of which are anchors, and of networks with their sources; without the models."""
    pairs_protocol = Protocol(settings.rounds, float(settings.visit_s), BATCH_PAIRS)
    protocols = pairs_protocol, Protocol(NETWORK_ROUNDS, NETWORK_VISIT_S, BATCH_NETWORKS)
    named = {f"p{index:05}": pair for index, pair in enumerate(pairs)}
    return Manifest(
        space.name,
        space.fingerprint,
        replace(device, reach="bundle", energy_meter=None),
        settings.seed,
        settings.max_pairs,
        dict(zip(KINDS, protocols, strict=True)),
        tuple(named)[:anchors],
        named,
        {f"n{index:05}": network for index, network in enumerate(networks)},
    )


def _models(manifest: Manifest, space: Space, device: Device) -> Iterator[tuple[str, bytes]]:
    for index, (name, (spec, lowering)) in enumerate(manifest.pairs.items()):
        rng = np.random.default_rng([manifest.seed, 2, index])
        yield name, build_layer(spec, lowering, random_weights(spec, rng), device.batch)
    for index, (name, ((architecture, lowerings), _)) in enumerate(manifest.networks.items()):
        rng = np.random.default_rng([manifest.seed, 4, index])
        yield name, build_random(space.network(architecture), lowerings, rng, device)


def _add(archive: zipfile.ZipFile, name: str, data: bytes) -> Stored:
    info = zipfile.ZipInfo(name, EPOCH)
    info.compress_type = zipfile.ZIP_DEFLATED
    info.external_attr = 0o100644 << 16
    archive.writestr(info, data)
    return Stored(len(data), hashlib.sha256(data).hexdigest())


def _runner_files(device: Device) -> Iterable[tuple[str, bytes]]:
    """What measures the models on a device.

    Raises:
        UserError: its runtime has nothing that does; onnxruntime-web is not there and cannot be set up.
    """
    if device.runtime == "onnxruntime":
        return {RUNNER: runner_source().encode(), START: STARTS_RUNNER}.items()
    if device.provider in load_runtime("onnxruntime_web").providers_elsewhere():
        own = {name: (package.FOLDER / source).read_bytes() for name, source in PAGE_FILES.items()}
        return {**own, START: STARTS_SERVER, **{file.name: file.read_bytes() for file in package.page_files()}}.items()
    mend = "onnxruntime, or onnxruntime_web with wasm-browser"
    raise UserError(f"device {device.name}: no bundle for runtime {device.runtime} with {device.provider}; allowed are {mend}")


def runner_source() -> str:
    """`latency_lut.runner` and the modules that it imports from here, as one file."""
    folder = Path(__file__).resolve().parent
    docstring, imports, bodies = "", set(), []
    names: dict[str, set[str]] = defaultdict(set)
    for module in RUNNER_MODULES:
        source = (folder / f"{module}.py").read_text(encoding="utf-8")
        lines, tree = source.splitlines(), ast.parse(source)
        docstring = "\n".join(lines[: tree.body[0].end_lineno])
        statements = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        for node in statements:
            if isinstance(node, ast.Import):
                imports.add(ast.unparse(node))
            else:
                names[str(node.module)] |= {alias.name for alias in node.names}
        body = "\n".join(lines[statements[-1].end_lineno :]).strip()
        bodies.append(f"# -- latency_lut/{module}.py {'-' * (100 - len(module))}\n\n{body}\n")
    imports |= {
        f"from {module} import {', '.join(sorted(found))}"
        for module, found in names.items()
        if module != "__future__" and module.partition(".")[0] != "latency_lut"
    }
    head = f"{docstring}\n\nfrom __future__ import annotations\n\n" + "\n".join(sorted(imports))
    return head + "\n\n" + "\n\n".join(bodies)
