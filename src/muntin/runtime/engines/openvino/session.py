"""The OpenVINO engine: integer kernels for QDQ layers, BF16 or FP16 for the others where the CPU has it.

The graph has free dimensions, but a kernel compiled for one size is faster. So each size is compiled when it is first called, in a few
tenths of a second, and the last few are kept. With `dynamic` only the sizes that `warm_up` names are compiled; one model of free sizes
computes all others, row by row where rows are independent: with a free batch size, too, OpenVINO 2026.4 computes some networks wrongly
(docs/log.md). (In 16 bits that model runs in float32 where it computes floats from sizes.) An artefact of one size needs no such model: its
rows are computed by models of that size, in the batches that `warm_up` names. Compiled models are also kept in the user's cache
(`engines.compile_cache`).

With one stream all threads work on one call: the lowest latency. With several, each works on a call of its own with its share of the
threads: more rows a second, each with a higher latency.

A QDQ graph runs on integers (OpenVINO 2026.4) with: weights in symmetric int8 (uint8 with a zero point runs in float), a Linear's input of
rank 2 or 3 (at rank 4 its bias, activation and requantisation become a pass of their own), and no quantiser of scale 1 and zero point 0 on
the uint8 image (it is removed as a no-op, and its layer runs in float).
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Artifact
from muntin.errors import ArtifactError, DataError
from muntin.runtime.engines.openvino.compiled import FREE, Compiled, CompiledForm, CompiledForms, failure
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
from muntin.runtime.inputs import LABELS, Dims, Named
from muntin.runtime.options import DEFAULT_OPTIONS, SessionOptions
from muntin.runtime.session import ExecutedLayer, Session

# With free sizes OpenVINO 2026.4 may return without an answer and without an error where it cannot allocate what a size needs. The memory
# would then hold another answer. So both ends of an answer are marked with values that no model gives: the highest value of a label's type
# is no class, and this NaN comes from no computation. Other types have no such value: their call gets a request that has no earlier answer.
_NO_SCORE = 0x7FC0BEEF
_INT32 = np.iinfo(np.int32)


class OpenVinoSession(CompiledForms, Session):
    """A model in OpenVINO's CPU plugin."""

    def __init__(self, artifact: Artifact, options: SessionOptions) -> None:
        CompiledForms.__init__(self, artifact, options)
        signature = artifact.manifest.signature
        Session.__init__(
            self, signature=signature, engine="openvino", precision=self._precision, threads=self._threads, streams=self._streams
        )
        self._wide = [spec.name for spec in self.tensors.inputs if spec.dtype in ("int64", "uint64") and spec.name in self._ports]
        self._retrying = Lock()  # held by one retry at a time
        only = -1 not in signature.row.values()
        self._warm_sizes: set[Dims] = {self._size(tuple(sorted(signature.row.items())))} if only else set()
        """Sizes, without the batch, of the forms in `_warmed_up`, or of an artefact of one size."""

    def _infer(self, inputs: Named, dims: Dims, outputs: tuple[str, ...]) -> Named:
        self._check_integers(inputs)
        form = self._form(dims, outputs)
        names = outputs if self.images else tuple(self._answers)
        answer, parts = self._memory(dims, names), []
        for used, rows in self._parts(form):
            given = {name: tensor if rows is None else tensor[rows] for name, tensor in inputs.items()}
            target = None if answer is None else {name: tensor if rows is None else tensor[rows] for name, tensor in answer.items()}
            parts.append(self._run(used, given, names, target))
        if answer is None:
            answer = parts[0] if len(parts) == 1 else {name: np.concatenate([part[name] for part in parts]) for name in names}
        return {name: answer[name] for name in outputs}

    def _check_integers(self, inputs: Named) -> None:
        for name in self._wide:
            low, high = inputs[name].min(), inputs[name].max()
            if low < _INT32.min or high > _INT32.max:
                raise DataError(
                    f"input '{name}' holds {low if low < _INT32.min else high}: OpenVINO computes integers in 32 bits: give numbers from "
                    f'{_INT32.min} to {_INT32.max}, or use engine="onnxruntime"'
                )

    def _form(self, dims: Dims, outputs: Sequence[str]) -> CompiledForm:
        return CompiledForm(dims, labels=self.images and tuple(outputs) == LABELS)

    def _size(self, dims: Dims) -> Dims:
        return tuple(dim for dim in dims if dim[0] != self.tensors.batch)

    def _memory(self, dims: Dims, names: Sequence[str]) -> Named | None:
        """Memory for all outputs of a call: a request keeps writing where its last call did. None where a size follows from values."""
        shapes = self.signature.output_sizes(dict(dims))
        if any(0 in shapes[name] for name in names):
            return None
        return {spec.name: self.buffers.take(shapes[spec.name], spec.dtype) for spec in self.tensors.outputs if spec.name in names}

    def _parts(self, form: CompiledForm) -> list[tuple[CompiledForm, slice | None]]:
        """The forms that compute a call, each with its rows; None: all of them.

        With `dynamic`, a size that was warmed up is computed by models of that size only, in any batch and for any output: the model of
        free sizes rounds differently.
        """
        assert form.dims is not None
        size, sizes, batch = self._size(form.dims), dict(form.dims), self.tensors.batch
        with self._lock:
            if not self._dynamic or form in self._compiled:
                return [(form, None)]
            compiled = [dims for dims, labels in self._compiled if dims is not None and labels == form.labels]
        if batch is None:
            return [(form if size in self._warm_sizes else FREE, None)]
        if size not in self._warm_sizes:
            return [(CompiledForm(None, form.labels), slice(row, row + 1)) for row in range(sizes[batch])]
        batches = [dict(dims)[batch] for dims in compiled if self._size(dims) == size]
        parts: list[tuple[CompiledForm, slice | None]] = []
        first = 0
        while first < sizes[batch]:
            rows = max((rows for rows in batches if rows <= sizes[batch] - first), default=1)
            parts.append((CompiledForm(tuple(sorted((*size, (batch, rows)))), form.labels), slice(first, first + rows)))
            first += rows
        return parts

    def _run(self, form: CompiledForm, inputs: Named, names: Sequence[str], target: Named | None) -> Named:
        compiled = self._compiled_for(form)
        request = compiled.free.get()
        try:
            return self._compute(form, compiled, request, inputs, names, target)
        except (RuntimeError, MemoryError) as error:
            # With free sizes a call that computes at the same time may have caused this failure.
            others = compiled.free.qsize() < self.streams - 1
            if form.dims is not None or (self._drop(form, compiled) and not others):
                raise self._failure(inputs, error) from error
        finally:
            compiled.free.put(request)
        return self._retry(form, inputs, names, target)

    def _retry(self, form: CompiledForm, inputs: Named, names: Sequence[str], target: Named | None) -> Named:
        """Computes once more, on a new model of free sizes that no other call uses."""
        with self._retrying:
            compiled = self._compile(form)
            request = compiled.free.get()
            try:
                answer = self._compute(form, compiled, request, inputs, names, target)
            except (RuntimeError, MemoryError) as error:
                raise self._failure(inputs, error) from error
            compiled.free.put(request)
            if self._find_compiled(form) is None:
                self._keep(form, compiled)
        return answer

    def _failure(self, inputs: Named, error: RuntimeError | MemoryError) -> ArtifactError:
        return failure(self._path, f"cannot compute {', '.join(f'{name} {tensor.shape}' for name, tensor in inputs.items())}", error)

    def _compute(
        self, form: CompiledForm, compiled: Compiled, request: Any, inputs: Named, names: Sequence[str], target: Named | None
    ) -> Named:
        """Nothing is copied where `target` is given: the engine reads the inputs, and writes the outputs, where they lie."""
        marks = {name: marked(tensor, labels=form.labels) for name, tensor in (target or {}).items()} if form.dims is None else {}
        if form.dims is None and (target is None or None in marks.values()):
            request = compiled.model.create_infer_request()
        for name, tensor in (target or {}).items():
            self._write_to(request, self._answers[name], tensor)
        request.infer({index: inputs[name] for name, index in self._ports.items()}, share_inputs=True, share_outputs=True)
        if target is None:
            return {name: self._copied(request.get_output_tensor(self._answers[name]).data) for name in names}
        for name, mark in marks.items():
            if (shape := tuple(request.get_output_tensor(self._answers[name]).shape)) != target[name].shape:
                raise self._wrong_output(shape, target[name])  # of a smaller output, the rest of the answer was not written
            if mark is not None and mark[1] in (mark[0][0], mark[0][-1]):
                raise MemoryError("it returned without an answer, as it does where it cannot allocate what a size needs: out of memory")
        return target

    def _copied(self, result: NDArray[Any]) -> NDArray[Any]:
        copy = self.buffers.take(result.shape, result.dtype) if result.size else np.empty(result.shape, result.dtype)
        np.copyto(copy, result)
        return copy

    def _drop(self, form: CompiledForm, compiled: Compiled) -> bool:
        """Drops a model of free sizes that failed to compute. Returns False if another call has dropped it.

        After a failure OpenVINO 2026.4 also refuses the size before it until another size comes.
        """
        with self._lock:
            dropped = self._compiled.pop(form) if self._compiled.get(form) is compiled else None
        return dropped is not None

    def _write_to(self, request: Any, index: int, answer: NDArray[Any]) -> None:
        try:
            request.set_output_tensor(index, openvino.Tensor(answer, shared_memory=True))
        except RuntimeError as error:
            raise self._wrong_output(tuple(request.get_output_tensor(index).shape), answer) from error

    def _wrong_output(self, shape: tuple[int, ...], answer: NDArray[Any]) -> ArtifactError:
        return ArtifactError(
            f"{self._path}: the model gives {shape} where its signature says {answer.dtype} {answer.shape}: export the artefact again"
        )

    def layers(self) -> list[ExecutedLayer]:
        """As compiled for the sizes of the last call; before any call, for free sizes, or for one row of the only size."""
        row = self.signature.row
        return self._executed(FREE if -1 in row.values() else CompiledForm(tuple(sorted(row.items()))))

    def prepare(self, dims: Dims, outputs: Sequence[str], *, compute: bool = True) -> None:
        form = self._form(dims, outputs)
        with self._lock:
            self._warmed_up.add(form)
            self._warm_sizes.add(self._size(dims))
        self._compiled_for(form)
        super().prepare(dims, outputs, compute=compute)


def marked(answer: NDArray[Any], *, labels: bool) -> tuple[NDArray[Any], int] | None:
    """Mark both ends of memory for an answer. Returns its values, flat, and the mark; None for a type without a mark."""
    if labels:
        flat, mark = answer.reshape(-1), int(np.iinfo(answer.dtype).max)
    elif answer.dtype == np.float32:
        flat, mark = answer.reshape(-1).view(np.uint32), _NO_SCORE
    else:
        return None
    flat[0] = flat[-1] = mark
    return flat, mark


def open_openvino(artifact: Artifact, options: SessionOptions = DEFAULT_OPTIONS) -> OpenVinoSession:
    """Opens an artefact in OpenVINO on the CPU.

    Precision "recorded" is the manifest's, or f32 on a CPU without it (the session's `.precision` says which). Raises DependencyError for
    another precision that the CPU lacks. A session has at most one stream a thread.
    """
    with signal_stack_kept():
        return OpenVinoSession(artifact, options)
