"""Folders of pictures compared with a reference, in an engine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from muntin.errors import DataError
from muntin.images import write_image
from muntin.runtime import Session, load
from muntin.updating.drift.comparison import LEAST, compare_folder, describe_files, pictures_in
from muntin.updating.drift.features import feature_list
from muntin.updating.drift.reference import DriftReference, make_reference

Scene = Callable[..., NDArray[np.uint8]]


@pytest.fixture(scope="module")
def session(write_channels: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory) -> Session:
    opened: Session = load(write_channels(tmp_path_factory.mktemp("drift") / "artifact"), threads=1, cache=False)
    return opened


@pytest.fixture(scope="module")
def reference(session: Session, write_scenes: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> DriftReference:
    paths, _ = pictures_in(write_scenes(tmp_path_factory.mktemp("drift") / "train", 160, seed=0))
    features, places, skipped = describe_files(session, paths)
    assert len(places) == 160 and not skipped
    return make_reference(features, feature_list(session.signature))


def test_pictures_of_the_same_kind(session: Session, reference: DriftReference, write_scenes: Callable[..., Path], tmp_path: Path) -> None:
    alarms = [compare_folder(session, reference, write_scenes(tmp_path / str(seed), 32, seed=seed)).drifted for seed in range(1, 5)]
    assert sum(alarms) <= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda picture: 255 - picture, "brighter"),
        (lambda picture: (picture * 0.5).astype(np.uint8), "darker"),
        (lambda picture: picture // 2 + np.roll(picture, 1, 0) // 2, "more blurred"),
        (lambda picture: np.clip(picture + np.array([40, 0, 0]), 0, 255).astype(np.uint8), "class roof more frequent"),
    ],
)
def test_other_pictures(
    session: Session, reference: DriftReference, write_scenes: Callable[..., Path], tmp_path: Path,
    change: Callable[[NDArray[np.uint8]], NDArray[np.uint8]], words: str,
) -> None:  # fmt: skip
    folder = write_scenes(tmp_path / "other", 32, seed=1, change=change)
    result = compare_folder(session, reference, folder)
    assert result.drifted and result.summary.startswith("drift: ") and result.windows == result.pictures == 32
    assert any(words in change.text and change.notable for change in result.changes)


def test_farthest_picture_and_reason(
    session: Session, reference: DriftReference, write_scenes: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_scenes(tmp_path / "mixed", 40, seed=3)
    write_image(folder / "007.png", np.full((48, 48, 3), 250, np.uint8))
    result = compare_folder(session, reference, folder)
    assert result.farthest[0].path == folder / "007.png"
    assert result.farthest[0].distance > 2 * result.farthest[1].distance and result.farthest[0].reason
    assert len({picture.path for picture in result.farthest}) == len(result.farthest) == 8


def test_pictures_that_cannot_be_read(
    session: Session, reference: DriftReference, write_scenes: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_scenes(tmp_path / "damaged", LEAST, seed=4)
    (folder / "x.png").write_bytes(b"no picture")
    result = compare_folder(session, reference, folder)
    assert [path.name for path, _ in result.skipped] == ["x.png"] and result.pictures == LEAST
    (folder / "000.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="at least 8 are compared; 2 cannot be read"):
        compare_folder(session, reference, folder)


def test_raster_damaged_in_a_window(session: Session, draw_scene: Scene, tmp_path: Path) -> None:
    """Its header is sound, and some of its windows can be read."""
    rasterio = pytest.importorskip("rasterio", reason="the extra `raster` is not installed")
    whole, path = tmp_path / "whole.tif", tmp_path / "broken.tif"
    size = {"width": 768, "height": 768, "count": 3, "dtype": "uint8"}
    layout = {"driver": "GTiff", "tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    warned = pytest.warns(rasterio.errors.NotGeoreferencedWarning)
    with warned, rasterio.open(whole, "w", **size, **layout, crs="EPSG:4326") as dataset:
        dataset.write(np.tile(draw_scene(0), (16, 16, 1)).transpose(2, 0, 1))
    content = whole.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) // 4) + content[3 * len(content) // 4 :])
    features, places, skipped = describe_files(session, [whole, path], windows=32)
    assert len(features) == len(places) == 16 and {place for place, _ in places} == {whole}
    assert [name for name, _ in skipped] == [path] and "damaged" in skipped[0][1]


def test_few_large_pictures(session: Session, reference: DriftReference, draw_scene: Scene, tmp_path: Path) -> None:
    for number in range(2):
        write_image(tmp_path / f"{number}.png", np.tile(draw_scene(number), (20, 20, 1)))
    result = compare_folder(session, reference, tmp_path)
    assert (result.pictures, result.windows) == (2, 32) and "alike" in result.notes[0]


def test_newest_pictures_and_hidden_ones(write_scenes: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_scenes(tmp_path / "a", 6, seed=5)
    write_scenes(folder / "sub", 1, seed=6)
    write_scenes(folder / ".hidden", 1, seed=6)
    for number in range(6):
        os.utime(folder / f"{number:03d}.png", (1000 - number,) * 2)
    os.utime(folder / "sub" / "000.png", (2000,) * 2)
    assert len(pictures_in(folder)[0]) == 7
    assert [path.relative_to(folder).as_posix() for path in pictures_in(folder, newest=3)[0]] == ["000.png", "001.png", "sub/000.png"]


def test_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        pictures_in(tmp_path / "none")
    with pytest.raises(DataError, match="holds no pictures"):
        pictures_in(tmp_path)


def test_needs_no_torch() -> None:
    absent = "import sys; sys.modules.update(dict.fromkeys(['torch', 'torchvision', 'timm', 'scipy']))"
    modules = "muntin.updating.drift.comparison, muntin.cli.updating.drift, muntin.reporting.drift.page"
    subprocess.run([sys.executable, "-c", f"{absent}\nimport {modules}"], check=True)
