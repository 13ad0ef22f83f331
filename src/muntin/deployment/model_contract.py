"""What a PyTorch model answers, and whether that is an answer to serve: a map of the image's size, for each image alone, and the same after
muntin has rewritten the model.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from muntin.artifact import Signature
from muntin.artifact.golden import golden_sizes
from muntin.errors import ExportError, MuntinError
from muntin.models.eager import as_input, check_eager, eager_copy
from muntin.runtime.host.memory import no_memory

Pairs = list[tuple[NDArray[np.uint8], NDArray[np.float32]]]
"""Images (1, H, W, C) and what the PyTorch model answers to them."""
FAR_OFF = 0.25
"""Standard deviations, in the mean, from which integers at sizes that are not recorded are another branch's: rounding adds up over many
pixels and layers, in a hardly trained model to 0.08."""
NOTHING = 1.0
"""Standard deviations, in the mean, from which an answer says no more than the mean of all answers would."""
ELSEWHERE = 4
"""Times the error that integers make at most sizes, which may be made at others."""
STEADY = 1e-4
"""Standard deviations, in the mean, between two answers to one image, laid out otherwise in memory perhaps."""
FOLDED = 0.01
"""Standard deviations, in the mean, that folding may move an answer by: only the order of sums differs."""


def answer_to(model: nn.Module, images_BCHW: Tensor) -> Tensor:
    """What a model answers to raw pixels, in float32. Raises `ExportError` for a model that does not take them or gives no scores."""
    came = tuple(images_BCHW.shape)
    try:
        with torch.inference_mode():
            answer = model(images_BCHW.to(torch.float32))
    except Exception as error:
        if no_memory(error):
            raise ExportError(f"no memory for the model's answer to pixels of shape {came}: {reason_of(error)}") from error
        if not isinstance(error, RuntimeError | ValueError | AssertionError):  # by which a size or a number of channels is refused
            raise ExportError(
                f"the model fails on pixels of shape {came} ({type(error).__name__}: {reason_of(error)}): it is called with one tensor, "
                "raw pixels (B, C, H, W), and nothing else: wrap it"
            ) from error
        raise ExportError(
            f"the model fails on pixels of shape {came}, and an artefact takes every size: {reason_of(error)}; "
            "muntin.models.DividedSides pads and cuts where sides have to be multiples of a number"
        ) from error
    if not isinstance(answer, Tensor) or not answer.is_floating_point():
        kind = answer.dtype if isinstance(answer, Tensor) else type(answer).__name__
        raise ExportError(f"the model answers {kind} to pixels of shape {came}; scores, a float tensor, are expected: wrap it")
    if not torch.isfinite(answer).all():
        raise ExportError(f"the model answers NaN or infinity to pixels of shape {came}: train again or restore a checkpoint")
    return answer.to(torch.float32)


def reason_of(error: BaseException) -> str:
    """An error on one line, or its kind where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def mean_error(scores: NDArray[np.float32], due: NDArray[np.float32]) -> float:
    """Root of the mean square of what scores are off by; a part of them at a time, since scores of many classes are large."""
    maps = math.prod(due.shape[:-2])
    parts = zip(scores.reshape(maps, -1), due.reshape(maps, -1), strict=True)
    return float(np.sqrt(sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in parts) / due.size))


def golden_pairs(model: nn.Module, example: Tensor) -> Pairs:
    """Two crops of the example's first image and what the model answers to them: two sizes, so that one that was baked in is found."""
    return pairs_at(model, example, golden_sizes(*example.shape[2:]))


def pairs_at(model: nn.Module, example: Tensor, sizes: Iterable[tuple[int, int]]) -> Pairs:
    """Images of some sizes, cut from the example's first one or, where it is smaller, from repetitions, and the model's answers to them."""
    return [_pair(model, _cut(example[0], *size)) for size in sizes]


def _pair(model: nn.Module, image_CHW: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    images_BCHW = _pixels(image_CHW)
    scores = answer_to(model, images_BCHW)
    return np.ascontiguousarray(images_BCHW.permute(0, 2, 3, 1).numpy()), scores.numpy()


def _pixels(image_CHW: Tensor) -> Tensor:
    return image_CHW[None].to(torch.float32).round().clamp(0, 255).to(torch.uint8)


def _cut(image_CHW: Tensor, rows: int, columns: int) -> Tensor:
    """The part of the image in which most goes on: borders of one colour would say little."""
    H, W = image_CHW.shape[1:]
    places = [(y, x) for y in _starts(H, rows) for x in _starts(W, columns)]
    top, left = max(places, key=lambda at: float(image_CHW[:, at[0] : at[0] + rows, at[1] : at[1] + columns].float().var(correction=0)))
    down, across = (torch.arange(start, start + size) % side for start, size, side in ((top, rows, H), (left, columns, W)))
    return image_CHW[:, down][:, :, across]


def _starts(side: int, size: int) -> list[int]:
    return sorted({round(max(0, side - size) * part / 4) for part in range(5)})


def check_shapes(pairs: Pairs, signature: Signature) -> None:
    """Raises `ExportError` where the answers to some sizes are no maps of these sizes, and those to others are."""
    wrong = [(images.shape[:3], scores.shape) for images, scores in pairs if scores.shape != signature.scores_shape(*images.shape[:3])]
    if 0 < len(wrong) < len(pairs):
        ((B, H, W), came) = wrong[0]
        raise ExportError(
            f"the model answers {came} to {B} x {H} x {W} pixels, where {signature.scores_shape(B, H, W)} is due: interpolate the answer "
            "to the image's sides, or let muntin.models.DividedSides pad and cut where sides have to be multiples of a number"
        )


def check_rewritten(untouched: Pairs, rewritten: Pairs, *, quantized: bool) -> list[str]:
    """Raises `ExportError` where what a model was made into does not answer as it did: but for rounding where parts were only folded; in
    integers where an answer is no better than none and far worse than at most sizes. A line where integers cost much at some size."""
    due = {images.shape: scores for images, scores in untouched}
    spread = max(float(scores.std()) for scores in due.values()) or 1.0
    errors = {images.shape: mean_error(scores, due[images.shape]) / spread for images, scores in rewritten}
    allowed = max(NOTHING, ELSEWHERE * median(errors.values())) if quantized else FOLDED
    (_, H, W, _), worst = max(errors.items(), key=lambda entry: entry[1])
    if not worst <= allowed:
        raise ExportError(
            f"{'in integers' if quantized else 'with its norms folded'} the model answers otherwise, by {worst:.2g} standard deviations in "
            f"the mean on an image of {H} x {W} (allowed: {allowed:.2g}): a layer does more than its weights say, at this size perhaps, or "
            "is used where muntin does not see it" + (": name it in quantization.keep" if quantized else "")
        )
    if not quantized or worst <= FAR_OFF:
        return []
    return [
        f"integers move the answer to an image of {H} x {W} by {worst:.2g} standard deviations in the mean: look at the scores, and where "
        "other sizes come out better, calibrate with images of such sizes, too"
    ]


def is_steady(model: nn.Module, golden: Pairs) -> bool:
    """Whether the model answers twice alike."""
    images_BHWC, scores = min(golden, key=lambda pair: pair[0].size)
    again = answer_to(model, torch.from_numpy(images_BHWC).permute(0, 3, 1, 2)).numpy()
    return mean_error(again, scores) <= STEADY * max(float(scores.std()), 1e-6)


def changed_buffer(model: nn.Module, golden: Pairs) -> str | None:
    """The first buffer that a call changes; None where there is none."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    images_BHWC, _ = min(golden, key=lambda pair: pair[0].size)
    answer_to(model, torch.from_numpy(images_BHWC).permute(0, 3, 1, 2))
    return next((name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])), None)


def check_copy(given: nn.Module, example: Tensor) -> None:
    """Raises `ExportError` where a copy answers otherwise than the model that was given, each where and as it is: a hook or a function that
    holds the model's parts from outside goes on with those of the model. Of models that are compiled, fail, answer no finite scores, or
    answer twice otherwise nothing is told. The model's modes stay as they are, and none of its methods but its forward is called."""
    try:
        check_eager(given)
    except MuntinError:
        return
    images_BCHW = _pixels(_cut(example[0], *min(golden_sizes(*example.shape[2:]), key=math.prod)))
    twin = eager_copy(given)  # before the call, of which both would know afterwards
    own = _plain_answer(given, images_BCHW)
    if own is None:
        return
    copied = _plain_answer(twin, images_BCHW)
    spread = max(float(own.std(correction=0)), 1e-3 * float(own.abs().max()), 1e-6)
    if copied is None or copied.shape != own.shape or not float((own - copied).square().mean().sqrt()) <= FOLDED * spread:
        what = "fails where the model itself answers" if copied is None else "answers otherwise than the model itself"
        advice = "a hook or a function that is no method holds parts of it: let it reach them through the module that it is given"
        raise ExportError(f"a copy of the model {what}: {advice}")


def _plain_answer(model: nn.Module, images_BCHW: Tensor) -> Tensor | None:
    """Scores as the model gives them in `eval` mode; None where there are none, or others at each call."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        for part, _ in modes:
            part.training = False  # not `eval`, which adapters merge themselves into the weights by
        with torch.no_grad():
            first, again = (model(as_input(model, images_BCHW)) for _ in range(2))
            scores = isinstance(first, Tensor) and first.is_floating_point() and bool(torch.isfinite(first).all())
            return first.float().cpu().clone() if scores and torch.equal(first, again) else None
    except Exception as error:
        if no_memory(error):
            came = tuple(images_BCHW.shape)
            raise ExportError(f"no memory for the model's answer to pixels of shape {came}: {reason_of(error)}") from error
        return None
    finally:
        for part, training in modes:
            part.training = training


def check_batch(model: nn.Module, golden: Pairs) -> None:
    """Raises `ExportError` where an image's answer hangs on another one of its batch: who serves it puts strangers' images together."""
    images_BHWC, _ = min(golden, key=lambda pair: pair[0].size)
    pair_BCHW = torch.from_numpy(np.concatenate([images_BHWC, 255 - images_BHWC // 2])).permute(0, 3, 1, 2)
    together = answer_to(model, pair_BCHW)
    alone = torch.cat([answer_to(model, image[None]) for image in pair_BCHW])
    error = float((together - alone).square().mean().sqrt()) / max(float(alone.std(correction=0)), 1e-6)
    if not error <= FAR_OFF / 5:
        raise ExportError(
            f"the model answers an image otherwise beside another one, by {error:.2g} standard deviations in the mean: a norm by the "
            "batch's own statistics (track_running_stats=False), or a mean over the batch, mixes what strangers send; compute each alone"
        )
