from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from muntin.cli.start import SPINS, SPINS_BESIDE, WAITING, prepare_torch
from muntin.runtime.profiling import contention

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WAITING:
        monkeypatch.setenv(name, "")  # so that the end of the test removes what is set meanwhile
        monkeypatch.delenv(name)


@pytest.mark.parametrize(("others", "variables"), [(None, SPINS), (0.1, SPINS), (0.9, SPINS_BESIDE)])
def test_waiting_by_other_processes(others: float | None, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention, "others_since", lambda *_, **__: others)
    assert bool(prepare_torch()) == (variables is SPINS_BESIDE)
    assert {name: os.environ.get(name) for name in WAITING} == {"OMP_WAIT_POLICY": None} | variables


@pytest.mark.parametrize("name", WAITING)
def test_waiting_as_the_user_has_set_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "7")
    prepare_torch()
    assert {other: os.environ[other] for other in WAITING if other in os.environ} == {name: "7"}


@pytest.mark.usefixtures("fixed_sizes")
def test_note_of_commands_on_a_busy_machine(call: Call, exported: Any, run: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contention, "others_since", lambda *_, **__: 0.93)
    (note,) = contention.notes_at_start(0.93)
    assert "other processes use 0.9 of our " in note
    commands: tuple[tuple[object, ...], ...] = (
        ("fit", exported.recipe, "-o", tmp_path / "other", "--set", "training.steps=1"),
        ("evaluate", exported.run),
        ("compress", exported.run, "-o", tmp_path / "compressed", "--trials", "0", "--max-drop", "1"),
        ("export", exported.run, "--float", "-o", tmp_path / "artifact"),
    )
    for words in commands:
        answer = call(*words)
        assert answer.code == 0 and answer.err.startswith(f"note      {note}\n") and answer.err.count(note) == 1, words
    assert call("evaluate", exported.run, "--json").document()["notes"] == [note]
    for words in (("evaluate", tmp_path / "none"), ("fit", exported.recipe, "-o", run), ("compare", exported.run / "artifact")):
        assert call(*words).mistake()  # and no note
    assert call("export", exported.run).err == ""  # it exists already
