"""Samples of pictures in a folder: real files, limits, and failures that are only counted."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from muntin.errors import DataError
from muntin.images import read_image
from muntin.serving.telemetry import samples
from muntin.serving.telemetry.samples import SampleKeeper, SampleSettings

START = 1_800_000_000.0


def noise(rows: int = 1, side: int = 64, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(rows).integers(0, 256, (rows, side, side, channels)).astype(np.uint8)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def keeper(folder: Path, **settings: Any) -> SampleKeeper:
    return SampleKeeper(SampleSettings(folder=folder, **({"share": 1.0} | settings)), clock=lambda: START)


def kept_one_by_one(keeping: SampleKeeper, images: NDArray[np.uint8], wait_until: Any) -> None:
    for image in images:
        before = keeping.kept
        keeping.offer(image[None])
        wait_until(lambda before=before: keeping.kept > before)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_pixels_come_back(tmp_path: Path, channels: int) -> None:
    keeping, image = keeper(tmp_path / "a" / "kept"), noise(channels=channels)
    keeping.offer(image)
    keeping.close()
    (file,) = (tmp_path / "a" / "kept").iterdir()
    assert samples._NAME.fullmatch(file.name) and file.name.startswith("20270115T080000Z-")
    assert np.array_equal(read_image(file, channels), image[0])
    assert keeping.bytes == file.stat().st_size and keeping.kept == 1
    assert (tmp_path / "a" / "kept").stat().st_mode & 0o777 == 0o700


def test_share_of_the_pictures(tmp_path: Path, wait_until: Any) -> None:
    draws = iter([0.5, 0.04, 0.06, 0.049])
    keeping = SampleKeeper(SampleSettings(folder=tmp_path, share=0.05), chance=lambda: next(draws))
    keeping.offer(noise(4))
    keeping.close()
    assert keeping.kept == 2 and not sum(keeping.dropped.values())


def test_size_limit_over_earlier_files(tmp_path: Path, wait_until: Any) -> None:
    (tmp_path / "notes.txt").write_text("of the user")
    first = keeper(tmp_path)
    kept_one_by_one(first, noise(3), wait_until)
    first.close()
    earlier = set(names(tmp_path)) - {"notes.txt"}
    for age, name in enumerate(sorted(earlier)):
        os.utime(tmp_path / name, (START - 100 + age,) * 2)
    size = first.bytes // 3
    second = keeper(tmp_path, megabytes=4.5 * size / (1 << 20))
    kept_one_by_one(second, noise(3), wait_until)
    second.close()
    left = set(names(tmp_path)) - {"notes.txt"}
    assert len(left) == 4 and len(left & earlier) == 1 and max(earlier) in left
    assert (tmp_path / "notes.txt").exists()
    assert second.bytes <= 4.5 * size


def test_age_limit_and_unfinished_files(tmp_path: Path, wait_until: Any) -> None:
    old, young, unfinished, foreign = (
        tmp_path / name for name in ("20260101T000000Z-0123456789abcdef.png", "20270115T070000Z-0123456789abcdef.png",
                                     ".0123456789abcdef.tmp", "picture.png")
    )  # fmt: skip
    for path, age in ((old, 3 * 86_400), (young, 3600), (unfinished, 3600), (foreign, 9 * 86_400)):
        path.write_bytes(b"x")
        os.utime(path, (START - age,) * 2)
    keeping = keeper(tmp_path, days=2)
    wait_until(lambda: not old.exists())
    keeping.close()
    assert names(tmp_path) == sorted([young.name, foreign.name])


def test_busy_writer_drops_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No offer waits while the disk stands still."""
    go_on = threading.Event()
    real = samples.write_files

    def slow(*arguments: Any) -> None:
        assert go_on.wait(20)
        real(*arguments)

    monkeypatch.setattr(samples, "write_files", slow)
    keeping = keeper(tmp_path)
    keeping.offer(noise(20, side=8))
    assert 15 <= keeping.dropped["busy"] <= 16  # one may have been taken from the queue
    go_on.set()
    keeping.close()
    assert keeping.kept == 20 - keeping.dropped["busy"] == len(names(tmp_path))


def test_folder_that_goes_away(tmp_path: Path, wait_until: Any, caplog: pytest.LogCaptureFixture) -> None:
    keeping = keeper(tmp_path / "kept")
    shutil.rmtree(tmp_path / "kept")
    (tmp_path / "kept").write_text("a file")
    with caplog.at_level(logging.WARNING, "muntin.serving"):
        for count in (1, 2):
            keeping.offer(noise())
            wait_until(lambda count=count: keeping.dropped["unwritten"] == count)
    assert len(caplog.records) == 1 and "cannot be kept" in caplog.text
    (tmp_path / "kept").unlink()
    (tmp_path / "kept").mkdir()
    keeping.offer(noise())
    keeping.close()
    assert keeping.kept == 1 == len(names(tmp_path / "kept"))


def test_picture_larger_than_the_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_SAMPLE_PIXELS", 100)
    keeping = keeper(tmp_path, megabytes=1e-5)
    keeping.offer(noise(side=11))
    keeping.offer(noise(side=10))
    keeping.close()
    assert keeping.dropped == {"busy": 0, "large": 1, "unwritten": 1} and not names(tmp_path)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="--keep-samples"):
        keeper(tmp_path / "file" / "kept")
