"""Fixtures of the tests of budgets."""

from model_helpers import one_seed_one_thread

__all__ = ["one_seed_one_thread"]
