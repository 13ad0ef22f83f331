"""A version: how it is opened and warmed up, what its clients may rely on, what it remembers."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.artifact import open_artifact
from muntin.errors import ArtifactError, VerificationError
from muntin.runtime.openvino import OpenVinoSession
from muntin.runtime.options import SessionOptions
from muntin.serving.version import (
    CALLS,
    TIMES,
    Call,
    Latencies,
    NotReadyError,
    Version,
    batch_sizes,
    contract_difference,
    open_version,
)

SCORES, LABELS = Call((2, 8, 8)), Call((1, 4, 8), labels=True)


def compiled(session: Any) -> set[tuple[Any, bool]]:
    return set(session._compiled)


def test_with_rest_everything_is_compiled_and_only_the_smallest_call_computed(
    write_version: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = Call((2, 24, 24))
    seen: list[Any] = []
    slept: list[float] = []
    real = OpenVinoSession._infer

    def watched(self: OpenVinoSession, images_BHWC: Any) -> Any:
        seen.append(images_BHWC.shape[:3])
        return real(self, images_BHWC)

    monkeypatch.setattr(OpenVinoSession, "_infer", watched)
    monkeypatch.setattr(time, "sleep", slept.append)
    opened = open_version(write_version(tmp_path / "1"), SessionOptions(threads=1), [large, SCORES], rest=3.0)
    assert large.shape not in seen and SCORES.shape in seen
    assert len(slept) == 4 and all(seconds > 0 for seconds in slept)  # loading, the replay, two calls
    assert ((*large.shape, 3), False) in compiled(opened.session)


def test_opening_ends_between_two_steps(write_version: Callable[..., Path], tmp_path: Path) -> None:
    asked = iter([False, False, True])
    with pytest.raises(NotReadyError, match="was ended with the server"):
        open_version(write_version(tmp_path / "1"), SessionOptions(threads=1), [SCORES], stopped=lambda: next(asked))
    assert next(asked, None) is None


def test_a_version_is_open_and_warm_for_what_is_asked_of_it(write_version: Callable[..., Path], tmp_path: Path) -> None:
    path = write_version(tmp_path / "1", 2)
    opened = open_version(path, SessionOptions(threads=1), [SCORES, LABELS, SCORES])
    assert opened.calls == (SCORES, LABELS)
    assert opened.digest == open_artifact(path).digest
    assert compiled(opened.session) == {
        ((1, 6, 8, 3), False),
        ((2, 8, 8, 3), False),
        ((1, 4, 8, 3), True),
    }  # the first is the golden pair's
    assert (opened.session.labels(np.zeros((1, 4, 8, 3), np.uint8)) == 2).all()


def test_without_calls_it_is_warm_for_its_example(write_version: Callable[..., Path], tmp_path: Path) -> None:
    opened = open_version(write_version(tmp_path / "1"), SessionOptions(threads=1), [])
    assert opened.calls == (Call((1, 8, 8)), Call((1, 8, 8), labels=True))


def test_a_dynamic_version_is_warm_for_sizes_that_nobody_foresaw(write_version: Callable[..., Path], tmp_path: Path) -> None:
    session = open_version(write_version(tmp_path / "1"), SessionOptions(threads=1, dynamic=True), [SCORES]).session
    assert compiled(session) == {(None, False), (None, True), ((2, 8, 8, 3), False)}


def test_what_does_not_compute_its_golden_pair_is_not_opened(write_version: Callable[..., Path], tmp_path: Path) -> None:
    path = write_version(tmp_path / "1", shift=30)
    with pytest.raises(VerificationError, match=r"1: openvino in \w+ is .* standard deviations off a golden pair \(allowed: 0.05\)"):
        open_version(path, SessionOptions(), [])
    (path / "weights.safetensors").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        open_version(path, SessionOptions(), [])


def test_small_batches_are_all_compiled_for_and_large_ones_by_powers() -> None:
    assert batch_sizes(16, 64 * 64) == list(range(1, 17))
    assert batch_sizes(64, 64 * 64) == [*range(1, 17), 32, 64]
    assert batch_sizes(8, 512 * 512) == [1, 2, 3, 4, 8]
    assert batch_sizes(6, 4096 * 4096) == [1, 2, 4]
    assert batch_sizes(1, 1) == [1]


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({}, ""),
        ({"classes": ("sea", "field", "roof", "road", "tree")}, ""),  # one more at the end
        ({"classes": ("sea", "field", "roof")}, 'class 3 is none where "road" is served'),
        ({"classes": ("field", "sea", "roof", "road")}, 'class 0 is "field" where "sea" is served'),
        ({"channels": 4}, "channels 4 where 3 is served"),
        ({"scale": 2}, "scale 2 where 1 is served"),
        ({"task": "classify"}, "task classify where segment is served"),
    ],
)
def test_a_contract_is_what_a_client_would_notice(signature_of: Callable[..., Any], changes: dict[str, Any], difference: str) -> None:
    assert contract_difference(signature_of(**changes), signature_of()) == difference


def test_other_classes_can_be_allowed(signature_of: Callable[..., Any]) -> None:
    assert contract_difference(signature_of(classes=("a", "b")), signature_of(), other_classes=True) == ""
    assert contract_difference(signature_of(channels=1), signature_of(), other_classes=True) != ""


def test_latencies_remember_the_last_of_each_kind_and_the_last_kinds() -> None:
    latencies = Latencies()
    for seconds in range(TIMES + 5):
        latencies.add(SCORES, seconds)
    assert latencies.of(SCORES) == tuple(range(5, TIMES + 5))
    latencies.add(7, 1.0)  # batches of seven images of whatever kind
    assert latencies.calls == {SCORES: TIMES}
    for batch in range(CALLS - 2):
        latencies.add(Call((batch + 3, 8, 8)), 1.0)
    latencies.add(SCORES, 1.0)
    latencies.add(LABELS, 1.0)
    assert len(latencies.kinds) == CALLS
    assert latencies.of(7) == ()  # the one that came longest ago
    assert latencies.kinds[-2:] == (SCORES, LABELS)


def test_a_version_is_used_only_while_it_is_open(write_version: Callable[..., Path], tmp_path: Path) -> None:
    version = Version(name="1", path=write_version(tmp_path / "1"))
    for part in ("session", "signature"):
        with pytest.raises(NotReadyError, match="version 1 is loading"):
            getattr(version, part)
    opened = open_version(version.path, SessionOptions(threads=1), [])
    version.opened(opened)
    assert (version.state, version.session, version.digest) == ("ready", opened.session, opened.digest)
    assert version.close() is opened.session
    assert not version.open
    assert version.signature == opened.signature  # what was answered by it can still be described
