"""The ranks that a layer may get, with their parameters, multiply-adds and errors, and their choice under budgets, on plain numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from muntin.compression.allocation import Option, OutOfReachError, allocate
from muntin.errors import MuntinError

Values = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One form of a layer. `ranks`: empty: dense. `parameters`: weights and biases. `macs`: multiply-adds an image. `loss`: harm to the
    model's answer, >= 0, in a unit that adds up over layers."""

    ranks: tuple[int, ...] = ()
    parameters: int
    macs: float = 0.0
    loss: float = 0.0


def ladder(full: int, multiple: int) -> list[int]:
    """The ranks to choose from for a mode of rank `full`: multiples of `multiple` up to it, or `full` itself if it is smaller."""
    return list(range(multiple, full + 1, multiple)) or [full]


def choices(
    spectra: Sequence[Values],
    size: Callable[[tuple[int, ...]], tuple[int, float]],
    dense: Choice,
    *,
    multiple: int,
    scale: float = 1.0,
) -> list[Choice]:
    """A layer's choices: every combination of ranks that has fewer parameters than `dense`, and `dense`, last.

    `spectra`: for each mode, σ² of each component, descending. Loss: `scale` times the sum of σ² of the dropped components of all
    modes. `size`: parameters and multiply-adds of the layer at given ranks. Costs one step a combination.
    """
    tails = [np.append(np.cumsum(values[::-1])[::-1], 0.0) for values in spectra]  # tails[mode][r]: loss at rank r
    smaller = []
    for ranks in itertools.product(*(ladder(len(values), multiple) for values in spectra)):
        count, macs = size(ranks)
        if count < dense.parameters:
            loss = scale * sum(float(tail[rank]) for tail, rank in zip(tails, ranks, strict=True))
            smaller.append(Choice(ranks=ranks, parameters=count, macs=macs, loss=loss))
    return [*smaller, dense]


def rank_at(values: Values, threshold: float, multiple: int) -> int:
    """The least rank whose components have the share `threshold` of the sum of `values` (descending), rounded up to `multiple`."""
    total = float(values.sum())
    reached = np.cumsum(values) / total if total > 0 else np.ones(len(values))
    rank = int(np.searchsorted(reached, threshold - 1e-12)) + 1  # the last sum may round to just below 1
    return min(-(-rank // multiple) * multiple, len(values))


def largest_threshold(parameters: Callable[[float], int], budget: int) -> float:
    """The largest threshold, 0-1 to within 1e-9, at which the non-decreasing `parameters(threshold)` is within the budget.

    Raises `MuntinError` if even 0 is not.
    """
    if parameters(1.0) <= budget:
        return 1.0
    if parameters(0.0) > budget:
        raise _out_of_reach(parameters(0.0), parameters(1.0), budget)
    low, high = 0.0, 1.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if parameters(middle) <= budget else (low, middle)
    return low


def _out_of_reach(smallest: int, dense: int, budget: int) -> MuntinError:
    share = math.ceil(1e4 * smallest / dense) / 1e4
    return MuntinError(
        f"{budget:,} parameters are out of reach: at the smallest ranks {smallest:,} of {dense:,} are left, a share of {share:.4f}; "
        "allow that, or keep fewer layers, or a smaller multiple"
    )


def chosen_ranks(layers: Mapping[str, Sequence[Choice]], budget: int, *, macs: float | None = None, fixed: int = 0) -> dict[str, Choice]:
    """One choice a layer, with the least total loss under total parameters <= `budget`, of which other layers use `fixed`, and `macs`.

    Raises `MuntinError`, with the least possible share, for budgets that are out of reach.
    """

    def picked(options: Mapping[str, list[Option]], *limits: float) -> dict[str, Choice]:
        return {name: layers[name][index] for name, index in allocate(options, limits).picked.items()}

    def dense(key: str) -> float:
        return math.fsum(max(getattr(choice, key) for choice in options) for options in layers.values())

    room = budget - fixed
    try:
        if macs is None:
            return picked({name: [Option(c.loss, (c.parameters,)) for c in options] for name, options in layers.items()}, room)
        fewest = picked({name: [Option(c.macs, (c.parameters,)) for c in options] for name, options in layers.items()}, room)
    except OutOfReachError as error:
        raise _out_of_reach(fixed + int(error.least), fixed + int(dense("parameters")), budget) from error
    if (least := math.fsum(choice.macs for choice in fewest.values())) > macs:
        raise MuntinError(
            f"{macs:,.0f} multiply-adds are out of reach with {budget:,} parameters: {least:,.0f} of {dense('macs'):,.0f} are left at "
            "least; allow more of them, or keep fewer layers"
        )
    return picked({name: [Option(c.loss, (c.parameters, c.macs)) for c in options] for name, options in layers.items()}, room, macs)
