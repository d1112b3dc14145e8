"""Gradient-based search: choices relaxed to probabilities, trained by gradient descent, swept over the weight of a cost."""

from search.relaxation.cost import CostFit, ExpectedCost
from search.relaxation.family import Member, RelaxationSettings, check_strategy, search_member
from search.relaxation.relaxed import Relaxed
from search.relaxation.strategy import GradientStrategy, SearchStep

__all__ = [
    "CostFit",
    "ExpectedCost",
    "GradientStrategy",
    "Member",
    "RelaxationSettings",
    "Relaxed",
    "SearchStep",
    "check_strategy",
    "search_member",
]
