from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from muntin.artifact import ClassInfo
from muntin.errors import DataError
from muntin.tasks.classes import ClassSpec, MaskMapping, class_infos, distinct_colors, read_specs, renamed_by, specs_of

PAINTED = (ClassSpec(name="sea", value=(0, 0, 9)), ClassSpec(name="land", value=(9, 0, 0)))


def test_mapping_of_integers() -> None:
    path = Path("m.png")
    mapping = MaskMapping([ClassSpec(name="a", value=300), ClassSpec(name="b", value=4)], 0)
    assert mapping(np.array([[300, 4, 0]], dtype=np.uint16), path).tolist() == [[0, 1, 255]]
    assert mapping(np.array([[4, 0]], dtype=np.uint8), path).tolist() == [[1, 255]]
    assert mapping(np.array([[[4, 4, 4], [0, 0, 0]]], dtype=np.uint8), path).tolist() == [[1, 255]]
    with pytest.raises(DataError, match=r"m\.png is a colour picture .*value: \[r, g, b\]"):
        mapping(np.array([[[4, 5, 4]]], dtype=np.uint8), path)
    with pytest.raises(DataError, match="holds the mask values -1, allowed are 300, 4; `ignore` is 0"):
        mapping(np.array([[-1]], dtype=np.int32), path)


def test_mapping_of_colors() -> None:
    path = Path("m.png")
    mapping = MaskMapping(PAINTED, (5, 5, 5))
    assert mapping(np.array([[[9, 0, 0], [0, 0, 9], [5, 5, 5]]], dtype=np.uint8), path).tolist() == [[1, 0, 255]]
    with pytest.raises(DataError, match=r"\[5, 5, 5\], allowed are \[0, 0, 9\], \[9, 0, 0\]; `ignore` is none"):
        MaskMapping(PAINTED, 255)(np.array([[[5, 5, 5]]], dtype=np.uint8), path)


@given(st.lists(st.integers(0, 254), min_size=2, max_size=40, unique=True), st.data())
@settings(max_examples=30)
def test_mapping_of_any_values(values: list[int], data: st.DataObject) -> None:
    mapping = MaskMapping([ClassSpec(name=str(value), value=value) for value in values], 255)
    labels = np.array([data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=20))], dtype=np.uint8)
    mask = np.array(values)[labels]
    for dtype in (np.uint8, np.int64):
        np.testing.assert_array_equal(mapping(mask.astype(dtype), Path("a")), labels)


@pytest.mark.parametrize(
    ("specs", "ignore", "message"),
    [
        ([ClassSpec(name="a", value=1), ClassSpec(name="b", value=1)], 255, "two classes have the value 1"),
        ([ClassSpec(name="a", value=1), ClassSpec(name="b")], 255, "two classes have the value 1"),
        ([ClassSpec(name="a", value=(1, 2, 3)), ClassSpec(name="b")], 255, "mix integers and colours"),
        ([ClassSpec(name="a", value=255), ClassSpec(name="b")], 255, "both class 'a' and `ignore`"),
    ],
)
def test_mapping_of_contradicting_values(specs: list[ClassSpec], ignore: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        MaskMapping(specs, ignore)


def test_mapping_with_255_as_a_class() -> None:
    mapping = MaskMapping([ClassSpec(name="a", value=0), ClassSpec(name="b", value=255)], None)
    assert mapping(np.array([[0, 255]], dtype=np.uint8), Path("a")).tolist() == [[0, 1]]


@given(st.integers(2, 255))
@example(3000)  # more than there are hues
@settings(max_examples=20)
def test_class_infos_with_distinct_colors(count: int) -> None:
    assert len(set(distinct_colors(count))) == count
    first = distinct_colors(1)[0]
    specs = [ClassSpec(name=str(number), color=first if number == 1 else None) for number in range(count)]
    infos = class_infos(specs, "classify")
    assert infos[1].color == first
    assert len({info.color for info in infos}) == count


@pytest.mark.parametrize(
    ("names", "message"),
    [(["a"], "1 classes: from 2 to 255 are possible"), (["a", "a"], "'a' is used twice"), (["\u00e9", "e\u0301"], "is used twice")],
)
def test_class_infos_of_wrong_names(names: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        class_infos([ClassSpec(name=name) for name in names], "segment")


@pytest.mark.parametrize(
    "classes",
    [
        [{"name": "sea", "color": [0, 0, 200]}, "land"],
        {"sea": (0, 0, 200), "land": None},
        (ClassInfo(name="sea", color=(0, 0, 200)), ClassSpec(name="land")),
    ],
)
def test_forms_of_classes(classes: Any) -> None:
    assert specs_of(classes) == [ClassSpec(name="sea", color=(0, 0, 200)), ClassSpec(name="land")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "sea\nland\n\n"),
        ("names.yaml", "- sea\n- name: land\n"),
        ("names.yml", "sea:\nland: null\n"),
        ("names.json", '["sea", {"name": "land"}]'),
    ],
)
def test_files_of_classes(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_specs(tmp_path / name) == [ClassSpec(name="sea"), ClassSpec(name="land")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("names.yaml", "- sea\n- no\n", "names.yaml: classes, entry 2: .*give names, or entries with name and color"),
        ("names.yaml", "- [", "names.yaml: while parsing"),
        ("names.json", "3", "not a int"),
        ("names.txt", "sea\n\nland", "line 2 is empty"),
        ("names.yaml", "- {name: sea, value: 1}\n- land\n", "value: masks are read by the recipe: leave it out"),
        ("names.yaml", "- {name: sea, color: [0, 0, 300]}\n- land\n", "entry 1, color.2: Input should be less than or equal to 255"),
        ("names.yaml", "[sea]", "1 classes are named, and the model has 2"),
    ],
)
def test_wrong_files_of_classes(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"--classes .*{message}"):
        renamed_by(tmp_path / name, class_infos([ClassSpec(name="a"), ClassSpec(name="b")], "segment"))


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("sea", "classes: give names, or entries with name and color, .* not a str"),
        (
            ["sea", {"name": "land", "color": [0, 256, 0]}],
            "classes, entry 2, color.1: Input should be less than or equal to 255; give names",
        ),
        (["sea", {"name": "land", "colour": [0, 0, 0]}], "classes, entry 2, colour: Extra inputs"),
        (["sea", 3], "classes, entry 2: "),
        ({"sea": [1, 2]}, "classes, entry 1, color"),
    ],
)
def test_wrong_forms_of_classes(classes: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        specs_of(classes)
