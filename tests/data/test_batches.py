from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import muntin.data
from muntin.data.batches import Crops, ImageBatch, calibration_batches, class_cells, prefetch, small_picture_notes
from muntin.data.config import Augmentation
from muntin.data.earth import EarthSource
from muntin.data.source import HeldSamples
from muntin.errors import DataError
from muntin.images import middle_square
from muntin.tasks.crops import Draw
from muntin.tasks.learning import LEARNING
from muntin.tasks.samples import Sample

cut = LEARNING["segment"].cut

FLIPS = Augmentation(flip_horizontal=0.5, flip_vertical=0.5, scale=(1, 1), brightness=0, contrast=0, saturation=0)
EVERYTHING = Augmentation(flip_horizontal=0.5, flip_vertical=0.5, scale=(0.5, 2), brightness=0.3, contrast=0.3, saturation=0.3)


def coded(height: int, width: int, channels: int = 3, *, index: int = 0) -> Sample:
    """A picture whose channels are row, column and sample index; its labels are a function of row and column."""
    rows, columns = np.mgrid[:height, :width]
    planes = [rows, columns, np.full((height, width), index)] + [rows] * (channels - 3)
    labels = ((rows * 3 + columns * 5) % 7).astype(np.uint8)
    return Sample(name=str(index), image=np.stack(planes[:channels], axis=2).astype(np.uint8), target=labels)


def blocks(height: int, width: int) -> Sample:
    """A picture of smooth ramps, with labels that are the ramps rounded down to multiples of 16."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows * 2, columns * 2, np.zeros_like(rows)], axis=2).astype(np.uint8)
    return Sample(name="ramp", image=image, target=(rows * 2 // 16 * 16).astype(np.uint8))


sizes = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=4)


@given(sizes=sizes, crop=st.integers(1, 40), seed=st.integers(0, 99), rare=st.sampled_from([0.0, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_crops_of_any_size(sizes: list[tuple[int, int]], crop: int, seed: int, rare: float) -> None:
    samples = [coded(height, width, index=index) for index, (height, width) in enumerate(sizes)]
    crops = Crops(samples, task="segment", crop=crop, batch_size=3, seed=seed, augmentation=FLIPS, rare=rare)
    images, targets = crops.batch(0)
    assert images.shape == (3, 3, crop, crop)
    assert images.dtype == torch.uint8
    assert targets.dtype == torch.int64
    for draw, image, target in zip(crops.draws(0), images.numpy(), targets.numpy(), strict=True):
        height, width = sizes[draw.index]
        inside = target != 255
        # All pixels of the picture that fit into the crop, and black around them.
        assert inside.sum() == min(height, crop) * min(width, crop)
        assert not image[:, ~inside].any()
        assert (image[2][inside] == draw.index).all()
        rows, columns = image[0][inside].astype(int), image[1][inside].astype(int)
        np.testing.assert_array_equal(target[inside], (rows * 3 + columns * 5) % 7)
        assert len(set(zip(rows.tolist(), columns.tolist(), strict=True))) == inside.sum()


@given(zoom=st.floats(0.5, 3), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_crops_with_zoom(zoom: float, seed: int) -> None:
    augmentation = FLIPS.model_copy(update={"scale": (zoom, zoom)})
    crops = Crops([blocks(100, 110)], task="segment", crop=32, batch_size=2, seed=seed, augmentation=augmentation)
    images, targets = crops.batch(0)
    # A label is the ramp below it rounded down to 16; the zoom adds an error of at most one pixel at a step.
    assert not (targets % 16).any()  # no label is interpolated
    error = images[:, 0].float() - targets.float()
    slack = 2 / zoom + 2
    assert error.min() >= -slack
    assert error.max() <= 16 + slack
    assert abs(float(error.mean()) - 7) < 5  # the mean is half a step; a shift by a whole step would fail


def test_cut_with_flips() -> None:
    sample = coded(8, 8)
    plain_image, plain_target = cut(sample, Draw(index=0, top=0, left=0, side=8), 8)
    image, target = cut(sample, Draw(index=0, top=0, left=0, side=8, flip_horizontal=True), 8)
    assert torch.equal(image, plain_image.flip(-1))
    assert torch.equal(target, plain_target.flip(-1))
    image, target = cut(sample, Draw(index=0, top=0, left=0, side=8, flip_vertical=True), 8)
    assert torch.equal(image, plain_image.flip(-2))
    assert torch.equal(target, plain_target.flip(-2))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_cut_with_color_changes(channels: int) -> None:
    sample = coded(40, 40, channels)
    sample.image[...] = np.random.default_rng(0).integers(20, 200, sample.image.shape)
    plain = Draw(index=0, top=3, left=4, side=32)
    bright = Draw(index=0, top=3, left=4, side=32, brightness=1.2, contrast=0.8, saturation=1.3)
    before, target = cut(sample, plain, 32)
    after, same = cut(sample, bright, 32)
    assert after.shape == before.shape == (channels, 32, 32)
    assert after.float().mean() > before.float().mean()
    assert torch.equal(target, same)


def test_cut_with_each_color_change() -> None:
    sample = coded(40, 40)
    sample.image[...] = np.random.default_rng(0).integers(40, 200, sample.image.shape)

    def image(**changes: float) -> torch.Tensor:
        return cut(sample, Draw(index=0, top=3, left=4, side=32, **changes), 32)[0].float()

    plain, flat, grey, dark = image(), image(contrast=0.5), image(saturation=0.5), image(brightness=0.5)
    assert float(flat.std() / plain.std()) == pytest.approx(0.5, abs=0.02)
    assert float(grey.std(0).mean() / plain.std(0).mean()) == pytest.approx(0.5, abs=0.02)
    assert float(dark.mean() / plain.mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("task", ["segment", "classify"])
def test_draws_over_the_full_ranges(task: Any) -> None:
    sample = coded(400, 400)
    samples = [sample if task == "segment" else Sample(name="a", image=sample.image, target=1)]
    augmentation = EVERYTHING.model_copy(update={"flip_horizontal": 0.5, "flip_vertical": 0.2})
    draws = Crops(samples, task=task, crop=100, batch_size=2000, seed=0, augmentation=augmentation).draws(0)
    assert np.mean([draw.flip_horizontal for draw in draws]) == pytest.approx(0.5, abs=0.05)
    assert np.mean([draw.flip_vertical for draw in draws]) == pytest.approx(0.2, abs=0.05)
    for name in ("brightness", "contrast", "saturation"):
        factors = [getattr(draw, name) for draw in draws]
        assert 0.7 <= min(factors) < 0.71 and 1.29 < max(factors) <= 1.3
        assert np.mean(factors) == pytest.approx(1, abs=0.02)
    sides = [draw.side for draw in draws]
    least, most = (50, 200) if task == "segment" else (200, 400)  # for `classify` a window is at most as large as the picture
    assert (min(sides), max(sides)) == (pytest.approx(least, abs=1), pytest.approx(most, abs=1))


@given(step=st.integers(0, 10**6), seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_batch_by_seed_and_step(step: int, seed: int) -> None:
    def batch(seed: int, step: int) -> ImageBatch:
        crops = Crops([coded(50, 40), coded(30, 70)], task="segment", crop=24, batch_size=4, seed=seed, augmentation=EVERYTHING, rare=0.5)
        crops.batch(step + 1)  # earlier batches must not matter
        return crops.batch(step)

    first, again = batch(seed, step), batch(seed, step)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], batch(seed, step + 1)[0])
    assert not torch.equal(first[0], batch(seed + 1, step)[0])


def test_draws_by_picture_area() -> None:
    crops = Crops([coded(10, 10), coded(30, 10), coded(60, 10)], task="segment", crop=8, batch_size=2000, seed=0)
    counts = np.bincount([draw.index for draw in crops.draws(0)]) / 2000
    np.testing.assert_allclose(counts, [0.1, 0.3, 0.6], atol=0.04)


def test_draws_with_uniform_positions() -> None:
    crops = Crops([coded(12, 9)], task="segment", crop=8, batch_size=3000, seed=0)
    tops = np.bincount([draw.top for draw in crops.draws(0)]) / 3000
    np.testing.assert_allclose(tops, [0.2] * 5, atol=0.04)


def test_crops_of_rare_classes() -> None:
    labels = np.zeros((200, 300), dtype=np.uint8)
    labels[150, 290], labels[:5] = 3, 255
    samples = [Sample(name="a", image=np.zeros((200, 300, 3), np.uint8), target=labels)] * 2
    crops = Crops(samples, task="segment", crop=16, batch_size=200, seed=0, rare=1.0)
    holds = [(target == 3).any() for target in crops.batch(0)[1]]
    assert 0.35 < np.mean(holds) < 0.65  # two classes, drawn with equal probability
    assert [label for label, _ in class_cells(samples)] == [0, 3]
    default = Crops(samples, task="segment", crop=16, batch_size=200, seed=0)
    assert np.mean([(target == 3).any() for target in default.batch(0)[1]]) < 0.1


def test_class_cells_of_random_labels() -> None:
    labels = np.random.default_rng(0).integers(0, 40, (70, 50), dtype=np.uint8)
    sample = Sample(name="a", image=np.zeros((70, 50, 1), np.uint8), target=labels)
    for label, cells in class_cells([sample]):
        expected = {(0, row // 32, column // 32) for row, column in np.argwhere(labels == label).tolist()}
        assert {tuple(cell) for cell in cells.tolist()} == expected


def test_crops_for_classify() -> None:
    tall = Sample(name="a", image=coded(40, 20).image, target=5)
    crops = Crops([tall], task="classify", crop=32, batch_size=8, seed=0, augmentation=EVERYTHING)
    images, targets = crops.batch(0)
    assert images.shape == (8, 3, 32, 32)
    assert targets.tolist() == [5] * 8
    assert all(10 <= draw.side <= 20 and 0 <= draw.left <= 20 - draw.side and 0 <= draw.top <= 40 - draw.side for draw in crops.draws(0))


def test_cut_and_middle_square_agree() -> None:
    """`predict` prepares a picture without torch; the pixels equal those of the training crop, to rounding."""
    photograph = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    square = Draw(index=0, top=0, left=12, side=48)
    trained, _ = LEARNING["classify"].cut(Sample(name="a", image=photograph, target=2), square, 20)
    predicted = middle_square(photograph, 20)
    assert predicted.shape == (20, 20, 3)
    assert np.abs(trained.permute(1, 2, 0).numpy().astype(int) - predicted).max() <= 1


def test_calibration_batches_by_count() -> None:
    batches = list(calibration_batches([coded(50, 50)], crop=16, count=10, batch_size=4, seed=3, task="segment"))
    assert [tuple(batch.shape) for batch in batches] == [(4, 3, 16, 16), (4, 3, 16, 16), (2, 3, 16, 16)]
    again = list(calibration_batches([coded(50, 50)], crop=16, count=10, batch_size=4, seed=3, task="segment"))
    assert all(torch.equal(one, other) for one, other in zip(batches, again, strict=True))


def test_notes_on_small_pictures() -> None:
    samples = HeldSamples([blocks(40, 50), blocks(20, 90), blocks(32, 32), blocks(31, 19)])
    assert small_picture_notes(samples, task="classify", crop=32) == (
        "2 of 4 training pictures have a side shorter than data.crop 32 (the smallest is 19×31): they are enlarged",
    )
    assert small_picture_notes(samples, task="segment", crop=19) == ()


def test_crops_without_pictures() -> None:
    with pytest.raises(DataError, match="no pictures"):
        Crops([], task="segment", crop=8, batch_size=1, seed=0)


def test_crops_of_the_earth() -> None:
    crops = Crops(
        EarthSource("cover").split("train"), task="segment", crop=256, batch_size=4, seed=0, augmentation=Augmentation(), rare=0.25
    )
    for _, (images, targets) in prefetch(crops.batch, 0, 4):
        assert images.shape == (4, 3, 256, 256)
        assert int(targets.max()) < 6
    assert images.permute(0, 2, 3, 1).is_contiguous()


def test_import_without_torch() -> None:
    subprocess.run([sys.executable, "-c", "import sys, muntin.data; assert 'torch' not in sys.modules"], check=True)
    assert muntin.data.Crops is Crops


def test_import_of_an_unknown_name() -> None:
    with pytest.raises(AttributeError):
        _: Any = muntin.data.nothing
