"""From a path to an open version: the calls that it is compiled for, and its verification."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from muntin.artifact import open_artifact
from muntin.artifact.store import read_manifest
from muntin.errors import VerificationError
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import Session
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.worker.opening import Call, Opened
from muntin.serving.worker.remote_session import can_open_remote

OPTIONS = SessionOptions(threads=1, dynamic=True)


@pytest.mark.skipif(not can_open_remote(), reason="files cannot be passed to another process here")
def test_opening_verifies_and_reports(write_version: Callable[..., Path], tmp_path: Path) -> None:
    steps: list[str] = []
    loader = ArtifactLoader(options=OPTIONS, max_batch=2)
    opened = loader.open(write_version(tmp_path / "1", 3), progress=steps.append)
    assert (opened.digest, opened.calls) == (
        open_artifact(tmp_path / "1").digest,
        tuple(Call((rows, 8, 8), labels=True) for rows in (1, 2)),
    )
    opened.session.close()
    assert steps == ["opening", "verifying", *(f"compiling, {number} of 3" for number in (1, 2, 3))]
    steps.clear()
    loader.open(tmp_path / "1", beside=True, progress=steps.append).session.close()
    assert steps == ["opening", "verifying", *(f"compiling, {number} of 3" for number in (1, 2, 3)), "opening"]
    with pytest.raises(VerificationError, match="layer head, recorded with 8-bit activations, ran as"):
        loader.open(write_version(tmp_path / "2", activation_bits=8))


def test_only_the_manifest_is_read_here(write_version: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls beside requests and without them."""
    requested: list[tuple[tuple[Call, ...], bool]] = []

    def open_nothing(path: Path, options: SessionOptions, calls: tuple[Call, ...], *, beside: bool, **_: Any) -> Opened:
        requested.append((calls, beside))
        return Opened(session=cast(Session, None), signature=read_manifest(path).signature, digest="", calls=())

    monkeypatch.setattr("muntin.serving.versions.loader.open_remote", open_nothing)
    monkeypatch.setattr("muntin.serving.versions.loader.can_open_remote", lambda: True)
    path = write_version(tmp_path / "1")
    (path / "weights.safetensors").write_bytes(b"?")
    loader = ArtifactLoader(options=OPTIONS, max_batch=2, sizes=((4, 6), (8, 8)))
    for beside in (False, True):
        loader.open(path, beside=beside)
    calls = tuple(Call((rows, *size), labels=True) for size in ((8, 8), (4, 6)) for rows in (1, 2))
    assert requested == [(calls, False), (calls, True)]
