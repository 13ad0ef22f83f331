"""One option for each layer at the least total cost under a limit of total harm, on plain numbers.

A multiple-choice knapsack problem (Kellerer et al., Knapsack Problems, chapter 11), solved to optimality by the integer programme of HiGHS.
The Lagrangian relaxation of `compression.allocation` gives a first solution, which stays where the programme finds no cheaper one in time.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from muntin.compression.allocation import Choice, allocate
from muntin.errors import MuntinError

SECONDS = 20.0
"""Time limit of the integer programme. Some thousand options take less than one second."""
SLACK = 1e-9
"""Relative excess over the limit of harm that counts as rounding of the sum."""
_STEPS = 10**12
"""Resolution of harm, relative to the limit, in the Lagrangian relaxation, which counts in whole numbers."""
_COST_RANGE = 1e3
"""Total range of scaled costs: HiGHS stops at an absolute gap of 1e-6."""


@dataclass(frozen=True)
class Option:
    """A form of a layer in numbers: its harm, >= 0 and additive over layers, and its cost, in bytes or milliseconds."""

    harm: float
    cost: float


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """The index of each layer's option. `gap`: by which share of the cost the optimum may be lower; 0 if optimality is proved."""

    picked: Mapping[str, int]
    harm: float
    cost: float
    gap: float


def assign(choices: Mapping[str, Sequence[Option]], limit: float, *, seconds: float = SECONDS) -> Assignment:
    """One option for each layer with the least total cost under total harm <= `limit`.

    Deterministic, except where `seconds` end the search; then the gap says how far the optimum may be. Options that another one beats in
    harm and cost are left out first, and those that exceed the limit even with the least harm elsewhere. Raises `MuntinError`, with the
    least possible harm, if that exceeds the limit, and ValueError for a layer without options or values that are not finite.
    """
    _check(choices, limit, seconds)
    menus = {name: _frontier(options) for name, options in choices.items()}
    least = {name: choices[name][menu[0]].harm for name, menu in menus.items()}
    floor = math.fsum(least.values())
    room = limit + SLACK * abs(limit) - floor
    if room < 0:
        raise MuntinError(f"harm of at most {limit:.4g} is out of reach: the least that these options have together is {floor:.4g}")
    menus = {name: [index for index in menu if choices[name][index].harm - least[name] <= room] for name, menu in menus.items()}
    best, bound = _relaxed(choices, menus, least, room), math.nan
    if any(len(menu) > 1 for menu in menus.values()):
        exact, bound = _programme(choices, menus, least, room, seconds)
        if exact is not None and _cost(choices, exact) < _cost(choices, best):
            best = exact
    cost = _cost(choices, best)
    costs = [[choices[name][index].cost for index in menu] for name, menu in menus.items()]
    spread = math.fsum(max(menu) - min(menu) for menu in costs)
    gap = _gap(cost, bound, spread) if spread else 0.0
    harm = math.fsum(choices[name][index].harm for name, index in best.items())
    return Assignment(picked=best, harm=harm, cost=cost, gap=gap)


def _check(choices: Mapping[str, Sequence[Option]], limit: float, seconds: float) -> None:
    for name, options in choices.items():
        if not options:
            raise ValueError(f"layer '{name}' has no options: give at least one")
        for option in options:
            if not (0 <= option.harm < math.inf and math.isfinite(option.cost)):
                raise ValueError(f"layer '{name}': {option}: give a finite harm from 0 and a finite cost")
    if not math.isfinite(limit) or seconds <= 0:
        raise ValueError(f"limit={limit!r}, seconds={seconds!r}: give a finite limit and a time above 0")


def _frontier(options: Sequence[Option]) -> list[int]:
    """The indices of the options that no other one beats in both harm and cost, least harm first; of equal options the first."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda index: (options[index].harm, options[index].cost, index)):
        if not kept or options[index].cost < options[kept[-1]].cost:
            kept.append(index)
    return kept


def _cost(choices: Mapping[str, Sequence[Option]], picked: Mapping[str, int]) -> float:
    return math.fsum(choices[name][index].cost for name, index in picked.items())


def _gap(cost: float, bound: float, spread: float) -> float:
    """`spread`: between the highest and the lowest total cost."""
    if math.isnan(bound):
        return math.inf
    if cost - bound <= 1e-6 * max(abs(cost), spread):  # tolerance of the solver
        return 0.0
    return (cost - bound) / abs(cost) if cost else 1.0


def _relaxed(
    choices: Mapping[str, Sequence[Option]], menus: Mapping[str, Sequence[int]], least: Mapping[str, float], room: float
) -> dict[str, int]:
    """The solution of the Lagrangian relaxation: `allocate` with harm, in whole steps rounded up, in the place of parameters."""
    unit = room / _STEPS if room > 0 else 1.0
    offered = {
        name: [
            Choice(ranks=(index,), parameters=math.ceil((choices[name][index].harm - least[name]) / unit), loss=choices[name][index].cost)
            for index in menu
        ]
        for name, menu in menus.items()
    }
    return {name: choice.ranks[0] for name, choice in allocate(offered, _STEPS).items()}


def _programme(
    choices: Mapping[str, Sequence[Option]],
    menus: Mapping[str, Sequence[int]],
    least: Mapping[str, float],
    room: float,
    seconds: float,
) -> tuple[dict[str, int] | None, float]:
    """The integer programme's solution, None without one in time, and a lower bound of the total cost, NaN without one.

    A binary variable for each option; harm in shares of the room. HiGHS allows an excess of 1e-6, so a solution that uses it is refused
    and the room made smaller by that.
    """
    pairs = [(name, index) for name, menu in menus.items() for index in menu]
    cheapest = {name: min(choices[name][index].cost for index in menu) for name, menu in menus.items()}
    spread = math.fsum(max(choices[name][index].cost for index in menu) - cheapest[name] for name, menu in menus.items())
    unit = spread / _COST_RANGE if spread > 0 else 1.0
    cost_N = np.array([(choices[name][index].cost - cheapest[name]) / unit for name, index in pairs])
    harm_N = np.array([(choices[name][index].harm - least[name]) / room if room > 0 else 0.0 for name, index in pairs])
    rows = {name: row for row, name in enumerate(menus)}
    one_each = csr_array((np.ones(len(pairs)), ([rows[name] for name, _ in pairs], range(len(pairs)))), shape=(len(rows), len(pairs)))
    bound = math.nan
    for tightened in (0.0, 2e-6, 1e-5):
        with without_standard_output():
            result = milp(
                cost_N,
                integrality=np.ones(len(pairs)),
                bounds=Bounds(0, 1),
                constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(harm_N[None], -np.inf, 1.0 - tightened)],
                options={"time_limit": seconds, "mip_rel_gap": 0.0},
            )
        if not tightened and result.mip_dual_bound is not None:
            bound = float(result.mip_dual_bound) * unit + math.fsum(cheapest.values())
        if result.x is None:
            break
        picked = {name: index for (name, index), value in zip(pairs, result.x, strict=True) if value > 0.5}
        if math.fsum(choices[name][index].harm - least[name] for name, index in picked.items()) <= room:
            return picked, bound
    return None, bound


@contextmanager
def without_standard_output() -> Iterator[None]:
    """Drop standard output during the block: HiGHS 1.12 prints debugging lines there (ERGO-Code/HiGHS#2783), which would mix with a
    command's JSON."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # closed: nothing can be printed
        yield
        return
    try:
        with Path(os.devnull).open("wb") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        ctypes.CDLL(None if os.name == "posix" else "msvcrt").fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
