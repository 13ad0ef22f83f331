"""Export of a PyTorch model with named tensors in and out: token ids, several inputs or outputs, embeddings, numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor, nn

from muntin.artifact import Artifact, GoldenTolerance, check_target
from muntin.compression import fold, remove_closed_channels
from muntin.compression.calibration import calibration_list
from muntin.compression.history import history
from muntin.compression.quantization.qat import check_frozen
from muntin.compression.sparsity.pattern import check_held
from muntin.deployment.capture.named_graph import Axes, NamedModel, NamedTensors, answer, as_arrays, check_call, to_named_onnx, usual_axes
from muntin.deployment.capture.trained_grids import take_grids
from muntin.deployment.quantization_changes import pass_entry, reasons_of
from muntin.errors import ExportError
from muntin.graph import export_onnx
from muntin.graph.artifacts.export import write_graph
from muntin.graph.float_run import FloatRun
from muntin.graph.quantize import with_grids
from muntin.runtime.verification.golden import compare_outputs
from muntin.training.config import QuantizationConfig

SAME = GoldenTolerance(max_error=0.05, label_agreement=0.999)
"""Difference of the captured graph from PyTorch that is allowed: only the order of sums differs."""


def export_named(
    model: nn.Module,
    example: NamedTensors,
    path: Path | str,
    *,
    calibration: Iterable[NamedTensors] | None,
    axes: Axes | None,
    quantization: QuantizationConfig | None,
    measured: Mapping[str, Any] | None,
) -> Artifact:
    """Write an artefact with named tensors; see `muntin.export`. `model`: a copy in FP32 on the CPU, which is changed."""
    check_target(path)
    for name, tensor in example.items():
        if not isinstance(tensor, Tensor):
            raise ExportError(f"example '{name}' is of type {type(tensor).__name__}: give a torch.Tensor")
    check_frozen(model)
    check_held(model)
    remove_closed_channels(model)
    fold(model)
    axes = usual_axes(example) if axes is None else axes
    check_call(model, example, axes)
    wrapped, changes = NamedModel(model, tuple(example)).eval(), history(model)
    example = {name: tensor.cpu() for name, tensor in example.items()}
    arrays = as_arrays(example)
    deployed = answer(wrapped, example)
    trained = take_grids(model)
    if trained and (calibration is not None or quantization is not None):
        raise ExportError("the model is quantised in PyTorch already: leave calibration and quantization out, or give the float model")
    proto = onnx.shape_inference.infer_shapes(to_named_onnx(model, example, axes))
    for result in compare_outputs(FloatRun(proto)(arrays), answer(wrapped, example) if trained else deployed, SAME):
        if not result.passed:
            raise ExportError(
                f"what was traced does not compute what PyTorch does: {result.problem}; it holds one branch of each condition and no "
                "random numbers: leave them out, or write all branches in one (torch.where); nothing was written"
            )
    passes = [pass_entry(change) for change in changes]
    if trained:
        reasons = reasons_of(changes)
        return write_graph(
            proto,
            path,
            lambda rows: with_grids(proto, trained, reasons, example=rows, half=True),
            [arrays],
            {"measured": measured or {}, "passes": passes},
            integers=True,
            due=(arrays, deployed),
        )
    config = quantization or QuantizationConfig()
    return export_onnx(
        proto,
        path,
        calibration=None if calibration is None else [as_arrays(_by_name(batch)) for batch in calibration_list(calibration, model)],
        example=arrays,
        keep=config.keep,
        min_sqnr_db=config.min_sqnr_db,
        measured=measured,
        passes=passes,
    )


def _by_name(batch: object) -> NamedTensors:
    if not isinstance(batch, Mapping):
        raise ExportError(f"a calibration batch is a {type(batch).__name__}, and the example a dictionary: give dictionaries of tensors")
    return batch
