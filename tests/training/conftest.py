"""A tiny model's recipe and a checkpoint of it, written without training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import scenes
from muntin.artifact.classes import ClassInfo
from muntin.training import loop
from muntin.training.checkpoint import write_checkpoint
from muntin.training.distributed.averaging import WeightAverage
from muntin.training.distributed.stored_tensors import AVERAGE, MODEL, OPTIMIZER
from muntin.training.optimizer import make_optimizer, optimizer_tensors
from muntin.training.recipe import Recipe, parse_recipe
from muntin.training.weights import build_model
from scenes import Tiny

CLASSES = tuple(ClassInfo(name=name, color=(9, 9, 9)) for name in ("sea", "field", "roof"))
SMALL = {"stem": [8, 8, 16], "dims": [32], "depths": [1], "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "pairs": [1, 1]}


@pytest.fixture(scope="session")
def write_tiny() -> Callable[..., Tiny]:
    """As everywhere, with a network of one stage."""
    return lambda root, **sections: scenes.write_tiny(root, **({"model": {"options": SMALL}} | sections))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The clock of a run: advances by what a test adds to `now`, and by `tick` seconds at each reading."""

    class Clock:
        now, tick = 0.0, 1e-3

        def perf_counter(self) -> float:
            self.now += self.tick
            return self.now

    fake = Clock()
    monkeypatch.setattr(loop, "time", fake)
    return fake


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return parse_recipe({"name": "small", "model": {"name": "hybrid-xs", "options": SMALL}, "training": {"steps": 5}}, where="test")


@pytest.fixture(scope="session")
def save_step(recipe: Recipe) -> Callable[..., Path]:
    """`save_step(folder, step)` writes a whole checkpoint of a model that took one optimiser step."""

    def save(folder: Path, step: int, **changes: Any) -> Path:
        torch.manual_seed(step)
        model = build_model(recipe, CLASSES)
        optimizer = make_optimizer(model, recipe.training)
        model(torch.rand(2, 3, 16, 16) * 255).square().mean().backward()
        optimizer.step()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        state = {"step": step, "recipe": recipe, "root": "/data", "classes": CLASSES, "precision": "fp32", "seconds": 1.5}
        state |= {"training": [{"step": 1, "loss": 0.5}], "pending": [0.25], "validation": []}
        tensors = {
            MODEL: dict(model.state_dict()),
            AVERAGE: dict(WeightAverage(model, 0.9).model.state_dict()),
            OPTIMIZER: optimizer_tensors(model, optimizer, scaler),
        }
        return write_checkpoint(folder, state | changes, tensors)

    return save
