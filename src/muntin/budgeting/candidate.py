"""A plan applied to a copy of a model: channels, ranks and bits, then a course of training if there is data.

    copy -> factor (ranks) -> quantize (bits; reconstruction)                                   without data for training
                           -> prepare_qat (bits) -> reconstruct -> train -> freeze              direct
         -> factor -> train -> prepare_qat (4 bits) -> reconstruct -> train -> bits -> train -> freeze    in three stages

The plan decides ranks and bits before any training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from muntin.budgeting.forms.harm import MAP_NUMBERS, scores_of
from muntin.budgeting.forms.layer_forms import KEPT, ranks_of, some_rows
from muntin.budgeting.forms.plans import Plan
from muntin.compression.channels.pruning import prune
from muntin.compression.channels.sizes import prunable
from muntin.compression.distillation import distil
from muntin.compression.equivalent.batch_norm import fold_batch_norms
from muntin.compression.equivalent.fold import fold
from muntin.compression.equivalent.plain_convolutions import plain_convolutions
from muntin.compression.history import remember
from muntin.compression.low_rank.factorization import factor
from muntin.compression.quantization.embeddings import quantize_tables, tables
from muntin.compression.quantization.post_training import quantize
from muntin.compression.quantization.qat import QATConv2d, QATLinear, freeze, prepare_qat, set_bits
from muntin.compression.quantization.reconstruction import reconstruct
from muntin.compression.quantization.widths import requested_widths
from muntin.compression.rewrite import EVERY, is_kept, keepable, named
from muntin.errors import MuntinError
from muntin.layers import ChannelGate, Product, SoftmaxProduct
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, batch_rows, call, eager_copy, first_row
from muntin.training.config import CompressionConfig

NARROW_BITS = 4
"""Largest bits of a weight in the second stage of a course of three."""
ROUNDING_ROWS = 16
"""Rows of maps with which weights are rounded before training."""
TargetLoss = Callable[[Any, Any], Tensor]
"""From the model's answer and the targets to a scalar."""
StepReport = Callable[[int, float], None]
"""Called with the number and the loss of each step."""


@dataclass(frozen=True, kw_only=True)
class CourseStage:
    """A stage of a course. `name`: "low-rank" (skipped without ranks), "w4a8" or "mixed"; the rate falls to `final_learning_rate`."""

    name: Literal["low-rank", "w4a8", "mixed"]
    steps: int
    learning_rate: float
    final_learning_rate: float = 0.0

    @property
    def text(self) -> str:
        """The stage in words, which settings are compared by."""
        return f"{self.name}: {self.steps} steps from {self.learning_rate:g} to {self.final_learning_rate:g}"


def course_stages(config: CompressionConfig, steps: int, learning_rate: float) -> tuple[CourseStage, ...]:
    """The stages of a course of `steps`: one, or three by the shares in `config`. `learning_rate`: of the last stage.

    The rate falls once over both stages with integers: the second ends at the rate at which the last one begins.
    """
    last = CourseStage(name="mixed", steps=steps, learning_rate=learning_rate)
    if config.course == "direct" or not steps:
        return (last,) if steps else ()
    shares = {"low-rank": config.recover.share, "w4a8": config.quantize.share, "mixed": config.mix.share}
    whole = sum(shares.values()) or 1.0
    low_rank, narrow = (round(steps * shares[name] / whole) for name in ("low-rank", "w4a8"))
    final = min(config.quantize.learning_rate, learning_rate)
    stages = (
        CourseStage(name="low-rank", steps=low_rank, learning_rate=config.recover.learning_rate),
        CourseStage(name="w4a8", steps=narrow, learning_rate=config.quantize.learning_rate, final_learning_rate=final),
        replace(last, steps=max(1, steps - low_rank - narrow)),
    )
    return tuple(stage for stage in stages if stage.steps)


class Course(Protocol):
    """The training that every candidate gets."""

    @property
    def stages(self) -> Sequence[CourseStage]:
        """Its stages, the last one with the bits of the plan."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Plain values on which the result depends."""

    def train(self, stage: CourseStage, model: nn.Module, teacher: nn.Module, *, seed: int, folder: Path, report: StepReport) -> float:
        """Train a candidate in place, and leave it in `eval` mode on its device.

        `teacher`: the FP32 model, which stays as it is. `folder`: for what an interrupted training goes on from; of the last stage's
        checkpoints the newest is kept with the candidate, the others are removed. Returns the seconds that were trained before this call.
        """


@dataclass(frozen=True, kw_only=True)
class CandidateTraining:
    """A `Course` on `data`: batches of inputs, or of (inputs, targets) if there is a `loss`.

    Without a loss the candidate learns the FP32 model's answers. The learning rate of a stage rises, then falls to 0. An interrupted
    training begins anew.
    """

    data: Iterable[Any]
    stages: Sequence[CourseStage]
    loss: TargetLoss | None = None

    def __post_init__(self) -> None:
        if iter(self.data) is self.data:
            raise MuntinError("finetune is an iterator, which ends after one pass: give a list of batches or a DataLoader")

    @property
    def settings(self) -> Mapping[str, Any]:
        return {"loss": self.loss is not None}

    def train(
        self, stage: CourseStage, model: nn.Module, teacher: nn.Module, *, seed: int = 0, folder: Path | None = None,
        report: StepReport = lambda *_: None,
    ) -> float:  # fmt: skip
        if not any(parameter.requires_grad for parameter in model.parameters()):  # a model that was made ready for inference
            for parameter in model.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
        course: dict[str, Any] = {"steps": stage.steps, "learning_rate": stage.learning_rate, "seed": seed, "report": report}
        if (loss := self.loss) is None:
            distil(model, teacher, self.data, **course)
        else:
            distil(_WithTargets(model), _Silent(), self.data, loss=lambda answer, _: loss(*answer), **course)
        model.eval()
        return 0.0


def narrowed(model: nn.Module, width: float, calibration: Sequence[ModelInputs], *, keep: Sequence[str] = ()) -> nn.Module:
    """A copy of a model, in `eval` mode, pruned to the share `width` of its parameters, with its norms and gates folded.

    Closed channels of gated models are cut at every width. The layers named in `keep` keep their outputs. Raises `MuntinError` if the width
    is out of reach.
    """
    copied = eager_copy(model).eval()
    remember(copied, plain_convolutions(copied, first_row(calibration[0])))
    if dict(named(copied, ChannelGate)):
        prune(copied)
    if width < 1:
        layers = {name: layer for name, layer in copied.named_modules() if prunable(type(layer))}
        prune(copied, calibration, parameters=width, keep=_naming(keep, layers))
    remember(copied, fold(copied) + fold_batch_norms(copied, calibration[0]))  # ranks are chosen for the weights that are deployed
    return copied


def _naming(entries: Sequence[str], modules: Mapping[str, nn.Module]) -> list[str]:
    """The entries that name one of the modules."""
    return [entry for entry in entries if any(is_kept(name, (entry,)) for name in modules)]


def apply_plan(
    base: nn.Module,
    plan: Plan,
    calibration: Sequence[ModelInputs],
    *,
    keep: Sequence[str] = (),
    stages: Sequence[CourseStage] = (),
    train: Callable[[CourseStage, nn.Module], Any] = lambda stage, model: None,
) -> nn.Module:
    """The model that a plan describes: a copy of `base`, which `narrowed` has given the plan's width, in integers.

    `keep`: names or patterns of attention's products that stay in floats; of layers and embeddings the plan decides. `train`: trains
    the model in place in each of `stages`; without any it is rounded by `quantize`. Its changes are in its history
    (`compression.history`). The same arguments give the same model on one machine. Raises `MuntinError` for a plan of another model.
    """
    by_name = {stage.name: stage for stage in stages}
    model = eager_copy(base).eval()
    ranks = {name: _ranks(model, name, form.rank) for name, form in plan.forms.items() if form.rank is not None}
    if ranks:
        factor(model, calibration, ranks)
        if "low-rank" in by_name:
            train(by_name["low-rank"], model)
    integers = {name: form.bits for name, form in plan.forms.items() if form.bits < KEPT}
    embeddings = {name: bits for name, bits in integers.items() if name in tables(model)}
    bits = {name: width for name, width in integers.items() if name not in embeddings}
    kept = [name for name, form in plan.forms.items() if form.bits >= KEPT and name not in tables(model)]
    kept += _naming(keep, dict(named(model, Product, SoftmaxProduct)))
    if not stages:
        quantize(model, calibration, bits=bits, keep=kept, min_sqnr_db=0.0, embedding_bits=embeddings or None)
        return model
    narrow = by_name.get("w4a8")
    prepare_qat(model, calibration, bits={name: min(NARROW_BITS, width) for name, width in bits.items()} if narrow else bits, keep=kept)
    layers: dict[str, QATLinear | QATConv2d] = dict(named(model, QATLinear, QATConv2d))
    remember(model, reconstruct(model, layers, _few(base, calibration)))
    if narrow is not None:
        train(narrow, model)
        width_of = requested_widths(bits, layers)
        set_bits(model, {name: width_of(name) for name in layers})
        remember(model, [Change(layer=name, pass_="mix", done=f"W{width_of(name)}A8") for name in layers])
    train(stages[-1], model)
    freeze(model, calibration)
    if embeddings:
        remember(model, quantize_tables(model, calibration[0], embeddings, min_sqnr_db=0.0, only=EVERY, keep=()))
    return model


def _few(model: nn.Module, calibration: Sequence[ModelInputs]) -> list[ModelInputs]:
    """Return the batches with which weights are rounded before training: of models with maps few rows, each of which has many positions."""
    if scores_of(model, some_rows(calibration[0], 0, 1)).numel() < MAP_NUMBERS:
        return list(calibration)
    chosen, rows = list[ModelInputs](), 0
    for batch in calibration:
        if rows >= ROUNDING_ROWS:
            break
        chosen.append(batch)
        rows += batch_rows(batch)
    return chosen


def plain_int8(base: nn.Module, calibration: Sequence[ModelInputs], *, keep: Sequence[str] = ()) -> nn.Module:
    """Return a copy of a model in plain INT8, embeddings included, without training. `keep`: what stays in floats."""
    model = eager_copy(base).eval()
    embeddings = dict.fromkeys((name for name in tables(model) if not is_kept(name, keep)), 8)
    quantize(model, calibration, keep=_naming(keep, keepable(model)), embedding_bits=embeddings or None)
    return model


def _ranks(model: nn.Module, name: str, rank: int) -> tuple[int, ...]:
    """The rank of each mode of a layer."""
    modules = dict(model.named_modules())
    layer = modules.get(name)
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        raise MuntinError(f"plan: '{name}' is no Linear or Conv2d of the model: it was made for another model")
    try:
        return ranks_of(layer, rank)
    except ValueError as error:
        raise MuntinError(f"plan: '{name}': {error}: it was made for another model") from error


class _WithTargets(nn.Module):
    """A model that is called with (inputs, targets) and returns its answer and the targets."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: ModelInputs, targets: Any) -> tuple[Any, Any]:
        return call(self.model, inputs), targets


class _Silent(nn.Module):
    """A teacher that is not asked."""

    def forward(self, inputs: ModelInputs, targets: Any) -> tuple[()]:
        return ()
