"""Export of a PyTorch model to an artefact: quantise on request, emit ONNX, compare it in the real runtimes, write.

    model -> (quantize) -> to_onnx -> artefact -> OpenVINO, f32 and 16-bit; ONNX Runtime -> deviation from the model -> recorded tolerance

The golden scores are those of the PyTorch model, so a later replay checks the whole way from that model to the engine's kernels.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from muntin.artifact import Artifact, ClassInfo, Signature, check_target
from muntin.artifact.golden import golden_sizes
from muntin.compression import Change, fold, quantize, remove_closed_channels
from muntin.compression.quantization.qat import check_frozen
from muntin.deployment.counting import WEIGHTED
from muntin.deployment.engine_check import write_checked
from muntin.deployment.layer_records import layer_records, packing_of
from muntin.deployment.model_contract import answer_to, check_answers, check_copy, check_shapes, pairs_at
from muntin.deployment.onnx_export import to_onnx
from muntin.errors import ExportError, MuntinError
from muntin.models import HybridNet
from muntin.models.eager import check_module, eager_copy
from muntin.runtime import describe_hardware
from muntin.runtime.session import check_shape
from muntin.training.config import QuantizationConfig

LARGEST = 1 << 20
"""Maximum number of pixels of an example that is compared whole."""
OTHER_SIZES = ((192, 64), (64, 160), (256, 256))
"""Rows and columns of images unlike the golden pairs: sides that strides divide, taller than wide, square, large."""


def export(
    model: nn.Module,
    example: Tensor,
    path: Path | str,
    *,
    calibration: Iterable[Tensor] | None = None,
    signature: Signature | None = None,
    changes: Iterable[Change] = (),
    measured: dict[str, Any] | None = None,
    shape: tuple[int, int, int] | None = None,
    quantization: QuantizationConfig | None = None,
) -> Artifact:
    """Write `model` as an artefact directory that runs without PyTorch. An existing artefact is replaced as a whole.

    `example`: raw pixels `(B, C, H, W)`, 0-255, of real images, from which the golden pairs are cut. `calibration`: input batches, with
    which a copy of the model is quantised; without them muntin's own norms and gates are folded. Channels with closed gates are removed
    first. `signature`: task and classes; by default inferred from the shape of the answer, with numbered classes. `changes`: those of
    earlier passes, for the manifest. `measured`: plain figures for the manifest. `shape`: the (B, H, W) that `load` compiles for, by
    default one image of the example's size. `quantization`: which layers stay in floats; requires `calibration`.
    The artefact takes every batch size, height and width. Raises `ExportError` when the model cannot be exported or the runtime does not
    compute what PyTorch does; nothing is written then.
    """
    check_target(path)
    check_pixels(example, "example")
    if quantization is not None and calibration is None:
        raise ExportError("quantization says how to quantise, and without calibration nothing is: give input batches, or leave it out")
    opened_for = (1, *example.shape[2:]) if shape is None else check_shape(shape)
    original, model, example = model, _copied(model), example.cpu()
    check_frozen(model)
    check_copy(original, example)
    if isinstance(model, WEIGHTED):
        model = nn.Sequential(model).eval()  # layers are identified by their names, and the model itself has none
    signature = signature or infer_signature(model, example)
    H, W = example.shape[2:]
    golden_sides = golden_sizes(H, W)
    other_sides = dict.fromkeys((*OTHER_SIZES, *([(H, W)] if H * W <= LARGEST else [])))
    untouched = pairs_at(model, example, dict.fromkeys((*golden_sides, *other_sides)))
    check_shapes(untouched, signature)
    changes = list(changes)
    if calibration is None:
        changes += remove_closed_channels(model) + fold(model)
    else:
        changes += quantize(_calibration(calibration, model, example), quantization)(model)
    golden, others = pairs_at(model, example, golden_sides), pairs_at(model, example, other_sides)
    notes = check_answers(model, untouched, golden, others, quantized=calibration is not None)
    del untouched  # scores of many classes are large
    proto = to_onnx(model, example, signature)
    content: dict[str, Any] = {
        "model": proto,
        "signature": signature,
        "packing": packing_of(proto),
        "golden": golden,
        "layers": layer_records(model, example, changes, proto, size=opened_for[1:]),
        "passes": [_pass_entry(change) for change in changes],
        "measured": {"hardware": describe_hardware(), **(measured or {})},
        "example": opened_for,
    }
    return write_checked(Path(path), content, others, notes)


def _pass_entry(change: Change) -> dict[str, Any]:
    sqnr_db = change.sqnr_db if change.sqnr_db is not None and math.isfinite(change.sqnr_db) else None
    return {"pass": change.pass_, "layer": change.layer, "done": change.done, "reason": change.reason, "sqnr_db": sqnr_db}


def _copied(model: nn.Module) -> nn.Module:
    """Return a copy in FP32 on the CPU."""
    try:
        check_module(model)
    except MuntinError as error:
        raise ExportError(str(error)) from error
    try:
        return eager_copy(model).cpu().float().eval()
    except MuntinError as error:
        raise ExportError(f"the model {error}") from error


def _calibration(batches: Iterable[Tensor], model: nn.Module, example: Tensor) -> list[Tensor]:
    """Return the batches on the CPU. Raises `ExportError` where the model does not take them."""
    if isinstance(batches, Tensor):
        raise ExportError(f"calibration is one tensor of shape {tuple(batches.shape)}: give a list of batches, [tensor]")
    batches = list(batches)
    tried: set[torch.Size] = set()
    for batch in batches:
        check_pixels(batch, "calibration batch")
        if batch.shape[1] != example.shape[1]:
            raise ExportError(f"calibration batch of shape {tuple(batch.shape)}: the example has {example.shape[1]} channels")
        if batch.shape[2:] not in tried:
            answer_to(model, batch[:1].cpu())
            tried.add(batch.shape[2:])
    return [batch.cpu() for batch in batches]


def infer_signature(model: nn.Module, example: Tensor) -> Signature:
    """Infer task and number of classes from the shape of the answer: `(B, K)` is classify, `(B, K, H, W)` segment.

    A `HybridNet` knows its task. Another model that answers images needs a `Signature(task="restore", channels=...)`.
    """
    check_pixels(example, "example")
    answer = answer_to(model, example[:1])
    if answer.ndim not in (2, 4):
        raise ExportError(f"the model answers {tuple(answer.shape)}; (B, K) or (B, K, H, W) is expected: wrap it")
    if isinstance(model, HybridNet) and model.config.task == "restore":
        return Signature(task="restore", channels=example.shape[1], scale=answer.shape[2] // example.shape[2])
    if answer.shape[1] == 1:
        raise ExportError(
            f"the model answers {tuple(answer.shape)}, and of one class every label is the same: give two, as torch.cat([-x, x], 1) of a "
            "logit is, or signature=Signature(task='restore', channels=1) of an image"
        )
    classes = tuple(ClassInfo(name=f"class-{k}", color=_shade(k)) for k in range(answer.shape[1]))
    try:
        return Signature(task="classify" if answer.ndim == 2 else "segment", channels=example.shape[1], classes=classes)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ExportError(f"the model takes {example.shape[1]} channels and gives {len(classes)} classes: {first['msg']}") from error


def _shade(k: int) -> tuple[int, int, int]:
    return (97 * k + 60) % 256, (57 * k + 120) % 256, (151 * k + 30) % 256


def check_pixels(images: Tensor, called: str) -> None:
    """Raise `ExportError` for images that are not raw pixels (B, C, H, W), 0-255."""
    if not isinstance(images, Tensor):
        raise ExportError(f"{called} is of type {type(images).__name__}: give a torch.Tensor of raw pixels (B, C, H, W)")
    if images.ndim != 4 or 0 in images.shape:
        raise ExportError(f"{called} of shape {tuple(images.shape)}: give raw pixels (B, C, H, W)")
    low, high = float(images.min()), float(images.max())
    fractions = images.is_floating_point() and bool((images != images.round()).any())
    if not (low >= 0 and high <= 255) or (fractions and high <= 1):
        raise ExportError(f"{called} from {low:.3g} to {high:.3g}: give raw pixels, 0-255; the model normalises them itself")
