"""`distil`: train a model of any kind to answer as another one does, without labels.

    batch -> teacher (no gradient)
          -> student -> loss of both answers -> clipped step, or no step if the loss or its gradient is not sound

The student may be factored, pruned, sparse (zeros stay) or in quantisation-aware training. Recipes have their own loop with labels,
checkpoints and several processes (`trainer`); this one takes any inputs and any loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from time import perf_counter
from typing import Any, Literal

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils import _pytree

from muntin.compression.sparsity.pattern import hold_sparsity
from muntin.errors import MuntinError
from muntin.models.eager import ModelInputs, call, check_module, inputs_of, tensors_of
from muntin.tasks.base_learning import at_least_float32, mean_divergence
from muntin.training.config import TrainingConfig
from muntin.training.gradients import buffers_kept, kept_buffers, random_kept, restore_buffers
from muntin.training.optimizer import make_optimizer
from muntin.training.precision import PrecisionName, TrainingPrecision, choose_by_speed, resolve_precision
from muntin.training.recovery.instability import SKIPPED_IN_A_ROW, LossGuard
from muntin.training.trainer import SKIPPED_STEPS, DivergedError

LossFunction = Callable[[Any, Any], Tensor]
"""From the student's and the teacher's answer to a scalar."""
NamedLoss = Literal["scores", "features"]
UNLIMITED = 1_000_000_000
"""Steps of a run that is limited by time alone."""


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """The course of a distillation."""

    steps: int
    """Steps that were taken."""
    skipped: int
    """Batches that were left out: their loss or its gradient was not finite, or a spike."""
    seconds: float
    first_loss: float
    """Loss of the first step."""
    loss: float
    """Mean loss of the last steps, at most 20."""
    precision: str
    """What was computed in, and why."""


def distil(
    student: nn.Module,
    teacher: nn.Module,
    inputs: Iterable[ModelInputs],
    *,
    steps: int | None = None,
    minutes: float | None = None,
    loss: NamedLoss | LossFunction = "scores",
    optimizer: Literal["adamw", "muon", "lion"] = "adamw",
    learning_rate: float = 1e-3,
    precision: PrecisionName = "auto",
    seed: int = 0,
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> Distillation:
    """Train `student`, in place, to answer as `teacher`; return the course of the loss. The student is left in `eval` mode.

    `inputs`: batches: a tensor of pixels, or several inputs as a tuple or dictionary, the same for both models; labels of (x, y) are
    dropped, as in `quantize`. They are used again and again: a sequence in an order that `seed` gives, another iterable (a DataLoader) in
    its own. `steps`, `minutes`: the run ends at the nearer limit; the learning rate rises over its first 8 % and falls to 0 by a cosine.

    `loss`: "scores", the KL divergence of the class probabilities over axis 1, a mean over images, pixels or tokens of `(B, K, ...)`;
    "features", the mean squared difference over the teacher's variance; or a function of both answers. An `nn.Module` is trained too, such
    as one that projects features of the student. It gets FP32. Of an answer with several tensors the named losses take `logits`.
    `precision`: as `training.precision` of a recipe. `report`: called with the number and the loss of each step.

    Results are the same for the same seed, inputs and number of steps, on one machine. A step costs a pass of the teacher, and a pass and
    its gradient of the student. Raises `DivergedError` after 5 unsound batches in a row; the weights are then those of the last sound step.
    """
    check_module(student)
    check_module(teacher)
    if steps is None and minutes is None:
        raise MuntinError("distil got neither steps nor minutes: give a limit")
    if student is teacher:
        raise MuntinError("the student is the teacher: give a copy.deepcopy of the model, made before it was compressed")
    measure = _loss_function(loss)
    trained = nn.ModuleList([student, *([measure] if isinstance(measure, nn.Module) else [])])
    if not any(parameter.requires_grad for parameter in student.parameters()):
        raise MuntinError(
            "no parameter of the student is trained: integers of quantize and freeze are not, prepare_qat gives a model that is"
        )
    try:
        config = TrainingConfig(
            steps=UNLIMITED if steps is None else steps, minutes=minutes, optimizer=optimizer, learning_rate=learning_rate,
            precision=precision,
        )  # fmt: skip
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise MuntinError(f"distil: {'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg']}") from error
    device = next(student.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), _answering(teacher):
        torch.manual_seed(seed)
        try:
            batches = (inputs_of(student, batch) for batch in _endless(inputs, seed))
            return _Loop(student, teacher, measure, trained, config, batches).run(report)
        finally:
            student.eval()


class _Loop:
    def __init__(
        self, student: nn.Module, teacher: nn.Module, loss: LossFunction, trained: nn.Module, config: TrainingConfig,
        batches: Iterator[ModelInputs],
    ) -> None:  # fmt: skip
        self.student, self.teacher, self.loss, self.trained, self.config = student.train(), teacher, loss, trained, config
        first = next(batches)
        self.batches = chain([first], batches)
        self.precision = self._decided(resolve_precision(config.precision, next(student.parameters()).device.type), first)
        self.optimizer = make_optimizer(trained, config, self.precision.dtype)
        hold_sparsity(student, self.optimizer)
        self.scaler = self.precision.scaler()
        self.guard = LossGuard(config.spike, harmless=0.0)  # the loss has a scale of its own

    def _decided(self, precision: TrainingPrecision, batch: ModelInputs) -> TrainingPrecision:
        """Decide an undecided precision by steps on one batch."""

        def step(each: TrainingPrecision, rows: int) -> None:
            self._distance(batch, each).backward()  # type: ignore[no-untyped-call]
            self.trained.zero_grad()

        with random_kept(), buffers_kept(self.trained):
            return choose_by_speed(precision, self.config, step, rows=1)

    def run(self, report: Callable[[int, float], None]) -> Distillation:
        started, step = perf_counter(), 0
        while (done := self.config.share_done(step, perf_counter() - started)) < 1:
            if (value := self._step(next(self.batches), done)) is not None:
                step += 1
                report(step, value)
        recent, first = self.guard.state.recent[-20:], self.guard.state.first
        return Distillation(
            steps=step, skipped=self.guard.state.skipped, seconds=perf_counter() - started, first_loss=first[0] if first else float("nan"),
            loss=sum(recent) / len(recent) if recent else float("nan"), precision=f"{self.precision.name}: {self.precision.reason}",
        )  # fmt: skip

    def _distance(self, batch: ModelInputs, precision: TrainingPrecision) -> Tensor:
        """The loss of a batch."""
        with precision.autocast():
            with torch.no_grad():
                expected = call(self.teacher, batch)
            answer = call(self.student, batch)
        distance = self.loss(_in_float32(answer), _in_float32(expected))
        if distance.numel() != 1 or not distance.requires_grad:
            raise MuntinError(f"the loss has the shape {tuple(distance.shape)}: it must be a scalar that depends on the student's answer")
        return distance

    def _step(self, batch: ModelInputs, done: float) -> float | None:
        """Take a step and return the loss; None if the batch was left out."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.rate_at(done)
        kept = kept_buffers(self.student)
        distance = self._distance(batch, self.precision)
        value = float(distance.detach())
        fault = self.guard.fault(value)
        if not fault:
            self.scaler.scale(distance).backward()  # type: ignore[no-untyped-call]
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.trained.parameters(), self.config.clip)
            fault = "" if norm.isfinite() else f"the gradient is {float(norm)}"
        if fault:
            restore_buffers(self.student, kept)
        else:
            self.scaler.step(self.optimizer)
        if self.scaler.is_enabled() and not fault.startswith("the loss"):
            self.scaler.update()
        self.optimizer.zero_grad()
        if not fault:
            self.guard.accept(value)
            return value
        self.guard.skip()
        allowed = SKIPPED_STEPS if self.scaler.is_enabled() else SKIPPED_IN_A_ROW
        if self.guard.state.in_a_row > allowed:
            raise DivergedError(f"{fault}, after {allowed} other unsound batches: give a lower learning_rate, or check the inputs")
        return None


def _in_float32(answer: Any) -> Any:
    """The answer with its tensors of 16-bit floats in 32 bits."""
    return _pytree.tree_map(lambda part: at_least_float32(part) if isinstance(part, Tensor) and part.is_floating_point() else part, answer)


def _loss_function(loss: NamedLoss | LossFunction) -> LossFunction:
    if callable(loss):
        return loss
    if loss not in ("scores", "features"):
        raise MuntinError(f"loss={loss!r}: give 'scores', 'features' or a function of the student's and the teacher's answer")
    return _score_distance if loss == "scores" else _feature_distance


def _score_distance(answer: Any, expected: Any) -> Tensor:
    scores, teacher_scores = _pair(answer, expected)
    return mean_divergence(scores, teacher_scores)


def _feature_distance(answer: Any, expected: Any) -> Tensor:
    features, teacher_features = _pair(answer, expected)
    spread = (teacher_features - teacher_features.mean()).square().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return (features - teacher_features).square().mean() / spread


def _pair(answer: Any, expected: Any) -> tuple[Tensor, Tensor]:
    one, other = _tensor(answer, "student"), _tensor(expected, "teacher").to(next(iter(tensors_of(answer))).device)
    if one.shape != other.shape:
        raise MuntinError(
            f"the student answers with {tuple(one.shape)} and the teacher with {tuple(other.shape)}: give a loss function (an nn.Module is "
            "trained) that brings them to one shape"
        )
    return one, other


def _tensor(answer: Any, who: str) -> Tensor:
    if isinstance(answer, Tensor):
        return answer
    named = answer.get("logits") if hasattr(answer, "get") else getattr(answer, "logits", None)
    if isinstance(named, Tensor):
        return named
    tensors = tensors_of(answer)
    if len(tensors) == 1:
        return tensors[0]
    raise MuntinError(
        f"the {who} answers with a {type(answer).__name__} of {len(tensors)} tensors: give a loss function that takes the right one"
    )


def _endless(inputs: Iterable[ModelInputs], seed: int) -> Iterator[ModelInputs]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        count = 0
        for batch in _shuffled(inputs, generator) if isinstance(inputs, Sequence) else inputs:
            count += 1
            yield batch
        if not count:
            raise MuntinError(
                "the inputs are empty, or an iterator that has ended: give a list of batches or a DataLoader, which starts anew"
            )


def _shuffled(inputs: Sequence[ModelInputs], generator: torch.Generator) -> Iterator[ModelInputs]:
    return (inputs[index] for index in torch.randperm(len(inputs), generator=generator).tolist())


@contextmanager
def _answering(teacher: nn.Module) -> Iterator[None]:
    """`eval` mode of the teacher during the block."""
    modes = [(module, module.training) for module in teacher.modules()]
    teacher.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
