"""The answer of a model for images: which entry of it holds the scores, and the task.

Axes: B images, C channels, H W map, K scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from muntin.deployment.sizes.requested import Size
from muntin.deployment.sources.source_model import SourceModel
from muntin.errors import ExportError
from muntin.models.foreign import ForeignModel

_ENTRIES = ("out", "logits")
"""Entries that hold the scores in what torchvision's segmenters and the models of transformers return."""


@dataclass(frozen=True, kw_only=True)
class AnswerLayout:
    """Scores of one image. `entry`: their name in the dictionary that the model returns. `size`: of the map; None for a classifier."""

    entry: str | None
    outputs: int
    size: Size | None

    @property
    def task(self) -> Literal["classify", "segment"]:
        return "classify" if self.size is None else "segment"


def refuse_free_form(source: str, description: str) -> NoReturn:
    """Raise `ExportError` for a model that is not from pictures to classes."""
    raise ExportError(
        f"'{source}' {description}; a model for pictures takes (B, C, H, W) and returns scores (B, K) for each picture or (B, K, H, W) for "
        "each pixel: for any other, give its inputs by name, --calibration inputs.npz"
    )


def read_answer(source: str, answer: Any) -> AnswerLayout:
    """Return where the scores are in the answer to one image. Raises `ExportError` for an answer that is no scores of classes."""
    entry = next((name for name in _ENTRIES if name in answer), None) if isinstance(answer, Mapping) else None
    scores = answer if entry is None else answer[entry]
    if not isinstance(scores, Tensor) or scores.ndim not in (2, 4):
        refuse_free_form(source, f"returns {_described(answer)}")
    size = None if scores.ndim == 2 else (int(scores.shape[2]), int(scores.shape[3]))
    return AnswerLayout(entry=entry, outputs=int(scores.shape[1]), size=size)


def _described(answer: Any) -> str:
    if isinstance(answer, Tensor):
        return f"a tensor of shape {tuple(answer.shape)}"
    if isinstance(answer, Mapping):
        return f"{type(answer).__name__} with {', '.join(map(str, answer)) or 'no entries'}"
    return f"a value of type {type(answer).__name__}"


class PlainScores(nn.Module):
    """Returns the scores of a model as a tensor. Images (B, C, H, W) as the wrapped model takes them; scores (B, K) or (B, K, H, W).

    `entry`: their name in the wrapped model's answer. `bgr`: gives it the channels in reverse order. `single`: makes of one score x the
    two of a negative and a positive class, -x and x, whose larger one tells the sign of x.
    """

    def __init__(self, model: nn.Module, *, entry: str | None, bgr: bool, single: bool) -> None:
        super().__init__()
        self.model = model
        self.entry, self.bgr, self.single = entry, bgr, single

    def forward(self, image_BCHW: Tensor) -> Tensor:
        if self.bgr:
            image_BCHW = image_BCHW[:, list(reversed(range(image_BCHW.shape[1])))]
        answer = self.model(image_BCHW)
        scores: Tensor = answer if self.entry is None else answer[self.entry]
        return torch.cat([-scores, scores], 1) if self.single else scores


def wrap(opened: SourceModel, answer: AnswerLayout) -> nn.Module:
    """Return the model with muntin's interface: raw pixels 0-255 (B, C, H, W) in, scores (B, K) or (B, K, H, W) out."""
    model, single = opened.model, answer.outputs == 1
    if opened.bgr or single or answer.entry is not None:
        model = PlainScores(model, entry=answer.entry, bgr=opened.bgr, single=single)
    if opened.mean:
        return ForeignModel(model, mean=opened.mean, std=opened.std, task=answer.task)
    if answer.size in (None, opened.size):
        return model
    none = opened.channels * (0.0,)
    return ForeignModel(model, mean=none, std=opened.channels * (1 / 255,), task=answer.task)  # only resizes the scores
