"""gRPC's calls without a socket: tokens, limits, streams, the access log, deadlines, errors. Answers are tested in `contract`."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from muntin.artifact import ClassInfo, Signature
from muntin.serving.batching.workers import Runner
from muntin.serving.config import Bounds
from muntin.serving.grpc import servicer as grpc_servicer
from muntin.serving.inference.executor import Executor
from muntin.serving.inference.requests import Requests
from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.grpc_codec import decode_infer, encode_infer
from muntin.serving.protocol.messages import InferOutput, InferResponse, Limits, ProtocolError
from muntin.serving.versions.version import Version
from serving_protocols import label_request, labels_of

Code = grpc.StatusCode
SECRET = (("authorization", "Bearer secret"),)


@pytest.fixture(scope="module")
def path(write_pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixels(tmp_path_factory.mktemp("calls") / "pixels")


@pytest.fixture(scope="module")
def server(socketless: Any, path: Path) -> Iterator[Any]:
    with socketless(path, max_batch=8) as server:
        yield server


@pytest.fixture
def code(call_error: Any) -> Callable[..., tuple[Any, str]]:
    """`code(server, name, *requests, ...)`: status and text of a call that fails."""

    def of(server: Any, name: str, *requests: Any, **options: Any) -> tuple[Any, str]:
        with pytest.raises(call_error) as caught:
            server.call(name, *(request.SerializeToString() for request in requests), **options)
        return caught.value.code, caught.value.details

    return of


def answer_to(server: Any, request: Any, **options: Any) -> bytes:
    """Return the labels of an answer."""
    (wire,) = server.call("ModelInfer", request.SerializeToString(), **options)
    return messages.ModelInferResponse.FromString(wire).raw_output_contents[0]


def streamed(server: Any, *requests: Any, **options: Any) -> list[Any]:
    wires = server.call("ModelStreamInfer", *(request.SerializeToString() for request in requests), **options)
    return [messages.ModelStreamInferResponse.FromString(wire) for wire in wires]


def outcomes(server: Any) -> Counter[str]:
    """Number of requests by outcome, from the metrics."""
    return Counter({outcome: count for (face, outcome), count in server.parts.service.metrics.requests.items() if face == "grpc"})


class Gate:
    """Holds every batch until `open`. `rows`: of the batches that were begun."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.rows, self.open, compute = list[int](), threading.Event(), Executor.__call__

        def held(executor: Executor, batch: Any) -> Any:
            self.rows.append(sum(job.rows for job in batch.jobs))
            assert self.open.wait(60)
            return compute(executor, batch)

        patch.setattr(Executor, "__call__", held)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def apart(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Make a call on a thread; the list gets its result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    return thread, results


def test_token_is_checked_before_the_message(socketless: Any, path: Path, code: Any) -> None:
    with socketless(path, tokens=("secret",)) as server:
        for name in ("ModelInfer", "ModelStreamInfer", "RepositoryIndex"):
            for metadata in ((), (("authorization", "Bearer other"),)):
                status, details = code(server, name, stalls=True, metadata=metadata)
                assert (status, "TOKEN" in details) == (Code.UNAUTHENTICATED, True), name
        assert messages.ServerLiveResponse.FromString(server.call("ServerLive")[0]).live
        assert messages.ServerReadyResponse.FromString(server.call("ServerReady")[0]).ready
        assert code(server, "ModelReady", messages.ModelReadyRequest(name="pixels"))[0] is Code.UNAUTHENTICATED
        assert answer_to(server, label_request(), metadata=SECRET) == labels_of(1)


def test_held_bytes_are_bounded(socketless: Any, path: Path, code: Any, gate: Gate, wait_until: Any) -> None:
    with socketless(path, bounds=Bounds(held_bytes=50_000, body_bytes=100_000)) as server:
        first, _ = apart(lambda: answer_to(server, label_request(side=100)))
        wait_until(lambda: gate.rows)
        assert code(server, "ModelInfer", label_request(side=100))[0] is Code.UNAVAILABLE
        second, results = apart(lambda: streamed(server, label_request(side=100, identity="a"), label_request(2)))
        wait_until(lambda: server.parts.service.runner.snapshot().admitted == 2)
        gate.open.set()
        for thread in (first, second):
            thread.join(60)
        ((refused, answered),) = results
        assert "fill what this server holds" in refused.error_message
        assert answered.infer_response.raw_output_contents[0] == labels_of(2)
        assert answer_to(server, label_request(side=100)) == labels_of(1, 100)


def test_refusal_has_retry_after(socketless: Any, path: Path, call_error: Any) -> None:
    with socketless(path, bounds=Bounds(held_bytes=50_000)) as server, pytest.raises(call_error) as caught:
        answer_to(server, label_request(side=150))
    assert caught.value.code is Code.UNAVAILABLE
    assert {("retry-after", "1"), ("grpc-retry-pushback-ms", "1000")} <= set(caught.value.trailing)


def test_stream_is_batched_and_answered_in_order(server: Any, gate: Gate, wait_until: Any) -> None:
    before = outcomes(server)
    sent = [label_request(n, identity=str(n), model="other" if n == 5 else "pixels") for n in range(40)]
    thread, results = apart(lambda: streamed(server, *sent))
    wait_until(lambda: gate.rows)
    gate.open.set()
    thread.join(60)
    (answers,) = results
    assert max(gate.rows) > 1
    assert [answer.infer_response.id for answer in answers] == [str(n) for n in range(40)]
    for number, answer in enumerate(answers):
        if number != 5:
            assert (answer.error_message, answer.infer_response.raw_output_contents[0]) == ("", labels_of(number))
    assert "this server has pixels" in answers[5].error_message
    assert answers[5].infer_response.model_name == "other"
    assert all(answer.infer_response.parameters["triton_final_response"].bool_param for answer in answers)
    assert outcomes(server) - before == {"answered": 39, "wrong": 1}


def test_cancelled_stream_takes_requests_back(server: Any, gate: Gate, wait_until: Any) -> None:
    before, admitted = outcomes(server), server.parts.service.runner.snapshot().admitted

    async def cancelled() -> None:
        call = asyncio.create_task(server.called("ModelStreamInfer", [label_request(n).SerializeToString() for n in range(100)]))
        while server.parts.service.runner.snapshot().admitted < admitted + 32:  # of a stream so many are taken at once
            await asyncio.sleep(0.001)
        call.cancel()
        await asyncio.wait([call])

    server.run(cancelled())
    assert outcomes(server) - before == {"cancelled": 32}
    gate.open.set()
    wait_until(lambda: server.parts.service.runner.snapshot().running_batches == 0)
    assert len(gate.rows) <= 1  # what waited was taken back; the first may be computed already


@pytest.mark.parametrize(("side", "classes", "apart"), [(512, None, False), (20, 1000, True), (1100, None, True)])
def test_large_answers_are_encoded_on_a_thread(
    server: Any, monkeypatch: pytest.MonkeyPatch, side: int, classes: int | None, apart: bool
) -> None:
    threads: list[str] = []

    def watched(*given: Any, **named: Any) -> Any:
        threads.append(threading.current_thread().name)
        return encode_infer(*given, **named)

    monkeypatch.setattr("muntin.serving.grpc.servicer.encode_infer", watched)
    request = label_request(3, side=side)
    if classes is not None:
        request.outputs[0].name = "scores"
        request.outputs[0].parameters["classification"].int64_param = classes
    assert answer_to(server, request) == labels_of(3, side) or classes is not None
    assert [name.startswith("muntin-encode") for name in threads] == [apart]


def test_access_log(socketless: Any, path: Path, code: Any, call_error: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It has every call, and messages that cannot be read."""
    bounds = Bounds(held_bytes=20_000, json_bytes=2000)
    with socketless(path, access_log=True, tokens=("secret",), bounds=bounds) as server:
        code(server, "ModelInfer", label_request())
        code(server, "ModelInfer", label_request(side=100), metadata=SECRET)
        answer_to(server, label_request(identity="x"), metadata=SECRET)
        server.call("ServerReady")
        server.call("ModelMetadata", messages.ModelMetadataRequest(name="pixels").SerializeToString(), metadata=SECRET)
        code(server, "RepositoryModelLoad", messages.RepositoryModelLoadRequest(model_name="other"), metadata=SECRET)
        assert streamed(server, label_request(side=100), metadata=SECRET)[0].error_message
        assert outcomes(server) == {"answered": 1}  # what is refused unread is counted as such
        for message in (b"\xff", b"\x0a\xff\x7f" + b"x" * 0x3FFF):
            with pytest.raises(call_error) as caught:
                server.call("ModelInfer", message, metadata=SECRET)
            (wire,) = server.call("ModelStreamInfer", message, metadata=SECRET)
            assert messages.ModelStreamInferResponse.FromString(wire).error_message == caught.value.details
        assert outcomes(server) == {"answered": 1, "wrong": 4}
        assert server.fetch("/v2/health/live")[0] == 200
        assert server.fetch("/v2", None)[0] == 401
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["method"], line["path"], line["status"], line.get("code")) for line in lines] == [
        ("ModelInfer", "", 401, "UNAUTHENTICATED"),
        ("ModelInfer", "", 503, "UNAVAILABLE"),
        ("ModelInfer", "pixels", 200, "OK"),
        ("ServerReady", "", 200, "OK"),
        ("ModelMetadata", "pixels", 200, "OK"),
        ("RepositoryModelLoad", "other", 404, "NOT_FOUND"),
        ("ModelInfer", "", 503, "UNAVAILABLE"),
        *[("ModelInfer", "", 400, "INVALID_ARGUMENT")] * 2,
        *[("ModelInfer", "", 413, "RESOURCE_EXHAUSTED")] * 2,
        ("GET", "/v2/health/live", 200, None),
        ("GET", "/v2", 401, None),
    ]
    assert all(line["client"] for line in lines)
    assert [line.get("id") for line in lines if line["status"] == 200 and line["face"] == "grpc"] == ["x", None, None]


def test_unforeseen_error(server: Any, code: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(*_: Any) -> None:
        raise LookupError("secret")

    before, said = outcomes(server), "the server failed (LookupError)"
    monkeypatch.setattr("muntin.serving.grpc.servicer.encode_infer", fail)
    assert code(server, "ModelInfer", label_request()) == (Code.INTERNAL, said)
    (answer,) = streamed(server, label_request(identity="x"))
    assert (answer.error_message, answer.infer_response.id) == (said, "x")
    assert outcomes(server) - before == {"failed": 2}
    monkeypatch.setattr("muntin.serving.grpc.servicer.index_document", fail)
    assert code(server, "RepositoryIndex", messages.RepositoryIndexRequest()) == (Code.INTERNAL, said)
    assert [record.message for record in caplog.records if record.name == "asyncio"] == ["a call failed"] * 3


@pytest.mark.parametrize(
    ("call_s", "request_s", "least", "most"),
    [(20.0, 60, 5.0, 21.0), (60.0, 20, 19.9, 20.1), (None, None, math.inf, math.inf)],
)
def test_earlier_of_two_deadlines_counts(
    server: Any, monkeypatch: pytest.MonkeyPatch, call_s: float | None, request_s: int | None, least: float, most: float
) -> None:
    given: list[float] = []
    submit = Runner.submit

    def watched(self: Runner, job: Any, done: Any) -> None:
        given.append(math.inf if job.deadline is None else job.deadline - job.arrived)
        submit(self, job, done)

    monkeypatch.setattr(Runner, "submit", watched)
    request = label_request()
    if request_s is not None:
        request.parameters["timeout"].int64_param = request_s * 1_000_000
    answer_to(server, request, seconds=call_s)
    assert least <= given[0] <= most


def test_request_without_model_name(server: Any, code: Any) -> None:
    for name, request in (
        ("ModelMetadata", messages.ModelMetadataRequest()),
        ("ModelConfig", messages.ModelConfigRequest()),
        ("ModelInfer", label_request(model="")),
    ):
        assert code(server, name, request)[0] is Code.NOT_FOUND
    (wire,) = server.call("ModelReady", b"")
    assert not messages.ModelReadyResponse.FromString(wire).ready
    (wire,) = server.call("ModelStatistics", b"")
    assert {model.name for model in messages.ModelStatisticsResponse.FromString(wire).model_stats} <= {"pixels"}


def test_answer_longer_than_a_message() -> None:
    data = np.broadcast_to(np.zeros(1, np.uint8), (1 << 31,))
    response = InferResponse(model="m", version="1", id="", outputs=(InferOutput(name="labels", data=data),))
    with pytest.raises(ProtocolError, match=r"2,147,483,648 bytes is longer than a gRPC message") as caught:
        grpc_servicer._encode(response, request=decode_infer(label_request(), Limits()), stream=False)
    assert caught.value.status == 413


def test_request_without_outputs_is_binary() -> None:
    signature = Signature(task="segment", channels=3, classes=tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in "abc"))
    request = label_request()
    del request.outputs[:]
    requests, decoded = Requests(1, 1 << 20), decode_infer(request, Limits())
    _, _, wanted = requests.read(decoded, Version(name="1", path=Path("m")), signature)
    assert (wanted.names, wanted.binary) == (("labels", "scores"), True)
    assert requests.measured(decoded, {"labels": np.broadcast_to(np.uint8(0), (8, 4096, 4096))}).binary  # far more than JSON carries
