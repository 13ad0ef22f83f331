"""Batches made ahead of the training step by worker threads, and the share of the time that training waits for them.

A batch is made by one worker from its step alone, and batches are handed out in the order of their steps: their content does not depend on
the number of workers. Threads suffice, since decoders, copies and resizing release Python's lock. Each worker computes on one core:
torchvision's small operations get slower when torch spreads them over threads that the training step uses too.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from muntin.runtime.host.hardware import usable_cores
from muntin.text import count

ImageBatch = tuple[Tensor, Tensor]
CORES_PER_WORKER, MAX_WORKERS = 4, 8
"""Workers beside training on a CPU, whose cores it needs itself; beside a GPU there is one for each core but one. At most 8."""
_START_S = 60.0
"""Seconds in which all workers have to begin; a machine that allows no more threads is an error, not a wait without end."""
WAITING_TOO_LONG, FEWEST_STEPS = 0.2, 20
"""Share of the time spent waiting above which advice is given, and the steps before which none is."""


class BatchFeed:
    """The batches of a training loop, made ahead by `workers` threads (None: by cores), and the share of the time spent waiting for them.

    The first step, before which no batch can be ready, is not counted. `device` as of `prefetch`.
    """

    def __init__(self, workers: int | None, *, device: str) -> None:
        self.workers, self._device = worker_count(workers, device=device), device
        self._steps, self._waited, self._total = 0, 0.0, 0.0
        self._logged = (0.0, 0.0)
        self._requested = self._received = 0.0

    def batches(self, make: Callable[[int], ImageBatch], start: int, stop: int) -> Generator[tuple[int, ImageBatch]]:
        """`prefetch` with this feed's workers. The loop calls `end_step` after each step."""
        return prefetch(make, start, stop, workers=self.workers, device=self._device, receive=self._receive)

    def _receive(self, batch: Future[Any]) -> Any:
        self._requested = time.perf_counter()
        result = batch.result()
        self._received = time.perf_counter()
        return result

    def end_step(self) -> None:
        """Count a step. What follows before the next batch is requested, such as a validation, is not counted."""
        self._steps += 1
        if self._steps > 1:
            self._waited += self._received - self._requested
            self._total += time.perf_counter() - self._requested

    @property
    def waiting(self) -> float | None:
        """Share of the steps' time spent waiting for batches, 0 to 1; None before the second step."""
        return self._waited / self._total if self._total else None

    def recent_waiting(self) -> dict[str, float]:
        """The share of the steps since the last call as {"waiting": share}; empty if there are none."""
        (waited, total), self._logged = self._logged, (self._waited, self._total)
        return {"waiting": (self._waited - waited) / (self._total - total)} if self._total > total else {}

    def advice(self) -> tuple[str, ...]:
        """A note if training waited for more than a fifth of the time in at least 20 steps."""
        if self.waiting is None or self.waiting <= WAITING_TOO_LONG or self._steps < FEWEST_STEPS:
            return ()
        cores = usable_cores()
        more = f"set data.workers to {min(cores, 2 * self.workers)} ({cores} cores are usable), " if self.workers < cores else ""
        return (
            f"training waited for its batches {self.waiting:.0%} of the time ({count(self.workers, 'worker')}): {more}raise data.cache_mib "
            "so that all decoded pictures fit, or store the pictures smaller",
        )


def worker_count(requested: int | None, *, device: str, cores: int | None = None) -> int:
    """Number of workers: the recipe's `data.workers`, or, if unset, a number that suits the device and the usable cores.

    Processes of one run on this machine, which torchrun counts in LOCAL_WORLD_SIZE, share its cores.
    """
    if requested is not None:
        return requested
    processes = os.environ.get("LOCAL_WORLD_SIZE", "")
    cores = usable_cores() // (int(processes) if processes.isdecimal() and int(processes) else 1) if cores is None else cores
    return min(MAX_WORKERS, max(1, cores // CORES_PER_WORKER if device == "cpu" else cores - 1))


def prefetch(
    make: Callable[[int], ImageBatch],
    start: int,
    stop: int,
    *,
    workers: int = 1,
    depth: int | None = None,
    device: str = "cpu",
    receive: Callable[[Future[Any]], Any] = Future.result,
) -> Generator[tuple[int, ImageBatch]]:
    """Yield (step, `make(step)`) for the steps from `start` to `stop` - 1, made at most `depth` batches ahead (by default `workers` + 1).

    With `device` "cuda" the batches lie on the current GPU. The workers end with the loop, within the time of one batch, also after `break`
    or an error. An iterator that is kept in a variable must be closed (`contextlib.closing`). An error in a worker is raised where
    its batch is taken. `receive`: waits for the result of a worker.
    """
    depth = workers + 1 if depth is None else depth
    copies = _DeviceCopies(torch.device("cuda", torch.cuda.current_device())) if device == "cuda" else None
    threads, ready = torch.get_num_threads(), threading.Barrier(workers, timeout=_START_S)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread adopts the count at its first query: query it before the count of the others is restored
        if copies is not None:
            copies.use_device()
        ready.wait()  # so that each worker begins once

    def make_and_send(step: int) -> Any:
        return make(step) if copies is None else copies.send(make(step))

    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="muntin-prefetch") as pool:
        for begun in [pool.submit(begin) for _ in range(workers)]:
            begun.result()
        # PyTorch keeps a thread count for each thread and one for threads that have not computed yet: restore the latter.
        torch.set_num_threads(threads)
        pending: deque[Future[Any]] = deque()
        following = start
        try:
            for step in range(start, stop):
                while following < stop and len(pending) < depth:
                    pending.append(pool.submit(make_and_send, following))
                    following += 1
                batch = receive(pending.popleft())
                yield step, batch if copies is None else copies.receive(batch)
        finally:
            for future in pending:
                future.cancel()


class _DeviceCopies:
    """Copies batches to a GPU from page-locked memory, on a stream of its own, while the GPU computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._module = device, torch.get_device_module(device)
        self._stream = self._module.Stream()

    def use_device(self) -> None:
        """Make the GPU the current one of this thread."""
        self._module.set_device(self._device)

    def send(self, batch: ImageBatch) -> tuple[ImageBatch, Any]:
        """Begin to copy. PyTorch reuses the page-locked memory only after the copy has ended."""
        images, target = (tensor.pin_memory() for tensor in batch)
        with self._module.stream(self._stream):
            moved = images.to(self._device, non_blocking=True), target.to(self._device, non_blocking=True)
            done = self._module.Event()
            done.record(self._stream)
        return moved, done

    def receive(self, sent: tuple[ImageBatch, Any]) -> ImageBatch:
        """The batch on the GPU, whose next operations wait for the copy."""
        moved, done = sent
        computing = self._module.current_stream()
        computing.wait_event(done)
        for tensor in moved:
            tensor.record_stream(computing)  # so that its memory is not reused before the step has read it
        return moved
