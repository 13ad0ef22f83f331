"""What a compression pass did to one layer, or why it left it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, kw_only=True)
class Change:
    """One layer under one pass. A pass returns one for each layer that it looked at: nothing is skipped silently."""

    layer: str
    """Dotted name in the model."""
    pass_: str
    """The pass: `fold`, `quantize`, ..."""
    done: str
    """What the layer is now, or `kept` where it was left as it was."""
    reason: str = ""
    """Why, for a layer that was kept."""
    note: str = ""
    """What makes what was done less certain."""
    ranks: tuple[int, ...] = ()
    """What a layer was factored to."""
    sqnr_db: float | None = None
    """Signal over noise of the layer's output after this pass, on calibration images, where the pass measured it."""

    @property
    def kept(self) -> bool:
        """True where the pass left the layer as it was."""
        return self.done == "kept"


Pass = Callable[[nn.Module], list[Change]]
"""A compression pass: rewrites the model it is given, returns what it changed and what it kept."""
