"""The space `mobile`: stem, stages of inverted bottlenecks (MobileNetV2, arXiv:1801.04381), head.

Searchable are the input resolution, depth and output width per stage, expansion and kernel per block, and for every
convolution its precision and (where it mixes channels) its sparsity. Blocks of a stage share its output width, so that all
but the first keep their residual connection; `width_per_block=true` gives every block a width of its own instead, and then
blocks whose width changes have no residual.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from spaces.choice import Architecture, Choice, Option
from spaces.errors import UserError
from spaces.layers import INPUT, Network, NetworkBuilder
from spaces.low_rank import FULL, rank_of
from spaces.options import ascending, distinct_precisions, positive
from spaces.precision import parse_precision
from spaces.space import Space
from spaces.sparsity import DENSE, check_sparsity, parse, selective
from spaces.sparsity_budget import Bottleneck, iso_flop_hidden

RANK_STEPS = 10_000
PLAIN, ISO_FLOP = "plain", "iso_flop"
SELECTIVE = "selective"

When = tuple[str, tuple[Option, ...]] | None


@dataclass(frozen=True)
class Stage:
    """A row of inverted-bottleneck blocks; the first block has the stride. Options ascend."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    stride: int = 1


class MobileSpace(Space):
    """Inverted-bottleneck networks for images.

    Args:
        channels: image channels.
        classes: number of classes.
        resolutions: side of the square input.
        stem: widths of the first convolution.
        stem_stride: its stride.
        stages: mappings with `widths`, `depths` and `stride`.
        expansions: ratios of a block's inner to its input width; at 1 the block has no expanding convolution.
        kernels: odd sides of the depthwise kernels.
        head: widths of the last convolution.
        precisions: of every convolution and the classifier, e.g. `w8a8` and `fp32`; the first is the cheapest.
        sparsities: of convolutions that mix channels, e.g. `dense` and `group@1/2`.
        ranks: of dense convolutions that mix channels, `full` and shares such as `1/4`; a choice where there are several.
        activations: `relu`, `selective` and `hard_swish`; a choice per stage where there are several. `selective` is ReLU, and
            masks of the layers before it are chosen so that it has fewer zeros (`spaces.selective`).
        max_width: widths above it are left out.
        width_per_block: a width for every block instead of every stage.
        hidden: `plain`, and `iso_flop`: where a block's expanding convolution is sparse, its inner width is as large as the
            dense block's multiply-accumulates allow (Sparse-IFT, see `spaces.sparsity_budget`); a choice per block.

    Raises:
        UserError: an empty or malformed option list, or a width that a sparsity does not divide.
    """

    name = "mobile"

    def __init__(
        self,
        channels: int,
        classes: int,
        resolutions: Sequence[int],
        stem: Sequence[int],
        stages: Sequence[dict[str, object]],
        expansions: Sequence[int],
        kernels: Sequence[int],
        head: Sequence[int],
        precisions: Sequence[str],
        sparsities: Sequence[str],
        ranks: Sequence[str] = (FULL,),
        activations: Sequence[str] = ("relu",),
        stem_stride: int = 1,
        max_width: int | None = None,
        width_per_block: bool = False,
        hidden: Sequence[str] = (PLAIN,),
    ) -> None:
        self.channels, self.classes = positive("channels", channels), positive("classes", classes)
        self.stem_stride, self.width_per_block = positive("stem_stride", stem_stride), width_per_block
        self.kernels = ascending("kernels", kernels)
        if any(kernel % 2 == 0 for kernel in self.kernels):
            raise UserError(f"kernels are {list(kernels)}; allowed are odd numbers")
        self.expansions = ascending("expansions", expansions)
        self.precisions = distinct_precisions(precisions)
        self.sparsities = _sparsities(sparsities)
        without_zero = [text for text in self.precisions if not parse_precision(text).has_zero]
        if without_zero and self.sparsities != ("dense",):
            raise UserError(
                f"precision {without_zero[0]} has no zero for sparse weights; allowed beside it: sparsities=[dense]"
            )
        self.ranks = _ranks(ranks)
        self.activations = _among("activations", activations, ("relu", SELECTIVE, "hard_swish"))
        self.selective = SELECTIVE in self.activations
        self.hidden = _among("hidden", hidden, (PLAIN, ISO_FLOP))
        self._sparse = tuple(text for text in self.sparsities if text != DENSE)
        for wanted, given in (
            (f"activation {SELECTIVE}", self.selective),
            (f"hidden width {ISO_FLOP}", ISO_FLOP in self.hidden),
        ):
            if given and not self._sparse:
                raise UserError(
                    f"{wanted} is for pruned layers, and sparsities is [{DENSE}]; add one: space.sparsities=[dense,group@1/2]"
                )
        dynamic = [text for text in self.precisions if parse_precision(text).rounds_input]
        if dynamic and self.ranks != (FULL,):
            raise UserError(f"precision {dynamic[0]} runs no factors; allowed beside it: ranks=[{FULL}]")
        self.resolutions = ascending("resolutions", resolutions)
        self.stem = self._widths("stem", stem, max_width)
        self.head = self._widths("head", head, max_width)
        self.stages = tuple(self._stage(index, stage, max_width) for index, stage in enumerate(stages))
        if not self.stages:
            raise UserError("stages is empty; at least one is needed")
        self.choices = tuple(self._choices())

    def _stage(self, index: int, stage: object, max_width: int | None) -> Stage:
        what = f"stages[{index}]"
        if not isinstance(stage, Mapping) or not {"widths", "depths"} <= set(stage) <= {"widths", "depths", "stride"}:
            raise UserError(f"{what} is {stage!r}; allowed is {{widths: [...], depths: [...], stride: ...}}")
        widths = self._widths(f"{what}.widths", stage["widths"], max_width)
        return Stage(widths, ascending(f"{what}.depths", stage["depths"]), positive(f"{what}.stride", stage.get("stride", 1)))

    def _widths(self, what: str, widths: object, max_width: int | None) -> tuple[int, ...]:
        options = tuple(w for w in ascending(what, widths) if max_width is None or w <= max_width)
        if not options:
            raise UserError(f"max_width={max_width} leaves no option of {what}: {widths}")
        for width, sparsity in product(options, self.sparsities):
            try:
                check_sparsity(sparsity, (width, width))
            except UserError as error:
                raise UserError(f"{what} are {list(options)}: {error}") from None
        return options

    # -- choices ----------------------------------------------------------------------------------------------------------

    def _choices(self) -> list[Choice]:
        choices = [Choice("resolution", self.resolutions), Choice("stem.width", self.stem), *self._precision("stem", None)]
        for s, stage in enumerate(self.stages, 1):
            choices.append(Choice(f"stage{s}.depth", stage.depths))
            if not self.width_per_block:
                choices.append(Choice(f"stage{s}.width", stage.widths))
            if len(self.activations) > 1:
                choices.append(Choice(f"stage{s}.activation", self.activations, ordered=False))
            for b in range(1, max(stage.depths) + 1):
                block = f"stage{s}.block{b}"
                deep_enough = tuple(depth for depth in stage.depths if depth >= b)
                here: When = None if deep_enough == stage.depths else (f"stage{s}.depth", deep_enough)
                wide = tuple(expansion for expansion in self.expansions if expansion > 1)
                if self.width_per_block:
                    choices.append(Choice(f"{block}.width", stage.widths, when=here))
                choices.append(Choice(f"{block}.expansion", self.expansions, when=here))
                choices.append(Choice(f"{block}.kernel", self.kernels, when=here))
                if wide:
                    choices += self._mixing(f"{block}.expand", (f"{block}.expansion", wide))
                    if len(self.hidden) > 1:
                        choices.append(Choice(f"{block}.hidden", self.hidden, when=(f"{block}.expand.sparsity", self._sparse)))
                choices += self._precision(f"{block}.depthwise", here)
                choices += self._mixing(f"{block}.project", here)
        choices.append(Choice("head.width", self.head))
        choices += self._mixing("head", None)
        choices += self._precision("classifier", None)
        return choices

    def _precision(self, layer: str, when: When) -> list[Choice]:
        return [Choice(f"{layer}.precision", self.precisions, when=when)]

    def _mixing(self, layer: str, when: When) -> list[Choice]:
        choices = [*self._precision(layer, when), Choice(f"{layer}.sparsity", self.sparsities, when=when)]
        if self.ranks != (FULL,):
            choices.append(Choice(f"{layer}.rank", self.ranks, when=(f"{layer}.sparsity", (DENSE,))))
        return choices

    # -- the walk ---------------------------------------------------------------------------------------------------------

    def network(self, architecture: Architecture) -> Network:
        return self._walk(architecture, {})

    def stored_network(self) -> Network:
        if ISO_FLOP not in self.hidden:
            return super().stored_network()
        largest = self.largest()
        widest: dict[str, int] = {}
        for node in self.network(largest).nodes:
            if node.name.endswith(".depthwise"):
                block = node.name.removesuffix(".depthwise")
                widest[block] = max(node.spec.in_channels, self._widest(block))
        dense = {choice.name: DENSE for choice in self.choices if choice.kind == "sparsity"}
        return self._walk(Architecture({**largest, **dense}), widest)

    def _widest(self, block: str) -> int:
        """The largest inner width of a block that any architecture has."""
        s, b = (int("".join(filter(str.isdigit, part))) for part in block.split("."))
        stage, before = self.stages[s - 1], (self.stem if s == 1 else self.stages[s - 2].widths)
        inner = stage.widths if b > 1 else before
        pairs = [(w, out) for w, out in product(inner, stage.widths) if b == 1 or self.width_per_block or w == out]
        blocks = [
            Bottleneck(width, width * expansion, out, kernel, *positions)
            for (width, out), expansion, kernel, positions in product(pairs, self.expansions, self.kernels, self._maps(s, b))
            if expansion > 1
        ]
        return max((iso_flop_hidden(x, e, p) for x, e, p in product(blocks, self._sparse, self.sparsities)), default=0)

    def _maps(self, s: int, b: int) -> list[tuple[int, int]]:
        """Positions of a block's input and of its inner map behind the depthwise convolution, at every resolution."""
        found = []
        for side in self.resolutions:
            strides = [self.stem_stride, *(stage.stride for stage in self.stages[: s - 1])]
            for stride in strides if b == 1 else [*strides, self.stages[s - 1].stride]:
                side = (side - 1) // stride + 1
            behind = (side - 1) // self.stages[s - 1].stride + 1 if b == 1 else side
            found.append((side**2, behind**2))
        return found

    def _walk(self, architecture: Architecture, widest: Mapping[str, int]) -> Network:
        """The layers of an architecture; blocks in `widest` have that inner width."""
        a = architecture
        resolution = a.integer("resolution")
        net = NetworkBuilder(self.channels, resolution, resolution)
        x = net.add(
            "stem",
            "conv2d",
            INPUT,
            a.integer("stem.width"),
            kernel=3,
            stride=self.stem_stride,
            activation="relu",
            precision=str(a["stem.precision"]),
        )
        for s, stage in enumerate(self.stages, 1):
            for b in range(1, a.integer(f"stage{s}.depth") + 1):
                block = f"stage{s}.block{b}"
                out = a.integer(f"{block}.width" if self.width_per_block else f"stage{s}.width")
                stride = stage.stride if b == 1 else 1
                activation = str(a.get(f"stage{s}.activation", self.activations[0]))
                x = self._block(net, a, block, x, out, stride, activation, widest)
        x = self._mix(net, a, "head", x, a.integer("head.width"), "relu")
        x = net.add("pool", "global_pool", x)
        net.add("classifier", "linear", x, self.classes, precision=str(a["classifier.precision"]))
        return net.build()

    def _block(
        self,
        net: NetworkBuilder,
        a: Architecture,
        block: str,
        x: str,
        out: int,
        stride: int,
        activation: str,
        widest: Mapping[str, int],
    ) -> str:
        source, (width, _, _) = x, net.shape(x)
        if a.integer(f"{block}.expansion") > 1:
            hidden = widest.get(block) or self._hidden(net, a, block, x, out, stride)
            x = self._mix(net, a, f"{block}.expand", x, hidden, activation)
        x = net.add(
            f"{block}.depthwise",
            "conv2d",
            x,
            kernel=a.integer(f"{block}.kernel"),
            stride=stride,
            depthwise=True,
            activation="relu" if activation == SELECTIVE else activation,
            precision=str(a[f"{block}.depthwise.precision"]),
        )
        skip = source if stride == 1 and width == out else None
        return self._mix(net, a, f"{block}.project", x, out, "none", skip)

    def _hidden(self, net: NetworkBuilder, a: Architecture, block: str, x: str, out: int, stride: int) -> int:
        """The inner width of a block."""
        width, height, columns = net.shape(x)
        plain, expand = width * a.integer(f"{block}.expansion"), str(a[f"{block}.expand.sparsity"])
        if a.get(f"{block}.hidden", self.hidden[0]) == PLAIN or expand == DENSE:
            return plain
        behind = ((height - 1) // stride + 1) * ((columns - 1) // stride + 1)
        dense = Bottleneck(width, plain, out, a.integer(f"{block}.kernel"), height * columns, behind)
        return iso_flop_hidden(dense, expand, str(a[f"{block}.project.sparsity"]))

    def _mix(self, net: NetworkBuilder, a: Architecture, name: str, x: str, out: int, act: str, skip: str | None = None) -> str:
        """A 1x1 convolution with its own precision and sparsity."""
        precision, sparsity = str(a[f"{name}.precision"]), str(a[f"{name}.sparsity"])
        if act == SELECTIVE:
            sparsity, act = selective(sparsity), "relu"
        rank = net.rank(str(a.get(f"{name}.rank", FULL)), x, out)
        return net.add(name, "conv2d", x, out, activation=act, precision=precision, sparsity=sparsity, rank=rank, skip=skip)


def _among(what: str, texts: object, allowed: tuple[str, ...]) -> tuple[str, ...]:
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts or not set(texts) <= set(allowed):
        raise UserError(f"{what} is {texts!r}; allowed is a list out of {', '.join(allowed)}")
    return tuple(text for text in allowed if text in texts)


def _ranks(texts: object) -> tuple[str, ...]:
    """Distinct ranks, the lowest first."""
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"ranks is {texts!r}; allowed is a list such as ['1/4','1/2',{FULL}]")
    return tuple(sorted(set(texts), key=lambda text: rank_of(text, RANK_STEPS) or RANK_STEPS))


def _sparsities(texts: object) -> tuple[str, ...]:
    """Distinct sparsities by share, each in its first spelling."""
    if not isinstance(texts, Sequence) or isinstance(texts, str) or not texts or not all(isinstance(t, str) for t in texts):
        raise UserError(f"sparsities is {texts!r}; allowed is a list such as [dense,group@1/2]; in YAML quote 2:4")
    distinct = {parse(text): text for text in reversed(texts)}
    if any(sparsity.selective for sparsity in distinct):
        raise UserError(f"sparsities is {list(texts)}; a selective mask is an activation: space.activations=[relu,{SELECTIVE}]")
    return tuple(distinct[key] for key in sorted(distinct, key=lambda s: (s.kept, s.pattern, s.sizes)))
