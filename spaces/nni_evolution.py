"""NNI's own RegularizedEvolution over a space of NNI, with whatever measures networks here in the place of its trials."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spaces.choice import Architecture
from spaces.nni import NniSpace, quiet

Measure = Callable[[Architecture], float]
Allowed = Callable[[], bool]


def evolve(
    space: NniSpace, settings: dict[str, Any], measure: Measure, allowed: Allowed, state: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Run NNI's strategy (aging evolution, arXiv:1802.01548), one network after the other.

    Args:
        space: where it searches; its largest resolution is kept.
        settings: arguments of `nni.nas.strategy.RegularizedEvolution`.
        measure: what is to be maximized.
        allowed: whether another network may be measured.
        state: of an earlier call, to go on from; `None` to begin.

    Returns:
        The strategy's state in memory.

    Raises:
        ValueError: a setting that the strategy does not take.
    """
    with quiet():
        from nni.nas.execution import ExecutionEngine
        from nni.nas.execution.event import FinalMetricEvent, TrainingEndEvent
        from nni.nas.space import ModelStatus, SimplifiedModelSpace
        from nni.nas.strategy import RegularizedEvolution

        class Measuring(ExecutionEngine):  # type: ignore[misc]
            """Measures a network when it is submitted."""

            def submit_models(self, *models: Any) -> None:
                for model in models:
                    value = measure(space.architecture_of(model.sample))
                    self.dispatch_model_event(FinalMetricEvent(model, value))
                    self.dispatch_model_event(TrainingEndEvent(model, ModelStatus.Trained))

            def list_models(self, status: Any = None) -> list[Any]:
                return []

            def idle_worker_available(self) -> bool:
                return allowed()

            def budget_available(self) -> bool:
                return allowed()

        strategy = RegularizedEvolution(**settings)
        strategy.initialize(SimplifiedModelSpace.from_model(space.model_space()), Measuring())
        if state is not None:
            strategy.load_state_dict(state)
        strategy.run()
        return dict(strategy.state_dict())
