from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

import muntin
from model_helpers import pixels
from muntin.compression import hold_sparsity
from muntin.compression.sparsity.pattern import check_held, held_places, pattern_of, sparse_layers
from muntin.errors import MuntinError
from muntin.training.config import TrainingConfig
from muntin.training.optimizer import make_optimizer

BATCHES = [pixels(8, 4, 8, 8) for _ in range(2)]


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 8)).eval()


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
@pytest.mark.parametrize("trained", [False, True])
def test_zeros_stay_in_distillation(optimizer: str, pattern: str, trained: bool) -> None:
    """Also with Muon, which moves all weights of a matrix together, and in quantisation-aware training."""
    teacher = network()
    student = copy.deepcopy(teacher)
    muntin.sparsify(student, BATCHES, pattern=pattern)
    if trained:
        muntin.prepare_qat(student, BATCHES, bits=4)
    layers = sparse_layers(student)
    assert list(layers) == ["0", "5"]
    before = {name: (layer.get_parameter("weight").detach().clone(), held_places(layer)) for name, layer in layers.items()}
    muntin.distil(student, teacher, BATCHES, steps=4, optimizer=optimizer, precision="fp32")  # type: ignore[arg-type]
    for name, (weight, places) in before.items():
        after = layers[name].get_parameter("weight")
        assert places is not None and not after[~places].any()
        assert (after[places] != weight[places]).float().mean() > 0.9
    if trained:
        muntin.freeze(student, BATCHES)
    check_held(student)
    assert list(sparse_layers(student)) == ["0", "5"]


@pytest.mark.parametrize("optimizer", ["muon", "schedule-free"])
def test_own_loop(optimizer: str) -> None:
    model = network()
    muntin.sparsify(model, BATCHES, scores="magnitude")
    config = TrainingConfig(steps=3, optimizer=optimizer)  # type: ignore[arg-type]
    steps = make_optimizer(model, config)
    hold_sparsity(model, steps)
    for batch in BATCHES:
        model(batch).square().mean().backward()
        steps.step()
        steps.zero_grad()
        check_held(model)


def test_training_that_does_not_hold(tmp_path: Path) -> None:
    model = network()
    muntin.sparsify(model, BATCHES, pattern="1:4")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(BATCHES[0]).square().mean().backward()
    optimizer.step()
    calls = (
        lambda: muntin.save(model, tmp_path / "m"), lambda: hold_sparsity(model, optimizer),
        lambda: muntin.export(model, BATCHES[0], tmp_path / "a"), lambda: muntin.distil(model, network(), BATCHES, steps=1),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(MuntinError, match=r"layer '0' was given the pattern 1:4, and its weight does not have it any more"):
            call()
    changes = muntin.sparsify(model, BATCHES, pattern="1:4")
    assert [change.layer for change in changes if not change.kept] == ["0", "5"]
    muntin.save(model, tmp_path / "m")


def test_record_of_another_model(tmp_path: Path) -> None:
    model = network()
    muntin.sparsify(model, BATCHES)
    folder = muntin.save(model, tmp_path / "m")
    again = muntin.load_compressed(folder, network())
    assert {name: pattern_of(layer) for name, layer in sparse_layers(again).items()} == {
        name: pattern_of(layer) for name, layer in sparse_layers(model).items()
    }
    with pytest.raises(MuntinError, match="sparsity: '5' is no layer of the model"):
        muntin.load_compressed(folder, nn.Sequential(nn.Conv2d(4, 16, 3)))
