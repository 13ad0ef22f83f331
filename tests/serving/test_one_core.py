"""Results of the batcher where reading and answering take the engine's core, in simulated time: a classifier with an objective of 10 ms.

A core that only computes and answers gets through 1,800 requests a second in batches of eight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def calm(one_core: Any) -> Any:
    return one_core.OneCore(rate=1000.0)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_answers_in_time_near_saturation(one_core: Any, calm: Any, share: float) -> None:
    scene = replace(calm, rate=1700.0, share=share)
    outcome = one_core.play(6_000, seed=1, scene=scene)
    assert outcome.inside >= 0.999
    assert outcome.goodput > 0.9 * scene.rate


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_goodput_in_a_flood(one_core: Any, calm: Any, share: float) -> None:
    """Half as much again as it can answer."""
    scene = replace(calm, rate=2700.0, share=share)
    outcome = one_core.play(6_000, seed=0, scene=scene)
    assert outcome.inside > 0.995
    assert outcome.goodput > 0.9 * scene.ceiling(rows=4)
    assert outcome.batch_rows > 3


def test_single_rows_at_low_load(one_core: Any, calm: Any) -> None:
    outcome = one_core.play(2000, seed=0, scene=replace(calm, rate=100.0))
    assert outcome.inside == 1
    assert outcome.batch_rows < 1.01
