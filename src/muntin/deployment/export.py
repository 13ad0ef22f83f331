"""Export of a PyTorch model to an artefact: quantise on request, emit ONNX, compare it in the real runtimes, write.

    model -> (quantize) -> to_onnx -> artefact -> OpenVINO, f32 and 16-bit; ONNX Runtime -> deviation from the model -> recorded tolerance

The golden scores are those of the PyTorch model, so a later replay checks the whole way from that model to the engine's kernels.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from muntin.artifact import Artifact, ClassInfo, Signature, Sizes, check_target
from muntin.compression import Change, fold, quantize, remove_closed_channels
from muntin.compression.quantization.qat import check_frozen
from muntin.deployment.counting import WEIGHTED
from muntin.deployment.engine_check import write_checked
from muntin.deployment.layer_records import layer_records, packing_of
from muntin.deployment.model_contract import SizeError, answer_to, check_answers, check_copy, check_example, pairs_at
from muntin.deployment.onnx_export import to_onnx
from muntin.deployment.sizes.probe import Probe
from muntin.deployment.sizes.requested import RequestedSizes, check_allowed, requested_sizes
from muntin.errors import ExportError, MuntinError
from muntin.models import HybridNet
from muntin.models.eager import check_module, eager_copy
from muntin.runtime import describe_hardware
from muntin.runtime.session import check_shape
from muntin.training.config import QuantizationConfig


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
    sizes: RequestedSizes | None = None,
) -> Artifact:
    """Write `model` as an artefact directory that runs without PyTorch. An existing artefact is replaced as a whole.

    `example`: raw pixels `(B, C, H, W)`, 0-255, of real images, from which the golden pairs are cut. `calibration`: input batches, with
    which a copy of the model is quantised; without them muntin's own norms and gates are folded. Channels with closed gates are removed
    first. `signature`: task and classes; by default inferred from the shape of the answer, with numbered classes. `changes`: those of
    earlier passes, for the manifest. `measured`: plain figures for the manifest. `shape`: the (B, H, W) that `load` compiles for, by
    default one image of the example's size. `quantization`: which layers stay in floats; requires `calibration`.
    `sizes`: the heights and widths that the artefact takes, beside every batch size: "any", "fixed" (the example's), or {"multiple": 32,
    "min": 64, "max": 1024}. By default the widest that the model is found to take (`sizes.probe`). That costs a few calls of the model,
    and another attempt where one fails for a reason of sizes. The signature holds the sizes, and a note says why there are no more.
    Raises `ExportError` when the model cannot be exported or the runtime does not compute what PyTorch does; nothing is written then.
    """
    check_target(path)
    check_pixels(example, "example")
    if quantization is not None and calibration is None:
        raise ExportError("quantization says how to quantise, and without calibration nothing is: give input batches, or leave it out")
    H, W = example.shape[2:]
    opened_for = (1, H, W) if shape is None else check_shape(shape)
    original, model, example = model, _copied(model), example.cpu()
    check_frozen(model)
    check_copy(original, example)
    if isinstance(model, WEIGHTED):
        model = nn.Sequential(model).eval()  # layers are identified by their names, and the model itself has none
    signature = signature or infer_signature(model, example)
    check_example(model, example[:1], signature)
    draft = _Draft(
        model=model,
        example=example,
        path=Path(path),
        signature=signature,
        calibration=None if calibration is None else _calibration(calibration, model, example),
        quantization=quantization,
        changes=tuple(changes),
        measured=dict(measured or {}),
        opened_for=opened_for,
        probe=Probe(model, example, signature),
    )
    if sizes is None and signature.sizes.every:
        return draft.write_widest()
    if sizes is None:
        check_allowed(signature.sizes, (H, W))
    requested = signature.sizes if sizes is None else requested_sizes(sizes, (H, W))
    try:
        return draft.write(requested, [])
    except SizeError as error:
        if requested.fixed:
            raise
        advice = (
            "leave out sizes, and fewer are tried; muntin.models.DividedSides pads and cuts where sides have to be multiples of a number"
        )
        raise ExportError(f"{error}; {advice}") from error


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """What is exported. `model`: a copy, unchanged by attempts to export it. `opened_for`: the (B, H, W) that `load` compiles for."""

    model: nn.Module
    example: Tensor
    path: Path
    signature: Signature
    calibration: list[Tensor] | None
    quantization: QuantizationConfig | None
    changes: tuple[Change, ...]
    measured: dict[str, Any]
    opened_for: tuple[int, int, int]
    probe: Probe

    def write_widest(self) -> Artifact:
        """Write the artefact for the widest sizes for which that succeeds. Raises the error of the last attempt."""
        sizes, reason = self.probe.widest()
        while True:
            try:
                return self.write(sizes, [f"takes {sizes.text} only: {reason}"] if reason else [])
            except SizeError as error:
                if sizes.fixed:
                    raise
                reason = str(error).replace("; nothing was written", "")
            sizes = self.probe.narrower(sizes)  # outside of the handler, in which the error holds the failed attempt's memory

    def write(self, sizes: Sizes, notes: list[str]) -> Artifact:
        """Write the artefact for some sizes. Raises `SizeError` where fewer sizes may help."""
        signature = self._signature(sizes)
        B, *size = self.opened_for
        opened_for = (B, *sizes.at_least(*size))
        if opened_for != self.opened_for:
            notes = [*notes, f"compiled for {opened_for[1]} x {opened_for[2]}, the nearest size to {size[0]} x {size[1]} that it takes"]
        model, changes = eager_copy(self.model), list(self.changes)
        golden_sides, other_sides = self.probe.sizes_to_compare(sizes)
        untouched = self.probe.pairs(dict.fromkeys((*golden_sides, *other_sides)))
        if self.calibration is None:
            changes += remove_closed_channels(model) + fold(model)
        else:
            changes += quantize(self.calibration, self.quantization)(model)
        golden, others = pairs_at(model, self.example, golden_sides), pairs_at(model, self.example, other_sides)
        notes = [*notes, *check_answers(model, untouched, golden, others, quantized=self.calibration is not None)]
        del untouched
        self.probe.forget()
        proto = to_onnx(model, self.example, signature)
        content: dict[str, Any] = {
            "model": proto,
            "signature": signature,
            "packing": packing_of(proto),
            "golden": golden,
            "layers": layer_records(model, self.example, changes, proto, size=opened_for[1:]),
            "passes": [_pass_entry(change) for change in changes],
            "measured": {"hardware": describe_hardware(), **self.measured},
            "example": opened_for,
        }
        return write_checked(self.path, content, others, notes)

    def _signature(self, sizes: Sizes) -> Signature:
        """Return the signature with the sizes. Raises `ExportError` where the signature's `side` is not one of them."""
        try:
            return Signature.model_validate(self.signature.model_dump() | {"sizes": sizes})
        except ValidationError as error:
            raise SizeError(error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")) from error


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
