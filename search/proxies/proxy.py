"""What a zero-cost proxy is, and the register of all of them.

A proxy is a function of a `Trial` that gives a number, the larger the better the network is expected to be. The trial's
network is a copy, which it may change, and torch's random numbers follow from the seed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch

from spaces.errors import UserError
from spaces.plain import PlainNetwork, resize


class Trial:
    """What a proxy looks at.

    Args:
        original: an untrained network, which stays as it is.
        images: `(n, channels, height, width)`, of the size of the network's input.
        labels: `(n,)`.
    """

    def __init__(self, original: PlainNetwork, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.layers, self.images, self.labels = original.network, images, labels
        self._original = original

    @cached_property
    def network(self) -> PlainNetwork:
        """The proxy's own copy, in training mode."""
        return copy.deepcopy(self._original).train()


Proxy = Callable[[Trial], float]

PROXIES: dict[str, Proxy] = {}


def proxy(name: str) -> Callable[[Proxy], Proxy]:
    """Register a proxy; the contract tests find it by itself."""

    def register(function: Proxy) -> Proxy:
        PROXIES[name] = function
        return function

    return register


def score(name: str, network: PlainNetwork, images: torch.Tensor, labels: torch.Tensor, seed: int) -> float:
    """One proxy of one network, which stays as it is, as do torch's random numbers.

    Args:
        name: of the proxy.
        network: untrained.
        images: `(n, channels, any height, any width)`.
        labels: `(n,)`.
        seed: of what the proxy draws.

    Raises:
        UserError: the score is not finite.
    """
    _, height, width = network.network.input_shape
    trial = Trial(network, resize(images, height, width), labels)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        value = PROXIES[name](trial)
    if not math.isfinite(value):
        others = ", ".join(other for other in PROXIES if other != name)
        raise UserError(f"proxy {name} is {value} for a network of this space; allowed are the others: {others}")
    return value


def check_names(what: str, names: Sequence[str]) -> tuple[str, ...]:
    """Names of proxies, each once.

    Args:
        what: the setting, for the message.
        names: to be checked.

    Raises:
        UserError: a name is unknown or repeated.
    """
    if isinstance(names, str) or len(set(names)) != len(names) or not set(names) <= PROXIES.keys():
        raise UserError(f"{what} is {names}; allowed is a list of {', '.join(PROXIES)}, each once")
    return tuple(names)
