"""The start of a command that computes in PyTorch: what it refuses, how its threads wait, and a note if other processes use the CPUs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from muntin.errors import RecipeError

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Environment variables that set how OpenMP's threads wait. OpenMP reads them when PyTorch is loaded."""
SPINS = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
"""How long a thread spins before it sleeps: at most about a millisecond, where GNU's OpenMP takes 15 times as long and LLVM's 200 ms.

While it spins, no other thread uses its core. If the thread that it waits for shares a core with another process, both lose time. Threads
that sleep at once would make training alone a sixth slower, and inference in PyTorch a half.
"""
SPINS_BESIDE = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "0"}
"""The same beside other processes."""


def first_process(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True for the process that prints: one that `torchrun` did not start, or its first one."""
    return int(environment.get("RANK", "0")) == 0


def alone(environment: Mapping[str, str] = os.environ) -> bool:
    """Return True for a process that `torchrun` did not start beside others."""
    return int(environment.get("WORLD_SIZE", "1")) == 1


def prepare_torch() -> list[str]:
    """Set how PyTorch's threads wait, unless a variable of `WAITING` is set. Called before PyTorch is imported.

    Returns a note if other processes use the CPUs, measured for some tenths of a second, while modules of this package are imported.
    """
    stat, own, started = "", time.process_time(), time.perf_counter()
    with suppress(OSError):  # no Linux
        stat = Path("/proc/stat").read_text(encoding="ascii", errors="replace")
    from muntin.runtime.profiling.contention import notes_at_start, others_since, parse_cpu_times

    notes = notes_at_start(others_since(parse_cpu_times(stat), own=own, started=started))
    if not any(name in os.environ for name in WAITING):
        os.environ.update(SPINS_BESIDE if notes else SPINS)
    return notes


def refuse_without_gradients(path: Path) -> None:
    """Raise RecipeError for an ONNX file or an artefact, where a model is to be trained."""
    if path.suffix.lower() == ".onnx" or (path / "manifest.json").is_file():
        kind = "an ONNX file" if path.suffix.lower() == ".onnx" else "an artefact"
        raise RecipeError(
            f"{path} is {kind}, and training needs gradients, which its graph does not have: train the model in PyTorch (a recipe, "
            "docs/own-model.md); without training `muntin export MODEL.onnx --calibration FILE.npz` quantises an ONNX file"
        )
