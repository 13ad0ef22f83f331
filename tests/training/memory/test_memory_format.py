"""Freed memory is kept during training and returned at its end."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from muntin.training.memory import memory_format

SCRIPT = f"""
import resource
import runpy
import torch
from muntin.runtime.host.memory import resident

keep_freed_memory = runpy.run_path({memory_format.__file__!r})["keep_freed_memory"]  # without its package: that takes seconds

def step():
    return (torch.ones(12, 1 << 20) * 2).sum().item()  # two tensors of 48 MiB

def faults(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

step()
usual = faults(5)
with keep_freed_memory():
    step()
    inside = faults(5)
    held = resident()[0]
print(usual, inside, (held - resident()[0]) >> 20)
"""


def counts(**variables: str) -> tuple[int, int, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, env=environment | variables)
    usual, inside, given_back = map(int, done.stdout.split())
    return usual, inside, given_back


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_page_faults_and_release() -> None:
    usual, inside, given_back = counts()
    assert inside * 10 < usual
    assert given_back >= 90


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_environment_variables() -> None:
    usual, inside, _ = counts(MALLOC_ARENA_MAX="8")
    assert inside * 2 > usual
