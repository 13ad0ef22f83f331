"""Draw the pictures of docs/ideas/ as SVG: python docs/make_pictures.py

Colours are readable on light and dark pages; every picture has its own background.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import log10
from pathlib import Path

IDEAS = Path(__file__).parent / "ideas"
INK, GREY, TEAL, RED, GOLD, PAPER = "#24343a", "#c4d0d2", "#00897b", "#c0503c", "#d9a441", "#fbfcfc"


def main() -> None:
    (IDEAS / "attention.svg").write_text(drawing(880, 330, attention()), encoding="utf-8")
    (IDEAS / "cost.svg").write_text(drawing(640, 330, cost()), encoding="utf-8")
    (IDEAS / "w4a8.svg").write_text(drawing(880, 300, w4a8()), encoding="utf-8")
    (IDEAS / "stages.svg").write_text(drawing(880, 190, stages()), encoding="utf-8")


def drawing(width: int, height: int, parts: Iterator[str]) -> str:
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="15" fill="{INK}">'
    return "\n".join((head, rect(0, 0, width, height, PAPER, radius=8), *parts, "</svg>\n"))


def rect(x: float, y: float, width: float, height: float, fill: str, *, stroke: str = "none", radius: float = 0, line: float = 1) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}" stroke="{stroke}" stroke-width="{line}" rx="{radius}"/>'


def text(x: float, y: float, words: str, *, anchor: str = "middle", size: int = 15, fill: str = INK, weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="{fill}" font-weight="{weight}">{words}</text>'


def line(x1: float, y1: float, x2: float, y2: float, stroke: str, *, width: float = 1, dashes: str = "") -> str:
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{stroke}" stroke-width="{width}"{dashed}/>'


def grid(left: float, top: float, count: int, step: float) -> Iterator[str]:
    """Draw count x count tokens."""
    for row in range(count):
        for column in range(count):
            yield rect(left + column * step + 1, top + row * step + 1, step - 2, step - 2, GREY, radius=2)


def attention() -> Iterator[str]:
    """Draw three maps of 12 x 12 tokens: what one of the tokens looks at."""
    step, count, top = 17.0, 12, 60
    side = step * count
    lefts = (30.0, 325.0, 620.0)
    titles = ("all tokens", "a window of 4 x 4", "latents")
    row, column = 5, 6
    for left, title in zip(lefts, titles, strict=True):
        yield text(left + side / 2, 40, title, weight="bold")
        if title == "latents":
            continue
        yield from grid(left, top, count, step)
    centre = lefts[0] + (column + 0.5) * step, top + (row + 0.5) * step
    for other in range(count * count):
        x, y = lefts[0] + (other % count + 0.5) * step, top + (other // count + 0.5) * step
        yield line(*centre, x, y, RED, width=0.6)
    for x, y in ((lefts[0], top), (lefts[1], top)):
        yield rect(x + column * step + 1, y + row * step + 1, step - 2, step - 2, RED, radius=2)
    for cut in range(1, 3):
        yield line(lefts[1] + cut * 4 * step, top, lefts[1] + cut * 4 * step, top + side, INK, width=2)
        yield line(lefts[1], top + cut * 4 * step, lefts[1] + side, top + cut * 4 * step, INK, width=2)
    centre = lefts[1] + (column + 0.5) * step, top + (row + 0.5) * step
    for other in range(16):
        x, y = lefts[1] + (4 + other % 4 + 0.5) * step, top + (4 + other // 4 + 0.5) * step
        yield line(*centre, x, y, TEAL, width=1.6)
    yield rect(lefts[1] + column * step + 1, top + row * step + 1, step - 2, step - 2, RED, radius=2)
    yield from latents(lefts[2], top, step)
    below = ("n tokens look at n: O(n²)", "n tokens look at 16: O(n)", "4 latents read n tokens, and n read 4: O(n)")
    for left, words in zip(lefts, below, strict=True):
        yield text(left + side / 2, top + side + 32, words, size=14)


def latents(left: float, top: float, step: float) -> Iterator[str]:
    """Draw a map on the left, four latents beside it, and lines from every second token to each latent."""
    step, count = step * 0.72, 12
    middle, x_latent = top + 102, left + 205
    offset = middle - step * count / 2
    places = [middle - 75 + 50 * number for number in range(4)]
    yield from grid(left - 5, offset, count, step)
    for row in range(0, count, 2):
        for y in places:
            yield line(left - 5 + step * count, offset + (row + 1) * step, x_latent, y, TEAL, width=0.9)
    for y in places:
        yield f'<circle cx="{x_latent}" cy="{y}" r="11" fill="{GOLD}" stroke="{INK}"/>'


def cost() -> Iterator[str]:
    """Draw the measured times of hybrid-xxs and of its twin with attention over all tokens: docs/ideas/windows-and-latents.md has them."""
    sides = (512, 1024, 2048, 4096)
    hybrid, dense = (1.4, 6.6, 27.0, 120.0), (20.0, 154.0, 1824.0, 26711.0)
    left, right, bottom, top = 90, 480, 265, 30

    def place(index: int, milliseconds: float) -> tuple[float, float]:
        decade = (bottom - top) / 5  # from 1 ms to 100 s
        return left + (right - left) * index / 3, bottom - decade * log10(milliseconds)

    for power, label in enumerate(("1 ms", "10 ms", "100 ms", "1 s", "10 s", "100 s")):
        y = place(0, 10.0**power)[1]
        yield line(left, y, right, y, GREY)
        yield text(left - 10, y + 5, label, anchor="end", size=13)
    for index, side in enumerate(sides):
        yield text(place(index, 1)[0], bottom + 22, f"{side}²", size=13)
    yield text((left + right) / 2, bottom + 48, "pixels of the picture", size=13)
    for times, color, words in ((dense, RED, "all tokens"), (hybrid, TEAL, "windows, latents")):
        places = [place(index, milliseconds) for index, milliseconds in enumerate(times)]
        for start, end in pairwise(places):
            yield line(*start, *end, color, width=3)
        for x, y in places:
            yield f'<circle cx="{x}" cy="{y}" r="5" fill="{color}"/>'
        yield text(right + 12, places[-1][1] + 5, words, anchor="start", fill=color, weight="bold")


def w4a8() -> Iterator[str]:
    """Draw the values of a weight in FP32 and on the 15 levels of 4 bits, and the 256 levels of an activation."""
    left, right, top = 190, 840, 60
    yield text(20, top + 5, "weights, FP32", anchor="start")
    for number in range(61):
        spread = (number - 30) / 30
        x = (left + right) / 2 + (right - left) / 2 * (0.25 * spread + 0.7 * spread**3)
        yield line(x, top - 12, x, top + 12, TEAL, width=1.2)
    yield text(20, top + 75, "4 bits: -7 to 7", anchor="start")
    for level in range(15):
        x = left + (right - left) * level / 14
        yield line(x, top + 55, x, top + 85, RED, width=3)
    yield text(
        (left + right) / 2, top + 110, "one scale for each output channel; a weight takes the level that harms the answer least", size=13
    )
    yield text(20, top + 160, "activations, 8 bits", anchor="start")
    for level in range(256):
        x = left + (right - left) * level / 255
        yield line(x, top + 145, x, top + 170, INK, width=0.9)
    yield text((left + right) / 2, top + 195, "256 levels, one scale for a tensor, found by calibration or learned", size=13)


def stages() -> Iterator[str]:
    """Draw the three stages of `muntin compress --course stages`, and export after them."""
    boxes = (
        ("trained", "FP32", GREY),
        ("1 low rank", "narrow products", "#bfe3dd"),
        ("2 W4A8", "learns to round", "#f0d9a8"),
        ("3 mixed", "each layer its bits", "#f3c3b6"),
        ("deployed", "integers, verified", "#d5e8d4"),
    )
    width, gap, top = 148, 28, 50
    for number, (title, words, fill) in enumerate(boxes):
        x = 16 + number * (width + gap)
        yield rect(x, top, width, 90, fill, stroke=INK, radius=8)
        yield text(x + width / 2, top + 38, title, weight="bold")
        yield text(x + width / 2, top + 64, words, size=13)
        if number < len(boxes) - 1:
            y = top + 45
            yield line(x + width + 3, y, x + width + gap - 9, y, INK, width=2)
            yield f'<path d="M{x + width + gap - 10} {y - 6}l8 6l-8 6z" fill="{INK}"/>'


if __name__ == "__main__":
    main()
