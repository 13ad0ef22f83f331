"""Compare the segmentation loss, whose gradient is written out, with the same formula in PyTorch's own operations and gradients.

    python benchmarks/losses.py [--threads 1] [--rounds 20] [--side 256] [--batch 8] [--classes 6]

One call is the loss (cross-entropy and soft IoU) and its gradient with respect to the scores, float32 in channels-last order, as they come
in training. Both kinds are called in turns in one process: `ms` is the median, `gain` the median over the rounds of plain over written
out. They must agree to a ten-thousandth in value and in gradient, or the benchmark ends with an error. Time: seconds. Run it alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from documents import Document, Row, Table, columns
from harness import Benchmark, Options, Run, main, option
from muntin.images import IGNORED
from muntin.training.loss import Loss


def plain_loss(scores: Tensor, target: Tensor) -> Tensor:
    counted = (target != IGNORED).unsqueeze(1)
    truth = F.one_hot(target.masked_fill(target == IGNORED, 0), scores.shape[1]).permute(0, 3, 1, 2) * counted
    probability = scores.softmax(1) * counted
    both, sizes = (probability * truth).sum((0, 2, 3)), truth.sum((0, 2, 3))
    losses = 1 - (both + 1) / (probability.sum((0, 2, 3)) + sizes - both + 1)
    return F.cross_entropy(scores, target, ignore_index=IGNORED) + losses[sizes > 0].mean()


def called(loss: Callable[[Tensor], Tensor], scores: Tensor) -> tuple[float, Tensor, Tensor]:
    """Milliseconds, the loss and its gradient."""
    started = time.perf_counter()
    value = loss(scores)
    (gradient,) = torch.autograd.grad(value, scores)
    return (time.perf_counter() - started) * 1e3, value.detach(), gradient


@dataclass(frozen=True, kw_only=True)
class LossesOptions(Options):
    threads: int = option(1, "threads of PyTorch", least=1)
    rounds: int = option(20, "timed calls", least=1)
    side: int = option(256, "side of the maps", least=8)
    batch: int = option(8, "maps", least=1)
    classes: int = option(6, "classes", least=1)


def rows(run: Run) -> Iterator[Row]:
    given = run.options
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    shape = (given.batch, given.classes, given.side, given.side)
    scores = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
    target = torch.randint(0, given.classes, (given.batch, given.side, given.side))
    target[:, :3] = IGNORED
    written, plain = partial(Loss(task="segment", overlap=1.0), target=target), partial(plain_loss, target=target)
    for one, other in zip(called(written, scores)[1:], called(plain, scores)[1:], strict=True):
        if (one - other).abs().max() > 1e-4 * other.abs().max():
            raise SystemExit("written out and plain do not agree")
    mine, theirs = zip(*((called(written, scores)[0], called(plain, scores)[0]) for _ in range(given.rounds)), strict=True)
    gain = median(p / w for w, p in zip(mine, theirs, strict=True))
    yield {"shape": shape, "threads": given.threads, "ms": median(mine), "plain_ms": median(theirs), "gain": gain}


def newest(document: Document) -> str:
    (row,) = document.rows
    times = f"{row['ms']:.0f} ms, by PyTorch's own operations {row['plain_ms']:.0f}: {row['gain']:.1f} times as fast"
    return f"the segmentation loss with its gradient written out {times}, threads: {row['threads']}"


BENCHMARK = Benchmark(
    name="losses", options=LossesOptions, measure=rows, newest=newest,
    about="Cross-entropy and soft IoU with their gradient, written out and in PyTorch's own operations (plain), in turns.",
    tables=(Table(columns=columns("shape, threads, ms:.1f, plain ms=plain_ms:.1f, gain:.2f")),),
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
