"""The graph builder: names, constants, grids, and models that the checker and the runtime accept."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import numpy_helper

from latency_lut.graph import IR_VERSION, OPSET, GraphBuilder, Tensor


def run(model: bytes, **inputs: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def doubled(constant: np.ndarray, metadata: dict[str, str] | None = None) -> bytes:
    g = GraphBuilder()
    x = g.input("x", constant.shape)
    g.scope = "layer1"
    return g.model(g.op("Mul", [x, g.constant("factor", constant)], "mul"), metadata)


def test_names_tell_the_layer() -> None:
    g = GraphBuilder()
    x = g.input("x", (2,))
    for layer in ("one", "two"):
        g.scope = layer
        x = g.op("Add", [x, g.constant("bias", np.ones(2, np.float32))], "add")
    graph = onnx.load_from_string(g.model(x)).graph
    assert [node.name for node in graph.node] == ["one/add", "two/add"]
    assert [list(node.output) for node in graph.node] == [["one/add"], ["two/add"]]
    assert [initializer.name for initializer in graph.initializer] == ["one/bias", "two/bias"]
    assert [value.name for value in graph.input] == ["x"]
    assert [value.name for value in graph.output] == ["two/add"]


def test_versions_and_metadata() -> None:
    proto = onnx.load_from_string(doubled(np.ones(3, np.float32), {"architecture": '{"a":1}', "device": "x"}))
    assert proto.ir_version == IR_VERSION
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", OPSET)]
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"architecture": '{"a":1}', "device": "x"}


def test_the_same_graph_is_the_same_bytes() -> None:
    """A model's checksum stands on its card."""
    assert doubled(np.full(3, 2.0, np.float32)) == doubled(np.full(3, 2.0, np.float32))
    assert doubled(np.full(3, 2.0, np.float32)) != doubled(np.full(3, 3.0, np.float32))


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::2, 1:],
        np.array(7.0, np.float32),
        np.float32(np.pi) * np.ones((1, 1), np.float32),
    ],
    ids=["transposed", "strided", "scalar", "plain"],
)
def test_constants_keep_values_and_shape_in_any_memory_layout(array: np.ndarray) -> None:
    model = doubled(array)
    np.testing.assert_array_equal(numpy_helper.to_array(onnx.load_from_string(model).graph.initializer[0]), array)
    np.testing.assert_array_equal(run(model, x=np.ones(array.shape, np.float32)), array)


@pytest.mark.parametrize("dtype", [np.float32, np.int8, np.uint8, np.int32, np.int64])
def test_constants_keep_their_type(dtype: type) -> None:
    g = GraphBuilder()
    value = g.constant("c", np.array([1, 2, 100], dtype))
    assert value.dtype == ir.DataType.from_numpy(np.dtype(dtype))
    assert value.const_value is not None
    assert value.const_value.numpy().dtype == dtype


@pytest.mark.parametrize(("scale", "zero_point"), [(0.02, 0), (0.1, 128), (0.5, 255), (3.7, 17)])
def test_quantize_and_dequantize_are_the_uint8_grid(scale: float, zero_point: int) -> None:
    x = np.linspace(-300, 300, 401, dtype=np.float32) * np.float32(scale)
    g = GraphBuilder()
    tensor = g.quantize(g.input("x", x.shape), np.float32(scale), zero_point, "q")
    assert tensor.value.dtype in (None, ir.DataType.UINT8)
    result = run(g.model(g.dequantize(tensor, "dq")), x=x)
    levels = np.clip(np.rint(x / np.float32(scale)) + zero_point, 0, 255)
    np.testing.assert_allclose(result, (levels - zero_point) * scale, rtol=1e-5, atol=1e-6)


def test_a_float_tensor_is_not_dequantized() -> None:
    g = GraphBuilder()
    x = g.input("x", (3,))
    assert g.dequantize(Tensor(x), "dq") is x
    assert g.nodes == []


def test_every_reader_gets_a_dequantization_of_its_own() -> None:
    g = GraphBuilder()
    tensor = g.quantize(g.input("x", (3,)), np.float32(0.1), 0, "q")
    one, two = g.dequantize(tensor, "first"), g.dequantize(tensor, "second")
    assert one is not two
    assert [node.op_type for node in g.nodes] == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear"]


def test_inputs_have_the_declared_type() -> None:
    g = GraphBuilder()
    x = g.input("x", (1, 2), ir.DataType.UINT8)
    model = g.model(g.op("Transpose", [x], "t", perm=[1, 0]))
    array = np.array([[3, 250]], np.uint8)
    np.testing.assert_array_equal(run(model, x=array), array.T)
