"""The gRPC server over a socket, with well-behaved and hostile clients."""

from __future__ import annotations

import gc
import gzip
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from muntin.artifact import ClassInfo, Signature
from muntin.serving.batching.workers import Runner
from muntin.serving.config import Bounds, ServeConfig
from muntin.serving.grpc import servicer as grpc_servicer
from muntin.serving.grpc.server import GrpcServer
from muntin.serving.inference.executor import Executor
from muntin.serving.inference.outputs import read_wanted
from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.grpc_codec import METHODS, SERVICE, decode_infer, encode_infer
from muntin.serving.protocol.messages import InferOutput, InferResponse, Limits, ProtocolError
from muntin.serving.protocol.wire import parse
from muntin.serving.server import Server

Code = grpc.StatusCode
CALLS = 8
"""Calls that a server of these tests answers at once."""


class Client:
    """Every method of the service, by its name."""

    def __init__(self, port: int, *options: tuple[str, Any]) -> None:
        self.port, self.http_port = port, 0
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=[("grpc.use_local_subchannel_pool", 1), *options])

    def __call__(self, name: str, request: Any = None, *, timeout: float | None = 30.0, **options: Any) -> Any:
        method = next(method for method in METHODS if method.name == name)
        message = method.request() if request is None else request
        call = self.channel.unary_unary(f"/{SERVICE}/{name}", lambda m: m.SerializeToString(), method.response.FromString)
        return call(message, timeout=timeout, **options)

    def stream(self, requests: Iterator[Any], **options: Any) -> Any:
        call = self.channel.stream_stream(
            f"/{SERVICE}/ModelStreamInfer", lambda m: m.SerializeToString(), messages.ModelStreamInferResponse.FromString
        )
        return call(requests, **({"timeout": 30.0} | options))

    def stalled(self, name: str, release: threading.Event, **options: Any) -> Any:
        """A call whose message does not arrive."""
        call = self.channel.stream_unary(f"/{SERVICE}/{name}", lambda m: m)
        return call.future(waiting(release), **({"timeout": 30.0} | options))

    def begin(self, name: str, request: Any) -> Any:
        """Begin a call, and return it."""
        method = next(method for method in METHODS if method.name == name)
        call = self.channel.unary_unary(f"/{SERVICE}/{name}", lambda m: m.SerializeToString(), method.response.FromString)
        return call.future(request, timeout=60.0)

    def failure(self, name: str, request: Any = None, **options: Any) -> tuple[Any, str]:
        """(status, text) of a call that fails."""
        with pytest.raises(grpc.RpcError) as caught:
            self(name, request, **options)
        return caught.value.code(), caught.value.details()

    def code(self, name: str, request: Any = None, **options: Any) -> Any:
        return self.failure(name, request, **options)[0]


def waiting(release: threading.Event) -> Iterator[bytes]:
    release.wait(30)
    yield from ()


@contextmanager
def served(path: Path, **options: Any) -> Iterator[tuple[Server, Client]]:
    with Server(path, ServeConfig(**({"http_port": 0, "grpc_port": 0, "threads": 1, "name": "pixels"} | options))) as server:
        assert server.grpc_port is not None
        client = Client(server.grpc_port)
        yield server, client
        client.channel.close()


@pytest.fixture(scope="module")
def path(write_pixels: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pixels(tmp_path_factory.mktemp("serving") / "pixels")


@pytest.fixture(scope="module")
def running(path: Path) -> Iterator[tuple[Server, Client]]:
    with served(path) as server_and_client:
        yield server_and_client


@pytest.fixture(scope="module")
def strict(path: Path) -> Iterator[Client]:
    """Client of a server that answers few calls at once, with short timeouts."""
    with served(path, bounds=Bounds(connections=CALLS, body_seconds=3.0)) as (server, client):
        client.http_port = server.http_port
        yield client


@pytest.fixture(scope="module")
def small(path: Path) -> Iterator[Client]:
    """Client of a server that holds few bytes."""
    with served(path, bounds=Bounds(held_bytes=50_000, body_bytes=100_000)) as (_, client):
        yield client


@pytest.fixture
def client(running: tuple[Server, Client]) -> Client:
    return running[1]


def infer(seed: int = 1, *, model: str = "pixels", side: int = 8, identity: str = "") -> messages.ModelInferRequest:
    """Return a request for the labels of one image."""
    request = messages.ModelInferRequest(model_name=model, id=identity)
    request.inputs.add(name="images", datatype="UINT8", shape=[1, side, side, 3])
    request.raw_input_contents.append(pixels(seed, side).tobytes())
    request.outputs.add(name="labels")
    return request


def pixels(seed: int, side: int = 8) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (1, side, side, 3)).astype(np.uint8)


def labels(seed: int, side: int = 8) -> bytes:
    return bytes(pixels(seed, side).argmax(3).astype(np.uint8).tobytes())


def outcomes(server: Server) -> Counter[str]:
    """Number of requests by outcome, from the metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics") as answer:
        text = answer.read().decode()
    counts = re.findall(r'muntin_requests_total\{face="grpc",outcome="(\w+)"\} (\d+)', text)
    return Counter({outcome: int(count) for outcome, count in counts})


@contextmanager
def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[list[int]]:
    """Make every batch take so many seconds. Yields the rows of the batches that were begun."""
    begun: list[int] = []
    compute = Executor.__call__

    def slowly(self: Executor, batch: Any) -> Any:
        begun.append(sum(job.rows for job in batch.jobs))
        time.sleep(seconds)
        return compute(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "__call__", slowly)
        yield begun


def test_token_is_checked_before_the_message(path: Path) -> None:
    with served(path, tokens=("secret",)) as (_, client):
        release = threading.Event()
        for name in ("ModelInfer", "ModelStreamInfer", "RepositoryIndex"):
            call = client.stalled(name, release, timeout=10.0)
            assert call.code() is Code.UNAUTHENTICATED, name
            assert "TOKEN" in call.details()
            wrong = client.stalled(name, release, timeout=10.0, metadata=(("authorization", "Bearer other"),))
            assert wrong.code() is Code.UNAUTHENTICATED
        release.set()
        assert client("ServerLive").live
        assert client("ServerReady").ready
        assert client.code("ModelReady", messages.ModelReadyRequest(name="pixels")) is Code.UNAUTHENTICATED
        answer = client("ModelInfer", infer(), metadata=(("authorization", "Bearer secret"),))
        assert answer.raw_output_contents[0] == labels(1)


def test_stalled_calls_leave_the_server_alive(strict: Client) -> None:
    release, hostile = threading.Event(), Client(strict.port)
    calls = [hostile.stalled("ModelInfer", release) for _ in range(2 * CALLS)]
    assert hostile.stalled("ServerLive", release).code() is Code.OK
    assert strict("ServerLive", timeout=2.0).live
    assert strict("ServerReady", timeout=2.0).ready
    assert strict.code("ModelInfer", infer()) is Code.RESOURCE_EXHAUSTED
    codes = [call.code() for call in calls]
    assert codes.count(Code.RESOURCE_EXHAUSTED) == codes.count(Code.DEADLINE_EXCEEDED) == CALLS
    assert strict.stalled("RepositoryIndex", release).details() == "the request did not arrive in time"
    assert strict("ModelInfer", infer()).raw_output_contents[0] == labels(1)
    release.set()
    assert strict.stalled("ModelInfer", release).code() is Code.INVALID_ARGUMENT  # ended without a message
    hostile.channel.close()


def test_idle_connection_is_closed(path: Path) -> None:
    with served(path, bounds=Bounds(idle_seconds=0.5)) as (_, client):
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as idle:
            idle.sendall(PREFACE + frame(4, 0, 0, b""))
            while idle.recv(4096):
                pass
        assert client("ServerLive").live


def test_streams_end_when_the_server_stops(path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    release = threading.Event()
    with served(path, drain_seconds=60.0) as (server, client), slow(monkeypatch, 0.5) as begun:
        idle = client.stream(then_nothing([infer(1)], release))
        assert next(idle).infer_response.raw_output_contents[0] == labels(1)
        busy = client.stream(then_nothing([infer(2), infer(3)], release))
        wait_until(lambda: len(begun) == 2)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 60  # the time for draining
        assert server.cut_off == 0
        with pytest.raises(grpc.RpcError) as caught:
            next(idle)
        assert (caught.value.code(), "shutting down" in caught.value.details()) == (Code.UNAVAILABLE, True)
        assert next(busy).infer_response.raw_output_contents[0] == labels(2)  # requests that have arrived are answered
        with pytest.raises(grpc.RpcError):
            list(busy)
        release.set()


def test_cancelled_call_during_shutdown_is_not_cut_off(path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    with served(path, drain_seconds=20.0) as (server, client), slow(monkeypatch, 1.0) as begun:
        call = client.begin("ModelInfer", infer(1))
        wait_until(lambda: len(begun) == 1)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        time.sleep(0.2)
        call.cancel()
        stopping.join(20)
        assert server.cut_off == 0


def test_call_longer_than_drain_time_is_cut_off(path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    before = set(threading.enumerate())
    with served(path, drain_seconds=1.0) as (server, client), slow(monkeypatch, 3.0) as begun:
        call = client.begin("ModelInfer", infer(1))
        wait_until(lambda: len(begun) == 1)
        server.stop()
        assert server.cut_off == 1
        with pytest.raises(grpc.RpcError):
            call.result()
    # The engine ends the batch for which nobody waits any more; an exception in its thread would fail this test.
    wait_until(lambda: not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("muntin-engine")])


def test_unread_answers_count_as_held(strict: Client, wait_until: Any) -> None:
    """Until their connection ends."""

    def held() -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{strict.http_port}/metrics") as answer:
            return float(re.findall(r"\nmuntin_body_bytes (\S+)", answer.read().decode())[0])

    assert held() == 0
    with socket.create_connection(("127.0.0.1", strict.port), timeout=30) as connection:
        connection.sendall(PREFACE + frame(4, 0, 0, bytes([0, 4, 0, 0, 0, 0])) + frame(4, 1, 0, b""))  # a window of no bytes
        for number in range(3):
            request = infer(side=512)
            request.raw_input_contents[0] = bytes(512 * 512 * 3)  # packed, it fits into one frame
            packed = gzip.compress(request.SerializeToString())
            connection.sendall(head_frame(b"/%s/ModelInfer" % SERVICE.encode(), 2 * number + 1))
            connection.sendall(frame(0, 1, 2 * number + 1, b"\1" + len(packed).to_bytes(4, "big") + packed))
        wait_until(lambda: held() > 3 * 512 * 512)
        assert strict("ModelInfer", infer()).raw_output_contents[0] == labels(1)
    wait_until(lambda: held() == 0)


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    """Return an HTTP/2 frame."""
    return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content


def head_frame(path: bytes, stream: int) -> bytes:
    """Return the HTTP/2 frame of a call's headers."""
    fields = {
        b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x", b"te": b"trailers",
        b"content-type": b"application/grpc", b"grpc-encoding": b"gzip",
    }  # fmt: skip
    block = b"".join(bytes([0, len(name)]) + name + bytes([len(value)]) + value for name, value in fields.items())
    return frame(1, 4, stream, block)


def free(client: Client) -> bool:
    """Whether the server has a place for one more call."""
    try:
        return bool(client("ModelReady", messages.ModelReadyRequest(name="pixels")).ready)
    except grpc.RpcError:
        return False


def then_nothing(requests: list[Any], release: threading.Event) -> Iterator[Any]:
    yield from requests
    release.wait(30)


def test_held_bytes_are_bounded(small: Client, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    with slow(monkeypatch, 1.0) as begun:
        first = threading.Thread(target=lambda: small("ModelInfer", infer(side=100)))
        first.start()
        wait_until(lambda: begun)
        assert small.code("ModelInfer", infer(side=100)) is Code.UNAVAILABLE
        answers = list(small.stream(iter([infer(side=100, identity="a"), infer(2)])))
        assert "fill what this server holds" in answers[0].error_message
        assert answers[1].infer_response.raw_output_contents[0] == labels(2)
        first.join()
    assert small("ModelInfer", infer(side=100)).raw_output_contents[0] == labels(1, 100)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_message_above_the_limit(small: Client) -> None:
    """The client is a process of its own: the message is large there."""
    assert small.code("ModelInfer", infer(side=300)) is Code.RESOURCE_EXHAUSTED
    before = peak = resident()
    command = [sys.executable, "-c", BOMB, str(small.port), str(100 << 20)]  # which is short enough packed
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as hostile:
        while hostile.poll() is None:
            peak = max(peak, resident())
            time.sleep(0.001)
        assert hostile.stdout is not None
        assert hostile.stdout.read().strip() == "RESOURCE_EXHAUSTED"
    assert peak - before < 64 << 20
    assert small("ModelInfer", infer()).raw_output_contents[0] == labels(1)


def test_waiting_request_keeps_only_its_tensors(client: Client, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    """Neither the message nor its bytes are kept: a request would hold four times what it counts as."""
    read: list[Any] = []

    def reads(wire: bytes, kind: Any, limits: Any) -> Any:
        read.extend((wire, message := parse(wire, kind, limits)))
        return message

    with slow(monkeypatch, 0.5) as begun:
        monkeypatch.setattr("muntin.serving.grpc.servicer.parse", reads)
        answers = client.stream(iter([infer(side=64)]))
        call = client.begin("ModelInfer", infer(side=64))
        wait_until(lambda: begun and len(read) == 4)
        kept = [sys.getrefcount(read[n]) for n in range(len(read))]
        alone = sys.getrefcount([object()][0]) + 1  # in the list here
        assert call.result().raw_output_contents[0] == next(answers).infer_response.raw_output_contents[0] == labels(1, 64)
    assert kept == [alone] * 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_refused_messages_are_freed(client: Client) -> None:
    """Without the cyclic garbage collector, which may take minutes to run."""
    wrong = messages.ModelInferRequest(model_name="pixels", raw_input_contents=[bytes(16 << 20)])
    wrong.inputs.add(name="images", datatype="UINT8", shape=[1, 2048, 4096, 2])
    assert client.code("ModelInfer", wrong) is Code.INVALID_ARGUMENT
    gc.collect()
    before = resident()
    gc.disable()
    try:
        for _ in range(20):
            assert client.code("ModelInfer", wrong) is Code.INVALID_ARGUMENT
        assert resident() - before < 160 << 20
    finally:
        gc.enable()


BOMB = f"""
import sys, grpc
channel = grpc.insecure_channel("127.0.0.1:" + sys.argv[1], options=[("grpc.max_send_message_length", -1)])
call = channel.unary_unary("/{SERVICE}/ModelInfer")
try:
    call(bytes(int(sys.argv[2])), compression=grpc.Compression.Gzip, timeout=60)
except grpc.RpcError as error:
    print(error.code().name)
"""


def resident() -> int:
    """Bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_stream_is_batched_and_answered_in_order(running: tuple[Server, Client], monkeypatch: pytest.MonkeyPatch) -> None:
    server, client = running
    before = outcomes(server)
    with slow(monkeypatch, 0.3) as begun:
        sent = [infer(n, identity=str(n), model="other" if n == 5 else "pixels") for n in range(40)]
        answers = list(client.stream(iter(sent)))
    assert max(begun) > 1
    assert [answer.infer_response.id for answer in answers] == [str(n) for n in range(40)]
    for number, answer in enumerate(answers):
        if number != 5:
            assert answer.error_message == ""
            assert answer.infer_response.raw_output_contents[0] == labels(number)
    assert "this server has pixels" in answers[5].error_message
    assert answers[5].infer_response.model_name == "other"
    assert all(answer.infer_response.parameters["triton_final_response"].bool_param for answer in answers)
    assert outcomes(server) - before == {"answered": 39, "wrong": 1}


def test_cancelled_stream_takes_requests_back(running: tuple[Server, Client], monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    server, client = running
    before = outcomes(server)
    with slow(monkeypatch, 0.5) as begun:
        call = client.stream(infer(n) for n in range(100))
        wait_until(lambda: len(begun) == 2)
        call.cancel()
        wait_until(lambda: (outcomes(server) - before)["cancelled"] > 0)
        time.sleep(1.5)
        counted = outcomes(server) - before
        assert 32 - 8 <= counted["cancelled"] <= 32  # of a stream so many are taken at once
        assert counted.total() - counted["cancelled"] <= 16
        assert len(begun) <= 3  # what waited was taken back


@pytest.mark.parametrize(
    ("side", "classes", "apart"),
    [(512, None, False), (20, 1000, True), (1100, None, True)],
)
def test_large_answers_are_encoded_on_a_thread(
    client: Client, monkeypatch: pytest.MonkeyPatch, side: int, classes: int | None, apart: bool
) -> None:
    threads: list[str] = []

    def watched(*given: Any, **named: Any) -> Any:
        threads.append(threading.current_thread().name)
        return encode_infer(*given, **named)

    monkeypatch.setattr("muntin.serving.grpc.servicer.encode_infer", watched)
    request = infer(3, side=side)
    if classes is not None:
        request.outputs[0].name = "scores"
        request.outputs[0].parameters["classification"].int64_param = classes
    answer = client("ModelInfer", request).raw_output_contents[0]
    assert classes is not None or answer == labels(3, side)
    assert [name.startswith("muntin-encode") for name in threads] == [apart]


def test_unreadable_messages_are_counted_and_logged(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with served(path, access_log=True, bounds=Bounds(json_bytes=2000)) as (server, client):
        for message, code in ((b"\xff", Code.INVALID_ARGUMENT), (b"\x0a\xff\x7f" + b"x" * 0x3FFF, Code.RESOURCE_EXHAUSTED)):
            with pytest.raises(grpc.RpcError) as caught:
                client.channel.unary_unary(f"/{SERVICE}/ModelInfer")(message, timeout=30)
            assert caught.value.code() is code
            stream = client.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer", None, messages.ModelStreamInferResponse.FromString)
            (answer,) = stream(iter([message]), timeout=30)
            assert answer.error_message == caught.value.details()
        assert outcomes(server) == {"wrong": 4}
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    ends = [(line["method"], line["status"], line["code"]) for line in lines if line["face"] == "grpc"]
    assert ends == [("ModelInfer", *end) for end in ((400, "INVALID_ARGUMENT"), (413, "RESOURCE_EXHAUSTED")) for _ in range(2)]
    assert all(line["client"] for line in lines)


def test_access_log_has_every_call(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = (("authorization", "Bearer secret"),)
    with served(path, access_log=True, tokens=("secret",), bounds=Bounds(held_bytes=5000)) as (_, client):
        assert client.code("ModelInfer", infer()) is Code.UNAUTHENTICATED
        assert client.code("ModelInfer", infer(side=100), metadata=metadata) is Code.UNAVAILABLE
        client("ModelInfer", infer(identity="x"), metadata=metadata)
        client("ServerReady")
        client("ModelMetadata", messages.ModelMetadataRequest(name="pixels"), metadata=metadata)
        request = messages.RepositoryModelLoadRequest(model_name="other")
        assert client.code("RepositoryModelLoad", request, metadata=metadata) is Code.NOT_FOUND
        (refused,) = client.stream(iter([infer(side=100)]), metadata=metadata)
        assert refused.error_message
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["method"], line["path"], line["status"], line["code"]) for line in lines] == [
        ("ModelInfer", "", 401, "UNAUTHENTICATED"),
        ("ModelInfer", "", 503, "UNAVAILABLE"),
        ("ModelInfer", "pixels", 200, "OK"),
        ("ServerReady", "", 200, "OK"),
        ("ModelMetadata", "pixels", 200, "OK"),
        ("RepositoryModelLoad", "other", 404, "NOT_FOUND"),
        ("ModelInfer", "", 503, "UNAVAILABLE"),
    ]
    assert all(line["client"].startswith("ipv4:127.0.0.1:") for line in lines)
    assert [line.get("id") for line in lines if line["status"] == 200] == ["x", None, None]


@pytest.mark.parametrize("face", ["unary", "stream"])
def test_unforeseen_error(
    running: tuple[Server, Client], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, face: str
) -> None:
    def fail(*_: Any) -> None:
        raise LookupError("secret")

    server, client = running
    before = outcomes(server)
    monkeypatch.setattr("muntin.serving.grpc.servicer.encode_infer", fail)
    if face == "unary":
        assert client.failure("ModelInfer", infer()) == (Code.INTERNAL, "the server failed (LookupError)")
    else:
        answer = next(client.stream(iter([infer(identity="x")])))
        assert (answer.error_message, answer.infer_response.id) == ("the server failed (LookupError)", "x")
    assert outcomes(server) - before == {"failed": 1}
    assert [record.message for record in caplog.records if record.name == "asyncio"] == ["a call failed"]
    monkeypatch.setattr("muntin.serving.grpc.servicer.index_document", fail)
    assert client.failure("RepositoryIndex") == (Code.INTERNAL, "the server failed (LookupError)")


@pytest.mark.parametrize(
    ("call_s", "request_s", "least", "most"),
    [(20.0, 60, 5.0, 21.0), (60.0, 20, 19.9, 20.1), (None, None, math.inf, math.inf)],
)
def test_earlier_of_two_deadlines_counts(
    client: Client, monkeypatch: pytest.MonkeyPatch, call_s: float | None, request_s: int | None, least: float, most: float
) -> None:
    given: list[float] = []
    submit = Runner.submit

    def watched(self: Runner, job: Any, done: Any) -> None:
        given.append(math.inf if job.deadline is None else job.deadline - job.arrived)
        submit(self, job, done)

    monkeypatch.setattr(Runner, "submit", watched)
    request = infer()
    if request_s is not None:
        request.parameters["timeout"].int64_param = request_s * 1_000_000
    client("ModelInfer", request, timeout=call_s)
    assert least <= given[0] <= most


def test_refusal_has_retry_after(small: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        small("ModelInfer", infer(side=150))
    assert caught.value.code() is Code.UNAVAILABLE
    assert {("retry-after", "1"), ("grpc-retry-pushback-ms", "1000")} <= set(caught.value.trailing_metadata())


def test_model_ready(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = messages.ModelReadyRequest
    assert client("ModelReady", ask(name="pixels")).ready
    assert client("ModelReady", ask(name="pixels", version="1")).ready
    for other in (ask(name="other"), ask(name="pixels", version="9"), ask()):
        assert not client("ModelReady", other).ready
    monkeypatch.setattr("muntin.serving.inference.service.Service.ready", False)
    assert not client("ServerReady").ready
    assert not client("ModelReady", ask(name="pixels")).ready


def test_request_without_model_name(client: Client) -> None:
    assert client.code("ModelMetadata") is Code.NOT_FOUND
    assert client.code("ModelConfig") is Code.NOT_FOUND
    assert client.code("ModelInfer", infer(model="")) is Code.NOT_FOUND
    assert [model.name for model in client("ModelStatistics").model_stats] == ["pixels"]
    assert client("ModelMetadata", messages.ModelMetadataRequest(name="pixels")).name == "pixels"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # grpc's task ends with the error
def test_restart_after_path_that_is_not_utf8(path: Path, wait_until: Any) -> None:
    lines: list[str] = []
    with Server(path, ServeConfig(http_port=0, grpc_port=0, threads=1, name="pixels"), notify=lines.append) as server:
        assert server.grpc_port is not None
        for number in (1, 2):
            with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=30) as connection:
                connection.sendall(PREFACE + frame(4, 0, 0, b"") + head_frame(b"/inference.GRPCInferenceService/\xff\xfe", 1))
                wait_until(lambda: sum("is begun again" in line for line in lines) == number)  # noqa: B023
            client = Client(server.grpc_port)
            wait_until(lambda: free(client))  # noqa: B023
            assert client("ModelInfer", infer()).raw_output_contents[0] == labels(1)
            client.channel.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_many_paths_that_are_not_utf8(path: Path, wait_until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended servers are not kept, restarts are counted, and calls are answered afterwards."""
    monkeypatch.setattr("muntin.serving.grpc.server._GRACE_S", 0.2)
    monkeypatch.setattr("muntin.serving.grpc.server._POLL_S", 0.02)
    faces: list[Any] = []
    start = GrpcServer.start
    monkeypatch.setattr(GrpcServer, "start", lambda self, *addresses: (faces.append(self), start(self, *addresses))[1])
    kept = 0
    with Server(path, ServeConfig(http_port=0, grpc_port=0, threads=1, name="pixels")) as server:
        (grpc_face,) = faces
        for number in range(1, 11):

            def restarted() -> bool:
                with suppress(OSError), socket.create_connection(("127.0.0.1", server.grpc_port or 0), timeout=30) as connection:
                    connection.sendall(PREFACE + frame(4, 0, 0, b"") + head_frame(b"/inference.GRPCInferenceService/\xff\xfe", 1))
                return grpc_face._restarts >= number  # noqa: B023

            wait_until(restarted)
            kept = max(kept, len(grpc_face._ending))
        assert kept <= 4
        counted = 0
        while counted != grpc_face._restarts:  # calls that were sent and not yet read end a server, too
            counted = grpc_face._restarts
            time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics") as answer:
            assert f"muntin_grpc_restarts_total {counted}.0" in answer.read().decode()
        client = Client(server.grpc_port or 0)
        wait_until(lambda: free(client))
        assert client("ModelInfer", infer()).raw_output_contents[0] == labels(1)
        client.channel.close()


def test_second_stop_cuts_off(path: Path, wait_until: Any) -> None:
    release = threading.Event()
    with served(path, drain_seconds=60.0) as (server, client):
        call = client.stalled("ModelInfer", release)
        time.sleep(0.5)  # until the call has reached the server
        stop = threading.Thread(target=server.stop)
        stop.start()
        wait_until(lambda: not listens(server.http_port))
        assert stop.is_alive()
        server._end(by_interrupt=True)
        stop.join(30)
        assert not stop.is_alive()
        assert (server.cut_off, server.hurried) == (1, True)
        release.set()
        with pytest.raises(grpc.RpcError):
            call.result()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6")
def test_ipv6_without_ipv6_address(path: Path) -> None:
    with served(path, host="0.0.0.0") as (server, client):  # noqa: S104
        assert client("ModelInfer", infer()).raw_output_contents[0] == labels(1)
        for name in ("ModelInfer", "ServerLive", "ModelStreamInfer"):
            with grpc.insecure_channel(f"[::1]:{server.grpc_port}") as channel:
                call = channel.stream_stream(f"/{SERVICE}/{name}", lambda m: m.SerializeToString())
                with pytest.raises(grpc.RpcError) as caught:
                    list(call(iter([infer()]), timeout=30))
            assert caught.value.code() in (Code.PERMISSION_DENIED, Code.UNAVAILABLE)  # the latter where grpc listens to IPv4 alone


def test_answer_longer_than_a_message() -> None:
    data = np.broadcast_to(np.zeros(1, np.uint8), (1 << 31,))
    response = InferResponse(model="m", version="1", id="", outputs=(InferOutput(name="labels", data=data),))
    with pytest.raises(ProtocolError, match=r"2,147,483,648 bytes is longer than a gRPC message") as caught:
        grpc_servicer._encode(response, request=decode_infer(infer(), Limits()), stream=False)
    assert caught.value.status == 413


def test_request_without_outputs_is_binary() -> None:
    signature = Signature(task="segment", channels=3, classes=tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in "abc"))
    request = infer()
    del request.outputs[:]
    wanted = read_wanted(decode_infer(request, Limits()), signature, (1, 8, 8, 3))
    assert (wanted.names, wanted.binary) == (("labels", "scores"), True)
    assert read_wanted(decode_infer(request, Limits()), signature, (8, 4096, 4096, 3)).binary  # far more than JSON carries
