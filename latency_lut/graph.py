"""A small ONNX graph builder on onnx_ir: the common ground of the profiler and the exporter.

It knows tensors that are float or quantized, and nothing about layers; those are lowered in `latency_lut.lowering`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

OPSET = 21
IR_VERSION = 10
PROTO_BYTES = 8  # tags and lengths around a name, a type and the data of a message

Attribute = int | float | str | list[int] | list[float]


@dataclass(frozen=True)
class Tensor:
    """A value between nodes: float, or uint8 with its scale and zero point."""

    value: ir.Value
    scale: ir.Value | None = None
    zero_point: ir.Value | None = None


class GraphBuilder:
    """Collects nodes and initializers. Names begin with the current `scope`, so that a node tells its layer."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        self.domains = {""}
        self.scope = ""

    def input(self, name: str, shape: Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        """Declare an input of the graph."""
        value = ir.Value(name=name, shape=ir.Shape(list(shape)), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Add an initializer called `scope/name`."""
        name = f"{self.scope}/{name}"
        value = ir.Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.Tensor(np.require(array, requirements="C"), name=name),
        )
        self.initializers.append(value)
        return value

    def op(
        self, op_type: str, inputs: Sequence[ir.Value | None], name: str, *, domain: str = "", **attributes: Attribute
    ) -> ir.Value:
        """Append a node called `scope/name` and return its only output, of the same name."""
        return self.ops(op_type, inputs, (name,), domain, **attributes)[0]

    def ops(
        self, op_type: str, inputs: Sequence[ir.Value | None], names: Sequence[str], domain: str = "", **attributes: Attribute
    ) -> list[ir.Value]:
        """Append a node with several outputs, called `scope/name` each as `names` say; it has the first one's name."""
        node = ir.node(
            op_type, list(inputs), attributes, domain=domain, num_outputs=len(names), name=f"{self.scope}/{names[0]}"
        )
        for output, name in zip(node.outputs, names, strict=True):
            output.name = f"{self.scope}/{name}"
        self.nodes.append(node)
        self.domains.add(domain)
        return list(node.outputs)

    def reshaped(self, value: ir.Value, shape: Sequence[int], name: str) -> ir.Value:
        """A value in another shape."""
        return self.op("Reshape", [value, self.constant(f"{name}_sizes", np.array(shape, np.int64))], name)

    def quantize(self, value: ir.Value, scale: np.float32, zero_point: int, name: str) -> Tensor:
        """A float value on the uint8 grid."""
        scale_value = self.constant(f"{name}_scale", np.array(scale, np.float32))
        zero_value = self.constant(f"{name}_zero", np.array(zero_point, np.uint8))
        return Tensor(self.op("QuantizeLinear", [value, scale_value, zero_value], name), scale_value, zero_value)

    def dequantize(self, tensor: Tensor, name: str) -> ir.Value:
        """The float value of a tensor: itself, or through a DequantizeLinear of its own (runtimes fuse those only unshared)."""
        if tensor.scale is None or tensor.zero_point is None:
            return tensor.value
        return self.op("DequantizeLinear", [tensor.value, tensor.scale, tensor.zero_point], name)

    def scope_bytes(self, scope: str) -> int:
        """Bytes that the nodes and constants of a scope take in a model file."""
        nodes = [node for node in self.nodes if (node.name or "").startswith(f"{scope}/")]
        constants = [value for value in self.initializers if (value.name or "").startswith(f"{scope}/")]
        total: int = sum(ir.to_proto(node).ByteSize() + PROTO_BYTES for node in nodes)
        for value in constants:
            if value.const_value is not None:
                total += value.const_value.nbytes + len(value.name or "") + PROTO_BYTES + 2 * len(value.const_value.shape)
        return total

    def model(self, output: ir.Value, metadata: dict[str, str] | None = None) -> bytes:
        """The finished model, serialized."""
        graph = ir.Graph(
            self.inputs,
            [output],
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports={domain: OPSET if domain == "" else 1 for domain in sorted(self.domains)},
            name="netwright",
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="netwright", metadata_props=metadata or {})
        proto = ir.to_proto(model)
        del proto.graph.value_info[:]  # types of initializers a second time: bytes that nobody reads
        return bytes(proto.SerializeToString())
