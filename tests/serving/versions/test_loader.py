"""From a path to an open version: the calls that it is compiled for, and its verification."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest

from muntin.artifact import open_artifact
from muntin.artifact.store import read_manifest
from muntin.errors import VerificationError
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import Session
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.worker.calls import Call
from muntin.serving.worker.opening import Opened
from muntin.serving.worker.remote_session import can_open_remote
from serving_parts import image_call

OPTIONS = SessionOptions(threads=1, dynamic=True)


@pytest.mark.skipif(not can_open_remote(), reason="files cannot be passed to another process here")
def test_opening_verifies_and_reports(write_version: Any, tmp_path: Path) -> None:
    steps: list[str] = []
    loader = ArtifactLoader(options=OPTIONS, max_batch=2)
    opened = loader.open(write_version(tmp_path / "1", 3), progress=steps.append)
    assert (opened.digest, opened.calls) == (
        open_artifact(tmp_path / "1").digest,
        (image_call((1, 8, 8), labels=True), image_call((2, 8, 8), labels=True), image_call((1, 8, 8))),
    )
    opened.session.close()
    assert steps == ["opening", "verifying", *(f"compiling, {number} of 4" for number in (1, 2, 3, 4))]
    with pytest.raises(VerificationError, match="layer head, recorded with 8-bit activations, ran as"):
        loader.open(write_version(tmp_path / "2", activation_bits=8))


@pytest.mark.parametrize("remote", [True, False])
def test_artefact_that_is_replaced_while_it_is_opened(
    write_version: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    """The process that opens it takes the artefact that was meant, or none."""
    if not remote:
        monkeypatch.setattr("muntin.serving.versions.loader.can_open_remote", lambda: False)
    path, loader = write_version(tmp_path / "1", 1), ArtifactLoader(options=OPTIONS)
    manifest = read_manifest(path)
    write_version(path, 2)
    with pytest.raises(VerificationError, match="replaced meanwhile"):
        loader.open(path, digest=manifest.sha256)
    monkeypatch.setattr("muntin.serving.versions.loader.read_manifest", lambda _: manifest)  # the other came just after
    with pytest.raises(VerificationError, match="replaced meanwhile"):
        loader.open(path, digest=manifest.sha256)


def test_only_the_manifest_is_read_here(write_version: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requested: list[tuple[Call, ...]] = []

    def open_nothing(path: Path, options: SessionOptions, calls: tuple[Call, ...], **_: Any) -> Opened:
        requested.append(calls)
        return Opened(session=cast(Session, None), signature=read_manifest(path).signature, digest="", calls=())

    monkeypatch.setattr("muntin.serving.versions.loader.open_remote", open_nothing)
    monkeypatch.setattr("muntin.serving.versions.loader.can_open_remote", lambda: True)
    path = write_version(tmp_path / "1")
    (path / "weights.safetensors").write_bytes(b"?")
    ArtifactLoader(options=OPTIONS, max_batch=2, sizes=((4, 6), (8, 8))).open(path)
    calls = [
        (image_call((1, *size), labels=True), image_call((2, *size), labels=True), image_call((1, *size))) for size in ((8, 8), (4, 6))
    ]
    assert requested == [(*calls[0], *calls[1])]
