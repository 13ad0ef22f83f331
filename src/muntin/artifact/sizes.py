"""Heights and widths of images that a model takes."""

from __future__ import annotations

from math import lcm
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

LARGEST_SIDE = 1 << 20
"""Largest bound of a side, pixels."""
_Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]


class Sides(BaseModel):
    """Allowed heights, or widths, in pixels: the multiples of `multiple` from `min` to `max`. By default every side."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    min: _Side = 1
    max: _Side | None = None
    multiple: _Side = 1

    @model_validator(mode="after")
    def _has_a_side(self) -> Self:
        if self.max is not None and self.smallest > self.max:
            raise ValueError(f"no multiple of {self.multiple} from {self.min} to {self.max}: give bounds with one between them")
        return self

    @property
    def smallest(self) -> int:
        """The smallest allowed side."""
        return -(-self.min // self.multiple) * self.multiple

    @property
    def fixed(self) -> bool:
        """True if one side is allowed."""
        return self.max is not None and self.max < self.smallest + self.multiple

    @property
    def dim(self) -> int:
        """The only allowed side, -1 if there are several."""
        return self.smallest if self.fixed else -1

    @property
    def text(self) -> str:
        """The allowed sides in words: "224", "multiples of 32 from 64", "any"."""
        if self.fixed:
            return str(self.smallest)
        parts = [f"multiples of {self.multiple}"] if self.multiple > 1 else []
        parts += [f"from {self.smallest}"] if self.smallest > self.multiple or self.max is not None else []
        parts += [] if self.max is None else [f"to {self.max}"]
        return " ".join(parts) or "any"

    def takes(self, side: int) -> bool:
        """Return True for an allowed side."""
        return self.min <= side and side % self.multiple == 0 and (self.max is None or side <= self.max)

    def at_least(self, side: int) -> int:
        """Return the smallest allowed side from `side` up, or the largest of all."""
        up = -(-max(side, self.min) // self.multiple) * self.multiple
        return up if self.max is None else min(up, self.max // self.multiple * self.multiple)

    def at_most(self, side: int) -> int:
        """Return the largest allowed side up to `side`, or the smallest of all."""
        return max(self.smallest, (side if self.max is None else min(side, self.max)) // self.multiple * self.multiple)

    def cover(self, other: Sides) -> bool:
        """Return True if every side of `other` is allowed."""
        if other.fixed:
            return self.takes(other.smallest)
        bounded = self.max is None or (other.max is not None and other.at_most(other.max) <= self.max)
        return bounded and self.min <= other.smallest and other.multiple % self.multiple == 0


class Sizes(BaseModel):
    """Allowed sizes of images. By default every size."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    height: Sides = Sides()
    width: Sides = Sides()

    @classmethod
    def only(cls, height: int, width: int) -> Self:
        """Return the sizes of a model of one size."""
        return cls(height=Sides(min=height, max=height), width=Sides(min=width, max=width))

    @classmethod
    def both(cls, *, min: int = 1, max: int | None = None, multiple: int = 1) -> Self:
        """Return sizes with the same sides for height and width."""
        sides = Sides(min=min, max=max, multiple=multiple)
        return cls(height=sides, width=sides)

    @property
    def fixed(self) -> bool:
        """True if one size is allowed."""
        return self.height.fixed and self.width.fixed

    @property
    def every(self) -> bool:
        """True if every size is allowed."""
        return self == Sizes()

    @property
    def dims(self) -> tuple[int, int]:
        """Height and width, -1 where it is free."""
        return self.height.dim, self.width.dim

    @property
    def text(self) -> str:
        """The allowed sizes in words: "224 x 224", "height and width multiples of 32 from 64", "every size"."""
        if self.every:
            return "every size"
        if self.fixed:
            return f"{self.height.text} x {self.width.text}"
        if self.height == self.width:
            return f"height and width {self.height.text}"
        return f"height {self.height.text} and width {self.width.text}"

    def takes(self, height: int, width: int) -> bool:
        """Return True for an allowed size."""
        return self.height.takes(height) and self.width.takes(width)

    def at_least(self, height: int, width: int) -> tuple[int, int]:
        """Return the smallest allowed size that is not below a given one; the largest sides where there is none."""
        return self.height.at_least(height), self.width.at_least(width)

    def at_most(self, height: int, width: int) -> tuple[int, int]:
        """Return the largest allowed size that is not above a given one; the smallest sides where there is none."""
        return self.height.at_most(height), self.width.at_most(width)

    def square(self, side: int) -> int | None:
        """Return the side of the largest allowed square up to `side`, else of the smallest one. None if no square is allowed."""
        height, width = self.height, self.width
        most = min((bound for bound in (height.max, width.max) if bound is not None), default=None)
        try:
            common = Sides(min=max(height.min, width.min), max=most, multiple=lcm(height.multiple, width.multiple))
        except ValidationError:
            return None
        return common.at_most(side)

    def cover(self, other: Sizes) -> bool:
        """Return True if every size of `other` is allowed."""
        return self.height.cover(other.height) and self.width.cover(other.width)


GOLDEN_SIDE = 48
"""Largest height and width of the golden images, pixels; larger where the model takes no smaller ones."""


def golden_sizes(height: int, width: int, sizes: Sizes = Sizes()) -> tuple[tuple[int, int], ...]:  # noqa: B008 - immutable
    """Return one or two allowed sizes, at most height x width where that is possible.

    The second one is odd if odd sides are allowed, which reveals a size that was fixed in the model.
    """
    height, width = min(GOLDEN_SIDE, height), min(GOLDEN_SIDE, width)
    return tuple(dict.fromkeys((sizes.at_least(height, width), sizes.at_least(height * 5 // 8 | 1, width * 7 // 8 | 1))))
