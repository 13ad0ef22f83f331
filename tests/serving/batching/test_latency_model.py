"""The learned latency: a line by group, robust to single hiccups, quick to follow a machine that changed, bounded in memory."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muntin.serving.batching.latency_model import GROUPS, OVERDUE, OVERDUE_S, OVERDUE_UNKNOWN_S, LatencyLine, LatencyModel

FIXED, EACH = 0.001, 0.00015


def engine(rows: int) -> float:
    return FIXED + EACH * rows


def taught(
    batches: int,
    *,
    sizes: Sequence[int] = (1, 2, 5, 12, 20, 32),
    seconds: Callable[[int], float] = engine,
    sigma: float = 0.07,
    seed: int = 0,
) -> tuple[LatencyModel, random.Random]:
    generator = random.Random(seed)  # noqa: S311 - no secret
    model = LatencyModel()
    teach(model, generator, batches, sizes=sizes, seconds=seconds, sigma=sigma)
    return model, generator


def teach(
    model: LatencyModel,
    generator: random.Random,
    batches: int,
    *,
    sizes: Sequence[int] = (1, 2, 5, 12, 20, 32),
    seconds: Callable[[int], float] = engine,
    sigma: float = 0.07,
) -> None:
    for _ in range(batches):
        rows = generator.choice(sizes)
        model.observe("g", rows, seconds(rows) * math.exp(generator.gauss(0, sigma)))


def line_of(model: LatencyModel, group: str = "g", cost: float | None = None) -> LatencyLine:
    line = model.line(group, cost=cost)
    assert line is not None
    return line


def expected(model: LatencyModel, rows: int, group: str = "g", cost: float | None = None) -> float:
    return line_of(model, group, cost).expected(rows)


def safe(model: LatencyModel, rows: int) -> float:
    return line_of(model).safe(rows)


@pytest.mark.parametrize("seed", range(3))
def test_line_between_and_beyond_measured_sizes(seed: int) -> None:
    model, _ = taught(200, sizes=(1, 4, 16), seed=seed)
    for rows in (1, 2, 8, 16, 32):
        assert expected(model, rows) == pytest.approx(engine(rows), rel=0.08)


def test_line_without_fixed_part_or_row_cost() -> None:
    model, _ = taught(100, seconds=lambda rows: 0.012 * rows, sigma=0.0)
    line = line_of(model)
    assert (line.fixed, line.per_row) == (pytest.approx(0, abs=1e-4), pytest.approx(0.012, rel=0.01))
    model, _ = taught(100, seconds=lambda rows: 0.02 - 0.0001 * rows, sigma=0.0)
    line = line_of(model)
    assert line.per_row == 0
    assert line.expected(1000) == pytest.approx(0.02, rel=0.2)


def test_line_of_a_single_size() -> None:
    model, _ = taught(20, sizes=(8,), sigma=0.0)
    assert expected(model, 1) == pytest.approx(engine(8))
    assert expected(model, 16) == pytest.approx(2 * engine(8))
    line = line_of(model)
    assert (line.largest_rows, line.batch_count, line.firm_rows) == (8, 20, 0)


def test_safe_covers_99_of_100_batches() -> None:
    for sigma in (0.05, 0.1):
        model, generator = taught(400, sigma=sigma)
        kept = 0
        for _ in range(2000):
            rows = generator.choice((1, 5, 20))
            seconds = engine(rows) * math.exp(generator.gauss(0, sigma))
            kept += seconds <= safe(model, rows)
            model.observe("g", rows, seconds)
        assert 0.975 < kept / 2000 < 0.9999
        assert safe(model, 5) < expected(model, 5) * math.exp(4 * sigma)


def test_hiccup_changes_little() -> None:
    model, generator = taught(200)
    before = expected(model, 5), safe(model, 5)
    model.observe("g", 5, 0.3)
    assert expected(model, 5) < before[0] * 1.03
    assert safe(model, 5) < before[1] * 1.15
    teach(model, generator, 30)
    assert safe(model, 5) < before[1] * 1.15


def test_first_call_that_compiled_is_forgotten() -> None:
    model = LatencyModel()
    model.observe("g", 1, 0.3)
    model.observe("g", 1, 0.012)
    assert expected(model, 1) == pytest.approx(0.012, rel=0.3)
    for _ in range(20):
        model.observe("g", 1, 0.012)
    assert expected(model, 1) == pytest.approx(0.012, rel=0.05)
    assert safe(model, 1) < 0.015


def test_overdue_of_a_guessed_line() -> None:
    """Attention among all pixels takes more than its share of them, and an engine may compile for a new size."""
    model = LatencyModel()
    for _ in range(20):
        model.observe("small", 1, 0.002, cost=64.0)
    own, same, larger = line_of(model, "small", 64.0), line_of(model, "new", 64.0), line_of(model, "large", 64e4)
    assert own.overdue(1) == same.overdue(1) == OVERDUE_S
    assert larger.overdue(1) == max(OVERDUE_UNKNOWN_S, OVERDUE * larger.safe(1)) > OVERDUE_UNKNOWN_S
    for _ in range(2):
        model.observe("large", 1, 0.1, cost=64e4)
    assert line_of(model, "large").overdue(1) == OVERDUE_S


@pytest.mark.parametrize("factor", [2.0, 0.5, 10.0])
def test_change_followed_within_twelve_batches(factor: float) -> None:
    model, generator = taught(300)
    teach(model, generator, 12, seconds=lambda rows: factor * engine(rows))
    for rows in (1, 5, 20):
        assert expected(model, rows) == pytest.approx(factor * engine(rows), rel=0.2)
        assert safe(model, rows) < factor * engine(rows) * 1.5


def test_slow_drift_is_followed() -> None:
    model, generator = taught(300)
    for step in range(200):
        teach(model, generator, 1, seconds=lambda rows, step=step: engine(rows) * (1 + step / 200))  # type: ignore[misc]
    assert expected(model, 5) == pytest.approx(2 * engine(5), rel=0.15)


def test_unmeasured_sizes_keep_their_ratio() -> None:
    """Thousands of single rows, then a machine twice as slow: the time of 32 rows is still known."""
    model, generator = taught(200)
    teach(model, generator, 5000, sizes=(1,))
    assert expected(model, 32) == pytest.approx(engine(32), rel=0.25)
    teach(model, generator, 100, sizes=(1,), seconds=lambda rows: 2 * engine(rows))
    assert expected(model, 32) == pytest.approx(2 * engine(32), rel=0.25)


def test_spread_covers_an_engine_in_steps() -> None:
    """It computes multiples of 8: the line does not fit, and `safe` compensates."""
    model, _ = taught(500, sizes=(1, 3, 8, 9, 12, 16), seconds=lambda rows: 0.004 * math.ceil(rows / 8), sigma=0.02)
    for rows in (8, 9, 12, 16):
        assert safe(model, rows) > 0.004 * math.ceil(rows / 8) * 0.98


def test_rows_within_is_inverse_of_safe() -> None:
    for line in (
        LatencyLine(0.001, 0.0002, 0.0, 1.2, 8, 9, True),
        LatencyLine(0.0, 0.012, 0.012, 1.1, 1, 9, False),
        LatencyLine(0.01, 0.0, 0.0, 1.1, 8, 9, True),
    ):
        for seconds in (0.0, 0.001, 0.0101, 0.0123, 0.1):
            rows = line.rows_within(seconds)
            assert rows == 0 or line.safe(rows) <= seconds * (1 + 1e-9)
            assert rows > 10_000 or line.safe(rows + 1) > seconds
    assert LatencyLine(0.01, 0.0, 0.0, 1.0, 1, 1, True).rows_within(math.inf) > 1_000_000
    assert LatencyLine(0.01, 0.1, 0.0, 1.0, 1, 1, True).rows_within(math.inf) > 1_000_000


def test_new_group_scaled_by_cost() -> None:
    model = LatencyModel()
    for _ in range(10):
        model.observe("small", 1, 0.01, cost=100)
        model.observe("large", 1, 0.15, cost=1000)
    assert expected(model, 1, "new", 200) == pytest.approx(0.02, rel=0.01)
    assert expected(model, 1, "new", 2000) == pytest.approx(0.3, rel=0.01)
    assert line_of(model, "new", 200).safe(2) == pytest.approx(0.04 * 1.15, rel=0.01)
    assert model.line("new") is None
    assert expected(model, 1, "small", 5000) == pytest.approx(0.01)


def test_number_of_groups_is_bounded() -> None:
    model = LatencyModel()
    for group in range(GROUPS + 100):
        model.observe(group, 1, 0.01)
        model.observe("used", 1, 0.01)
    assert len(model) == GROUPS
    assert model.line(0) is None
    assert model.line("used") is not None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 64), st.floats(1e-5, 10.0) | st.floats(0, 1e9, exclude_min=True, exclude_max=True)),
        min_size=1,
        max_size=150,
    )
)
def test_line_is_sound_for_any_observations(batches: list[tuple[int, float]]) -> None:
    model = LatencyModel()
    for rows, seconds in batches:
        model.observe("g", rows, seconds)
        line = line_of(model)
        assert min(line.fixed, line.per_row, line.minimum) >= 0
        assert 1 < line.spread < math.inf
        before = 0.0
        for n in (1, 2, 7, 64, 1000):
            assert before <= line.expected(n) < line.safe(n) < math.inf
            assert line.expected(n) > 0
            before = line.expected(n)
    group = model._groups["g"]
    assert len(group._deviations) <= 128
    assert len(group._sizes) <= 40


def test_equal_cost_preferred_until_second_batch() -> None:
    """A new version computes the same images as fast as the old one."""
    model = LatencyModel()
    for _ in range(20):
        model.observe("old", 1, 0.01, cost=64.0)
    model.observe("new", 1, 5.0, cost=64.0)  # it compiled
    line = line_of(model, "new", 64.0)
    assert (line.expected(1), line.guessed) == (pytest.approx(0.01), False)
    model.observe("new", 1, 0.02, cost=64.0)
    assert expected(model, 1, "new", 64.0) == pytest.approx(0.02)
    model.observe("other", 1, 5.0, cost=640.0)  # of another size its own figure says more than a guess
    assert expected(model, 1, "other", 640.0) == pytest.approx(5.0)


def test_nearest_group_used_last_is_preferred() -> None:
    model = LatencyModel()
    for _ in range(3):
        model.observe("long ago", 1, 0.5, cost=64.0)
    for _ in range(3):
        model.observe("lately", 1, 0.01, cost=64.0)
    assert expected(model, 1, "new", 64.0) == pytest.approx(0.01)
