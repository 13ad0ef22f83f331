"""Pictures: chosen by the truth alone, drawn as they are said to be. Axes: H W map, C channels."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from muntin.artifact import ClassInfo, Signature
from muntin.data import Crops
from muntin.data.augmentation import NO_AUGMENTATION
from muntin.deployment.pictures import draw_borders, write_crops, write_picture
from muntin.images import IGNORED, RIGHT, WRONG, colorize, read_image, read_mask
from muntin.tasks.classify.pictures import write_class_examples
from muntin.tasks.restore.pictures import write_restored_examples
from muntin.tasks.samples import Sample
from muntin.tasks.segment.pictures import example_windows, worst_windows, write_examples, write_worst

CLASSES = (ClassInfo(name="sea", color=(0, 0, 200)), ClassInfo(name="field", color=(0, 160, 0)), ClassInfo(name="roof", color=(200, 60, 0)))
SIDE = 16


class Reads:
    """A session that answers the class whose number is in the picture's first channel, or always the same one."""

    signature = Signature(task="segment", channels=3, classes=CLASSES)

    def __init__(self, always: int | None = None) -> None:
        self.always = always

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
        labels_BHW = images_BHWC[..., 0] if self.always is None else np.full(images_BHWC.shape[:3], self.always)
        return np.asarray(labels_BHW[:, None] == np.arange(len(CLASSES))[:, None, None], np.float32)


def sample(labels_HW: NDArray[np.uint8], name: str = "here") -> Sample:
    """A picture whose first channel is the truth."""
    image = np.full((*labels_HW.shape, 3), 90, np.uint8)
    image[..., 0] = labels_HW
    return Sample(name=name, image=image, target=labels_HW)


def varied(generator: np.random.Generator, classes: int, height: int = SIDE, width: int = SIDE) -> NDArray[np.uint8]:
    return generator.integers(0, classes, (height, width)).astype(np.uint8)


def tiled() -> list[Sample]:
    """Two pictures of windows of known variety: the second's right half has all classes, the first's lower half two."""
    generator = np.random.default_rng(0)
    first, second = np.zeros((2 * SIDE, SIDE), np.uint8), np.ones((SIDE, 2 * SIDE), np.uint8)
    first[SIDE:] = varied(generator, 2)
    second[:, SIDE:] = varied(generator, 3)
    return [sample(first, "first"), sample(second, "second")]


def test_example_windows_by_variety() -> None:
    assert example_windows(tiled(), side=SIDE, count=2) == [(1, 0, SIDE), (0, SIDE, 0)]
    everywhere = example_windows(tiled(), side=SIDE, count=99)
    assert len(everywhere) == len(set(everywhere)) == 4
    assert example_windows(tiled(), side=SIDE, count=99) == everywhere


def test_example_windows_ignore_images() -> None:
    samples = tiled()
    other = [
        Sample(name=s.name, image=np.random.default_rng(1).integers(0, 256, s.image.shape).astype(np.uint8), target=s.target)
        for s in samples
    ]
    assert example_windows(samples, side=SIDE, count=3) == example_windows(other, side=SIDE, count=3)


def test_example_windows_without_ignored_pixels() -> None:
    labels = np.full((SIDE, 3 * SIDE), IGNORED, np.uint8)
    labels[:, SIDE : 2 * SIDE] = 1
    labels[: SIDE // 2, SIDE : 2 * SIDE] = IGNORED  # half ignored, half of one class: no variety
    labels[0, 2 * SIDE : 2 * SIDE + 2] = (0, 1)
    assert example_windows([sample(labels)], side=SIDE, count=9) == [(0, 0, 2 * SIDE), (0, 0, SIDE)]


def test_example_window_of_a_small_picture() -> None:
    assert example_windows([sample(varied(np.random.default_rng(0), 3, 5, 7))], side=SIDE, count=3) == [(0, 0, 0)]


@pytest.mark.parametrize("always", [None, 2])
def test_example_files(tmp_path: Path, always: int | None) -> None:
    samples = tiled()
    examples = write_examples(tmp_path, Reads(always), samples, CLASSES, side=SIDE, tile=SIDE, count=2)
    assert [example["name"] for example in examples] == ["second, rows 0-16, columns 16-32", "first, rows 16-32, columns 0-16"]
    colors = np.array([entry.color for entry in CLASSES], np.uint8)
    for example, truth in zip(examples, (samples[1].labels[:, SIDE:], samples[0].labels[SIDE:]), strict=True):
        views = {kind: read_image(tmp_path / example[kind]) for kind in ("image", "truth", "prediction", "difference")}
        expected = truth if always is None else np.full_like(truth, always)
        assert np.array_equal(views["image"][..., 0], truth)
        assert np.array_equal(views["truth"], colors[truth])
        assert np.array_equal(views["prediction"], colors[expected])
        assert np.array_equal(views["difference"], np.where((truth == expected)[..., None], RIGHT, WRONG))


def test_example_name_that_is_not_utf_8(tmp_path: Path) -> None:
    named = sample(varied(np.random.default_rng(0), 3), os.fsdecode(b"caf\xe9"))
    (example,) = write_examples(tmp_path, Reads(), [named], CLASSES, side=SIDE, tile=SIDE, count=1)
    assert example["name"] == "caf\\udce9, rows 0-16, columns 0-16"


def test_examples_of_one_channel(tmp_path: Path) -> None:
    class Grey(Reads):
        signature = Signature(task="segment", channels=1, classes=CLASSES)

    labels = varied(np.random.default_rng(0), 3)
    grey = Sample(name="grey", image=labels[..., None], target=labels)
    (example,) = write_examples(tmp_path, Grey(), [grey], CLASSES, side=SIDE, tile=SIDE, count=1)
    assert np.array_equal(read_image(tmp_path / example["image"]), np.repeat(labels[..., None], 3, 2))


def test_whole_picture(tmp_path: Path) -> None:
    labels = varied(np.random.default_rng(0), 3, 70, 90)
    borders = [(0, 40, "train"), (40, 45, "left out"), (45, 90, "test")]
    whole = sample(labels)
    write_picture(tmp_path, Reads(), whole.image, labels, borders, CLASSES, tile=32)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["difference.png", "mask.png", "overlay.png"]
    assert np.array_equal(read_mask(tmp_path / "mask.png"), labels)  # drawn on by nobody
    assert np.array_equal(read_mask(tmp_path / "mask.png", colors=True), colorize(labels, CLASSES))
    overlay, difference = read_image(tmp_path / "overlay.png"), read_image(tmp_path / "difference.png")
    assert overlay.shape == difference.shape == (70, 90, 3)
    assert (overlay[:, 40:45] == 20).all() and (difference[:, 40:45] == 20).all()
    right = difference[60:, 5:35].reshape(-1, 3)  # below the names, off the lines: all right, so all alike
    assert (right == right[0]).all()


def test_draw_borders() -> None:
    picture = np.full((90, 200, 3), 100, np.uint8)
    drawn = draw_borders(picture, [(0, 80, "train"), (80, 90, "left out"), (90, 200, "test")])
    assert (picture == 100).all() and drawn.shape == picture.shape and drawn.dtype == np.uint8
    assert (drawn[:, 80:90] == 20).all()  # the strip between
    assert (drawn[:, 90:92] == 255).all() and (drawn[-2:, 90:200] == 255).all() and (drawn[:, 198:] == 255).all()  # a frame around the test
    assert (drawn[40:, 2:78] == 100).all()  # none around the training part
    assert (drawn[:30, 2:78] != 100).any() and (drawn[2:30, 96:190] != 100).any()  # both have their names


def test_worst_windows_by_mean_iou() -> None:
    truth = [np.zeros((SIDE, 2 * SIDE), np.uint8) for _ in range(3)]
    truth[0][:, SIDE:] = 1
    truth[2][0] = IGNORED
    labels = [one.copy() for one in truth]
    labels[0][:4, SIDE:] = 0  # a quarter of class 1 is lost, in the right window
    labels[1][:, :SIDE] = 2  # half of the picture
    labels[2][0] = 1  # ignored pixels
    found = worst_windows([sample(one) for one in truth], labels, classes=3, side=SIDE, count=5)
    assert [(index, top, left) for _, index, top, left in found] == [(1, 0, 0), (0, 0, SIDE)]
    assert found[0][0] == pytest.approx((0.5 + 0) / 2) and found[1][0] == pytest.approx((16 / 20 + 0.75) / 2)


def test_worst_pictures_are_named(tmp_path: Path) -> None:
    truth = np.zeros((SIDE, SIDE), np.uint8)
    labels = truth.copy()
    labels[3, 5] = 1
    (example,) = write_worst(tmp_path, [sample(truth, "near")], [labels], CLASSES, side=SIDE)
    assert example["name"] == "near: mean IoU 0.498; rows 0-16, columns 0-16"
    assert (read_image(tmp_path / example["difference"])[3, 5] == WRONG).all()
    assert (read_image(tmp_path / example["prediction"]) == colorize(labels, CLASSES)).all()


def test_wrong_pictures_with_the_largest_loss_first(tmp_path: Path) -> None:
    class TaskScores:
        signature = Signature(task="classify", channels=3, classes=CLASSES, side=8)

        def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
            return np.array([[float(images_BHWC[0, 0, 0, 0]) / 10, 0.0, 0.0]], np.float32)

    samples = [Sample(name=f"p{level}", image=np.full((8, 8, 3), level, np.uint8), target=1) for level in (10, 90, 40)]
    examples = write_class_examples(tmp_path, TaskScores(), samples, [np.array([0])] * 3, CLASSES, side=8)
    assert [example["name"].split(":")[0] for example in examples] == ["p90", "p40", "p10"]


def test_picture_of_training_crops(tmp_path: Path) -> None:
    crops = Crops([sample(varied(np.random.default_rng(0), 3))], task="segment", crop=SIDE, batch_size=5, seed=0)
    assert write_crops(tmp_path / "crops.png", crops, CLASSES, task="segment") == 5
    picture = read_image(tmp_path / "crops.png")
    assert picture.shape[1] == 3 * (2 * 256 + 12) and picture.shape[0] > 2 * (256 + 12)
    pictures = [Sample(name="", image=np.full((8, 8, 3), 90, np.uint8), target=label) for label in (0, 2)]
    mixed = Crops(
        pictures, task="classify", crop=8, batch_size=20, seed=0, augmentation=NO_AUGMENTATION.model_copy(update={"mixup": 1.0}), classes=3
    )
    assert write_crops(tmp_path / "kinds.png", mixed, CLASSES, task="classify") == 12
    assert read_image(tmp_path / "kinds.png").shape == (2 * (256 + 28 + 12), 6 * (256 + 12), 3)
    clean = np.ascontiguousarray(np.broadcast_to(np.linspace(0, 255, 32).astype(np.uint8)[:, None, None], (32, 32, 3)))
    doubled = Sample(name="", image=clean[::2, ::2], target=clean)
    pairs = Crops([doubled], task="restore", crop=8, batch_size=3, seed=0, augmentation=NO_AUGMENTATION)
    assert write_crops(tmp_path / "pairs.png", pairs, (), task="restore") == 3
    sheet = read_image(tmp_path / "pairs.png", 3)
    assert sheet.shape == (256 + 12, 3 * (2 * 256 + 12), 3)
    assert np.abs(sheet[:256, :256].astype(int) - sheet[:256, 256:512]).mean() < 40  # the input, and the same place clean


def test_examples_of_restored_pictures(tmp_path: Path) -> None:
    clean = np.full((40, 24, 3), 100, np.uint8)
    clean[20:36, 4:12] = 200  # the lower window is the more varied one
    samples = [Sample(name="photo", image=clean[::2, ::2] + np.uint8(9), target=clean)]
    (example,) = write_restored_examples(tmp_path, samples, [clean + np.uint8(3)], side=20)
    assert example["name"].startswith("photo, rows 20-40, columns 0-20: PSNR ")
    assert example["name"].endswith("38.59 dB after")
    shown = {kind: read_image(tmp_path / example[kind], 3) for kind in ("image", "prediction", "truth", "difference")}
    assert {picture.shape for picture in shown.values()} == {(20, 20, 3)}
    np.testing.assert_array_equal(shown["truth"], clean[20:, :20])
    np.testing.assert_array_equal(shown["difference"], 12)
    assert int(shown["image"][18, 18, 0]) == 109
