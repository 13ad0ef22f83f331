"""Checks of a model before training: sizes, answers, copies, checkpoints, BF16.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from muntin.artifact import ClassInfo, Signature
from muntin.errors import CheckpointError, MuntinError, RecipeError
from muntin.models.eager import check_eager, eager_copy, watch_inputs
from muntin.models.foreign import DividedSides
from muntin.models.hybridnet import HybridNet
from muntin.runtime.host.memory import no_memory
from muntin.tasks.learning import LEARNING
from muntin.training.config import ActivationBudget
from muntin.training.distributed.ranks import ALONE, Ranks
from muntin.training.gradients import random_kept
from muntin.training.memory.memory_format import channels_last, keep_freed_memory
from muntin.training.memory.norm_groups import check_norm_groups
from muntin.training.precision import PrecisionName, TrainingPrecision, choose_by_speed
from muntin.training.recipe import Recipe
from muntin.training.recovery.memory_bound import memory_bound
from muntin.training.trainer import Trainer
from muntin.training.weights import build_model, load_weights

DIVISORS = (2, 4, 8, 16, 32, 64, 128)
"""Values of `model.size_divisor` that are tried for an advice: the strides of usual encoders."""
SIDES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512)
"""Values of `data.crop` that are tried for an advice: the input sizes of usual models."""
TOLERANCE = 1e-3
"""Largest difference between two answers, as a share of the largest score, by memory layouts."""
_READABLE = "its factory has to make the same model each time, with all that it keeps in parameters and buffers"


def check_model(model: nn.Module, recipe: Recipe, classes: tuple[ClassInfo, ...]) -> tuple[str, ...]:
    """Check a foreign model, or a hybrid with a foreign encoder; return notes if it can be trained but not compressed, or is too narrow for
    restore.

    A classifier may take the size of its crops alone, in which it is evaluated and exported. Raises `RecipeError` if it does not take crops
    or, for maps, pictures of other sizes, if its answer does not fit the task, or if it cannot be copied. Afterwards the model has its lazy
    parameters and buffers; the other checks use a copy. Costs a few forward passes.
    """
    narrow = restore_notes(model) if isinstance(model, HybridNet) else ()
    if isinstance(model, HybridNet) and model.config.encoder is None:
        return narrow
    side, channels, name, signature = recipe.data.crop, recipe.data.channels, recipe.model.name, recipe.signature(classes)
    shape = (1, channels, side, side)
    notes = [*narrow]
    try:
        check_eager(model)
    except MuntinError as error:
        notes.append(f"'{name}' is trained, and cannot be compressed: {error}")
    try:
        eager_copy(model)
    except MuntinError as error:
        raise RecipeError(f"'{name}' {error}; weights are averaged in a copy") from error
    reason = _failure(model.eval(), shape)
    if reason:
        advice = _divisor_advice(model, shape) or _side_advice(model, shape)
        if not advice:
            raise RecipeError(f"'{name}' fails on pixels of shape {shape} ({reason}), and on other sizes too: fix its forward")
        raise RecipeError(f"data.crop {side}: '{name}' takes pictures of another size ({reason}): {advice}")
    copied = copy.deepcopy(model)
    channels_last(copied)
    _check_answer(copied, shape, signature, name)
    with torch.random.fork_rng():
        batch = min(2, recipe.training.batch_size)
        try:
            _check_answer(copied.train(), (batch, *shape[1:]), signature, name)
        except ValueError as error:
            if batch > 1:
                raise
            raise RecipeError(f"training.batch_size 1 with data.crop {side}: {_line(error)}; raise either of them") from error
    _check_gradient(copied, (batch, *shape[1:]), name)
    if recipe.training.norm_group is not None:
        check_norm_groups(copied, recipe.training.norm_group, shape[1:], name)
    copied.eval()
    if not recipe.answer.one:
        odd = (1, channels, side | 1, (side + side // 2) | 1)
        if reason := _failure(copied, odd):
            raise RecipeError(
                f"'{name}' takes no {odd[2]} x {odd[3]} ({reason}), and validation brings every size: "
                f"{_divisor_advice(copied, odd) or 'let its forward take them; a model of one size can be exported (muntin.export)'}"
            )
        _check_answer(copied, odd, signature, name)
    model.train()
    return tuple(notes)


def restore_notes(model: HybridNet) -> tuple[str, ...]:
    """A note on a hybrid for restore whose decoder ends above stride 2, or has fewer channels there than 2 x 2 pixels have values."""
    config = model.config
    values = 4 * config.channels
    of_encoder = {} if config.encoder is None else dict(zip(model.encoder.strides, model.encoder.channels, strict=True))
    first = config.stem[0] if config.encoder is None else of_encoder.get(2, 0)
    least = min(first, config.decoder)
    if not config.answer.picture or (config.finest == 2 and least >= values):
        return ()
    enough = max(48, values)
    if config.encoder is None:
        rest = ", ".join(map(str, config.stem[1:]))
        advice = f"set model.options, such as {{stem: [{max(enough, first)}, {rest}], decoder: {max(enough, config.decoder)}, finest: 2}}"
    elif first >= values:
        advice = f"set model.options {{decoder: {max(enough, config.decoder)}, finest: 2}}"
    else:
        advice = f"take an encoder with {values} channels at stride 2 and model.options {{finest: 2}}, or leave the encoder out"
    if config.finest > 2:
        place = "a quarter" if config.finest == 4 else "an eighth"
        return (f"the decoder ends at {place} of the sides, where fine detail and noise are hard to tell apart: {advice}",)
    return (
        f"{least} channels at half of the sides hold less than the {values} values of 2 x 2 pixels, so fine detail and noise cannot be "
        f"told apart: {advice}",
    )


def check_reading(model: nn.Module, recipe: Recipe, classes: tuple[ClassInfo, ...]) -> None:
    """Raise `RecipeError` if a foreign model, after training and pictures of other sizes, is not restored by its state.

    The model has passed `check_model`. Costs a second model and a few forward passes.
    """
    if isinstance(model, HybridNet) and model.config.encoder is None:
        return
    side, channels, name = recipe.data.crop, recipe.data.channels, recipe.model.name
    crop = torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0)) * 255
    with torch.random.fork_rng(), torch.no_grad():
        used = copy.deepcopy(model).train()
        used(crop.repeat(min(2, recipe.training.batch_size), 1, 1, 1))
        used.eval()
        if not recipe.answer.one:
            used(torch.zeros(1, channels, side | 1, (side + side // 2) | 1))
        state = used.state_dict()
        extra = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
        if extra is not None:
            raise RecipeError(
                f"'{name}' has a {type(state[extra]).__name__} in its state ({extra}), and a checkpoint holds tensors: keep it in a "
                "buffer, or have no get_extra_state"
            )
        try:
            restored = build_model(recipe, classes)
            load_weights(restored, state, Path(name))
        except CheckpointError as error:
            raise RecipeError(
                f"'{name}' cannot be read from its own checkpoint ({_line(error.__cause__ or error)}): {_READABLE}, of one shape for "
                "pictures of every size, or persistent=False"
            ) from error
        answers = []
        for each in (used, restored.eval()):
            torch.manual_seed(0)
            answers.append(each(crop))
    if float((answers[0] - answers[1]).abs().max()) > TOLERANCE * float(answers[0].abs().max()):
        raise RecipeError(f"'{name}' answers differently after it was read from its own checkpoint: {_READABLE}")


def check_maps(model: nn.Module, precision: TrainingPrecision, *, crop: int, channels: int, requested: PrecisionName) -> TrainingPrecision:
    """Return a precision in which a model's gradients are right: FP32 instead of "auto"'s BF16 if a kernel covers all of its map.

    In this case PyTorch 2.13 on CPUs (oneDNN, AVX512-BF16) reads uninitialised memory: 3 x 3 with stride 2 on a side of 1, 5 x 5 on a side
    of 1, 7 x 7 on sides of up to 3; never 3 x 3 with stride 1. Costs a forward pass of one crop, for BF16 on a CPU only. Raises
    `RecipeError` if BF16 was requested by name.
    """
    if precision.device != "cpu" or precision.dtype is not torch.bfloat16:
        return precision
    small: list[str] = []

    def check(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Conv2d)
        sides = inputs[0].shape[-2:]
        for side, kernel, dilation, stride in zip(sides, layer.kernel_size, layer.dilation, layer.stride, strict=True):
            reach = (kernel - 1) * dilation + 1
            if side <= reach // 2 and (reach > 3 or stride > 1):
                small.append(f"the {kernel}x{kernel} convolution {name} sees maps of {sides[0]}x{sides[1]}")

    training = model.training
    convolutions = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    watch_inputs(model.eval(), convolutions, [torch.zeros(1, channels, crop, crop)], check)
    model.train(training)
    if not small:
        return precision
    reason = f"at data.crop {crop} {small[0]}, where gradients in BF16 are wrong on CPUs"
    if requested == "bf16":
        raise RecipeError(f"training.precision bf16: {reason}: write auto or fp32, or take larger crops")
    return TrainingPrecision(name="fp32", device="cpu", dtype=None, reason=reason)


def measured_precision(
    model: nn.Module,
    precision: TrainingPrecision,
    recipe: Recipe,
    classes: tuple[ClassInfo, ...],
    *,
    teacher: nn.Module | None = None,
    ranks: Ranks = ALONE,
) -> TrainingPrecision:
    """Decide an undecided precision by steps of a copy of the model on random crops, as of `choose_by_speed`.

    The steps use memory as the recipe allows, but are not compiled.
    """
    if not precision.undecided:
        return precision
    config, rows = recipe.training, max(1, recipe.training.batch_size // ranks.count)
    weight, memory = 0.0 if recipe.teacher is None else recipe.teacher.weight, ExitStack()

    @cache
    def prepared() -> tuple[Trainer, Tensor, Tensor]:
        memory.enter_context(keep_freed_memory(config.memory is None))
        memory.enter_context(memory_bound(config.memory))
        alone = config.model_copy(update={"sharding": "none", "compile": False})
        trainer = Trainer(copy.deepcopy(model), alone, task=recipe.task, precision=precision, teacher=teacher, distillation=weight)
        if isinstance(config.checkpointing, ActivationBudget):  # its choice of blocks would cost many steps
            trainer.use_memory(trainer.memory.model_copy(update={"checkpointing": "full"}))
        return trainer, *random_batch(recipe, len(classes), rows)

    def step(each: TrainingPrecision, rows: int) -> None:
        trainer, images, target = prepared()
        trainer.precision = each
        if not trainer.drop_gradient(0, images[:rows], target[:rows]):
            raise MuntinError("memory was short")

    with random_kept(), memory:
        return choose_by_speed(precision, config, step, rows=rows, least=2, ranks=ranks)


def random_batch(recipe: Recipe, classes: int, rows: int) -> tuple[Tensor, Tensor]:
    """A batch of noise, and targets of its shape. `classes`: the number of classes."""
    data = recipe.data
    shape = (rows, data.crop, data.crop, data.channels)
    images = torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 3, 1, 2)
    return images, LEARNING[recipe.task].random_target(images, classes=classes, scale=data.output_scale)


def _check_answer(model: nn.Module, shape: tuple[int, ...], signature: Signature, name: str) -> None:
    """Raise `RecipeError` if the answer does not fit the task."""
    mode = "training" if model.training else "evaluation"
    try:
        with torch.no_grad():
            answer = model(torch.zeros(shape).contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        # training uses channels-last order, in which view may fail
        advice = "write reshape in place of view" if "view" in str(error) else "fix its forward, or choose another data.crop"
        raise RecipeError(
            f"'{name}' fails in {mode} on pixels of shape {shape} in channels-last order ({_line(error)}): {advice}"
        ) from error
    expected = signature.scores_shape(shape[0], *shape[2:])
    if isinstance(answer, Tensor) and answer.is_floating_point() and tuple(answer.shape) == expected:
        if not answer.isfinite().all():
            value = float(answer[~answer.isfinite()][0])
            raise RecipeError(
                f"'{name}' answers {value} to a black picture in {mode}, and one such crop ends training: where it divides by a value "
                "of the picture, such as its standard deviation, add a small number (1e-6)"
            )
        return
    received = f"{answer.dtype} of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
    raise RecipeError(
        f"'{name}' answers {received} to pixels of shape {shape} in {mode}; task "
        f"'{signature.task}' with {len(signature.classes)} classes wants one float tensor of shape {expected}: wrap it"
    )


def _check_gradient(model: nn.Module, shape: tuple[int, ...], name: str) -> None:
    """Raise `RecipeError` if the answer depends on no trainable parameter."""
    with torch.random.fork_rng(), torch.enable_grad():
        answer = model(torch.zeros(shape).contiguous(memory_format=torch.channels_last))
    if not answer.requires_grad:
        raise RecipeError(
            f"the answer of '{name}' depends on no trainable parameter: call requires_grad_() on those to train, and "
            "leave out detach() and no_grad in its forward"
        )


def _failure(model: nn.Module, shape: tuple[int, ...]) -> str:
    """The error of a model on pictures of a shape; empty if there is none."""
    try:
        with torch.no_grad():  # parameters created in inference mode could not be trained
            model(torch.zeros(shape))
    except Exception as error:
        if no_memory(error):
            raise
        kind = "" if isinstance(error, AssertionError | RuntimeError | ValueError) else f"{type(error).__name__}: "
        return f"{kind}{_line(error)}"
    return ""


def _divisor_advice(model: nn.Module, shape: tuple[int, ...]) -> str:
    """The `size_divisor` with which a model takes pictures of a shape and larger ones; empty if none helps."""
    B, C, H, W = shape
    for divisor in DIVISORS:
        padded = DividedSides(model, divisor)
        if divisor <= min(H, W) and not any(_failure(padded, (B, C, H + k * divisor, W + 2 * k * divisor)) for k in (0, 1)):
            return f"set model.size_divisor to {divisor}, and pictures are padded for it and its answers cut"
    return ""


def _side_advice(model: nn.Module, shape: tuple[int, ...]) -> str:
    """A crop size that a model takes, in words; empty if there is none."""
    for side in SIDES:
        if side != shape[2] and not _failure(model, (*shape[:2], side, side)):
            return f"set data.crop to {side}, which it takes, or choose a model that takes any"
    return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
