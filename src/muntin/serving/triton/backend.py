"""The model that Triton's Python back end runs: requests of one execution are read, grouped, computed and answered.

    requests --read--> inputs, group --joined--> session --apart--> one response each, in order
                 |                                  |
                 +-- refused: an error response     +-- failed: each request of the group alone

Reading and answering are those of muntin's own server (`inference.requests`). Tensors go in and
out by DLPack: a back end that was built for numpy 1 reads and makes wrong arrays of numpy 2 by its own functions, silently.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact.store import read_manifest
from muntin.errors import MuntinError
from muntin.runtime.host.hardware import physical_cores
from muntin.serving.batching.job import Job
from muntin.serving.inference.requests import Requests
from muntin.serving.protocol.messages import InferInput, InferRequest, ProtocolError, RequestedOutput
from muntin.serving.triton.configuration import MAX_PIXELS
from muntin.serving.triton.options import TritonOptions
from muntin.serving.versions.version import Version, first_line
from muntin.serving.worker.calls import starting_calls
from muntin.serving.worker.opening import open_version

_CODES = {400: "INVALID_ARG", 404: "NOT_FOUND", 413: "INVALID_ARG", 501: "UNSUPPORTED", 503: "UNAVAILABLE"}
"""HTTP status of an error -> Triton's code; INTERNAL for others."""
_TAKEN = b"used_dltensor"
"""Name of a DLPack capsule whose tensor belongs to its receiver. The back end gives it another one, at which numpy prints an error."""
_set_capsule_name = ctypes.pythonapi.PyCapsule_SetName
_set_capsule_name.argtypes = (ctypes.py_object, ctypes.c_char_p)


class TritonModel:
    """One instance of the model. `arguments`: what Triton gives to `initialize`. `pb_utils`: the module that only Triton's processes have.

    Opening compiles for batches of 1 to `max_batch_size` rows, and replays a golden answer. Raises as `open_version`.
    """

    def __init__(self, arguments: dict[str, str], pb_utils: Any) -> None:
        self._pb_utils = pb_utils
        config = json.loads(arguments["model_config"])
        parameters = {name: entry["string_value"] for name, entry in config["parameters"].items()}
        options = TritonOptions(
            name=config["name"],
            max_batch=config["max_batch_size"] or 1,
            instances=sum(group["count"] for group in config["instance_group"]),
            threads=int(parameters["threads"]) if parameters["threads"] else None,
            engine=parameters["engine"],
            precision=parameters["precision"],
            sizes=json.loads(parameters["sizes"]),
            dims=json.loads(parameters["dims"]),
        )
        path = Path(arguments["model_repository"]) / arguments["model_version"] / "artifact"
        calls = starting_calls(read_manifest(path), options.max_batch, options.sizes, options.dims)
        opened = open_version(path, options.session(physical_cores()), calls)
        self._session, self._signature = opened.session, opened.signature
        self._version = Version(name=arguments["model_version"], path=path)
        self._requests = Requests(options.max_batch, MAX_PIXELS)
        self._inputs, self._outputs, _ = self._requests.specs(opened.signature)
        self._batched = bool(config["max_batch_size"])

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return the response to each request, in order."""
        responses: list[Any] = [None] * len(requests)
        groups: dict[Any, list[tuple[int, Any, Any]]] = {}
        for place, request in enumerate(requests):
            try:
                inputs, group, wanted = self._requests.read(self._read(request), self._version, self._signature)
            except ProtocolError as error:
                responses[place] = self._error(error)
            else:
                groups.setdefault(group, []).append((place, inputs, wanted))
        for group, members in groups.items():
            for part in [[member] for member in members] if group.alone else [members]:
                for (place, _, _), response in zip(part, self._compute(group, part), strict=True):
                    responses[place] = response
        return responses

    def close(self) -> None:
        self._session.close()

    def _read(self, request: Any) -> InferRequest:
        inputs = []
        for spec in self._inputs:
            array = np.from_dlpack(self._pb_utils.get_input_tensor_by_name(request, spec.name))
            if not spec.shape:  # declared with a dimension of 1
                array = array.reshape(())
            inputs.append(InferInput(name=spec.name, datatype=spec.datatype, shape=array.shape, data=array))
        outputs = tuple(RequestedOutput(name=name, binary=True) for name in self._in_order(request.requested_output_names()))
        return InferRequest(id="", inputs=tuple(inputs), outputs=outputs, parameters={})

    def _in_order(self, names: Sequence[str]) -> list[str]:
        """Return the requested outputs in the model's order, so that requests of the same outputs share a batch."""
        return [spec.name for spec in self._outputs if spec.name in names]

    def _compute(self, group: Any, members: list[tuple[int, Any, Any]]) -> list[Any]:
        """Return the responses of a group's requests. If they fail together, each is computed alone."""
        parts = [inputs for _, inputs, _ in members]
        try:
            answer = group.compute(self._session, parts[0] if len(parts) == 1 else group.joined(parts))
            answers = group.apart(answer, [Job(group=group, rows=group.rows(part)) for part in parts])
            return [self._response(answer, wanted) for answer, (_, _, wanted) in zip(answers, members, strict=True)]
        except Exception as error:  # noqa: BLE001 - it is the answer
            if len(members) == 1:
                return [self._error(error)]
            return [self._compute(group, [member])[0] for member in members]

    def _response(self, answer: Any, wanted: Any) -> Any:
        outputs = self._requests.outputs(answer, wanted, self._signature)
        return self._pb_utils.InferenceResponse([self._tensor(output.name, output.data) for output in outputs])

    def _tensor(self, name: str, array: NDArray[Any]) -> Any:
        """Return an output tensor."""
        array = np.require(array, requirements=["C", "W"])
        # The back end compares strides also of axes of length 1, where numpy has any number. No dimension is declared as one of 1.
        array = array.reshape(-1).reshape(array.shape or (1,))
        if not array.size:
            return self._pb_utils.Tensor(name, array)
        capsule = array.__dlpack__()
        tensor = self._pb_utils.Tensor.from_dlpack(name, capsule)
        _set_capsule_name(capsule, _TAKEN)
        return tensor

    def _error(self, error: Exception) -> Any:
        status = error.status if isinstance(error, ProtocolError) else 500
        text = str(error) if isinstance(error, MuntinError) else f"the model failed: {type(error).__name__}: {first_line(error)}"
        code = getattr(self._pb_utils.TritonError, _CODES.get(status, "INTERNAL"))
        return self._pb_utils.InferenceResponse(error=self._pb_utils.TritonError(text, code))
