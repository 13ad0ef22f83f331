"""One way to ask over JSON, binary tensors and gRPC. tritonclient writes the requests and reads the answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection
from typing import Any

import numpy as np
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from google.protobuf.json_format import MessageToDict
from tritonclient.grpc import service_pb2
from tritonclient.grpc._utils import _get_inference_request
from tritonclient.utils import np_to_triton_dtype

from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.json_codec import HEADER_LENGTH
from tensor_models import Array

METHODS = {
    "metadata": "ModelMetadata", "config": "ModelConfig", "stats": "ModelStatistics", "ready": "ModelReady", "load": "RepositoryModelLoad",
    "unload": "RepositoryModelUnload", "index": "RepositoryIndex", "live": "ServerLive", "server ready": "ServerReady",
}  # fmt: skip
SENT_IN_SEQUENCES = {"sequence_start": False, "sequence_end": False}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`status`: of HTTP, or the name of gRPC's. `document`: of a description."""

    status: int | str
    error: str = ""
    document: Any = None
    model: str = ""
    version: str = ""
    id: str = ""
    outputs: Mapping[str, Array] = field(default_factory=dict)


class Connection:
    """A connection over HTTP that is kept. `fetch` is what `OverHttp` takes."""

    def __init__(self, port: int) -> None:
        self._connection = HTTPConnection("127.0.0.1", port, timeout=60)

    def fetch(self, path: str, body: bytes | None = None, headers: Any = None, method: str = "") -> tuple[int, dict[str, str], bytes]:
        self._connection.request(method or ("GET" if body is None else "POST"), path, body, headers or {})
        answer = self._connection.getresponse()
        content = answer.read()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content

    def close(self) -> None:
        self._connection.close()


def label_request(seed: int = 1, *, model: str = "pixels", side: int = 8, identity: str = "") -> messages.ModelInferRequest:
    """gRPC's message for the labels of one image."""
    request = messages.ModelInferRequest(model_name=model, id=identity)
    request.inputs.add(name="images", datatype="UINT8", shape=[1, side, side, 3])
    request.raw_input_contents.append(square(seed, side).tobytes())
    request.outputs.add(name="labels")
    return request


def square(seed: int, side: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, (1, side, side, 3)).astype(np.uint8)


def labels_of(seed: int, side: int = 8) -> bytes:
    """Those of a model whose scores are the pixels."""
    return square(seed, side).argmax(3).astype(np.uint8).tobytes()


def tensors(library: Any, inputs: Mapping[str, Array]) -> list[Any]:
    made = [library.InferInput(name, array.shape, np_to_triton_dtype(array.dtype)) for name, array in inputs.items()]
    return [tensor.set_data_from_numpy(array) for tensor, array in zip(made, inputs.values(), strict=True)]


def outputs_of(result: Any, names: Sequence[str]) -> dict[str, Array]:
    """The outputs; strings as text, which JSON holds."""
    arrays = {name: result.as_numpy(name) for name in names}
    text = np.vectorize(lambda item: item.decode() if isinstance(item, bytes) else item, otypes=[object])
    return {name: text(array) if array.dtype == object else array for name, array in arrays.items()}


class OverHttp:
    """`fetch(path, body, headers)`: status, header fields in lower case, and body of the answer."""

    def __init__(self, fetch: Callable[..., Any], *, binary: bool = True) -> None:
        self.fetch, self.binary = fetch, binary

    def infer(
        self, model: str, inputs: Mapping[str, Array], outputs: Sequence[str] = (), *, classes: int = 0, version: str = "", **options: Any
    ) -> Answer:
        """`classes`: best ones, of every output. `options`: request_id, parameters, priority, timeout, sequence_id."""
        if self.binary:
            requested = [triton_http.InferRequestedOutput(name, class_count=classes) for name in outputs] or None
            write = triton_http.InferenceServerClient.generate_request_body
            body, length = write(tensors(triton_http, inputs), outputs=requested, **options)
        else:
            document = {"id": options.pop("request_id", ""), "parameters": options.pop("parameters", {}) | options}
            document["inputs"] = [
                {"name": name, "shape": array.shape, "datatype": np_to_triton_dtype(array.dtype), "data": array.tolist()}
                for name, array in inputs.items()
            ]
            if outputs:
                document["outputs"] = [{"name": name, "parameters": {"classification": classes} if classes else {}} for name in outputs]
            body, length = json.dumps(document).encode(), None
        path = f"/v2/models/{model}" + f"/versions/{version}" * bool(version) + "/infer"
        status, headers, content = self.fetch(path, body, {} if length is None else {HEADER_LENGTH: str(length)})
        if status != 200:
            return Answer(status=status, error=json.loads(content)["error"])
        header = headers.get(HEADER_LENGTH.lower())
        assert (header is not None) == self.binary
        result = triton_http.InferResult.from_response_body(content, header_length=None if header is None else int(header))
        document = result.get_response()
        arrays = outputs_of(result, [output["name"] for output in document["outputs"]])
        named = {"model": document["model_name"], "version": document["model_version"], "id": document.get("id", "")}
        return Answer(status=status, outputs=arrays, **named)

    def describe(self, what: str, model: str, version: str = "") -> Answer:
        """`what`: metadata, config, stats or ready."""
        return self._send(f"/v2/models/{model}" + f"/versions/{version}" * bool(version) + f"/{what}" * (what != "metadata"))

    def index(self) -> list[dict[str, str]]:
        return list(self._send("/v2/repository/index", b"").document)

    def healthy(self) -> tuple[bool, bool]:
        """Whether the server is live, and ready."""
        return self._send("/v2/health/live").status == 200, self._send("/v2/health/ready").status == 200

    def change(self, action: str, model: str) -> Answer:
        """`action`: load or unload."""
        return self._send(f"/v2/repository/models/{model}/{action}", b"")

    def lacking(self) -> list[Answer]:
        """The refusals of extensions."""
        paths = ("trace/setting", "logging", "systemsharedmemory/status", "cudasharedmemory/region/a/unregister")
        return [self._send(f"/v2/{path}") for path in paths]

    def _send(self, path: str, body: bytes | None = None) -> Answer:
        status, _, content = self.fetch(path, body, {})
        document = json.loads(content or b"{}")
        return Answer(status=status, document=document) if status == 200 else Answer(status=status, error=document.get("error", ""))


class OverGrpc:
    """The same. `call(method, message)`: the answers' bytes. Raises `errors`, with code and details."""

    def __init__(self, call: Callable[[str, bytes], Sequence[bytes]], errors: type[Exception]) -> None:
        self.call, self.errors = call, errors

    def infer(
        self, model: str, inputs: Mapping[str, Array], outputs: Sequence[str] = (), *, classes: int = 0, version: str = "", **options: Any
    ) -> Answer:
        requested = [triton_grpc.InferRequestedOutput(name, class_count=classes) for name in outputs]
        defaults = {"request_id": "", "priority": 0, "timeout": None, "parameters": None, "sequence_id": 0}
        given = tensors(triton_grpc, inputs)
        request = _get_inference_request(
            model_name=model, inputs=given, model_version=version, outputs=requested, **SENT_IN_SEQUENCES, **(defaults | options)
        )
        answer = self._ask("ModelInfer", request)
        if answer.error:
            return answer
        message = answer.document
        arrays = outputs_of(triton_grpc.InferResult(message), [output.name for output in message.outputs])
        return Answer(status="OK", model=message.model_name, version=message.model_version, id=message.id, outputs=arrays)

    def describe(self, what: str, model: str, version: str = "") -> Answer:
        answer = self._ask(METHODS[what], name=model, version=version)
        if answer.error:
            return answer
        document = MessageToDict(answer.document, preserving_proto_field_name=True)
        if what == "ready" and not document:
            return Answer(status="NOT_FOUND")
        return Answer(status="OK", document=document.get("config", document))

    def index(self) -> list[dict[str, str]]:
        return [MessageToDict(entry) for entry in self._ask(METHODS["index"]).document.models]

    def healthy(self) -> tuple[bool, bool]:
        return self._ask(METHODS["live"]).document.live, self._ask(METHODS["server ready"]).document.ready

    def change(self, action: str, model: str) -> Answer:
        return self._ask(METHODS[action], model_name=model)

    def lacking(self) -> list[Answer]:
        return [self._ask(name) for name in ("TraceSetting", "LogSettings", "SystemSharedMemoryStatus", "CudaSharedMemoryUnregister")]

    def _ask(self, method: str, request: Any = None, **fields: Any) -> Answer:
        message = getattr(service_pb2, f"{method}Request")(**fields) if request is None else request
        try:
            (wire,) = self.call(method, message.SerializeToString())
        except self.errors as error:
            code, details = (getattr(error, part) for part in ("code", "details"))
            return Answer(status=(code() if callable(code) else code).name, error=details() if callable(details) else details)
        return Answer(status="OK", document=getattr(service_pb2, f"{method}Response").FromString(wire))
