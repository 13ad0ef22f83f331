"""Export of a PyTorch model with named tensors in and out: token ids, several inputs or outputs, embeddings, numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from muntin.artifact import GoldenTolerance, TensorArtifact, check_target
from muntin.compression import fold, remove_closed_channels
from muntin.deployment.capture.named_graph import Axes, NamedModel, NamedTensors, answer, as_arrays, to_named_onnx, usual_axes
from muntin.deployment.capture.trained_plan import take_plan
from muntin.errors import ExportError
from muntin.graph import export_onnx
from muntin.graph.float_run import FloatRun
from muntin.runtime.verification.tensors import compare_outputs
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
) -> TensorArtifact:
    """Write an artefact with named tensors; see `muntin.export`. `model`: a copy in FP32 on the CPU, which is changed."""
    check_target(path)
    for name, tensor in example.items():
        if not isinstance(tensor, Tensor):
            raise ExportError(f"example '{name}' is of type {type(tensor).__name__}: give a torch.Tensor")
    batches = None if calibration is None else [dict(batch) for batch in calibration]
    remove_closed_channels(model)
    fold(model)
    if take_plan(model):
        raise ExportError("the model is quantised in PyTorch: give the float model, and calibration to quantise it")
    example = {name: tensor.cpu() for name, tensor in example.items()}
    proto = to_named_onnx(model, example, usual_axes(example) if axes is None else axes)
    due = answer(NamedModel(model, tuple(example)).eval(), example)
    for result in compare_outputs(FloatRun(proto)(as_arrays(example)), due, SAME):
        if not result.passed:
            raise ExportError(
                f"what was traced does not compute what PyTorch does: {result.problem}; it holds one branch of each condition and no "
                "random numbers: leave them out, or write all branches in one (torch.where); nothing was written"
            )
    config = quantization or QuantizationConfig()
    arrays = None if batches is None else [as_arrays(batch) for batch in batches]
    return export_onnx(
        proto, path, calibration=arrays, example=as_arrays(example), keep=config.keep, min_sqnr_db=config.min_sqnr_db, measured=measured
    )
