"""Pictures without labels: their rows in a batch, their part in the loss, and what a student learns from them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from muntin.data import Crops
from muntin.data.batches import BatchMaker
from muntin.data.source import HeldSamples
from muntin.errors import DataError, RecipeError
from muntin.images import IGNORED, write_image
from muntin.tasks.samples import Sample
from muntin.training.checkpoint import read_checkpoint
from muntin.training.distributed.stored_tensors import AVERAGE
from muntin.training.fitting import FitResult, fit
from muntin.training.loss import Loss
from muntin.training.recipe import load_recipe
from muntin.training.teachers.unlabelled import UNLABELLED, PartlyLabelled, PartlyLabelledCrops, UnlabelledPictures

BATCH = 6
ORACLE = """
import torch
class Oracle(torch.nn.Module):
    '''Scores by the distance to the classes' colours: as sure as labels.'''
    def __init__(self, colors):
        super().__init__()
        self.register_buffer("colors", torch.tensor(colors).float())
    def forward(self, x):
        return -(x[:, None] - self.colors[None, :, :, None, None]).square().sum(2) / 1000
def make(*, task, classes, channels):
    return Oracle({colors}[:classes])
"""


def sample(value: int, target: int | None) -> Sample:
    image = np.full((12, 12, 3), value, np.uint8)
    return Sample(name=str(value), image=image, target=np.ones((12, 12), np.uint8) if target is None else target)


def mixed(task: Any, share: float) -> tuple[PartlyLabelledCrops, BatchMaker, BatchMaker]:
    target = None if task == "segment" else 1
    pictures = [HeldSamples([sample(value, target) for value in values]) for values in ((10, 20, 30), (110, 120, 130))]
    known, bare = (Crops(held, task=task, crop=16, batch_size=BATCH, seed=seed) for seed, held in enumerate(pictures))
    return PartlyLabelledCrops(known, bare, batch_size=BATCH, share=share, pictures=pictures[1]), known, bare


@pytest.mark.parametrize("task", ["segment", "classify"])
@pytest.mark.parametrize(("share", "expected"), [(0.5, 3), (0.2, 1), (0.9, 5), (1.0, 6)])
def test_rows_of_a_batch(task: Any, share: float, expected: int) -> None:
    maker, known, bare = mixed(task, share)
    images, target = maker.batch(4)
    without = (target == UNLABELLED).reshape(BATCH, -1).any(1)
    assert int(without.sum()) == expected and torch.equal(images.flatten(1).amax(1) > 100, without)
    assert torch.equal(images[without], bare.batch(4)[0][:expected])
    assert torch.equal(images[~without], known.batch(4)[0][: BATCH - expected])
    assert torch.equal(target[~without], known.batch(4)[1][: BATCH - expected])
    if task == "segment":  # pictures are smaller than crops
        assert torch.equal(target[without] == IGNORED, bare.batch(4)[1][:expected] == IGNORED)
    halves = [maker.batch(4, rows) for rows in (slice(0, 2), slice(2, 3), slice(3, None))]
    assert torch.equal(torch.cat([part for part, _ in halves]), images) and torch.equal(torch.cat([part for _, part in halves]), target)


@pytest.mark.parametrize("task", ["segment", "classify"])
@pytest.mark.parametrize("memory", [None, 4096])
def test_loss_terms(task: str, memory: int | None) -> None:
    """The label's terms are those of the labelled pictures, the distance is of all, over the number of all."""
    generator = torch.Generator().manual_seed(0)
    side = (8, 8) if task == "segment" else ()
    scores, teacher = (torch.randn(4, 3, *side, generator=generator, dtype=torch.float64) for _ in range(2))
    target = torch.randint(0, 3, (4, *side), generator=generator)
    if task == "segment":
        target[:, 0] = IGNORED
    mixed_target, bare = target.clone(), torch.tensor([False, True, False, True])
    mixed_target[bare] = torch.where(target[bare] == IGNORED, IGNORED, UNLABELLED)
    losses = {"task": task, "overlap": 0.7, "distillation": 2.0, "memory": memory}
    expected_labels = Loss(**{**losses, "distillation": 0.0, "overlap": 0.0})(scores[~bare], target[~bare])
    expected_distance = Loss(**{**losses, "entropy": 0.0, "overlap": 0.0})(scores, target, teacher)
    overlap = Loss(**{**losses, "entropy": 0.0, "distillation": 0.0})(scores[~bare], target[~bare])
    value = PartlyLabelled(**losses)(scores, mixed_target, teacher)
    torch.testing.assert_close(value, expected_labels / 2 + expected_distance + (overlap if task == "segment" else 0))
    torch.testing.assert_close(PartlyLabelled(**losses)(scores, target, teacher), Loss(**losses)(scores, target, teacher))


@pytest.mark.parametrize("task", ["segment", "classify"])
def test_loss_without_labels(task: str) -> None:
    side = (8, 8) if task == "segment" else ()
    scores, teacher = torch.randn(2, 3, *side, requires_grad=True), torch.randn(2, 3, *side)
    loss = PartlyLabelled(task=task, overlap=1.0, distillation=1.0)(scores, torch.full((2, *side), UNLABELLED), teacher)
    loss.backward()
    assert loss.item() > 0 and scores.grad is not None and scores.grad.isfinite().all() and scores.grad.abs().max() > 0


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no picture"):
        UnlabelledPictures(tmp_path, task="segment", channels=3, cache_bytes=1)


@pytest.fixture
def taught(tmp_path: Path, write_tiny: Callable[..., Any], write_scenes: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A data set whose labels lack the third class, a folder without labels that shows it, and a teacher that knows it."""
    tiny = write_tiny(
        tmp_path / "data",
        model={"name": "product_model:make", "options": {}},
        training={"steps": 60, "validate_every": 60, "checkpoint_every": 30, "batch_size": 4, "average": 0.9, "learning_rate": 0.01},
    )
    colors = [entry["color"] for entry in tiny.content["data"]["classes"]]
    for number, mask in enumerate(sorted((tiny.root / "train" / "masks").iterdir())):
        labels = np.zeros((48, 48), np.uint8)
        labels[8:30, number : number + 20] = 1
        noise = np.random.default_rng(number).normal(0, 20, (48, 48, 3))
        write_image(tiny.root / "train" / "images" / mask.name, np.clip(np.array(colors)[labels] + noise, 0, 255).astype(np.uint8))
        write_image(mask, labels)
    write_scenes(tiny.root / "more", "more", 6, 50)
    (tmp_path / "oracle_teacher.py").write_text(ORACLE.replace("{colors}", repr([list(color) for color in colors])))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "oracle_teacher", raising=False)
    return tiny


def train(tiny: Any, name: str, *overrides: str, **arguments: Any) -> FitResult:
    return fit(load_recipe(tiny.recipe, overrides), root=tiny.root, directory=tiny.root / name, **arguments)


TEACHER = ("teacher.model=oracle_teacher:make", "teacher.unlabelled=more/images")


def test_learning_without_labels(taught: Any) -> None:
    """From the teacher alone, on pictures without labels: better than from the few labels."""
    alone, student = train(taught, "alone"), train(taught, "student", *TEACHER, "teacher.share=1")
    assert any("6 pictures without labels, 4 of the 4 crops of a batch" in note for note in student.notes)
    assert student.validation[-1]["score"] > alone.validation[-1]["score"] + 0.1
    both = train(taught, "both", *TEACHER, "teacher.share=0.5", "teacher.weight=2")
    assert both.validation[-1]["score"] > alone.validation[-1]["score"] + 0.1


def tensors(result: FitResult) -> dict[str, Tensor]:
    return dict(read_checkpoint(result.checkpoint).tensors[AVERAGE])


@pytest.mark.parametrize("micro_batch", [4, 2])
def test_resumed_in_the_same_bits(taught: Any, micro_batch: int) -> None:
    words = (*TEACHER, "training.average=0", f"training.micro_batch={micro_batch}", "training.norm_group=2", "training.precision=fp32")
    steps = ("training.steps=6", "training.checkpoint_every=3", "training.validate_every=3", "training.learning_rate=0.0001")
    constant = ("training.final_learning_rate=0.0001", "training.warmup=0")
    whole = train(taught, "whole", *words, *steps, *constant)
    train(taught, "halves", *words, *steps, *constant, "training.steps=3")
    resumed = train(taught, "halves", *words, *steps, *constant, resume=True)
    one, other = tensors(whole), tensors(resumed)
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_no_row_without_labels(taught: Any) -> None:
    with pytest.raises(RecipeError, match="is no picture: raise either"):
        train(taught, "none", *TEACHER, "teacher.share=0.1")
