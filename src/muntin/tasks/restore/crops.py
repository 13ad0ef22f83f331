"""A training crop of `restore`: a window of the clean picture, and the same window degraded anew, or of the given degraded picture.

Axes: H, W rows and columns of a picture, S side of the window, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from muntin.images.opening import UInt8
from muntin.tasks.crops import Draw
from muntin.tasks.samples import Sample


def cut_pair(sample: Sample, place: Draw, recolored: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Make the input, uint8 (C, S, S), and its clean picture, uint8 (C, scale*S, scale*S).

    `recolored` changes the colours of a clean picture (C, H, W) before it is degraded; given pairs keep theirs.
    """
    clean_HWC = sample.clean
    scale = clean_HWC.shape[0] // sample.image.shape[0]
    clean_SSC = _flipped(_part(clean_HWC, place, scale), place)
    if sample.degradation is None:
        image_SSC = _flipped(_part(np.asarray(sample.image[:, :]), place, 1), place)
        return _tensor(image_SSC), _tensor(clean_SSC)
    clean_CSS = recolored(_tensor(clean_SSC))
    generator = np.random.default_rng(place.seed)
    image_SSC = sample.degradation(np.ascontiguousarray(clean_CSS.permute(1, 2, 0).numpy()), generator)
    return _tensor(image_SSC), clean_CSS


def _part(image_HWC: UInt8, place: Draw, scale: int) -> UInt8:
    """A copy of the window, whose numbers are in pixels of the input; a smaller picture is continued by mirroring."""
    top, left, side = (scale * number for number in (place.top, place.left, place.side))
    height, width = image_HWC.shape[:2]
    inside = image_HWC[max(0, top) : top + side, max(0, left) : left + side]
    around = [(max(0, -start), max(0, start + side - length)) for start, length in ((top, height), (left, width))]
    return np.pad(inside, (*around, (0, 0)), mode="symmetric") if any(map(any, around)) else inside.copy()


def _flipped(image_HWC: UInt8, place: Draw) -> UInt8:
    if place.flip_horizontal:
        image_HWC = image_HWC[:, ::-1]
    if place.flip_vertical:
        image_HWC = image_HWC[::-1]
    return image_HWC


def _tensor(image_HWC: UInt8) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image_HWC)).permute(2, 0, 1)
