"""The decisions of a search, on plans and measurements that are functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.budgeting.budget import Budget
from muntin.budgeting.forms.plans import Form, Plan
from muntin.budgeting.search import NARROW, Base, Search, front
from muntin.budgeting.trials import Trial
from muntin.errors import MuntinError

STEPS = 400
BUDGET = Budget(max_drop=0.01)


class Smooth:
    """Plans of `STEPS` harms from 1e-7 to 10; bytes fall with the logarithm of the harm. `share`: of the bytes of the first width.
    `int8_harm`: predicted for plain INT8."""

    def __init__(self, width: float = 1.0, share: float = 1.0, least: float = 1e-7, int8_harm: float = 1e-4) -> None:
        self.width, self.share, self.least, self.int8_harm = width, share, least, int8_harm

    def propose(self, limit: float) -> Plan | None:
        if limit < self.least:
            return None
        index = min(STEPS, math.floor(math.log10(min(limit, 10.0) / 1e-7) / 8 * STEPS + 1e-9))
        harm = 1e-7 * 10 ** (8 * index / STEPS)
        return Plan(width=self.width, forms={"layer": Form(index, 8)}, harm=harm, cost=self.share * (1000 - 2 * index))

    def int8(self) -> Plan:
        return Plan(width=self.width, forms={"layer": Form(None, 8)}, harm=self.int8_harm, cost=800 * self.share)


def measured(number: int, plan: Plan, limit: float, lost: float, budget: Budget = BUDGET) -> Trial:
    """A trial with this drop; one of infinity has failed."""
    verdict: Any = budget.judge(lost, lost) if lost < math.inf else "failed"
    return Trial(
        number=number, plan=plan, limit=limit, score=1 - lost, drop=lost, bound=lost, bytes=round(plan.cost), ms=plan.cost / 100,
        verdict=verdict, accepted=lost <= budget.max_drop, seconds=1.0, folder=Path(str(number)),
        failed="no engine" if lost == math.inf else "",
    )  # fmt: skip


def searched(
    drop: Callable[[int, Plan], float],
    bases: Sequence[Base] = (Smooth(),),
    trials: int = 60,
    budget: Budget = BUDGET,
    known: Sequence[Trial] = (),
) -> Search:
    by_width = {base.width: base for base in bases}

    def attempt(number: int, plan: Plan, limit: float) -> Trial:
        return measured(number, plan, limit, drop(number, plan), budget)

    search = Search(
        list(by_width), by_width.__getitem__, attempt, budget.objective, known=known, may_go_on=lambda done, opening: len(done) < trials
    )
    search.run()
    return search


INT8 = measured(0, Plan(cost=800.0), 0.0, 0.0)


@pytest.mark.parametrize("harm", [1e-4, 5.0])
def test_int8_within_the_budget(harm: float) -> None:
    """Trials lie between plain INT8 and the most harmful plan, each more careful than the one before that broke the budget."""
    search = searched(lambda number, plan: 0.02, (Smooth(int8_harm=harm),), known=[INT8], trials=4)
    costs = [trial.plan.cost for trial in search.trials[1:]]
    assert costs == sorted(costs) and costs[-1] > 0.75 * 800 and max(costs) <= 800
    assert search.best is search.trials[0] and search.best.number == 0 and not search.unreachable


def test_int8_outside_the_budget() -> None:
    search = searched(lambda number, plan: 100 * plan.harm, known=[measured(0, Plan(cost=800.0), 0.0, 0.5)])
    assert search.best is not None and search.best.number and search.best.accepted


def test_failed_trials() -> None:
    search = searched(lambda number, plan: math.inf if number == 1 else plan.harm, known=[INT8])
    assert search.trials[1].failed and search.trials[2].plan.harm < search.trials[1].plan.harm
    assert search.best is not None and search.best.accepted and not search.best.failed
    assert search.trials[1] not in front(search.trials, "size")
    assert searched(lambda number, plan: math.inf, trials=5).best is None


def test_resumed_search_takes_the_same_decisions() -> None:
    def drop(number: int, plan: Plan) -> float:
        return plan.harm / plan.width

    bases = (Smooth(), Smooth(0.8, 0.9), Smooth(0.6, 0.7))
    whole = searched(drop, bases, known=[INT8])
    for count in range(1, len(whole.trials)):
        resumed = searched(drop, bases, known=[INT8, *whole.trials[1:count]])
        assert resumed.trials == whole.trials


def test_trials_of_another_budget() -> None:
    first = searched(lambda number, plan: plan.harm, known=[INT8])
    wider = Budget(max_drop=0.1)
    known = [measured(trial.number, trial.plan, trial.limit, trial.drop, wider) for trial in first.trials]
    again = searched(lambda number, plan: plan.harm, known=known, budget=wider)
    assert again.best is not None and 0.01 < again.best.plan.harm <= 0.1
    assert len(again.trials) - len(first.trials) < len(first.trials)


@given(st.floats(-5, 1))
def test_limit_is_found(exponent: float) -> None:
    search = searched(lambda number, plan: BUDGET.max_drop * plan.harm / 10**exponent)
    best = search.best
    assert best is not None and best.accepted and len(search.trials) <= 9
    optimum = Smooth().propose(10**exponent * (1 + 1e-9))
    assert optimum is not None and best.plan.cost <= optimum.cost / (1 - NARROW) + 2
    keys = [trial.plan.forms["layer"] for trial in search.trials]
    assert len(set(keys)) == len(keys)


def test_everything_keeps_the_budget() -> None:
    search = searched(lambda number, plan: 0.0)
    assert search.best is not None and search.best.plan.cost <= 200 / (1 - NARROW)


def test_nothing_keeps_the_budget() -> None:
    search = searched(lambda number, plan: 0.02 + 0.001 * plan.harm)
    assert search.unreachable and len(search.trials) == 4
    assert search.best is search.trials[-1] and not search.best.accepted


def test_best_of_a_noisy_measurement() -> None:
    generator = np.random.default_rng(0)
    search = searched(lambda number, plan: plan.harm + generator.normal(0, 0.005))
    kept = [trial for trial in search.trials if trial.accepted]
    assert search.best is min(kept, key=lambda trial: trial.bytes)


def test_more_trials_go_on() -> None:
    def drop(number: int, plan: Plan) -> float:
        return plan.harm / plan.width

    bases = (Smooth(), Smooth(0.8, 0.9), Smooth(0.6, 0.7))
    long = searched(drop, bases).trials
    for count in range(len(long)):
        assert searched(drop, bases, trials=count).trials == long[:count]


def test_narrower_model_that_wins() -> None:
    search = searched(lambda number, plan: plan.harm, (Smooth(), Smooth(0.8, 0.8), Smooth(0.6, 0.6)))
    assert search.best is not None and search.best.plan.width == 0.6 and search.best.plan.harm > 0.005


def test_narrower_model_that_loses() -> None:
    search = searched(lambda number, plan: plan.harm + (plan.width < 1), (Smooth(), Smooth(0.9, 10), Smooth(0.8, 0.8), Smooth(0.6, 0.6)))
    assert search.best is not None and search.best.plan.width == 1
    assert sum(trial.plan.width < 1 for trial in search.trials) == 1
    assert search.notes[0].startswith("width 0.9 was left: no plan of it is predicted to cost less than trial ")
    assert search.notes[1].startswith("width 0.8 was left: it breaks the budget where it would begin to cost less (trial ")
    assert search.notes[2] == "width 0.6 was not tried: pruning to 0.8 alone breaks the budget"


def test_widths_that_the_model_does_not_have() -> None:
    class NoBase:
        def __init__(self, width: float) -> None:
            self.width = width

        def propose(self, limit: float) -> Plan | None:
            raise MuntinError("the budget is out of reach")

    search = searched(lambda number, plan: plan.harm, (Smooth(), NoBase(0.8), NoBase(0.6)))
    assert search.notes == ["widths 0.8, 0.6 were not tried: the budget is out of reach"] and search.best is not None


def test_model_without_plans() -> None:
    class NoBase(Smooth):
        def propose(self, limit: float) -> Plan | None:
            return None

    search = searched(lambda number, plan: 0.0, (NoBase(),), known=[INT8])
    assert search.best is search.trials[0] and "the model has no Linear or Conv2d" in search.notes[0]
    with pytest.raises(MuntinError, match="the model has no Linear or Conv2d"):
        searched(lambda number, plan: 0.0, (NoBase(),))


def test_base_with_one_plan() -> None:
    class One:
        width = 1.0

        def propose(self, limit: float) -> Plan | None:
            return Plan(forms={"layer": Form(None, 16)}, cost=5.0)

    assert [trial.plan.cost for trial in searched(lambda number, plan: 0.0, (One(),)).trials] == [5.0]
    assert len(searched(lambda number, plan: 1.0, (One(),)).trials) == 1


def test_least_harm_of_a_coarse_base() -> None:
    search = searched(lambda number, plan: plan.harm, (Smooth(least=5.0),), budget=Budget(max_drop=1.0))
    assert search.unreachable and search.best is not None and search.best.plan.harm < 6


def test_latency_decides_by_milliseconds() -> None:
    budget = Budget(max_drop=0.01, objective="latency")
    best = searched(lambda number, plan: plan.harm, budget=budget).best
    assert best is not None and best.cost("latency") == best.ms


def test_front() -> None:
    search = searched(lambda number, plan: 0.005 if number == 2 else plan.harm)
    points = front(search.trials, "size")
    assert [trial.bytes for trial in points] == sorted(trial.bytes for trial in points)
    assert [trial.score for trial in points] == sorted(trial.score for trial in points)
    for trial in search.trials:
        assert any(point.bytes <= trial.bytes and point.score >= trial.score for point in points)
