"""Allocation of ranks (or bits) to layers under one budget of parameters, on plain numbers.

Every layer has choices, each with a number of parameters and a loss; one is to stay dense, with loss 0. To minimise the sum of
losses under a sum of parameters is a multiple-choice knapsack problem (Kellerer et al., Knapsack Problems, chapter 11).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from muntin.errors import MuntinError

Values = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One form of a layer."""

    ranks: tuple[int, ...] = ()
    """Empty: dense."""
    parameters: int
    """Weights and biases."""
    macs: float = 0.0
    """Multiply-adds an image."""
    loss: float = 0.0
    """Harm to the model's answer, >= 0, in a unit that adds up over layers."""


def ladder(full: int, multiple: int) -> list[int]:
    """The ranks to choose from for a mode of rank `full`: multiples of `multiple` up to it, or `full` itself if it is smaller."""
    return list(range(multiple, full + 1, multiple)) or [full]


def choices(
    spectra: Sequence[Values],
    size: Callable[[tuple[int, ...]], tuple[int, float]],
    dense: Choice,
    *,
    multiple: int,
    scale: float = 1.0,
) -> list[Choice]:
    """A layer's choices: every combination of ranks that has fewer parameters than `dense`, and `dense`, last.

    `spectra`: for each mode, σ² of each component, descending. Loss: `scale` times the sum of σ² of the dropped components of all
    modes. `size`: parameters and multiply-adds of the layer at given ranks. Costs one step a combination.
    """
    tails = [np.append(np.cumsum(values[::-1])[::-1], 0.0) for values in spectra]  # tails[mode][r]: loss at rank r
    smaller = []
    for ranks in itertools.product(*(ladder(len(values), multiple) for values in spectra)):
        count, macs = size(ranks)
        if count < dense.parameters:
            loss = scale * sum(float(tail[rank]) for tail, rank in zip(tails, ranks, strict=True))
            smaller.append(Choice(ranks=ranks, parameters=count, macs=macs, loss=loss))
    return [*smaller, dense]


def rank_at(values: Values, threshold: float, multiple: int) -> int:
    """The least rank whose components have the share `threshold` of the sum of `values` (descending), rounded up to `multiple`."""
    total = float(values.sum())
    reached = np.cumsum(values) / total if total > 0 else np.ones(len(values))
    rank = int(np.searchsorted(reached, threshold - 1e-12)) + 1  # the last sum may round to just below 1
    return min(-(-rank // multiple) * multiple, len(values))


def largest_threshold(parameters: Callable[[float], int], budget: int) -> float:
    """The largest threshold, 0-1 to within 1e-9, at which the non-decreasing `parameters(threshold)` is within the budget.

    Raises `MuntinError` if even 0 is not.
    """
    if parameters(1.0) <= budget:
        return 1.0
    if parameters(0.0) > budget:
        raise _out_of_reach(parameters(0.0), parameters(1.0), budget)
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(middle) <= budget else (low, middle)
    return low


def _out_of_reach(smallest: int, dense: int, budget: int) -> MuntinError:
    share = math.ceil(1e4 * smallest / dense) / 1e4
    return MuntinError(
        f"{budget:,} parameters are out of reach: at the smallest ranks {smallest:,} of {dense:,} are left, a share of {share:.4f}; "
        "allow that, or keep fewer layers, or a smaller multiple"
    )


def allocate(layers: Mapping[str, Sequence[Choice]], budget: int, *, fixed: int = 0) -> dict[str, Choice]:
    """One choice a layer, with the least total loss found under total parameters <= `budget`, of which other layers use `fixed`.

    Lagrangian relaxation: for a price λ of a parameter, each layer alone takes the choice that minimises loss + λ·parameters. All prices
    are swept by walking the layers' lower convex hulls from the smallest choices up, best loss a parameter first. The rest of the budget
    is spent greedily by loss a parameter, or on the one step that saves most. The total loss is above the optimum by at most the saving of
    the first step that did not fit, and a larger budget never gives a larger loss. O(n log n) in the number of choices, times
    steps for the greedy end. Raises `MuntinError`, with the least possible share, if the smallest choices exceed the budget.
    """
    if any(not options for options in layers.values()):
        raise ValueError(f"layers without choices: {', '.join(name for name, options in layers.items() if not options)}")
    menus = {name: _frontier(options) for name, options in layers.items()}
    picked = {name: menu[0] for name, menu in menus.items()}
    spent = fixed + sum(choice.parameters for choice in picked.values())
    if spent > budget:
        dense = fixed + sum(max(choice.parameters for choice in options) for options in layers.values())
        raise _out_of_reach(spent, dense, budget)
    steps = [(name, before, after) for name, menu in menus.items() for before, after in itertools.pairwise(_hull(menu))]
    for name, before, after in sorted(steps, key=lambda step: -_gain(step[1], step[2])):
        cost = after.parameters - before.parameters
        if spent + cost > budget:
            return _spend_rest(picked, menus, budget - spent, cost)
        picked[name] = after
        spent += cost
    return picked


def allocate_within(layers: Mapping[str, Sequence[Choice]], budget: int, macs: float, *, fixed: int = 0) -> dict[str, Choice]:
    """`allocate` under a second budget: total `macs` of the layers.

    Bisection finds, in 40 allocations, the lowest price of a multiply-add that meets the budget. Raises `MuntinError` if none does.
    """

    def priced(price: float) -> dict[str, Choice]:
        menus = {name: [replace(c, loss=c.loss + price * c.macs) for c in options] for name, options in layers.items()}
        picked = allocate(menus, budget, fixed=fixed)
        return {name: options[menus[name].index(picked[name])] for name, options in layers.items()}

    def spent(picked: Mapping[str, Choice]) -> float:
        return math.fsum(choice.macs for choice in picked.values())

    picked = priced(0.0)
    if spent(picked) <= macs:
        return picked
    losses = [choice.loss for options in layers.values() for choice in options]
    high = max(losses, default=0.0) or 1.0  # one multiply-add costs more than any loss
    picked = priced(high)
    if spent(picked) > macs:
        dense = math.fsum(max(choice.macs for choice in options) for options in layers.values())
        raise MuntinError(
            f"{macs:,.0f} multiply-adds are out of reach with {budget:,} parameters: {spent(picked):,.0f} of {dense:,.0f} are left at "
            "least; allow more of them, or keep fewer layers"
        )
    low = high * 1e-15
    for _ in range(40):
        middle = math.sqrt(low * high)
        tried = priced(middle)
        if spent(tried) <= macs:
            high, picked = middle, tried
        else:
            low = middle
    return picked


def _frontier(options: Sequence[Choice]) -> list[Choice]:
    """The choices that no other one beats in both size and loss, smallest first."""
    kept: list[Choice] = []
    for choice in sorted(options, key=lambda c: (c.parameters, c.loss)):
        if not kept or choice.loss < kept[-1].loss:
            kept.append(choice)
    return kept


def _gain(before: Choice, after: Choice) -> float:
    """Loss saved a parameter."""
    return (before.loss - after.loss) / (after.parameters - before.parameters)


def _hull(menu: Sequence[Choice]) -> list[Choice]:
    """The lower convex hull of a frontier: gains fall from each step to the next."""
    hull: list[Choice] = []
    for choice in menu:
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _spend_rest(picked: dict[str, Choice], menus: Mapping[str, Sequence[Choice]], rest: int, gap: int) -> dict[str, Choice]:
    """Spend `rest` parameters, fewer than the `gap` to the next optimum."""
    path, single = dict(picked), dict(picked)
    spent = 0
    while fitting := _steps(path, menus, gap - 1 - spent):
        name, after = max(fitting, key=lambda step: _gain(path[step[0]], step[1]))
        spent += after.parameters - path[name].parameters
        if spent > rest:
            break
        path[name] = after
    if fitting := _steps(picked, menus, rest):
        name, after = max(fitting, key=lambda step: picked[step[0]].loss - step[1].loss)
        single[name] = after
    return min(path, single, key=lambda choices: math.fsum(choice.loss for choice in choices.values()))


def _steps(picked: Mapping[str, Choice], menus: Mapping[str, Sequence[Choice]], rest: int) -> list[tuple[str, Choice]]:
    return [(name, choice) for name, menu in menus.items() for choice in menu if 0 < choice.parameters - picked[name].parameters <= rest]
