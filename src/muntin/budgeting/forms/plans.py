"""Forms of a layer (rank and bits), and plans: a form for each layer of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, order=True)
class Form:
    """A form of a Linear, Conv2d or Embedding: its rank, None if not factored, and the bits of its weight, 16 for floats."""

    rank: int | None
    bits: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The forms of all layers by dotted name, after `prune` has left `width` of the parameters (1: not pruned).

    `harm`: predicted rise of the loss on the calibration data. `cost`: predicted bytes, or milliseconds. `gap`: by which share of the cost
    a better plan may be possible; 0 if this one is proved to be the best.
    """

    width: float = 1.0
    forms: Mapping[str, Form] = field(default_factory=dict)
    harm: float = 0.0
    cost: float = 0.0
    gap: float = 0.0
