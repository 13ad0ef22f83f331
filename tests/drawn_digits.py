"""Drawn digits, a small network that reads them, and plans of uniform bits and ranks for it, for the tests of budgets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from muntin.budgeting.forms.plans import Form, Plan

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
        return self.plan(fitting[-1])

    def int8(self) -> Plan:
        return self.plan(1)

    def plan(self, index: int) -> Plan:
        bits, rank = self.FORMS[index]
        forms = {name: Form(rank if name == self.HIDDEN else None, bits) for name in self.LAYERS}
        return Plan(width=self.width, forms=forms, harm=10.0 ** (index - 8), cost=self.width * bits * (rank or 64))
