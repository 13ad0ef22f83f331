"""What the batcher reaches where answers and refusals take the engine's core, in simulated time: a classifier with an objective of 10 ms.

A core that only computes and answers gets through 1,800 requests a second in batches of eight. At three times that, refusals take their
part of it whatever the batcher does, so goodput is held against what batches of four would leave.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest


@pytest.fixture(scope="module")
def calm(one_core: Any) -> Any:
    return one_core.OneCore(rate=1000.0)


@pytest.mark.parametrize("share", [0.5, 0.9])
def test_near_saturation_what_is_admitted_is_answered_in_time(one_core: Any, calm: Any, share: float) -> None:
    scene = replace(calm, rate=1700.0, share=share)
    outcome = one_core.play(12_000, seed=1, scene=scene)
    assert outcome.inside >= 0.999
    assert outcome.goodput > 0.9 * scene.rate


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("costs", [{}, {"unread": 0.00007}, {"read": 0.00018, "write": 0.00012}])
def test_a_flood_costs_what_its_refusals_take_and_little_more(one_core: Any, calm: Any, costs: dict[str, float], share: float) -> None:
    scene = replace(calm, rate=5700.0, share=share, **costs)
    outcome = one_core.play(15_000, seed=0, scene=scene)
    assert outcome.inside > 0.995
    assert outcome.goodput > 0.9 * scene.ceiling(rows=4)
    assert outcome.batch_rows > 3


def test_at_low_load_a_request_goes_alone(one_core: Any, calm: Any) -> None:
    outcome = one_core.play(3000, seed=0, scene=replace(calm, rate=100.0))
    assert outcome.inside == 1
    assert outcome.batch_rows < 1.01
