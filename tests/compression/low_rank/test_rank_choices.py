"""The ranks to choose from, and their choice under budgets of parameters and multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.compression.low_rank.rank_choices import Choice, choices, chosen_ranks, ladder, largest_threshold, rank_at
from muntin.errors import MuntinError

LARGE = [Choice(ranks=(1,), parameters=10, loss=100.0), Choice(parameters=100)]
SMALL = [Choice(ranks=(1,), parameters=10, loss=1.0), Choice(ranks=(2,), parameters=15, loss=0.5), Choice(parameters=30)]


def ranks_of(picked: dict[str, Choice]) -> dict[str, tuple[int, ...]]:
    return {name: choice.ranks for name, choice in picked.items()}


@pytest.mark.parametrize(("budget", "large", "small"), [(20, (1,), (1,)), (25, (1,), (2,)), (40, (1,), ()), (110, (), (1,)), (130, (), ())])
def test_least_loss_within_a_budget(budget: int, large: tuple[int, ...], small: tuple[int, ...]) -> None:
    assert ranks_of(chosen_ranks({"large": LARGE, "small": SMALL}, budget + 5, fixed=5)) == {"large": large, "small": small}


def test_budget_out_of_reach() -> None:
    layers = {"a": [Choice(ranks=(1,), parameters=30, loss=1.0), Choice(parameters=60)]}
    with pytest.raises(MuntinError, match=r"50 parameters are out of reach: at the smallest ranks 70 of 100 are left, a share of 0\.7000"):
        chosen_ranks(layers, 50, fixed=40)


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


def test_multiply_adds_by_harm() -> None:
    layers = {
        "wide map": [Choice(ranks=(1,), parameters=10, macs=1000.0, loss=1.0), Choice(parameters=20, macs=4000.0)],
        "narrow map": [Choice(ranks=(1,), parameters=10, macs=10.0, loss=0.5), Choice(parameters=20, macs=40.0)],
    }
    assert ranks_of(chosen_ranks(layers, 30)) == {"wide map": (), "narrow map": (1,)}
    assert ranks_of(chosen_ranks(layers, 30, macs=2000)) == {"wide map": (1,), "narrow map": ()}
    with pytest.raises(MuntinError, match=r"900 multiply-adds are out of reach with 40 parameters: 1,010 of 4,040 are left"):
        chosen_ranks(layers, 40, macs=900)
