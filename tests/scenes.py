"""A tiny data set of real files and a recipe for it, for the tests that train, export or call the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from muntin.images import write_image

CLASSES = ({"name": "sea", "color": [0, 0, 200]}, {"name": "field", "color": [0, 160, 0]}, {"name": "roof", "color": [200, 60, 0]})
SMALL = {"stem": [8, 8, 16], "dims": [32, 32], "depths": [1, 1], "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "pairs": [1, 1]}
COUNTS = {"train": 4, "validation": 2, "test": 2}


@dataclass(frozen=True)
class Tiny:
    """Folder of the images and the recipe, and the recipe as plain values."""

    root: Path
    recipe: Path
    content: dict[str, Any]


def write_scene(image: Path, mask: Path, seed: int, side: int = 48) -> None:
    """Write an image of three noisy colours in rectangles, and its mask with an ignored edge."""
    generator = np.random.default_rng(seed)
    labels = np.zeros((side, side), np.uint8)
    for label in (1, 2):
        top, left = generator.integers(0, side - 24, 2)
        labels[top : top + 24, left : left + 24] = label
    colors = np.array([entry["color"] for entry in CLASSES])[labels]
    write_image(image, np.clip(colors + generator.normal(0, 20, colors.shape), 0, 255).astype(np.uint8))
    labels[0] = 255
    write_image(mask, labels)


def write_scenes(folder: Path, name: str, count: int, seed: int) -> None:
    """Write scenes into `images` and their masks into `masks`."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        file = f"{name}-{number}.png"
        write_scene(folder / "images" / file, folder / "masks" / file, seed + number)


def segment_content() -> dict[str, Any]:
    """Return the recipe of a segmentation of scenes."""

    def folders(split: str) -> dict[str, str]:
        return {"images": f"{split}/images", "masks": f"{split}/masks"}

    data = {"source": "folders", **folders("train"), "validation": folders("validation"), "test": folders("test"), "classes": list(CLASSES)}
    training = {"steps": 6, "batch_size": 2, "learning_rate": 0.002, "validate_every": 3, "checkpoint_every": 3, "threads": 1}
    return {
        "name": "tiny",
        "data": {**data, "crop": 32},
        "model": {"name": "hybrid-xs", "options": SMALL},
        "training": training,
        "quantization": {"calibration_images": 4},
    }


def write_tiny(root: Path, **sections: Any) -> Tiny:
    """Write the scenes of all splits and a recipe whose sections are updated."""
    for split, count in COUNTS.items():
        write_scenes(root / split, split, count, len(split) * 100)
    content = segment_content()
    for section, values in sections.items():
        content[section] = content.get(section, {}) | values if isinstance(values, dict) else values
    recipe = root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    return Tiny(root, recipe, content)
