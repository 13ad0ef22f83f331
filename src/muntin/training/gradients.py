"""The gradient of one batch, in parts that fit into memory and over all processes: that of the whole batch, whatever the parts.

    one part        forward -> sums                        -> gradient by the sums -> backward
    several parts   forward of each, without gradients -> sums -> gradient by the sums -> forward and backward of each

The loss is a function of sums over the batch (`Loss`), so a part's gradient needs only the sums of all parts. Several parts cost a second
forward pass, unless the loss is a mean (no soft IoU): then each part's gradient is known before. Source of the two passes: Gao et al.,
"Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup" (2101.06983, section 3).

Random numbers of a part depend on the seed, the step and the part's first row, so both passes and a repeated step draw the same ones.

Axes: B images, C channels, H W map, S sums.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from muntin.training.loss import Loss
from muntin.training.precision import TrainingPrecision


class BatchGradient:
    """The rows of a batch that this process computes, `part` at a time. Call `forward` and then `backward`.

    `images`: `(B, C, H, W)`, uint8 or float, on any device; `first_row`: number of their first row in the whole batch.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[Tensor], Tensor],
        loss: Loss,
        precision: TrainingPrecision,
        teacher: nn.Module | None,
        *,
        images: Tensor,
        target: Tensor,
        part: int,
        seed: tuple[int, int],
        first_row: int = 0,
    ) -> None:
        self.model, self.call, self.loss, self.precision, self.teacher = model, call, loss, precision, teacher
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        starts = range(0, len(images), part)
        self.parts = [(first_row + start, images[start : start + part], target[start : start + part]) for start in starts]
        self.seed = seed
        self._sums_S: Tensor | None = None

    def totals(self, sums_S: Tensor | None) -> Tensor:
        """Counts of the loss in these rows. `sums_S`: what `forward` returned, which tells the number of classes."""
        classes = 0 if sums_S is None else (len(sums_S) - 2) // 2
        added: Tensor = torch.stack([self.loss.totals(target, classes) for _, _, target in self.parts]).sum(0)
        return added.to(self.precision.device)

    def forward(self) -> Tensor | None:
        """The sums of these rows, float64 `(S,)`; None if the gradient by them is known without them."""
        if len(self.parts) == 1:
            self._sums_S = self._sums(*self.parts[0])
            return self._sums_S.detach()
        if self.loss.linear:
            return None
        with torch.no_grad(), buffers_kept(self.model):
            return torch.stack([self._sums(*part) for part in self.parts]).sum(0)

    def backward(self, gradient_S: Tensor) -> Tensor:
        """Add to the parameters' gradients, for the gradient by the sums of all rows. Returns the sums of these rows."""
        if self._sums_S is not None:
            sums_S, self._sums_S = self._sums_S, None
            sums_S.backward(gradient_S)  # type: ignore[no-untyped-call]
            return sums_S.detach()
        added = []
        for part in self.parts:
            sums_S = self._sums(*part)
            sums_S.backward(gradient_S)  # type: ignore[no-untyped-call]
            added.append(sums_S.detach())
        return torch.stack(added).sum(0)

    def _sums(self, first_row: int, images: Tensor, target: Tensor) -> Tensor:
        seed_random(*self.seed, first_row)
        images = images.to(self.precision.device, self.dtype, memory_format=torch.channels_last)
        target = target.to(self.precision.device)
        with self.precision.autocast():
            scores = self.call(images)
        teacher_scores = None
        if self.teacher is not None:
            with torch.no_grad(), self.precision.autocast():
                teacher_scores = self.teacher(images)
        return self.loss.sums(scores, target, teacher_scores)


def seed_random(*numbers: int) -> None:
    """Seed the generators of Python, NumPy and PyTorch by numbers, as by one."""
    words = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(words[0])
    np.random.seed(words[1])
    torch.manual_seed(words[2])


@contextmanager
def random_kept() -> Iterator[None]:
    """Restore the CPU's generators of Python, NumPy and PyTorch after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers of a model, such as the statistics of its norms, after the block, which may also replace them."""
    kept = kept_buffers(model)
    try:
        yield
    finally:
        restore_buffers(model, kept)


def kept_buffers(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The buffers of a model by name, each with a copy, for `restore_buffers`."""
    return {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}


def restore_buffers(model: nn.Module, kept: dict[str, tuple[Tensor, Tensor]]) -> None:
    """Put back the buffers of a model: each is the same tensor as before, with the values of its copy."""
    with torch.no_grad():
        for name, (buffer, copied) in kept.items():
            buffer.copy_(copied)
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, buffer)
