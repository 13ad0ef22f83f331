"""How the C library treats memory that training frees: it asks for the same tensors again in the next step."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_KEPT = 1 << 30
"""Bytes: larger tensors are still given back at once (with older glibcs those from 32 MiB)."""
_USUAL = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
"""Where glibc's own thresholds end in a process that has freed large blocks (malloc.c, DEFAULT_MMAP_THRESHOLD_MAX)."""


@contextmanager
def keep_freed_memory() -> Iterator[None]:
    """Inside the block, freed memory stays with the process and is used again; at its end it goes back to the system.

    By itself glibc returns a large tensor to the system when it is freed, and has the next one's pages mapped and cleared anew: millions of
    page faults in a minute of training. The peak stays what it was. Does nothing with another C library, nor where `GLIBC_TUNABLES` or
    `MALLOC_...` of the environment say how it is to be.
    """
    if platform.libc_ver()[0] != "glibc" or any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        yield
        return
    libc = ctypes.CDLL(None)
    if not libc.mallopt(_MMAP_THRESHOLD, _KEPT):  # older ones take no more than where their own thresholds end
        libc.mallopt(_MMAP_THRESHOLD, _USUAL[_MMAP_THRESHOLD])
    libc.mallopt(_TRIM_THRESHOLD, _KEPT)
    try:
        yield
    finally:
        for option, usual in _USUAL.items():
            libc.mallopt(option, usual)
        libc.malloc_trim(0)
