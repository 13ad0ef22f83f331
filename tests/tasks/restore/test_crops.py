from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from muntin.data.augmentation import NO_AUGMENTATION, Augmentation
from muntin.data.batches import Crops, calibration_batches, small_picture_notes
from muntin.data.source import HeldSamples
from muntin.tasks.restore.degradation import Degradation, generator_of, reduced
from muntin.tasks.samples import Sample
from smooth_pictures import smooth_picture

EVERYTHING = Augmentation(flip_horizontal=0.5, flip_vertical=0.5, scale=(0.5, 2), brightness=0.3, contrast=0.3, saturation=0.3)


def made(degrade: Degradation, side: int = 48) -> HeldSamples:
    pictures = [smooth_picture(side, side + 8, seed) for seed in range(3)]
    images = [degrade(clean, generator_of("a")) for clean in pictures]
    return HeldSamples([Sample(name="a", image=i, target=c, degradation=degrade) for i, c in zip(images, pictures, strict=True)])


def crops(samples: HeldSamples, **fields: Any) -> Crops:
    return Crops(samples, **{"task": "restore", "crop": 16, "batch_size": 6, "seed": 3, "augmentation": EVERYTHING, **fields})


def test_crops_are_degraded_anew() -> None:
    batches = crops(made(Degradation(noise=20, scale=2)))
    images, targets = batches.batch(0)
    assert images.shape == (6, 3, 16, 16)
    assert targets.shape == (6, 3, 32, 32)
    assert targets.dtype is torch.uint8
    for image, target in zip(images.permute(0, 2, 3, 1).numpy(), targets.permute(0, 2, 3, 1).numpy(), strict=True):
        error = image.astype(float) - reduced(np.ascontiguousarray(target), 2)
        assert 14 < error.std() < 26  # the same place, flipped and coloured alike
    for one, other in zip(batches.batch(0), (images, targets), strict=True):
        assert torch.equal(one, other)
    rows = batches.batch(0, slice(2, 4))
    assert torch.equal(rows[0], images[2:4])
    assert not torch.equal(batches.batch(1)[0], images)


def test_crops_of_pairs_are_flipped_only() -> None:
    pictures = [smooth_picture(60, 72, seed) for seed in range(2)]
    samples = HeldSamples([Sample(name="a", image=reduced(clean, 3), target=clean) for clean in pictures])
    images, targets = crops(samples, crop=8).batch(0)
    assert targets.shape == (6, 3, 24, 24)
    for image, target in zip(images.permute(0, 2, 3, 1).numpy(), targets.permute(0, 2, 3, 1).numpy(), strict=True):
        inner = np.s_[2:-2, 2:-2]  # the border of a crop saw other neighbours
        np.testing.assert_allclose(image[inner].astype(int), reduced(np.ascontiguousarray(target), 3)[inner], atol=2)
    pixels = {tuple(pixel) for clean in pictures for pixel in clean.reshape(-1, 3)}
    assert {tuple(pixel) for pixel in targets.permute(0, 2, 3, 1).reshape(-1, 3).numpy()} <= pixels  # neither zoomed nor coloured


def test_small_pictures_are_mirrored() -> None:
    samples = made(Degradation(noise=1), side=10)
    images, targets = crops(samples, augmentation=NO_AUGMENTATION).batch(0)
    assert int(targets.min()) > 0  # no black border
    assert (images.float() - targets.float()).abs().mean() < 1.2
    (note,) = small_picture_notes(samples, task="restore", crop=16)
    assert "mirrored" in note


def test_calibration_crops_are_degraded() -> None:
    samples = made(Degradation(noise=20, scale=2))
    batches = list(calibration_batches(samples, crop=16, count=5, batch_size=2, seed=0, task="restore"))
    assert [batch.shape for batch in batches] == [(2, 3, 16, 16), (2, 3, 16, 16), (1, 3, 16, 16)]
    roughness = float(batches[0].float().diff(dim=3).abs().mean())
    assert roughness == pytest.approx(20 * 2 / np.pi**0.5, rel=0.3)  # that of the noise
