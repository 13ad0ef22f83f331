"""Whole matrices for Muon, of which each process holds some rows.

    rows of each matrix -> all-to-all -> whole matrices at their owners -> updates -> all-to-all -> rows of each update

Every matrix has one owner, and all matrices travel in one message there and one back. A process sends and receives its share of the
weights twice, and holds it twice meanwhile.

Axes: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from muntin.training.distributed.ranks import Ranks, spread


def rows_at(rows: int, index: int, count: int) -> slice:
    """The rows that process `index` of `count` holds, as `torch.chunk` cuts them."""
    each = -(-rows // count)
    return slice(min(rows, index * each), min(rows, (index + 1) * each))


class MatrixExchange:
    """Computes on whole matrices, each in one process. Owners are spread by the cost of an orthogonalisation."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks

    def __call__(self, parts_RC: list[Tensor], rows: list[int], compute: Callable[[list[Tensor]], list[Tensor]]) -> list[Tensor]:
        """The rows of `compute(matrices)`, for this process's rows of each matrix. `rows`: of each whole matrix."""
        count, index = self.ranks.count, self.ranks.index
        columns = [part.shape[1] for part in parts_RC]
        owners = spread([min(r, c) ** 2 * max(r, c) for r, c in zip(rows, columns, strict=True)], count)
        order = sorted(range(len(rows)), key=owners.__getitem__)
        own = [item for item in order if owners[item] == index]
        outgoing = [sum(parts_RC[item].numel() for item in order if owners[item] == other) for other in range(count)]
        sizes = [[_height(rows[item], other, count) * columns[item] for item in own] for other in range(count)]
        incoming = [sum(row) for row in sizes]
        sent = torch.cat([parts_RC[item].reshape(-1) for item in order])
        arrived = sent.new_empty(sum(incoming))
        dist.all_to_all_single(arrived, sent, incoming, outgoing)
        chunks = [torch.split(chunk, row) for chunk, row in zip(torch.split(arrived, incoming), sizes, strict=True)]
        whole = [torch.cat(pieces).view(-1, columns[item]) for pieces, item in zip(zip(*chunks, strict=True), own, strict=True)]
        updates = dict(zip(own, compute(whole), strict=True))
        cut = [updates[item][rows_at(rows[item], other, count)].reshape(-1) for other in range(count) for item in own]
        returned = torch.empty_like(sent)
        dist.all_to_all_single(returned, torch.cat(cut) if cut else arrived, outgoing, incoming)
        answers = dict(zip(order, torch.split(returned, [parts_RC[item].numel() for item in order]), strict=True))
        return [answers[item].view(part.shape) for item, part in enumerate(parts_RC)]


def _height(rows: int, index: int, count: int) -> int:
    held = rows_at(rows, index, count)
    return int(held.stop - held.start)
