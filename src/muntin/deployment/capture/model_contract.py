"""Checks of a PyTorch model's answers: maps of the image's size, independent of the batch, and equal after norms are folded.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from muntin.artifact import Signature
from muntin.artifact.sizes import golden_sizes
from muntin.compression.quantization.quantized_layers import exact_inputs
from muntin.errors import ExportError, MuntinError
from muntin.graph.artifacts.engine_check import FAR_OFF
from muntin.models.eager import as_input, check_eager, eager_copy
from muntin.runtime.host.memory import no_memory

Pairs = list[tuple[NDArray[np.uint8], NDArray[np.float32]]]
"""Images (1, H, W, C) and the PyTorch model's scores."""
STEADY = 1e-4
"""Root mean square difference, in standard deviations, allowed between two answers to one image."""
FOLDED = 0.01
"""Root mean square error, in standard deviations, allowed after folding, which changes only the order of sums."""


class SizeError(ExportError):
    """The model does not take a size, or its graph computes otherwise there. An export for fewer sizes may succeed."""


def answer_to(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """Return a model's answer to raw pixels in float32. Raises `SizeError` for a model that fails, `ExportError` for one without scores."""
    shape = tuple(images_BCHW.shape)
    try:
        with torch.inference_mode():
            answer = model(images_BCHW.to(torch.float32))
    except ExportError:  # of a check that is active during the call
        raise
    except Exception as error:
        if no_memory(error):
            raise ExportError(f"no memory for the model's answer to pixels of shape {shape}: {reason_of(error)}") from error
        if not isinstance(error, RuntimeError | ValueError | AssertionError):  # other errors do not refuse a size or channels
            raise SizeError(
                f"the model fails on pixels of shape {shape} ({type(error).__name__}: {reason_of(error)}): it is called with one tensor, "
                "raw pixels (B, C, H, W), and nothing else: wrap it"
            ) from error
        raise SizeError(f"the model fails on pixels of shape {shape}: {reason_of(error)}") from error
    if not isinstance(answer, Tensor) or not answer.is_floating_point():
        kind = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
        raise ExportError(f"the model answers {kind} to pixels of shape {shape}; scores, a float tensor, are expected: wrap it")
    if not torch.isfinite(answer).all():
        raise ExportError(f"the model answers NaN or infinity to pixels of shape {shape}: train again or restore a checkpoint")
    return answer.to(torch.float32)


def reason_of(error: BaseException) -> str:
    """Return an error's text on one line, or its type where it has no text."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def mean_error(scores: NDArray[np.float32], due: NDArray[np.float32]) -> float:
    """Return the root mean square error of scores, computed map by map, because scores of many classes are large."""
    maps = math.prod(due.shape[:-2])
    parts = zip(scores.reshape(maps, -1), due.reshape(maps, -1), strict=True)
    return float(np.sqrt(sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in parts) / due.size))


def pairs_at(model: nn.Module, example: Tensor, sizes: Iterable[tuple[int, int]]) -> Pairs:
    """Return images of the sizes, cut from the example's first one (repeated where it is smaller), and the model's answers."""
    images = [image_of(example, size) for size in sizes]
    return [(x_BHWC, answer_to(model, torch.from_numpy(x_BHWC).permute(0, 3, 1, 2)).numpy()) for x_BHWC in images]


def image_of(example: Tensor, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return an image (1, H, W, C) of a size, cut from the example's first one, which is repeated where it is smaller."""
    return as_bytes(_cut(example[0], *size)[None])


def as_bytes(images_BCHW: Tensor) -> NDArray[np.uint8]:
    """Return raw pixels as an artefact takes them, uint8 (B, H, W, C)."""
    return np.ascontiguousarray(_pixels(images_BCHW).permute(0, 2, 3, 1).numpy())


def _pixels(images_BCHW: Tensor) -> Tensor:
    return images_BCHW.to(torch.float32).round().clamp(0, 255).to(torch.uint8)


def _cut(image_CHW: Tensor, rows: int, columns: int) -> Tensor:
    """Return the crop of the image with the largest variance, because a plain border would test little."""
    H, W = image_CHW.shape[1:]
    places = [(y, x) for y in _starts(H, rows) for x in _starts(W, columns)]
    top, left = max(places, key=lambda at: float(image_CHW[:, at[0] : at[0] + rows, at[1] : at[1] + columns].float().var(correction=0)))
    down, across = (torch.arange(start, start + size) % side for start, size, side in ((top, rows, H), (left, columns, W)))
    return image_CHW[:, down][:, :, across]


def _starts(side: int, size: int) -> list[int]:
    return sorted({round(max(0, side - size) * part / 4) for part in range(5)})


def check_example(model: nn.Module, example: Tensor, signature: Signature) -> None:
    """Raise `ExportError` where the answer to the example is not the signature's."""
    if example.ndim != 4 or example.shape[1] != signature.channels:
        raise ExportError(f"example of shape {tuple(example.shape)}: give raw pixels (B, {signature.channels}, H, W)")
    answer = answer_to(model, example)
    expected = signature.scores_shape(example.shape[0], example.shape[2], example.shape[3])
    if tuple(answer.shape) != expected:
        raise ExportError(
            f"the model answers {tuple(answer.shape)} to an example of {tuple(example.shape)}; "
            f"for task '{signature.task}' it must be {expected}"
        )


def check_independence(model: nn.Module, pairs: Pairs) -> None:
    """Raise `ExportError` where a model's output for an image depends on earlier images, or on the others of its batch.

    `pairs`: images and the model's outputs. A model that draws random numbers passes; it is refused when its graph is compared. Quantised
    inputs are compared without their rounding: it is fixed for each element, so it cannot mix images, but it turns the last bits of a sum,
    which depend on the batch size, into whole steps.
    """
    if _is_steady(model, pairs):
        with exact_inputs(model):
            _check_batch(model, pairs)
    elif (buffer := _changed_buffer(model, pairs)) is not None:
        raise ExportError(
            f"the model changes its buffer '{buffer}' with each image, and answers by it: an artefact keeps nothing of an image: "
            "leave it as it is in eval mode, as batch norms do"
        )


def check_folded(model: nn.Module, due: Pairs, errors: Mapping[tuple[int, int], float]) -> None:
    """Raise `SizeError` where a graph's error comes from folding norms. `model`: folded. `due`: pairs from before. `errors`: by size."""
    (H, W), worst = max(errors.items(), key=lambda entry: entry[1])
    if worst <= FOLDED:
        return
    images_BHWC, expected = next(pair for pair in due if pair[0].shape[1:3] == (H, W))
    spread = max(float(scores.std()) for _, scores in due) or 1.0
    error = mean_error(answer_to(model, torch.from_numpy(images_BHWC).permute(0, 3, 1, 2)).numpy(), expected) / spread
    if not error <= FOLDED:
        raise SizeError(
            f"with its norms folded the model answers otherwise, by {error:.2g} standard deviations in the mean on an image of {H} x {W} "
            f"(allowed: {FOLDED:g}): a layer does more than its weights say, at this size perhaps, or is used where muntin does not see it"
        )


def _smallest(pairs: Pairs) -> tuple[Tensor, NDArray[np.float32]]:
    """Return the smallest image as (1, C, H, W), and its scores."""
    images_BHWC, scores = min(pairs, key=lambda pair: pair[0].size)
    return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2), scores


def _is_steady(model: nn.Module, golden: Pairs) -> bool:
    """Return True if the model gives the same answer to the same image again."""
    images_BCHW, scores = _smallest(golden)
    again = answer_to(model, images_BCHW).numpy()
    return mean_error(again, scores) <= STEADY * max(float(scores.std()), 1e-6)


def _changed_buffer(model: nn.Module, golden: Pairs) -> str | None:
    """Return the name of the first buffer that a call changes; None without one."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    answer_to(model, _smallest(golden)[0])
    return next((name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])), None)


def check_copy(original: nn.Module, example: Tensor) -> None:
    """Raise `ExportError` where a copy answers differently from the model, because a hook or function holds parts of the model itself.

    Models that are compiled, fail, or give no finite or no repeatable scores are not checked. The modes of the model stay unchanged, and
    only its forward is called.
    """
    try:
        check_eager(original)
    except MuntinError:
        return
    for size in (min(golden_sizes(*example.shape[2:]), key=math.prod), example.shape[2:]):  # the second for a model of one size
        images_BCHW = _pixels(_cut(example[0], *size)[None])
        copied_model = eager_copy(original)  # before the call, which may change the state of the model
        own = _plain_answer(original, images_BCHW)
        if own is not None:
            break
    else:
        return
    copied = _plain_answer(copied_model, images_BCHW)
    spread = max(float(own.std(correction=0)), 1e-3 * float(own.abs().max()), 1e-6)
    if copied is None or copied.shape != own.shape or not float((own - copied).square().mean().sqrt()) <= FOLDED * spread:
        problem = "fails where the model itself answers" if copied is None else "answers otherwise than the model itself"
        advice = "a hook or a function that is no method holds parts of it: let it reach them through the module that it is given"
        raise ExportError(f"a copy of the model {problem}: {advice}")


def _plain_answer(model: nn.Module, images_BCHW: Tensor) -> Tensor | None:
    """Return the scores of a model in `eval` mode; None where it fails, or where two calls differ."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        for part, _ in modes:
            part.training = False  # not `eval()`, in which adapters merge themselves into the weights
        with torch.no_grad():
            first, again = (model(as_input(model, images_BCHW)) for _ in range(2))
            scores = isinstance(first, Tensor) and first.is_floating_point() and bool(torch.isfinite(first).all())
            return first.float().cpu().clone() if scores and torch.equal(first, again) else None
    except Exception as error:
        if no_memory(error):
            shape = tuple(images_BCHW.shape)
            raise ExportError(f"no memory for the model's answer to pixels of shape {shape}: {reason_of(error)}") from error
        return None
    finally:
        for part, training in modes:
            part.training = training


def _check_batch(model: nn.Module, golden: Pairs) -> None:
    """Raise `ExportError` where an image's answer depends on the other images of its batch, which serving mixes."""
    images_BCHW, _ = _smallest(golden)
    pair_BCHW = torch.cat([images_BCHW, 255 - images_BCHW // 2])
    together = answer_to(model, pair_BCHW)
    alone = torch.cat([answer_to(model, image[None]) for image in pair_BCHW])
    error = float((together - alone).square().mean().sqrt()) / max(float(alone.std(correction=0)), 1e-6)
    if not error <= FAR_OFF / 5:
        raise ExportError(
            f"the model answers an image otherwise beside another one, by {error:.2g} standard deviations in the mean: a norm by the "
            "batch's own statistics (track_running_stats=False), or a mean over the batch, mixes what strangers send; compute each alone"
        )
