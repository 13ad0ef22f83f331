from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muntin.data.folders import FolderSource
from muntin.data.source import SPLITS
from muntin.data.splits import filling_seed, split_of
from muntin.errors import DataError
from muntin.images import write_image
from muntin.images.listing import composed
from muntin.tasks.classes import ClassSpec
from muntin.tasks.folders import FolderPair
from own_sources import folder_source

SPECS = (ClassSpec(name="sea"), ClassSpec(name="land"), ClassSpec(name="ice"))
PAINTED = (ClassSpec(name="sea", value=(0, 0, 9)), ClassSpec(name="land", value=(9, 0, 0)))


def make_pair(root: Path, count: int = 20, *, size: tuple[int, int] = (6, 8)) -> FolderPair:
    """Write images whose pixels are the labels of their masks times ten, so that a mix-up of files shows."""
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
    return folder_source(**options)


def open_classes(root: Path, *names: str, **changes: Any) -> FolderSource:
    """Open class folders; `names` are the recipe's classes, by default all folders."""
    return open_pair(FolderPair(images=root), classes=tuple(ClassSpec(name=name) for name in names), **changes)


def make_classes(root: Path, names: tuple[str, ...] = ("cat", "dog"), count: int = 10) -> FolderPair:
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(count):
            write_image(root / name / f"{number}.png", np.full((5, 6, 3), label, dtype=np.uint8))
    return FolderPair(images=root)


def check_message(error: pytest.ExceptionInfo[DataError], *words: str) -> None:
    text = str(error.value)
    assert "\n" not in text
    for word in words:
        assert word in text


def test_samples_of_images_and_masks(tmp_path: Path) -> None:
    source = open_pair(make_pair(tmp_path))
    names = []
    for split in SPLITS:
        samples = source.split(split)
        assert len(samples) == len(list(samples.sizes())) > 0
        for sample in samples:
            np.testing.assert_array_equal(sample.image[:, :, 0], sample.labels * 10)
            names.append(sample.name)
        assert set(samples.sizes()) == {(6, 8)}
    assert sorted(names) == sorted(f"p{number}" for number in range(20))
    assert source.task == "segment"
    assert source.check() == ()


def test_splits_with_folders_of_their_own(tmp_path: Path) -> None:
    pairs = {name: make_pair(tmp_path / name, count) for name, count in (("train", 5), ("validation", 2), ("test", 3))}
    source = open_pair(pairs["train"], validation=pairs["validation"], test=pairs["test"])
    assert [len(source.split(name)) for name in SPLITS] == [5, 2, 3]


def test_splits_after_adding_files(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    before = {sample.name: name for name in SPLITS for sample in open_pair(pair).split(name)}
    write_image(tmp_path / "images" / "a.png", np.full((6, 8, 3), 10, dtype=np.uint8))
    write_image(tmp_path / "masks" / "a.png", np.full((6, 8), 1, dtype=np.uint8))
    after = {sample.name: name for name in SPLITS for sample in open_pair(pair).split(name)}
    assert after.pop("a")
    assert after == before


def test_splits_of_which_one_is_empty(tmp_path: Path) -> None:
    pair, keys = make_pair(tmp_path, 4), [f"p{number}" for number in range(4)]
    bad_seed = next(seed for seed in range(99) if "test" not in {split_of(key, seed, {"validation": 0.2, "test": 0.2}) for key in keys})
    with pytest.raises(DataError) as error:
        open_pair(pair, seed=bad_seed)
    good_seed = filling_seed(keys, {"validation": 0.2, "test": 0.2}, bad_seed + 1)
    check_message(error, "is empty", f"`seed: {good_seed}`")
    assert len(open_pair(pair, seed=good_seed).split("test"))


def test_splits_that_share_pictures(tmp_path: Path) -> None:
    pair, own = make_pair(tmp_path / "a"), make_pair(tmp_path / "b")
    with pytest.raises(DataError) as error:
        open_pair(pair, validation=own, test=own)
    check_message(error, "b/images/p0.png is in the validation and in the test split (and 19 more are in two splits)")


def test_check_with_progress(tmp_path: Path) -> None:
    source = open_pair(make_pair(tmp_path), classes=(*SPECS, ClassSpec(name="lava")))
    calls: list[tuple[int, int]] = []
    (note,) = source.check(lambda done, total: calls.append((done, total)))
    assert calls == [(number, 20) for number in range(1, 21)]
    assert "lava" in note


@pytest.mark.parametrize("name", SPLITS)
def test_check_of_a_split_with_only_ignored_pixels(tmp_path: Path, name: str) -> None:
    pairs = {split: make_pair(tmp_path / split, count) for split, count in zip(SPLITS, (3, 1, 2), strict=True)}
    for mask in (tmp_path / name / "masks").iterdir():
        write_image(mask, np.full((6, 8), 255, np.uint8))
    with pytest.raises(DataError) as error:
        open_pair(pairs["train"], validation=pairs["validation"], test=pairs["test"]).check()
    check_message(error, f"every pixel of the masks of the {name} split is ignored")


def test_check_of_a_damaged_file(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    path = tmp_path / "images" / "p7.png"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(DataError) as error:
        open_pair(pair).check()
    check_message(error, "p7.png", "damaged or cut off", "replace it or remove it, or name it under data.skip")
    for number in range(12):
        (tmp_path / "masks" / f"p{number}.png").write_text("nothing")
    with pytest.raises(DataError) as error:
        open_pair(pair).check()
    check_message(error, "; 10 or more pictures cannot be used, also ", "correct them, or name them under data.skip")
    assert open_pair(pair, skip=[tmp_path / "images" / f"p{number}.png" for number in range(12)]).check() == ()


def test_check_of_sizes_that_differ(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    write_image(tmp_path / "masks" / "p3.png", np.zeros((6, 9), dtype=np.uint8))
    with pytest.raises(DataError) as error:
        open_pair(pair).check()
    check_message(error, "p3.png", "8×6", "9×6")
    write_image(tmp_path / "masks" / "p3.png", np.zeros((8, 6), dtype=np.uint8))
    with pytest.raises(DataError) as error:
        open_pair(pair).check()
    check_message(error, "8×6", "6×8", "EXIF orientation: rotate the mask")


def test_check_of_a_value_of_no_class(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    write_image(tmp_path / "masks" / "p3.png", np.array([[0, 1, 7, 255, 9, 7, 7, 0]] * 6, dtype=np.uint8))
    with pytest.raises(DataError) as error:
        open_pair(pair).check()
    check_message(error, "p3.png", "values 7, 9,", "allowed are 0, 1, 2", "`ignore` is 255")


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").touch()
    for images, message in (("nowhere", "does not exist"), ("empty", "holds no images"), ("images/p1.png", "is not a folder")):
        with pytest.raises(DataError) as error:
            open_pair(FolderPair(images=tmp_path / images, masks=pair.masks))
        check_message(error, images, message)
    (tmp_path / "masks" / "p5.png").unlink()
    with pytest.raises(DataError) as error:
        open_pair(pair).split("train")
    check_message(error, "p5.png has no mask: add ", str(tmp_path / "masks" / "p5.png"), "remove the image, or name it under data.skip")


def test_check_of_several_kinds_of_failures(tmp_path: Path) -> None:
    """Equal stems, a missing mask and a file that cannot be read are reported together; data.skip mends them."""
    pair = make_pair(tmp_path)
    write_image(tmp_path / "images" / "p6.jpg", np.zeros((6, 8, 3), dtype=np.uint8))
    (tmp_path / "masks" / "p5.png").unlink()
    (tmp_path / "images" / "p7.png").write_text("nothing")
    with pytest.raises(DataError) as error:
        open_pair(pair, root=tmp_path).check()
    check_message(
        error,
        "p6.jpg and p6.png have the same stem: rename or remove one; 3 pictures cannot be used, also images/p5.png (no mask), "
        "images/p7.png: correct",
    )
    with pytest.raises(DataError, match=r"under data\.skip \(data\.skip names p7\.png, which is not among the pictures: give paths from"):
        open_pair(pair, skip=[tmp_path / "p7.png"], root=tmp_path).check()
    skip = [tmp_path / "images" / name for name in ("p6.jpg", "p5.png", "p7.png")]
    source = open_pair(pair, skip=skip, root=tmp_path)
    assert source.check() == () and source.notes == ("left out by data.skip: images/p6.jpg, images/p5.png, images/p7.png",)
    assert sum(len(source.split(name)) for name in SPLITS) == 18
    shutil.rmtree(tmp_path / "masks")
    (tmp_path / "masks").mkdir()
    write_image(tmp_path / "masks" / "other.png", np.zeros((6, 8), dtype=np.uint8))
    with pytest.raises(DataError) as error:  # no split has a picture left
        open_pair(pair, skip=skip, root=tmp_path)
    check_message(error, "p0.png has no mask", "; 10 or more pictures cannot be used, also images/p1.png (no mask), ")


def test_notes_on_unused_files(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    for name in ("Thumbs.db", ".hidden.png", "a.txt", "b.txt", "c.txt", "recipe.yaml"):
        (tmp_path / "images" / name).touch()
    (tmp_path / "images" / "more").mkdir()
    write_image(tmp_path / "masks" / "unused.png", np.zeros((6, 8), dtype=np.uint8))
    assert open_pair(pair).notes == (
        f"{pair.images}: 4 files other than images, not used: Thumbs.db, a.txt, b.txt and 1 more",
        f"{pair.images}: the files in its subfolders (more) are not used",
        f"{pair.masks}: 1 mask without an image, not used: unused.png",
    )


def make_nested(root: Path) -> FolderPair:
    """Pictures at two depths, two of one stem in different folders."""
    pair = make_pair(root, 8)
    assert pair.masks is not None
    for folder in ("2023", "2024/may"):
        for number in range(6):
            for side in (pair.images, pair.masks):
                (side / folder).mkdir(parents=True, exist_ok=True)
                (side / folder / f"p{number}.png").write_bytes((side / f"p{number + 1}.png").read_bytes())
    return pair


def test_pictures_in_subfolders(tmp_path: Path) -> None:
    pair = make_nested(tmp_path)
    source = open_pair(pair)
    samples = [sample for name in SPLITS for sample in source.split(name)]
    assert sorted(sample.name for sample in samples) == sorted(
        [f"{folder}p{n}" for folder, count in (("", 8), ("2023/", 6), ("2024/may/", 6)) for n in range(count)]
    )
    assert all((sample.image[:, :][:, :, 0] == 10 * sample.labels[:, :]).all() for sample in samples)
    assert source.notes == ()
    flat = open_pair(make_pair(tmp_path / "flat", 8))
    for name in SPLITS:  # the pictures at the top stay in their splits
        assert {s.name for s in flat.split(name)} == {s.name for s in source.split(name) if "/" not in s.name}


def test_subfolders_without_counterpart_and_masks(tmp_path: Path) -> None:
    pair = make_nested(tmp_path)
    assert pair.masks is not None
    (pair.images / "raw").mkdir()
    (pair.images / "raw" / "x.png").write_bytes((pair.images / "p0.png").read_bytes())
    (pair.images / "loop").symlink_to(pair.images)
    (pair.masks / "loop").symlink_to(pair.masks)
    assert f"{pair.images}: the files in its subfolders (loop, raw) are not used" in open_pair(pair).notes
    (pair.masks / "2024" / "may" / "p3.png").unlink()
    with pytest.raises(DataError) as error:
        open_pair(pair).split("train")
    check_message(error, f"{pair.images}/2024/may/p3.png has no mask: add {pair.masks}/2024/may/p3.png")


def test_skipped_pictures(tmp_path: Path) -> None:
    """An image without a mask, an image by its mask, and a name of no picture."""
    pair = make_pair(tmp_path)
    before = {sample.name: name for name in SPLITS for sample in open_pair(pair).split(name)}
    (tmp_path / "masks" / "p2.png").unlink()
    skip = [tmp_path / "masks" / ".." / "images" / "p2.png", tmp_path / "masks" / "p3.png", tmp_path / "images" / "p99.png"]
    source = open_pair(pair, skip=skip)
    left_out = f"left out by data.skip: {skip[0]}, {skip[1]}"
    assert source.notes == (left_out, f"data.skip names {skip[2]}, which is not among the pictures: give paths from the recipe's folder")
    after = {sample.name: name for name in SPLITS for sample in source.split(name)}
    assert after == {name: split for name, split in before.items() if name not in ("p2", "p3")}
    make_classes(tmp_path / "pets")
    pets = FolderPair(images=tmp_path / "pets")
    source = open_pair(pets, classes=(), skip=[tmp_path / "pets" / "cat" / "1.png"], root=tmp_path / "pets")
    assert source.notes == ("left out by data.skip: cat/1.png",)
    assert "cat/1" not in {sample.name for name in SPLITS for sample in source.split(name)}
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name / "2.png").write_text("nothing")
    with pytest.raises(DataError, match=r"; 2 pictures cannot be used, also (cat|dog)/2\.png: correct them"):
        open_pair(pets, classes=(), root=tmp_path / "pets").check()


def test_samples_in_the_cache(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    samples = open_pair(pair).split("train")
    assert samples[0] is samples[0]
    samples = open_pair(pair, cache_bytes=0).split("train")
    assert samples[0] is not samples[0]


def test_samples_of_palette_masks(tmp_path: Path) -> None:
    pair = make_pair(tmp_path)
    for number in range(20):
        image = Image.fromarray(np.array([[0, 1, 0, 1, 0, 1, 0, 1]] * 6, dtype=np.uint8))
        image.putpalette([9, 0, 0, 0, 0, 9])
        image.save(tmp_path / "masks" / f"p{number}.png")
    by_color, by_index = open_pair(pair, classes=PAINTED), open_pair(pair, classes=SPECS)
    assert by_color.split("train")[0].labels[0, :2].tolist() == [1, 0]
    assert by_index.split("train")[0].labels[0, :2].tolist() == [0, 1]


def test_classes_of_folders(tmp_path: Path) -> None:
    make_classes(tmp_path)
    source = open_classes(tmp_path)
    assert source.task == "classify"
    assert [entry.name for entry in source.classes] == ["cat", "dog"]
    for name in SPLITS:
        for sample in source.split(name):
            assert sample.image[0, 0, 0] == sample.target
    assert source.check() == ()
    swapped = open_classes(tmp_path, "dog", "cat")
    assert all(sample.image[0, 0, 0] == 1 - int(np.asarray(sample.target)) for sample in swapped.split("train"))
    (tmp_path / "cat" / "2024").mkdir()
    (tmp_path / "cat" / "0.png").rename(tmp_path / "cat" / "2024" / "1.png")
    nested = open_classes(tmp_path)
    samples = {sample.name: sample for name in SPLITS for sample in nested.split(name)}
    assert nested.notes == () and len(samples) == 20 and samples["cat/2024/1"].target == samples["cat/1"].target
    for spelling in ("caf\u00e9", "cafe\u0301"):
        (tmp_path / "dog" / spelling).mkdir()
        (tmp_path / "dog" / spelling / "1.png").write_bytes((tmp_path / "dog" / "1.png").read_bytes())
    with pytest.raises(DataError, match="have the same name: rename or remove one"):
        open_classes(tmp_path).split("train")


def test_classes_that_differ_from_the_folders(tmp_path: Path) -> None:
    make_classes(tmp_path)
    with pytest.raises(DataError) as error:
        open_classes(tmp_path, "cat", "cow")
    check_message(error, "cow", "dog", "differ")
    with pytest.raises(DataError) as error:
        open_classes(tmp_path / "cat")
    check_message(error, "holds no folders")
    with pytest.raises(DataError) as error:
        open_classes(tmp_path, test=FolderPair(images=tmp_path, masks=tmp_path))
    check_message(error, "`test` must name masks exactly where")


def test_classes_that_the_recipe_does_not_name(tmp_path: Path) -> None:
    make_classes(tmp_path / "pets", ("cat", "dog", "runs"))
    source = open_classes(tmp_path / "pets", "cat", "dog")
    assert source.notes == (f"{tmp_path}/pets: the folders runs are not classes of the recipe and are not used",)
    assert sum(len(source.split(name)) for name in SPLITS) == 20
    with pytest.raises(DataError) as error:  # without `classes` each folder is a class, and another split must have the same
        open_classes(tmp_path / "pets", test=make_classes(tmp_path / "own", ("cat", "cow")))
    check_message(error, "cow, dog, runs differ")


def test_classes_that_a_split_folder_lacks(tmp_path: Path) -> None:
    make_classes(tmp_path / "train", ("cat", "cow", "dog"))
    validation, test = make_classes(tmp_path / "val", ("cat", "dog")), make_classes(tmp_path / "test", ("cow", "dog"))
    (tmp_path / "test" / "cat").mkdir()
    source = open_classes(tmp_path / "train", validation=validation, test=test)
    assert source.notes == (
        f"{tmp_path}/val: no picture of cow, so the validation score says nothing about it",
        f"{tmp_path}/test: no picture of cat, so the test score says nothing about it",
    )
    assert {sample.target for sample in source.split("test")} == {1, 2}
    (tmp_path / "none" / "cat").mkdir(parents=True)
    with pytest.raises(DataError) as error:
        open_classes(tmp_path / "train", test=FolderPair(images=tmp_path / "none"))
    check_message(error, "none holds no image of a class")


def test_classes_without_training_pictures(tmp_path: Path) -> None:
    make_classes(tmp_path)
    (tmp_path / "horse").mkdir()
    with pytest.raises(DataError) as error:
        open_classes(tmp_path)
    check_message(error, "horse holds no images")


def test_classes_that_a_share_lacks(tmp_path: Path) -> None:
    make_classes(tmp_path, ("one",), count=1)
    make_classes(tmp_path, ("two",), count=39)
    source = open_classes(tmp_path)
    lacking = [name for name in ("validation", "test") if {sample.target for sample in source.split(name)} == {1}]  # type: ignore[arg-type]
    assert lacking
    note = "split has no picture of one, so its score says nothing about it: add pictures, or change `data.seed`"
    assert source.notes == tuple(f"the {name} {note}" for name in lacking)


def test_classes_with_decomposed_accents(tmp_path: Path) -> None:
    make_classes(tmp_path, ("cafe\u0301", "tea"))
    source = open_classes(tmp_path, "caf\u00e9", "tea")
    assert not any("folders" in note for note in source.notes) and {sample.target for sample in source.split("train")} == {0, 1}
    assert {sample.name.split("/")[0] for sample in source.split("train")} == {"cafe\u0301", "tea"}  # as the file system stores them
    assert [entry.name for entry in open_classes(tmp_path).classes] == ["cafe\u0301", "tea"]
    make_classes(tmp_path, ("caf\u00e9",))
    with pytest.raises(DataError) as error:
        open_classes(tmp_path)
    check_message(error, "twice, with its accents encoded in two ways")


def test_splits_with_decomposed_accents(tmp_path: Path) -> None:
    names = []
    for spelling in ("caf\u00e9", "cafe\u0301"):
        make_classes(tmp_path / spelling, (spelling, "tea"), count=40)
        source = open_classes(tmp_path / spelling)
        names.append({split: sorted(composed(sample.name) for sample in source.split(split)) for split in SPLITS})
    assert names[0] == names[1]
    assert all(any(name.startswith("caf") for name in split_names) for split_names in names[0].values())


def test_classes_beside_a_results_folder(tmp_path: Path) -> None:
    make_classes(tmp_path)
    (tmp_path / "runs" / "pets" / "checkpoints").mkdir(parents=True)
    source = open_classes(tmp_path)
    assert [entry.name for entry in source.classes] == ["cat", "dog"]
    assert source.notes == (f"{tmp_path}: the folders runs are not classes of the recipe and are not used",)
    shutil.rmtree(tmp_path / "runs")
    make_classes(tmp_path, ("runs",))
    assert [entry.name for entry in open_classes(tmp_path).classes] == ["cat", "dog", "runs"]
