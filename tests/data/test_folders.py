from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from muntin.data.colors import distinct_colors
from muntin.data.folders import ClassSpec, FolderPair, FolderSource, MaskMapping, class_infos, composed, filling_seed, split_of
from muntin.data.source import SPLITS
from muntin.errors import DataError
from muntin.runtime.images import write_image

SPECS = (ClassSpec(name="sea"), ClassSpec(name="land"), ClassSpec(name="ice"))
PAINTED = (ClassSpec(name="sea", value=(0, 0, 9)), ClassSpec(name="land", value=(9, 0, 0)))


def make_pair(root: Path, count: int = 20, *, size: tuple[int, int] = (6, 8)) -> FolderPair:
    """Images whose pixels are their masks' labels times ten, so that a mix-up of files shows."""
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    generator = np.random.default_rng(count)
    for number in range(count):
        labels = generator.integers(0, 3, size, dtype=np.uint8)
        write_image(root / "images" / f"p{number}.png", np.repeat(labels[:, :, None] * 10, 3, axis=2))
        write_image(root / "masks" / f"p{number}.png", labels)
    return FolderPair(images=root / "images", masks=root / "masks")


def open_pair(pair: FolderPair, **changes: Any) -> FolderSource:
    options: dict[str, Any] = {"base": pair, "validation": 0.2, "test": 0.2, "classes": SPECS, **changes}
    return FolderSource(**options)


def make_classes(root: Path, names: tuple[str, ...] = ("cat", "dog"), count: int = 10) -> FolderPair:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(count):
            write_image(root / name / f"{number}.png", np.full((5, 6, 3), label, dtype=np.uint8))
    return FolderPair(images=root)


def one_line(error: pytest.ExceptionInfo[DataError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_masks_belong_to_their_images(tmp_path: Path) -> None:
    source = open_pair(make_pair(tmp_path))
    seen = []
    for name in SPLITS:
        samples = source.split(name)
        assert len(samples) == len(list(samples.sizes())) > 0
        for entry in samples:
            np.testing.assert_array_equal(entry.image[:, :, 0], entry.labels * 10)
            seen.append(entry.name)
        assert set(samples.sizes()) == {(6, 8)}
    assert sorted(seen) == sorted(f"p{number}" for number in range(20))
    assert source.task == "segment"
    assert source.check() == ()


def test_folders_of_their_own(tmp_path: Path) -> None:
    pairs = {name: make_pair(tmp_path / name, count) for name, count in (("train", 5), ("validation", 2), ("test", 3))}
    source = open_pair(pairs["train"], validation=pairs["validation"], test=pairs["test"])
    assert [len(source.split(name)) for name in SPLITS] == [5, 2, 3]


def test_check_opens_everything_once_and_tells_how_far(tmp_path: Path) -> None:
    source = open_pair(make_pair(tmp_path), classes=(*SPECS, ClassSpec(name="lava")))
    calls: list[tuple[int, int]] = []
    notes = source.check(lambda done, total: calls.append((done, total)))
    assert calls == [(number, 20) for number in range(1, 21)]
    assert len(notes) == 1
    assert "lava" in notes[0]


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_of_nothing_but_ignored_pixels_is_named(tmp_path: Path, name: str) -> None:
    pairs = {split: make_pair(tmp_path / split, count) for split, count in zip(SPLITS, (3, 1, 2), strict=True)}
    for mask in (tmp_path / name / "masks").iterdir():
        write_image(mask, np.full((6, 8), 255, np.uint8))
    with pytest.raises(DataError) as error:
        open_pair(pairs["train"], validation=pairs["validation"], test=pairs["test"]).check()
    one_line(error, f"every pixel of the masks of the {name} split is ignored")


@given(
    keys=st.sets(st.text(min_size=1), min_size=1, max_size=30),
    more=st.sets(st.text(min_size=1), max_size=10),
    seed=st.integers(0, 99),
    shares=st.tuples(st.floats(0.01, 0.49), st.floats(0.01, 0.49)),
)
def test_split_is_a_partition_that_added_files_do_not_move(keys: set[str], more: set[str], seed: int, shares: tuple[float, float]) -> None:
    wanted: dict[Any, float] = {"validation": shares[0], "test": shares[1]}
    before = {key: split_of(key, seed, wanted) for key in keys}
    after = {key: split_of(key, seed, wanted) for key in keys | more}
    assert set(before.values()) <= set(SPLITS)
    assert all(after[key] == split for key, split in before.items())


def test_shares_come_out_as_asked() -> None:
    splits = [split_of(f"{number}", 0, {"validation": 0.1, "test": 0.3}) for number in range(4000)]
    assert abs(splits.count("validation") / 4000 - 0.1) < 0.02
    assert abs(splits.count("test") / 4000 - 0.3) < 0.03
    assert splits != [split_of(f"{number}", 1, {"validation": 0.1, "test": 0.3}) for number in range(4000)]


def test_adding_files_moves_none(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    before = {entry.name: name for name in SPLITS for entry in open_pair(pair).split(name)}
    for folder, value in (("images", 10), ("masks", 1)):
        write_image(tmp_path / folder / "a.png", np.full((6, 8, 3) if folder == "images" else (6, 8), value, dtype=np.uint8))
    after = {entry.name: name for name in SPLITS for entry in open_pair(pair).split(name)}
    assert after.pop("a")
    assert after == before


def test_an_empty_split_says_which_seed_fills_it(tmp_path: Path) -> None:
    pair = make_pair(tmp_path, 4)
    keys = [f"p{number}" for number in range(4)]
    empty = next(seed for seed in range(99) if "test" not in {split_of(key, seed, {"validation": 0.2, "test": 0.2}) for key in keys})
    with pytest.raises(DataError) as error:
        open_pair(pair, seed=empty)
    one_line(error, "is empty", "`seed: ")
    better = filling_seed(keys, {"validation": 0.2, "test": 0.2}, empty + 1)
    assert f"`seed: {better}`" in str(error.value)
    assert len(open_pair(pair, seed=better).split("test"))
    with pytest.raises(DataError) as error:
        open_pair(make_pair(tmp_path / "two", 2))
    one_line(error, "at least 3 pictures")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    path = tmp_path / "images" / "p7.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError) as error:
        open_pair(pair).check()
    one_line(error, "p7.png", "damaged or truncated")


def test_sizes_that_differ_are_named(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    write_image(tmp_path / "masks" / "p3.png", np.zeros((6, 9), dtype=np.uint8))
    with pytest.raises(DataError) as error:
        open_pair(pair).check()
    one_line(error, "p3.png", "8×6", "9×6")


def test_a_value_of_no_class_is_named_with_the_allowed(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    write_image(tmp_path / "masks" / "p3.png", np.array([[0, 1, 7, 255, 9, 7, 7, 0]] * 6, dtype=np.uint8))
    with pytest.raises(DataError) as error:
        open_pair(pair).check()
    one_line(error, "p3.png", "values 7, 9,", "allowed are 0, 1, 2", "`ignore` is 255")


def test_folders_that_are_not_right(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    with pytest.raises(DataError) as error:
        open_pair(FolderPair(images=tmp_path / "nowhere", masks=pair.masks))
    one_line(error, "nowhere", "does not exist")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    with pytest.raises(DataError) as error:
        open_pair(FolderPair(images=tmp_path / "empty", masks=pair.masks))
    one_line(error, "holds no images")
    with pytest.raises(DataError) as error:
        open_pair(FolderPair(images=tmp_path / "images" / "p1.png", masks=pair.masks))
    one_line(error, "no folder")
    (tmp_path / "masks" / "p5.png").unlink()
    with pytest.raises(DataError) as error:
        open_pair(pair)
    one_line(error, "p5.png", "has no mask", str(tmp_path / "masks" / "p5.png"))
    write_image(tmp_path / "images" / "p6.jpg", np.zeros((6, 8, 3), dtype=np.uint8))
    with pytest.raises(DataError) as error:
        open_pair(pair)
    one_line(error, "same stem")


def test_what_is_left_aside_is_noted(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    (tmp_path / "images" / "Thumbs.db").touch()
    (tmp_path / "images" / ".hidden.png").touch()
    write_image(tmp_path / "masks" / "unused.png", np.zeros((6, 8), dtype=np.uint8))
    notes = open_pair(pair).notes
    assert len(notes) == 2
    assert "1 entries are no images" in notes[0]
    assert "1 masks have no image" in notes[1]
    (tmp_path / "images" / "more").mkdir()
    assert "what lies in folders in it is not used (more)" in open_pair(pair).notes[1]


def test_a_class_that_a_share_lacks_is_noted(tmp_path: Path) -> None:
    for number in range(40):
        folder = tmp_path / ("many" if number else "one")
        folder.mkdir(exist_ok=True)
        write_image(folder / f"{number}.png", np.zeros((6, 8, 3), dtype=np.uint8))
    source = FolderSource(base=FolderPair(images=tmp_path), validation=0.2, test=0.2)
    lacking = [name for name in ("validation", "test") if {sample.target for sample in source.split(name)} == {0}]  # type: ignore[arg-type]
    assert lacking
    told = "split has no picture of one, so its score says nothing of it: add pictures, or change `data.seed`"
    assert source.notes == tuple(f"the {name} {told}" for name in lacking)


def test_a_picture_is_in_one_split_alone(tmp_path: Path) -> None:
    """Not in two by a folder that is named twice, by a linked folder, or by a linked picture."""
    pair, own = make_pair(tmp_path / "a"), make_pair(tmp_path / "b")
    with pytest.raises(DataError) as error:
        open_pair(pair, validation=own, test=own)
    one_line(error, "b/images/p0.png is in the validation and in the test split (and 19 more are in two splits)", "of its own")
    (tmp_path / "linked").symlink_to(tmp_path / "a", target_is_directory=True)
    with pytest.raises(DataError) as error:
        open_pair(pair, validation=FolderPair(images=tmp_path / "linked/images", masks=tmp_path / "linked/masks"), test=own)
    one_line(error, "linked/images/p0.png is in the train and in the validation split")
    (tmp_path / "b/images/p0.png").unlink()
    (tmp_path / "b/images/p0.png").symlink_to(tmp_path / "a/images/p3.png")
    with pytest.raises(DataError) as error:
        open_pair(pair, validation=own, test=make_pair(tmp_path / "c"))
    one_line(error, "b/images/p0.png is in the train and in the validation split:")
    (tmp_path / "b/images/p0.png").unlink()
    assert len(open_pair(pair, validation=own, test=make_pair(tmp_path / "d")).split("train")) == 20


def test_pictures_are_decoded_once_while_they_fit_the_cache(tmp_path: Path) -> None:
    samples = open_pair(make_pair(tmp_path)).split("train")
    assert samples[0] is samples[0]
    samples = open_pair(FolderPair(images=tmp_path / "images", masks=tmp_path / "masks"), cache_bytes=0).split("train")
    assert samples[0] is not samples[0]


def test_classify_takes_labels_from_folders(tmp_path: Path) -> None:
    pair = make_classes(tmp_path)
    source = open_pair(pair, classes=())
    assert source.task == "classify"
    assert [entry.name for entry in source.classes] == ["cat", "dog"]
    for name in SPLITS:
        for entry in source.split(name):
            assert entry.image[0, 0, 0] == entry.target
    assert source.check() == ()
    turned = open_pair(pair, classes=(ClassSpec(name="dog"), ClassSpec(name="cat")))
    assert all(entry.image[0, 0, 0] == 1 - int(np.asarray(entry.target)) for entry in turned.split("train"))


def test_classify_folders_and_classes_must_agree(tmp_path: Path) -> None:
    pair = make_classes(tmp_path)
    with pytest.raises(DataError) as error:
        open_pair(pair, classes=(ClassSpec(name="cat"), ClassSpec(name="cow")))
    one_line(error, "cow", "dog", "differ")
    with pytest.raises(DataError) as error:
        open_pair(FolderPair(images=tmp_path / "cat"), classes=())
    one_line(error, "holds no folders")
    with pytest.raises(DataError) as error:
        open_pair(pair, classes=(), test=FolderPair(images=tmp_path, masks=tmp_path))
    one_line(error, "`test` must name masks exactly where")


def test_folders_that_are_no_named_class_are_left_aside_and_noted(tmp_path: Path) -> None:
    pair = make_classes(tmp_path / "pets", ("cat", "dog", "runs"))
    source = open_pair(pair, classes=(ClassSpec(name="cat"), ClassSpec(name="dog")))
    assert source.notes == (f"{tmp_path}/pets: the folders runs are no classes of the recipe and are not used",)
    assert sum(len(source.split(name)) for name in SPLITS) == 20
    own = make_classes(tmp_path / "own", ("cat", "cow"))
    with pytest.raises(DataError) as error:  # without `classes` every folder is one: another split has to have the same
        open_pair(pair, classes=(), test=own)
    one_line(error, "cow, dog, runs differ")


def test_a_class_may_be_absent_from_what_is_only_scored(tmp_path: Path) -> None:
    pair = make_classes(tmp_path / "train", ("cat", "cow", "dog"))
    own = make_classes(tmp_path / "val", ("cat", "dog"))
    (make_classes(tmp_path / "test", ("cow", "dog")).images / "cat").mkdir()
    source = open_pair(pair, classes=(), validation=own, test=FolderPair(images=tmp_path / "test"))
    said = "no picture of {}, so the {} score says nothing of it"
    assert source.notes == (
        f"{tmp_path}/val: {said.format('cow', 'validation')}", f"{tmp_path}/test: {said.format('cat', 'test')}",
    )  # fmt: skip
    assert {sample.target for sample in source.split("test")} == {1, 2}
    (tmp_path / "none" / "cat").mkdir(parents=True)
    with pytest.raises(DataError) as error:
        open_pair(pair, classes=(), test=FolderPair(images=tmp_path / "none"))
    one_line(error, "none holds no image of a class")
    (tmp_path / "train" / "horse").mkdir()
    with pytest.raises(DataError) as error:  # nothing could be learned of it
        open_pair(pair, classes=())
    one_line(error, "horse holds no images")


def test_classes_that_a_mac_spells_otherwise_are_the_same(tmp_path: Path) -> None:
    make_classes(tmp_path, ("cafe\u0301", "tea"))
    source = open_pair(FolderPair(images=tmp_path), classes=(ClassSpec(name="caf\u00e9"), ClassSpec(name="tea")))
    assert not any("folders" in note for note in source.notes) and {sample.target for sample in source.split("train")} == {0, 1}
    assert [entry.name for entry in open_pair(FolderPair(images=tmp_path), classes=()).classes] == ["cafe\u0301", "tea"]
    assert {sample.name.split("/")[0] for sample in source.split("train")} == {
        "cafe\u0301",
        "tea",
    }  # as they lie there: names decide splits
    with pytest.raises(DataError) as error:
        open_pair(FolderPair(images=tmp_path), classes=tuple(ClassSpec(name=name) for name in ("caf\u00e9", "cafe\u0301", "tea")))
    one_line(error, "is there twice")
    make_classes(tmp_path, ("caf\u00e9",))
    with pytest.raises(DataError) as error:
        open_pair(FolderPair(images=tmp_path), classes=())
    one_line(error, "twice, with its accents written in two ways")


def test_mapping_of_integers_and_colors(tmp_path: Path) -> None:
    path = tmp_path / "m.png"
    numbers = MaskMapping([ClassSpec(name="a", value=300), ClassSpec(name="b", value=4)], 0)
    assert numbers(np.array([[300, 4, 0]], dtype=np.uint16), path).tolist() == [[0, 1, 255]]
    assert numbers(np.array([[4, 0]], dtype=np.uint8), path).tolist() == [[1, 255]]
    assert numbers(np.array([[[4, 4, 4], [0, 0, 0]]], dtype=np.uint8), path).tolist() == [[1, 255]]
    with pytest.raises(DataError) as error:
        numbers(np.array([[[4, 5, 4]]], dtype=np.uint8), path)
    one_line(error, "m.png", "colour picture", "value: [r, g, b]")
    with pytest.raises(DataError):
        numbers(np.array([[-1]], dtype=np.int32), path)
    colors = MaskMapping(PAINTED, (5, 5, 5))
    assert colors(np.array([[[9, 0, 0], [0, 0, 9], [5, 5, 5]]], dtype=np.uint8), path).tolist() == [[1, 0, 255]]
    with pytest.raises(DataError) as error:
        MaskMapping(PAINTED, 255)(np.array([[[5, 5, 5]]], dtype=np.uint8), path)
    one_line(error, "[5, 5, 5]", "[0, 0, 9], [9, 0, 0]", "`ignore` is none")


def test_palettes_map_by_color_or_by_index(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    for number in range(20):
        image = Image.fromarray(np.array([[0, 1, 0, 1, 0, 1, 0, 1]] * 6, dtype=np.uint8))
        image.putpalette([9, 0, 0, 0, 0, 9])
        image.save(tmp_path / "masks" / f"p{number}.png")
    by_color, by_index = open_pair(pair, classes=PAINTED), open_pair(pair, classes=SPECS)
    assert by_color.split("train")[0].labels[0, :2].tolist() == [1, 0]
    assert by_index.split("train")[0].labels[0, :2].tolist() == [0, 1]


@given(st.lists(st.integers(0, 254), min_size=2, max_size=40, unique=True), st.data())
@settings(max_examples=30)
def test_mapping_numbers_the_values_in_order(values: list[int], data: st.DataObject) -> None:
    mapping = MaskMapping([ClassSpec(name=str(value), value=value) for value in values], 255)
    labels = np.array([data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=20))], dtype=np.uint8)
    mask = np.array(values)[labels]
    for dtype in (np.uint8, np.int64):
        np.testing.assert_array_equal(mapping(mask.astype(dtype), Path("a")), labels)


def test_values_that_contradict_each_other() -> None:
    for specs, ignore, word in (
        ([ClassSpec(name="a", value=1), ClassSpec(name="b", value=1)], 255, "two classes have the value 1"),
        ([ClassSpec(name="a", value=1), ClassSpec(name="b")], 255, "two classes"),
        ([ClassSpec(name="a", value=(1, 2, 3)), ClassSpec(name="b")], 255, "mix integers and colours"),
        ([ClassSpec(name="a", value=255), ClassSpec(name="b")], 255, "both class 'a' and `ignore`"),
    ):
        with pytest.raises(DataError) as error:
            MaskMapping(specs, ignore)
        one_line(error, word)
    assert MaskMapping([ClassSpec(name="a", value=0), ClassSpec(name="b", value=255)], None)


@given(st.integers(2, 255))
@settings(max_examples=20)
def test_colors_are_filled_in_and_all_different(count: int) -> None:
    assert len(set(distinct_colors(count))) == count
    first = distinct_colors(1)[0]
    specs = [ClassSpec(name=str(number), color=first if number == 1 else None) for number in range(count)]
    infos = class_infos(specs)
    assert infos[1].color == first
    assert len({info.color for info in infos}) == count


def test_names_are_unique_and_two_at_least() -> None:
    for specs, word in (([ClassSpec(name="a")], "1 classes"), ([ClassSpec(name="a"), ClassSpec(name="a")], "'a' is there twice")):
        with pytest.raises(DataError, match=word):
            class_infos(specs)


def test_pictures_stay_in_their_split_where_a_system_spells_accents_otherwise(tmp_path: Path) -> None:
    names = {}
    for spelt in ("caf\u00e9", "cafe\u0301"):
        make_classes(tmp_path / spelt, (spelt, "tea"), count=40)
        source = open_pair(FolderPair(images=tmp_path / spelt), classes=())
        names[spelt] = {split: sorted(composed(sample.name) for sample in source.split(split)) for split in SPLITS}
    one, other = names.values()
    assert one == other and all(any(name.startswith("caf") for name in found) for found in one.values())


def test_a_run_beside_classes_that_are_not_named_is_no_class(tmp_path: Path) -> None:
    make_classes(tmp_path)
    (tmp_path / "runs" / "pets" / "checkpoints").mkdir(parents=True)
    source = open_pair(FolderPair(images=tmp_path), classes=())
    assert [entry.name for entry in source.classes] == ["cat", "dog"]
    assert source.notes == (f"{tmp_path}: the folders runs are no classes of the recipe and are not used",)
    shutil.rmtree(tmp_path / "runs")
    make_classes(tmp_path, ("runs",))
    assert [entry.name for entry in open_pair(FolderPair(images=tmp_path), classes=()).classes] == ["cat", "dog", "runs"]
