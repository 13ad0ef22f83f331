"""The marker of an attempt that was killed, and the attempt after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from muntin.training import fit, read_checkpoint
from muntin.training.progress.report import FitProgress
from muntin.training.recovery import attempt
from muntin.training.recovery.attempt import MARKER, Attempt
from muntin.training.recovery.out_of_memory import MemoryUse

USE = MemoryUse(micro_batch=16, unit=8, checkpointing="none")


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """The kernel's counter: its last value."""
    values: list[int | None] = [7]
    monkeypatch.setattr(attempt, "kills_for_memory", lambda: values[-1])
    return values


def test_marker(tmp_path: Path, kills: list[int | None]) -> None:
    first = Attempt(tmp_path / "run")
    assert first.earlier is None and not first.lacked_memory
    first.note(USE)  # and it is killed
    assert not Attempt(tmp_path / "run").lacked_memory  # by another cause
    kills.append(8)
    with Attempt(tmp_path / "run") as second:
        assert second.lacked_memory and second.earlier is not None and second.earlier.memory == USE
        second.note(USE)
        assert (tmp_path / "run" / MARKER).is_file()
    assert not (tmp_path / "run" / MARKER).exists()
    Attempt(tmp_path, writes=False).note(USE)
    assert not (tmp_path / MARKER).exists()
    (tmp_path / MARKER).write_text("{")
    kills.append(None)
    assert Attempt(tmp_path).earlier is None


def test_next_attempt_takes_less(tmp_path: Path, tiny: Any, kills: list[int | None]) -> None:
    """The tiny recipe has batches of one group: the micro-batch cannot be halved, so that activations are recomputed."""
    run, events = tmp_path / "run", []
    earlier = MemoryUse(micro_batch=4, unit=8, checkpointing="none")
    Attempt(run).note(earlier)
    kills.append(8)

    def report(progress: FitProgress) -> None:
        if progress.kind == "note":
            events.append(progress.note)

    result = fit(tiny.recipe, directory=run, progress=report)
    note = next(text for text in result.notes if "earlier attempt" in text)
    assert note.startswith("an earlier attempt was killed for lack of memory with micro-batches of ")
    assert note.endswith(", checkpointing selective") and events.count(note) == 1
    memory = read_checkpoint(run).state.memory
    assert memory is not None and memory.checkpointing == "selective"
    assert not (run / MARKER).exists()
