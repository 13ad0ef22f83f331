"""The sections of a recipe on the model, its training and its compression. Each field states its unit and range."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class ModelChoice(BaseModel):
    """Which model, and what to change in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(description="a preset (`muntin models`), timm:NAME, torchvision:NAME or package.module:factory")] = (
        "hybrid-s"
    )
    options: Annotated[dict[str, Any], Field(description="fields of ModelConfig that replace the preset's")] = {}
    size_divisor: Annotated[
        int,
        Field(
            ge=1, le=1024,
            description="of a model that is not ours: its pictures' sides have to be multiples of it; others are padded, its answers cut",
        ),
    ] = 1  # fmt: skip
    weights: Annotated[Path | None, Field(description="a .safetensors file of weights that training begins with; unset: random ones")] = (
        None
    )


class TrainingConfig(BaseModel):
    """The loop: Muon and AdamW with warm-up and a cosine, weights averaged over time, gradients clipped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[int, Field(ge=1, description="optimiser steps at most")] = 2000
    minutes: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="wall-clock minutes at most: the nearer limit drives the schedule; no two such runs are alike",
        ),
    ] = None
    batch_size: Annotated[int, Field(ge=1, le=4096, description="crops a step")] = 8
    learning_rate: Annotated[float, Field(gt=0, le=1, description="at the end of the warm-up")] = 4e-3
    final_learning_rate: Annotated[float, Field(ge=0, le=1, description="at the end of the run, where the cosine ends")] = 0.0
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the run over which the learning rate rises")] = 0.08
    weight_decay: Annotated[float, Field(ge=0, le=1, description="of matrices and kernels, by AdamW's rule")] = 0.05
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False, description="largest norm of the gradient")] = 1.0
    average: Annotated[
        float, Field(ge=0, lt=1, description="decay a step of the averaged weights, which are what is kept; 0: no averaging")
    ] = 0.995
    overlap_loss: Annotated[float, Field(ge=0, le=10, description="weight of the soft IoU loss beside cross-entropy; segment only")] = 1.0
    gate_budget: Annotated[
        float, Field(gt=0, le=1, description="share of the multiply-adds behind channel gates to keep: gates close, their channels are cut")
    ] = 1.0
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], Field(description="auto: 16 bits where they are faster, on a CPU as measured at the start")
    ] = "auto"
    compile: Annotated[bool, Field(description="torch.compile the training step; needs a C++ compiler on CPUs")] = False
    validate_every: Annotated[int, Field(ge=1, description="steps between validations")] = 250
    checkpoint_every: Annotated[int, Field(ge=1, description="steps between checkpoints")] = 250
    threads: Annotated[int | None, Field(ge=1, le=1024, description="threads of the CPU; unset: PyTorch's choice")] = None

    @model_validator(mode="after")
    def _falling(self) -> Self:
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate {self.final_learning_rate:g} is above learning_rate {self.learning_rate:g}: it is what that falls to"
            )
        return self

    def share_done(self, step: float, seconds: float) -> float:
        """Share of the run that is done after `step` steps in `seconds`, 0 to 1, by the limit that is nearer (`steps` or `minutes`).

        The schedule follows this share, so a run of 30 minutes warms up, falls and ends like a run of a fixed number of steps.
        """
        in_steps = step / self.steps if self.steps else 1.0
        if self.minutes is None:
            return min(1.0, in_steps)
        return min(1.0, max(in_steps, seconds / (60 * self.minutes) if self.minutes else 1.0))

    def steps_expected(self, step: int, seconds: float) -> int:
        """Steps of the whole run, estimated from its speed up to `step`."""
        return max(step, min(self.steps, round(step / max(self.share_done(step, seconds), 1e-9)))) if step else self.steps

    def rate_at(self, done: float) -> float:
        """Learning rate at the share `done` of the run: linear warm-up, then a cosine to `final_learning_rate`."""
        if done < self.warmup:
            return self.learning_rate * done / self.warmup
        falling = 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * falling


class QuantizationConfig(BaseModel):
    """How to quantise to INT8. All fields have working defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration_images: Annotated[
        int, Field(ge=1, le=4096, description="training crops that calibrate the activations, and ranks by low rank")
    ] = 64
    min_sqnr_db: Annotated[
        float, Field(ge=0, le=60, description="a layer whose INT8 output has less signal over noise (dB) stays 16-bit; not in compression")
    ] = 15.0
    keep: Annotated[tuple[str, ...], Field(description="layers to leave in 16 bits, by dotted name; they may be factored")] = ()


class LowRankConfig(BaseModel):
    """How to factor layers into low rank. All fields have working defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    criterion: Annotated[
        Literal["activation", "energy", "cumulative"],
        Field(
            description="how ranks are chosen. activation: least harm to the model's answer on calibration images under the budget; "
            "energy, cumulative: the same share of each weight's sum of σ², of σ"
        ),
    ] = "activation"
    parameters: Annotated[
        float, Field(gt=0, le=1, description="share of the model's parameters to keep, all of its parameters counted")
    ] = 0.35
    macs: Annotated[
        float | None,
        Field(gt=0, le=1, description="share of the multiply-adds of the layers that can be factored to keep; activation only; unset: any"),
    ] = None
    threshold: Annotated[
        float | None,
        Field(gt=0, le=1, description="share of energy or cumulative, used as it is in place of the budget; unset: what meets the budget"),
    ] = None
    multiple: Annotated[int, Field(ge=1, le=1024, description="ranks are multiples of it; smaller layers take their full rank")] = 16
    keep: Annotated[tuple[str, ...], Field(description="layers to leave dense, by dotted name")] = ()

    @model_validator(mode="after")
    def _threshold_suits(self) -> Self:
        if self.threshold is not None and self.criterion == "activation":
            raise ValueError("threshold is for the criteria energy and cumulative; activation takes parameters")
        if self.macs is not None and self.criterion != "activation":
            raise ValueError("macs is for the criterion activation; energy and cumulative know nothing of what a layer costs to run")
        return self


class StageConfig(BaseModel):
    """One stage of compression: how long it trains, and how fast."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    share: Annotated[float, Field(ge=0, le=10, description="steps (and minutes), as a share of training's; 0: no training")] = 0.2
    learning_rate: Annotated[float, Field(gt=0, le=1, description="at the end of the stage's warm-up")] = 1e-3


class CompressionConfig(BaseModel):
    """The stages after FP32 training, in order: low rank, quantisation-aware training, mixed precision. All fields have defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low_rank: Annotated[LowRankConfig | None, Field(description="how to factor layers; null: keep them dense")] = LowRankConfig()
    weight_bits: Annotated[int, Field(ge=2, le=8, description="bits of weights in quantisation-aware training; activations have 8")] = 4
    average_bits: Annotated[
        float,
        Field(ge=2, le=32, description="bits that a weight may have on average after key layers got more; what stays a float counts as 16"),
    ] = 4.8
    recover: Annotated[StageConfig, Field(description="training after low rank")] = StageConfig(share=0.2, learning_rate=1e-3)
    quantize: Annotated[StageConfig, Field(description="quantisation-aware training")] = StageConfig(share=0.05, learning_rate=4e-4)
    mix: Annotated[StageConfig, Field(description="training with the bits of every layer fixed")] = StageConfig(
        share=0.25, learning_rate=4e-4
    )
    distillation: Annotated[float, Field(ge=0, le=100, description="weight of the distance to the FP32 model's answers in the loss")] = 1.0
    average: Annotated[float, Field(ge=0, lt=1, description="decay a step of the averaged weights in these stages")] = 0.98
    keep: Annotated[tuple[str, ...], Field(description="layers to leave as they are, by dotted name")] = ()

    @model_validator(mode="after")
    def _affordable(self) -> Self:
        if self.average_bits < self.weight_bits:
            raise ValueError(
                f"average_bits {self.average_bits:g} is less than the {self.weight_bits} weight_bits that every layer has at least"
            )
        return self
