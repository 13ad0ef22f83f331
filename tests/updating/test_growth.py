"""New classes at the end of float and quantised models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from muntin.artifact.classes import ClassInfo
from muntin.compression import load_model, low_rank, prepare_qat
from muntin.compression.structure import structure_fields
from muntin.errors import CheckpointError
from muntin.models.compression_record import CompressionRecord
from muntin.training import Checkpoint, fit, read_checkpoint
from muntin.training.checkpoint import calibration_of, source_of
from muntin.updating.growth import classifier_tensors, grown_model

ADDED = (ClassInfo(name="tree", color=(1, 2, 3)), ClassInfo(name="road", color=(3, 2, 1)))


def more(checkpoint: Checkpoint) -> tuple[ClassInfo, ...]:
    return (*checkpoint.state.classes, *ADDED)


def check_grown(checkpoint: Checkpoint) -> torch.nn.Module:
    """The grown model's first scores are the old model's. Returns the grown model."""
    images = torch.randint(0, 256, (2, 3, 32, 40), generator=torch.Generator().manual_seed(0)).float()
    old, grown = load_model(checkpoint), grown_model(checkpoint, more(checkpoint))
    with torch.no_grad():
        before, after = old(images), grown(images)
    assert after.shape[1] == before.shape[1] + 2
    assert torch.allclose(after[:, : before.shape[1]], before, atol=1e-4 * float(before.abs().max()))
    return grown


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Any]) -> Checkpoint:
    """A hybrid model after a few steps; its last layer has several outputs a class."""
    root = tmp_path_factory.mktemp("hybrid")
    fit(write_tiny(root / "data").recipe, directory=root / "run")
    return read_checkpoint(root / "run")


def compressed(checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint with factored layers in quantisation-aware training, as a stage of compression writes it."""
    from safetensors.torch import save_file

    model, calibration = load_model(checkpoint), calibration_of(checkpoint, source_of(checkpoint))
    changes = [*low_rank(model, calibration, parameters=0.7, multiple=4), *prepare_qat(model, calibration, bits=4)]
    record = CompressionRecord(steps=1, origin="0", **structure_fields(model) | {"changes": tuple(changes)})
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "average.safetensors")
    tensors = type(checkpoint.tensors)(folder)
    return replace(checkpoint, tensors=tensors, state=checkpoint.state.model_copy(update={"compression": record}))


def test_float_model(hybrid: Checkpoint) -> None:
    check_grown(hybrid)
    old = classifier_tensors(load_model(hybrid), hybrid)
    assert set(old) == {"head.conv.weight", "head.conv.bias"}


def test_model_in_quantisation_aware_training(hybrid: Checkpoint, tmp_path: Path) -> None:
    checkpoint = compressed(hybrid, tmp_path / "stage")
    grown = check_grown(checkpoint)
    names = classifier_tensors(load_model(checkpoint), checkpoint)
    assert any(name.endswith("log_scale") for name in names)
    scales = {name: grown.get_parameter(name) for name in names if name.endswith("log_scale")}
    assert all(bool(scale.isfinite().all()) for scale in scales.values())
    assert structure_fields(grown)["ranks"] == checkpoint.state.compression.ranks  # type: ignore[union-attr]


def test_new_scores_are_seldom_the_highest(parent: Checkpoint) -> None:
    grown, sample = check_grown(parent), source_of(parent).split("test")[0]
    with torch.no_grad():
        labels = grown(torch.from_numpy(sample.image[:, :].copy()).permute(2, 0, 1)[None].float()).argmax(1)
    assert float((labels >= len(parent.state.classes)).float().mean()) < 0.05


def test_same_classes(hybrid: Checkpoint) -> None:
    same = grown_model(hybrid, hybrid.state.classes)
    assert all(map(torch.equal, same.state_dict().values(), load_model(hybrid).state_dict().values()))


def test_other_layers_that_depend_on_the_classes(parent: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "odd_growth.py").write_text(
        "from torch import nn\n"
        "def make(*, task, classes, channels):\n"
        "    return nn.Sequential(nn.Conv2d(channels, 4 * classes, 1), nn.Conv2d(4 * classes, classes, 1))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = parent.recipe.model.model_copy(update={"name": "odd_growth:make"})
    recipe = parent.recipe.model_copy(update={"model": model, "training": parent.recipe.training.model_copy(update={"steps": 1})})
    fit(recipe, directory=tmp_path / "run", root=parent.state.root)
    checkpoint = read_checkpoint(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"1\.weight has the shape .* only a last layer"):
        grown_model(checkpoint, more(checkpoint))
