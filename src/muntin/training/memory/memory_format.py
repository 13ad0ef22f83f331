"""Memory in training: the order of tensors, and freed memory in the C library."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT = 1 << 30
"""Bytes: larger tensors are returned at once (with older glibc those from 32 MiB)."""
_RETURNED = 1 << 20
"""Bytes: larger tensors are returned at once where memory is not kept."""
_DEFAULTS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""Maximum of glibc's dynamic thresholds, bytes (malloc.c, DEFAULT_MMAP_THRESHOLD_MAX)."""


def channels_last(model: nn.Module) -> None:
    """Put the kernels of 2-D convolutions into channels-last order, in place.

    `Module.to(memory_format=...)` raises an error for 3-D convolutions.
    """

    def ordered(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor

    model._apply(ordered)  # type: ignore[no-untyped-call]


@contextmanager
def keep_freed_memory(keep: bool = True) -> Iterator[None]:
    """Keep freed memory in the process during the block, for reuse, and return it to the system at the end; `keep` False: at once.

    By default glibc returns a large tensor to the system when it is freed, and the next step maps the memory again. Kept memory falls into
    pieces, so a process with a bound on its memory should not keep it. Does nothing with another C library, or if `GLIBC_TUNABLES` or
    `MALLOC_...` is set in the environment.
    """
    if platform.libc_ver()[0] != "glibc" or any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        yield
        return
    libc = ctypes.CDLL(None)
    largest = _KEPT if keep else _RETURNED
    if not libc.mallopt(_MMAP_THRESHOLD, largest):  # older versions accept no more than their own maximum
        libc.mallopt(_MMAP_THRESHOLD, _DEFAULTS[_MMAP_THRESHOLD])
    libc.mallopt(_TRIM_THRESHOLD, largest)
    try:
        yield
    finally:
        for option, default in _DEFAULTS.items():
            libc.mallopt(option, default)
        return_freed_memory()


def return_freed_memory() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
