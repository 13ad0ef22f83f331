"""Tensors of a whole picture in a file without a name, of which tiles read and write their part.

The file is mapped for each access only, so that what it holds does not count as memory of the process. It vanishes with the process.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact.tile_plan import MapTensor

PixelBox = tuple[int, int, int, int]
"""(top, left, bottom, right) in pixels of the picture."""


class StoredMap:
    """A tensor of the whole picture, as (C, h, w), or as (rows of windows, columns, window², C)."""

    def __init__(self, tensor: MapTensor, height: int, width: int, folder: Path | None) -> None:
        self.tensor = tensor
        h, w, window = tensor.cells(height), tensor.cells(width), tensor.window
        self._shape = (tensor.channels, h, w) if window is None else (h // window, w // window, window**2, tensor.channels)
        self._dtype = np.dtype(tensor.dtype)
        self._file = tempfile.TemporaryFile(dir=folder, prefix="muntin-")  # noqa: SIM115 - open until `close`
        self._file.truncate(max(1, self.nbytes))

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return map_bytes(self._shape, self._dtype)

    def close(self) -> None:
        """Give the disk's space back."""
        self._file.close()

    def _mapped(self) -> NDArray[Any]:
        return np.memmap(self._file, self._dtype, "r+", 0, self._shape)

    def _place(self, box: PixelBox) -> tuple[slice, slice]:
        """The cells of a box, which begins at a multiple of `step`."""
        top, left, bottom, right = box
        unit = self.tensor.window or 1
        rows, columns = (
            slice(self._begin(low) // unit, -(-self.tensor.cells(high) // unit)) for low, high in ((top, bottom), (left, right))
        )
        return rows, columns

    def _begin(self, pixels: int) -> int:
        return pixels * self.tensor.scale // self.tensor.stride

    def read(self, box: PixelBox) -> NDArray[Any]:
        """The part of a box in the layout of the graph."""
        rows, columns = self._place(box)
        shape = self.tensor.shape(box[2] - box[0], box[3] - box[1])
        stored = self._mapped()
        if self.tensor.window is not None:
            return np.array(stored[rows, columns]).reshape(shape)
        part_Chw = stored[:, rows, columns]
        if self.tensor.layout == "channels first":
            return np.array(part_Chw)[None]
        return np.ascontiguousarray(part_Chw.transpose(1, 2, 0)).reshape(shape)

    def write(self, box: PixelBox, part: NDArray[Any], inner: PixelBox) -> None:
        """Write a tile's answer for `box`; of it the part of `inner`."""
        rows, columns = self._place(inner)
        first_row, first_column = (self._begin(pixels) // (self.tensor.window or 1) for pixels in box[:2])
        own = (slice(rows.start - first_row, rows.stop - first_row), slice(columns.start - first_column, columns.stop - first_column))
        stored = self._mapped()
        h, w = (self.tensor.cells(high - low) for low, high in ((box[0], box[2]), (box[1], box[3])))
        if (window := self.tensor.window) is not None:
            stored[rows, columns] = part.reshape(h // window, w // window, window**2, -1)[own]
        elif self.tensor.layout == "channels first":
            stored[:, rows, columns] = part[0][:, *own]
        else:
            stored[:, rows, columns] = part.reshape(h, w, -1)[own].transpose(2, 0, 1)


def map_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """Bytes of an array."""
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
