"""A small space and its base."""

from __future__ import annotations

import pytest

from model_helpers import one_seed_one_thread
from muntin.models import ModelConfig
from muntin.searching.space import Space, parse_space
from small_space import CHOICES, base_of

__all__ = ["one_seed_one_thread"]


@pytest.fixture
def space() -> Space:
    return parse_space(CHOICES)


@pytest.fixture
def base() -> ModelConfig:
    return base_of("segment")
