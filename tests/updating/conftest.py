"""A run that was trained on small scenes, and folders of new scenes, for the tests of updates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model_helpers import one_seed_one_thread
from muntin.images import read_mask, write_image
from muntin.training import Checkpoint, fit, read_checkpoint

__all__ = ["one_seed_one_thread"]
MODEL = """
from torch import nn

class Small(nn.Sequential):
    def forward(self, x):
        return super().forward(x / 128 - 1)

def make(*, task, classes, channels):
    return Small(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, classes, 1))
"""


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Any]) -> Iterator[Path]:
    """The folder of a run with three classes: sea, field, roof."""
    root = tmp_path_factory.mktemp("updated")
    (root / "two_layers_of_updates.py").write_text(MODEL)
    training = {"steps": 150, "batch_size": 8, "learning_rate": 0.01, "validate_every": 150, "precision": "fp32"}
    tiny = write_tiny(root / "data", model={"name": "two_layers_of_updates:make", "options": {}}, training=training)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        fit(tiny.recipe, directory=root / "run")
        yield root / "run"


@pytest.fixture
def parent(run: Path) -> Checkpoint:
    """The checkpoint of the run."""
    return read_checkpoint(run)


@pytest.fixture
def write_new(tmp_path: Path, write_scenes: Callable[..., None]) -> Callable[..., Path]:
    """`write_new(name, count=12, seed=900, relabel={old: new})`: a folder of new scenes whose masks have changed values."""

    def write(name: str = "new", *, count: int = 12, seed: int = 900, relabel: dict[int, int] | None = None) -> Path:
        folder = tmp_path / name
        write_scenes(folder, name, count, seed)
        table = np.arange(256, dtype=np.uint8)
        for value, other in (relabel or {}).items():
            table[value] = other
        for mask in (folder / "masks").iterdir():
            write_image(mask, table[read_mask(mask)])
        return folder

    return write
