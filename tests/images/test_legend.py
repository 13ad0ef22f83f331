from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from muntin.artifact.classes import ClassInfo
from muntin.images.legend import MOST_ENTRIES, present_classes, with_legend

CLASSES = (
    ClassInfo(name="road", color=(200, 30, 30)),
    ClassInfo(name="tree", color=(30, 160, 30)),
    ClassInfo(name="sky", color=(0, 0, 255)),
)


def test_present_classes_by_their_shares() -> None:
    labels = np.array([[1, 1, 1], [0, 255, 1]], np.uint8)
    assert present_classes(labels, CLASSES) == [("tree 67 %", (30, 160, 30)), ("road 17 %", (200, 30, 30))]
    rare = np.zeros((100, 100), np.uint8)
    rare[0, 0], rare[1] = 1, 2
    assert [name for name, _ in present_classes(rare, CLASSES)] == ["road 99 %", "sky 1.0 %", "tree < 0.1 %"]


@pytest.mark.parametrize(("height", "width"), [(40, 300), (12, 8), (600, 90)])
def test_legend_below_an_unchanged_picture(height: int, width: int) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    shown = with_legend(picture, [(entry.name, entry.color) for entry in CLASSES])
    assert shown.shape[1] == max(160, width) and shown.shape[0] > height + 12
    assert (shown[:height, :width] == picture).all() and (shown[:height, width:] == 255).all()
    strip = shown[height:].reshape(-1, 3)
    for entry in CLASSES:
        assert 50 < (strip == entry.color).all(1).sum() < 2000  # one swatch
    assert (strip < 100).all(1).sum() > 50  # letters


def test_legend_of_letters_beyond_ascii() -> None:
    """Two words of one width in boxes differ where the system has a font for them."""
    try:
        ImageFont.truetype("DejaVuSans.ttf", 12)
    except OSError:
        pytest.skip("the system has no DejaVu Sans")
    picture = np.zeros((10, 200, 3), np.uint8)
    one, two = (with_legend(picture, [(word, None)], size=24) for word in ("вода", "лёд!"))
    assert one.shape != two.shape or (one != two).any()


def test_legend_of_many_and_long_names() -> None:
    many = tuple(ClassInfo(name=f"a class with the long name {k}", color=(k, 2 * k, 255 - k)) for k in range(60))
    entries = present_classes(np.arange(60, dtype=np.uint8)[None], many)
    assert len(entries) == MOST_ENTRIES + 1 and entries[-1] == ("and 36 more", None)
    picture = np.zeros((10, 200, 3), np.uint8)
    assert with_legend(picture, entries).shape[1] == 200
    assert with_legend(picture, [("x" * 500 + "\n", (1, 2, 3))]).shape[0] < 60
    assert with_legend(picture, []).shape == (10, 200, 3)
