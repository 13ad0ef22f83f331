"""Fixtures of the tests of sparsity."""

from model_helpers import one_seed_one_thread

__all__ = ["one_seed_one_thread"]
