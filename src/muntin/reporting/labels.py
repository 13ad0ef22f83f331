"""Labels of dots in a picture: each beside its dot, none over another, and as few dots as possible hidden under them.

Coordinates are those of the picture's view box, y downwards; texts are measured by estimate, since a page is written without its fonts.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]
Point = tuple[float, float]
Disc = tuple[float, float, float]

_ANGLES = tuple(math.radians(degrees) for degrees in (0, 180, 30, 150, -30, -150, 60, 120, -60, -120, 90, -90))
_GAPS = (3, 10, 20, 34, 52, 74, 100, 130)
# A line from dot to label is drawn where the eye would have to guess which belongs to which.
_LEADER_FROM = 9.0
_STEPS = 24


@dataclass(frozen=True, kw_only=True)
class Label:
    """A text on the baseline `y` whose `anchor` (start, middle or end) is at `x`; `leader` is the line from a dot that is not near."""

    text: str
    x: float
    y: float
    anchor: str
    leader: tuple[float, float, float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class _Candidate:
    box: Box
    at: float
    anchor: str
    gap: float
    leader: tuple[Point, Point] | None


def text_width(text: str, size: float) -> float:
    """The width of `text` in a sans-serif face of `size`, rather too much than too little."""
    return size * sum(1.05 if unicodedata.east_asian_width(letter) in "WF" else 0.58 for letter in text)


def printable(text: str) -> str:
    """`text` without what an SVG file may not hold or what would turn its direction: control and format characters."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in " ".join(text.split()))


def shortened(text: str, limit: int) -> str:
    """`text` in at most `limit` letters: names of layers begin with the place and end with the role, so the middle is left out."""
    text = printable(text)
    if len(text) <= limit:
        return text
    # From a separator on where there is one near: the end then begins with a whole word.
    end = text[-((limit - 1) * 3 // 4 + 1) :]
    begin = re.search(r"^.{0,6}?[./]", end)
    end = end[begin.end() if begin else 1 :]
    return f"{text[: (limit - 1) // 4].rstrip('./_')}…{end}"


def breakable(text: str) -> tuple[str, ...]:
    """`text` in parts between which a line may break: after the dots, slashes and underscores of names, not inside decimal numbers."""
    return tuple(re.split(r"(?<=[./_])(?![./_\s])(?!(?<=\d\.)\d)(?!$)", text)) if text.strip() else ()


def wrapped(text: str, width: float, size: float) -> list[str]:
    """`text` in lines that are at most `width` wide where its words allow it."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and text_width(f"{lines[-1]} {word}", size) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def overlap(one: Box, other: Box) -> bool:
    """Whether two boxes (left, top, right, bottom) share any area."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def place_labels(
    wanted: Sequence[tuple[Disc, str]], *, size: float, frame: Box, taken: Sequence[Box] = (), avoid: Sequence[Disc] = ()
) -> tuple[Label, ...]:
    """A label for each dot (x, y, radius) with its text, most important first; one that finds no free place is left out.

    Labels stay inside `frame` and clear of the boxes `taken` and of each other; of the places left, the one that hides least of the discs
    `avoid` and is nearest wins. Costs about a hundred places a label, each against all of `avoid`.
    """
    boxes, leaders, placed = list(taken), list[tuple[Point, Point]](), list[Label]()
    for disc, text in wanted:
        free = [place for place in _candidates(disc, text_width(text, size), size) if _is_free(place, frame, boxes, leaders)]
        if not free:
            continue
        best = min(free, key=lambda place: _cost(place, avoid))
        boxes.append(best.box)
        if best.leader is not None:
            leaders.append(best.leader)
        placed.append(_label(text, best, size))
    return tuple(placed)


def _candidates(disc: Disc, width: float, size: float) -> Iterator[_Candidate]:
    x, y, radius = disc
    height = 1.25 * size
    for gap in _GAPS:
        for angle in _ANGLES:
            across, down = math.cos(angle), math.sin(angle)
            at_x, at_y = x + (radius + gap) * across, y + (radius + gap) * down
            anchor, before = ("start", 0.0) if across > 0.1 else ("end", 1.0) if across < -0.1 else ("middle", 0.5)
            left = at_x - width * before
            top = at_y - height * (0 if down > 0.9 else 1 if down < -0.9 else 0.5)
            start = (x + radius * across, y + radius * down)
            box = (left, top, left + width, top + height)
            leader = (start, (at_x, at_y)) if gap > _LEADER_FROM else None
            yield _Candidate(box=box, at=at_x, anchor=anchor, gap=gap, leader=leader)


def _is_free(place: _Candidate, frame: Box, boxes: Sequence[Box], leaders: Sequence[tuple[Point, Point]]) -> bool:
    left, top, right, bottom = place.box
    if left < frame[0] or top < frame[1] or right > frame[2] or bottom > frame[3]:
        return False
    if any(overlap(place.box, box) for box in boxes):
        return False
    if any(_crosses(leader, place.box) for leader in leaders):
        return False
    if place.leader is None:
        return True
    return not any(_crosses(place.leader, box) for box in boxes) and not any(_meet(place.leader, leader) for leader in leaders)


def _crosses(line: tuple[Point, Point], box: Box) -> bool:
    (x0, y0), (x1, y1) = line
    steps = ((x0 + (x1 - x0) * step / _STEPS, y0 + (y1 - y0) * step / _STEPS) for step in range(_STEPS + 1))
    return any(box[0] <= x <= box[2] and box[1] <= y <= box[3] for x, y in steps)


def _meet(one: tuple[Point, Point], other: tuple[Point, Point]) -> bool:
    def side(line: tuple[Point, Point], point: Point) -> bool:
        (x0, y0), (x1, y1) = line
        return (x1 - x0) * (point[1] - y0) > (y1 - y0) * (point[0] - x0)

    return side(one, other[0]) != side(one, other[1]) and side(other, one[0]) != side(other, one[1])


def _cost(place: _Candidate, avoid: Sequence[Disc]) -> float:
    left, top, right, bottom = place.box
    hidden = sum(1 + 2 * r for x, y, r in avoid if left - r < x < right + r and top - r < y < bottom + r)
    return hidden + 0.2 * place.gap


def _label(text: str, place: _Candidate, size: float) -> Label:
    leader = None
    if place.leader is not None:
        (x0, y0), (x1, y1) = place.leader
        leader = (round(x0, 1), round(y0, 1), round(x1, 1), round(y1, 1))
    return Label(text=text, anchor=place.anchor, x=round(place.at, 1), y=round(place.box[1] + 0.95 * size, 1), leader=leader)
