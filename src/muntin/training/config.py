"""The sections of a recipe on the model, its training and its compression. Each field states its unit and range."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import ByteSize, Field, model_validator

from muntin.section import Section

Checkpointing = Literal["none", "selective", "full"]
"""From the most memory and the fewest operations to the least memory and the most operations."""

Sharding = Literal["none", "zero1", "zero2", "zero3"]
"""From the most memory and the least communication to the least memory and the most communication."""


OptimizerName = Literal["muon", "adamw", "lion", "schedule-free"]
LossName = Literal["cross-entropy", "focal", "dice", "dice-cross-entropy"]
ClassWeight = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
UpdateStrategy = Literal["replay", "naive", "joint", "frozen"]
LEARNING_RATES = {"adamw": 1e-3, "lion": 2e-4, "schedule-free": 2.5e-3}
"""Default learning rates of the optimisers other than Muon: AdamW's usual one, a fifth of it for Lion (Chen et al., 2302.06675, section 5),
that of the package of Schedule-Free."""


class ActivationBudget(Section):
    """The bound on the memory of a step's gradient, by which blocks are chosen whose activations are computed again."""

    budget: ByteSize = Field(ge=1 << 20, description="most bytes at the peak, beyond what is held before the step, such as 2GiB")


class ModelChoice(Section):
    """The model, and changes to it."""

    name: str = Field(default="hybrid-xxs", description="a preset (`muntin models`), timm:NAME, torchvision:NAME or package.module:factory")
    encoder: str | None = Field(
        default=None, description="timm:NAME: a network of timm in place of a preset's convolutional stages; unset: the preset's own"
    )
    options: dict[str, Any] = Field(default={}, description="fields of ModelConfig that replace the preset's")
    size_divisor: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="divisor of the sides that a foreign model takes: pictures are padded, answers cropped",
    )
    weights: Path | None = Field(
        default=None, description="a .safetensors file of initial weights, of the model or of its encoder; unset: random weights"
    )


class TeacherConfig(Section):
    """A trained model whose answers are learned beside the labels (distillation), in `fit`."""

    model: str = Field(
        min_length=1,
        description="a run, checkpoint or artefact of this task and these classes; or timm:NAME (classify), torchvision:NAME, a preset, "
        "package.module:factory",
    )
    weights: Path | None = Field(default=None, description="the .safetensors file of a named model's weights")
    trust_code: bool = Field(default=False, description="call the factory package.module:factory that the teacher's own recipe names")
    classes: int | None = Field(default=None, ge=1, description="the first classes, which a named model knows; unset: all")
    weight: float = Field(default=1.0, gt=0, le=100, description="weight of the distance to the teacher's answers in the loss")
    unlabelled: Path | None = Field(default=None, description="folder of pictures without labels, which are learned from the teacher alone")
    share: float = Field(default=0.5, gt=0, le=1, description="share of `unlabelled` in a batch; 1: labels only validate")


class TrainingConfig(Section):
    """The loop: an optimiser with warm-up and a cosine, weights averaged over time, gradients clipped."""

    steps: int = Field(default=2000, ge=1, description="maximum number of optimiser steps")
    minutes: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="maximum wall-clock minutes; the learning rate follows the nearer limit",
    )
    batch_size: int = Field(default=8, ge=1, le=4096, description="crops a step")
    micro_batch: int | None = Field(
        default=None, ge=1, description="most crops of a process in one pass; the gradients of the passes add up to the batch's; unset: all"
    )
    checkpointing: Checkpointing | ActivationBudget = Field(
        default="none",
        description="activations that are computed again for the gradient, not kept: full: of all blocks; selective: all but long "
        "products; budget: of the blocks that cost the least time, until the measured peak is within it",
    )
    operator_memory: ByteSize | None = Field(
        default=None,
        ge=1 << 16,
        description="most temporary memory of a perceptron, an attention and the loss, such as 64MiB; more is computed in chunks, again "
        "for the gradient; unset: whole, but 16MiB with checkpointing full",
    )
    norm_group: int | None = Field(
        default=None,
        ge=1,
        description="crops that share the statistics of batch norms in training, and so stay in one micro-batch; unset: 8 in the named "
        "models, the whole batch in others",
    )
    optimizer: OptimizerName = Field(
        default="muon",
        description="muon: Muon for matrices, AdamW for the rest; adamw; lion; schedule-free: AdamW with averages, not a falling rate",
    )
    learning_rate: float = Field(
        default=4e-3, gt=0, le=1, description="at the end of the warm-up; if unset, adamw has 1e-3, lion 2e-4, schedule-free 2.5e-3"
    )
    final_learning_rate: float = Field(default=0.0, ge=0, le=1, description="at the end of the run, where the cosine ends")
    warmup: float = Field(default=0.08, ge=0, lt=1, description="share of the run over which the learning rate rises")
    weight_decay: float = Field(default=0.05, ge=0, le=1, description="of matrices and kernels, by AdamW's rule")
    clip: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="largest norm of the gradient")
    spike: float | None = Field(
        default=10.0,
        gt=1,
        allow_inf_nan=False,
        description="a batch is skipped if its loss is above this many medians of the last 100, the first ones and 0.5; null: only NaN",
    )
    average: float = Field(default=0.995, ge=0, lt=1, description="decay a step of the averaged weights, the result; 0: no averaging")
    loss: LossName = Field(
        default="cross-entropy",
        description="cross-entropy, and focal, which counts pixels more that are not learned yet, each with the soft IoU loss beside it; "
        "dice: the soft Dice loss alone; dice-cross-entropy: cross-entropy with the Dice loss beside it",
    )
    focal_gamma: float = Field(default=2.0, ge=0, le=10, description="exponent of loss focal; 0 is cross-entropy")
    class_weights: Literal["auto"] | dict[str, ClassWeight] | None = Field(
        default=None,
        description="weights of classes in cross-entropy and focal: auto: inverse to their shares of the training pixels (pictures for "
        "classify), at most 100 to 1; or {NAME: WEIGHT, ...}, others 1; unset: all equal",
    )
    overlap_loss: float = Field(
        default=1.0, ge=0, le=10, description="weight of the soft IoU (or Dice) loss beside cross-entropy and focal; segment only"
    )
    gate_budget: float = Field(
        default=1.0, gt=0, le=1, description="share of the multiply-adds behind channel gates to keep; other channels are cut"
    )
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        default="auto",
        description="auto: 16 bits on CUDA; on CPUs BF16 if steps of the model are 1.2 times as fast in it; tf32, fp16: on CUDA",
    )
    compile: bool = Field(default=False, description="torch.compile the training step; needs a C++ compiler on CPUs")
    validate_every: int = Field(default=250, ge=1, description="steps between validations")
    patience: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="early stopping: validations without a better score after which the run ends; unset: all steps are taken",
    )
    checkpoint_every: int = Field(default=250, ge=1, description="steps between checkpoints; the first is written within a minute")
    memory: ByteSize | None = Field(
        default=None,
        ge=1 << 26,
        description="most memory of the process on a CPU, such as 6GiB; a step that needs more is taken in smaller parts",
    )
    threads: int | None = Field(default=None, ge=1, le=1024, description="threads of the CPU; unset: PyTorch's choice")
    sharding: Sharding = Field(
        default="none",
        description="what several processes (torchrun) share: none: nothing; zero1: optimiser state; zero2: gradients and averages, "
        "too, and weights between steps; zero3: weights during a step, too",
    )

    @model_validator(mode="after")
    def _shardable(self) -> Self:
        for key, value, allowed in (
            ("precision", self.precision, self.precision != "fp16"),
            ("gate_budget", self.gate_budget, self.gate_budget == 1),
            ("compile", self.compile, not self.compile),
        ):
            if self.sharding in ("zero2", "zero3") and not allowed:
                raise ValueError(f"sharding {self.sharding} with {key} {value}: take sharding zero1 or none, or drop {key}")
        return self

    @model_validator(mode="before")
    @classmethod
    def _default_rate(cls, values: Any) -> Any:
        if isinstance(values, dict) and "learning_rate" not in values and (rate := LEARNING_RATES.get(str(values.get("optimizer")))):
            return {**values, "learning_rate": rate}
        return values

    @model_validator(mode="after")
    def _second_moments(self) -> Self:
        if self.gate_budget < 1 and self.patience is not None:
            raise ValueError("gate_budget with patience: gates close over the whole run, which must not end earlier: drop one")
        if self.gate_budget < 1 and self.optimizer == "lion":
            raise ValueError("gate_budget with optimizer lion: channels are ranked by Adam's second moments: choose another optimizer")
        return self

    @model_validator(mode="after")
    def _uncompiled(self) -> Self:
        if self.compile and self.checkpointing != "none":
            level = self.checkpointing if isinstance(self.checkpointing, str) else "by budget"
            raise ValueError(f"checkpointing {level} with compile: true: the compiler chooses what is recomputed: drop one")
        if self.compile and self.operator_memory is not None:
            raise ValueError("operator_memory with compile: true: chunks are not compiled: drop one")
        if self.checkpointing == "selective" and self.operator_memory is not None:
            raise ValueError("operator_memory with checkpointing selective, which keeps the answers of products: take full, or drop one")
        return self

    @model_validator(mode="after")
    def _weighted(self) -> Self:
        if self.loss == "dice" and self.class_weights is not None:
            raise ValueError("class_weights with loss dice, in which classes count alike already: drop one, or take dice-cross-entropy")
        return self

    @model_validator(mode="after")
    def _falling(self) -> Self:
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate {self.final_learning_rate:g} is above learning_rate {self.learning_rate:g}: the rate falls to it"
            )
        return self

    def share_done(self, step: float, seconds: float) -> float:
        """Share of the run, 0 to 1, after `step` steps in `seconds`, by the nearer limit of `steps` and `minutes`. Drives the schedule."""
        in_steps = step / self.steps if self.steps else 1.0
        if self.minutes is None:
            return min(1.0, in_steps)
        return min(1.0, max(in_steps, seconds / (60 * self.minutes) if self.minutes else 1.0))

    def share_in_time(self, step: int, seconds: float) -> float | None:
        """`share_done` of a run with a limit in time, whose number of steps is not known before its end; None without one."""
        return None if self.minutes is None else self.share_done(step, seconds)

    def steps_expected(self, step: int, seconds: float) -> int:
        """Steps of the whole run, estimated from its speed up to `step`."""
        return max(step, min(self.steps, round(step / max(self.share_done(step, seconds), 1e-9)))) if step else self.steps

    def rate_at(self, done: float) -> float:
        """Learning rate at the share `done` of the run: warm-up, then a cosine to `final_learning_rate`; constant for schedule-free."""
        if done < self.warmup:
            return self.learning_rate * done / self.warmup
        if self.optimizer == "schedule-free":
            return self.learning_rate
        falling = 0.5 * (1 + math.cos(math.pi * (done - self.warmup) / (1 - self.warmup)))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * falling


class QuantizationConfig(Section):
    """INT8 quantisation. All fields have working defaults."""

    calibration_images: int = Field(
        default=64, ge=1, le=4096, description="training crops for the calibration of activations and for the choice of ranks"
    )
    min_sqnr_db: float = Field(
        default=15.0, ge=0, le=60, description="least signal over noise (dB) of a layer in INT8; below it stays 16-bit; not in compression"
    )
    keep: tuple[str, ...] = Field(default=(), description="layers to leave in 16 bits, by dotted name; they may be factored")


class LowRankConfig(Section):
    """Arguments of `muntin.low_rank`. All fields have working defaults."""

    criterion: Literal["activation", "energy", "cumulative"] = Field(
        default="activation",
        description="how ranks are chosen. activation: least harm to the model's answer on calibration images under the budget; "
        "energy, cumulative: the same share of each weight's sum of σ², of σ",
    )
    parameters: float = Field(default=0.35, gt=0, le=1, description="share of the model's parameters to keep; all parameters count")
    macs: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the multiply-adds of factorable layers to keep; activation only; unset: no limit",
    )
    threshold: float | None = Field(
        default=None, gt=0, le=1, description="share of energy or cumulative, instead of the budget; unset: the largest within the budget"
    )
    multiple: int = Field(default=16, ge=1, le=1024, description="ranks are multiples of it; smaller layers take their full rank")
    keep: tuple[str, ...] = Field(default=(), description="layers to leave dense, by dotted name")

    @model_validator(mode="after")
    def _threshold_suits(self) -> Self:
        if self.threshold is not None and self.criterion == "activation":
            raise ValueError("threshold is for the criteria energy and cumulative; activation takes parameters")
        if self.macs is not None and self.criterion != "activation":
            raise ValueError("macs is for the criterion activation; energy and cumulative do not use the cost of a layer")
        return self


class StageConfig(Section):
    """One stage of the training of a candidate: its length, and its learning rate."""

    share: float = Field(default=0.2, ge=0, le=10, description="steps, as a share of those that fit took; 0: no training")
    learning_rate: float = Field(default=1e-3, gt=0, le=1, description="at the end of the stage's warm-up")


class CompressionConfig(Section):
    """The search of `muntin compress` and `muntin.compress` for a small model. All fields have defaults."""

    max_drop: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="the score that may be lost, in the metric's unit; unset: 0.01 of mIoU and accuracy, 0.1 dB of PSNR",
    )
    objective: Literal["size", "latency"] = Field(default="size", description="what is made least: bytes of the artefact, or milliseconds")
    confidence: float | None = Field(
        default=0.95, ge=0.5, lt=1, description="certainty with which the budget is kept on other data, too; null: no bound is computed"
    )
    trials: int = Field(default=12, ge=0, description="most candidates to make, train, export and score")
    minutes: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="no candidate begins that is expected to end later; 0: none"
    )
    widths: tuple[float, ...] = Field(default=(1.0, 0.8, 0.6), description="shares of the parameters that pruning leaves; the first is 1")
    course: Literal["direct", "stages"] = Field(
        default="direct",
        description="training of a candidate. direct: with its ranks and bits; stages: its ranks, then 4 bits a weight, then its own bits",
    )
    steps: int | None = Field(
        default=None,
        ge=0,
        description="training steps of a candidate; 0: none; unset: the shares of the stages, fewer with minutes, or a pass over finetune",
    )
    learning_rate: float | None = Field(default=None, gt=0, le=1, description="unset: that of mix for a run, otherwise 0.001")
    recover: StageConfig = Field(default=StageConfig(share=0.2, learning_rate=1e-3), description="first stage: low rank, in floats")
    quantize: StageConfig = Field(default=StageConfig(share=0.05, learning_rate=4e-4), description="second stage: 4 bits a weight")
    mix: StageConfig = Field(default=StageConfig(share=0.25, learning_rate=4e-4), description="last stage: the bits of each layer")
    distillation: float = Field(default=1.0, ge=0, le=100, description="weight of the distance to the FP32 model's answers in the loss")
    average: float = Field(default=0.98, ge=0, lt=1, description="decay a step of the averaged weights")
    keep: tuple[str, ...] = Field(default=(), description="layers to leave as they are, by dotted name or pattern")
    dense: tuple[str, ...] = Field(default=(), description="layers to leave unfactored, by dotted name or pattern")

    @model_validator(mode="after")
    def _check_widths(self) -> Self:
        if self.widths[:1] != (1,) or not all(0 < width <= 1 for width in self.widths) or len({*self.widths}) < len(self.widths):
            raise ValueError(f"widths {list(self.widths)}: give different shares above 0, the first of them 1")
        return self


class AcceptConfig(Section):
    """Conditions on an updated artefact, measured beside the old one on held-out pictures; if one fails, it is refused."""

    max_drop: float = Field(default=0.01, ge=0, le=1, description="largest loss of the score (mIoU, accuracy) on old data")
    max_class_drop: float = Field(default=0.05, ge=0, le=1, description="largest loss of one class on old data, of its IoU or recall")
    min_gain: float = Field(default=0.0, ge=-1, le=1, description="least gain of the score on new data")
    min_new_class: float = Field(default=0.1, ge=0, le=1, description="least IoU or recall of each new class on new data")
    max_relabel_gain: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="new labels are refused if, with some classes renamed, the old model agrees with these by so much more; 1: any labels",
    )
    max_slowdown: float = Field(default=1.25, ge=1, le=100, description="largest median latency, times the old one's")
    max_growth: float = Field(default=1.1, ge=1, le=100, description="largest size, times the old one's")
    certain: bool = Field(default=False, description="judge losses and gains by the worse end of their 95 % interval, not by their value")


class UpdateConfig(Section):
    """Training that goes on with new data (`muntin update`). All fields have working defaults."""

    strategy: UpdateStrategy = Field(
        default="replay",
        description="replay: new data and kept old pictures, with the old model as teacher; naive: new data alone; joint: all data; "
        "frozen: the last layer alone",
    )
    share: float = Field(default=0.2, gt=0, le=10, description="steps, as a share of those of the first training; joint takes all of them")
    learning_rate: float = Field(default=2e-3, gt=0, le=1, description="at the end of the warm-up")
    average: float = Field(default=0.98, ge=0, lt=1, description="decay a step of the averaged weights")
    memory: int = Field(default=128, ge=1, le=100_000, description="old pictures, or windows of large ones, that are kept to train with")
    held_out: int = Field(default=128, ge=2, le=100_000, description="old pictures or windows that are kept to judge by")
    choice: Literal["reservoir", "herding"] = Field(
        default="reservoir", description="which pictures of a class are kept: random ones, or those whose mean features are the class's"
    )
    replay: float = Field(default=0.5, gt=0, lt=1, description="share of old crops in a batch")
    distillation: float = Field(default=1.0, ge=0, le=100, description="weight of the distance to the old model's scores")
    features: float = Field(default=0.1, ge=0, le=100, description="weight of the distance to the old model's pooled features")
    background: str | None = Field(
        default=None, description="segment: the class of all else, which in new data may hide old classes; null: every label is meant"
    )
    confidence: float = Field(default=0.9, gt=0.5, lt=1, description="probability from which the old model's class replaces `background`")
    validation: float = Field(default=0.1, gt=0, lt=1, description="share of the new pictures for validation")
    test: float = Field(default=0.25, gt=0, lt=1, description="share of the new pictures to judge by, never trained with")
    accept: AcceptConfig = AcceptConfig()

    @model_validator(mode="after")
    def _some_to_train(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError(f"validation {self.validation:g} and test {self.test:g} add up to 1 or more: leave some to train with")
        return self
