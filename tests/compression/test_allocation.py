"""The allocation of options to layers: against all combinations, its limits, ties and errors."""

from __future__ import annotations

import ctypes
import itertools
import math
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.compression.allocation import Option, OutOfReachError, allocate, without_standard_output
from muntin.errors import MuntinError

Table = dict[str, list[Option]]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Up to five layers of up to five options, some beaten by others, with harms from millionths to tens."""
    numbers = st.integers(0, 2000)
    scale = 10.0 ** draw(st.integers(-6, 1))
    pairs = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=5)
    return {f"layer{n}": [Option(float(cost), (harm * scale,)) for harm, cost in draw(pairs)] for n in range(draw(st.integers(1, 5)))}


def combinations(table: Table) -> list[tuple[float, float]]:
    """Harm and cost of every combination."""
    picks = itertools.product(*table.values())
    return [(math.fsum(option.uses[0] for option in pick), math.fsum(option.cost for option in pick)) for pick in picks]


@given(tables(), st.floats(0, 1))
def test_assignment_against_all_combinations(table: Table, at: float) -> None:
    every = combinations(table)
    least, most = min(harm for harm, _ in every), max(harm for harm, _ in every)
    limit = least + at * (most - least)
    found = allocate(table, [limit])
    assert list(found.picked) == list(table)
    chosen = [table[name][index] for name, index in found.picked.items()]
    assert found.used[0] == math.fsum(option.uses[0] for option in chosen) <= limit * (1 + 1e-9)
    assert found.cost == math.fsum(option.cost for option in chosen)
    assert found.cost == min(cost for harm, cost in every if harm <= limit * (1 + 1e-9))
    assert found.gap == 0


@given(tables(), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**16))
def test_two_limits(table: Table, at: float, share: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    both = {name: [Option(o.cost, (*o.uses, float(generator.integers(1, 1000)))) for o in options] for name, options in table.items()}
    picks = list(itertools.product(*both.values()))
    sums = [[math.fsum(option.uses[k] for option in pick) for pick in picks] for k in range(2)]
    limits = [min(values) + part * (max(values) - min(values)) for values, part in zip(sums, (at, share), strict=True)]
    fits = [all(values[n] <= limit * (1 + 1e-9) for values, limit in zip(sums, limits, strict=True)) for n in range(len(picks))]
    costs = [math.fsum(option.cost for option in pick) for pick, fit in zip(picks, fits, strict=True) if fit]
    if not costs:
        with pytest.raises(MuntinError, match="nothing was found within all limits"):
            allocate(both, limits)
    else:
        assert allocate(both, limits).cost == min(costs)


def test_large_table_is_solved_the_same_way_twice() -> None:
    generator = np.random.default_rng(0)
    table = {}
    for layer in range(60):
        costs = np.sort(generator.uniform(1, 1000, 24))
        harms = np.sort(generator.lognormal(-8, 2, 24))[::-1]
        table[f"layer{layer}"] = [Option(float(cost), (float(harm),)) for harm, cost in zip(harms, costs, strict=True)]
    first, again = allocate(table, [0.05]), allocate(table, [0.05])
    assert first == again and first.gap == 0 and first.used[0] <= 0.05


def test_time_limit_reports_the_gap() -> None:
    generator = np.random.default_rng(1)
    table = {f"{n}": [Option(float(1000 - h + e), (float(h),)) for h, e in generator.integers(1, 999, (20, 2))] for n in range(80)}
    hurried = allocate(table, [20_000.0], seconds=1e-4)
    best = allocate(table, [20_000.0])
    assert hurried.used[0] <= 20_000 and hurried.gap > 0 and best.gap < hurried.gap
    assert hurried.cost >= best.cost


def test_limit_out_of_reach() -> None:
    table = {"a": [Option(5.0, (1.0,)), Option(1.0, (2.0,))], "b": [Option(1.0, (0.5,))]}
    assert allocate(table, [1.5]).picked == {"a": 0, "b": 0}
    with pytest.raises(OutOfReachError, match=r"at most 1.4 is out of reach: the least .* is 1.5"):
        allocate(table, [1.4])


def test_no_layers() -> None:
    assert allocate({}, [0.0]).picked == {}


@pytest.mark.parametrize(
    ("table", "limit"),
    [
        ({"a": []}, 1.0),
        ({"a": [Option(1.0, (math.nan,))]}, 1.0),
        ({"a": [Option(1.0, ())]}, 1.0),
        ({"a": [Option(1.0, (0.0,))]}, math.inf),
    ],
)
def test_wrong_values(table: Table, limit: float) -> None:
    with pytest.raises(ValueError, match="give"):
        allocate(table, [limit])


@pytest.mark.skipif(os.name != "posix", reason="the C library has another name")
def test_prints_of_libraries_are_no_output(capfd: pytest.CaptureFixture[str]) -> None:
    """C holds lines back until they are flushed, also beyond the block."""
    print("before")
    with without_standard_output():
        ctypes.CDLL(None).puts(b"debugging")
    print("after")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr() == ("before\nafter\n", "")
