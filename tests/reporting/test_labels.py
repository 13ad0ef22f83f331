"""Labels of dots: their width, their length and their places."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muntin.reporting.labels import Box, Disc, Label, breakable, overlap, place_labels, printable, shortened, text_width, wrapped

FRAME = (0.0, 0.0, 400.0, 300.0)
SIZE = 12.0


def box_of(label: Label) -> Box:
    width = text_width(label.text, SIZE)
    left = label.x - width * {"start": 0, "end": 1, "middle": 0.5}[label.anchor]
    top = label.y - 0.95 * SIZE
    return (left, top, left + width, top + 1.25 * SIZE)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.tuples(st.floats(0, 400), st.floats(0, 300), st.floats(1, 15)), st.text(min_size=1, max_size=20)), max_size=8),
    st.lists(st.tuples(st.floats(0, 300), st.floats(0, 250)), max_size=3),
)
def test_labels_do_not_overlap(dots: list[tuple[Disc, str]], corners: list[tuple[float, float]]) -> None:
    taken = [(x, y, x + 80, y + 20) for x, y in corners]
    labels = place_labels(dots, size=SIZE, frame=FRAME, taken=taken, avoid=[disc for disc, _ in dots])
    # Coordinates are rounded to a tenth when they are placed.
    boxes = [(left + 0.2, top + 0.2, right - 0.2, bottom - 0.2) for left, top, right, bottom in map(box_of, labels)]
    for index, box in enumerate(boxes):
        assert box[0] >= 0 and box[1] >= 0 and box[2] <= FRAME[2] and box[3] <= FRAME[3]
        assert not any(overlap(box, other) for other in [*boxes[:index], *taken])
    assert len(labels) <= len(dots)


def test_label_of_a_lone_dot() -> None:
    (label,) = place_labels([((100.0, 100.0, 5.0), "stem.conv")], size=SIZE, frame=FRAME)
    assert (label.anchor, label.x, label.leader) == ("start", 108.0, None)


def test_label_of_a_crowded_dot() -> None:
    crowd = [(100.0 + 8 * across, 100.0 + 8 * down, 4.0) for across in range(-6, 7) for down in range(-4, 5)]
    (label,) = place_labels([((100.0, 100.0, 5.0), "stem")], size=SIZE, frame=FRAME, avoid=crowd)
    assert label.leader is not None


def test_label_without_a_free_place() -> None:
    assert place_labels([((20.0, 10.0, 5.0), "longer than the frame is wide")], size=SIZE, frame=(0.0, 0.0, 40.0, 20.0)) == ()


@pytest.mark.parametrize(
    ("text", "limit", "short"),
    [
        ("stem.conv", 20, "stem.conv"),
        ("stages.0.blocks.1.attention.project", 24, "stage…attention.project"),
        ("stages.0.blocks.1.attention.project", 30, "stages…1.attention.project"),
        ("n" * 100, 12, "nn…nnnnnnnn"),
        ("a\x01b\u202ec\n d", 20, "a\ufffdb\ufffdc d"),
    ],
)
def test_shortened_names(text: str, limit: int, short: str) -> None:
    assert shortened(text, limit) == short
    assert len(short) <= limit


@given(st.text(max_size=60), st.integers(8, 40))
def test_any_name_is_shortened_and_printable(text: str, limit: int) -> None:
    assert len(shortened(text, limit)) <= limit
    assert printable(text).isprintable()


@given(st.text(max_size=60))
def test_breakable_parts_of_any_text(text: str) -> None:
    assert "".join(breakable(text)) == (text if text.strip() else "")


def test_breakable_keeps_numbers() -> None:
    assert breakable("stages.0.conv_1 takes 1.5 ms.") == ("stages.", "0.", "conv_", "1 takes 1.5 ms.")


def test_wrapped_lines() -> None:
    lines = wrapped("Not drawn, no multiply-adds: 245 kernels, 20.8 ms", 200, SIZE)
    assert " ".join(lines) == "Not drawn, no multiply-adds: 245 kernels, 20.8 ms"
    assert len(lines) == 2
    assert all(text_width(line, SIZE) <= 200 for line in lines)


def test_text_width_of_wide_letters() -> None:
    assert text_width("層", SIZE) > 1.5 * text_width("a", SIZE)
