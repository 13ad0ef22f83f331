"""Sessions of models with named inputs and outputs: `session({"input_ids": ids, "attention_mask": mask}) -> {"embedding": array}`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import TensorSignature
from muntin.errors import ArtifactError, DataError
from muntin.runtime.buffers import Buffers
from muntin.runtime.session import AnySession, Dims, Named

NamedInputs = Mapping[str, NDArray[Any]] | NDArray[Any]
"""Arrays by the names of inputs, or the array of the only input."""


class TensorSession(AnySession[NamedInputs, Named]):
    """A session of a model with named inputs and outputs."""

    def __init__(self, *, signature: TensorSignature, engine: str, precision: str, threads: int, streams: int = 1) -> None:
        super().__init__(engine=engine, precision=precision, threads=threads, streams=streams)
        self.signature = signature
        self.buffers = Buffers()
        """Memory of results, for engines whose own memory is copied."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.signature.text}, {self.engine} in {self.precision}, {self.threads} threads>"

    def __call__(self, inputs: NamedInputs, /, outputs: Sequence[str] | None = None) -> Named:
        """The outputs by name for inputs by name (or for the array of the only input).

        `outputs`: names of those to return; None: all, in the model's order. Raises DataError for inputs that the signature does not
        allow and for an unknown output, ArtifactError when the model does not give what its signature says.
        """
        tensors, dims = check_inputs(inputs, self.signature)
        return self.infer_named(tensors, dims, check_outputs(outputs, self.signature))

    @property
    def tensors(self) -> TensorSignature:
        return self.signature

    def warm_up_named(self, dims: Dims, outputs: Sequence[str], *, compute: bool = True) -> None:
        self.warm_up([dims], compute=compute)

    def infer_named(self, inputs: Named, dims: Dims, outputs: Sequence[str]) -> Named:
        """Named outputs for checked, contiguous inputs with these sizes of free dimensions."""
        answer = self._infer(inputs, dims, outputs)
        if (problem := self.signature.outputs_problem(answer, dict(dims))) is not None:
            raise ArtifactError(f"the model gave another output than its signature says: {problem}: export the artefact again")
        return answer

    def warm_up(self, dims: Iterable[Mapping[str, int] | Dims], *, compute: bool = True) -> None:
        """Computes zeros once for each set of sizes of the free dimensions, `{"batch": 8, "tokens": 128}`, in every stream.

        So the first real call of these sizes is as fast as later ones. Without `compute` an engine that can compile without computing
        only compiles.
        """
        for sizes in check_dims(dims, self.signature):
            self._in_every_stream(self, self.signature.zeros(dict(sizes)))

    @staticmethod
    def _copy(batch: NamedInputs) -> NamedInputs:
        return {name: np.array(tensor) for name, tensor in batch.items()} if isinstance(batch, Mapping) else np.array(batch)

    @abstractmethod
    def _infer(self, inputs: Named, dims: Dims, outputs: Sequence[str]) -> Named:
        """Named outputs for checked, contiguous inputs, in arrays of their own."""


def check_inputs(inputs: NamedInputs, signature: TensorSignature) -> tuple[Named, Dims]:
    """Returns contiguous arrays in the model's order, and the sizes of the free dimensions. Raises DataError for others."""
    if isinstance(inputs, np.ndarray) and len(signature.inputs) == 1:
        inputs = {signature.inputs[0].name: inputs}
    if not isinstance(inputs, Mapping):
        specs = ", ".join(f"{spec.name} {spec.text}" for spec in signature.inputs)
        raise DataError(f"inputs of type {type(inputs).__name__}: give a dictionary of numpy arrays by name: {specs}")
    inputs = {name: np.asarray(tensor) if isinstance(tensor, np.generic) else tensor for name, tensor in inputs.items()}
    dims: dict[str, int] = {}
    if (problem := signature.inputs_problem(inputs, dims)) is not None:
        raise DataError(f"input {problem}" if problem.startswith("'") else problem)
    # `require` keeps arrays of no dimension, which `ascontiguousarray` would give one
    return {spec.name: np.require(inputs[spec.name], requirements="C") for spec in signature.inputs}, tuple(sorted(dims.items()))


def check_outputs(outputs: Sequence[str] | None, signature: TensorSignature) -> tuple[str, ...]:
    """Returns the requested outputs, each once. Raises DataError for none and for an unknown one."""
    names = tuple(spec.name for spec in signature.outputs)
    if outputs is None:
        return names
    if isinstance(outputs, str) or not outputs or (unknown := [name for name in outputs if name not in names]):
        given = repr(outputs) if isinstance(outputs, str) or not outputs else ", ".join(map(str, unknown))
        raise DataError(f"outputs {given}: give a list of some of {', '.join(names)}, or None for all")
    return tuple(dict.fromkeys(outputs))


def check_dims(dims: object, signature: TensorSignature | None = None) -> tuple[Dims, ...]:
    """Returns each set of sizes of free dimensions, sorted by name. Raises DataError unless they are the signature's, if it is given."""
    form = 'give a list of sizes by the names of free dimensions, as [{"batch": 8, "tokens": 128}]'
    if isinstance(dims, Mapping | str) or not isinstance(dims, Iterable):
        raise DataError(f"dims={dims!r}: {form}")
    checked = []
    for sizes in dims:
        try:
            named = dict(sizes)
        except (TypeError, ValueError):
            raise DataError(f"dims with {sizes!r}: {form}") from None
        wrong = [name for name, size in named.items() if not isinstance(name, str) or type(size) is not int or size < 1]
        problem = f"{wrong[0]} of {named[wrong[0]]!r}: give a whole number from 1" if wrong else None
        if signature is not None:
            problem = problem or signature.dims_problem(named)
        if problem:
            raise DataError(f"dims with {problem}")
        checked.append(tuple(sorted(named.items())))
    return tuple(checked)
