"""Runs a graph in ONNX Runtime, in plain float arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from muntin.errors import ExportError
from muntin.graph.onnx_graph import Array
from muntin.runtime.host.quiet_imports import onnxruntime
from muntin.runtime.options import DEFAULT_OPTIONS


class FloatRun:
    """A model in ONNX Runtime on the CPU. `exact`: without any fusion, so that quantisers round where the graph says so.

    Raises ExportError where ONNX Runtime cannot open or compute it.
    """

    def __init__(self, model: onnx.ModelProto, *, exact: bool = False) -> None:
        options = onnxruntime.SessionOptions()
        levels = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = levels.ORT_DISABLE_ALL if exact else levels.ORT_ENABLE_ALL
        options.intra_op_num_threads = DEFAULT_OPTIONS.thread_count
        options.log_severity_level = 4
        try:
            self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _failure("cannot open the model", error) from error
        self.input_names = [entry.name for entry in self._session.get_inputs()]
        self.output_names = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Return the named outputs, by default all."""
        names = list(self.output_names if outputs is None else outputs)
        if not names:  # ONNX Runtime takes none for all
            return {}
        try:
            values = self._session.run(names, dict(inputs))
        except Exception as error:
            shapes = ", ".join(f"{name} {value.dtype} {value.shape}" for name, value in inputs.items())
            raise _failure(f"cannot compute {shapes}", error) from error
        return dict(zip(names, values, strict=True))


def _failure(what: str, error: Exception) -> ExportError:
    """ONNX Runtime's errors have no common class but Exception."""
    return ExportError(f"ONNX Runtime {onnxruntime.__version__} {what}: {' '.join(str(error).split())[:400]}")
