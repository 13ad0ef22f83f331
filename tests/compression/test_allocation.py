"""The allocation of ranks: budget, order, distance to the optimum."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.compression.allocation import Choice, allocate, allocate_within, choices, ladder, largest_threshold, rank_at
from muntin.errors import MuntinError


@st.composite
def menus(draw: st.DrawFn) -> dict[str, list[Choice]]:
    """Up to five layers with up to five choices each, in any order, some of them bad; dense last."""
    layers = {}
    for number in range(draw(st.integers(1, 5))):
        sizes = draw(st.lists(st.integers(1, 40), min_size=0, max_size=4))
        losses = draw(st.lists(st.floats(0, 10), min_size=len(sizes), max_size=len(sizes)))
        offered = [Choice(ranks=(i + 1,), parameters=p, loss=loss) for i, (p, loss) in enumerate(zip(sizes, losses, strict=True))]
        layers[f"layer{number}"] = [*offered, Choice(parameters=draw(st.integers(41, 60)))]
    return layers


def total(picked: dict[str, Choice]) -> int:
    return sum(choice.parameters for choice in picked.values())


def loss(picked: dict[str, Choice]) -> float:
    return math.fsum(choice.loss for choice in picked.values())


def reach(layers: dict[str, list[Choice]]) -> tuple[int, int]:
    return (
        sum(min(c.parameters for c in options) for options in layers.values()),
        sum(options[-1].parameters for options in layers.values()),
    )


def optimum(layers: dict[str, list[Choice]], budget: int) -> float:
    fitting = [pick for pick in itertools.product(*layers.values()) if sum(c.parameters for c in pick) <= budget]
    return min(math.fsum(c.loss for c in pick) for pick in fitting)


@given(menus(), st.floats(0, 1))
def test_allocation_against_the_optimum(layers: dict[str, list[Choice]], at: float) -> None:
    smallest, dense = reach(layers)
    budget = smallest + int(at * (dense - smallest))
    picked = allocate(layers, budget)
    assert list(picked) == list(layers)
    assert all(picked[name] in options for name, options in layers.items())
    assert total(picked) <= budget
    best = optimum(layers, budget)
    largest_step = max(max(c.loss for c in options) for options in layers.values())
    assert best - 1e-9 <= loss(picked) <= best + largest_step + 1e-9
    assert picked == allocate(layers, budget)


@given(menus())
def test_rising_budgets(layers: dict[str, list[Choice]]) -> None:
    smallest, dense = reach(layers)
    losses = [loss(allocate(layers, budget)) for budget in range(smallest, dense + 1)]
    assert all(after <= before + 1e-9 for before, after in itertools.pairwise(losses))
    assert losses[-1] == 0


@given(menus())
def test_lagrangian_stops(layers: dict[str, list[Choice]]) -> None:
    """A Lagrangian solution that uses the budget exactly is optimal for its size."""
    smallest, dense = reach(layers)
    for price in (0.01, 0.1, 1.0):
        pick = [min(options, key=lambda c, price=price: c.loss + price * c.parameters) for options in layers.values()]  # type: ignore[misc]
        assert loss(allocate(layers, sum(c.parameters for c in pick))) <= math.fsum(c.loss for c in pick) + 1e-9
    assert smallest <= dense


def test_rest_of_the_budget() -> None:
    layers = {
        "large": [Choice(ranks=(1,), parameters=10, loss=100.0), Choice(parameters=100)],  # the best gain, but it does not fit
        "small": [Choice(ranks=(1,), parameters=10, loss=1.0), Choice(ranks=(2,), parameters=15, loss=0.5), Choice(parameters=30)],
    }
    assert {name: c.ranks for name, c in allocate(layers, 20).items()} == {"large": (1,), "small": (1,)}
    assert {name: c.ranks for name, c in allocate(layers, 25).items()} == {"large": (1,), "small": (2,)}
    assert {name: c.ranks for name, c in allocate(layers, 40).items()} == {"large": (1,), "small": ()}
    assert {name: c.ranks for name, c in allocate(layers, 110).items()} == {"large": (), "small": (1,)}
    assert {name: c.ranks for name, c in allocate(layers, 130).items()} == {"large": (), "small": ()}


def test_budget_out_of_reach() -> None:
    layers = {"a": [Choice(ranks=(1,), parameters=30, loss=1.0), Choice(parameters=60)]}
    with pytest.raises(MuntinError, match=r"50 parameters are out of reach: at the smallest ranks 70 of 100 are left, a share of 0\.7000"):
        allocate(layers, 50, fixed=40)
    assert allocate(layers, 70, fixed=40)["a"].ranks == (1,)


def test_no_layers_or_choices() -> None:
    assert allocate({}, 10, fixed=10) == {}
    with pytest.raises(ValueError, match="without choices: a"):
        allocate({"a": []}, 10)


@given(st.integers(1, 300), st.integers(1, 64))
def test_ladder_values(full: int, multiple: int) -> None:
    ranks = ladder(full, multiple)
    assert ranks == sorted(ranks) and ranks[0] == min(multiple, full) and 1 <= ranks[-1] <= full
    assert all(rank % multiple == 0 for rank in ranks) or ranks == [full]


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=80).map(lambda v: np.array(sorted(v, reverse=True))),
    st.floats(0, 1),
    st.integers(1, 32),
)
def test_rank_at_a_threshold(values: np.ndarray, threshold: float, multiple: int) -> None:
    rank = rank_at(values, threshold, multiple)
    assert 1 <= rank <= len(values)
    assert rank % multiple == 0 or rank == len(values)
    assert values[:rank].sum() >= (threshold - 1e-9) * values.sum()
    least = rank_at(values, threshold, 1)
    assert rank == min(-(-least // multiple) * multiple, len(values))
    assert least == 1 or values[: least - 1].sum() <= threshold * values.sum() * (1 + 1e-9)


def test_choice_costs() -> None:
    def size(ranks: Sequence[int]) -> tuple[int, float]:
        count = 10 * ranks[0] + ranks[0] * ranks[1]
        return count, 100.0 * count

    spectra = [np.array([8.0, 4.0, 2.0, 1.0]), np.array([6.0, 0.5])]
    offered = choices(spectra, size, Choice(parameters=24, macs=2000.0), multiple=1, scale=2.0)
    assert [c.ranks for c in offered] == [(1, 1), (1, 2), (2, 1), ()]  # (2, 2) has 24 parameters, no fewer than dense
    assert [c.parameters for c in offered] == [11, 12, 22, 24]
    assert [c.macs for c in offered] == [1100, 1200, 2200, 2000]
    assert [c.loss for c in offered] == [15.0, 14.0, 7.0, 0.0]


def test_largest_threshold() -> None:
    def parameters(threshold: float) -> int:
        return 10 + int(90 * threshold)

    assert largest_threshold(parameters, 100) == 1.0
    largest = largest_threshold(parameters, 55)
    assert parameters(largest) <= 55 and largest == pytest.approx(46 / 90, abs=1e-6)
    with pytest.raises(MuntinError, match=r"a share of 0\.1000"):
        largest_threshold(parameters, 9)


# Multiply-adds beside parameters


def with_macs(layers: dict[str, list[Choice]], seed: int) -> dict[str, list[Choice]]:
    generator = np.random.default_rng(seed)
    return {name: [replace(c, macs=float(generator.integers(1, 1000))) for c in options] for name, options in layers.items()}


def macs_of(picked: dict[str, Choice]) -> float:
    return math.fsum(choice.macs for choice in picked.values())


def ranks_of(picked: dict[str, Choice]) -> dict[str, tuple[int, ...]]:
    return {name: choice.ranks for name, choice in picked.items()}


@given(menus(), st.integers(0, 2**16), st.floats(0, 1), st.floats(0, 1))
def test_both_budgets(layers: dict[str, list[Choice]], seed: int, at: float, share: float) -> None:
    layers = with_macs(layers, seed)
    smallest, dense = reach(layers)
    budget = smallest + int(at * (dense - smallest))
    free = allocate(layers, budget)
    assert ranks_of(allocate_within(layers, budget, macs_of(free))) == ranks_of(free)
    allowed = share * macs_of(free)
    try:
        picked = allocate_within(layers, budget, allowed)
    except MuntinError as error:
        assert "multiply-adds are out of reach" in str(error) and "\n" not in str(error)
    else:
        assert list(picked) == list(layers)
        assert total(picked) <= budget and macs_of(picked) <= allowed


@given(menus(), st.integers(0, 2**16), st.floats(0, 1.5))
def test_fewest_multiply_adds(layers: dict[str, list[Choice]], seed: int, share: float) -> None:
    layers = with_macs(layers, seed)
    _, dense = reach(layers)
    fewest = math.fsum(min(c.macs for c in options) for options in layers.values())
    if share < 1:
        with pytest.raises(MuntinError, match="out of reach"):
            allocate_within(layers, dense, share * fewest - 1)
    else:
        assert fewest <= macs_of(allocate_within(layers, dense, share * fewest)) <= share * fewest


def test_multiply_adds_by_harm() -> None:
    layers = {
        "wide map": [Choice(ranks=(1,), parameters=10, macs=1000.0, loss=1.0), Choice(parameters=20, macs=4000.0)],
        "narrow map": [Choice(ranks=(1,), parameters=10, macs=10.0, loss=0.5), Choice(parameters=20, macs=40.0)],
    }
    assert ranks_of(allocate(layers, 30)) == {"wide map": (), "narrow map": (1,)}
    assert ranks_of(allocate_within(layers, 30, 2000)) == {"wide map": (1,), "narrow map": ()}
    with pytest.raises(MuntinError, match=r"900 multiply-adds are out of reach with 40 parameters: 1,010 of 4,040 are left"):
        allocate_within(layers, 40, 900)
