"""Layer specifications against torch, networks against brute force."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spaces.layers import INPUT, TOKEN_OPERATORS, LayerSpec, Network, NetworkBuilder, Node
from spaces.precision import FLOAT_BITS
from spaces.sparsity import mask
from spaces.tokens import LayerNorm, SelfAttention
from tests.spaces.traced_layer import traced_layer

quick = settings(max_examples=40, deadline=None)


@st.composite
def conv_specs(draw: st.DrawFn) -> LayerSpec:
    channels = draw(st.integers(1, 9))
    depthwise = draw(st.booleans())
    return LayerSpec(
        "conv2d",
        channels,
        channels if depthwise else draw(st.integers(1, 9)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 12)),
        draw(st.sampled_from([1, 3, 5, 7])),
        draw(st.integers(1, 4)),
        channels if depthwise else 1,
    )


@st.composite
def token_specs(draw: st.DrawFn, operator: str) -> LayerSpec:
    heads = draw(st.integers(1, 9)) if operator == "attention" else 0
    out = draw(st.integers(1, 64)) * max(heads, 1)
    sides, bits = st.integers(1, 64), st.sampled_from([8, 32])
    spec = LayerSpec(operator, 3 * out if heads else out, out, draw(sides), draw(sides), heads=heads)
    return replace(spec, input_bits=draw(bits), output_bits=draw(bits), skip_bits=draw(st.sampled_from([0, 8, 32])))


@st.composite
def specs(draw: st.DrawFn) -> LayerSpec:
    operator = draw(st.sampled_from(["conv2d", "linear", "global_pool", "layer_norm", "attention"]))
    if operator in TOKEN_OPERATORS:
        return draw(token_specs(operator))
    linear = operator == "linear"
    groups = 1 if linear else draw(st.integers(1, 8))
    side = st.just(1) if linear else st.integers(1, 512)
    return LayerSpec(
        operator,
        in_channels=groups * draw(st.integers(1, 512)),
        out_channels=2 * groups * draw(st.integers(1, 256)),
        height=draw(side),
        width=draw(side),
        kernel=draw(st.sampled_from([1, 3, 5, 7])),
        stride=draw(st.integers(1, 4)),
        groups=groups,
        activation=draw(st.sampled_from(["relu", "none"])),
        precision="fp32" if operator == "global_pool" else draw(st.sampled_from(["w8a8", "fp32", "w4@32", "ternary_a8"])),
        input_bits=draw(st.sampled_from([8, 32])),
        output_bits=draw(st.sampled_from([8, 32])),
        skip_bits=0 if linear else draw(st.sampled_from([0, 8, 32])),
        sparsity=draw(st.sampled_from(["dense", "group@1/2", "group@1/4"])),
    )


any_spec = specs()


def torch_conv(spec: LayerSpec) -> nn.Conv2d:
    padding = spec.kernel // 2
    return nn.Conv2d(spec.in_channels, spec.out_channels, spec.kernel, spec.stride, padding, groups=spec.groups)


def torch_macs(module: nn.Module, x: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(x)
    return int(counter.get_total_flops()) // 2


# -- one layer ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(conv_specs())
def test_a_convolution_counts_like_torch(spec: LayerSpec) -> None:
    conv = torch_conv(spec)
    x = torch.zeros(1, spec.in_channels, spec.height, spec.width)
    output = conv(x)
    assert output.shape[1:] == (spec.out_channels, spec.out_height, spec.out_width)
    assert spec.output_elements == output.numel()
    assert spec.input_elements == x.numel()
    assert spec.weight_shape == conv.weight.shape
    assert spec.parameters == sum(p.numel() for p in conv.parameters())
    assert spec.macs == torch_macs(conv, x)


@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (7, 3), (64, 10)])
def test_a_linear_layer_counts_like_torch(inputs: int, outputs: int) -> None:
    spec, linear = LayerSpec("linear", inputs, outputs), nn.Linear(inputs, outputs)
    assert spec.weight_shape == linear.weight.shape
    assert spec.parameters == sum(p.numel() for p in linear.parameters())
    assert spec.macs == torch_macs(linear, torch.zeros(1, inputs))
    assert spec.output_elements == outputs


def test_global_pool_has_no_weights_and_reads_everything_once() -> None:
    spec = LayerSpec("global_pool", 6, 6, 5, 7)
    assert (spec.weight_shape, spec.kept_weights, spec.parameters, spec.weight_bytes) == ((), 0, 0, 0)
    assert (spec.out_height, spec.out_width, spec.output_elements) == (1, 1, 6)
    assert spec.macs == 6 * 5 * 7


@pytest.mark.parametrize(("heads", "width", "height", "columns"), [(1, 4, 1, 7), (3, 5, 4, 4), (4, 1, 1, 1)])
def test_attention_counts_like_torch(heads: int, width: int, height: int, columns: int) -> None:
    spec = LayerSpec("attention", 3 * heads * width, heads * width, height, columns, heads=heads)
    x = torch.zeros(1, spec.in_channels, height, columns)
    assert spec.macs == torch_macs(SelfAttention(heads), x)
    assert SelfAttention(heads)(x).shape[1:] == (spec.out_channels, spec.out_height, spec.out_width)
    assert (spec.weight_shape, spec.kept_weights, spec.parameters, spec.weight_bytes) == ((), 0, 0, 0)
    assert spec.scratch_bytes == 4 * heads * (height * columns) ** 2
    assert spec.kind == "attention"
    assert f"{heads} heads" in str(spec)


def test_layer_norm_has_an_affine_map_and_reads_everything_thrice() -> None:
    spec, norm = LayerSpec("layer_norm", 6, 6, 5, 7), LayerNorm(torch.ones(6), torch.zeros(6))
    assert spec.parameters == sum(p.numel() for p in norm.parameters()) == 12
    assert (spec.weight_bytes, spec.scratch_bytes, spec.kind) == (48, 0, "layer_norm")
    assert (spec.output_elements, spec.macs) == (6 * 5 * 7, 3 * 6 * 5 * 7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"operator": "attention", "in_channels": 12}, "0 heads of attention"),
        ({"operator": "attention", "in_channels": 12, "heads": -1}, "-1 heads"),
        ({"operator": "attention", "in_channels": 12, "heads": 3}, "give a third"),
        ({"operator": "attention", "in_channels": 8, "heads": 2}, "give a third"),
        ({"operator": "attention", "in_channels": 12, "heads": 2, "kernel": 3}, "kernel, stride and groups 1"),
        ({"operator": "attention", "in_channels": 12, "heads": 2, "precision": "w8a8"}, "no weights"),
        ({"operator": "layer_norm", "in_channels": 5}, "keeps the number"),
        ({"operator": "layer_norm", "stride": 2}, "kernel, stride and groups 1"),
        ({"operator": "layer_norm", "precision": "w8"}, ".+"),
        ({"operator": "layer_norm", "heads": 2}, "2 heads of layer_norm"),
        ({"operator": "conv2d", "heads": 1}, "1 heads of conv2d"),
        ({"operator": "conv2d", "heads": -1}, "-1 heads of conv2d"),
    ],
)
def test_layers_of_tokens_that_cannot_be_are_refused(change: dict[str, object], said: str) -> None:
    sizes = {"operator": "conv2d", "in_channels": 4, "out_channels": 4, "height": 3, "width": 3}
    with pytest.raises(ValueError, match=said) as caught:
        LayerSpec(**{**sizes, **change})  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("kernel", [2, 4, 6])
def test_an_even_kernel_is_refused_or_has_torchs_output_shape(kernel: int) -> None:
    try:
        spec = LayerSpec("conv2d", 2, 3, 9, 8, kernel)
    except ValueError:
        return
    output = torch_conv(spec)(torch.zeros(1, 2, 9, 8))
    assert (spec.out_height, spec.out_width) == output.shape[2:]


@pytest.mark.parametrize("sparsity", ["group@1/2", "group@1/4", "group@1/3"])
@pytest.mark.parametrize(("inputs", "kernel"), [(8, 1), (10, 3), (1, 1), (6, 5)])
def test_a_sparse_layer_counts_only_what_its_mask_keeps(sparsity: str, inputs: int, kernel: int) -> None:
    spec = LayerSpec("conv2d", inputs, 4, 9, 8, kernel, 2, sparsity=sparsity)
    keep = mask(torch.randn(spec.weight_shape), sparsity)
    assert keep is not None
    assert spec.kept_weights == keep.sum()
    assert spec.parameters == spec.kept_weights + 4
    assert spec.macs == spec.kept_weights * 5 * 4


def test_bytes_of_weights_and_outputs() -> None:
    spec = LayerSpec("conv2d", 8, 6, 5, 4, 3)
    assert spec.weight_bytes == 4 * (8 * 6 * 9 + 6)
    assert replace(spec, precision="w8a8").weight_bytes == 8 * 6 * 9 + 4 * 6 + 4 * 6
    assert spec.output_bytes == 6 * 5 * 4 * 4
    assert replace(spec, output_bits=8).output_bytes == 6 * 5 * 4
    assert replace(spec, sparsity="group@1/4", precision="w8a8").weight_bytes == 2 * 6 * 9 + 8 * 6


def test_depthwise_is_one_filter_per_channel() -> None:
    assert LayerSpec("conv2d", 6, 6, groups=6).depthwise
    assert not LayerSpec("conv2d", 6, 6).depthwise
    assert not LayerSpec("conv2d", 6, 12, groups=6).depthwise
    assert not LayerSpec("conv2d", 6, 6, groups=3).depthwise


@given(any_spec)
@quick
def test_json_round_trip(spec: LayerSpec) -> None:
    text = spec.to_json()
    again = LayerSpec.from_json(text)
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.to_json() == text
    assert len(text.splitlines()) == 1


@given(any_spec, any_spec)
@quick
def test_different_layers_read_differently(one: LayerSpec, other: LayerSpec) -> None:
    assert (one.to_json() == other.to_json()) is (one == other)


OTHER_VALUES: dict[str, str | int] = {
    "operator": "global_pool",
    "kernel": 5,
    "groups": 2,
    "activation": "relu",
    "precision": "w8a8",
    "input_bits": 8,
    "output_bits": 8,
    "skip_bits": 8,
    "sparsity": "group@1/2",
    "rank": 4,
    "heads": 4,
}


@pytest.mark.parametrize("field", [field.name for field in fields(LayerSpec)])
def test_every_field_is_part_of_the_key(field: str) -> None:
    spec = LayerSpec("conv2d", 8, 8, 4, 4, 3)
    other = OTHER_VALUES.get(field, 9)
    if field == "heads":
        spec = LayerSpec("attention", 24, 8, 4, 4, heads=2)
    if field == "program":
        spec, other = traced_layer(nn.AvgPool2d(2)), traced_layer(nn.AvgPool2d(2), nn.Sigmoid()).program
    changed = replace(spec, **{field: other})  # type: ignore[arg-type]
    assert changed != spec
    assert LayerSpec.from_json(changed.to_json()) == changed


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "3",
        "{}",
        '{"operator": "conv2d", "in_channels": 3}',
        '{"operator": "conv2d", "in_channels": 3, "out_channels": 4, "dilation": 2}',
        '{"operator": "conv2d", "in_channels": "3", "out_channels": 4}',
        '{"operator": "conv2d", "in_channels": 3.0, "out_channels": 4}',
        '{"operator": "conv2d", "in_channels": true, "out_channels": 4}',
        '{"operator": "conv2d", "in_channels": -3, "out_channels": 4}',
        '{"operator": "conv2d", "in_channels": null, "out_channels": 4}',
        '{"operator": "conv2d", "in_channels": 1e999, "out_channels": 4}',
        '{"operator": "conv2d", "in_channels": 99999999999999, "out_channels": 4}',
        '{"operator": 2, "in_channels": 3, "out_channels": 4}',
        '{"operator": ["conv2d"], "in_channels": 3, "out_channels": 4}',
    ],
)
def test_malformed_json_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r".+") as caught:
        LayerSpec.from_json(text)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("change", [{"stride": 0}, {"groups": 0}, {"kernel": 0}, {"in_channels": 0}, {"operator": "conv9d"}])
def test_a_layer_that_cannot_be_is_refused_before_it_is_counted(change: dict[str, object]) -> None:
    text = json.dumps({"operator": "conv2d", "in_channels": 4, "out_channels": 4, **change})
    with pytest.raises(ValueError, match=r".+"):
        LayerSpec.from_json(text)


# -- networks -----------------------------------------------------------------------------------------------------------------


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """Random graphs: any earlier tensor may be read again, and added where the shape is the same."""
    net = NetworkBuilder(draw(st.integers(1, 3)), draw(st.integers(1, 8)), draw(st.integers(1, 8)))
    names = [INPUT]
    shapes: dict[str, object] = {}
    for index in range(draw(st.integers(1, 7))):
        source = draw(st.sampled_from(names))
        name, precision = f"layer{index}", draw(st.sampled_from(["w8a8", "fp32"]))
        net.add(name, "conv2d", source, draw(st.integers(1, 3)), kernel=3, stride=draw(st.integers(1, 2)), precision=precision)
        spec = net.build().nodes[-1].spec
        shapes[name] = (spec.out_channels, spec.out_height, spec.out_width)
        same = [other for other in names if shapes.get(other) == shapes[name]]
        names.append(name)
        summed: bool = draw(st.booleans())
        if same and summed:
            net.add(f"sum{index}", "conv2d", name, spec.out_channels, skip=draw(st.sampled_from(same)), precision=precision)
            shapes[f"sum{index}"] = shapes[name]
            names.append(f"sum{index}")
    return net.build()


@quick
@given(networks())
def test_peak_activation_bytes_against_brute_force(network: Network) -> None:
    """Every tensor lives from the step that makes it to the last step that reads it."""
    channels, height, width = network.input_shape
    size = {INPUT: 4 * channels * height * width} | {node.name: node.spec.output_bytes for node in network.nodes}
    made = {INPUT: 0} | {node.name: step for step, node in enumerate(network.nodes)}
    dies = dict(made)
    for step, node in enumerate(network.nodes):
        for name in node.inputs:
            dies[name] = step
    steps = range(len(network.nodes))
    totals = [sum(size[name] for name in size if made[name] <= step <= dies[name]) for step in steps]
    assert network.peak_activation_bytes == max(totals)


@quick
@given(networks())
def test_a_tensor_is_quantized_where_its_producer_or_a_main_consumer_is_integer(network: Network) -> None:
    integer = {node.name for node in network.nodes if node.spec.integer}
    output = network.nodes[-1].name
    bits = {INPUT: FLOAT_BITS, output: FLOAT_BITS}
    for node in network.nodes:
        consumers = {other.name for other in network.nodes if other.inputs[0] == node.name}
        bits.setdefault(node.name, 8 if ({node.name} | consumers) & integer else FLOAT_BITS)
    for node in network.nodes:
        assert node.spec.input_bits == bits[node.inputs[0]]
        assert node.spec.output_bits == bits[node.name]
        assert node.spec.skip_bits == (bits[node.inputs[1]] if len(node.inputs) == 2 else 0)


@quick
@given(networks())
def test_shapes_follow_the_graph_and_sums_are_sums(network: Network) -> None:
    shapes = {INPUT: network.input_shape}
    for node in network.nodes:
        spec = node.spec
        assert (spec.in_channels, spec.height, spec.width) == shapes[node.inputs[0]]
        shapes[node.name] = (spec.out_channels, spec.out_height, spec.out_width)
        assert len(node.inputs) == 1 or shapes[node.inputs[1]] == shapes[node.name]
    assert network.layers == tuple(node.spec for node in network.nodes)
    for what in ("macs", "parameters", "weight_bytes"):
        assert getattr(network, what) == sum(getattr(spec, what) for spec in network.layers)


def chain() -> Network:
    net = NetworkBuilder(3, 8, 8)
    net.add("one", "conv2d", INPUT, 4, kernel=3)
    net.add("two", "conv2d", "one", 4, kernel=3)
    return net.build()


def test_peak_of_a_chain_by_hand() -> None:
    assert chain().peak_activation_bytes == max(3 * 64 * 4 + 4 * 64 * 4, 2 * 4 * 64 * 4)


def test_scores_of_attention_are_part_of_the_peak() -> None:
    net = NetworkBuilder(6, 4, 4)
    net.add("attention", "attention", INPUT, heads=2)
    assert net.build().peak_activation_bytes == 4 * 16 * (6 + 2) + 4 * 2 * 16**2


def test_a_residual_keeps_its_tensor_alive() -> None:
    net = NetworkBuilder(1, 4, 4)
    net.add("one", "conv2d", INPUT, 2)
    net.add("two", "conv2d", "one", 8)
    net.add("three", "conv2d", "two", 2, skip="one")
    assert net.build().peak_activation_bytes == (2 + 8 + 2) * 16 * 4


def test_the_fingerprint_sees_every_change() -> None:
    network = chain()
    first, second = network.nodes
    assert chain().fingerprint == network.fingerprint
    others = [
        Network((3, 8, 9), network.nodes),
        Network(network.input_shape, (first,)),
        Network(network.input_shape, (replace(first, name="uno"), second)),
        Network(network.input_shape, (first, replace(second, inputs=(INPUT,)))),
        Network(network.input_shape, (first, replace(second, spec=replace(second.spec, activation="relu")))),
        Network(network.input_shape, (first, Node("two", replace(second.spec, precision="w8a8"), ("one",)))),
    ]
    assert len({network.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1


def test_the_builder_refuses_a_name_twice() -> None:
    net = NetworkBuilder(3, 8, 8)
    net.add("one", "conv2d", INPUT, 4)
    with pytest.raises(ValueError, match="one"):
        net.add("one", "conv2d", INPUT, 4)
    with pytest.raises(ValueError, match=INPUT):
        net.add(INPUT, "conv2d", INPUT, 4)


@pytest.mark.parametrize(("out", "stride"), [(5, 1), (4, 2)])
def test_the_builder_refuses_a_skip_of_another_shape(out: int, stride: int) -> None:
    net = NetworkBuilder(4, 8, 8)
    net.add("one", "conv2d", INPUT, 4)
    with pytest.raises(ValueError, match=r"two.*adds one"):
        net.add("two", "conv2d", "one", out, stride=stride, skip="one")
    net.add("two", "conv2d", "one", 4, skip="one")  # the refused layer left nothing behind
    assert [node.name for node in net.build().nodes] == ["one", "two"]


def test_the_input_may_be_added_too() -> None:
    net = NetworkBuilder(4, 8, 8)
    net.add("one", "conv2d", INPUT, 4, precision="w8a8", skip=INPUT)
    net.add("two", "conv2d", "one", 4, precision="w8a8", skip=INPUT)
    one, two = net.build().layers
    assert (one.input_bits, one.skip_bits, one.output_bits) == (32, 32, 8)
    assert (two.input_bits, two.skip_bits, two.output_bits) == (8, 32, 32)


def test_depthwise_layers_keep_their_channels() -> None:
    net = NetworkBuilder(6, 8, 8)
    net.add("one", "conv2d", INPUT, kernel=3, depthwise=True)
    assert net.build().layers[0].depthwise
    assert net.build().layers[0].weight_shape == (6, 1, 3, 3)


def test_a_linear_layer_needs_one_row_and_one_column() -> None:
    """Its weight is `(out, channels)`: rows and columns have no place in it."""
    with pytest.raises(ValueError, match=r".+"):
        NetworkBuilder(3, 8, 8).add("classifier", "linear", INPUT, 5)
