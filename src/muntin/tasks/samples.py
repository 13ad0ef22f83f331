"""A picture with its target, in memory and in files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from muntin.images.opening import PictureFile, UInt8
from muntin.images.rasters import Raster

_CORNER = 4096


@dataclass(frozen=True, kw_only=True)
class Item:
    """The file of a picture, and its target: a file, or the value itself.

    `key` decides the split: the stem, below the folder of a class; in a shard the name of the entry.
    """

    key: str
    image: PictureFile
    target: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One picture, uint8 (H, W, C), and its target: what the task learns, as uint8 labels (H, W) with 255 = ignored, the number of a class,
    or the clean picture, uint8 (scale*H, scale*W, C). `degradation`: makes the picture from a clean one; None: it was given.

    The arrays may be read-only and shared with a cache: copy them before writing. Both may be rasters, which are read by window.
    """

    name: str
    image: UInt8 | Raster
    target: Any
    degradation: Callable[[UInt8, np.random.Generator], UInt8] | None = None

    @property
    def bytes(self) -> int:
        """Size of the arrays in memory, bytes."""
        return self.image.nbytes + (0 if isinstance(self.target, int) else self.target.nbytes)

    @property
    def corner(self) -> UInt8:
        """The picture; of a raster the upper left part of at most 4096 pixels a side."""
        return self.image[:_CORNER, :_CORNER] if isinstance(self.image, Raster) else self.image

    @property
    def labels(self) -> UInt8 | Raster:
        """The labels (H, W) of a segmentation sample."""
        if isinstance(self.target, int):
            raise TypeError("a classification sample has no labels (H, W): use its `target`, a class number")
        if self.restores:
            raise TypeError("a sample for restore has no labels (H, W): use its `clean` picture")
        labels: UInt8 | Raster = self.target
        return labels

    @property
    def restores(self) -> bool:
        """True for a sample of `restore`."""
        return isinstance(self.target, np.ndarray) and self.target.ndim == 3

    @property
    def clean(self) -> UInt8:
        """The clean picture (scale*H, scale*W, C) of a sample for `restore`."""
        if not isinstance(self.target, np.ndarray) or self.target.ndim != 3:
            raise TypeError("only a sample for restore has a clean picture")
        return self.target
