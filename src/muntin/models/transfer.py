"""Asynchronous, double-buffered copies: batches to a device and scores back while the device computes another batch.

    host              pageable -> pinned |  pageable -> pinned |  ...
    copy-in stream                       pinned -> device | ...
    compute stream                                         model | ...
    copy-out stream                                               device -> pinned | ...

On a CPU streams and events are no-ops, and nothing is copied.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BUFFERS = 2
"""Batches in flight: one in computation, one in a copy."""


@dataclass(frozen=True)
class _Flight:
    """A batch in flight. `inward` is held until the answer arrives, because the copy to the device reads it."""

    inward: Tensor
    scores: Tensor
    done: Any

    def land(self) -> NDArray[np.float32]:
        self.done.synchronize()
        landed: NDArray[np.float32] = self.scores.numpy()
        return landed


def pipelined(
    batches: Iterable[NDArray[np.uint8]], compute: Callable[[Tensor], Tensor], device: torch.device
) -> Iterator[NDArray[np.float32]]:
    """The answers to batches (B, H, W, C), in order, each a new array; `compute` maps a tensor on the device to one on the device."""
    module = torch.get_device_module(device)
    streams = module.Stream(), module.Stream()
    flights: deque[_Flight] = deque()
    for images_BHWC in batches:
        flights.append(_launch(images_BHWC, compute, device, streams))
        if len(flights) >= BUFFERS:
            yield flights.popleft().land()
    while flights:
        yield flights.popleft().land()


def _launch(images_BHWC: NDArray[np.uint8], compute: Callable[[Tensor], Tensor], device: torch.device, streams: tuple[Any, Any]) -> _Flight:
    module = torch.get_device_module(device)
    (copy_in, copy_out), computing = streams, module.current_stream()
    inward = torch.from_numpy(np.ascontiguousarray(images_BHWC))
    apart = device.type != "cpu"
    if apart:
        inward = inward.pin_memory()
    with module.stream(copy_in):
        images = inward.to(device, non_blocking=True)
    computing.wait_stream(copy_in)
    scores = compute(images)
    copy_out.wait_stream(computing)
    with module.stream(copy_out):
        answer = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True).copy_(scores, non_blocking=True) if apart else scores
        done = module.Event()
        done.record(copy_out)
    if apart:  # the allocator must not reuse memory that another stream still reads
        images.record_stream(computing)
        scores.record_stream(copy_out)
    return _Flight(inward, answer, done)
