"""The search for the smallest or fastest plan that keeps a budget: bisection of the harm that a plan may do, by what was measured.

    limit of harm -> plan of least cost -> trial -> tighter if it breaks the budget, wider if it keeps it -> ...

The next limit is the one whose plan costs the geometric mean of the plans at the limits known: harm spans many decades, cost a few octaves.
Predicted harm orders plans well but is no accuracy, so only trials decide. The budget may be kept at one limit and broken at a lower one
(training is noisy), so the best trial that keeps it wins, not the last. Decisions depend on the measurements alone: a search that is
resumed takes the same ones, and one with more trials goes on where it ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from muntin.budgeting.budget import Budget
from muntin.budgeting.forms import Plan
from muntin.budgeting.trials import Trial
from muntin.errors import MuntinError

NARROW = 0.02
"""Share of the cost that is left to gain, by prediction, at which bisection ends."""
EQUAL_COST = 0.02
"""Share by which measured milliseconds may differ without meaning."""
FIRST = 3
"""Trials of the first width before the least harmful plan (if all broke the budget), or the other widths, are tried."""
LEAST_GAIN = 0.95
"""Share of the best trial's predicted cost that the plan of another width must cost at most."""
DECADES = 9
"""Decades of harm below that of the most harmful plan in which limits are searched."""
PROPOSALS = 14
"""Plans that are looked at to find one of a certain cost; none of them is applied."""


class Base(Protocol):
    """Plans for one width of the model."""

    width: float

    def propose(self, limit: float) -> Plan | None:
        """The plan of least cost whose harm is at most `limit`; None if even the least harm is more."""


TryPlan = Callable[[int, Plan, float], Trial]
"""Applies and measures a plan: number from 1, plan, limit of harm."""


class Search:
    """A search over bases, the first of which is the unpruned model.

    `open_base`: makes the base of a width, which may take minutes; raises `MuntinError` where the model has none. `may_go_on`: asked
    before each trial and each base, with the trials so far, and True before a base.
    """

    def __init__(
        self,
        widths: Sequence[float],
        open_base: Callable[[float], Base],
        attempt: TryPlan,
        budget: Budget,
        *,
        may_go_on: Callable[[Sequence[Trial], bool], bool],
    ) -> None:
        self.widths, self.open_base, self.attempt, self.budget, self.may_go_on = widths, open_base, attempt, budget, may_go_on
        self.trials: list[Trial] = []
        self.notes: list[str] = []
        self.stopped = False
        """True if `may_go_on` ended the search."""
        self.unreachable = False
        """True if the least harmful plan breaks the budget, too."""
        self.too_narrow: float | None = None
        """Width at which pruning alone breaks the budget."""

    @property
    def best(self) -> Trial | None:
        """The cheapest trial that keeps the budget (of those about as fast, the smallest); if none does, the one with the least drop.

        None without trials.
        """
        kept = [trial for trial in self.trials if trial.kept]
        if kept:
            least = min(trial.cost(self.budget.objective) for trial in kept)
            near = [trial for trial in kept if trial.cost(self.budget.objective) <= least * (1 + EQUAL_COST)]
            return min(near, key=lambda trial: (trial.bytes, trial.cost(self.budget.objective), trial.number))
        return min(self.trials, key=lambda trial: (trial.bound, trial.number), default=None)

    def run(self) -> None:
        """Search until the limits are narrow, or `may_go_on` says no."""
        first: _Bracket | None = None
        brackets: dict[float, _Bracket] = {}
        for width in self.widths:
            if self.too_narrow is not None and width < self.too_narrow:
                self.notes.append(f"width {width:g} was not tried: pruning to {self.too_narrow:g} alone breaks the budget")
                continue
            if not self._goes_on(opening=True):
                break  # the best width may still have room for trials
            try:
                bracket = _Bracket(self.open_base(width))
            except MuntinError as error:
                if first is None:
                    raise
                self.notes.append(f"width {width:g} was not tried: {error}")
                continue
            brackets[width] = bracket
            if first is None:
                first = bracket
                self._bisect(bracket, FIRST)
                if self._none_kept() and self._goes_on():
                    self._least_harm(bracket)
            else:
                self._probe(bracket, first)
            if self.unreachable:
                return
        ended = self.stopped
        if (best := self.best) is not None:
            self._bisect(brackets[best.plan.width])
        self.stopped |= ended

    def _goes_on(self, *, opening: bool = False) -> bool:
        self.stopped = not self.may_go_on(self.trials, opening)
        return not self.stopped

    def _none_kept(self) -> bool:
        return not any(trial.kept for trial in self.trials)

    def _bisect(self, bracket: _Bracket, most: int | None = None) -> None:
        count = 0
        while count != most and (proposal := bracket.following()) is not None and self._goes_on():
            self._try(bracket, *proposal)
            count += 1

    def _least_harm(self, bracket: _Bracket) -> None:
        """Try the least harmful plan: if it breaks the budget, all do."""
        plan = bracket.base.propose(0.0)
        proposal = bracket.least if plan is None else (0.0, plan)
        if not bracket.was_tried(proposal[1]):
            self._try(bracket, *proposal)
        self.unreachable = self._none_kept()

    def _probe(self, bracket: _Bracket, first: _Bracket) -> None:
        """Try the least harmful plan of another width that is predicted to cost less than the best trial; note a width that loses.

        If it breaks the budget with less harm from ranks and bits than the first width's keeps it with, pruning is to blame.
        """
        best = self.best
        if best is None or not best.kept:
            return
        width = bracket.base.width
        proposal = bracket.cheaper_than(LEAST_GAIN * best.plan.cost)
        if proposal is None:
            self.notes.append(f"width {width:g} was left: no plan of it is predicted to cost less than trial {best.number}")
            return
        trial = self._try(bracket, *proposal)
        if not trial.kept:
            self.too_narrow = width if trial.plan.harm <= first.low[1].harm else self.too_narrow
            self.notes.append(f"width {width:g} was left: it breaks the budget where it would begin to cost less (trial {trial.number})")

    def _try(self, bracket: _Bracket, limit: float, plan: Plan) -> Trial:
        trial = self.attempt(len(self.trials) + 1, plan, limit)
        self.trials.append(trial)
        bracket.settle(trial.limit, trial.plan, trial.kept)
        return trial


class _Bracket:
    """Limits of harm of one base, and their plans, between which the one sought lies.

    `low` keeps the budget, as far as is known, and `high` breaks it.
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        most = base.propose(math.inf)
        if most is None:
            raise MuntinError("there is no plan: the model has no Linear or Conv2d")
        self.high = (max(most.harm, 1e-12), most)
        self.low = self.least = self._least()
        self._tried: dict[object, bool] = {}

    def _least(self) -> tuple[float, Plan]:
        """About the least limit at which there is a plan, of those that are searched."""
        none, (some, plan) = self.high[0] * 10.0**-DECADES, self.high
        if (proposed := self.base.propose(none)) is not None:
            return none, proposed
        for _ in range(PROPOSALS):
            middle = math.sqrt(none * some)
            if (proposed := self.base.propose(middle)) is None:
                none = middle
            else:
                some, plan = middle, proposed
        return some, plan

    def following(self) -> tuple[float, Plan] | None:
        """The next limit to try and its plan; None when little is left to gain. Plans that were tried are not tried again."""
        while self.high[1].cost < (1 - NARROW) * self.low[1].cost:
            limit, plan = self._at_cost(math.sqrt(self.low[1].cost * self.high[1].cost))
            kept = self._tried.get(_key(plan))
            if kept is None:
                return limit, plan
            if limit in (self.low[0], self.high[0]):  # no plan lies between
                break
            self.settle(limit, plan, kept)
        untried = not self._tried or (self.high[1].cost < (1 - NARROW) * self.low[1].cost and not self.was_tried(self.high[1]))
        return self.high if untried else None

    def was_tried(self, plan: Plan) -> bool:
        return _key(plan) in self._tried

    def settle(self, limit: float, plan: Plan, kept: bool) -> None:
        """Take the outcome of a plan into account. Limits down to its harm would give the same plan."""
        self._tried[_key(plan)] = kept
        if kept and limit >= self.low[0]:
            self.low = (limit, plan)
        elif not kept and limit <= self.high[0]:
            self.high = (max(self.low[0], min(plan.harm, limit)), plan)

    def cheaper_than(self, cost: float) -> tuple[float, Plan] | None:
        """About the least limit whose plan costs at most `cost`, and the plan; None if there is none."""
        return None if self.high[1].cost > cost else self._at_cost(cost)

    def _at_cost(self, cost: float) -> tuple[float, Plan]:
        low, (high, plan) = self.low[0], self.high
        for _ in range(PROPOSALS):
            middle = math.sqrt(low * high)
            proposed = self.base.propose(middle)
            if proposed is None or proposed.cost > cost:
                low = middle
            else:
                high, plan = middle, proposed
        return high, plan


def _key(plan: Plan) -> tuple[object, ...]:
    return plan.width, tuple(sorted(plan.forms.items()))


def front(trials: Iterable[Trial], objective: str) -> list[Trial]:
    """The trials that no other one beats in cost and score, by cost."""
    ordered = sorted(trials, key=lambda trial: (trial.cost(objective), -trial.score, trial.number))
    found: list[Trial] = []
    for trial in ordered:
        if not found or trial.score > found[-1].score:
            found.append(trial)
    return found
