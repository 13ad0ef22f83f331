"""PSNR and SSIM of a session that restores pictures, beside those of its input.

Whole pictures are computed in tiles, rounded and clipped to 0-255 like a deployed answer, and compared in all channels. A score is the mean
of those of the pictures. PSNR: 10 log10(255² / mean squared error), dB, at most `MOST_DB`. SSIM: torchmetrics' (Wang et al., "Image quality
assessment: from error visibility to structural similarity", 2004), a Gaussian window of 11 x 11 pixels with a standard deviation of 1.5,
over the pixels whose window lies in the picture; scikit-image's with `gaussian_weights` and `use_sample_covariance=False` is the same.

Axes: B images, H W map, C channels, N pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from muntin.artifact.answers import Task
from muntin.errors import DataError
from muntin.images.opening import UInt8
from muntin.tasks.restore.degradation import enlarged
from muntin.tasks.samples import Sample
from muntin.tasks.scores import RankTurns, TaskScores

MOST_DB = 100.0
"""PSNR of a picture without error, whose own is infinite."""
WINDOW = 11
"""Side of SSIM's window, pixels."""
BAND = 256
"""Rows whose SSIM is computed at once: its maps take about forty times the memory of the pictures."""


@dataclass(frozen=True, kw_only=True)
class RestoredScores(TaskScores):
    """Scores of a session. `input_psnr`, `input_ssim`: of its input, enlarged bicubically where the session enlarges.

    `ssim`, `input_ssim`: None if a picture is smaller than SSIM's window, or if they were not computed.
    """

    task: Task = "restore"
    psnr: float
    ssim: float | None
    input_psnr: float
    input_ssim: float | None

    @property
    def score(self) -> float:
        """PSNR, dB. Higher is better."""
        return self.psnr

    @property
    def figures(self) -> dict[str, Any]:
        return {"score": self.score, "by_class": {}, "psnr": self.psnr, "input_psnr": self.input_psnr}

    @property
    def notes(self) -> tuple[str, ...]:
        """A note on a session that makes pictures worse."""
        if self.psnr >= self.input_psnr:
            return ()
        return (f"the pictures are {self.input_psnr - self.psnr:.2f} dB worse than the input ({self.input_psnr:.2f} dB)",)

    def lines(self, scale: int) -> tuple[str, ...]:
        """SSIM, and the scores of the input."""
        shown = [("restored", self.psnr, self.ssim)]
        shown.append(("the input" if scale == 1 else "the input, enlarged bicubically", self.input_psnr, self.input_ssim))
        return tuple(f"{name}: PSNR {psnr:.2f} dB" + ("" if ssim is None else f", SSIM {ssim:.4f}") for name, psnr, ssim in shown)

    def report(self, scale: int) -> dict[str, Any]:
        name = "the input" if scale == 1 else f"bicubic enlargement by {scale}"
        return {"baseline": {"name": name, "score": self.input_psnr, "ssim": self.input_ssim, "deployed_ssim": self.ssim}}


def mean_scores(rows: Sequence[tuple[float, ...]], ranks: RankTurns | None = None) -> RestoredScores:
    """The means of `picture_scores`, of all processes. Raises `DataError` if there are none."""
    added = torch.tensor([*np.sum(rows, axis=0), len(rows)] if rows else [0.0] * 5, dtype=torch.float64)
    *sums, number = (added if ranks is None else ranks.sum(added)).tolist()
    if not number:
        raise DataError("nothing to score: the split has no pictures")
    psnr, ssim, input_psnr, input_ssim = (total / number for total in sums)
    return RestoredScores(
        samples=round(number), psnr=psnr, ssim=None if math.isnan(ssim) else ssim, input_psnr=input_psnr,
        input_ssim=None if math.isnan(input_ssim) else input_ssim,
    )  # fmt: skip


def psnr(image_HWC: UInt8, clean_HWC: UInt8) -> float:
    """PSNR of a picture, dB, at most `MOST_DB`."""
    squares = 0.0
    for top in range(0, len(clean_HWC), BAND):  # in bands, for the memory
        squares += float(np.square(image_HWC[top : top + BAND].astype(np.float32) - clean_HWC[top : top + BAND]).sum(dtype=np.float64))
    return min(MOST_DB, 10 * math.log10(255**2 * clean_HWC.size / squares)) if squares else MOST_DB


def ssim(image_HWC: UInt8, clean_HWC: UInt8) -> float:
    """SSIM of a picture; NaN for one that is smaller than the window."""
    height, width = clean_HWC.shape[:2]
    inside = height - WINDOW + 1
    if inside < 1 or width < WINDOW:
        return math.nan
    total, border = 0.0, WINDOW // 2  # torchmetrics continues pictures by mirroring: such windows do not count
    for top in range(0, inside, BAND):
        part = slice(top, min(top + BAND, inside) + WINDOW - 1)
        one, other = _batch(image_HWC[part]), _batch(clean_HWC[part])
        _, map_BCHW = structural_similarity_index_measure(one, other, data_range=255.0, return_full_image=True)
        total += float(map_BCHW[:, :, border:-border, border:-border].double().mean(1).sum())
    return float(total / (inside * (width - WINDOW + 1)))


def picture_scores(image_HWC: UInt8, sample: Sample, *, similarity: bool = True) -> tuple[float, float, float, float]:
    """PSNR and SSIM of a restored picture, and of its input; NaN where there is no SSIM."""
    given_HWC = enlarged(sample.image[:, :], sample.clean.shape[0] // sample.image.shape[0])
    psnrs = [psnr(picture, sample.clean) for picture in (image_HWC, given_HWC)]
    ssims = [ssim(picture, sample.clean) if similarity else math.nan for picture in (image_HWC, given_HWC)]
    return psnrs[0], ssims[0], psnrs[1], ssims[1]


def _batch(image_HWC: UInt8) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_HWC)).permute(2, 0, 1)[None].float()
