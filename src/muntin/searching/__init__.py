"""Architecture search: a space, short trainings of what a study proposes, and the best few networks deployed."""

from muntin.searching.architecture_search import ArchitectureSearch, plan_search, search_architectures
from muntin.searching.plan import SearchPlan
from muntin.searching.settings import SearchSettings
from muntin.searching.space import Space, default_space, load_space

__all__ = [
    "ArchitectureSearch", "SearchPlan", "SearchSettings", "Space", "default_space", "load_space", "plan_search", "search_architectures",
]  # fmt: skip
