"""Checkpoints that are written in the background."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from muntin.errors import CheckpointError
from muntin.training import checkpoint
from muntin.training.checkpoint import checkpoints_in, newest_sound, read_checkpoint
from muntin.training.distributed.checkpoint_writer import CheckpointWriter
from muntin.training.distributed.ranks import ALONE
from muntin.training.distributed.stored_tensors import AVERAGE, MODEL, OPTIMIZER
from muntin.training.recipe import Recipe


def state(recipe: Recipe, step: int) -> dict[str, Any]:
    fixed = {"recipe": recipe, "root": "/data", "classes": (), "precision": "fp32", "seconds": 1.0, "training": [], "validation": []}
    return {"step": step, **fixed}


def test_write_in_the_background(tmp_path: Path, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy is of the call, whatever training does to the tensors meanwhile; the next one waits for it."""
    free, replace = threading.Event(), checkpoint.replace_directory

    def slow(*arguments: Any, **options: Any) -> None:
        assert free.wait(30)
        replace(*arguments, **options)

    monkeypatch.setattr(checkpoint, "replace_directory", slow)
    weights = torch.zeros(3)
    with CheckpointWriter(tmp_path, ALONE) as writer:
        path = writer.write(state(recipe, 1), {MODEL: {"w": weights}, AVERAGE: {"w": weights}, OPTIMIZER: {}})
        weights += 1
        assert not path.exists()
        free.set()
        writer.write(state(recipe, 2), {MODEL: {"w": weights}, AVERAGE: {"w": weights}, OPTIMIZER: {}})
        assert read_checkpoint(path).tensors[MODEL]["w"].tolist() == [0, 0, 0]
    assert read_checkpoint(tmp_path / "step-00000002").tensors[AVERAGE]["w"].tolist() == [1, 1, 1]


def test_error_at_the_next_write(tmp_path: Path, recipe: Recipe) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    tensors: dict[str, dict[str, torch.Tensor]] = {MODEL: {}, AVERAGE: {}, OPTIMIZER: {}}
    with CheckpointWriter(tmp_path / "checkpoints", ALONE) as writer:
        writer.write(state(recipe, 1), tensors)
        with pytest.raises(CheckpointError, match=r"step-00000001 cannot be written .*: make room"):
            writer.write(state(recipe, 2), tensors)
    writer = CheckpointWriter(tmp_path / "checkpoints", ALONE)
    with pytest.raises(CheckpointError, match="cannot be written"), writer:
        writer.write(state(recipe, 1), tensors)


def test_damaged_newest(tmp_path: Path, save_step: Any) -> None:
    notes: list[str] = []
    for step in (1, 2):
        save_step(tmp_path, step)
    (tmp_path / "step-00000002" / MODEL).write_bytes(b"short")
    assert newest_sound(tmp_path, note=notes.append).state.step == 1
    assert "corrupted" in notes[0] and notes[0].endswith("now step-00000002.damaged, and the run goes on from step-00000001")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000001"]
    (tmp_path / "step-00000001" / AVERAGE).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        newest_sound(tmp_path)
    assert (tmp_path / "step-00000001").is_dir()
