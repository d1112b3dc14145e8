"""Which tensors of a network are alive together while onnxruntime runs it, from its layers and their lowerings.

Layers run one after another. Each is played through kernel by kernel, as the runtime's optimized graphs show them: bytes are
dequantized before float kernels and quantized behind them, channels are gathered, tensors change their layout where neighbours
want another one (see `latency_lut.device.Borders`), and kernels have scratch memory. A tensor dies after its last reader.

The runtime plans its buffers beforehand: a tensor takes over the buffer of a dead one of the same shape and type, which is then
held from the first of them to the last, also in between; and from the second run on all buffers lie in one block, each where it
fitted best. That is played through too. What is not: the order in which the runtime interleaves the branches of a skip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from latency_lut.ort_session import PRECISE
from latency_lut.runtimes.onnxruntime import block_of, borders
from spaces.layers import INPUT, Network, Node
from spaces.precision import BYTE_PRODUCT_BITS, FLOAT_BITS
from spaces.sparsity import GROUP_BLOCKS, kept_inputs

ALIGNMENT_BYTES = 256  # of onnxruntime's arena
FLOAT_BYTES = 4
POINTER_BYTES = 8

Shape = tuple[int, int, int]
Form = tuple[str, bool]  # a node's output, and whether in the foreign layout


def peak_tensor_bytes(network: Network, lowerings: Sequence[str], description: Mapping[str, str | int], batch: int = 1) -> int:
    """The most bytes of tensors and scratch that are held at once in a run of a network; its own input is not counted.

    Args:
        network: the layers.
        lowerings: one per node.
        description: of the device, see `Device.describe`.
        batch: samples per run.

    Raises:
        ValueError: another number of lowerings than nodes.
    """
    layers = [_Layer(node, name, description) for node, name in zip(network.nodes, lowerings, strict=True)]
    run = _Run(layers)
    for layer in layers:
        run.play(layer)
    return run.buffers.peak_bytes(batch)


class _Layer:
    """A layer in its place, with what its lowering makes of it.

    `block`: channels in a block of its layout, 0 without. `precise`: whether integers run on kernels for unsigned weights.
    """

    def __init__(self, node: Node, lowering: str, description: Mapping[str, str | int]) -> None:
        self.name, self.spec = node.name, node.spec
        self.layout = borders(node.spec, lowering, description)
        self.block = block_of(node.spec, lowering, description)
        self.dynamic = lowering.startswith("dynamic")  # quantizes its floats itself
        spec = self.spec
        overflows = spec.arithmetic.weight_bits > BYTE_PRODUCT_BITS
        self.gathers, self.precise = lowering.startswith("gather"), overflows and description.get("integer_kernels") == PRECISE
        kept = kept_inputs(spec.sparsity, spec.in_channels) * GROUP_BLOCKS if self.gathers else spec.in_channels
        self.read = (kept, spec.height, spec.width)
        self.made = (spec.out_channels, spec.out_height, spec.out_width)
        self.source = node.inputs[0]
        self.skip = node.inputs[1] if len(node.inputs) > 1 else None
        self.fuses = False  # the addition of the skip, as the runtime does when that comes in blocks
        self.skip_form: Form | None = None
        self.early = False  # whether its output is dequantized at once, for a float layer that adds it much later


class _Buffers:
    """What a run allocates, in order: tensors by shape and bytes per item, and scratch."""

    def __init__(self) -> None:
        self._tensors: list[tuple[Shape, int]] = []
        self._events: list[tuple[str, int]] = []

    def take(self, shape: Shape, item_bytes: int) -> int:
        """A new tensor; returns its number."""
        self._tensors.append((shape, item_bytes))
        self._events.append(("take", len(self._tensors) - 1))
        return len(self._tensors) - 1

    def drop(self, tensor: int) -> None:
        self._events.append(("drop", tensor))

    def scratch(self, count: int) -> None:
        """Bytes that only one kernel needs, per sample."""
        self._events.append(("scratch", count))

    def peak_bytes(self, batch: int) -> int:
        """The most that is held at once when every tensor takes the buffer of the last dead one like it."""
        buffer_of: dict[int, int] = {}
        spare: list[int] = []  # dead tensors whose buffer nobody took over yet
        users: dict[int, int] = {}
        for event, value in self._events:
            if event == "take":
                alike = [tensor for tensor in spare if self._tensors[tensor] == self._tensors[value]]
                if alike:
                    spare.remove(alike[-1])
                buffer_of[value] = buffer_of[alike[-1]] if alike else value
                users[buffer_of[value]] = users.get(buffer_of[value], 0) + 1
            elif event == "drop":
                spare.append(value)
        block, held, held_bytes, most_bytes, most_scratch = _Block(), set[int](), 0, 0, 0
        for event, value in self._events:
            if event == "scratch":
                scratch = _aligned(value * batch)
                most_bytes, most_scratch = max(most_bytes, held_bytes + scratch), max(most_scratch, scratch)
                continue
            buffer = buffer_of[value]
            shape, item_bytes = self._tensors[buffer]
            size = _aligned(shape[0] * shape[1] * shape[2] * item_bytes * batch)
            if event == "take" and buffer not in held:
                held.add(buffer)
                block.place(buffer, size)
                held_bytes += size
                most_bytes = max(most_bytes, held_bytes)
            elif event == "drop":
                users[buffer] -= 1
                if not users[buffer]:
                    block.remove(buffer)
                    held_bytes -= size
        return max(most_bytes, block.bytes + most_scratch)


class _Block:
    """The one block of memory in which the runtime, from the second run on, puts all tensors: each where it fits best."""

    def __init__(self) -> None:
        self.bytes = 0
        self._placed: list[tuple[int, int, int]] = []  # offset, end, buffer; in order of offsets

    def place(self, buffer: int, size: int) -> None:
        """Put a buffer into the smallest gap that holds it; without one behind all others."""
        gaps, current = [], 0
        for offset, end, _ in self._placed:
            gaps.append((offset - current, current))
            current = max(current, end)
        gaps.append((self.bytes - current, current))
        fitting = [(gap, offset) for gap, offset in gaps if gap >= size]
        offset = min(fitting)[1] if fitting else (self._placed[-1][1] if self._placed else 0)
        self._placed.append((offset, offset + size, buffer))
        self._placed.sort()
        self.bytes = max(self.bytes, offset + size)

    def remove(self, buffer: int) -> None:
        self._placed = [placed for placed in self._placed if placed[2] != buffer]


def _aligned(count: int) -> int:
    return -(-count // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _rows(shape: Shape) -> Shape:
    """The shape with channels last."""
    return shape[1], shape[2], shape[0]


class _Run:
    """A run, layer after layer: who still reads which tensor, and in which layout it is there."""

    def __init__(self, layers: Sequence[_Layer]) -> None:
        self.buffers = _Buffers()
        self.readers: dict[Form, int] = {}
        self.held: dict[Form, int] = {}
        blocked, by_name = {INPUT: False}, {layer.name: layer for layer in layers}
        for layer in layers:
            layout = layer.layout
            skip_is_blocked = layer.skip is not None and blocked[layer.skip]
            layer.fuses = layout.fuses_skip and skip_is_blocked
            blocked[layer.name] = layout.foreign_output or layer.fuses
            forms = [(layer.source, layout.foreign_input)]
            if layer.skip is not None:
                layer.skip_form = (layer.skip, layer.fuses or layout.foreign_skip)
                maker = by_name.get(layer.skip)
                if maker is not None and maker.spec.integer and not layer.spec.integer and layer.spec.skip_bits < FLOAT_BITS:
                    maker.early, layer.skip_form = True, (f"{layer.skip} as floats", False)
                forms.append(layer.skip_form)
            for form in forms:
                if form[0] != INPUT:
                    self.readers[form] = self.readers.get(form, 0) + 1

    def play(self, layer: _Layer) -> None:
        spec, buffers = layer.spec, self.buffers
        output, foreign = self._integer(layer) if spec.integer else self._float(layer)
        item_bytes = spec.output_bits // 8
        if layer.early:
            floats = buffers.take(layer.made, FLOAT_BYTES)
            self.held[f"{layer.name} as floats", False] = floats
        made, other = (layer.name, foreign), (layer.name, not foreign)
        if other in self.readers:
            rows = item_bytes == 1 and foreign  # bytes are at home with channels last
            self.held[other] = buffers.take(_rows(layer.made) if rows else layer.made, item_bytes)
        if made in self.readers:
            self.held[made] = output
        else:
            buffers.drop(output)

    def _release(self, form: Form) -> None:
        """A reader is done."""
        if form[0] == INPUT:
            return
        self.readers[form] -= 1
        if not self.readers[form]:
            self.buffers.drop(self.held.pop(form))

    def _next(self, layer: _Layer, own: int | None, shape: Shape, item_bytes: int) -> int:
        """A tensor made from the layer's input, or from the last one that was made from it; that one is done with."""
        new = self.buffers.take(shape, item_bytes)
        self._done(layer, own)
        return new

    def _done(self, layer: _Layer, own: int | None) -> None:
        if own is None:
            self._release((layer.source, layer.layout.foreign_input))
        else:
            self.buffers.drop(own)

    def _float(self, layer: _Layer) -> tuple[int, bool]:
        """Kernels of a layer that computes in floats; its output, and whether in the foreign layout."""
        spec, buffers, own = layer.spec, self.buffers, None
        skip = layer.skip_form
        if layer.gathers:
            own = self._next(layer, own, layer.read, spec.input_bits // 8)
        if spec.input_bits < FLOAT_BITS:
            own = self._next(layer, own, layer.read, FLOAT_BYTES)
        if layer.dynamic:
            own = self._next(layer, own, layer.read, 1)
            if spec.operator == "conv2d":  # sums in integers, a tensor of their own
                sums = buffers.take((spec.output_elements, 1, 1), FLOAT_BYTES)
                buffers.scratch(_columns_bytes(layer))
                buffers.drop(own)
                own = sums
        if own is not None and layer.block:
            channels = -(-layer.read[0] // layer.block) * layer.block
            own = self._next(layer, own, (channels, *layer.read[1:]), FLOAT_BYTES)
        channels = -(-spec.out_channels // layer.block) * layer.block if layer.block else spec.out_channels
        if layer.fuses and skip is not None:
            self._release(skip)  # the sum is written over it
        output = buffers.take((channels, *layer.made[1:]), FLOAT_BYTES)
        buffers.scratch(spec.scratch_bytes + (0 if layer.dynamic else _columns_bytes(layer)))
        self._done(layer, own)
        foreign = bool(layer.block)
        if foreign and (spec.output_bits < FLOAT_BITS or (spec.skip_bits and not layer.fuses)):
            plain = buffers.take(layer.made, FLOAT_BYTES)
            buffers.drop(output)
            output, foreign = plain, False
        if skip is not None and not layer.fuses:
            if spec.skip_bits < FLOAT_BITS and skip[0] == layer.skip:
                buffers.drop(buffers.take(layer.made, FLOAT_BYTES))
            self._release(skip)
        if spec.output_bits < FLOAT_BITS:
            quantized = buffers.take(layer.made, 1)
            buffers.drop(output)
            return quantized, True
        return output, foreign

    def _integer(self, layer: _Layer) -> tuple[int, bool]:
        """Kernels of a layer that computes in integers, with channels last."""
        spec, buffers, own = layer.spec, self.buffers, None
        if spec.input_bits == FLOAT_BITS:
            own = self._next(layer, own, layer.read, 1)
        if layer.gathers:
            own = self._next(layer, own, layer.read, 1)
        if own is not None and spec.operator == "conv2d":
            own = self._next(layer, own, _rows(layer.read), 1)
        output = buffers.take(_rows(layer.made), spec.output_bits // 8)
        if spec.weight_shape:
            buffers.scratch(_integer_scratch_bytes(layer))
        self._done(layer, own)
        if layer.skip_form is not None:
            total = buffers.take(_rows(layer.made), 1)
            buffers.drop(output)
            self._release(layer.skip_form)
            output = total
        return output, layer.layout.foreign_output


def _columns_bytes(layer: _Layer) -> int:
    """Of a convolution that takes and gives plain channels: its input, a column per output."""
    spec = layer.spec
    if layer.block or spec.operator != "conv2d" or spec.kernel == 1 or (spec.depthwise and not layer.dynamic):
        return 0
    item_bytes = 1 if layer.dynamic else FLOAT_BYTES
    return item_bytes * spec.kernel**2 * spec.in_channels // spec.groups * spec.out_height * spec.out_width


def _integer_scratch_bytes(layer: _Layer) -> int:
    """Of an integer kernel: where it reads its input from, and its sums.

    Kernels for signed weights gather pointers to their input, and sum up in registers. Grouped kernels, and the precise ones
    (see `latency_lut.ort_session`), copy their input, a column per output, and sum up beside the output.
    """
    spec = layer.spec
    beside = layer.gathers or layer.precise
    sums = FLOAT_BYTES * spec.output_elements if beside else 0
    if spec.kernel == 1 and spec.stride == 1:
        return sums
    taps = spec.kernel**2 * spec.out_height * spec.out_width
    if beside and not spec.depthwise:
        return sums + taps * spec.in_channels // spec.groups
    return sums + POINTER_BYTES * taps
