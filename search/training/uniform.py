"""Single path, drawn uniformly (SPOS, arXiv:1904.00420)."""

from __future__ import annotations

from search.training.strategy import Losses, OnLabels, Step


class Uniform(OnLabels):
    """Every step trains one random network on the labels."""

    def backward(self, step: Step) -> Losses:
        loss, _ = step.on_labels(step.supernet.space.sample(step.rng), smoothing=step.smoothing)
        return {"drawn": loss}
