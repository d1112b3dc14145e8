"""Interleaved timing: what models cost at one common speed of the machine.

A machine's speed wanders: clocks and neighbours change it by 10 % within a tenth of a second and, where cores are shared, by
half for seconds. So models are kept open and visited in turn for a fraction of a millisecond each, in changing order.
What slows one model slows its neighbours in time too; `steadied` fits that common slowness and takes it out. A few anchors,
models that are visited in every batch, tie batches to the same speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from latency_lut.alone import alone_on_this_machine
from latency_lut.visits import Timed, interleaved

NEIGHBOURS = 8
ITERATIONS = 5
SLOPE_STD = 0.015  # of what `size_slope` finds, between batches on a machine whose memory others use
LEAST_SLOPED = 8  # anchors
OUTLIER = 3.0  # robust standard deviations


@dataclass(frozen=True)
class Timing:
    """What one model costs.

    Args:
        us: microseconds per run: median over the visits, at the common speed.
        spread_us: robust standard error of that median, 1.86 median absolute deviations / sqrt(visits).
        count: visits.
    """

    us: float
    spread_us: float
    count: int


def steadied(times_us: np.ndarray, orders: np.ndarray) -> np.ndarray:
    """Visits with the machine's momentary slowness taken out.

    The model is `log t = model + slowness(time)`. Slowness is the running median of what the visits around differ from their
    models, models are the medians of what is left; a few turns settle both. Slowness is centred: its median is 0.

    Args:
        times_us: `(models, rounds)`.
        orders: `(rounds, models)`, as `interleaved` returns them.

    Returns:
        `(models, rounds)` microseconds.
    """
    logs = np.log(times_us)
    if len(times_us) < 4 or times_us.shape[1] < 3:
        return times_us
    rounds = np.arange(len(orders))[:, None]
    slowness = np.zeros_like(logs)
    level = logs.mean(axis=1, keepdims=True)
    for _ in range(ITERATIONS):
        in_time = (logs - level)[orders, rounds].reshape(-1)
        padded = np.pad(in_time, NEIGHBOURS, mode="reflect") if len(in_time) > NEIGHBOURS else in_time
        windows = np.lib.stride_tricks.sliding_window_view(padded, min(2 * NEIGHBOURS + 1, len(padded)))
        smooth = np.median(windows, axis=1)
        slowness[orders, rounds] = (smooth - np.median(smooth)).reshape(orders.shape)
        level = np.median(logs - slowness, axis=1, keepdims=True)
    return np.asarray(np.exp(logs - slowness))


def summarize(steadied_us: np.ndarray, scale: float | np.ndarray = 1.0) -> list[Timing]:
    """Median and spread of each row of `(models, rounds)` visits, times `scale`, one for all or `(models,)`."""
    rounds = steadied_us.shape[1]
    steadied_us = steadied_us * np.reshape(scale, (-1, 1))
    medians = np.median(steadied_us, axis=1)
    deviations = np.median(np.abs(steadied_us - medians[:, None]), axis=1)
    spreads = 1.2533 * 1.4826 * deviations / np.sqrt(rounds)
    return [Timing(float(m), float(s), rounds) for m, s in zip(medians, spreads, strict=True)]


def size_slope(us: np.ndarray, ratios: np.ndarray) -> float:
    """By what power of its time a model is slowed down beyond others: what competes for memory slows large models most.

    A ridge regression of the anchors' slowness on the logarithms of their times, outliers bounded. What chance would make
    of the anchors' own scatter is weighed against `SLOPE_STD`, so that few or scattered anchors tell of no slope.

    Args:
        us: what anchors cost, `(anchors,)`.
        ratios: to what they cost at the wanted speed, `(anchors,)`.
    """
    if len(us) < LEAST_SLOPED:
        return 0.0
    x, y = np.log(us), np.log(ratios)
    x, y = x - x.mean(), y - np.median(y)
    bound = OUTLIER * 1.4826 * float(np.median(np.abs(y)))
    y = np.clip(y, -bound, bound)
    y = y - y.mean()
    squares, across = float(x @ x), float(x @ y)
    if squares <= 0.0:
        return 0.0
    noise = float(np.sum((y - across / squares * x) ** 2)) / (len(x) - 2)
    return across / (squares + noise / SLOPE_STD**2)


class Speed:
    """Brings batches of visits to the speed that the machine has in the median over all of them.

    Args:
        anchors: how many models, the first ones, are visited in every batch.
        anchors_us: what they cost at the wanted speed, when it is known from an earlier session. Otherwise the first batch sets
            the speed at first, and `scale` says by what to multiply to get to the usual speed.
        by_size: models are alike but for their size, so that a batch may slow large ones by another factor, see `size_slope`.

    Attributes:
        anchors_us: what they cost at the speed of all batches; `None` before the first batch where it is not known.
    """

    def __init__(self, anchors: int, anchors_us: Sequence[float] | None = None, by_size: bool = False) -> None:
        self._anchors, self._by_size = anchors, by_size
        self.anchors_us = None if anchors_us is None else np.array(anchors_us)
        self._fixed = anchors_us is not None
        self._slowness: list[np.ndarray] = []
        self._batches_us: list[np.ndarray] = []

    def add(self, times_us: np.ndarray, orders: np.ndarray) -> list[Timing]:
        """What the models of a batch cost, without its anchors; still to be multiplied by `scale` of the end.

        Args:
            times_us: `(anchors + models, rounds)` as `interleaved` returns them.
            orders: `(rounds, anchors + models)` likewise.
        """
        steady_us, count = steadied(times_us, orders), self._anchors
        levels_us = np.median(steady_us[:count], axis=1)
        if self.anchors_us is None:
            self.anchors_us = levels_us
        ratios = levels_us / self.anchors_us
        ratio = np.full(len(times_us), float(np.median(ratios)) if count else 1.0)
        if self._by_size and (slope := size_slope(levels_us, ratios)):
            centre_us = np.exp(np.log(levels_us).mean())
            ratio = ratio * (np.median(steady_us, axis=1) / centre_us) ** slope
        self._slowness.append(np.log(times_us[:count] / self.anchors_us[:, None]).reshape(-1))
        self._batches_us.append(steady_us[:count] / ratio[:count, None])
        return summarize(steady_us[count:], 1.0 / ratio[count:])

    @property
    def speed(self) -> float:
        """How fast the machine was in the median against the wanted speed: 0.8 is a machine slowed down to 80 %."""
        return float(np.exp(-np.median(np.concatenate(self._slowness)))) if self._slowness and self._anchors else 1.0

    @property
    def scale(self) -> float:
        """Factor from the speed of the first batch to the usual speed; 1 when `anchors_us` were given."""
        return 1.0 if self._fixed else 1.0 / self.speed

    def anchor_timings(self) -> list[Timing]:
        """What the anchors themselves cost, over all batches."""
        return summarize(np.concatenate(self._batches_us, axis=1)) if self._batches_us else []


class Stopwatch(Speed):
    """Times batches of models at the speed that the machine has in the median over all of them.

    Args:
        anchors: models that are visited along with every batch.
        anchors_us: as in `Speed`.
        by_size: as in `Speed`.
    """

    def __init__(self, anchors: Sequence[Timed], anchors_us: Sequence[float] | None = None, by_size: bool = False) -> None:
        super().__init__(len(anchors), anchors_us, by_size)
        self.anchors = list(anchors)

    def time(self, models: Sequence[Timed], rounds: int, visit_s: float, seed: int = 0) -> list[Timing]:
        """Time models together with the anchors; what is returned is still to be multiplied by `scale` of the end."""
        with alone_on_this_machine():
            times_us, orders = interleaved([*self.anchors, *models], rounds, visit_s, seed)
        return self.add(times_us, orders)
