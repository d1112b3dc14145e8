"""Whole networks: outputs against a reference interpreter, and what onnxruntime makes of them in its optimized graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch.nn import functional

from latency_lut.lowering import LayerWeights, applicable
from latency_lut.network import build_layer, build_model, random_weights
from latency_lut.ort_session import session_options
from spaces.layers import INPUT, LayerSpec, Network, NetworkBuilder, Node
from spaces.mobile import MobileSpace
from spaces.quantizers import activation_grid
from spaces.sparsity import mask

FLOAT_CONVOLUTIONS = ("Conv", "FusedConv")


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other, and for seconds where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mobile(precisions: Sequence[str], sparsities: Sequence[str] = ("dense", "group@1/2", "group@1/4")) -> MobileSpace:
    return MobileSpace(
        channels=3,
        classes=7,
        resolutions=[9, 12],
        stem=[8],
        stages=[{"widths": [8, 16], "depths": [1, 2]}, {"widths": [16, 24], "depths": [2], "stride": 2}],
        expansions=[1, 3],
        kernels=[3, 5],
        head=[32],
        precisions=precisions,
        sparsities=sparsities,
    )


# -- reference interpreter ----------------------------------------------------------------------------------------------------

Values = dict[str, np.ndarray]


def on_grid(x: np.ndarray, limits: tuple[float, float] | None) -> np.ndarray:
    assert limits is not None
    scale, zero_point = activation_grid(*limits)
    return np.asarray((np.clip(np.rint(x / float(scale)) + zero_point, 0, 255) - zero_point) * float(scale))


def arithmetic(spec: LayerSpec, weight: np.ndarray | None, bias: np.ndarray | None, x: np.ndarray) -> np.ndarray:
    if spec.operator == "global_pool":
        return np.asarray(x.mean(axis=(2, 3), keepdims=True))
    assert weight is not None
    assert bias is not None
    weight = weight.reshape(*weight.shape[:2], spec.kernel, spec.kernel).astype(np.float64)
    x, weight, bias = (np.ascontiguousarray(array, np.float64) for array in (x, weight, bias))
    tensors = (torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(bias))
    y = functional.conv2d(*tensors, stride=spec.stride, padding=spec.kernel // 2, groups=spec.groups)
    return np.asarray(y.numpy())


def float_values(network: Network, weights: Mapping[str, LayerWeights], x: np.ndarray) -> tuple[Values, Values]:
    """Every tensor, and every layer's result before skip and activation, of the network computed without grids."""
    values, sums = {INPUT: x.astype(np.float64)}, {}
    for node in network.nodes:
        filled = weights[node.name]
        y = sums[node.name] = arithmetic(node.spec, filled.weight, filled.bias, values[node.inputs[0]])
        y = y + values[node.inputs[1]] if len(node.inputs) == 2 else y
        values[node.name] = np.maximum(y, 0) if node.spec.activation == "relu" else y
    return values, sums


def quantized_output(network: Network, weights: Mapping[str, LayerWeights], x: np.ndarray) -> np.ndarray:
    """The output of the network with every grid simulated."""
    values = {INPUT: x.astype(np.float64)}
    for node in network.nodes:
        spec, filled, source = node.spec, weights[node.name], values[node.inputs[0]]
        weight, bias = filled.weight, filled.bias
        if spec.integer:
            assert weight is not None
            source = source if spec.input_bits == 8 else on_grid(source, filled.input_range)
            scales = np.abs(weight).reshape(len(weight), -1).max(axis=1).reshape(-1, *[1] * (weight.ndim - 1)) / 127
            weight = np.rint(weight / scales) * scales
        y = arithmetic(spec, weight, bias, source)
        if spec.skip_bits:
            y = (on_grid(y, filled.sum_range) if spec.integer else y) + values[node.inputs[1]]
        y = np.maximum(y, 0) if spec.activation == "relu" else y
        values[node.name] = on_grid(y, filled.output_range) if spec.output_bits == 8 else y
    return values[network.nodes[-1].name]


def calibrated(network: Network, x: np.ndarray, rng: np.random.Generator) -> dict[str, LayerWeights]:
    """Random weights with the ranges that the float network has."""
    weights = {node.name: random_weights(node.spec, rng) for node in network.nodes}
    values, sums = float_values(network, weights, x)

    def limits(array: np.ndarray) -> tuple[float, float]:
        return float(array.min()), float(array.max())

    return {
        node.name: replace(
            weights[node.name],
            input_range=limits(values[node.inputs[0]]),
            sum_range=limits(sums[node.name]),
            output_range=limits(values[node.name]),
        )
        for node in network.nodes
    }


# -- the runtime --------------------------------------------------------------------------------------------------------------


def run(model: bytes, x: np.ndarray, optimized: Path | None = None) -> np.ndarray:
    options = session_options(1)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["output"], {"input": x.astype(np.float32)})[0])


def picture(shape: tuple[int, ...], rng: np.random.Generator, batch: int = 1) -> np.ndarray:
    return rng.standard_normal((batch, *shape)).astype(np.float32)


def optimized_graph(model: bytes, shape: tuple[int, ...], folder: Path) -> onnx.GraphProto:
    run(model, np.zeros((1, *shape), np.float32), folder / "optimized.onnx")
    return onnx.load(folder / "optimized.onnx").graph


def operators(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def any_lowerings(network: Network, rng: np.random.Generator) -> list[str]:
    return [str(rng.choice(applicable(node.spec))) for node in network.nodes]


def first_lowerings(network: Network) -> list[str]:
    return [applicable(node.spec)[0] for node in network.nodes]


def model_of(network: Network, lowerings: Sequence[str] | None = None) -> bytes:
    rng = np.random.default_rng(0)
    weights = calibrated(network, picture(network.input_shape, rng), rng)
    return build_model(network, lowerings or first_lowerings(network), weights)


# -- outputs ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("choice", ["fp32", "any"])
def test_float_networks_equal_the_reference(choice: str, seed: int) -> None:
    rng, space = np.random.default_rng(seed), mobile(["fp32"])
    network = space.network(space.sample_spread(rng))
    x = picture(network.input_shape, rng, batch=2)
    weights = {node.name: random_weights(node.spec, rng) for node in network.nodes}
    lowerings = ["fp32"] * len(network.nodes) if choice == "fp32" else any_lowerings(network, rng)
    result = run(build_model(network, lowerings, weights, batch=2), x)
    expected = float_values(network, weights, x)[0]["classifier"].reshape(2, -1)
    assert result.shape == (2, 7)
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("precisions", [("w8a8",), ("w8a8", "fp32")])
def test_quantized_networks_equal_the_reference_with_simulated_grids(precisions: tuple[str, ...], seed: int) -> None:
    """Single steps add up along a network, so the bound is one of the whole; the float network must be farther away."""
    rng, space = np.random.default_rng(seed), mobile(precisions)
    network = space.network(space.sample(rng))
    x = picture(network.input_shape, rng, batch=16)
    weights = calibrated(network, x, rng)
    result = run(build_model(network, any_lowerings(network, rng), weights, batch=16), x)
    expected = quantized_output(network, weights, x).reshape(16, -1)
    error = np.abs(result - expected) / np.std(expected)
    assert error.mean() < 0.015
    assert error.max() < 0.06
    without_grids = float_values(network, weights, x)[0]["classifier"].reshape(16, -1)
    assert error.mean() < 0.7 * (np.abs(result - without_grids) / np.std(expected)).mean()


def test_samples_of_a_batch_do_not_meet() -> None:
    rng, space = np.random.default_rng(0), mobile(["w8a8", "fp32"])
    network = space.network(space.sample(rng))
    x = picture(network.input_shape, rng, batch=3)
    weights = calibrated(network, x, rng)
    together = run(build_model(network, first_lowerings(network), weights, batch=3), x)
    alone = [run(build_model(network, first_lowerings(network), weights), x[index : index + 1]) for index in range(3)]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-3, atol=0.05 * np.std(together))


def test_a_sum_with_the_input_and_a_tensor_that_is_read_twice() -> None:
    net = NetworkBuilder(4, 6, 6)
    net.add("one", "conv2d", INPUT, 4, precision="w8a8", skip=INPUT, activation="relu")
    net.add("two", "conv2d", "one", 4, kernel=3, precision="w8a8")
    net.add("three", "conv2d", "one", 4, kernel=3, skip="two")
    net.add("four", "conv2d", "three", 4, precision="w8a8", skip="one")
    net.add("five", "conv2d", "four", 3)
    network, rng = net.build(), np.random.default_rng(0)
    x = picture(network.input_shape, rng, batch=2)
    weights = calibrated(network, x, rng)
    result = run(build_model(network, first_lowerings(network), weights, batch=2), x)
    expected = quantized_output(network, weights, x)
    assert np.abs(result - expected).max() < 0.05 * np.abs(expected).max()


# -- what the runtime makes of it ---------------------------------------------------------------------------------------------


def expected_operators(network: Network) -> Counter[str]:
    """Kernels that the specifications promise."""
    counts: Counter[str] = Counter()
    for spec in network.layers:
        integer = spec.integer
        if spec.operator == "conv2d":
            counts["QLinearConv" if integer else "float convolution"] += 1
        elif spec.operator == "linear":
            counts["QGemm" if integer else "float Gemm"] += 1
        else:
            counts["QLinearGlobalAveragePool" if spec.input_bits == spec.output_bits == 8 else "GlobalAveragePool"] += 1
        counts["QLinearAdd"] += integer and spec.skip_bits == 8 and spec.output_bits == 8
    return +counts


def found_operators(graph: onnx.GraphProto) -> Counter[str]:
    names = {"Conv": "float convolution", "FusedConv": "float convolution", "Gemm": "float Gemm", "FusedGemm": "float Gemm"}
    kept = {"QLinearConv", "QGemm", "QLinearGlobalAveragePool", "GlobalAveragePool", "QLinearAdd", *names.values()}
    counts = Counter(names.get(node.op_type, node.op_type) for node in graph.node)
    return Counter({name: count for name, count in counts.items() if name in kept})


@pytest.mark.parametrize("seed", range(8))
def test_every_layer_runs_at_the_precision_that_the_architecture_says(seed: int, tmp_path: Path) -> None:
    rng, space = np.random.default_rng(seed), mobile(["w8a8", "fp32"])
    network = space.network(space.sample(rng))
    graph = optimized_graph(model_of(network, any_lowerings(network, rng)), network.input_shape, tmp_path)
    assert found_operators(graph) == expected_operators(network)
    integer = {node.name for node in network.nodes if node.spec.integer and node.spec.operator == "conv2d"}
    assert {node.name.split("/")[0] for node in graph.node if node.op_type == "QLinearConv"} == integer
    assert not {"Relu", "LeakyRelu", "Clip"} & set(operators(graph)), "an activation was not absorbed"


@pytest.mark.parametrize("sparsities", [("dense",), ("group@1/2",)])
def test_an_integer_network_is_integer_from_end_to_end(sparsities: Sequence[str], tmp_path: Path) -> None:
    space = mobile(["w8a8"], sparsities)
    network = space.network(space.largest())
    lowerings = [applicable(node.spec)[-1] for node in network.nodes]
    found = operators(optimized_graph(model_of(network, lowerings), network.input_shape, tmp_path))
    kinds = Counter(spec.operator for spec in network.layers)
    assert found["QLinearConv"] == kinds["conv2d"]
    assert found["QGemm"] == found["QLinearGlobalAveragePool"] == 1
    assert found["QLinearAdd"] == sum(spec.skip_bits > 0 for spec in network.layers) > 0
    assert found["QuantizeLinear"] == 1  # the image
    assert set(found) <= {
        *("QLinearConv", "QGemm", "QLinearAdd", "QLinearGlobalAveragePool", "QuantizeLinear", "Transpose", "Flatten", "Gather"),
        *("DequantizeLinear", "Reshape", "Squeeze"),
    }
    assert found["DequantizeLinear"] == 0


def sandwich(operator: str, activation: str, depthwise: bool, sparsity: str) -> Network:
    """Integer, float, integer: the float layer lies between two quantized tensors."""
    net = NetworkBuilder(8, 1, 1) if operator == "linear" else NetworkBuilder(8, 6, 6)
    net.add("before", operator, INPUT, 8, precision="w8a8", activation="relu")
    kernel = 3 if operator == "conv2d" else 1
    net.add("middle", operator, "before", 8, kernel=kernel, activation=activation, depthwise=depthwise, sparsity=sparsity)
    net.add("after", operator, "middle", 8, precision="w8a8", activation="relu")
    net.add("output", operator, "after", 8, precision="w8a8")
    network = net.build()
    middle = network.nodes[1].spec
    assert (middle.input_bits, middle.precision, middle.output_bits) == (8, "fp32", 8)
    return network


def without_guard(model: bytes) -> bytes:
    """The same model with the guarding LeakyRelu written as the Relu, or the nothing, that it stands for."""
    proto = onnx.load_from_string(model)
    for node in [node for node in proto.graph.node if node.op_type == "LeakyRelu"]:
        alpha = onnx.helper.get_node_attr_value(node, "alpha")
        if alpha == 0.0:
            node.op_type = "Relu"
            del node.attribute[:]
            continue
        for reader in proto.graph.node:
            reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
        proto.graph.node.remove(node)
    return bytes(proto.SerializeToString())


@pytest.mark.parametrize("activation", ["relu", "none"])
@pytest.mark.parametrize(
    ("operator", "depthwise", "sparsity", "lowering"),
    [
        ("conv2d", False, "dense", "fp32"),
        ("conv2d", True, "dense", "fp32"),
        ("conv2d", False, "group@1/2", "gather_groups"),
        ("conv2d", False, "group@1/2", "fp32"),
        ("linear", False, "dense", "fp32"),
    ],
)
def test_a_float_layer_between_quantized_tensors_stays_float(
    operator: str, depthwise: bool, sparsity: str, lowering: str, activation: str, tmp_path: Path
) -> None:
    network = sandwich(operator, activation, depthwise, sparsity)
    model = model_of(network, ["qdq_u8", lowering, "qdq_u8", "qdq_u8"])
    guarded = operators(optimized_graph(model, network.input_shape, tmp_path))
    integer, plain = ("QGemm", ("Gemm", "FusedGemm")) if operator == "linear" else ("QLinearConv", FLOAT_CONVOLUTIONS)
    # The network's last layer has a float output: as a convolution it runs in float, as a linear layer in integers.
    last = operator == "conv2d"
    assert guarded[integer] == (2 if last else 3)
    assert sum(guarded[name] for name in plain) == (2 if last else 1)
    assert guarded["LeakyRelu"] == guarded["Relu"] == 0

    bare = operators(optimized_graph(without_guard(model), network.input_shape, tmp_path))
    assert bare[integer] == guarded[integer] + 1, "the runtime no longer promotes float layers: the guard can go"

    x = picture(network.input_shape, np.random.default_rng(1))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    sessions = [
        onnxruntime.InferenceSession(m, options, providers=["CPUExecutionProvider"]) for m in (model, without_guard(model))
    ]
    one, other = (session.run(["output"], {"input": x})[0] for session in sessions)
    np.testing.assert_array_equal(one, other)


def test_a_chain_of_dense_integer_convolutions_is_transposed_at_its_ends_only(tmp_path: Path) -> None:
    net, x = NetworkBuilder(3, 8, 8), INPUT
    for index, (depthwise, kernel, stride) in enumerate([(False, 3, 2), (True, 3, 1), (False, 1, 1), (False, 5, 1)]):
        x = net.add(
            f"conv{index}",
            "conv2d",
            x,
            None if depthwise else 16,
            kernel=kernel,
            stride=stride,
            depthwise=depthwise,
            activation="relu",
            precision="w8a8",
        )
    x = net.add("sum", "conv2d", x, 16, precision="w8a8", skip="conv2")
    x = net.add("again", "conv2d", x, 16, precision="w8a8", activation="relu")
    net.add("classifier", "linear", net.add("pool", "global_pool", x), 5, precision="w8a8")
    network = net.build()
    graph = optimized_graph(model_of(network), network.input_shape, tmp_path)
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QLinearConv") == 6
    assert kinds.count("Transpose") <= 2
    chain = kinds[kinds.index("QLinearConv") : kinds.index("QLinearGlobalAveragePool") + 1]
    assert set(chain) == {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool"}


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("depthwise", [False, True])
def test_an_integer_layer_alone_has_no_transpose_left(depthwise: bool, kernel: int, tmp_path: Path) -> None:
    """What `build_layer` times is the layer, not the transpositions of its surroundings."""
    spec = LayerSpec(
        "conv2d", 8, 8, 6, 6, kernel, 1, 8 if depthwise else 1, "relu", precision="w8a8", input_bits=8, output_bits=8
    )
    options = session_options(1)
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    model = build_layer(spec, "qdq_u8", random_weights(spec, np.random.default_rng(0)))
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["QLinearConv"]


# -- the model as a file ------------------------------------------------------------------------------------------------------


def test_inputs_outputs_and_metadata() -> None:
    space = mobile(["w8a8", "fp32"])
    network = space.network(space.smallest())
    rng = np.random.default_rng(0)
    weights = {node.name: random_weights(node.spec, rng) for node in network.nodes}
    proto = onnx.load_from_string(build_model(network, first_lowerings(network), weights, 4, {"architecture": "{}"}))
    assert [value.name for value in proto.graph.input] == ["input"]
    assert [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim] == [4, 3, 9, 9]
    assert [value.name for value in proto.graph.output] == ["output"]
    assert {entry.key: entry.value for entry in proto.metadata_props} == {"architecture": "{}"}
    scopes = {node.name.split("/")[0] for node in proto.graph.node}
    assert scopes == {node.name for node in network.nodes}


@pytest.mark.parametrize("precisions", [("w8a8",), ("fp32",)])
def test_the_model_is_valid_onnx(precisions: tuple[str, ...]) -> None:
    """Stricter than onnxruntime: other tools want the type and shape of the output too."""
    space = mobile(precisions)
    onnx.checker.check_model(onnx.load_from_string(model_of(space.network(space.smallest()))), full_check=True)


def test_the_same_network_is_the_same_bytes() -> None:
    space = mobile(["w8a8", "fp32"])
    network = space.network(space.largest())
    assert model_of(network) == model_of(network)


@pytest.mark.parametrize("change", [-1, 1])
def test_another_number_of_lowerings_is_refused(change: int) -> None:
    space = mobile(["fp32"])
    network = space.network(space.smallest())
    lowerings = ["fp32"] * (len(network.nodes) + change)
    with pytest.raises(ValueError, match=f"{len(lowerings)} lowerings for {len(network.nodes)} layers"):
        build_model(network, lowerings, {})


def test_a_lowering_that_does_not_apply_is_refused() -> None:
    space = mobile(["fp32"])
    network = space.network(space.smallest())
    with pytest.raises(ValueError, match=r"qdq_u8.*allowed are fp32"):
        model_of(network, ["qdq_u8", *first_lowerings(network)[1:]])


def test_an_uncalibrated_network_is_refused() -> None:
    space = mobile(["w8a8"])
    network = space.network(space.smallest())
    rng = np.random.default_rng(0)
    weights = {node.name: replace(random_weights(node.spec, rng), output_range=None) for node in network.nodes}
    with pytest.raises(ValueError, match=r"output_range is missing.*calibrate"):
        build_model(network, first_lowerings(network), weights)


# -- random weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["dense", "group@1/4"])
def test_random_weights_fill_the_layer_under_its_mask(sparsity: str) -> None:
    spec = LayerSpec("conv2d", 16, 8, 4, 4, 3, sparsity=sparsity)
    filled = random_weights(spec, np.random.default_rng(0))
    assert filled.weight is not None
    assert filled.bias is not None
    assert filled.weight.shape == spec.weight_shape
    assert filled.bias.shape == (8,)
    assert filled.weight.dtype == filled.bias.dtype == np.float32
    assert np.count_nonzero(filled.weight) == spec.kept_weights
    keep = mask(torch.from_numpy(filled.weight), sparsity)
    assert keep is None or np.array_equal(keep.numpy() > 0, filled.weight != 0)
    again = random_weights(spec, np.random.default_rng(0)).weight
    assert again is not None
    assert np.array_equal(filled.weight, again)


def test_random_weights_of_a_layer_without_weights() -> None:
    filled = random_weights(LayerSpec("global_pool", 8, 8, 4, 4), np.random.default_rng(0))
    assert filled.weight is None
    assert filled.bias is None


@pytest.mark.parametrize("lowering", ["fp32", "gather_groups"])
def test_a_hand_made_network_runs(lowering: str) -> None:
    """`Network` is plain data: one made without the builder is as good."""
    spec = LayerSpec("conv2d", 4, 6, 5, 5, 3, sparsity="group@1/2")
    network = Network((4, 5, 5), (Node("only", spec, (INPUT,)),))
    x = picture(network.input_shape, np.random.default_rng(0))
    weights = {"only": random_weights(spec, np.random.default_rng(0))}
    result = run(build_model(network, [lowering], weights), x)
    np.testing.assert_allclose(result, float_values(network, weights, x)[0]["only"], atol=1e-4)
