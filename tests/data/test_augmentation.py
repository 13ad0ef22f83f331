"""Presets, and crops that are rotated and joined with others."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from torch.nn.functional import max_pool2d

from muntin.artifact.answers import Task
from muntin.data import Augmentation, Crops, DataConfig, Sample
from muntin.data.augmentation import NO_AUGMENTATION, PRESETS, Preset
from muntin.data.batch_feed import prefetch
from muntin.errors import RecipeError
from muntin.images import IGNORED
from muntin.tasks.crops import Draw
from muntin.tasks.learning import LEARNING
from muntin.training.recipe import Recipe, override_recipe, parse_recipe, recipe_text

cut = LEARNING["segment"].cut


def painted(seed: int = 0, height: int = 60, width: int = 70, label: int | None = None) -> Sample:
    """A picture whose grey levels tell its labels: 50 times the class, in blocks of 10 pixels. With `label`, of one class."""
    blocks = np.random.default_rng(seed).integers(0, 4, (-(-height // 10), -(-width // 10)), dtype=np.uint8)
    labels = np.ascontiguousarray(blocks.repeat(10, 0).repeat(10, 1)[:height, :width])
    grey = 50 * labels if label is None else np.full_like(labels, 50 * label)
    return Sample(name=f"{seed}", image=np.repeat(grey[:, :, None], 3, axis=2), target=labels if label is None else label)


def crops(task: Task, augmentation: Augmentation, *, batch: int = 6, seed: int = 0, samples: list[Sample] | None = None) -> Crops:
    made = [painted(number, label=number if task == "classify" else None) for number in range(4)]
    return Crops(samples or made, task=task, crop=32, batch_size=batch, seed=seed, augmentation=augmentation, classes=4)


# ---- presets ----


def test_preset_and_single_values() -> None:
    strong = DataConfig(augment="strong", augmentation={"rotation": 5})  # type: ignore[arg-type]
    assert strong.augmentation == PRESETS["strong"].model_copy(update={"rotation": 5})
    assert strong == DataConfig(augment="strong", augmentation=Augmentation(rotation=5))
    assert DataConfig().augmentation == PRESETS["light"] == Augmentation()
    assert DataConfig(augment="none").augmentation == NO_AUGMENTATION


@pytest.mark.parametrize("preset", get_args(Preset))
def test_written_recipe_is_read_back(preset: str) -> None:
    recipe = parse_recipe({"data": {"augment": preset, "augmentation": {"hue": 0.25, "saturation": 0.1}}}, where="test")
    for defaults in (False, True):
        text = recipe_text(recipe, defaults=defaults)
        assert parse_recipe(yaml.safe_load(text), where="test") == recipe
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe
    changed = override_recipe(recipe, ["data.augment=none"]).data.augmentation
    assert (changed.hue, changed.rotation) == (0.25, 0)


def test_mixtures_are_for_one_task() -> None:
    with pytest.raises(RecipeError, match=r"data\.augmentation\.mixup 0.5 is for task: classify"):
        parse_recipe({"data": {"augmentation": {"mixup": 0.5}}}, where="test")
    parse_recipe({"data": {"augment": "strong"}}, where="test")
    with pytest.raises(RecipeError, match="add up to more than 1"):
        parse_recipe({"data": {"augmentation": {"mixup": 0.5, "cutmix": 0.6}}}, where="test")


# ---- determinism ----


@pytest.mark.parametrize("task", ["segment", "classify"])
def test_batches_do_not_depend_on_workers_rows_and_order(task: Task) -> None:
    made = crops(task, PRESETS["strong"])
    alone = [made.batch(step) for step in (2, 0, 1)]
    with_workers = [batch for _, batch in prefetch(crops(task, PRESETS["strong"]).batch, 0, 3, workers=3)]
    for step, (images, target) in zip((2, 0, 1), alone, strict=True):
        assert torch.equal(images, with_workers[step][0]) and torch.equal(target, with_workers[step][1])
        part = made.batch(step, slice(2, 5))
        assert torch.equal(part[0], images[2:5]) and torch.equal(part[1], target[2:5])
    assert not torch.equal(alone[0][0], crops(task, PRESETS["strong"], seed=1).batch(2)[0])


# ---- rotation ----


@pytest.mark.parametrize(("angle", "quarter"), [(90.0, 1), (-90.0, 3), (180.0, 2)])
def test_quarter_turns_are_exact(angle: float, quarter: int) -> None:
    sample = painted(1, 40, 40)
    plain = Draw(index=0, top=4, left=6, side=32)
    turned = Draw(index=0, top=4, left=6, side=32, angle=angle)
    (image, target), (image_turned, target_turned) = (cut(sample, draw, 32) for draw in (plain, turned))
    assert torch.equal(target_turned, torch.rot90(target, quarter, (0, 1)))
    assert torch.equal(image_turned, torch.rot90(image, quarter, (1, 2)))


@pytest.mark.parametrize("angle", [11.0, -45.0, 137.0])
def test_masks_turn_with_their_pictures(angle: float) -> None:
    image, target = cut(painted(2, 90, 90), Draw(index=0, top=29, left=29, side=32, angle=angle), 32)
    assert set(target.unique().tolist()) <= {0, 1, 2, 3}  # by nearest neighbour, and from inside the picture
    exact = image[0] == 50 * target
    assert exact.float().mean() > 0.75  # all but the blended edges of the blocks
    largest, smallest = (sign * max_pool2d(sign * target[None].float(), 5, 1)[0] for sign in (1, -1))
    wrong = (image[0].float() - 50 * target).abs()[2:-2, 2:-2]
    assert (wrong[largest == smallest] <= 1).all()  # away from edges


def test_rotation_beyond_the_picture() -> None:
    image, target = cut(painted(3, 32, 32), Draw(index=0, top=0, left=0, side=32, angle=45), 32)
    assert (target == IGNORED).any() and (image[:, target == IGNORED] == 0).float().mean() > 0.8
    bright = Sample(name="", image=np.full((32, 32, 3), 200, np.uint8), target=1)
    image, _ = LEARNING["classify"].cut(bright, Draw(index=0, top=0, left=0, side=32, angle=45), 32)
    assert (image == 200).all()  # mirrored, without black corners


# ---- joined crops ----


def test_mosaic_joins_four_crops() -> None:
    made = crops("segment", NO_AUGMENTATION.model_copy(update={"mosaic": 1.0}), samples=[painted(n, label=None) for n in range(4)])
    draws = made.draws(0)
    assert all(draw.mix is not None and len(draw.mix.others) == 3 for draw in draws)
    images, target = made.batch(0)
    assert torch.equal(images[:, 0], 50 * target)
    draw = draws[0]
    assert draw.mix is not None
    row, column = draw.mix.rows[1], draw.mix.columns[1]
    corner, _ = cut(painted(draw.index), draw, 32)
    last, _ = cut(painted(draw.mix.others[2].index), draw.mix.others[2], 32)
    assert torch.equal(images[0, :, :row, :column], corner[:, :row, :column])
    assert torch.equal(images[0, :, row:, column:], last[:, row:, column:])


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_labels_are_mixed_like_pixels(kind: str) -> None:
    made = crops("classify", NO_AUGMENTATION.model_copy(update={kind: 1.0}), batch=16)
    images, target = made.batch(0)
    assert target.shape == (16, 4) and target.dtype == torch.float32
    torch.testing.assert_close(target.sum(1), torch.ones(16))
    levels = (target * torch.arange(0, 200, 50)).sum(1)  # each class has one grey level, so the mean level tells the shares
    torch.testing.assert_close(images.float().mean((1, 2, 3)), levels, rtol=0, atol=0.6)
    assert (target.max(1).values < 0.999).any()


def test_mixtures_of_a_share_of_the_crops() -> None:
    draws = [draw for step in range(30) for draw in crops("classify", PRESETS["strong"], batch=20).draws(step)]
    kinds = [draw.mix.kind for draw in draws if draw.mix is not None]
    assert 0.14 < kinds.count("mixup") / 600 < 0.26 and 0.14 < kinds.count("cutmix") / 600 < 0.26


def test_hue_turns_colours() -> None:
    red = Sample(name="", image=np.full((8, 8, 3), (200, 10, 10), np.uint8), target=0)
    image, _ = LEARNING["classify"].cut(red, Draw(index=0, top=0, left=0, side=8, hue=1 / 3), 8)
    red_level, green_level, blue_level = image.float().mean((1, 2)).tolist()
    assert green_level > 190 and max(red_level, blue_level) < 20


@pytest.mark.parametrize("options", [{"rotation": 181}, {"hue": 0.6}, {"mosaic": -0.1}])
def test_values_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        parse_recipe({"data": {"augmentation": options}}, where="test")
