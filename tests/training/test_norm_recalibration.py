from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from muntin.layers.norm import GROUP, MapNorm
from muntin.training.checkpoint import read_checkpoint
from muntin.training.distributed.stored_tensors import AVERAGE
from muntin.training.fitting import fit
from muntin.training.loop import LOG_EVERY
from muntin.training.norm_recalibration import renew_statistics
from muntin.training.precision import resolve_precision
from muntin.training.progress.report import FitProgress
from muntin.training.recipe import load_recipe

FP32 = resolve_precision("fp32", "cpu", begun=None)


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(3, momentum=0.01), lambda: nn.BatchNorm2d(3, momentum=None), lambda: MapNorm(3)])
def test_average_over_batches(make: Any) -> None:
    torch.manual_seed(0)
    norm = make()
    model = nn.Sequential(norm, nn.Dropout(0.5)).eval()
    batches = [torch.randint(0, 256, (GROUP, 3, 6, 5), dtype=torch.uint8) for _ in range(5)]
    momentum = norm.momentum
    renew_statistics(model, batches, FP32)
    images = torch.stack(batches).double()
    torch.testing.assert_close(norm.running_mean.double(), images.mean((0, 1, 3, 4)), rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_var.double(), images.transpose(1, 2).flatten(2).var(2).mean(0), rtol=1e-5, atol=0)
    assert (norm.momentum, norm.training, model[1].training) == (momentum, False, False)


def test_norms_restored_after_an_error() -> None:
    norm = nn.BatchNorm2d(3, momentum=0.01)
    model = nn.Sequential(norm).eval()
    with pytest.raises(RuntimeError, match="running_mean should contain 4"):
        renew_statistics(model, [torch.zeros(GROUP, 4, 2, 2)], FP32)
    assert (norm.momentum, norm.training) == (0.01, False)


def test_model_without_statistics() -> None:
    model = nn.Sequential(nn.LayerNorm(2), nn.BatchNorm1d(2, track_running_stats=False))
    renew_statistics(model, (pytest.fail("a batch was taken") for _ in range(1)), FP32)


class Frozen(nn.Sequential):
    """A model whose first norm stays in `eval` mode."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[0].eval()
        return self


def test_frozen_norms() -> None:
    model = Frozen(nn.BatchNorm2d(3), FrozenBatchNorm2d(3), nn.BatchNorm2d(3)).eval()
    before = copy.deepcopy(model.state_dict())
    renew_statistics(model, [torch.rand(GROUP, 3, 6, 5) * 255], FP32)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}
    assert not any(module.training for module in model.modules())


def slow_norms(*, task: str, classes: int, channels: int) -> nn.Module:
    """A model whose norm has a momentum of 0.001."""
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=1e-3), nn.ReLU(), nn.Conv2d(8, classes, 1))


@pytest.mark.parametrize("steps", [3, 30])
def test_short_training(tiny: Any, tmp_path: Path, steps: int) -> None:
    """A complete run, and one interrupted before the first validation."""
    options = [f"training.steps={steps}", "training.validate_every=100", "training.checkpoint_every=100", "model.options={}"]
    recipe = load_recipe(tiny.recipe, [*options, f"model.name={__name__}:slow_norms"])

    def stop(progress: FitProgress) -> None:
        if progress.kind == "step" and progress.step == LOG_EVERY:
            os.kill(os.getpid(), signal.SIGINT)

    result = fit(recipe, root=tiny.root, directory=tmp_path / "run", progress=stop)
    assert (result.step, len(result.validation)) == ((3, 1) if steps == 3 else (LOG_EVERY, 0))
    kept = read_checkpoint(result.checkpoint)
    variance = kept.tensors[AVERAGE]["1.running_var"]
    assert variance.median() > 10  # of pixels up to 255; it begins at 1, and three steps of a thousandth leave it near there
    trained = kept.tensors["model.safetensors"]["1.running_var"]
    assert (variance / trained).median() > 10


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x) + self.norm(x + 100)
        return out


class Past(nn.Module):
    """Calls its norm without hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm.forward(x)


def test_norm_called_without_hooks() -> None:
    model = Past().eval()
    renew_statistics(model, [torch.full((4, 1, 2, 2), 100.0)] * 4, FP32)
    assert model.norm.running_mean is not None and model.norm.running_mean.item() == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("batches", [1, 3])
def test_norm_called_twice(batches: int) -> None:
    model = Twice().eval()
    renew_statistics(model, [torch.zeros(4, 1, 2, 2)] * batches, FP32)
    assert model.norm.running_mean is not None
    assert model.norm.running_mean.item() == pytest.approx(50, rel=1e-5)
    assert not model.norm._forward_pre_hooks and model.norm.momentum == 0.1
