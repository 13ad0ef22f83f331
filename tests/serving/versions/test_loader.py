"""From a path to an open version: the calls that it is compiled for, and that the one tried is the one opened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muntin.artifact import open_artifact
from muntin.errors import VerificationError
from muntin.runtime.engines.compile_cache import cache_folder
from muntin.runtime.options import SessionOptions
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.versions.trial import examine, probe
from muntin.serving.worker.opening import Call

OPTIONS = SessionOptions(threads=1)
EXAMPLE = Call((1, 8, 8))
LABELS = Call((2, 4, 4), labels=True)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[SessionOptions, Any]]:
    """Options and calls of trials, which are not made."""
    trials: list[tuple[SessionOptions, Any]] = []
    monkeypatch.setattr("muntin.serving.versions.loader.probe", lambda path, options, calls, **_: trials.append((options, calls)))
    return trials


def compiled_files() -> set[Path]:
    return set((cache_folder() / "compiled").rglob("*.bin"))


def test_trial_leaves_nothing_to_compile(write_version: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path / "cache"))
    path = write_version(tmp_path / "1", 3)
    tried = probe(path, OPTIONS, [EXAMPLE, LABELS])
    assert (tried.digest, tried.signature) == (open_artifact(path).digest, open_artifact(path).manifest.signature)
    before = compiled_files()
    opened = ArtifactLoader(options=OPTIONS).open(path, {EXAMPLE: 1, LABELS: 1}, tried)
    assert compiled_files() == before
    assert opened.calls == (EXAMPLE, LABELS)
    opened.session.close()


def test_artefact_replaced_after_its_trial(write_version: Callable[..., Path], tmp_path: Path) -> None:
    tried = examine(write_version(tmp_path / "1", 1), OPTIONS, ())
    write_version(tmp_path / "1", 2)
    with pytest.raises(VerificationError, match="1: it was replaced meanwhile: load it again"):
        ArtifactLoader(options=OPTIONS).open(tmp_path / "1", {}, tried)


def test_dynamic_opening_compiles_for_frequent_calls(write_version: Callable[..., Path], tmp_path: Path, probed: Any) -> None:
    path, lately = write_version(tmp_path / "1"), {Call((1, 8, 8)): 1, Call((2, 8, 8)): 9}
    for dynamic in (False, True):
        ArtifactLoader(options=SessionOptions(dynamic=dynamic)).probe(path, lately, lambda: False)
    assert [calls for _, calls in probed] == [(Call((1, 8, 8)), Call((2, 8, 8))), (Call((2, 8, 8)),)]


def test_frequent_calls_within_the_budget(write_version: Callable[..., Path], tmp_path: Path, probed: Any) -> None:
    start = Call((1, 8, 8), labels=True)
    lately = {Call((1, 10, 10)): 9, Call((1, 30, 30)): 40, Call((1, 20, 20)): 30, start: 5}
    loader = ArtifactLoader(options=SessionOptions(dynamic=True), max_batch=1, budget=lambda channels: 3000 / channels)
    loader.probe(write_version(tmp_path / "1"), lately, lambda: False)
    assert [calls for _, calls in probed] == [(start, Call((1, 10, 10)), Call((1, 30, 30)))]


def test_trial_reads_only_the_manifest_here(write_version: Callable[..., Path], tmp_path: Path, probed: Any) -> None:
    path = write_version(tmp_path / "1")
    (path / "weights.safetensors").write_bytes(b"?")
    ArtifactLoader(options=SessionOptions(dynamic=True), max_batch=2).probe(path, {}, lambda: False)
    assert probed[0][1] == tuple(Call((rows, 8, 8), labels=True) for rows in (1, 2))
