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
from muntin.deployment.quantization_changes import kept_layers, pass_entry, reasons_of
from muntin.errors import ExportError
from muntin.graph.artifacts.export import write_graph
from muntin.graph.calibration import Inputs
from muntin.graph.float_run import FloatRun
from muntin.graph.onnx_file import named_inputs
from muntin.graph.onnx_graph import Array
from muntin.graph.quantize import GraphQuantization, calibrate, with_grids
from muntin.runtime.verification.golden import compare_outputs
from muntin.training.config import QuantizationConfig

SAME = GoldenTolerance(max_error=0.05, label_agreement=0.999)
"""Difference of the captured graph from PyTorch that is allowed: only the order of sums differs."""


def export_named(
    model: nn.Module,
    example: NamedTensors,
    path: Path | str,
    *,
    calibration: Iterable[Any] | None,
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
    batches = None if calibration is None else _batches(calibration, model, example)
    axes = usual_axes(example, *(batches or ())) if axes is None else axes
    check_call(model, example, axes)
    wrapped, changes = NamedModel(model, tuple(example)).eval(), history(model)
    example = {name: tensor.cpu() for name, tensor in example.items()}
    arrays = as_arrays(example)
    deployed = answer(wrapped, example)
    trained = take_grids(model)
    proto = onnx.shape_inference.infer_shapes(to_named_onnx(model, example, axes))
    for result in compare_outputs(FloatRun(proto)(arrays), answer(wrapped, example), SAME):
        if not result.passed:
            raise ExportError(
                f"what was traced does not compute what PyTorch does: {result.problem}; it holds one branch of each condition and no "
                "random numbers: leave them out, or write all branches in one (torch.where); nothing was written"
            )
    content = {"measured": measured or {}, "passes": [pass_entry(change) for change in changes]}
    config, reasons = quantization or QuantizationConfig(), reasons_of(changes)

    if config.keep and batches is None:
        raise ExportError(f"keep names {', '.join(config.keep)}, and without calibration nothing is quantised: give it, or no keep")

    def quantize(rows: Inputs) -> GraphQuantization:
        if batches is None:
            return with_grids(proto, trained, reasons, example=rows, half=bool(trained))
        options: Any = {"min_sqnr_db": config.min_sqnr_db, "keep": config.keep, "given": trained, "floats": kept_layers(changes)}
        return calibrate(proto, [named_inputs(batch, proto) for batch in batches], example=rows, half=True, **options)

    due = (arrays, deployed) if trained and batches is None else None
    return write_graph(proto, path, quantize, [arrays], content, integers=bool(trained) or batches is not None, due=due)


def _batches(calibration: Iterable[Any], model: nn.Module, example: NamedTensors) -> list[dict[str, Array]]:
    """Return batches as arrays by the names of the inputs."""
    batches = []
    for batch in calibration_list(calibration, model):
        if not isinstance(batch, Mapping):
            given = (batch,) if isinstance(batch, Tensor) else tuple(batch)
            if len(given) != len(example):
                raise ExportError(
                    f"a calibration batch is a {type(batch).__name__} of {len(given)}, and the model takes {', '.join(example)}: give "
                    "dictionaries of tensors"
                )
            batch = dict(zip(example, given, strict=True))
        if missing := [name for name in example if not isinstance(batch.get(name), Tensor)]:
            raise ExportError(f"a calibration batch has no tensor '{missing[0]}', an input of the example: give all of them")
        batches.append(as_arrays({name: tensor.cpu() for name, tensor in batch.items()}))
    return batches
