"""The space `transformer`: patches of an image, pre-norm blocks of attention and MLP, mean over tokens (ViT, arXiv:2010.11929).

Searchable are the input resolution, embedding width, depth, per block the number of heads, their width and the MLP's ratio,
and for every projection its precision. Tokens keep their places on the map: a depthwise convolution after the embedding tells
attention where they are (arXiv:2102.10882), and projections are 1x1 convolutions. Those carry batch norm, which folds into
them, so that nothing of it ships (as in LeViT, arXiv:2104.01136); layer norm stays, because its statistics are a token's own.
"""

from __future__ import annotations

from collections.abc import Sequence

from spaces.choice import Architecture, Choice
from spaces.layers import INPUT, Network, NetworkBuilder
from spaces.options import ascending, distinct_precisions, positive
from spaces.space import Space

PROJECTIONS = ("qkv", "out", "expand", "project")


class TransformerSpace(Space):
    """Vision transformers with elastic depth, heads, head width, MLP ratio and precision.

    Args:
        channels: image channels.
        classes: number of classes.
        resolutions: side of the square input.
        patch: pixels between neighbouring tokens; patches overlap, since kernels are odd.
        widths: channels of a token.
        depths: numbers of blocks.
        heads: of an attention.
        head_widths: channels of a head.
        ratios: of an MLP's inner to its outer width.
        precisions: of every projection and the classifier; the first is the cheapest.

    Raises:
        UserError: an empty or malformed option list.
    """

    name = "transformer"

    def __init__(
        self,
        channels: int,
        classes: int,
        resolutions: Sequence[int],
        patch: int,
        widths: Sequence[int],
        depths: Sequence[int],
        heads: Sequence[int],
        head_widths: Sequence[int],
        ratios: Sequence[int],
        precisions: Sequence[str],
    ) -> None:
        self.channels, self.classes = positive("channels", channels), positive("classes", classes)
        self.patch, texts = positive("patch", patch), distinct_precisions(precisions)
        depth = Choice("depth", ascending("depths", depths))
        choices = [
            Choice("resolution", ascending("resolutions", resolutions)),
            Choice("width", ascending("widths", widths)),
            depth,
            Choice("embed.precision", texts),
        ]
        per_block = (("heads", heads), ("head_width", head_widths), ("ratio", ratios))
        for i in range(1, int(depth.options[-1]) + 1):
            block, here = f"block{i}", ("depth", tuple(d for d in depth.options if int(d) >= i))
            choices += [Choice(f"{block}.{kind}", ascending(kind, options), when=here) for kind, options in per_block]
            choices += [Choice(f"{block}.{layer}.precision", texts, when=here) for layer in PROJECTIONS]
        self.choices = (*choices, Choice("classifier.precision", texts))

    def network(self, architecture: Architecture) -> Network:
        a, side = architecture, architecture.integer("resolution")
        net = NetworkBuilder(self.channels, side, side)
        kernel = self.patch | 1
        precision = str(a["embed.precision"])
        x = net.add("embed", "conv2d", INPUT, a.integer("width"), kernel=kernel, stride=self.patch, precision=precision)
        x = net.add("position", "conv2d", x, kernel=3, depthwise=True, skip=x)
        for i in range(1, a.integer("depth") + 1):
            x = self._block(net, a, f"block{i}", x)
        x = net.add("norm", "layer_norm", x)
        x = net.add("pool", "global_pool", x)
        net.add("classifier", "linear", x, self.classes, precision=str(a["classifier.precision"]))
        return net.build()

    def _block(self, net: NetworkBuilder, a: Architecture, block: str, x: str) -> str:
        width, heads = a.integer("width"), a.integer(f"{block}.heads")
        qkv, out, expand, project = (str(a[f"{block}.{layer}.precision"]) for layer in PROJECTIONS)
        y = net.add(f"{block}.norm1", "layer_norm", x)
        y = net.add(f"{block}.qkv", "conv2d", y, 3 * heads * a.integer(f"{block}.head_width"), precision=qkv)
        y = net.add(f"{block}.attention", "attention", y, heads=heads)
        x = net.add(f"{block}.out", "conv2d", y, width, precision=out, skip=x)
        y = net.add(f"{block}.norm2", "layer_norm", x)
        y = net.add(f"{block}.expand", "conv2d", y, width * a.integer(f"{block}.ratio"), activation="relu", precision=expand)
        return net.add(f"{block}.project", "conv2d", y, width, precision=project, skip=x)
