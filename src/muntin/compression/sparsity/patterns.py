"""Patterns of zeros in a weight: N of M neighbouring inputs, or blocks of outputs and inputs. At each tap of a kernel alone.

Axes: O outputs, T taps of a kernel (1 of a Linear), I inputs.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from muntin.artifact.sparsity import BLOCKS, GROUPS, SMALLEST_BLOCK
from muntin.errors import MuntinError

_FORMS = re.compile(r"(?P<n>\d+):(?P<m>\d+)|block:(?P<rows>\d+)x(?P<columns>\d+)(:(?P<share>0?\.\d+))?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """At most `kept` of `group` neighbouring inputs are not zero; or a `share` of blocks of `rows` outputs and `group` inputs is zero.

    Of blocks, `kept` is 0.
    """

    kept: int
    group: int
    rows: int = 1
    share: float = 0.0

    @property
    def text(self) -> str:
        """The pattern as `parse_pattern` reads it: "2:4", "block:4x4:0.5"."""
        return f"{self.kept}:{self.group}" if self.kept else f"block:{self.rows}x{self.group}:" + f"{self.share:.4f}".rstrip("0")

    def misfit(self, weight: Tensor) -> str | None:
        """Why a weight (O, I, ...) cannot have the pattern; None if it can."""
        outputs, inputs = weight.shape[:2]
        if inputs % self.group:
            return f"{inputs} inputs are no multiple of {self.group}"
        return f"{outputs} outputs are no multiple of {self.rows}" if outputs % self.rows else None

    def mask(self, saliency_OTI: Tensor) -> Tensor:
        """The places that stay, bool, of the shape of the saliencies (>= 0): those with the largest, in each group or of all blocks."""
        O, T, I = saliency_OTI.shape  # noqa: E741 - the axes' letters
        if self.kept:
            groups = saliency_OTI.reshape(O, T, I // self.group, self.group)
            order = torch.argsort(groups, dim=-1, descending=True, stable=True)[..., : self.kept]
            return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, True).reshape(O, T, I)
        blocks = self._blocks(saliency_OTI).sum((1, 4))
        stay = torch.ones(blocks.numel(), dtype=torch.bool, device=blocks.device)
        stay[torch.argsort(blocks.flatten(), stable=True)[: self._zero_blocks(blocks.numel())]] = False
        spread = stay.reshape(blocks.shape)[:, None, :, :, None].expand(-1, self.rows, -1, -1, self.group)
        return spread.reshape(O, T, I)

    def held(self, weight: Tensor) -> Tensor | None:
        """The places of a weight (O, I, ...) that may change without leaving the pattern, bool; None if the pattern does not hold.

        In groups with fewer than `kept` values, the first zeros count as values.
        """
        if self.misfit(weight) is not None:
            return None
        weight_OTI = taps_first(weight.detach())
        if self.kept:
            mask = self.mask((weight_OTI != 0).to(torch.float32))
            return None if bool((weight_OTI[~mask] != 0).any()) else taps_last(mask, weight)
        filled = self._blocks((weight_OTI != 0).to(torch.float32)).amax((1, 4)) > 0
        if int((~filled).sum()) < self._zero_blocks(filled.numel()):
            return None
        spread = filled[:, None, :, :, None].expand(-1, self.rows, -1, -1, self.group)
        return taps_last(spread.reshape(weight_OTI.shape), weight)

    def _blocks(self, values_OTI: Tensor) -> Tensor:
        """(O / rows, rows, T, I / group, group)."""
        O, T, I = values_OTI.shape  # noqa: E741
        return values_OTI.reshape(O // self.rows, self.rows, T, I // self.group, self.group)

    def _zero_blocks(self, count: int) -> int:
        return math.floor(self.share * count + 1e-9)


def parse_pattern(text: str, share: float | None = None) -> Pattern:
    """Read "2:4", "4:8", another N:M, or blocks: "block:4x4" with `share` of them zero (0.5), or "block:4x4:0.5".

    Raises `MuntinError` for a pattern that the artefact does not record (N above M/2, other M or sides), and for a share that does not
    belong or is not between 0 and 1.
    """
    form = _FORMS.fullmatch(text) if isinstance(text, str) else None
    if form is None:
        raise MuntinError(f"pattern={text!r}: give N:M, such as '2:4', '4:8' or '1:4', or blocks, such as 'block:4x4' with a share")
    if form["n"] is not None:
        n, m = int(form["n"]), int(form["m"])
        if m not in GROUPS or not 0 < 2 * n <= m:
            raise MuntinError(f"pattern={text!r}: give N:M with M of {', '.join(map(str, GROUPS))}, and N from 1 to M/2")
        if share is not None:
            raise MuntinError(f"share={share!r}: {text} leaves {n / m:.0%} of the weights, leave it out; blocks have a share")
        return Pattern(kept=n, group=m)
    rows, columns = int(form["rows"]), int(form["columns"])
    if rows not in BLOCKS or columns not in BLOCKS or rows * columns < SMALLEST_BLOCK:
        sides = ", ".join(map(str, BLOCKS))
        raise MuntinError(f"pattern={text!r}: give blocks with sides of {sides}, of at least {SMALLEST_BLOCK} weights")
    share = share if share is not None else float(form["share"] or 0.5)
    if not 0 < round(share, 4) < 1:
        raise MuntinError(f"share={share!r}: give a share of zero blocks from 0.0001 to 0.9999")
    return Pattern(kept=0, group=columns, rows=rows, share=round(share, 4))


def taps_first(weight: Tensor) -> Tensor:
    """A weight (O, I) or (O, I, H, W) as (O, T, I)."""
    return weight.flatten(2).transpose(1, 2) if weight.ndim > 2 else weight[:, None]


def taps_last(weight_OTI: Tensor, like: Tensor) -> Tensor:
    """Inverse of `taps_first`, in the shape of `like`."""
    return weight_OTI.transpose(1, 2).reshape(like.shape)
