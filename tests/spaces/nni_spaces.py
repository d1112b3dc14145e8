"""Model spaces of NNI as a user writes them."""

from __future__ import annotations

import nni
import torch
from nni.nas.nn.pytorch import (
    InputChoice,
    LayerChoice,
    ModelSpace,
    MutableBatchNorm2d,
    MutableConv2d,
    MutableLinear,
    Repeat,
)
from torch import nn
from torch.nn import functional as F


class Plain(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = MutableConv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = MutableBatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu6(x + self.norm(self.conv(x)))


class Gated(nn.Module):
    """With what no layer specification has: a gate, a dilated convolution, a shuffle of channels, a sum of stacked maps."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = MutableConv2d(width, width, 3, padding=2, dilation=2, bias=False)
        self.norm = MutableBatchNorm2d(width)
        self.gate = MutableConv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x))
        y = y * torch.sigmoid(self.gate(y.mean([2, 3], keepdim=True)))
        n, c, h, w = y.shape
        y = y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return torch.stack([x, y, F.max_pool2d(y, 3, 1, 1)]).sum(0)


class Small(ModelSpace):
    """Every mutable that NNI has."""

    def __init__(self, channels: int = 1, classes: int = 10, widths: tuple[int, ...] = (4, 8), inputs: bool = True) -> None:
        super().__init__()
        width = nni.choice("width", list(widths))
        self.stem = MutableConv2d(channels, width, nni.choice("stem_kernel", [3, 5]), padding=0)
        self.blocks = Repeat(
            lambda index: LayerChoice({"gated": Gated(width), "plain": Plain(width)}, label=f"block{index}"),
            (1, 3),
            label="depth",
        )
        self.reads = InputChoice(2, n_chosen=None, label="reads") if inputs else None
        self.head = MutableLinear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = self.blocks(x)
        y = y if self.reads is None else self.reads([x, y])
        return self.head(y.mean([2, 3]))


class TokensFirst(ModelSpace):
    """Adds three maps whose first size is not the batch: cannot be cut into layers."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(1, 4, 3, padding=1) for _ in range(3))
        self.act = LayerChoice([nn.ReLU(), nn.Tanh()], label="act")
        self.head = nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = [conv(x).flatten(2).permute(2, 0, 1) for conv in self.convs]
        return self.head(self.act(turned[0] + turned[1] + turned[2]).mean(0))


class Unknown(ModelSpace):
    """Has an operation that cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.act = LayerChoice([nn.ReLU(), nn.Tanh()], label="act")
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cumsum(self.act(x), dim=2).flatten(1))


class Drawn(ModelSpace):
    """Draws at random while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.act = LayerChoice([nn.ReLU(), nn.Tanh()], label="act")
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(x).flatten(1) + torch.rand(64, device=x.device))


class Endless(ModelSpace):
    """Has a mutable without finite options."""

    def __init__(self) -> None:
        super().__init__()
        self.add_mutable(nni.uniform("share", 0.0, 1.0))
        self.head = nn.Linear(64, 10)
