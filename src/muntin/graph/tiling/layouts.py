"""Layouts of the tensors of a graph over the picture, from their shapes for two pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import numpy as np

from muntin.artifact.tile_plan import MapLayout, MapTensor, TokenCount

PictureSize = tuple[int, int]
AxisLengths = tuple[int, ...]
_STRIDES = sorted(range(1, 257), key=lambda stride: (stride & (stride - 1) != 0, stride))
"""Powers of two first."""
_TYPES = {"float32": 4, "float16": 2, "uint8": 1, "int8": 1}


class Layouts:
    """The layouts of tensors. `shapes`: of each tensor for each of two `sizes` (H, W) of one picture."""

    def __init__(
        self, sizes: Sequence[PictureSize], shapes: Sequence[Mapping[str, AxisLengths]], types: Mapping[str, np.dtype[Any]]
    ) -> None:
        self._sizes, self._shapes, self._types = sizes, shapes, types
        self._known: dict[str, MapTensor | None] = {}

    def of(self, name: str) -> MapTensor | None:
        """The layout of a tensor, None where it is none of those that can be cut."""
        if name not in self._known:
            self._known[name] = self._find(name)
        return self._known[name]

    def shape(self, name: str) -> AxisLengths:
        """Shape for the first picture."""
        return self._shapes[0][name]

    def shapes(self, name: str) -> list[AxisLengths]:
        """Shape for each picture."""
        return [shapes[name] for shapes in self._shapes]

    def varies(self, name: str) -> bool:
        """True if the shape depends on the picture's size."""
        return len(set(self.shapes(name))) > 1

    def varying_axes(self, name: str) -> set[int]:
        """Axes whose length depends on the picture's size."""
        first, second = self.shapes(name)
        return {axis for axis, (a, b) in enumerate(zip(first, second, strict=True)) if a != b}

    def bytes_per_pixel(self, name: str) -> float:
        """Bytes of a tensor for each pixel of the picture."""
        tensor = self.of(name)
        assert tensor is not None
        return tensor.channels * _TYPES[tensor.dtype] * (tensor.scale / tensor.stride) ** 2

    def count(self, name: str, tokens: Sequence[int]) -> TokenCount | None:
        """The layout of a number of tokens, from the numbers for the two pictures."""
        for window in (None, *sorted({tensor.window for tensor in self._known.values() if tensor is not None and tensor.window})):
            for stride in _STRIDES:
                count = TokenCount(name=name, stride=stride, window=window)
                if all(count.tokens(*size) == number for size, number in zip(self._sizes, tokens, strict=True)):
                    return count
        return None

    def _find(self, name: str) -> MapTensor | None:
        shapes = self.shapes(name)
        kind = str(self._types.get(name, ""))
        if kind not in _TYPES or not self.varies(name):
            return None
        first = shapes[0]
        if len(first) == 4 and first[0] == 1:
            if shapes[0][1] == shapes[1][1] and (found := self._map(name, kind, "channels first", [s[2:] for s in shapes], first[1])):
                return found
            return self._map(name, kind, "channels last", [s[1:3] for s in shapes], first[3]) if first[3] == shapes[1][3] else None
        if len(first) != 3 or first[2] != shapes[1][2]:
            return None
        if first[0] == 1:
            return self._fitting(name, kind, "tokens", first[2], shapes, None)
        side = isqrt(first[1])
        same = first[1] == shapes[1][1] and side > 1 and side * side == first[1]
        return self._fitting(name, kind, "windows", first[2], shapes, side) if same else None

    def _map(self, name: str, kind: str, layout: MapLayout, sides: Sequence[AxisLengths], channels: int) -> MapTensor | None:
        for scale in range(2, 17):
            if all(side == (scale * size[0], scale * size[1]) for side, size in zip(sides, self._sizes, strict=True)):
                return MapTensor(name=name, dtype=kind, channels=channels, stride=1, scale=scale, layout=layout)  # type: ignore[arg-type]
        shapes = [(1, channels, *side) if layout == "channels first" else (1, *side, channels) for side in sides]
        return self._fitting(name, kind, layout, channels, shapes, None)

    def _fitting(
        self, name: str, kind: str, layout: MapLayout, channels: int, shapes: Sequence[AxisLengths], window: int | None
    ) -> MapTensor | None:
        for stride in _STRIDES:
            tensor = MapTensor(name=name, dtype=kind, channels=channels, stride=stride, layout=layout, window=window)  # type: ignore[arg-type]
            if all(tensor.shape(*size) == shape for size, shape in zip(self._sizes, shapes, strict=True)):
                return tensor
        return None
