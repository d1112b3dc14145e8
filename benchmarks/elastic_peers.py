"""The default space's dense float networks as others' tools make them elastic: NVIDIA's modelopt, and NNI's one-shot supernets.

Both hold the weights of the largest network and compute any network of the space with parts of them, as this library's supernet
does. They are told the same architectures, and extract the same plain networks of torch's own modules.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from spaces.choice import Architecture
from spaces.mobile import MobileSpace
from spaces.plain import resize

INSTALL = {
    "modelopt": "pip install --no-deps nvidia-modelopt==0.47.0 && pip install requests huggingface_hub safetensors tqdm "
    "omegaconf pulp regex scipy torchprofile pydantic",
    "nni": "pip install 'nni>=3.0'",
}


class AtResolution(nn.Module):
    """A network behind the resizing of its images.

    Args:
        network: reads `(n, channels, side, side)`.
        side: in pixels.
    """

    def __init__(self, network: nn.Module, side: int) -> None:
        super().__init__()
        self.network, self.side = network, side

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(n, channels, any height, any width)` to logits `(n, classes)`."""
        logits: torch.Tensor = self.network(resize(images, self.side, self.side))
        return logits


class Peer(nn.Module):
    """Another tool's supernet of a space.

    Args:
        space: dense and float.
    """

    def __init__(self, space: MobileSpace) -> None:
        super().__init__()
        self.space, self.side = space, space.resolutions[-1]
        self.elastic: nn.Module

    @abstractmethod
    def select(self, architecture: Architecture) -> None:
        """Make the supernet compute an architecture, whatever the resolution."""

    @abstractmethod
    def plain(self, architecture: Architecture) -> nn.Module:
        """The tool's own plain network of an architecture, with copies of the supernet's weights."""

    def activate(self, architecture: Architecture) -> None:
        """Make the supernet compute an architecture."""
        self.select(architecture)
        self.side = architecture.integer("resolution")

    def extract(self, architecture: Architecture) -> nn.Module:
        """A plain network for images of any size."""
        return AtResolution(self.plain(architecture), architecture.integer("resolution"))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(n, channels, any height, any width)` to logits `(n, classes)`."""
        logits: torch.Tensor = self.elastic(resize(images, self.side, self.side))
        return logits


def peer_of(name: str, space: MobileSpace) -> Peer:
    """A peer by name.

    Raises:
        SystemExit: there is no such peer, or it is not installed.
    """
    if name not in PEERS:
        raise SystemExit(f"error: peer {name!r}; allowed are {', '.join(PEERS)}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's version
            return PEERS[name](space)
    except ModuleNotFoundError as error:
        raise SystemExit(f"error: peer {name} is not installed ({error}); run: {INSTALL[name]}") from error


# -- the networks -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    """What networks are made of: torch's modules and the largest numbers, or NNI's modules and its choices of numbers.

    Args:
        pick: from the name of a choice and its options to a number or a choice of numbers.
        conv: as `nn.Conv2d`.
        norm: as `nn.BatchNorm2d`.
        linear: as `nn.Linear`.
        stack: from blocks and their depth to a module that runs the first of them.
    """

    pick: Callable[[str, Sequence[int]], Any]
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    linear: Callable[..., nn.Module]
    stack: Callable[[list[Block], Any], nn.Module]


class Block(nn.Module):
    """An inverted bottleneck, with a residual connection where `skip` says so."""

    def __init__(self, parts: Parts, width: Any, hidden: Any, out: Any, kernel: Any, stride: int, skip: bool) -> None:
        super().__init__()
        self.skip = skip
        self.expand, self.expand_norm = parts.conv(width, hidden, 1, bias=False), parts.norm(hidden)
        how = {"stride": stride, "padding": kernel // 2, "groups": hidden, "bias": False}
        self.depthwise, self.depthwise_norm = parts.conv(hidden, hidden, kernel, **how), parts.norm(hidden)
        self.project, self.project_norm = parts.conv(hidden, out, 1, bias=False), parts.norm(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(n, width, height, width)` to `(n, out, height, width)`, both sides divided by the stride."""
        y = F.relu(self.expand_norm(self.expand(x)))
        y = F.relu(self.depthwise_norm(self.depthwise(y)))
        y = self.project_norm(self.project(y))
        total: torch.Tensor = x + y if self.skip else y
        return total


def assemble(network: nn.Module, space: MobileSpace, parts: Parts) -> None:
    """Give a module the layers of a space, as `run_layers` runs them."""
    width = parts.pick("stem.width", space.stem)
    network.stem = parts.conv(space.channels, width, 3, stride=space.stem_stride, padding=1, bias=False)
    network.stem_norm = parts.norm(width)
    stacks = []
    for s, stage in enumerate(space.stages, 1):
        out, blocks = parts.pick(f"stage{s}.width", stage.widths), []
        for b in range(1, stage.depths[-1] + 1):
            hidden = width * parts.pick(f"stage{s}.block{b}.expansion", space.expansions)
            kernel = parts.pick(f"stage{s}.block{b}.kernel", space.kernels)
            blocks.append(Block(parts, width, hidden, out, kernel, stage.stride if b == 1 else 1, skip=b > 1))
            width = out
        stacks.append(parts.stack(blocks, parts.pick(f"stage{s}.depth", stage.depths)))
    network.stages = nn.ModuleList(stacks)
    last = parts.pick("head.width", space.head)
    network.head, network.head_norm = parts.conv(width, last, 1, bias=False), parts.norm(last)
    network.classifier = parts.linear(last, space.classes)


def run_layers(network: Any, x: torch.Tensor) -> torch.Tensor:
    """`(n, channels, height, width)` to `(n, classes)`."""
    x = F.relu(network.stem_norm(network.stem(x)))
    for stage in network.stages:
        x = stage(x)
    x = F.relu(network.head_norm(network.head(x)))
    logits: torch.Tensor = network.classifier(x.mean(dim=[2, 3]))
    return logits


class Largest(nn.Module):
    """The largest network of a space, of torch's modules."""

    def __init__(self, space: MobileSpace) -> None:
        super().__init__()
        assemble(
            self,
            space,
            Parts(
                pick=lambda name, options: options[-1],
                conv=nn.Conv2d,
                norm=nn.BatchNorm2d,
                linear=nn.Linear,
                stack=lambda blocks, depth: nn.Sequential(*blocks),
            ),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return run_layers(self, x)


# -- the peers ----------------------------------------------------------------------------------------------------------------


class ModelOpt(Peer):
    """NVIDIA's modelopt: its conversion of the largest network for `autonas`, without its own drawing in every pass."""

    def __init__(self, space: MobileSpace) -> None:
        super().__init__(space)
        self.nas = importlib.import_module("modelopt.torch.nas")
        every = {"channels_ratio": None, "channel_divisor": 1, "kernel_size": tuple(space.kernels)}
        rules = {"nn.Conv2d": every, "nn.Sequential": {"min_depth": 1}}
        rules |= {"nn.BatchNorm2d": {"features_ratio": None, "feature_divisor": 1}}
        rules |= {"nn.Linear": {"features_ratio": None, "feature_divisor": 1}}
        self.elastic = self.nas.convert(Largest(space), mode=[("autonas", rules)])
        self.nas.utils.set_modelopt_patches_enabled(False)
        self.names = list(self.nas.get_subnet_config(self.elastic, configurable=True))

    def select(self, architecture: Architecture) -> None:
        self.nas.select(self.elastic, {name: self._value(name, architecture) for name in self.names}, strict=False)

    def plain(self, architecture: Architecture) -> nn.Module:
        self.select(architecture)
        exported: nn.Module = self.nas.export(copy.deepcopy(self.elastic))
        return exported

    def _value(self, name: str, architecture: Architecture) -> Any:
        """Of a parameter of modelopt's, such as `stages.0.1.expand.out_channels`."""
        module, _, what = name.rpartition(".")
        if what == "kernel_size":
            kernel: Any = 3 if module == "stem" else 1
            if module.endswith("depthwise"):
                kernel = architecture.get(f"{_block(module)}.kernel", self.space.kernels[-1])
            return kernel, kernel
        if what == "depth":
            return architecture[f"stage{int(module.split('.')[1]) + 1}.depth"]
        node = _block(module) + "." + module.rpartition(".")[2] if module.startswith("stages") else module
        return self._widths(architecture)[node]

    def _widths(self, architecture: Architecture) -> dict[str, int]:
        """Output channels by the name of a layer; of blocks that are not there too, which modelopt also asks for."""
        width = architecture.integer("stem.width")
        widths = {"stem": width, "head": architecture.integer("head.width"), "classifier": self.space.classes}
        for s, stage in enumerate(self.space.stages, 1):
            out = architecture.integer(f"stage{s}.width")
            for b in range(1, stage.depths[-1] + 1):
                expansion = architecture.get(f"stage{s}.block{b}.expansion", self.space.expansions[-1])
                widths |= {f"stage{s}.block{b}.expand": width * int(expansion), f"stage{s}.block{b}.project": out}
                width = out
        return widths


class OneShot(Peer):
    """NNI's supernet of single paths (`RandomOneShot`)."""

    def __init__(self, space: MobileSpace) -> None:
        super().__init__(space)
        own, tools = importlib.import_module("nni.nas.nn.pytorch"), importlib.import_module("nni")
        one_shot = importlib.import_module("nni.nas.oneshot.pytorch.supermodule")
        self.within = importlib.import_module("nni.nas.space").model_context
        choices: dict[str, Any] = {}

        def pick(name: str, options: Sequence[int]) -> Any:
            if len(options) == 1:
                return options[0]
            choices[name] = tools.choice(name, list(options))
            return choices[name]

        parts = Parts(
            pick=pick,
            conv=own.MutableConv2d,
            norm=own.MutableBatchNorm2d,
            linear=own.MutableLinear,
            stack=own.Repeat,
        )

        class Elastic(own.ModelSpace):  # type: ignore[misc, name-defined]
            def __init__(self) -> None:
                super().__init__()
                assemble(self, space, parts)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return run_layers(self, x)

        self.made = Elastic
        self.elastic = importlib.import_module("nni.nas.strategy").RandomOneShot().mutate_model(Elastic())
        self.sampling = [module for module in self.elastic.modules() if isinstance(module, one_shot.base.BaseSuperNetModule)]
        self.mixed = one_shot.operation.MixedOperation
        self.options = {name: choice.values for name, choice in choices.items()}

    def _sample(self, architecture: Architecture) -> dict[str, Any]:
        return {name: architecture.get(name, options[-1]) for name, options in self.options.items()}

    def select(self, architecture: Architecture) -> None:
        sample = self._sample(architecture)
        for module in self.sampling:
            module.resample(memo=sample)

    def plain(self, architecture: Architecture) -> nn.Module:
        """Made anew and given weights: NNI's own `freeze` fails where a convolution has no bias."""
        sample, state = self._sample(architecture), dict[str, torch.Tensor]()
        for name, module in self.elastic.named_modules():
            if isinstance(module, self.mixed):
                numbers = {**module.init_arguments, **{k: m.freeze(sample) for k, m in module.mutable_arguments.items()}}
                weights = module.freeze_weight(**numbers)
                state |= {f"{name}.{key}".replace(".blocks.", "."): w for key, w in weights.items() if w is not None}
        with self.within(sample):
            plain: nn.Module = self.made()
        own = plain.state_dict()
        plain.load_state_dict({**own, **{name: tensor for name, tensor in state.items() if name in own}})
        return plain


def _block(module: str) -> str:
    """`stage1.block2` of `stages.0.1.expand`."""
    _, s, b, *_ = module.split(".")
    return f"stage{int(s) + 1}.block{int(b) + 1}"


PEERS: dict[str, Callable[[MobileSpace], Peer]] = {"modelopt": ModelOpt, "nni": OneShot}
