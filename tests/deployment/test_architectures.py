"""Small networks of other packages: exported in INT8, verified, and compared with PyTorch.

`benchmarks/architectures.py` does the same with many more, at their own sizes. Axes: B images, C channels, H W map, K scores.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import muntin

LEAST_DB = 12.0
"""Signal over noise of the scores without their mean over the pictures. Without training rounding costs more than with it."""
COVERED = 0.95
"""Share of the multiply-adds in integers."""
SIZES = {
    "timm:test_byobnet": 64,
    "timm:test_nfnet": 64,
    "timm:test_mambaout": 64,
    "timm:test_vit": 96,
    "timm:edgenext_xx_small": 64,
    "torchvision:squeezenet1_1": 64,
    "smp:FPN:tu-test_convnext": 64,
}
"""Sources and sides. Networks that answer one grey level of noise with noise, as many do without training, have no place here."""


ALWAYS = ("timm:test_vit", "smp:FPN:tu-test_convnext")
"""A transformer and a segmenter; `make soak` has the others."""


def as_trained(model: nn.Module, pictures: Tensor) -> nn.Module:
    """Set the statistics of batch norms to those of pictures, and scales of (nearly) zero, which switch branches off, to others."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("bias") and parameter.squeeze().ndim <= 1 and float(parameter.abs().max()) < 0.01:
                parameter.uniform_(0.2, 0.6)
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        model(pictures)
    return model.eval()


def pictures_of(count: int, side: int, seed: int) -> NDArray[np.uint8]:
    """Return pictures (B, H, W, 3) with coarse and fine parts, as photographs have them: a fine part is fainter."""
    random = torch.Generator().manual_seed(seed)
    octaves = [torch.rand(count, 3, cells, cells, generator=random) / cells**0.5 for cells in (2, 4, 8, 16, 32)]
    pixels = sum(nn.functional.interpolate(octave, (side, side), mode="bilinear") for octave in octaves)
    assert isinstance(pixels, Tensor)
    low, high = pixels.amin((1, 2, 3), keepdim=True), pixels.amax((1, 2, 3), keepdim=True)
    return (255 * (pixels - low) / (high - low)).round().byte().permute(0, 2, 3, 1).contiguous().numpy()


def decibels(exact_BK: NDArray[np.float32], scores_BK: NDArray[np.float32]) -> float:
    mean = exact_BK.mean((0, *range(2, exact_BK.ndim)), keepdims=True)
    return float(10 * np.log10(np.square(exact_BK - mean).sum() / np.square(exact_BK - scores_BK).sum()))


@pytest.mark.slow
@pytest.mark.parametrize("source", [source if source in ALWAYS else pytest.param(source, marks=pytest.mark.soak) for source in SIZES])
def test_architecture(source: str, tmp_path: Path) -> None:
    if source.startswith("smp:"):
        pytest.importorskip("segmentation_models_pytorch")
    side = SIZES[source]
    opened = muntin.open_model(source, size=side, classes=12)
    calibration = [torch.from_numpy(pictures_of(16, side, seed)).permute(0, 3, 1, 2).float() for seed in range(2)]
    model = as_trained(opened.model.eval(), torch.cat(calibration))
    artifact = muntin.export(
        model, calibration[0], tmp_path / "artifact", calibration=calibration, signature=opened.signature, sizes="fixed"
    )
    result = muntin.verify(artifact.path)
    assert result.passed, result.problems
    assert not result.fallbacks
    assert artifact.manifest.measured["integer_coverage"] >= COVERED
    held_out = pictures_of(8, side, 9)
    with torch.no_grad():
        exact_BK = model(torch.from_numpy(held_out).permute(0, 3, 1, 2).float()).numpy()
    session = muntin.load(artifact.path, cache=False)
    assert decibels(exact_BK, np.concatenate([session(image[None]) for image in held_out])) >= LEAST_DB
