"""The window of the last numbers, compared with sorting them anew."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from muntin.serving.batching.window import Window

LIMIT = 5


@given(st.lists(st.one_of(st.floats(0, 1, width=16), st.integers(1, 7))))
def test_window_of_last_numbers_sorted(events: list[float | int]) -> None:
    window, kept = Window(LIMIT), list[float]()
    for event in events:
        if isinstance(event, int):
            window.drop(event)
            del kept[max(0, len(kept) - event) :]
        else:
            window.add(event)
            kept = [*kept, event][-LIMIT:]
        assert len(window) == len(kept)
        assert [window.largest(outliers) for outliers in range(len(kept))] == sorted(kept, reverse=True)
