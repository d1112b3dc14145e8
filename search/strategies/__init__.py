"""Search strategies: how a study finds what to evaluate. One file and one class each."""

from search.strategies.guided import Guided
from search.strategies.reinforce import Reinforce
from search.strategies.strategy import Round, SearchStrategy
from search.strategies.training_free import TrainingFree

__all__ = ["Guided", "Reinforce", "Round", "SearchStrategy", "TrainingFree"]
