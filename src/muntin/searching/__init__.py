"""Architecture search: a space, shared weights, a table of latencies, a study, and the best few networks deployed."""

from muntin.searching.run import ArchitectureSearch, search_architectures
from muntin.searching.settings import SearchSettings
from muntin.searching.space import Space, default_space, load_space

__all__ = ["ArchitectureSearch", "SearchSettings", "Space", "default_space", "load_space", "search_architectures"]
