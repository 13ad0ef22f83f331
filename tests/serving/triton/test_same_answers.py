"""The same requests to muntin's own server and to a real Triton that serves the exported repository: same bytes, same status codes.

`DIFFERENT` has every difference in a status; docs/serving/triton.md names them. The contents that differ: Triton gives an output without
dimensions beside the batch one of size 1, writes best classes with six digits, and lists outputs in the model's order.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from muntin.serving.triton.options import TritonOptions
from muntin.serving.triton.repository import write_repository
from tensor_models import Array, text_inputs

# geventhttpclient, which tritonclient's HTTP client is built on, warns of its own imports and leaves sockets to the collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
HEADER_LENGTH = "Inference-Header-Content-Length"
TEXT = text_inputs(2, 5)
LIST = {"name": "images", "shape": [1, 2, 2, 3], "datatype": "UINT8", "data": list(range(12))}


class Call(NamedTuple):
    """A POST or, without a body, a GET of a path below /v2/."""

    path: str
    body: bytes | None = None
    headers: Mapping[str, str] = {}


def images(rows: int, height: int = 8, channels: int = 3) -> Array:
    return np.random.default_rng(rows).integers(0, 256, (rows, height, 8, channels)).astype(np.uint8)


def inputs(library: Any, arrays: Mapping[str, Array]) -> list[Any]:
    tensors = []
    for name, array in arrays.items():
        tensor = library.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    return tensors


def binary(path: str, arrays: Mapping[str, Array], outputs: Sequence[str] = (), **options: Any) -> Call:
    """A request with binary tensors, as tritonclient writes it."""
    requested = [triton_http.InferRequestedOutput(name) for name in outputs] or None
    body, length = triton_http.InferenceServerClient.generate_request_body(inputs(triton_http, arrays), outputs=requested, **options)
    return Call(f"models/{path}", body, {HEADER_LENGTH: str(length)})


def text(path: str, document: Any) -> Call:
    return Call(f"models/{path}", document if isinstance(document, bytes) else json.dumps(document).encode())


ONE = images(1)
WHOLE = binary("means/infer", {"images": ONE})
HTTP = {
    "one row": WHOLE,
    "two rows": binary("means/infer", {"images": images(2)}),
    "four rows": binary("means/infer", {"images": images(4)}),
    "labels": binary("pixels/infer", {"images": images(2)}, ["labels"]),
    "scores": binary("pixels/infer", {"images": images(2)}, ["scores"]),
    "outputs in another order": binary("pixels/infer", {"images": images(2)}, ["scores", "labels"]),
    "another size": binary("pixels/infer", {"images": images(1, 5)}),
    "numbers as text": text("pixels/infer", {"inputs": [LIST]}),
    "id": binary("means/infer", {"images": ONE}, request_id="a7"),
    "parameter": binary("means/infer", {"images": ONE}, parameters={"colour": "red"}),
    "priority": binary("means/infer", {"images": ONE}, priority=1),
    "timeout": binary("means/infer", {"images": ONE}, timeout=10_000_000),
    "timeout that passes": binary("means/infer", {"images": ONE}, timeout=1),
    "version": binary("means/versions/1/infer", {"images": ONE}),
    "best classes": text("means/infer", {"inputs": [LIST], "outputs": [{"name": "scores", "parameters": {"classification": 2}}]}),
    "named": binary("named/infer", TEXT),
    "named, in another order": binary("named/infer", dict(reversed(TEXT.items())), ["label"]),
    "unknown version": binary("means/versions/7/infer", {"images": ONE}),
    "no number of a version": binary("means/versions/x/infer", {"images": ONE}),
    "unknown model": binary("nothing/infer", {"images": ONE}),
    "unknown input": binary("means/infer", {"pictures": ONE}),
    "one input too many": binary("means/infer", {"images": ONE, "more": ONE}),
    "missing input": binary("named/infer", {"ids": TEXT["ids"]}),
    "no inputs": text("means/infer", {"inputs": []}),
    "input given twice": text("means/infer", {"inputs": [LIST, LIST]}),
    "unknown output": binary("means/infer", {"images": ONE}, ["depth"]),
    "wrong type": binary("means/infer", {"images": ONE.astype(np.float32)}),
    "unknown type": text("means/infer", {"inputs": [LIST | {"datatype": "FOO"}]}),
    "wrong rank": binary("means/infer", {"images": ONE[0]}),
    "wrong channels": binary("means/infer", {"images": images(1, channels=4)}),
    "other number of rows": binary("named/infer", {"ids": TEXT["ids"], "mask": TEXT["mask"][:1]}),
    "other number of tokens": binary("named/infer", {"ids": TEXT["ids"], "mask": np.ascontiguousarray(TEXT["mask"][:, :4])}),
    "too many rows": binary("means/infer", {"images": images(5)}),
    "no height": binary("means/infer", {"images": images(1, 0)}),
    "no rows": binary("means/infer", {"images": images(1)[:0]}),
    "empty body": text("means/infer", b""),
    "fewer bytes than the shape": Call("models/means/infer", (WHOLE.body or b"")[:-1], WHOLE.headers),
    "header longer than the body": Call("models/means/infer", WHOLE.body, {HEADER_LENGTH: "99999"}),
    "header length no number": Call("models/means/infer", WHOLE.body, {HEADER_LENGTH: "x"}),
    "cut JSON": text("means/infer", b'{"inputs": ['),
    "no JSON": text("means/infer", b"hello"),
    "JSON array": text("means/infer", []),
    "fewer values than the shape": text("means/infer", {"inputs": [LIST | {"data": [1, 2]}]}),
    "values of another type": text("means/infer", {"inputs": [LIST | {"data": ["a"] * 12}]}),
    "negative size": text("means/infer", {"inputs": [LIST | {"shape": [-1, 2, 2, 3]}]}),
    "input without a name": text("means/infer", {"inputs": [{key: LIST[key] for key in ("shape", "datatype", "data")}]}),
    "value out of range": text("means/infer", {"inputs": [LIST | {"data": [300] * 12}]}),
    "sequence": binary("means/infer", {"images": ONE}, sequence_id=5),
    "metadata": Call("models/means"),
    "metadata of named tensors": Call("models/named"),
    "metadata of a version": Call("models/pixels/versions/1"),
    "metadata of an unknown version": Call("models/means/versions/9"),
    "metadata of an unknown model": Call("models/nothing"),
    "ready": Call("models/means/ready"),
    "ready, unknown model": Call("models/nothing/ready"),
    "ready, unknown version": Call("models/means/versions/9/ready"),
    "configuration": Call("models/pixels/config"),
    "configuration of an unknown model": Call("models/nothing/config"),
    "statistics": Call("models/means/stats"),
    "wrong method": Call("models/means/infer"),
    "unknown path": Call("nothing"),
    "load of an unknown model": Call("repository/models/nothing/load", b""),
    "unload of an unknown model": Call("repository/models/nothing/unload", b""),
}  # fmt: skip
DIFFERENT = {
    **dict.fromkeys(
        (
            "cut JSON",
            "no JSON",
            "JSON array",
            "fewer values than the shape",
            "values of another type",
            "negative size",
            "input without a name",
        ),
        (400, 500),  # Triton counts JSON that it cannot read as its own error
    ),
    "value out of range": (400, 200),  # Triton wraps it around: 300 is 44
    "sequence": (400, 200),  # Triton ignores it
    "timeout that passes": (503, 200),
    "load of an unknown model": (404, 500),
    "unload of an unknown model": (404, 200),
    "ready, unknown model": (404, 400),
    "ready, unknown version": (404, 400),
}
"""Status of muntin's server and of Triton where they differ."""


def asked(port: int, call: Call) -> tuple[int, Any, bytes]:
    """Return status, JSON and binary part of the answer. A refusal's text is each server's own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("GET" if call.body is None else "POST", f"/v2/{call.path}", call.body, dict(call.headers))
        response = connection.getresponse()
        content = response.read()
    finally:
        connection.close()
    if response.status != 200:
        assert set(json.loads(content)) == {"error"}
        return response.status, None, b""
    length = int(response.headers.get(HEADER_LENGTH, len(content)))
    return response.status, json.loads(content[:length] or "{}"), content[length:]


def answer_of(document: Any, content: bytes) -> dict[str, Any]:
    """Return the parts of an inference's answer that both servers have to give, outputs by name."""
    outputs, start = {}, 0
    for output in document.pop("outputs"):
        shape = output["shape"][:1] if output["shape"][1:] == [1] else output["shape"]
        size = output.get("parameters", {}).get("binary_data_size", 0)
        data = (
            [f"{float(item.partition(':')[0])}:{item.partition(':')[2]}" for item in output["data"]]
            if output["datatype"] == "BYTES"
            else output.get("data")
        )
        outputs[output["name"]] = (output["datatype"], shape, data, content[start : start + size])
        start += size
    assert start == len(content)
    return {**document, "outputs": outputs}


def described(document: Any) -> Any:
    """Return the parts of metadata and a configuration that both servers have to give."""
    document = {
        key: document[key] for key in ("name", "versions", "inputs", "outputs", "max_batch_size", "input", "output") if key in document
    }
    for key in ("inputs", "outputs", "input", "output"):
        for tensor in document.get(key, ()):
            shape = [int(size) for size in tensor.get("shape", tensor.get("dims", ()))]
            named = {part: tensor[part] for part in ("name", "datatype", "data_type") if part in tensor}
            tensor.clear()
            tensor.update(named, shape=shape[:-1] if shape[-1:] == [1] else shape)
    return document


@pytest.mark.parametrize("name", HTTP)
def test_http(servers: Any, name: str) -> None:
    call = HTTP[name]
    model = next((model for model in servers.ours.http if f"models/{model}/" in f"{call.path}/"), "means")
    ours, theirs = (asked(ports.http[model], call) for ports in (servers.ours, servers.triton))
    assert (ours[0], theirs[0]) == DIFFERENT.get(name, (ours[0], ours[0]))
    if ours[0] == theirs[0] == 200:
        if call.body is not None:
            assert answer_of(*ours[1:]) == answer_of(*theirs[1:])
        elif name == "statistics":
            assert set(ours[1]["model_stats"][0]) <= set(theirs[1]["model_stats"][0])
        elif not call.path.endswith("/ready"):
            assert described(ours[1]) == described(theirs[1])


GRPC = {
    "images": ("means", {"images": images(3)}, {}),
    "labels": ("pixels", {"images": images(2)}, {"outputs": ["labels"]}),
    "outputs in another order": ("pixels", {"images": images(1)}, {"outputs": ["scores", "labels"]}),
    "named": ("named", TEXT, {"request_id": "a7", "model_version": "1", "parameters": {"colour": "red"}}),
    "unknown version": ("means", {"images": ONE}, {"model_version": "7"}),
    "unknown model": ("nothing", {"images": ONE}, {}),
    "unknown input": ("means", {"pictures": ONE}, {}),
    "missing input": ("named", {"mask": TEXT["mask"]}, {}),
    "unknown output": ("means", {"images": ONE}, {"outputs": ["depth"]}),
    "wrong type": ("means", {"images": ONE.astype(np.float32)}, {}),
    "wrong channels": ("means", {"images": images(1, channels=4)}, {}),
    "too many rows": ("means", {"images": images(5)}, {}),
}


def inferred(port: int, model: str, arrays: dict[str, Array], outputs: Sequence[str] = (), **options: Any) -> Any:
    """Return the outputs and the id of an answer over gRPC, or the code of its error."""
    requested = [triton_grpc.InferRequestedOutput(name) for name in outputs] or None
    with triton_grpc.InferenceServerClient(f"127.0.0.1:{port}") as client:
        try:
            result = client.infer(model, inputs(triton_grpc, arrays), outputs=requested, client_timeout=60, **options)
        except InferenceServerException as error:
            return error.status()
    message = result.get_response()
    arrays = {output.name: result.as_numpy(output.name) for output in message.outputs}
    return message.id, {name: (array.dtype, array.tobytes()) for name, array in arrays.items()}


@pytest.mark.parametrize("name", GRPC)
def test_grpc(servers: Any, name: str) -> None:
    model, arrays, options = GRPC[name]
    ours, theirs = (
        inferred(ports.grpc.get(model, ports.grpc["means"]), model, arrays, **options) for ports in (servers.ours, servers.triton)
    )
    assert ours == theirs


@pytest.mark.parametrize("model", ["means", "pixels", "named"])
def test_grpc_descriptions(servers: Any, model: str) -> None:
    answers = []
    for ports in (servers.ours, servers.triton):
        with triton_grpc.InferenceServerClient(f"127.0.0.1:{ports.grpc[model]}") as client:
            config = client.get_model_config(model, as_json=True)["config"]
            index = client.get_model_repository_index(as_json=True)["models"]
            answers.append(
                {
                    "live, ready": (client.is_server_live(), client.is_server_ready(), client.is_model_ready(model)),
                    "metadata": described(client.get_model_metadata(model, as_json=True)),
                    "configuration": described(config),
                    "index": [(entry["version"], entry["state"]) for entry in index if entry["name"] == model],
                }
            )
    assert answers[0] == answers[1]


def test_many_clients_and_sizes(servers: Any) -> None:
    """Triton joins requests of one size; each gets its own answer, and a wrong one among them changes no other."""
    requests = [(images(1 + number % 3, 6 + 2 * (number % 2)) + np.uint8(number)) for number in range(60)]

    def answer(number: int) -> Any:
        if number % 10 == 9:
            return inferred(servers.triton.grpc["pixels"], "pixels", {"images": requests[number][:, :0]})
        return inferred(servers.triton.grpc["pixels"], "pixels", {"images": requests[number]}, ["scores"])

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(answer, range(60)))
    for number, (batch, given) in enumerate(zip(requests, answers, strict=True)):
        if number % 10 == 9:
            assert given == "StatusCode.INVALID_ARGUMENT"
        else:
            assert given[1]["scores"][1] == batch.transpose(0, 3, 1, 2).astype(np.float32).tobytes()
    with triton_http.InferenceServerClient(f"127.0.0.1:{servers.triton.http['pixels']}") as client:
        (statistics,) = client.get_inference_statistics("pixels")["model_stats"]
    assert statistics["execution_count"] < statistics["inference_stats"]["success"]["count"]


def test_unload_load_and_a_new_version(servers: Any, artifacts: Any) -> None:
    path = text("pixels/infer", {"inputs": [LIST]})
    for ports, refused in ((servers.ours, 503), (servers.triton, 404)):
        port = ports.http["pixels"]
        with triton_http.InferenceServerClient(f"127.0.0.1:{port}", network_timeout=120) as client:
            client.unload_model("pixels")
            while any(entry.get("state") == "READY" for entry in client.get_model_repository_index() if entry["name"] == "pixels"):
                time.sleep(0.01)
            assert asked(port, path)[0] == refused
            client.load_model("pixels")
            assert asked(port, path)[0] == 200
    write_repository(artifacts["pixels"], servers.repository, TritonOptions(name="pixels", version=2, max_batch=4, threads=1))
    with triton_http.InferenceServerClient(f"127.0.0.1:{servers.triton.http['pixels']}", network_timeout=120) as client:
        client.load_model("pixels")
    assert asked(servers.triton.http["pixels"], path)[1]["model_version"] == "2"


def test_log_without_errors(servers: Any) -> None:
    """Neither the back end nor numpy reports an error for an answer that was given. Runs last."""
    assert "Traceback" not in servers.log.read_text(encoding="utf-8", errors="replace")
