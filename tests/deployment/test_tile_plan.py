"""Exact tiles of exported models: the answer of one call, at any size and tile. Those of hybrids: `test_hybrid.py`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

import muntin
from muntin.artifact.manifest import render_manifest
from muntin.artifact.store import MANIFEST
from muntin.deployment.tile_plan import plan_fault
from muntin.errors import ArtifactError


class Convolutions(nn.Module):
    """Strided and dilated convolutions, pooling, a bilinear enlargement and, with `excite`, gates from the mean of the whole picture."""

    def __init__(self, excite: bool) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        self.wide = nn.Conv2d(8, 8, 3, padding=4, dilation=4, groups=8)
        self.gate = nn.Conv2d(8, 8, 1) if excite else None
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.wide(self.down(x / 255)))
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True) * 9))
        y = F.interpolate(y, scale_factor=4, mode="bilinear")
        return self.head(y)[:, :, : x.shape[2], : x.shape[3]]


SERIAL: dict[str, Any] = {
    "stem": (8, 16), "pairs": (0,), "dims": (32,), "depths": (1,), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16,
    "block": "serial", "fusion": "upernet",
}  # fmt: skip
MODELS: dict[str, Callable[[], nn.Module]] = {
    "restoring serial blocks": lambda: muntin.create_model("hybrid-xs", task="restore", scale=2, options=SERIAL),
    "convolutions": lambda: Convolutions(excite=False),
    "excitation": lambda: Convolutions(excite=True),
}


@pytest.fixture(scope="module", params=[pytest.param("restoring serial blocks", marks=pytest.mark.slow), "convolutions", "excitation"])
def exported(request: pytest.FixtureRequest, lively: Any, export_model: Any) -> Any:
    return export_model(lively(MODELS[request.param]()), quantized=False, sizes="any")


@pytest.mark.parametrize(("height", "width", "tile"), [(203, 331, 64), (64, 300, 100), (1, 1, 1), (5, 700, 128)])
def test_answer_of_one_call(exported: Any, height: int, width: int, tile: int, assert_exact_tiles: Callable[..., None]) -> None:
    assert_exact_tiles(exported.artifact, height, width, tile)


@pytest.mark.parametrize("exported", ["convolutions"], indirect=True)
def test_export_finds_missing_surroundings(exported: Any, pictures: Any, tmp_path: Path) -> None:
    path, plan, picture = tmp_path / "artifact", exported.artifact.manifest.tile_plan, pictures(1, 96, 96, 3)[0]
    shutil.copytree(exported.artifact.path, path)
    assert plan is not None and plan_fault(path, plan, picture) is None
    passes = tuple(walk.model_copy(update={"halo": (walk.step, walk.step)}) for walk in plan.passes)
    narrow = exported.artifact.manifest.model_copy(update={"tile_plan": plan.model_copy(update={"passes": passes})})
    (path / MANIFEST).write_bytes(render_manifest(narrow)[1])
    assert "tiles differ from one call" in str(plan_fault(path, plan, picture))


class PairsOfTokens(nn.Module):
    """Attention of every token with every other one, or a product without a softmax."""

    def __init__(self, softmax: bool, stride: int) -> None:
        super().__init__()
        self.softmax, self.stride = softmax, stride

    def forward(self, x: Tensor) -> Tensor:
        t_BNC = F.avg_pool2d(x, self.stride).flatten(2).transpose(1, 2) / 255
        weights_BNN = t_BNC @ t_BNC.transpose(1, 2)
        y_BNC = (weights_BNN.softmax(-1) if self.softmax else weights_BNN.relu() / 100) @ t_BNC
        y_BCHW = y_BNC.transpose(1, 2).reshape(x.shape[0], 3, x.shape[2] // self.stride, -1)
        return y_BCHW.repeat_interleave(self.stride, 2).repeat_interleave(self.stride, 3)


@pytest.mark.parametrize(
    ("softmax", "stride", "reason"),
    [
        (True, 8, "is attention between all pairs of tokens"),
        pytest.param(False, 2, "too much for a plan", marks=pytest.mark.soak),
    ],
)
def test_model_without_a_plan(softmax: bool, stride: int, reason: str, export_model: Any) -> None:
    assert_no_plan(export_model(PairsOfTokens(softmax, stride), quantized=False, sizes={"multiple": stride}), reason)


@pytest.mark.usefixtures("group_norms")
def test_group_norm_has_no_plan(export_model: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
    assert_no_plan(export_model(model, quantized=False, sizes="any"), "whole picture")


def assert_no_plan(exported: Any, reason: str) -> None:
    assert exported.artifact.manifest.tile_plan is None
    session = muntin.load(exported.artifact.path, shapes=(), cache=False)
    with pytest.raises(ArtifactError, match=reason):
        muntin.predict(session, np.zeros((64, 64, 3), np.uint8), exact=True)
