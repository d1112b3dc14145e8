"""Programs: layers and whole networks as torch.export programs (`.pt2`), the models of the runtime torch.

A program is made on the CPU and holds nothing but tensors and aten operators, so any torch loads it, on a CPU or a GPU:
`torch.export.load("model.pt2").module()`. Ours loads one only after it has looked through it, because torch's own loader
unpickles what a file tells it to. Compiling programs (AOTInductor) is not done here.
"""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2
from torch.fx import GraphModule

from latency_lut.lowering import LayerWeights
from latency_lut.lowerings.torch_layers import Grid, LayerProgram, lower_to_module, to_dtype
from latency_lut.network import BORDER_SCALE, random_weights
from spaces.errors import UserError
from spaces.layers import INPUT, LayerSpec, Network
from spaces.precision import FLOAT_BITS

METADATA = "netwright.json"
_FILES = re.compile(  # of a program, within its folder
    r"models/model\.json|data/(weights/weight_\d+|constants/tensor_\d+|weights/model_weights_config\.json"
    r"|constants/model_constants_config\.json|sample_inputs/model\.pt)|extra/netwright\.json"
    r"|archive_format|archive_version|byteorder|\.data/(version|serialization_id)"
)
_OPERATOR = re.compile(r"torch\.ops\.aten\.(?!from_file)[\w.]+")
TENSOR_BYTES, OPERATOR_BYTES = 1420, 1200  # what a tensor and an operator take in a file


class NetworkProgram(nn.Module):
    """A whole network: float images `(batch, *input_shape)` to float logits.

    Args:
        network: the layers.
        layers: one per node.
    """

    def __init__(self, network: Network, layers: Sequence[LayerProgram]) -> None:
        super().__init__()
        self.network, self.layers = network, nn.ModuleList(layers)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002, the name is that of the model's input
        tensors = {INPUT: input.contiguous(memory_format=torch.channels_last)}
        for node, layer in zip(self.network.nodes, self.layers, strict=True):
            tensors[node.name] = layer(*(tensors[source] for source in node.inputs))
        return to_dtype(tensors[self.network.nodes[-1].name], torch.float32)


class AloneProgram(nn.Module):
    """One layer in the surroundings of its own: floats in single precision at its borders, bytes on a grid that is given."""

    def __init__(self, layer: LayerProgram) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:  # noqa: A002
        y: torch.Tensor = self.layer(input, skip)
        return to_dtype(y, torch.float32) if y.is_floating_point() else y


def build_model(
    network: Network,
    lowerings: Sequence[str],
    weights: Mapping[str, LayerWeights],
    batch: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """A network as a serialized program; see `latency_lut.network.build_model`.

    Raises:
        ValueError: another number of lowerings than nodes, or one that does not apply.
    """
    if len(lowerings) != len(network.nodes):
        raise ValueError(f"{len(lowerings)} lowerings for {len(network.nodes)} layers")
    grids: dict[str, Grid | None] = {INPUT: None}
    layers = []
    for node, name in zip(network.nodes, lowerings, strict=True):
        skip_grid = grids[node.inputs[1]] if node.spec.skip_bits else None
        layers.append(lower_to_module(name, node.spec, weights[node.name], grids[node.inputs[0]], skip_grid))
        grids[node.name] = layers[-1].output_grid
    example = torch.zeros(batch, *network.input_shape)
    return _serialized(_exported(NetworkProgram(network, layers), (example,)), metadata)


def build_layer(spec: LayerSpec, lowering: str, weights: LayerWeights, batch: int = 1) -> bytes:
    """One layer alone as a serialized program. Quantized tensors cross its border as bytes, channels first."""
    return _serialized(_alone(spec, lowering, weights, batch), None)


def layer_bytes(spec: LayerSpec, lowering: str, scope: str) -> int:
    """Bytes that one layer adds to the file of a program, within some per cent; names do not matter in it."""
    program = _alone(spec, lowering, random_weights(spec, np.random.default_rng(0)), 1)
    tensors: list[torch.Tensor] = [*program.state_dict.values(), *program.constants.values()]
    stored = sum(int(tensor.nbytes) for tensor in tensors)
    return stored + len(tensors) * TENSOR_BYTES + len(operators_of(program)) * OPERATOR_BYTES


def operators_of(program: ExportedProgram) -> list[str]:
    """Names of the aten operators of a program, in their order, such as `aten.conv2d.default`."""
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


def _alone(spec: LayerSpec, lowering: str, weights: LayerWeights, batch: int) -> ExportedProgram:
    border = Grid(BORDER_SCALE, 0)
    grids = [border if 0 < bits < FLOAT_BITS else None for bits in (spec.input_bits, spec.skip_bits)]
    layer = lower_to_module(lowering, spec, weights, grids[0], grids[1])
    dtypes = {FLOAT_BITS: torch.float32, 8: torch.uint8}
    examples = []
    for bits, shape in zip((spec.input_bits, spec.skip_bits), spec.input_shapes, strict=False):
        layout = torch.channels_last if len(shape) == 3 else torch.contiguous_format
        examples.append(torch.zeros((batch, *shape), dtype=dtypes[bits]).contiguous(memory_format=layout))
    return _exported(AloneProgram(layer), tuple(examples))


def _exported(module: nn.Module, examples: tuple[torch.Tensor, ...]) -> ExportedProgram:
    for part in module.modules():
        for name, tensor in part.named_buffers(recurse=False):
            setattr(part, name, tensor.clone())  # views of larger arrays would be stored with all of these
    with torch.no_grad():
        return torch.export.export(module.eval(), examples)


def _serialized(program: ExportedProgram, metadata: Mapping[str, str] | None) -> bytes:
    program.example_inputs = None
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Weights with channels last fill their storage, in another order than the warning thinks of.
        warnings.filterwarnings("ignore", message="No complete tensor found in the group")
        torch.export.save(program, content, extra_files={METADATA: json.dumps(dict(metadata or {}))})
    return content.getvalue()


# -- reading ------------------------------------------------------------------------------------------------------------------


def read_program(model: bytes) -> ExportedProgram:
    """A program from its bytes.

    Raises:
        UserError: they are not a program, or one with more in it than tensors and aten operators.
    """
    return read_module(model)[0]


def read_module(model: bytes) -> tuple[ExportedProgram, GraphModule]:
    """A program from its bytes, and as a module that takes its inputs and returns a tuple.

    Raises:
        UserError: they are not a program, or one with more in it than tensors and aten operators.
    """
    try:
        _check(zipfile.ZipFile(io.BytesIO(model)))
        # Not torch.export.load: where this fails, that goes on and reads files of older versions, which are pickled.
        program = load_pt2(io.BytesIO(model)).exported_programs["model"]
        return program, program.module(check_guards=False)
    except Exception as error:  # a damaged file makes torch's loader fail in any way
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"not a program of this runtime ({reason}); make the model again") from error


def _check(archive: zipfile.ZipFile) -> None:
    """Whether torch's loader will find nothing to unpickle, to evaluate or to load as a library in an archive.

    Raises:
        ValueError: it would.
    """
    names = archive.namelist()
    if len(set(names)) != len(names) or len({name.partition("/")[0] for name in names}) != 1:
        raise ValueError("files of one name, or in two folders")
    for name in names:
        inner = name.partition("/")[2]
        if not _FILES.fullmatch(inner):
            raise ValueError(f"file {inner[:60]!r}, which a program does not have")
        if inner.endswith("_config.json"):
            for tensor in json.loads(archive.read(name))["config"].values():
                if tensor["use_pickle"] or not tensor["path_name"].startswith(("weight_", "tensor_")):
                    raise ValueError(f"{inner} names pickled data")
        elif inner.startswith("data/sample_inputs/") and archive.getinfo(name).file_size:
            raise ValueError("it has example inputs, which are pickled")
        elif inner.startswith("models/"):
            foreign = [text for text in _targets(json.loads(archive.read(name))) if not _OPERATOR.fullmatch(text)]
            if foreign:
                raise ValueError(f"operator {foreign[0][:60]}; allowed are those of torch.ops.aten")


def _targets(value: object) -> Iterator[str]:
    """The operators that a serialized graph names, and `an expression` for what torch would evaluate."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "target" and isinstance(inner, str) and "inputs" in value:
                yield inner
            elif key in ("as_expr", "expr_str"):
                yield f"an expression, {inner}"
            else:
                yield from _targets(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _targets(inner)
