"""Capture of an image model for sizes of images, and its artefact: attempts until engines compute what the model does.

    model -> fold -> to_onnx -> float graph -> calibrated or trained scales -> integer graph -> artefact
       compared:   PyTorch and float graph      float and integer graph      integer graph and OpenVINO (f32, 16-bit), ONNX Runtime

The golden scores are those of the integer graph in exact arithmetic, which a later replay compares with an engine's kernels.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from pydantic import ValidationError
from torch import Tensor, nn

from muntin.artifact import Artifact, Signature, Sizes
from muntin.compression import Change, fold, remove_closed_channels
from muntin.deployment.capture.graph_check import Errors, check_capture, check_rounding, errors_by_size, graph_pairs
from muntin.deployment.capture.model_contract import (
    SizeError,
    as_bytes,
    check_folded,
    check_independence,
    image_of,
)
from muntin.deployment.capture.onnx_export import to_onnx
from muntin.deployment.capture.trained_grids import take_grids
from muntin.deployment.engine_check import write_checked_images
from muntin.deployment.quantization_changes import kept_layers, pass_entry, quantization_changes, reasons_of
from muntin.deployment.sizes.probe import Probe
from muntin.graph.artifacts.engine_check import FAR_OFF, write_with_fallbacks
from muntin.graph.artifacts.manifest_entries import layer_records, packing_of
from muntin.graph.insertion import Grids
from muntin.graph.quantize import GraphQuantization, calibrate, with_grids
from muntin.graph.records import QuantizedOnnx
from muntin.models.eager import eager_copy
from muntin.progress import OnStage
from muntin.runtime import describe_hardware
from muntin.training.config import QuantizationConfig

COVERAGE, ROUNDING = "integer_coverage", "rounding"
"""Keys of a manifest's measured figures: the share of the multiply-adds in integers, 0 to 1, and the error of integers by image size."""


@dataclass(frozen=True, kw_only=True)
class CapturedGraph:
    """A float graph and the folded model that it was made of. `trained`: grids of a model that is quantised in PyTorch."""

    sizes: Sizes
    model: nn.Module
    proto: onnx.ModelProto
    trained: Grids
    changes: tuple[Change, ...]


@dataclass(frozen=True, kw_only=True)
class ImageDraft:
    """Inputs of an export, and its attempts. `model`: a copy, which no attempt changes. `opened_for`: the (B, H, W) `load` compiles for."""

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
    stage: OnStage
    captures: list[CapturedGraph] = field(default_factory=list)

    def write_widest(self) -> Artifact:
        """Write the artefact for the widest sizes for which that succeeds. Raises the error of the last attempt."""
        self.stage("trying sizes")
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
        golden_sides, other_sides = self.probe.sizes_to_compare(sizes)
        due = self.probe.pairs(dict.fromkeys((*golden_sides, *other_sides)))
        check_independence(self.model, due)
        self.stage(f"capturing the graph for {sizes.text}")
        captured = self._capture(sizes, signature)
        model, trained, changes = captured.model, captured.trained, captured.changes
        if not any(grids.activations for grids in trained.values()):
            errors = errors_by_size(graph_pairs(captured.proto, [images for images, _ in due], exact=False), due)
            if len(changes) > len(self.changes):
                check_folded(model, due, errors)
            check_capture(errors)
        self.probe.forget()
        self.stage("choosing scales" if self.calibration is not None else "preparing")
        quantization = self._quantize(captured.proto, trained, changes, opened_for)
        kinds = {name: type(layer).__name__ for name, layer in model.named_modules() if not list(layer.children())}

        def write(result: QuantizedOnnx) -> Artifact:
            self.stage("computing reference outputs")
            pairs = graph_pairs(result.model, [images for images, _ in due], exact=True)
            errors = errors_by_size(pairs, due)
            if self.calibration is None and trained:
                check_capture(errors, FAR_OFF)
            rounding = check_rounding(errors) if self.calibration is not None else []
            lacking = result.notes if trained or self.calibration is not None else ()
            done = [*changes, *(quantization_changes(result.products) if self.calibration is not None else ())]
            content: dict[str, Any] = {
                "model": result.model,
                "signature": signature,
                "packing": packing_of(result.model),
                "golden": pairs[: len(golden_sides)],
                "layers": layer_records(result.products, kinds),
                "passes": [pass_entry(change) for change in done],
                "measured": {"hardware": describe_hardware(), **self.measured, **self._figures(result, errors)},
                "example": opened_for,
            }
            self.stage("comparing the engines")
            return write_checked_images(self.path, content, pairs[len(golden_sides) :], [*notes, *rounding, *lacking])

        return write_with_fallbacks(quantization, write)

    def _figures(self, result: QuantizedOnnx, errors: Errors) -> dict[str, Any]:
        """Return the share of multiply-adds in integers, and by how many standard deviations rounding moves the answer, by size."""
        if not any(record.bits for record in result.products):
            return {}
        rounding = {f"{H}x{W}": round(error, 4) for (H, W), error in errors.items()} if self.calibration is not None else {}
        return {COVERAGE: round(result.coverage, 4), **({ROUNDING: rounding} if rounding else {})}

    def _capture(self, sizes: Sizes, signature: Signature) -> CapturedGraph:
        """Return the graph for sizes. One of an earlier attempt serves if it holds for these, too: a capture takes most of the time."""
        for captured in self.captures:
            if captured.sizes.dims == sizes.dims and captured.sizes.cover(sizes):
                return captured
        model = eager_copy(self.model)
        changes = (*self.changes, *remove_closed_channels(model), *fold(model))
        trained = take_grids(model)
        proto = to_onnx(model, self.example, signature)
        self.captures.append(CapturedGraph(sizes=sizes, model=model, proto=proto, trained=trained, changes=changes))
        return self.captures[-1]

    def _quantize(
        self, proto: onnx.ModelProto, trained: Grids, changes: Iterable[Change], opened_for: tuple[int, int, int]
    ) -> GraphQuantization:
        """Return the graph with its products quantised."""
        example = {"images": image_of(self.example, opened_for[1:])}
        if self.calibration is None:
            return with_grids(proto, trained, reasons_of(changes), example=example, half=bool(trained))
        config = self.quantization or QuantizationConfig()
        batches = [{"images": as_bytes(batch)} for batch in self.calibration]
        floats = kept_layers(changes)
        return calibrate(
            proto, batches, min_sqnr_db=config.min_sqnr_db, keep=config.keep, example=example, half=True, given=trained, floats=floats
        )

    def _signature(self, sizes: Sizes) -> Signature:
        """Return the signature with the sizes. Raises `ExportError` where the signature's `side` is not one of them."""
        try:
            return Signature.model_validate(self.signature.model_dump() | {"sizes": sizes})
        except ValidationError as error:
            raise SizeError(error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")) from error
