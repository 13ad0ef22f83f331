"""Models with named inputs and outputs in OpenVINO.

Each combination of sizes of the free dimensions is compiled when it is first called, and the last few are kept. With `dynamic` only those
that `warm_up` names are compiled; one model of free sizes computes all others, row by row where rows are independent: with a free batch
size, too, OpenVINO 2026.4 computes some networks wrongly (docs/log.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from muntin.artifact import Artifact
from muntin.errors import ArtifactError, DataError
from muntin.runtime.engines.openvino.compiled import Compiled, CompiledForms, failure
from muntin.runtime.engines.openvino.workarounds import with_biases, with_whole_masks
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import Dims, ExecutedLayer, Named
from muntin.runtime.tensors import TensorSession, check_dims

Sized = Dims | None
"""One compiled form of the model: for these sizes, or for free ones."""
_INT32 = np.iinfo(np.int32)


class OpenVinoTensorSession(CompiledForms[Sized], TensorSession):
    """A model with named tensors in OpenVINO's CPU plugin."""

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        CompiledForms.__init__(self, artifact, options)
        signature = artifact.manifest.signature.tensors
        TensorSession.__init__(
            self, signature=signature, engine="openvino", precision=self._precision, threads=self._threads, streams=self._streams
        )
        self._ports = self._positions(self._model.inputs, [spec.name for spec in signature.inputs], "inputs")
        self._wide = [spec.name for spec in signature.inputs if spec.dtype in ("int64", "uint64") and spec.name in self._ports]
        self._answers = self._positions(self._model.outputs, [spec.name for spec in signature.outputs], "outputs")

    def _positions(self, ports: Sequence[Any], names: Sequence[str], kind: str) -> dict[str, int]:
        """Position of each input or output of the signature in the model. An input that nothing reads has none."""
        positions = {name: index for name in names for index, port in enumerate(ports) if name in port.get_names()}
        if len(positions) < len(ports if kind == "inputs" else names):
            given = ", ".join("/".join(sorted(port.get_names())) for port in ports)
            raise ArtifactError(
                f"{self._path}: the model's {kind} are {given}, its signature's {', '.join(names)}: export the artefact again"
            )
        return positions

    def _infer(self, inputs: Named, dims: Dims, outputs: Sequence[str]) -> Named:
        for name in self._wide:
            low, high = inputs[name].min(), inputs[name].max()
            if low < _INT32.min or high > _INT32.max:
                raise DataError(
                    f"input '{name}' holds {low if low < _INT32.min else high}: OpenVINO computes integers in 32 bits: give numbers from "
                    f'{_INT32.min} to {_INT32.max}, or use engine="onnxruntime"'
                )
        compiled = self._find_compiled(dims) if self._dynamic else self._compiled_for(dims)
        if compiled is not None:
            return self._compute(compiled, inputs, outputs)
        compiled, batch = self._compiled_for(None), self.signature.batch
        if batch is None or dict(dims)[batch] == 1:
            return self._compute(compiled, inputs, outputs, free=True)
        rows = [
            self._compute(compiled, {name: tensor[row : row + 1] for name, tensor in inputs.items()}, outputs, free=True)
            for row in range(dict(dims)[batch])
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in outputs}

    def _compute(self, compiled: Compiled, inputs: Named, outputs: Sequence[str], *, free: bool = False) -> Named:
        """Nothing is copied on the way in. Outputs are copied: the engine writes the next ones into the same memory.

        With free sizes OpenVINO 2026.4 may return without an answer and without an error where memory is refused, so each call gets a
        request of its own: it has no earlier answer.
        """
        request = compiled.free.get()
        try:
            used = compiled.model.create_infer_request() if free else request
            used.infer({index: inputs[name] for name, index in self._ports.items()}, share_inputs=True, share_outputs=True)
            answer = {}
            for name in outputs:
                result = used.get_output_tensor(self._answers[name]).data
                answer[name] = self.buffers.take(result.shape, result.dtype) if result.size else np.empty(result.shape, result.dtype)
                np.copyto(answer[name], result)
        except (RuntimeError, MemoryError) as error:
            shapes = ", ".join(f"{name} {tensor.shape}" for name, tensor in inputs.items())
            raise failure(self._path, f"cannot compute {shapes}", error) from error
        finally:
            compiled.free.put(request)
        return answer

    def layers(self) -> list[ExecutedLayer]:
        """As compiled for the sizes of the last call; before any call, for free sizes, or for the only ones."""
        return self._executed(None if self.signature.dims else ())

    def warm_up(self, dims: Iterable[Mapping[str, int] | Dims], *, compute: bool = True) -> None:
        checked = check_dims(dims, self.signature)
        for sizes in checked:
            with self._lock:
                self._warmed_up.add(sizes)
            self._compiled_for(sizes)
        if compute:
            super().warm_up(checked)

    def _prepared(self, form: Sized) -> Any:
        model = self._model.clone()
        if form is None:
            free = dict.fromkeys(self.signature.dims, -1) | ({} if self.signature.batch is None else {self.signature.batch: 1})
            shapes = self.signature.input_shapes(free)
        else:
            shapes = self.signature.input_shapes(dict(form))
        model.reshape({model.inputs[index]: list(shapes[name]) for name, index in self._ports.items()})
        if form is None:
            model = with_biases(model)
        return model if self.precision == "f32" else with_whole_masks(model)

    def _key(self, form: Sized) -> str:
        masks = "" if self.precision == "f32" else " whole masks"
        return f"one row, free biases{masks}" if form is None else f"{form}{masks}"

    def _words(self, form: Sized) -> str:
        return "free sizes" if form is None else ", ".join(f"{name} {size}" for name, size in form) or "its only sizes"

    def _is_free(self, form: Sized) -> bool:
        return form is None
