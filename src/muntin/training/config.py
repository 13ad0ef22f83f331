"""What a recipe says about the model and its training. Each field states its unit and range."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class ModelChoice(BaseModel):
    """Which model, and what to change in it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(description="a preset (`muntin models`), timm:NAME, torchvision:NAME or package.module:factory")] = (
        "hybrid-s"
    )
    scale: Annotated[int, Field(ge=1, le=4, description="output size over input size; restore only")] = 1
    options: Annotated[dict[str, Any], Field(description="fields of ModelConfig that replace the preset's")] = {}


class TrainingConfig(BaseModel):
    """The loop: AdamW with warm-up and a cosine, weights averaged over time, gradients clipped."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: Annotated[int, Field(ge=1, description="optimiser steps")] = 2000
    batch_size: Annotated[int, Field(ge=1, le=4096, description="crops a step")] = 8
    learning_rate: Annotated[float, Field(gt=0, le=1, description="at the end of the warm-up")] = 2e-3
    warmup: Annotated[float, Field(ge=0, lt=1, description="share of the steps over which the learning rate rises")] = 0.08
    weight_decay: Annotated[float, Field(ge=0, le=1, description="AdamW's, on matrices and kernels only")] = 0.05
    clip: Annotated[float, Field(gt=0, allow_inf_nan=False, description="largest norm of the gradient")] = 1.0
    average: Annotated[
        float, Field(ge=0, lt=1, description="decay a step of the averaged weights, which are what is kept; 0: no averaging")
    ] = 0.995
    overlap_loss: Annotated[float, Field(ge=0, le=10, description="weight of the soft IoU loss beside cross-entropy; segment only")] = 1.0
    gate_cost: Annotated[float, Field(ge=0, le=10, description="weight of the mean openness of the channel gates in the loss")] = 0.0
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16"], Field(description="auto: 16 bits where the hardware computes in them")
    ] = "auto"
    compile: Annotated[bool, Field(description="torch.compile the training step; needs a C++ compiler on CPUs")] = False
    validate_every: Annotated[int, Field(ge=1, description="steps between validations")] = 250
    checkpoint_every: Annotated[int, Field(ge=1, description="steps between checkpoints")] = 250
    threads: Annotated[int | None, Field(ge=1, le=1024, description="threads of the CPU; unset: PyTorch's choice")] = None


class QuantizationConfig(BaseModel):
    """How to quantise to INT8. All fields have working defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration_images: Annotated[int, Field(ge=1, le=4096, description="training crops that calibrate the activations")] = 64
    min_sqnr_db: Annotated[
        float, Field(ge=0, le=60, description="a layer whose INT8 output has less signal over noise (dB) stays 16-bit")
    ] = 15.0
    keep: Annotated[tuple[str, ...], Field(description="layers to leave in 16 bits, by dotted name")] = ()
