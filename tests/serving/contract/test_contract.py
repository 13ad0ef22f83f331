"""The promises of every protocol, each written once: outputs, refusals, descriptions; and that a real Triton gives the same answers.

Triton's differences: an output without dimensions beside the batch has one of size 1, best classes have six digits, outputs come in the
model's order, and some statuses (`Case.triton`, `MALFORMED`); docs/serving/triton.md names them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pytest

from muntin.serving.inference.requests import CLASSES
from muntin.serving.protocol.messages import GRPC_CODES, InferOutput
from muntin.serving.protocol.selection import best_classes
from muntin.serving.triton.options import TritonOptions
from muntin.serving.triton.repository import write_repository
from tensor_models import Array, text_inputs

PROTOCOLS = ("JSON", "binary", "gRPC")
TEXT = text_inputs(2, 5)


def images(rows: int, height: int = 8, width: int = 8, channels: int = 3) -> dict[str, Array]:
    return {"images": np.random.default_rng(rows).integers(0, 256, (rows, height, width, channels)).astype(np.uint8)}


def of_every_type(count: int) -> dict[str, Array]:
    values = np.arange(count) % 100 + 1
    types = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)), "float16", "float32", "float64")
    return {name: values.astype(name) for name in types}


class Case(NamedTuple):
    """A request, and the status (of HTTP) and a part of the message of its refusal. `triton`: its status, where another."""

    model: str
    inputs: Mapping[str, Array]
    outputs: Sequence[str] = ()
    options: Mapping[str, Any] = {}
    status: int = 200
    says: str = ""
    triton: int | None = None


ONE = images(1)
EVERYTHING = {"request_id": "a7", "version": "1", "priority": 1, "timeout": 10_000_000, "parameters": {"colour": "red"}}
CASES = {
    "one row": Case("means", ONE),
    "four rows": Case("means", images(4)),
    "all options": Case("means", ONE, (), EVERYTHING),
    "labels": Case("pixels", images(2), ["labels"]),
    "scores": Case("pixels", images(2), ["scores"]),
    "outputs in another order": Case("pixels", images(2), ["scores", "labels"]),
    "one pixel": Case("pixels", images(2, 1, 1)),
    "a wide image": Case("pixels", images(1, 7, 300)),
    "one of some sizes": Case("sized", images(3, 12, 8)),
    "labels of 16 bits": Case("many", images(2)),
    "best classes": Case("means", images(2), ["scores"], {"classes": 2}),
    "as many best classes as there may be": Case("pixels", images(4, 80, 100), ["scores"], {"classes": CLASSES // 4}),
    "named": Case("named", TEXT),
    "named, of another size": Case("named", text_inputs(3, 7)),
    "named, in another order": Case("named", dict(reversed(TEXT.items())), ["label"], {"request_id": "b"}),
    "best classes of named tensors": Case("named", TEXT, ["embedding"], {"classes": 2}),
    "every type, and a size by values": Case("types", of_every_type(5)),
    "more than its sizes were reckoned with": Case("types", of_every_type(22_310)),
    "unknown version": Case("means", ONE, (), {"version": "7"}, 404, "no version '7': there is 1"),
    "no number of a version": Case("means", ONE, (), {"version": "x"}, 404, "no version"),
    "unknown model": Case("nothing", ONE, (), {}, 404, "'nothing': this server has means"),
    "unknown input": Case("means", {"pictures": ONE["images"]}, (), {}, 400, "inputs 'pictures': the model has one, 'images'"),
    "one input too many": Case("means", ONE | {"more": ONE["images"]}, (), {}, 400, "inputs 'images', 'more'"),
    "missing input": Case("named", {"ids": TEXT["ids"]}, (), {}, 400, "no input mask: give ids int64 (batch, tokens), mask bool"),
    "input that is none": Case("named", TEXT | {"more": np.zeros((2, 5), np.float32)}, (), {}, 400, "more, which is no input"),
    "unknown output": Case("means", ONE, ["depth"], {}, 400, "output 'depth': the model gives labels and scores"),
    "unknown named output": Case("named", TEXT, ["logits"], {}, 400, "output 'logits': the model gives embedding and label"),
    "wrong type": Case("means", {"images": ONE["images"].astype(np.float32)}, (), {}, 400, "is FP32: the model takes UINT8 (batch, height"),
    "wrong named type": Case("named", TEXT | {"ids": TEXT["ids"].astype(np.int32)}, (), {}, 400, '"ids" is INT32: the model takes INT64'),
    "wrong rank": Case("means", {"images": ONE["images"][0]}, (), {}, 400, "images of shape (8, 8, 3): give uint8 (B, H, W, 3)"),
    "wrong named rank": Case("named", TEXT | {"ids": TEXT["ids"][:, 0]}, (), {}, 400, "has the shape (2,)"),
    "wrong channels": Case("means", images(1, channels=4), (), {}, 400, "images of shape (1, 8, 8, 4): give uint8 (B, H, W, 3)"),
    "other number of rows": Case("named", TEXT | {"mask": TEXT["mask"][:1]}, (), {}, 400, "in another tensor of the call"),
    "other number of tokens": Case("named", TEXT | {"mask": TEXT["mask"][:, :4].copy()}, (), {}, 400, "tokens is "),
    "integers beyond 32 bits": Case("named", TEXT | {"ids": np.full((2, 5), 1 << 40)}, (), {}, 400, "in 32 bits", triton=500),
    "too many rows": Case("means", images(5), (), {}, 400, "5 rows: this server computes at most 4"),
    "too many named rows": Case("named", text_inputs(5, 4), (), {}, 400, "5 rows: this server computes at most 4"),
    "no height": Case("means", images(1, 0), (), {}, 400, "no side of 0"),
    "no rows": Case("means", {"images": ONE["images"][:0]}, (), {}, 400, "no side of 0"),
    "none of its sizes": Case(
        "sized", images(1, 7, 9), (), {}, 400,
        "images of 7 x 9 pixels: the model takes height multiples of 2 from 2 to 16 and width 8: resize or pad them to 8 x 8",
    ),
    "too many best classes": Case(
        "pixels", images(4, 80, 100), ["scores"], {"classes": CLASSES // 4 + 1}, 400,
        "4 rows asks for 65,540 classes: this server writes at most 65,536",
    ),
    "best classes of labels": Case("means", ONE, ["scores", "labels"], {"classes": 1}, 400, "ask it of scores"),
    "sequence": Case("means", ONE, (), {"sequence_id": 5}, 400, '"sequence_id"', triton=200),
    "timeout that passes": Case("means", ONE, (), {"timeout": 1}, 503, "", triton=200),
}  # fmt: skip
OTHERS = ("sized", "many", "types")
"""Models that Triton does not have."""
WITHOUT_TRITON = (
    "as many best classes as there may be",
    "too many best classes",
    "best classes of labels",
    "best classes of named tensors",
    "no number of a version",
)
"""Triton itself writes best classes, of any number and output, and reads versions."""


def due(server: Any, case: Case) -> dict[str, Array]:
    """The outputs of the session itself."""
    session = server.slot.current.session
    if "images" in case.inputs:
        scores = session(case.inputs["images"])
        outputs = {"labels": session.labels(case.inputs["images"]), "scores": scores}
        classes = tuple(entry.name for entry in session.signature.classes) if session.signature.task == "classify" else ()
    else:
        outputs, classes = session(case.inputs), ()
    outputs = {name: outputs[name] for name in case.outputs or outputs}
    if count := case.options.get("classes"):
        outputs = {name: best_classes(InferOutput(name=name, data=array, labels=classes), count) for name, array in outputs.items()}
        return {name: np.vectorize(bytes.decode, otypes=[object])(array) for name, array in outputs.items()}
    return outputs


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_answer(servers: Any, ours: Any, protocol: str, name: str) -> None:
    case = CASES[name]
    answer = ours(protocol, case.model).infer(case.model, case.inputs, case.outputs, **case.options)
    assert answer.status in (case.status, GRPC_CODES.get(case.status, "OK")), answer.error
    assert case.says in answer.error
    if case.status != 200:
        return
    assert (answer.model, answer.version, answer.id) == (case.model, "1", case.options.get("request_id", ""))
    expected = due(servers[case.model], case)
    assert list(answer.outputs) == list(expected)
    for output, array in expected.items():
        np.testing.assert_array_equal(answer.outputs[output], array, output)
        assert answer.outputs[output].dtype == array.dtype


def test_labels_of_pixels(ours: Any) -> None:
    """What the other tests compare with is the model's."""
    for protocol in PROTOCOLS:
        outputs = ours(protocol, "pixels").infer("pixels", images(3)).outputs
        np.testing.assert_array_equal(outputs["labels"], images(3)["images"].argmax(3))
        np.testing.assert_allclose(outputs["scores"], images(3)["images"].transpose(0, 3, 1, 2), rtol=0.01)
    assert (ours("binary", "many").infer("many", images(1)).outputs["labels"] == 299).all()


# ---- descriptions ----


def tensors(entries: Any) -> list[tuple[str, str, list[int]]]:
    """Name, type and shape, without the dimensions of 1 that Triton adds."""
    shapes = [[int(size) for size in entry.get("shape", entry.get("dims", ()))] for entry in entries]
    return [
        (entry["name"], entry.get("datatype", entry.get("data_type")), shape[:-1] if shape[-1:] == [1] else shape)
        for entry, shape in zip(entries, shapes, strict=True)
    ]


def described(client: Any, model: str) -> dict[str, Any]:
    metadata, config = (client.describe(what, model).document for what in ("metadata", "config"))
    return {
        "healthy": client.healthy(),
        "ready": client.describe("ready", model).status in (200, "OK"),
        "versions": metadata["versions"],
        "inputs": tensors(metadata["inputs"]),
        "outputs": tensors(metadata["outputs"]),
        "rows": config.get("max_batch_size", 0),
        "batches": "dynamic_batching" in config,
        "configured": tensors([*config["input"], *config["output"]]),
        "index": [(entry["version"], entry["state"]) for entry in client.index() if entry["name"] == model],
    }


IMAGE, CLASSES_OF = ("images", "UINT8", [-1, -1, -1, 3]), {"means": [[-1], [-1, 3]], "pixels": [[-1, -1, -1], [-1, 3, -1, -1]]}
SHAPES: dict[str, tuple[list[Any], list[Any]]] = {
    **{
        name: ([IMAGE], [("labels", "UINT8", labels), ("scores", "FP32", scores)])
        for name, (labels, scores) in CLASSES_OF.items()
    },
    "many": ([IMAGE], [("labels", "UINT16", [-1, -1, -1]), ("scores", "FP32", [-1, 300, -1, -1])]),
    "sized": ([("images", "UINT8", [-1, -1, 8, 3])], [("labels", "UINT8", [-1, -1, 8]), ("scores", "FP32", [-1, 3, -1, 8])]),
    "named": (
        [("ids", "INT64", [-1, -1]), ("mask", "BOOL", [-1, -1])], [("embedding", "FP32", [-1, 24]), ("label", "INT64", [-1])]
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", SHAPES)
@pytest.mark.parametrize("protocol", ["JSON", "gRPC"])
def test_descriptions(ours: Any, protocol: str, model: str) -> None:
    document = described(ours(protocol, model), model)
    assert ours(protocol, model).describe("metadata", model).document["platform"] == "muntin"
    inputs, outputs = SHAPES[model]
    assert document == {
        "healthy": (True, True), "ready": True, "versions": ["1"], "inputs": inputs, "outputs": outputs, "rows": 4, "batches": True,
        "configured": [(name, f"TYPE_{kind}", shape[1:]) for name, kind, shape in (*inputs, *outputs)], "index": [("1", "READY")],
    }  # fmt: skip


@pytest.mark.parametrize("protocol", ["JSON", "gRPC"])
def test_descriptions_of_others(ours: Any, protocol: str) -> None:
    client = ours(protocol, "pixels")
    for what in ("metadata", "config", "stats", "ready"):
        for names in (("nothing",), ("pixels", "9")):
            assert client.describe(what, *names).status in (404, "NOT_FOUND"), what
        assert client.describe(what, "pixels", "1").status in (200, "OK")


@pytest.mark.parametrize("protocol", ["JSON", "gRPC"])
def test_statistics(ours: Any, protocol: str) -> None:
    client = ours(protocol, "pixels")

    def rows() -> int:
        (entry,) = client.describe("stats", "pixels").document["model_stats"]
        assert (entry["name"], entry["version"]) == ("pixels", "1")
        return int(entry["inference_count"])

    client.infer("pixels", images(1))
    before = rows()
    client.infer("pixels", images(2))
    assert rows() == before + 2


@pytest.mark.parametrize("protocol", ["JSON", "gRPC"])
def test_unready_service(servers: Any, ours: Any, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.serving.inference.service.Service.ready", False)
    client = ours(protocol, "pixels")
    assert client.healthy() == (True, False)
    assert client.describe("ready", "pixels").status in (503, "NOT_FOUND")


@pytest.mark.parametrize("protocol", ["JSON", "gRPC"])
def test_unload_and_load(ours: Any, protocol: str) -> None:
    client = ours(protocol, "sized")
    assert client.change("unload", "sized").status in (200, "OK")
    assert client.infer("sized", images(1)).status in (503, "UNAVAILABLE")
    assert client.describe("metadata", "sized").status in (503, "UNAVAILABLE")
    assert [entry["state"] for entry in client.index()] == ["UNAVAILABLE"]
    assert client.change("load", "sized").status in (200, "OK")
    assert client.infer("sized", images(1)).status in (200, "OK")
    for action in ("load", "unload"):
        assert client.change(action, "nothing").status in (404, "NOT_FOUND")


@pytest.mark.parametrize("protocol", ["JSON", "gRPC"])
def test_unsupported_extensions(ours: Any, protocol: str) -> None:
    answers = ours(protocol, "pixels").lacking()
    for answer, name in zip(answers, ("trace settings", "log settings", "shared memory", "shared memory"), strict=True):
        assert answer.status in (501, "UNIMPLEMENTED") and f"{name}: this server" in answer.error


# ---- Triton ----


def plain(answer: Any) -> dict[str, Any]:
    """The parts of an answer that both servers have to give; best classes with the digits that both have."""
    outputs = {}
    for name, array in answer.outputs.items():
        shape = array.shape[:1] if array.shape[1:] == (1,) else array.shape
        data = (
            [f"{float(text.partition(':')[0]):.4f}{text.partition(':')[2]}" for text in array.ravel()]
            if array.dtype == object
            else array.tobytes()
        )
        outputs[name] = (array.dtype, shape, data)
    return {"model": answer.model, "version": answer.version, "id": answer.id, "outputs": outputs}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.model not in OTHERS and name not in WITHOUT_TRITON])
def test_answer_of_triton(ours: Any, triton: Any, name: str) -> None:
    case = CASES[name]
    for protocol in PROTOCOLS:
        theirs = triton(protocol).infer(case.model, case.inputs, case.outputs, **case.options)
        status = case.triton or case.status
        assert theirs.status in (status, GRPC_CODES.get(status, "OK")), (protocol, theirs.error)
        if case.status == 200:
            assert plain(theirs) == plain(ours(protocol, case.model).infer(case.model, case.inputs, case.outputs, **case.options))


@pytest.mark.parametrize("model", ["means", "pixels", "named"])
def test_descriptions_of_triton(ours: Any, triton: Any, model: str) -> None:
    for protocol in ("JSON", "gRPC"):
        assert described(triton(protocol), model) == described(ours(protocol, model), model)
    own, theirs = (client.describe("stats", model).document["model_stats"][0] for client in (ours("JSON", model), triton("JSON")))
    assert set(own) <= set(theirs)


LIST = {"name": "images", "shape": [1, 2, 2, 3], "datatype": "UINT8", "data": list(range(12))}


def body(**changes: Any) -> bytes:
    return json.dumps({"inputs": [LIST | changes]}).encode()


BYTES = json.dumps({"inputs": [{**LIST, "data": None, "parameters": {"binary_data_size": 12}}]}).replace('"data": null, ', "").encode()
MALFORMED: dict[str, tuple[bytes | None, str | None, int, int]] = {
    "empty body": (b"", None, 400, 400),
    "cut JSON": (b'{"inputs": [', None, 400, 500),  # Triton counts JSON that it cannot read as its own error
    "JSON array": (b"[]", None, 400, 500),
    "no inputs": (b'{"inputs": []}', None, 400, 400),
    "input given twice": (json.dumps({"inputs": [LIST, LIST]}).encode(), None, 400, 400),
    "input without a name": (body().replace(b'"name"', b'"title"'), None, 400, 500),
    "unknown type": (body(datatype="FOO"), None, 400, 400),
    "fewer values than the shape": (body(data=[1, 2]), None, 400, 500),
    "values of another type": (body(data=["a"] * 12), None, 400, 500),
    "negative size": (body(shape=[-1, 2, 2, 3]), None, 400, 500),
    "value out of range": (body(data=[300] * 12), None, 400, 200),  # Triton wraps it around: 300 is 44
    "fewer bytes than the shape": (BYTES + bytes(11), str(len(BYTES)), 400, 400),
    "header longer than the body": (BYTES + bytes(12), "99999", 400, 400),
    "header length no number": (BYTES + bytes(12), "x", 400, 400),
    "binary": (BYTES + bytes(12), str(len(BYTES)), 200, 200),
    "wrong method": (None, None, 405, 405),
}
"""Body, length of its JSON, muntin's status and Triton's."""


def test_malformed_requests(ours: Any) -> None:
    client = ours("binary", "means")
    for name, (content, length, status, _) in MALFORMED.items():
        headers = {} if length is None else {"Inference-Header-Content-Length": length}
        assert client.fetch("/v2/models/means/infer", content, headers)[0] == status, name


def test_malformed_requests_to_triton(triton: Any) -> None:
    client = triton("binary")
    for name, (content, length, _, status) in MALFORMED.items():
        headers = {} if length is None else {"Inference-Header-Content-Length": length}
        assert client.fetch("/v2/models/means/infer", content, headers)[0] == status, name
    assert client.fetch("/v2/nothing", None, {})[0] == 404
    for protocol in ("JSON", "gRPC"):
        assert triton(protocol).infer("pixels", images(1)).status in (200, "OK")


def test_many_clients_and_sizes(triton: Any) -> None:
    """Triton joins requests of one size; each gets its own answer, and a wrong one among them changes no other."""
    requests = [images(1 + number % 3, 6 + 2 * (number % 2))["images"] + np.uint8(number) for number in range(30)]

    def answer(number: int) -> Any:
        batch = requests[number][:, :0] if number % 10 == 9 else requests[number]
        return triton("gRPC").infer("pixels", {"images": batch}, ["scores"])

    def joined() -> bool:
        (statistics,) = triton("JSON").describe("stats", "pixels").document["model_stats"]
        return bool(statistics["execution_count"] < statistics["inference_stats"]["success"]["count"])

    for _ in range(50):  # on a busy machine the requests of a round may each come alone
        with ThreadPoolExecutor(12) as threads:
            answers = list(threads.map(answer, range(len(requests))))
        for number, (batch, given) in enumerate(zip(requests, answers, strict=True)):
            if number % 10 == 9:
                assert given.status == "INVALID_ARGUMENT"
            else:
                np.testing.assert_array_equal(given.outputs["scores"], batch.transpose(0, 3, 1, 2))
        if joined():
            return
    pytest.fail("Triton joined no requests")


@pytest.mark.slow
def test_new_version_in_triton(triton: Any, triton_server: Any, artifacts: Any) -> None:
    """Runs last, and looks into the log: neither the back end nor numpy reported an error for an answer that was given."""
    client = triton("JSON")
    assert client.change("unload", "pixels").status == 200
    while any(entry.get("state") == "READY" for entry in client.index() if entry["name"] == "pixels"):
        time.sleep(0.01)
    assert client.infer("pixels", images(1)).status == 404
    write_repository(artifacts["pixels"], triton_server["repository"], TritonOptions(name="pixels", version=2, max_batch=4, threads=1))
    assert client.change("load", "pixels").status == 200
    assert client.infer("pixels", images(1)).version == "2"
    for action, status in (("load", 500), ("unload", 200)):
        assert client.change(action, "nothing").status == status
    assert "Traceback" not in triton_server["log"].read_text(encoding="utf-8", errors="replace")
