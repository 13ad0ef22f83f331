"""The plan of exact tiles: in which passes a picture of any size is computed in parts, with the answer of one call.

A pass computes parts of the model's graph over tiles of the picture, between tensors that are kept for the whole picture: maps, in a file,
and whole-picture values, such as a maximum or a sum over all tokens, in memory. Names are those of tensors of `model.onnx`, in the form of
`muntin.runtime.exact_tiles.parts`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Name = Annotated[str, Field(min_length=1, max_length=512)]
PlanNumber = Annotated[int, Field(ge=1, le=1 << 20)]
MapLayout = Literal["channels first", "channels last", "tokens", "windows"]


class _PlanModel(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _cells(pixels: int, stride: int, window: int | None) -> int:
    cells = -(-pixels // stride)
    return cells if window is None else -(-cells // window) * window


class MapTensor(_PlanModel):
    """A tensor with a cell for every `stride` x `stride` pixels of the picture, rounded up; with `scale`, cells for each pixel instead.

    `layout`: (1, C, h, w), (1, h, w, C), (1, h * w, C), or windows of `window` x `window` cells, (windows, window², C), rows first; the
    last windows of rows and columns are filled up.
    """

    name: Name
    dtype: Literal["float32", "float16", "uint8", "int8"]
    channels: PlanNumber
    stride: PlanNumber
    scale: PlanNumber = 1
    layout: MapLayout
    window: PlanNumber | None = None

    @property
    def step(self) -> int:
        """Pixels between places at which the tensor can be cut."""
        return self.stride * (self.window or 1)

    def cells(self, pixels: int) -> int:
        """Number of cells along a side of some pixels, with those that fill up the last window."""
        return _cells(pixels * self.scale, self.stride, self.window)

    def shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape for a picture, or a part of one, of some pixels."""
        h, w, C = self.cells(height), self.cells(width), self.channels
        if self.layout == "channels first":
            return (1, C, h, w)
        if self.layout == "channels last":
            return (1, h, w, C)
        if self.window is None:
            return (1, h * w, C)
        return ((h // self.window) * (w // self.window), self.window**2, C)


class WholeValue(_PlanModel):
    """A tensor of one fixed shape that tiles contribute to: their sum, the greatest, or the mean by cells of `stride` pixels."""

    name: Name
    merge: Literal["sum", "max", "mean"]
    shape: Annotated[tuple[PlanNumber, ...], Field(max_length=8)]
    stride: PlanNumber = 1


class TokenCount(_PlanModel):
    """A number of tokens that the graph computes with: the shape, of one entry, that `name` holds; `stride` and `window` as of a map."""

    name: Name
    stride: PlanNumber
    window: PlanNumber | None = None

    def tokens(self, height: int, width: int) -> int:
        """The number for a whole picture of some pixels."""
        return _cells(height, self.stride, self.window) * _cells(width, self.stride, self.window)


class TilePass(_PlanModel):
    """One walk over the picture. Reads maps, "images" among them, and whole-picture values; gives maps and contributions to values.

    `step`: pixels; tiles and their surroundings begin at multiples of it. `halo`: pixels of surroundings that a tile's answer depends on,
    above and left, below and right; multiples of `step`, 0 where values are given.
    """

    maps: tuple[Name, ...]
    values: tuple[Name, ...] = ()
    gives_maps: tuple[Name, ...] = ()
    gives_values: tuple[Name, ...] = ()
    step: PlanNumber
    halo: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (0, 0)


class TilePlan(_PlanModel):
    """The passes in their order. The last one gives "scores".

    `softmaxes`: outputs of the softmaxes over the whole picture, which are rewritten (`runtime.exact_tiles.parts`).
    """

    maps: tuple[MapTensor, ...]
    values: tuple[WholeValue, ...] = ()
    counts: tuple[TokenCount, ...] = ()
    softmaxes: tuple[Name, ...] = ()
    passes: Annotated[tuple[TilePass, ...], Field(min_length=1, max_length=512)]
