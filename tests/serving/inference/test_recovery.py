"""Images computed in rows and tiles when memory is short, and calls that are remembered as too large."""

from __future__ import annotations

from errno import ENOMEM
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from muntin.artifact import Sizes
from muntin.errors import MuntinError, VerificationError
from muntin.runtime.host.memory import no_memory
from muntin.serving.inference.groups import Group, image_group
from muntin.serving.inference.recovery import SHORT_S, Computed, Recovery
from muntin.serving.versions.version import Version
from serving_parts import PixelSession, random_images


def group_of(images: NDArray[np.uint8], *, labels: bool) -> Group:
    return image_group(Version(name="1", path=Path("1")), images.shape[1], images.shape[2], labels=labels)


def compute(recovery: Recovery, session: PixelSession, images: NDArray[np.uint8], *, labels: bool = True) -> Computed:
    computed = recovery.compute(session, group_of(images, labels=labels), {"images": images})
    expected = images.argmax(3) if labels else images.transpose(0, 3, 1, 2)
    np.testing.assert_allclose(computed.answers["labels" if labels else "scores"], expected, atol=1e-3)
    return computed


def test_rows_without_memory_for_a_batch(clock: Any) -> None:
    session, recovery = PixelSession(most=30), Recovery(clock)
    computed = compute(recovery, session, random_images(3, 1))
    assert session.calls == [(3, 6, 5, 4)] + [(1, 6, 5, 4)] * 3
    assert computed.recovered == "one row at a time"
    assert (recovery.counts.rows, recovery.counts.tiles) == (1, 0)


@pytest.mark.parametrize("labels", [True, False])
def test_tiles_without_memory_for_an_image(clock: Any, labels: bool) -> None:
    session, recovery = PixelSession(most=5000), Recovery(clock)
    computed = compute(recovery, session, random_images(3, 1, 200, 260), labels=labels)
    assert computed.recovered == "in tiles of 65 pixels"  # 130 are too many
    assert (recovery.counts.rows, recovery.counts.tiles) == (1, 3)


def test_large_image_shuts_out_no_tiles_of_others(clock: Any) -> None:
    session, recovery = PixelSession(most=1000), Recovery(clock)
    with pytest.raises(MuntinError, match="no memory"):
        compute(recovery, session, random_images(1, 1, 400, 400))
    session.most = 5000
    assert compute(recovery, session, random_images(1, 1, 200, 260)).recovered == "in tiles of 65 pixels"


@pytest.mark.parametrize("error", [OSError(ENOMEM, "Cannot allocate memory"), RuntimeError("can't allocate a thread's stack")])
def test_errors_of_processes_and_threads(clock: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    session, scores = PixelSession(), PixelSession.scores

    def refused(self: PixelSession, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        if len(images) > 1:
            raise error
        return scores(self, images)

    monkeypatch.setattr(PixelSession, "scores", refused)
    assert compute(Recovery(clock), session, random_images(3, 1)).recovered == "one row at a time"


def test_tiles_of_an_allowed_size(clock: Any) -> None:
    computed = compute(Recovery(clock), PixelSession(most=6000, sizes=Sizes.both(multiple=8)), random_images(1, 1, 128, 152))
    assert computed.recovered == "in tiles of 72 pixels"


@pytest.mark.parametrize("session", [PixelSession("classify", most=20), PixelSession(most=20, sizes=Sizes.only(6, 5))])
def test_image_without_tiles(clock: Any, session: PixelSession) -> None:
    with pytest.raises(MuntinError, match="no memory for one image of 5x6"):
        Recovery(clock).compute(session, group_of(random_images(1, 1), labels=False), {"images": random_images(1, 1)})


def test_large_calls_are_not_tried_for_a_while(clock: Any) -> None:
    session, recovery = PixelSession(most=70), Recovery(clock)

    def calls_for(rows: int, *, labels: bool = True) -> list[int]:
        session.calls.clear()
        compute(recovery, session, random_images(rows, 1), labels=labels)
        return [shape[0] for shape in session.calls]

    assert calls_for(4) == [4, 1, 1, 1, 1]
    assert calls_for(4) == [1, 1, 1, 1]
    assert calls_for(5) == [1] * 5
    assert calls_for(3) == [3, 1, 1, 1]  # fewer rows might have fitted
    assert calls_for(3) == [1, 1, 1]
    assert calls_for(2) == [2]
    assert calls_for(3, labels=False) == [3, 1, 1, 1]  # another answer needs other memory
    clock.now += SHORT_S
    session.most = 10**9
    assert calls_for(4) == [4]


def test_engine_that_cannot_start_is_no_shortage(clock: Any) -> None:
    session, recovery = PixelSession(), Recovery(clock)
    session.error = VerificationError("its engine ended the process that opened it: signal 9, Killed: out of memory")
    with pytest.raises(VerificationError):
        compute(recovery, session, random_images(4, 1))
    session.error = None
    assert not compute(recovery, session, random_images(4, 1)).recovered


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Failed to allocate memory for requested buffer of size 5"), True),
        (RuntimeError("CUDA out of memory"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("x"), False),
    ],
)
def test_errors_for_lack_of_memory(error: Exception, short: bool) -> None:
    assert no_memory(error) is short
