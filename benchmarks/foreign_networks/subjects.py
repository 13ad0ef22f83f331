"""Pretrained networks that are not muntin's, with real inputs: EfficientNet-Lite0, -1 and -2, and all-MiniLM-L6-v2.

Axes: B images or sentences, C channels, H W map.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from quantizer_peers.data import photographs
from quantizer_peers.networks import ATTENTION, CONVOLUTIONS, lite, minilm, sentence_inputs

Batch = Tensor | dict[str, Tensor]
Named = dict[str, NDArray[Any]]
LITE_SIDES = {0: 224, 1: 240, 2: 260}
BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A network, and what it is judged on.

    `build`: the FP32 module, from the folder of the packages, the folder of this subject's own files, and a seed; it takes raw pixels
    (B, 3, H, W), or tensors by name. `inputs`: named inputs of the engine
    (`images`, uint8 (B, H, W, 3), or the module's own), of the part for calibration and distillation ("train") or for judging ("test"):
    as many as the number says; another seed draws others. `labels`: true classes of the test inputs. `judged_by`: classes are compared by
    the share of equal ones, vectors by their cosine. `distance`: loss of distillation. `keep`: layers that pruning and low rank leave.
    `forms`: of `forms.FORMS`. `macs`, `parameters`: shares that pruning and low rank leave. `schemes`: options of nncf.quantize.
    """

    name: str
    description: str
    build: Callable[[Path, Path, int], nn.Module]
    inputs: Callable[[Path, Literal["train", "test"], int, int], Named]
    labels: Callable[[Path, int], NDArray[np.int64]] | None = None
    judged_by: Literal["classes", "vectors"]
    distance: Any = "scores"
    keep: tuple[str, ...] = ()
    forms: tuple[str, ...]
    macs: float
    parameters: float
    schemes: Mapping[str, Mapping[str, str]]


def batches(inputs: Named, size: int = BATCH) -> list[Batch]:
    """The inputs as the module takes them, in batches."""
    if "images" in inputs:
        return list(torch.from_numpy(inputs["images"]).permute(0, 3, 1, 2).float().contiguous().split(size))
    count = len(next(iter(inputs.values())))
    return [{name: torch.from_numpy(value[start : start + size]) for name, value in inputs.items()} for start in range(0, count, size)]


def without_padding(inputs: Named, size: int = BATCH) -> list[Batch]:
    """Batches of sentences in order of length, without the padding that a whole batch has; of images, `batches`."""
    if "attention_mask" not in inputs:
        return batches(inputs, size)
    lengths = inputs["attention_mask"].sum(1)
    order = np.argsort(lengths, kind="stable")
    parts = [order[start : start + size] for start in range(0, len(order), size)]
    return [{name: torch.from_numpy(value[part, : lengths[part].max()]) for name, value in inputs.items()} for part in parts]


def _crops(side: int, packages: Path, part: Literal["train", "test"], count: int, seed: int) -> Named:
    return {"images": photographs(packages, count, side, side, part=int(part == "test"), seed=seed)}


def _text(packages: Path, part: Literal["train", "test"], count: int, seed: int) -> Named:
    return sentence_inputs(packages, count, int(part == "test"), seed=seed)


def cosine_distance(answer: Tensor, expected: Tensor) -> Tensor:
    """One less the mean cosine of the vectors."""
    return 1 - torch.cosine_similarity(answer, expected).mean()


QUANTISED = ("int8", "w4a8 nearest", "w4a8", "w4.4a8")
NARROWED = ("low rank", "svd by energy", "prune", "torch-pruning")
PRETRAINED = (
    *(
        Subject(
            name=f"efficientnet-lite{level}",
            description=f"EfficientNet-Lite{level} at {side} x {side}, ImageNet's weights",
            build=lambda packages, folder, seed, level=level: lite(packages, level),
            inputs=partial(_crops, side),
            judged_by="classes",
            keep=("model._fc",),
            forms=(*QUANTISED, *(NARROWED if level == 0 else ()), "together"),
            macs=0.8,
            parameters=0.85,
            schemes=CONVOLUTIONS,
        )
        for level, side in LITE_SIDES.items()
    ),
    Subject(
        name="minilm",
        description="all-MiniLM-L6-v2, 64 tokens a sentence",
        build=lambda packages, folder, seed: minilm(packages),
        inputs=_text,
        judged_by="vectors",
        distance=cosine_distance,
        forms=(*QUANTISED, "w5.9a8", *(form for form in NARROWED if form != "torch-pruning"), "together"),
        macs=0.8,
        parameters=0.85,
        schemes=ATTENTION,
    ),
)
