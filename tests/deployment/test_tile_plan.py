"""Exact tiles of exported models: the answer of one call, at any size and tile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

import muntin
from muntin.artifact import Artifact
from muntin.artifact.manifest import render_manifest
from muntin.artifact.store import MANIFEST
from muntin.deployment.tile_plan import plan_fault
from muntin.errors import ArtifactError, DataError

SMALL: dict[str, Any] = {
    "stem": [8, 8, 16], "dims": [32, 32], "depths": [1, 1], "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "pairs": [1, 1],
}  # fmt: skip
ONE_STAGE: dict[str, Any] = {"dims": [32], "depths": [1]}
"""A second stage adds half of the time of an export."""


def smooth(height: int, width: int, seed: int = 0) -> Tensor:
    """A picture (1, 3, H, W) of blots, as pictures have them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=generator) * 255
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(0, 255)


def pixels(height: int, width: int) -> NDArray[np.uint8]:
    picture: NDArray[np.uint8] = smooth(height, width)[0].permute(1, 2, 0).numpy().astype(np.uint8)
    return picture


def lively(model: nn.Module) -> nn.Module:
    """The model with weights of a size at which every branch counts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5)
        model.train()
        for seed in range(2):
            model(smooth(96, 96, seed).repeat(8, 1, 1, 1))
    return model.eval()


def hybrid(**options: Any) -> nn.Module:
    return lively(muntin.create_model("hybrid-xs", task="segment", classes=5, options={**SMALL, **options}))


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


MODELS: dict[str, Any] = {
    "hybrid": hybrid,
    "restoring serial blocks": lambda: lively(
        muntin.create_model("hybrid-xs", task="restore", scale=2, options={**SMALL, **ONE_STAGE, "block": "serial", "fusion": "upernet"})
    ),
    "convolutions": lambda: lively(Convolutions(excite=False)),
    "excitation": lambda: lively(Convolutions(excite=True)),
}


@pytest.fixture(scope="module", params=[*MODELS, "integers"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    name, path = request.param, tmp_path_factory.mktemp("exact") / "artifact"
    model = MODELS[name]() if name in MODELS else hybrid(**ONE_STAGE)
    return muntin.export(
        model, smooth(96, 96), path, calibration=[smooth(96, 96, seed) for seed in range(3)] if name == "integers" else None
    )


@pytest.mark.parametrize(("height", "width", "tile"), [(203, 331, 64), (64, 300, 100), (1, 1, 1), (5, 700, 128)])
def test_answer_of_one_call(exported: Artifact, height: int, width: int, tile: int) -> None:
    assert exported.manifest.plan is not None, exported.manifest.measured
    session = muntin.load(exported.path, precision="f32", shapes=(), engine="onnxruntime", cache=False)
    picture = pixels(height, width)
    whole, tiled = (muntin.predict(session, picture, output="scores", **how) for how in ({}, {"exact": True, "tile": tile}))
    assert tiled.shape == whole.shape
    if exported.manifest.integers:
        assert (tiled.argmax(0) == whole.argmax(0)).mean() >= 0.9999
    else:
        np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-5 * whole.std() + 1e-6)
    if session.signature.task == "segment":
        assert (muntin.predict(session, picture, exact=True, tile=tile) == tiled.argmax(0)).all()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Any:
    model = hybrid(**ONE_STAGE, attention="global")
    artifact = muntin.export(model, smooth(96, 96), tmp_path_factory.mktemp("exact") / "artifact")
    return muntin.load(artifact.path, precision="f32", shapes=(), cache=False)


def test_export_finds_missing_surroundings(tmp_path: Path) -> None:
    artifact = muntin.export(lively(Convolutions(excite=False)), smooth(96, 96), tmp_path / "artifact")
    plan = artifact.manifest.plan
    assert plan is not None and plan_fault(artifact.path, plan, pixels(96, 96)) is None
    passes = tuple(walk.model_copy(update={"halo": (walk.step, walk.step)}) for walk in plan.passes)
    narrow = artifact.manifest.model_copy(update={"plan": plan.model_copy(update={"passes": passes})})
    (artifact.path / MANIFEST).write_bytes(render_manifest(narrow)[1])
    assert "tiles differ from one call" in str(plan_fault(artifact.path, plan, pixels(96, 96)))


def test_openvino(session: Any) -> None:
    steps: list[tuple[int, int]] = []
    tiled = muntin.predict(session, pixels(150, 170), output="scores", exact=True, tile=64, progress=lambda *done: steps.append(done))
    whole = muntin.predict(session, pixels(150, 170), output="scores")
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-5 * whole.std())
    assert steps == [(number + 1, steps[-1][1]) for number in range(len(steps))]
    assert len(steps) == steps[-1][1]


class PairsOfTokens(nn.Module):
    """Attention of every token with every other one, or a product without a softmax."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.softmax = softmax

    def forward(self, x: Tensor) -> Tensor:
        t_BNC = F.avg_pool2d(x, 2).flatten(2).transpose(1, 2) / 255
        weights_BNN = t_BNC @ t_BNC.transpose(1, 2)
        y_BNC = (weights_BNN.softmax(-1) if self.softmax else weights_BNN.relu() / 100) @ t_BNC
        return y_BNC.transpose(1, 2).reshape(x.shape[0], 3, x.shape[2] // 2, -1).repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: PairsOfTokens(softmax=True), "is attention between all pairs of tokens"),
        pytest.param(lambda: PairsOfTokens(softmax=False), "too much for a plan", marks=pytest.mark.soak),
    ],
)
def test_model_without_a_plan(make: Any, reason: str, tmp_path: Path) -> None:
    assert_no_plan(make(), reason, tmp_path)


@pytest.mark.usefixtures("group_norms")
def test_group_norm_has_no_plan(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1))
    assert_no_plan(model, "whole picture", tmp_path)


def assert_no_plan(model: nn.Module, reason: str, tmp_path: Path) -> None:
    artifact = muntin.export(model, smooth(64, 64), tmp_path / "artifact")
    assert artifact.manifest.plan is None
    session = muntin.load(artifact.path, shapes=(), cache=False)
    with pytest.raises(ArtifactError, match=reason):
        muntin.predict(session, pixels(64, 64), exact=True)


def test_arguments(session: Any) -> None:
    with pytest.raises(DataError, match="exact tiles share no pixels"):
        muntin.predict(session, pixels(64, 64), exact=True, overlap=4)
    with pytest.raises(DataError, match="give a whole number of pixels from 1"):
        muntin.predict(session, pixels(64, 64), exact=True, tile=0)
