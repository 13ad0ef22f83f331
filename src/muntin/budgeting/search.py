"""The search for the smallest or fastest plan that keeps a budget: bisection of the harm that a plan may do, by what was measured.

    limit of harm -> plan of least cost -> trial -> tighter if it breaks the budget, wider if it keeps it -> ...

The next limit is the one whose plan costs the geometric mean of the plans at the limits known: harm spans many decades, cost a few octaves.
Predicted harm orders plans well but is no accuracy, so only trials decide. The budget may be kept at one limit and broken at a lower one
(training is noisy), so the best accepted trial wins, not the last. If plain INT8 (trial 0) is accepted, the search begins between plans
of its cost and the most harmful plan, so each trial that breaks the budget is followed by a more careful one. Decisions depend on the
measurements alone: a search that is resumed takes the same ones, and one with more trials goes on where it ended. Trials of an earlier call
with another budget count as evidence, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Protocol

from muntin.budgeting.budget import Objective
from muntin.budgeting.forms.plans import Plan
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
        """Return the plan of least cost whose harm is at most `limit`; None if even the least harm is more."""

    def int8(self) -> Plan:
        """Return the plan of 8 bits for every layer that has such a form, with its predictions."""


TryPlan = Callable[[int, Plan, float], Trial]
"""Applies and measures a plan: number from 1, plan, limit of harm."""


class Search:
    """A search over bases, the first of which is the unpruned model.

    `open_base`: makes the base of a width, which may take minutes; raises `MuntinError` where the model has none. `known`: trials that are
    measured already; number 0 is plain INT8. `trained`: True if candidates are trained. `may_go_on`: asked before each trial and each base,
    with the trials so far, and True before a base.
    """

    def __init__(
        self,
        widths: Sequence[float],
        open_base: Callable[[float], Base],
        attempt: TryPlan,
        objective: Objective,
        *,
        known: Sequence[Trial] = (),
        trained: bool = True,
        may_go_on: Callable[[Sequence[Trial], bool], bool],
    ) -> None:
        self.widths, self.open_base, self.attempt, self.objective, self.may_go_on = widths, open_base, attempt, objective, may_go_on
        self.trained = trained
        self.trials: list[Trial] = list(known)
        self.notes: list[str] = []
        self.stopped = False
        """True if `may_go_on` ended the search."""
        self.unreachable = False
        """True if the least harmful plan breaks the budget, too."""
        self.too_narrow: float | None = None
        """Width at which pruning alone breaks the budget."""
        self._refused: dict[str, list[str]] = {}
        """Widths that cannot be made, by the reason."""

    @property
    def best(self) -> Trial | None:
        """The cheapest accepted trial (of those about as fast, the smallest); if there is none, the one with the least drop.

        None without measured trials.
        """
        return best_of(self.trials, self.objective)

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
                    if all(trial.failed for trial in self.trials):
                        raise
                    self.notes.append(f"nothing beyond plain INT8 was tried: {error}")
                    return
                self._note_refused(width, str(error))
                continue
            brackets[width] = bracket
            if first is None:
                first = bracket
                self._begin_with_int8(bracket)
            earlier = self._learn(bracket)
            if bracket is first:
                self._bisect(bracket, FIRST - len(earlier))
                if self._none_accepted() and self._goes_on():
                    self._least_harm(bracket)
            elif earlier:
                self._judge_probe(bracket, earlier[0], first)
            else:
                self._probe(bracket, first)
            if self.unreachable:
                return
        ended = self.stopped
        best = self.best
        if best is not None and (bracket_of_best := brackets.get(best.plan.width)) is not None:
            self._bisect(bracket_of_best)
        self.stopped |= ended

    def _note_refused(self, width: float, reason: str) -> None:
        """Note a width that cannot be made; all widths of one reason are in one note."""

        def note(widths: list[str]) -> str:
            return f"width{'s' if len(widths) > 1 else ''} {', '.join(widths)} {'were' if len(widths) > 1 else 'was'} not tried: {reason}"

        widths = self._refused.setdefault(reason, [])
        if widths:
            self.notes.remove(note(widths))
        widths.append(f"{width:g}")
        self.notes.append(note(widths))

    def _begin_with_int8(self, bracket: _Bracket) -> None:
        """Give trial 0 the predictions of its plan; if it is accepted, only cheaper plans are searched.

        If it is not, training may mend that; without training, more harmful plans break it, too.
        """
        for index, trial in enumerate(self.trials):
            if trial.number == 0:
                plan = bracket.base.int8()
                self.trials[index] = replace(trial, plan=plan)
                if trial.accepted:
                    bracket.begin_at(plan)
                elif not (self.trained or trial.failed):
                    bracket.settle(max(plan.harm, bracket.low[0]), plan, kept=False)

    def _learn(self, bracket: _Bracket) -> list[Trial]:
        """Take the trials of a width that were measured by earlier calls into account, and return them."""
        earlier = [trial for trial in self.trials if trial.number and trial.plan.width == bracket.base.width]
        for trial in earlier:
            bracket.settle(trial.limit, trial.plan, trial.accepted)
        return earlier

    def _goes_on(self, *, opening: bool = False) -> bool:
        self.stopped = not self.may_go_on(self.trials, opening)
        return not self.stopped

    def _none_accepted(self) -> bool:
        return not any(trial.accepted for trial in self.trials)

    def _bisect(self, bracket: _Bracket, most: int | None = None) -> None:
        count = 0
        while (most is None or count < most) and (proposal := bracket.following()) is not None and self._goes_on():
            self._try(bracket, *proposal)
            count += 1

    def _least_harm(self, bracket: _Bracket) -> None:
        """Try the least harmful plan: if it breaks the budget, all do."""
        plan = bracket.base.propose(0.0)
        proposal = bracket.least if plan is None else (0.0, plan)
        if not bracket.was_tried(proposal[1]):
            self._try(bracket, *proposal)
        self.unreachable = self._none_accepted()

    def _probe(self, bracket: _Bracket, first: _Bracket) -> None:
        """Try the least harmful plan of another width that is predicted to cost less than the best trial; note a width that loses."""
        best = self.best
        if best is None or not best.accepted:
            return
        proposal = bracket.cheaper_than(LEAST_GAIN * best.plan.cost)
        if proposal is None:
            width = bracket.base.width
            self.notes.append(f"width {width:g} was left: no plan of it is predicted to cost less than trial {best.number}")
        else:
            self._judge_probe(bracket, self._try(bracket, *proposal), first)

    def _judge_probe(self, bracket: _Bracket, trial: Trial, first: _Bracket) -> None:
        """Note a width that loses.

        If it breaks the budget with less harm from ranks and bits than the first width keeps it with, pruning is to blame.
        """
        if not trial.accepted:
            width = bracket.base.width
            self.too_narrow = width if trial.plan.harm <= first.low[1].harm else self.too_narrow
            self.notes.append(f"width {width:g} was left: it breaks the budget where it would begin to cost less (trial {trial.number})")

    def _try(self, bracket: _Bracket, limit: float, plan: Plan) -> Trial:
        trial = self.attempt(1 + max((trial.number for trial in self.trials), default=0), plan, limit)
        self.trials.append(trial)
        bracket.settle(trial.limit, trial.plan, trial.accepted)
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

    def begin_at(self, plan: Plan) -> None:
        """Search plans that cost less than one that keeps the budget.

        Its own harm is no limit: it may lie in one layer that other plans leave in 16 bits.
        """
        self._tried[_key(plan)] = True
        if self.high[1].cost < plan.cost:
            self.low = self._at_cost(plan.cost)

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


def best_of(trials: Iterable[Trial], objective: Objective) -> Trial | None:
    """Return the best trial; see `Search.best`."""
    measured = [trial for trial in trials if not trial.failed]
    if accepted := [trial for trial in measured if trial.accepted]:
        least = min(trial.cost(objective) for trial in accepted)
        near = [trial for trial in accepted if trial.cost(objective) <= least * (1 + EQUAL_COST)]
        return min(near, key=lambda trial: (trial.bytes, trial.cost(objective), trial.number))
    return min(measured, key=lambda trial: (trial.drop, trial.number), default=None)


def front(trials: Iterable[Trial], objective: str) -> list[Trial]:
    """Return the trials that no other one beats in cost and score, by cost."""
    measured = [trial for trial in trials if not trial.failed]
    ordered = sorted(measured, key=lambda trial: (trial.cost(objective), -trial.score, trial.number))
    found: list[Trial] = []
    for trial in ordered:
        if not found or trial.score > found[-1].score:
            found.append(trial)
    return found
