"""Memory of a block: what it holds at its end and what it had at the most, on a real process."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
import torch

from muntin.runtime.host import memory
from muntin.runtime.host.memory import kills_for_memory, no_memory, resident, watch_memory

counted = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not count resident pages for us")
MIB = 1 << 20


def _fresh(size: int) -> mmap.mmap:
    """Written pages that the system has just given: an allocator would take those of what other tests have freed, which count as held."""
    pages = mmap.mmap(-1, size)
    np.frombuffer(pages, np.uint8)[:] = 1
    return pages


@counted
def test_peak_of_freed_memory() -> None:
    with watch_memory() as watch:
        kept = _fresh(20 * MIB)
        _fresh(60 * MIB).close()
    assert watch.held is not None and watch.peak is not None
    assert 15 * MIB <= watch.held <= 45 * MIB
    assert 75 * MIB <= watch.peak <= 110 * MIB
    kept.close()


@counted
def test_earlier_peak() -> None:
    np.ones(100 * MIB, np.uint8)
    with watch_memory() as watch:
        pass
    assert watch.peak is not None and watch.peak < 20 * MIB


@counted
def test_resident_and_peak() -> None:
    now, peak = resident()
    assert now is not None and peak is not None and 0 < now <= peak


def test_no_memory_errors() -> None:
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(1 << 60, np.uint8)
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert no_memory(of_numpy.value) and no_memory(of_torch.value)
    assert not no_memory(RuntimeError("sizes of tensors must match"))


@pytest.mark.parametrize(
    ("text", "kills"), [("pgfault 7\noom_kill 12\nother 3\n", 12), ("memcg_oom_kill 5\n", None), ("", None), (None, None)]
)
def test_processes_killed_for_memory(text: str | None, kills: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_KILLS", tmp_path / "vmstat")
    if text is not None:
        (tmp_path / "vmstat").write_text(text, encoding="ascii")
    assert kills_for_memory() == kills
