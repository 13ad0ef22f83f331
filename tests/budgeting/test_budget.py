from __future__ import annotations

from typing import Any

import pytest

from model_helpers import one_line
from muntin import Budget
from muntin.errors import MuntinError


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_drop": -0.01}, "max_drop=-0.01"),
        ({"max_drop": float("nan")}, "max_drop=nan"),
        ({"max_drop": "1%"}, "max_drop='1%'"),
        ({"max_drop": True}, "max_drop=True"),
        ({"max_drop": 0.01, "objective": "speed"}, "give one of size, latency"),
        ({"max_drop": 0.01, "confidence": 1.0}, "from 0.5 to below 1"),
    ],
)
def test_refused(values: Any, words: str) -> None:
    with pytest.raises(MuntinError) as error:
        Budget(**values)
    assert words in one_line(error)


def test_values() -> None:
    budget = Budget(max_drop=0)
    assert (budget.max_drop, budget.objective, budget.confidence) == (0, "size", 0.95)


def test_verdicts() -> None:
    budget = Budget(max_drop=0.01)
    drop = 0.91 - 0.9  # 0.010000000000000009
    assert [budget.judge(*pair) for pair in ((drop, drop), (0.0, 0.0101), (0.0101, 0.02), (float("nan"), 0.0))] == [
        "kept",
        "uncertain",
        "broken",
        "broken",
    ]


def test_drops_that_a_search_settles_for() -> None:
    budget = Budget(max_drop=0.01)
    pairs = ((0.009, 0.0095), (0.004, 0.01), (0.006, 0.011), (0.004, 0.5), (0.006, 0.5), (-0.02, 0.1), (0.011, 0.011))
    assert [budget.accepts(*pair) for pair in pairs] == [True, True, False, True, False, True, False]
