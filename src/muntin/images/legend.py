"""Legends: the names and colours of classes in a strip below a picture, and captions below tiles."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from muntin.artifact.classes import ClassInfo
from muntin.images.opening import UInt8

MOST_ENTRIES = 24
"""Classes that a legend names; the others are counted."""
LEAST_WIDTH = 160
"""Least width of a picture with a legend, pixels: a narrower picture gets a margin on its right."""
FONTS = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "arialuni.ttf", "arial.ttf")
"""Files of fonts for names beyond ASCII, where Pillow looks for fonts of the system."""
NO_LETTER = "\U0010ffff"
"""A code point that no font has: drawn as the box for missing letters."""
PAPER, INK, FRAME = (255, 255, 255), (30, 30, 30), (150, 150, 150)

Color = tuple[int, int, int]
LegendEntry = tuple[str, Color | None]
"""A name and its colour; None: words without one."""


def present_classes(labels_HW: npt.NDArray[Any], classes: Sequence[ClassInfo]) -> list[LegendEntry]:
    """The classes in a map with their shares of the pixels, the most frequent first: [("road 61 %", (128, 64, 128)), ...]."""
    counts = np.bincount(labels_HW.ravel(), minlength=len(classes))[: len(classes)]
    order = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    entries: list[LegendEntry] = [
        (f"{classes[k].name} {_percent(counts[k] / labels_HW.size)}", classes[k].color) for k in order[:MOST_ENTRIES]
    ]
    if len(order) > MOST_ENTRIES:
        entries.append((f"and {len(order) - MOST_ENTRIES} more", None))
    return entries


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.095 else f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %"


def with_legend(picture_HWC: UInt8, entries: Sequence[LegendEntry], *, size: int | None = None) -> UInt8:
    """The RGB picture with a strip below that names the entries: (H + strip, max(W, 160), 3). The picture's pixels stay as they are.

    `size`: of the letters, pixels; by default a sixtieth of the picture's longer side, at least 12 and at most 64.
    """
    height, width = picture_HWC.shape[:2]
    size = size or min(64, max(12, max(height, width) // 60))
    strip = _strip(entries, max(width, LEAST_WIDTH), size)
    out = np.full((height + strip.shape[0], strip.shape[1], 3), PAPER, dtype=np.uint8)
    out[:height, :width] = picture_HWC
    out[height:] = strip
    return out


def _strip(entries: Sequence[LegendEntry], width: int, size: int) -> UInt8:
    """A strip of the width with all entries, in as many rows as they take."""
    font = _font("".join(name for name, _ in entries), size)
    gap, swatch, line = size // 2, size, size + size // 2
    places: list[tuple[int, int, str, Color | None]] = []
    x = y = gap
    for name, color in entries:
        lead = 0 if color is None else swatch + gap // 2
        name = _shortened(name, font, width - 2 * gap - lead)
        wide = lead + int(font.getlength(name)) + 1
        if x > gap and x + wide > width - gap:
            x, y = gap, y + line
        places.append((x, y, name, color))
        x += wide + 2 * gap
    image = Image.new("RGB", (width, y + line if places else 0), PAPER)
    pen = ImageDraw.Draw(image)
    for x, y, name, color in places:
        if color is not None:
            pen.rectangle((x, y, x + swatch - 1, y + swatch - 1), fill=color, outline=FRAME, width=max(1, size // 14))
            x += swatch + gap // 2
        pen.text((x, y + swatch // 2), name, fill=INK, font=font, anchor="lm")
    return np.asarray(image)


def _font(text: str, size: int) -> Any:
    """The first font that has every letter of a text: Pillow's own, or one of `FONTS` of the system; Pillow's, with boxes, if none has."""
    own = ImageFont.load_default(size=size)
    letters = sorted({letter for letter in text if not letter.isspace() and letter.isprintable()})
    if "".join(letters).isascii():
        return own
    for name in FONTS:
        with suppress(OSError):  # the system lacks it
            font = ImageFont.truetype(name, size)
            box = bytes(font.getmask(NO_LETTER))
            if all(bytes(font.getmask(letter)) != box for letter in letters):
                return font
    return own


def _shortened(name: str, font: Any, width: int) -> str:
    """The name on one line of at most the width, pixels, with its end cut off if it is longer."""
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    shown = name
    while len(shown) > 1 and font.getlength(shown) > width:
        name = name[:-1]
        shown = f"{name}..."
        if not name:
            return "."
    return shown
