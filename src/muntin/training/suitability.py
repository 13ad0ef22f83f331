"""Whether a model that is not ours suits its recipe, asked before anything is trained: sizes, answers, that it can be copied, and read
from a checkpoint.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from muntin.artifact import ClassInfo, Signature
from muntin.artifact.golden import golden_sizes
from muntin.errors import CheckpointError, MuntinError, RecipeError
from muntin.models.eager import check_eager, eager_copy
from muntin.models.foreign import DividedSides
from muntin.models.hybridnet import HybridNet
from muntin.runtime.memory import no_memory
from muntin.training.checkpoint import build_model, load_weights, make_signature
from muntin.training.layout import channels_last
from muntin.training.recipe import Recipe

DIVISORS = (2, 4, 8, 16, 32, 64, 128)
"""Strides of encoders, of which the smallest that helps is advised."""


SAME = 1e-3
"""Of the largest score: the rounding that layouts in memory make is a thousandth of that."""
READABLE = "its factory has to make the same model each time, with all that it keeps in parameters and buffers"
SIDES = (32, 64, 96, 128, 160, 192, 224, 240, 256, 288, 299, 320, 384, 448, 512)
"""Of the pictures that models are made for, of which the smallest that is taken is advised."""


def check_model(model: nn.Module, recipe: Recipe, classes: tuple[ClassInfo, ...]) -> tuple[str, ...]:
    """A note where a model that is not ours takes what training brings but not every size, so that it can be trained and not exported.

    Raises `RecipeError` where it does not take crops or, for maps, pictures of other sizes, does not answer as its task asks, or cannot be
    copied. What it makes at its first call (lazy parameters, buffers) is there afterwards; all else is tried on a copy. Costs a few
    forward passes.
    """
    if isinstance(model, HybridNet):
        return ()
    side, name, signature = recipe.data.crop, recipe.model.name, make_signature(recipe, classes)
    shape = (1, recipe.data.channels, side, side)
    try:
        check_eager(model)
    except MuntinError as error:
        notes: tuple[str, ...] = (f"'{name}' is trained, and cannot be compressed: {error}",)
    else:
        notes = ()
    try:
        eager_copy(model)
    except MuntinError as error:
        raise RecipeError(f"'{name}' {error}; weights are averaged in a copy") from error
    reason = _refusal(model.eval(), shape)
    if reason:
        advice = _divisor_advice(model, shape) or _side_advice(model, shape)
        if not advice:
            raise RecipeError(f"'{name}' fails on pixels of shape {shape} ({reason}), and on other sizes too: mend its forward")
        raise RecipeError(f"data.crop {side}: '{name}' takes pictures of another size ({reason}): {advice}")
    tried = channels_last(copy.deepcopy(model))  # with what the call made
    _check_answer(tried, shape, signature, name)
    with torch.random.fork_rng():
        batch = min(2, recipe.training.batch_size)
        try:
            _check_answer(tried.train(), (batch, *shape[1:]), signature, name)
        except ValueError as error:
            if batch > 1:
                raise
            raise RecipeError(f"training.batch_size 1 with data.crop {side}: {_line(error)}; raise either of them") from error
    _check_learning(tried, (batch, *shape[1:]), name)
    tried.eval()
    if recipe.task != "classify":
        odd = (1, recipe.data.channels, side | 1, (side + side // 2) | 1)
        if reason := _refusal(tried, odd):
            raise RecipeError(
                f"'{name}' takes no {odd[2]} x {odd[3]} ({reason}), and validation and artefacts bring every size: "
                f"{_divisor_advice(tried, odd) or 'let its forward take them'}"
            )
        _check_answer(tried, odd, signature, name)
    failed = [(size, why) for size in golden_sizes(side, side) if (why := _refusal(tried, (1, recipe.data.channels, *size)))]
    model.train()
    if not failed:
        return notes
    (height, width), reason = failed[0]
    advice = _divisor_advice(tried, (1, recipe.data.channels, height, width))
    return (
        *notes,
        f"'{name}' takes no {height} x {width} ({reason}), and an artefact takes every size: it cannot be exported"
        + (f"; {advice}" if advice else ""),
    )


def check_reading(model: nn.Module, recipe: Recipe, classes: tuple[ClassInfo, ...]) -> None:
    """Raises `RecipeError` where what a checkpoint holds of a model that is not ours, once it was trained and has seen pictures of other
    sizes, does not make another one answer alike. Of a model that `check_model` found nothing against. Costs a second model, and a few
    forward passes.
    """
    if isinstance(model, HybridNet):
        return
    side, channels, name = recipe.data.crop, recipe.data.channels, recipe.model.name
    crop = torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(0)) * 255
    with torch.random.fork_rng(), torch.no_grad():
        used = copy.deepcopy(model).train()
        used(crop.repeat(min(2, recipe.training.batch_size), 1, 1, 1))
        used.eval()
        if recipe.task != "classify":
            used(torch.zeros(1, channels, side | 1, (side + side // 2) | 1))
        state = used.state_dict()
        other = next((key for key, value in state.items() if not isinstance(value, Tensor)), None)
        if other is not None:
            raise RecipeError(
                f"'{name}' has a {type(state[other]).__name__} in its state ({other}), and a checkpoint holds tensors: keep it in a "
                "buffer, or have no get_extra_state"
            )
        try:
            read = build_model(recipe, classes)
            load_weights(read, state, Path(name))
        except CheckpointError as error:
            raise RecipeError(
                f"'{name}' cannot be read from its own checkpoint ({_line(error.__cause__ or error)}): {READABLE}, of one shape for "
                "pictures of every size, or persistent=False"
            ) from error
        answers = []
        for one in (used, read.eval()):
            torch.manual_seed(0)
            answers.append(one(crop))
    if float((answers[0] - answers[1]).abs().max()) > SAME * float(answers[0].abs().max()):
        raise RecipeError(f"'{name}' answers otherwise when it was read from its own checkpoint: {READABLE}")


def _check_answer(model: nn.Module, shape: tuple[int, ...], signature: Signature, name: str) -> None:
    """Raises `RecipeError` for an answer that is not what its task asks."""
    mode = "training" if model.training else "evaluation"
    try:
        with torch.no_grad():
            answer = model(torch.zeros(shape).contiguous(memory_format=torch.channels_last))
    except RuntimeError as error:
        # maps are trained in channels-last order, in which a view may have no strides to be one
        advice = "write reshape in place of view" if "view" in str(error) else "mend its forward, or choose another data.crop"
        raise RecipeError(
            f"'{name}' fails in {mode} on pixels of shape {shape} in channels-last order ({_line(error)}): {advice}"
        ) from error
    wanted = signature.scores_shape(shape[0], *shape[2:])
    if isinstance(answer, Tensor) and answer.is_floating_point() and tuple(answer.shape) == wanted:
        if not answer.isfinite().all():
            odd = float(answer[~answer.isfinite()][0])
            raise RecipeError(
                f"'{name}' answers {odd} to a black picture in {mode}, and one such crop ends training: where it divides by what a picture "
                "gives, as its standard deviation, add a small number (1e-6)"
            )
        return
    came = f"{answer.dtype} of shape {tuple(answer.shape)}" if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
    raise RecipeError(
        f"'{name}' answers {came} to pixels of shape {shape} in {mode}; task "
        f"'{signature.task}' with {len(signature.classes)} classes wants one float tensor of shape {wanted}: wrap it"
    )


def _check_learning(model: nn.Module, shape: tuple[int, ...], name: str) -> None:
    """Raises `RecipeError` where nothing of a model that takes pictures of a shape can be trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(f"'{name}' has no parameter that can be trained: call requires_grad_() on what is to learn")
    with torch.random.fork_rng(), torch.enable_grad():
        answer = model(torch.zeros(shape).contiguous(memory_format=torch.channels_last))
    if not answer.requires_grad:
        raise RecipeError(
            f"the answer of '{name}' hangs on none of its trainable parameters: leave out detach() and no_grad in its forward"
        )


def _refusal(model: nn.Module, shape: tuple[int, ...]) -> str:
    """How a model refuses pictures of a shape; empty where it does not."""
    try:
        with torch.no_grad():  # not inference mode: what a model makes at its first call is trained
            model(torch.zeros(shape))
    except Exception as error:
        if no_memory(error):
            raise
        kind = "" if isinstance(error, AssertionError | RuntimeError | ValueError) else f"{type(error).__name__}: "
        return f"{kind}{_line(error)}"
    return ""


def _divisor_advice(model: nn.Module, shape: tuple[int, ...]) -> str:
    """What lets a model take pictures of a shape that it refuses, and larger ones, where padding does."""
    B, C, H, W = shape
    for divisor in DIVISORS:
        padded = DividedSides(model, divisor)
        if divisor <= min(H, W) and not any(_refusal(padded, (B, C, H + k * divisor, W + 2 * k * divisor)) for k in (0, 1)):
            return f"set model.size_divisor to {divisor}, and pictures are padded for it and its answers cut"
    return ""


def _side_advice(model: nn.Module, shape: tuple[int, ...]) -> str:
    """What crops to take of a model that refuses those of a shape, where it takes any."""
    for side in SIDES:
        if side != shape[2] and not _refusal(model, (*shape[:2], side, side)):
            return f"set data.crop to {side}, which it takes, or choose a model that takes any"
    return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
