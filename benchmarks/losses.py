"""Compare the segmentation loss, whose gradient is written out, with the same formula in PyTorch's own operations and gradients.

    python benchmarks/losses.py [--threads 1] [--rounds 20] [--side 256] [--batch 8] [--classes 6] [--json]

One call is the loss (cross-entropy and soft IoU) and its gradient with respect to the scores, float32 in channels-last order, as they come
in training. Both kinds are called in turns in one process: `ms` is the median, `gain` the median over the rounds of plain over written
out. They must agree to a ten-thousandth in value and in gradient, or the benchmark ends with an error. Time: seconds. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.images import IGNORED
from muntin.runtime import describe_hardware
from muntin.training.loss import segment_loss

Loss = Callable[[Tensor], Tensor]


def plain_loss(scores: Tensor, target: Tensor) -> Tensor:
    counted = (target != IGNORED).unsqueeze(1)
    truth = F.one_hot(target.masked_fill(target == IGNORED, 0), scores.shape[1]).permute(0, 3, 1, 2) * counted
    probability = scores.softmax(1) * counted
    both, sizes = (probability * truth).sum((0, 2, 3)), truth.sum((0, 2, 3))
    losses = 1 - (both + 1) / (probability.sum((0, 2, 3)) + sizes - both + 1)
    return F.cross_entropy(scores, target, ignore_index=IGNORED) + losses[sizes > 0].mean()


def called(loss: Loss, scores: Tensor) -> tuple[float, Tensor, Tensor]:
    """Milliseconds, the loss and its gradient."""
    started = time.perf_counter()
    value = loss(scores)
    (gradient,) = torch.autograd.grad(value, scores)
    return (time.perf_counter() - started) * 1e3, value.detach(), gradient


def measure(scores: Tensor, target: Tensor, rounds: int) -> dict[str, Any]:
    def written(scores: Tensor) -> Tensor:
        return segment_loss(scores, target, 1.0)

    def plain(scores: Tensor) -> Tensor:
        return plain_loss(scores, target)

    for one, other in zip(called(written, scores)[1:], called(plain, scores)[1:], strict=True):
        if (one - other).abs().max() > 1e-4 * other.abs().max():
            raise SystemExit("written out and plain do not agree")
    times = [(called(written, scores)[0], called(plain, scores)[0]) for _ in range(rounds)]
    mine, theirs = zip(*times, strict=True)
    return {"ms": median(mine), "plain_ms": median(theirs), "gain": median(p / w for w, p in times)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("threads", 1), ("rounds", 20), ("side", 256), ("batch", 8), ("classes", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    shape = (given.batch, given.classes, given.side, given.side)
    scores = torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()
    target = torch.randint(0, given.classes, (given.batch, given.side, given.side))
    target[:, :3] = IGNORED
    row = measure(scores, target, given.rounds)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    hardware = {**describe_hardware(), "created": created}
    if given.json:
        print(json.dumps({"benchmark": "losses", "shape": shape, "threads": given.threads, **row, "hardware": hardware}, indent=1))
        return
    print(f"{row['ms']:.1f} ms, plain {row['plain_ms']:.1f} ms: {row['gain']:.2f} times as fast")
    print(f"{'x'.join(map(str, shape))}, {given.threads} threads; {hardware['cpu']}, torch {hardware['torch']}; {created}")


if __name__ == "__main__":
    main()
