"""A small network that reads drawn digits, trained once, and plans of uniform bits and ranks for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from model_helpers import one_seed_one_thread
from muntin.budgeting.forms import Form, Plan

__all__ = ["one_seed_one_thread"]
SIDE = 16


def draw_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Digits in several sizes, places and angles, on noise: pixels (N, 1, 16, 16), 0-255, and labels (N,)."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(10, size=count)
    pictures = []
    for label in labels:
        picture = Image.new("L", (SIDE, SIDE))
        font = ImageFont.load_default(size=float(generator.uniform(13, 17)))
        place = (float(generator.uniform(2, 6)), float(generator.uniform(-4, 0)))
        ImageDraw.Draw(picture).text(place, str(label), fill=int(generator.integers(120, 256)), font=font)
        turned = np.asarray(picture.rotate(float(generator.uniform(-15, 15)), resample=Image.Resampling.BILINEAR), np.float32)
        pictures.append(np.clip(turned + generator.normal(0, 20, turned.shape), 0, 255).round())
    return torch.tensor(np.stack(pictures)[:, None], dtype=torch.float32), torch.tensor(labels)


def network() -> nn.Sequential:
    """Two convolutions and two Linears: pixels 0-255 to ten scores."""
    parts: list[nn.Module] = [
        *(nn.BatchNorm2d(1), nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)),
    ]
    return nn.Sequential(*parts)


@dataclass(frozen=True)
class Digits:
    """A trained network and its data."""

    model: nn.Module
    train: list[tuple[Tensor, Tensor]]
    calibration: list[Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def evaluate(self, model: nn.Module) -> float:
        """Accuracy on the validation digits."""
        return float(np.mean(right(model, self.validation)))

    def holdout(self, model: nn.Module) -> list[float]:
        """For each test digit whether it is read."""
        return right(model, self.test)


def right(model: nn.Module, data: tuple[Tensor, Tensor]) -> list[float]:
    with torch.no_grad():
        return [float(hit) for hit in model(data[0]).argmax(1) == data[1]]


@pytest.fixture(scope="session")
def digits() -> Digits:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    images, labels = draw_digits(1536, 1)
    train = list(zip(images.split(64), labels.split(64), strict=True))
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(6):
        for x, y in train:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    torch.set_num_threads(threads)
    return Digits(model.eval(), train, [x for x, _ in train[:3]], draw_digits(400, 2), draw_digits(400, 3))


class Uniform:
    """Plans in which all layers have the same bits, and the first Linear a rank: the harm is the greater the fewer they are."""

    FORMS = ((16, None), (8, None), (6, None), (5, None), (4, None), (4, 32), (3, 32), (2, 16), (2, 4))
    LAYERS = ("1", "4", "8", "10")
    HIDDEN = "8"

    def __init__(self, width: float = 1.0) -> None:
        self.width = width

    def propose(self, limit: float) -> Plan | None:
        fitting = [index for index in range(len(self.FORMS)) if 10.0 ** (index - 8) <= limit]
        if not fitting:
            return None
        bits, rank = self.FORMS[fitting[-1]]
        forms = {name: Form(rank if name == self.HIDDEN else None, bits) for name in self.LAYERS}
        return Plan(width=self.width, forms=forms, harm=10.0 ** (fitting[-1] - 8), cost=self.width * bits * (rank or 64))


@pytest.fixture(scope="session")
def uniform() -> Callable[[float, nn.Module, Sequence[Any], Path], Uniform]:
    """`uniform(width, model, batches, folder)`: opens plans of uniform forms."""
    return lambda width, model, batches, folder: Uniform(width)
