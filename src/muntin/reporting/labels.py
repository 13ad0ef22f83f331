"""Names in pictures: their width, shortening and line breaks, and labels beside dots that do not overlap and hide few dots.

Coordinates are those of the picture's view box, y downwards. Widths are estimates, because the reader's fonts are unknown.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
Point = tuple[float, float]
LineSegment = tuple[Point, Point]
Disc = tuple[float, float, float]

# Directions from a dot and distances from its rim in which a label is tried, the best first.
_ANGLES = tuple(math.radians(degrees) for degrees in (0, 180, 30, 150, -30, -150, 60, 120, -60, -120, 90, -90))
_GAPS = (3, 10, 20, 34, 52, 74, 100, 130)
# Beyond this distance a leader joins label and dot, because other dots may be as near.
_LEADER_FROM = 9.0
# The number of parts of a line whose ends are tested for lying in a box.
_LINE_PARTS = 24


@dataclass(frozen=True, kw_only=True)
class Label:
    """A text on the baseline `y` whose `anchor` (start, middle or end) is at `x`; `leader` is the line from a distant dot."""

    text: str
    x: float
    y: float
    anchor: str
    leader: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class _Place:
    """A place for a label: its box, the coordinate and kind of its anchor, its distance from the dot, and its leader."""

    box: Box
    x: float
    anchor: str
    gap: float
    leader: LineSegment | None


def text_width(text: str, size: float) -> float:
    """Return an upper estimate of the width of `text` in a sans-serif font of `size`."""
    return size * sum(1.05 if unicodedata.east_asian_width(letter) in "WF" else 0.58 for letter in text)


def printable(text: str) -> str:
    """Return `text` with its control and format characters replaced: SVG forbids some, and others turn the direction of text."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))


def shortened(text: str, limit: int) -> str:
    """Return `text` in at most `limit` letters without its middle: names of layers begin with the place and end with the role."""
    text = printable(text)
    if len(text) <= limit:
        return text
    # The end begins after a separator if one is near, so that it begins with a whole word.
    end = text[-((limit - 1) * 3 // 4 + 1) :]
    begin = re.search(r"^.{0,6}?[./]", end)
    end = end[begin.end() if begin else 1 :]
    return f"{text[: (limit - 1) // 4].rstrip('./_')}…{end}"


def breakable(text: str) -> tuple[str, ...]:
    """Return `text` in parts between which a line may break: after dots, slashes and underscores, but not inside decimal numbers."""
    return tuple(re.split(r"(?<=[./_])(?![./_\s])(?!(?<=\d\.)\d)(?!$)", text)) if text.strip() else ()


def wrapped(text: str, width: float, size: float) -> list[str]:
    """Return `text` in lines of at most `width`; a longer word is a line of its own."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def overlap(one: Box, other: Box) -> bool:
    """Return whether two boxes (left, top, right, bottom) share any area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def place_labels(
    dots: Sequence[tuple[Disc, str]], *, size: float, frame: Box, taken: Sequence[Box] = (), avoid: Sequence[Disc] = ()
) -> tuple[Label, ...]:
    """Return a label for each dot (x, y, radius) with its text, most important first; a dot without a free place has none.

    Labels stay inside `frame` and clear of the boxes `taken` and of each other. Of the free places, the one is chosen that hides fewest of
    the discs `avoid` and is nearest. Costs about a hundred places a label, each against all of `avoid`.
    """
    boxes, leaders, labels = list(taken), list[LineSegment](), list[Label]()
    for disc, text in dots:
        free = [place for place in _places(disc, text_width(text, size), size) if _is_free(place, frame, boxes, leaders)]
        if not free:
            continue
        best = min(free, key=lambda place: _cost(place, avoid))
        boxes.append(best.box)
        leader = None
        if best.leader is not None:
            leaders.append(best.leader)
            (x0, y0), (x1, y1) = best.leader
            leader = (round(x0, 1), round(y0, 1), round(x1, 1), round(y1, 1))
        y = round(best.box[1] + 0.95 * size, 1)
        labels.append(Label(text=text, anchor=best.anchor, x=round(best.x, 1), y=y, leader=leader))
    return tuple(labels)


def _places(disc: Disc, width: float, size: float) -> Iterator[_Place]:
    x, y, radius = disc
    height = 1.25 * size
    for gap in _GAPS:
        for angle in _ANGLES:
            across, down = math.cos(angle), math.sin(angle)
            at_x, at_y = x + (radius + gap) * across, y + (radius + gap) * down
            anchor, before = ("start", 0.0) if across > 0.1 else ("end", 1.0) if across < -0.1 else ("middle", 0.5)
            left = at_x - width * before
            top = at_y - height * (0 if down > 0.9 else 1 if down < -0.9 else 0.5)
            leader = ((x + radius * across, y + radius * down), (at_x, at_y)) if gap > _LEADER_FROM else None
            yield _Place(box=(left, top, left + width, top + height), x=at_x, anchor=anchor, gap=gap, leader=leader)


def _is_free(place: _Place, frame: Box, boxes: Sequence[Box], leaders: Sequence[LineSegment]) -> bool:
    left, top, right, bottom = place.box
    if left < frame[0] or top < frame[1] or right > frame[2] or bottom > frame[3]:
        return False
    if any(overlap(place.box, box) for box in boxes) or any(_crosses(leader, place.box) for leader in leaders):
        return False
    if place.leader is None:
        return True
    return not any(_crosses(place.leader, box) for box in boxes) and not any(_meet(place.leader, leader) for leader in leaders)


def _crosses(line: LineSegment, box: Box) -> bool:
    (x0, y0), (x1, y1) = line
    points = ((x0 + (x1 - x0) * part / _LINE_PARTS, y0 + (y1 - y0) * part / _LINE_PARTS) for part in range(_LINE_PARTS + 1))
    return any(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in points)


def _meet(one: LineSegment, other: LineSegment) -> bool:
    """Return whether two segments intersect: the ends of each lie on different sides of the other."""

    def side(line: LineSegment, point: Point) -> bool:
        (x0, y0), (x1, y1) = line
        return (x1 - x0) * (point[1] - y0) > (y1 - y0) * (point[0] - x0)

    return side(one, other[0]) != side(one, other[1]) and side(other, one[0]) != side(other, one[1])


def _cost(place: _Place, avoid: Sequence[Disc]) -> float:
    left, top, right, bottom = place.box
    hidden = sum(1 + 2 * r for x, y, r in avoid if left - r < x < right + r and top - r < y < bottom + r)
    return hidden + 0.2 * place.gap
