"""Damaged artefacts are read, or refused with ArtifactError, in bounded memory: inputs that a fuzzer kept, and random ones."""

from __future__ import annotations

import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from damaged_artifacts import CHANGED, files_of, inputs_to_begin_with, read_all, seed, with_digests
from muntin.errors import ArtifactError

KEPT = sorted((Path(__file__).parent / "fuzzed").iterdir())
MOST = 64 << 20
"""Bytes that reading an artefact of some kilobytes may take."""


def bounded(data: bytes, folder: Path) -> None:
    """Read the artefact of an input. Fails for another error than ArtifactError, and for much memory."""
    files = files_of(data)
    tracemalloc.start()
    try:
        with suppress(ArtifactError):
            read_all(files, folder)
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()


def test_sound_artifact(tmp_path: Path) -> None:
    """The artefact whose files are changed is read whole."""
    read_all(with_digests(seed()), tmp_path / "a")
    for data in inputs_to_begin_with()[: len(CHANGED)]:
        read_all(files_of(data), tmp_path / "a")


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.name)
def test_kept_inputs(file: Path, tmp_path: Path) -> None:
    bounded(file.read_bytes(), tmp_path / "a")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices=st.binary(min_size=2, max_size=16))
def test_edited_manifests(choices: bytes, tmp_path: Path) -> None:
    """Values of the manifest replaced by odd ones, with digests that are right."""
    bounded(bytes([4]) + choices, tmp_path / "a")


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(range(len(CHANGED))),
    places=st.lists(st.tuples(st.integers(0, 1 << 14), st.binary(max_size=4)), min_size=1, max_size=6),
)
def test_changed_bytes(kind: int, places: list[tuple[int, bytes]], tmp_path: Path) -> None:
    content = bytearray(seed()[CHANGED[kind]])
    for place, value in places:
        start = place % len(content)
        content[start : start + len(value)] = value
    bounded(bytes([kind]) + bytes(content), tmp_path / "a")
