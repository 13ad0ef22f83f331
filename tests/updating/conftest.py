"""A run that was trained on small scenes, and folders of new scenes, for the tests of updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model_helpers import one_seed_one_thread
from muntin.images import read_mask, write_image
from muntin.training import Checkpoint, read_checkpoint
from products import product

__all__ = ["one_seed_one_thread"]


@pytest.fixture(scope="session")
def run() -> Path:
    """The folder of a run with three classes: sea, field, roof. Not to be changed: copy first."""
    return product("trained") / "run"


@pytest.fixture
def fixed_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are exported for one size: a graph of free sizes takes several times as long to make."""
    monkeypatch.setattr("muntin.deployment.checkpoint_export.usual_sizes", lambda task: "fixed")


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
