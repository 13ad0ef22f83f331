"""Training that goes on with new data."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from muntin.compression import load_model
from muntin.errors import CheckpointError
from muntin.images import write_image
from muntin.models import TorchSession
from muntin.tasks.classes import ClassSpec
from muntin.training import Checkpoint, fit, parse_recipe, read_checkpoint
from muntin.training.checkpoint import source_of
from muntin.training.evaluation import evaluate, tile_of
from muntin.training.fitting import broken_off
from muntin.updating.learner import base_steps, hidden_classes, learn
from muntin.updating.update import plan_update
from muntin.updating.update_data import NEW, UpdatePlan, of_kind, read_listing
from products import product

CLASSIFIER = """
from torch import nn

class Small(nn.Sequential):
    def forward(self, x):
        return super().forward(x / 128 - 1)

def make(*, task, classes, channels):
    return Small(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
"""
TREE = (ClassSpec(name="tree", value=7),)


def plan_of(parent: Checkpoint, folder: Path, added: tuple[ClassSpec, ...] = (), **config: Any) -> UpdatePlan:
    return plan_update(parent.path, folder, added=added, overrides=[f"update.{key}={value}" for key, value in config.items()])


def weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return dict(load_model(checkpoint).state_dict())


def score(checkpoint: Checkpoint, samples: Any) -> float:
    """Mean IoU, or accuracy, of a checkpoint's model."""
    session = TorchSession(load_model(checkpoint), checkpoint.signature)
    return evaluate(session, samples, tile=tile_of(checkpoint.recipe.data.crop)).score


def test_new_class_is_learned_and_old_ones_stay(parent: Checkpoint, write_new: Callable[..., Path], tmp_path: Path) -> None:
    plan = plan_of(parent, write_new(relabel={2: 7}), TREE, share=0.5, learning_rate=0.01)  # roofs are called trees from now on
    naive = learn(plan_of(parent, tmp_path / "new", TREE, share=0.5, learning_rate=0.01, strategy="naive"), tmp_path / "naive")
    learned = learn(plan, tmp_path / "replay")
    state = learned.checkpoint.state
    assert learned.finished and [entry.name for entry in state.classes] == ["sea", "field", "roof", "tree"]
    assert state.update is not None and state.update.parent == parent.state.weights and state.update.added == ("tree",)
    assert state.step == 75 and base_steps(learned.checkpoint) == 150 and broken_off(learned.checkpoint) == ()
    old = source_of(parent).split("test")
    before, kept, forgotten = (score(one, old) for one in (parent, learned.checkpoint, naive.checkpoint))
    assert kept > forgotten + 0.1 and kept > before - 0.35
    assert set(np.unique(source_of(learned.checkpoint).split("test")[0].labels[:, :])) <= {0, 1, 2, 3, 255}


def test_killed_update_ends_in_the_same_bits(parent: Checkpoint, write_new: Callable[..., Path], tmp_path: Path) -> None:
    plan = plan_of(parent, write_new(), share=0.08)  # 12 steps, a checkpoint every 3
    whole = learn(plan, tmp_path / "whole")
    part = learn(plan, tmp_path / "part").checkpoint.path.parent
    shutil.rmtree(part / "step-00000012")
    resumed = learn(plan, tmp_path / "part")
    assert resumed.checkpoint.state.step == 12
    assert all(map(torch.equal, weights(whole.checkpoint).values(), weights(resumed.checkpoint).values()))
    other = plan_of(parent, tmp_path / "new", share=0.1)
    with pytest.raises(CheckpointError, match="other data or settings"):
        learn(other, tmp_path / "part")


@pytest.mark.parametrize(("strategy", "added"), [("frozen", TREE), ("frozen", ()), ("joint", ()), ("naive", ())])
def test_baselines(parent: Checkpoint, write_new: Callable[..., Path], tmp_path: Path, strategy: str, added: Any) -> None:
    folder = write_new(relabel={2: 7} if added else None)
    learned = learn(plan_of(parent, folder, added, share=0.04, strategy=strategy), tmp_path / "update")
    assert learned.finished and learned.checkpoint.state.step == (150 if strategy == "joint" else 6)
    before, after = weights(parent), weights(learned.checkpoint)
    learnable = {name: value for name, value in before.items() if name.endswith((".weight", ".bias"))}
    same = {name for name, value in learnable.items() if torch.equal(after[name][: len(value)], value)}
    last = {"6.weight", "6.bias"}
    assert same == ((learnable.keys() if added else learnable.keys() - last) if strategy == "frozen" else set())


def test_update_of_an_update_leaves_known_pictures_out(parent: Checkpoint, write_new: Callable[..., Path], tmp_path: Path) -> None:
    first = learn(plan_of(parent, write_new(), share=0.02), tmp_path / "first")
    both = plan_of(first.checkpoint, write_new("more", seed=1200), share=0.02)
    second = learn(both, tmp_path / "second")
    listing = read_listing(tmp_path / "second")
    assert second.finished and listing is not None and len(listing.known) == 24
    assert second.checkpoint.state.update is not None and second.checkpoint.state.update.parent == first.checkpoint.state.weights


def test_hidden_classes(parent: Checkpoint, write_new: Callable[..., Path]) -> None:
    plan = plan_of(parent, write_new(), background="sea", confidence=0.51)
    sample = plan.new.split("train")[0]
    truth = sample.labels[:, :]
    unlabelled = np.where(truth == 1, 0, truth).astype(np.uint8)  # fields were not drawn
    relabel = hidden_classes(plan)
    found, judged = (relabel(sample.image[:, :], unlabelled, judging) for judging in (False, True))
    hidden = (truth == 1) & (unlabelled == 0)
    assert (found[hidden] == 1).mean() > 0.5 and (found[truth == 0] == 0).mean() > 0.9
    assert (judged[hidden] == 255).mean() > 0.5 and (judged[truth == 2] == 2).all()
    with pytest.raises(CheckpointError, match="no class 'ground'"):
        hidden_classes(plan_of(parent, plan.new.folder, background="ground"))


@pytest.fixture(scope="module")
def small() -> Checkpoint:
    """A candidate of a compression."""
    return read_checkpoint(product("compressed") / "run" / "compressed" / "trials" / "001")


def test_compressed_model_keeps_ranks_and_bits(small: Checkpoint, tmp_path: Path, write_new: Callable[..., Path]) -> None:
    record = small.state.compression
    learned = learn(plan_of(small, write_new(relabel={2: 7}), TREE, share=0.05, choice="herding"), tmp_path / "update")
    after = learned.checkpoint.state.compression
    assert record is not None and after is not None and learned.finished
    assert after.ranks == record.ranks and after.qat == record.qat and base_steps(small) == base_steps(learned.checkpoint) == 150
    assert broken_off(learned.checkpoint) == ()
    assert load_model(learned.checkpoint)(torch.zeros(1, 3, 32, 32)).shape == (1, 4, 32, 32)


def test_classifier_learns_a_class_of_its_own_folder(tmp_path: Path) -> None:
    """Beside it: a class that the memory is too small for, one without pictures, and pictures of one name in subfolders."""
    generator = np.random.default_rng(0)

    def write(folder: Path, color: int, count: int) -> None:
        folder.mkdir(parents=True)
        for number in range(count):
            picture = np.clip(generator.normal((color, 255 - color, 100), 15, (24, 20, 3)), 0, 255).astype(np.uint8)
            write_image(folder / f"{folder.name}-{number}.png", picture)

    for name, color, count in (("dark", 30, 16), ("light", 220, 16), ("rare", 175, 4)):
        write(tmp_path / "old" / name, color, count)
    for name, color in (("dark", 40), ("middle", 128)):
        write(tmp_path / "new" / name, color, 12)
    twins = [tmp_path / "new" / "dark" / place / "new-dark-0.png" for place in ("", "2024", "2025")]
    for number, path in enumerate(twins):
        path.parent.mkdir(exist_ok=True)
        write_image(path, np.full((20, 20, 3), (40, 215, 100 + number), np.uint8))
    recipe = {
        "task": "classify", "data": {"source": "folders", "images": "old", "crop": 16}, "model": {"name": "classifier_of_updates:make"},
        "training": {"steps": 60, "batch_size": 8, "learning_rate": 0.01, "threads": 1, "precision": "fp32"},
    }  # fmt: skip
    (tmp_path / "classifier_of_updates.py").write_text(CLASSIFIER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        fit(parse_recipe(recipe, where="test"), directory=tmp_path / "run", root=tmp_path)
        parent = read_checkpoint(tmp_path / "run")
        added = (ClassSpec(name="middle"), ClassSpec(name="none"))
        plan = plan_of(parent, tmp_path / "new", added, share=4, learning_rate=0.02, features=0, memory=2)
        result = learn(plan, tmp_path / "update")
        learned, listing = result.checkpoint, read_listing(tmp_path / "update")
        assert [entry.name for entry in learned.state.classes] == ["dark", "light", "rare", "middle", "none"]
        assert listing is not None and listing.old["train"] == 3 and listing.unseen == ("none",)  # one of each old class
        assert any("no picture to train with shows none" in note for note in result.notes)
        files = [path.name for path in (tmp_path / "update" / "data").rglob(f"{NEW}*.png")]
        assert len(files) == sum(listing.new.values()) == 12 + 12 + 3
        assert {"new-new-dark-0.png", "new-2024--new-dark-0.png", "new-2025--new-dark-0.png", "new-dark-0.png"} <= set(files)
        old, new = source_of(parent).split("test"), of_kind(source_of(learned).split("test"), NEW)
        assert score(learned, old) > 0.9 and score(learned, new) > 0.9
