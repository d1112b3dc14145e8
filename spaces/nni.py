"""The space `nni`: any `ModelSpace` of NNI, from its hub or the user's own.

NNI's mutables become choices: `LayerChoice`, `InputChoice`, `Repeat`, `nni.choice` and what is computed from it. What is inside
of a `Repeat` or a chosen layer is active only where it is used. A network is NNI's own (`with model_context(sample):
ModelSpace(...)`), traced into layers (`spaces.tracing`). There are no shared weights: networks are trained one by one.

NNI is imported here and nowhere else, and only when a space is made.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from spaces.choice import Architecture, Choice, Option
from spaces.errors import UserError
from spaces.layers import Network
from spaces.options import ascending, positive
from spaces.plain import PlainNetwork, resize
from spaces.space import Space
from spaces.traced import Traced
from spaces.tracing import trace

HUB = "nni.nas.hub.pytorch"
RESOLUTION = "resolution"
CLASSES = ("num_labels", "num_classes", "classes")
REMEMBERED_NETWORKS = 4096
MOST_COMBINATIONS = 256

When = tuple[str, tuple[Option, ...]] | None


class NniSpace(Space):
    """A model space of NNI 3.

    Args:
        model: `_target_`, the dotted name of a `ModelSpace`, beside the arguments to make it with. An argument called
            `num_labels`, `num_classes` or `classes` gets the number of classes.
        channels: image channels.
        classes: number of classes.
        resolutions: sides of the square input; a choice where there are several.
        model_channels: channels that the model reads; images with one channel are repeated.

    Raises:
        UserError: NNI is missing, `_target_` is no model space or cannot be made, or a mutable has no finite options.
    """

    shares_weights = False

    def __init__(
        self, model: Mapping[str, Any], channels: int, classes: int, resolutions: Sequence[int], model_channels: int = 3
    ) -> None:
        self.channels, self.classes = positive("channels", channels), positive("classes", classes)
        self.model_channels = positive("model_channels", model_channels)
        if self.channels not in (1, self.model_channels):
            raise UserError(
                f"images have {channels} channels and the model reads {model_channels}; allowed are 1 or as many as the model "
                f"reads: space.model_channels={channels}"
            )
        self.resolutions = ascending("resolutions", resolutions)
        given = dict(model)
        self.target = str(given.pop("_target_", None))
        self._kind = _model_space(self.target)
        self._arguments = given
        for name in CLASSES:
            if name in _parameters(self._kind) and name not in given:
                self._arguments[name] = self.classes
                break
        self.name = self.target.rpartition(".")[2]
        with quiet():
            space = self._made()
            self.choices, self._values = _Choices(space).all(self.resolutions)
        self._on_meta = True
        self._traced = lru_cache(REMEMBERED_NETWORKS)(self._trace)

    def __reduce__(self) -> tuple[Callable[..., NniSpace], tuple[Any, ...]]:
        model = {"_target_": self.target, **self._arguments}
        return NniSpace, (model, self.channels, self.classes, self.resolutions, self.model_channels)

    # -- networks -------------------------------------------------------------------------------------------------------------

    def network(self, architecture: Architecture) -> Network:
        return self._traced(architecture).network

    def module(self, architecture: Architecture) -> nn.Module:
        """NNI's network for images `(n, channels, any height, any width)`, its weights drawn by torch's generator."""
        with quiet():
            return ModelOfImages(self._frozen(architecture), self._side(architecture), self.model_channels)

    def plain(self, architecture: Architecture, state: Mapping[str, torch.Tensor]) -> PlainNetwork:
        """What ships of a network, in evaluation mode, with copies of the parameters and buffers of its `module`."""
        return self._traced(architecture).plain(state)

    def sample_of(self, architecture: Architecture) -> dict[str, Any]:
        """An architecture as NNI's sample: values by label, of inactive choices too."""
        values = {choice.name: architecture.get(choice.name, choice.options[0]) for choice in self.choices}
        return {label: options[values[name]] for name, (label, options) in self._values.items()}

    def architecture_of(self, sample: Mapping[str, Any], resolution: int | None = None) -> Architecture:
        """The inverse of `sample_of`.

        Raises:
            ValueError: a label is missing, or its value is no option.
        """
        values: dict[str, Option] = {RESOLUTION: self.resolutions[-1] if resolution is None else resolution}
        for name, (label, options) in self._values.items():
            found = [option for option, value in options.items() if value == sample.get(label)]
            if not found:
                raise ValueError(f"{label} is {sample.get(label)!r}; allowed are {list(options.values())}")
            values[name] = found[0]
        return self.architecture({name: value for name, value in values.items() if name in self._names})

    def model_space(self) -> nn.Module:
        """NNI's own object."""
        with quiet():
            return self._made()

    def _side(self, architecture: Architecture) -> int:
        return int(architecture.get(RESOLUTION, self.resolutions[-1]))

    def _trace(self, architecture: Architecture) -> Traced:
        side = self._side(architecture)
        with quiet():
            model = ModelOfImages(self._without_memory(architecture), side, self.model_channels)
        traced = trace(model, (self.channels, side, side), self.name)
        classes = traced.network.nodes[-1].spec.out_channels
        if classes != self.classes:
            found = f"{self.name} gives {classes} classes, the data has {self.classes}"
            raise UserError(f"{found}; give its argument: +space.model.NAME={self.classes}")
        return traced

    def _without_memory(self, architecture: Architecture) -> nn.Module:
        if self._on_meta:
            try:
                with torch.device("meta"):
                    return self._frozen(architecture)
            except (RuntimeError, NotImplementedError):
                self._on_meta = False  # its constructor looks at numbers
        return self._frozen(architecture).to("meta")

    def _frozen(self, architecture: Architecture) -> nn.Module:
        from nni.nas.space import model_context

        with model_context(self.sample_of(architecture)):
            return self._made()

    def _made(self) -> nn.Module:
        try:
            made = self._kind(**self._arguments)
        except (RuntimeError, NotImplementedError):
            raise
        except Exception as error:  # of the user's own constructor
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise UserError(f"cannot make {self.target} with {self._arguments} ({reason}); see space.model") from error
        if not isinstance(made, nn.Module):  # `__new__` may give anything
            raise UserError(f"{self.target} makes a {type(made).__name__}; allowed is a model space of NNI; see space.model")
        return made


class ModelOfImages(nn.Module):
    """A model behind what our images need: their side, and as many channels as it reads.

    Args:
        model: reads `(n, channels, side, side)`.
        side: of its input, in pixels.
        channels: that it reads.
    """

    def __init__(self, model: nn.Module, side: int, channels: int) -> None:
        super().__init__()
        self.model, self.side, self.channels = model, side, channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images `(n, 1 or channels, any height, any width)` to logits `(n, classes)`."""
        x = resize(images, self.side, self.side)
        if x.shape[1] != self.channels:
            x = x.expand(-1, self.channels, -1, -1)
        logits: torch.Tensor = self.model(x)
        return logits


class _Choices:
    """Walks through a model space and collects its mutables.

    Args:
        space: the model space.
    """

    def __init__(self, space: nn.Module) -> None:
        self.space = space
        self.found: dict[str, Any] = {}  # mutables by label
        self.sizes: dict[str, list[int]] = {}  # parameters behind each value of a layer choice
        self.when: dict[str, When] = {}

    def all(self, resolutions: Sequence[int]) -> tuple[tuple[Choice, ...], dict[str, tuple[str, dict[Option, Any]]]]:
        """The choices, parents first; and for each name its label and what NNI calls its options."""
        self._walk(self.space, None)
        for label, mutable in self.space.simplify().items():  # type: ignore[operator]
            if label not in self.found:
                self._add(label, mutable, None)
        choices, values = [], {}
        for label, mutable in self.found.items():
            name, options = _name(label), self._options(label, mutable)
            if name in values or name == RESOLUTION:
                raise UserError(f"label {label!r} is called like another one; give it another label")
            values[name] = label, options
            when = self.when[label]
            numbers = all(isinstance(option, int | float) for option in options)
            ordered = numbers and label not in self.sizes
            choices.append(Choice(name, tuple(options), ordered, None if when is None else (_name(when[0]), when[1])))
        if len(resolutions) > 1:
            choices.insert(0, Choice(RESOLUTION, tuple(resolutions)))
        return tuple(choices), values

    def _walk(self, module: nn.Module, when: When) -> None:
        from nni.nas.nn.pytorch import LayerChoice, Repeat
        from nni.nas.nn.pytorch.base import MutableModule

        if isinstance(module, LayerChoice):
            label = module.label
            self.sizes[label] = [sum(p.numel() for p in module[name].parameters()) for name in module.names]
            self._add(label, module.choice, when)
            for name in module.names:
                self._walk(module[name], (label, (name,)))
            return
        depth = getattr(module, "depth_choice", None)
        if isinstance(module, Repeat) and isinstance(getattr(depth, "values", None), list) and depth is not None:
            self._add(depth.label, depth, when)
            for index, block in enumerate(module.blocks):
                deep = tuple(sorted(value for value in depth.values if value > index))
                self._walk(block, when if len(deep) == len(depth.values) else (depth.label, deep))
            return
        if isinstance(module, MutableModule):
            for mutable in module.mutables:
                for label, leaf in mutable.simplify().items():
                    self._add(label, leaf, when)
        for child in module.children():
            self._walk(child, when)

    def _add(self, label: str, mutable: Any, when: When) -> None:
        if label not in self.found:
            self.found[label], self.when[label] = mutable, when
        elif self.when[label] != when:
            self.when[label] = None  # used in several places: always active

    def _options(self, label: str, mutable: Any) -> dict[Option, Any]:
        """NNI's values by our options, the smallest first."""
        values = getattr(mutable, "values", None)
        if not isinstance(values, list):
            raise UserError(f"{label} is {mutable!r}; allowed are nni.choice, LayerChoice, InputChoice and Repeat")
        if hasattr(mutable, "n_chosen"):
            numbers = range(1, len(values) + 1) if mutable.n_chosen is None else [mutable.n_chosen]
            chosen = [list(c) for n in numbers for c in itertools.combinations(values, n)]
            if len(chosen) > MOST_COMBINATIONS:
                raise UserError(f"{label} has {len(chosen)} combinations; allowed are {MOST_COMBINATIONS}")
            return {"+".join(map(str, c)): c for c in chosen}
        if label in self.sizes:
            sizes = dict(zip(values, self.sizes[label], strict=True))
            values = sorted(values, key=lambda value: sizes[value])
        elif all(isinstance(value, int | float) for value in values):
            values = sorted(values)
        plain = all(isinstance(value, int | float | str) and not isinstance(value, bool) for value in values)
        return {value if plain else str(value): value for value in values}


def _name(label: str) -> str:
    return label.replace("/", ".")


def _parameters(kind: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(kind, "_init_wrapped", None) or kind.__init__).parameters


def _model_space(target: str) -> Callable[..., Any]:
    """The class that a dotted name means.

    Raises:
        UserError: NNI is missing, or there is no such model space.
    """
    with quiet():
        try:
            base = importlib.import_module("nni.nas.nn.pytorch").ModelSpace
        except ModuleNotFoundError as error:
            raise UserError(
                f"space nni needs NNI 3, which is not installed here ({error}); run: pip install 'nni>=3.0'"
            ) from error
        module, _, name = target.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), name)
        except (ImportError, ValueError, AttributeError) as error:
            known = f"; NNI's hub has {', '.join(sorted(_hub(base)))}" if module == HUB else ""
            raise UserError(f"no model space {target} ({error}){known}; give space.model._target_ or name") from error
    logging.getLogger("nni").setLevel(logging.WARNING)  # it tells every network that it makes
    if not inspect.isclass(kind) or not issubclass(kind, base):
        raise UserError(f"{target} is no nni.nas.nn.pytorch.ModelSpace; give space.model._target_ or name")
    return kind


def _hub(base: type) -> Iterator[str]:
    hub = importlib.import_module(HUB)
    return (name for name, kind in vars(hub).items() if inspect.isclass(kind) and issubclass(kind, base))


@contextmanager
def quiet() -> Iterator[None]:
    """A context in which NNI does not warn about torch's version, its own labels or pickles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
