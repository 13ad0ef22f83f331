"""Allocation: one option for each layer, with the least total cost under limits of what all use together, on plain numbers.

    ranks: error under parameters and multiply-adds      bits: error under bytes      forms within a budget: bytes or ms under harm

A multiple-choice knapsack problem (Kellerer et al., Knapsack Problems, chapter 11), solved by the integer programme of HiGHS.
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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array, vstack

from muntin.errors import MuntinError

SECONDS = 20.0
"""Time limit of the integer programme. Some thousand options take less than one second."""
SLACK = 1e-9
"""Relative excess over a limit that counts as rounding of the sum."""
NOTHING = "nothing was found within all limits together: allow more"
_COST_RANGE = 1e3
"""Total range of scaled costs: HiGHS stops at an absolute gap of 1e-6."""


class OutOfReachError(MuntinError):
    """A limit is below `least`, the sum of the least that each layer uses. `index`: of the limit."""

    def __init__(self, index: int, limit: float, least: float) -> None:
        super().__init__(f"a total of at most {limit:.4g} is out of reach: the least that these options have together is {least:.4g}")
        self.index, self.least = index, least


@dataclass(frozen=True)
class Option:
    """A form of a layer in numbers, additive over layers: its cost, and what it uses of each limited quantity, >= 0."""

    cost: float
    uses: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The index of each layer's option, and the sums of what these use. `gap`: by which share of the cost the optimum may be lower; 0 if
    optimality is proved."""

    picked: Mapping[str, int]
    cost: float
    used: tuple[float, ...]
    gap: float


def allocate(choices: Mapping[str, Sequence[Option]], limits: Sequence[float], *, seconds: float = SECONDS) -> Allocation:
    """One option for each layer with the least total cost under the limits.

    Deterministic, except where `seconds` end the search; then the gap says how far the optimum may be. Options that another one beats in
    everything are left out first, and those that exceed a limit even with the least use elsewhere. Raises `OutOfReachError`, `MuntinError`
    where nothing within all limits is found, and ValueError for a layer without options or values that are not finite.
    """
    _check(choices, limits, seconds)
    uses = {name: np.array([option.uses for option in options], float).reshape(len(options), -1) for name, options in choices.items()}
    least = {name: table.min(0) for name, table in uses.items()}
    rooms = []
    for index, limit in enumerate(limits):
        floor = math.fsum(float(values[index]) for values in least.values())
        rooms.append(limit + SLACK * abs(limit) - floor)
        if rooms[-1] < 0:
            raise OutOfReachError(index, limit, floor)
    menus = {name: _frontier(options) for name, options in choices.items()}
    menus = {name: [i for i in menu if (uses[name][i] - least[name] <= rooms).all()] for name, menu in menus.items()}
    if not all(menus.values()):
        raise MuntinError(NOTHING)
    programme = _Programme(choices, menus, {name: uses[name] - least[name] for name in menus}, rooms)
    picked = {name: min(menu, key=lambda index: choices[name][index].cost) for name, menu in menus.items()}
    bound = programme.floor
    if not programme.fits(picked):
        picked, bound = programme.solution(seconds)
    cost = math.fsum(choices[name][index].cost for name, index in picked.items())
    costs = [[choices[name][index].cost for index in menu] for name, menu in menus.items()]
    spread = math.fsum(max(menu) - min(menu) for menu in costs)
    used = tuple(math.fsum(choices[name][index].uses[k] for name, index in picked.items()) for k in range(len(limits)))
    return Allocation(picked=picked, cost=cost, used=used, gap=_gap(cost, bound, spread) if spread else 0.0)


def _check(choices: Mapping[str, Sequence[Option]], limits: Sequence[float], seconds: float) -> None:
    for name, options in choices.items():
        if not options:
            raise ValueError(f"layer '{name}' has no options: give at least one")
        for option in options:
            numbers = len(option.uses) == len(limits) and all(0 <= use < math.inf for use in option.uses)
            if not (numbers and math.isfinite(option.cost)):
                raise ValueError(f"layer '{name}': {option}: give a finite cost, and for each limit a finite number from 0")
    if not all(map(math.isfinite, limits)) or seconds <= 0:
        raise ValueError(f"limits={limits!r}, seconds={seconds!r}: give finite limits and a time above 0")


def _frontier(options: Sequence[Option]) -> list[int]:
    """The indices of the options that no other one beats in cost and uses, least use first; of equal options the first."""
    kept: list[int] = []
    values = [(*option.uses, option.cost) for option in options]
    for index in sorted(range(len(options)), key=lambda index: (values[index], index)):
        if not any(all(a <= b for a, b in zip(values[other], values[index], strict=True)) for other in kept):
            kept.append(index)
    return kept


def _gap(cost: float, bound: float, spread: float) -> float:
    """`spread`: between the highest and the lowest total cost."""
    if math.isnan(bound):
        return math.inf
    if cost - bound <= 1e-6 * max(abs(cost), spread):  # tolerance of the solver
        return 0.0
    return (cost - bound) / abs(cost) if cost else 1.0


class _Programme:
    """A variable for each option, costs and uses above the least ones, in shares of the room."""

    def __init__(
        self, choices: Mapping[str, Sequence[Option]], menus: Mapping[str, Sequence[int]], excess: Mapping[str, NDArray[np.float64]],
        rooms: Sequence[float],
    ) -> None:  # fmt: skip
        self.pairs = [(name, index) for name, menu in menus.items() for index in menu]
        cheapest = {name: min(choices[name][index].cost for index in menu) for name, menu in menus.items()}
        self.floor = math.fsum(cheapest.values())
        cost_N = np.array([choices[name][index].cost - cheapest[name] for name, index in self.pairs])
        spread = math.fsum(max(choices[name][index].cost for index in menu) - cheapest[name] for name, menu in menus.items())
        self.unit = spread / _COST_RANGE if spread > 0 else 1.0
        self.cost_N = cost_N / self.unit
        self.excess = [{pair: float(excess[pair[0]][pair[1], k]) for pair in self.pairs} for k in range(len(rooms))]
        self.rooms = rooms
        rows = {name: row for row, name in enumerate(menus)}
        ones = np.ones(len(self.pairs)), ([rows[name] for name, _ in self.pairs], range(len(self.pairs)))
        shares = [[used[pair] / room if room > 0 else 0.0 for pair in self.pairs] for used, room in zip(self.excess, rooms, strict=True)]
        self.one_each = csr_array(ones, shape=(len(rows), len(self.pairs)))
        self.shares = csr_array(np.array(shares).reshape(len(rooms), len(self.pairs)))

    def solution(self, seconds: float) -> tuple[dict[str, int], float]:
        """The indices of the options, and a lower bound of the total cost, NaN without one.

        HiGHS allows an excess of 1e-6, so a solution that uses it is refused and the room made smaller by that. If no whole solution is
        found in time, the one of the linear relaxation is rounded to less use: of one limit it is fractional in one layer.
        """
        bound = math.nan
        for tightened in (0.0, 2e-6, 1e-5):
            result = self._solve(1 - tightened, seconds=seconds)
            if not tightened and result.mip_dual_bound is not None:
                bound = float(result.mip_dual_bound) * self.unit + self.floor
            if result.x is None:
                break
            picked = {name: index for (name, index), value in zip(self.pairs, result.x, strict=True) if value > 0.5}
            if self.fits(picked):
                return picked, bound
        relaxed = self._solve(1 - 1e-5, seconds=SECONDS, whole=False)
        if relaxed.x is not None and self.fits(rounded := self._rounded(relaxed.x)):
            return rounded, bound
        raise MuntinError(NOTHING)

    def _solve(self, room: float, *, seconds: float, whole: bool = True) -> Any:
        limits = LinearConstraint(vstack([self.one_each, self.shares]), *self._ends(room))
        with without_standard_output():
            return milp(
                self.cost_N,
                integrality=np.full(len(self.pairs), int(whole)),
                bounds=Bounds(0, 1),
                constraints=[limits],
                options={"time_limit": seconds, "mip_rel_gap": 0.0},
            )

    def _ends(self, room: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        ones = np.ones(self.one_each.shape[0])
        return np.append(ones, np.full(len(self.rooms), -np.inf)), np.append(ones, np.full(len(self.rooms), room))

    def fits(self, picked: Mapping[str, int]) -> bool:
        """Return True if options are within all limits."""
        sums = [math.fsum(used[pair] for pair in picked.items()) for used in self.excess]
        return len(picked) == self.one_each.shape[0] and all(used <= room for used, room in zip(sums, self.rooms, strict=True))

    def _rounded(self, values_N: NDArray[np.float64]) -> dict[str, int]:
        """The option of each layer that uses least, of those to which the relaxation gives a share."""
        shares = self.shares.toarray().max(0) if len(self.rooms) else np.zeros(len(self.pairs))
        order = sorted(range(len(self.pairs)), key=lambda n: -shares[n])
        return {self.pairs[n][0]: self.pairs[n][1] for n in order if values_N[n] > 1e-6}


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
