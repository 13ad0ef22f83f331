"""The peak of memory of a block of work in training, beyond what is held before it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from muntin.runtime.host.memory import MemoryWatch, watch_memory
from muntin.training.memory.memory_format import return_freed_memory


@contextmanager
def watch_peak(device: str) -> Iterator[MemoryWatch]:
    """Measure around a block: `peak` is then its maximum beyond what was held before, in bytes; None where unknown.

    On CUDA, of allocated tensors; on a Linux CPU, of the process's resident memory, after freed memory was returned to the system.
    """
    if device != "cuda":
        return_freed_memory()
        with watch_memory() as watch:
            yield watch
        return
    watch = MemoryWatch()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield watch
    torch.cuda.synchronize()
    watch.held, watch.peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
