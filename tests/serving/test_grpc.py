"""The gRPC face, as clients meet it: calls over a socket, those that mean well and those that do not."""

from __future__ import annotations

import asyncio
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
from muntin.serving import grpc as grpc_face
from muntin.serving import open_inference_pb2 as messages
from muntin.serving.config import Bounds, ServeConfig
from muntin.serving.executor import Executor
from muntin.serving.grpc_codec import METHODS, SERVICE, decode_infer, encode_infer
from muntin.serving.health_pb2 import HealthCheckRequest, HealthCheckResponse
from muntin.serving.ledger import Ledger
from muntin.serving.outputs import read_wanted
from muntin.serving.protocol import InferOutput, InferResponse, Limits, ProtocolError
from muntin.serving.runner import Runner
from muntin.serving.server import Server
from muntin.serving.wire import parse

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
        """A call whose message does not come."""
        call = self.channel.stream_unary(f"/{SERVICE}/{name}", lambda m: m)
        return call.future(waiting(release), **({"timeout": 30.0} | options))

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
    with served(path) as found:
        yield found


@pytest.fixture(scope="module")
def strict(path: Path) -> Iterator[Client]:
    """Of a server that answers few calls at once, and has little patience."""
    with served(path, bounds=Bounds(connections=CALLS, body_seconds=3.0)) as (server, client):
        client.http_port = server.http_port
        yield client


@pytest.fixture(scope="module")
def hasty(path: Path) -> Iterator[Client]:
    """Of a server that has one place, where a stream may not stand still."""
    with served(path, bounds=Bounds(idle_seconds=0.5, connections=1)) as (_, client):
        yield client


@pytest.fixture(scope="module")
def small(path: Path) -> Iterator[Client]:
    """Of a server that holds little."""
    with served(path, bounds=Bounds(held_bytes=50_000, body_bytes=100_000)) as (_, client):
        yield client


@pytest.fixture
def client(running: tuple[Server, Client]) -> Client:
    return running[1]


def infer(seed: int = 1, *, model: str = "pixels", side: int = 8, identity: str = "") -> messages.ModelInferRequest:
    """A request for the labels of one image."""
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
    """How many requests came to what, by the metrics."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics") as answer:
        text = answer.read().decode()
    found = re.findall(r'muntin_requests_total\{face="grpc",outcome="(\w+)"\} (\d+)', text)
    return Counter({outcome: int(count) for outcome, count in found})


@contextmanager
def slow(monkeypatch: pytest.MonkeyPatch, seconds: float) -> Iterator[list[int]]:
    """Every batch takes so long. Yields the rows of those that were begun."""
    begun: list[int] = []
    compute = Executor.__call__

    def slowly(self: Executor, batch: Any) -> Any:
        begun.append(sum(job.rows for job in batch.jobs))
        time.sleep(seconds)
        return compute(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Executor, "__call__", slowly)
        yield begun


# ---- what never comes ----


def test_a_token_is_asked_for_before_the_message(path: Path) -> None:
    with served(path, tokens=("secret",)) as (_, client):
        release = threading.Event()
        for name in ("ModelInfer", "ModelStreamInfer", "NoSuchMethod"):
            call = client.stalled(name, release, timeout=10.0)
            assert call.code() is Code.UNAUTHENTICATED, name
            assert "TOKEN" in call.details()
            wrong = client.stalled(name, release, timeout=10.0, metadata=(("authorization", "Bearer other"),))
            assert wrong.code() is Code.UNAUTHENTICATED
        release.set()
        assert client("ServerLive").live
        assert client("ServerReady").ready
        assert client.code("ModelReady", messages.ModelReadyRequest(name="pixels")) is Code.UNAUTHENTICATED
        found = client("ModelInfer", infer(), metadata=(("authorization", "Bearer secret"),))
        assert found.raw_output_contents[0] == labels(1)


def test_a_message_that_does_not_end_is_given_up(strict: Client) -> None:
    release = threading.Event()
    for call in [strict.stalled(name, release) for name in ("ModelInfer", "RepositoryIndex")]:
        assert (call.code(), call.details()) == (Code.DEADLINE_EXCEEDED, "the request did not arrive in time")
    release.set()
    assert strict.stalled("ModelInfer", release).code() is Code.INVALID_ARGUMENT
    assert strict("ModelInfer", infer()).raw_output_contents[0] == labels(1)


def test_calls_that_stall_leave_the_server_alive(strict: Client) -> None:
    release, hostile = threading.Event(), Client(strict.port)
    calls = [hostile.stalled("ModelInfer", release) for _ in range(2 * CALLS)]
    assert hostile.stalled("ServerLive", release).code() is Code.OK
    assert strict("ServerLive", timeout=2.0).live
    assert strict("ServerReady", timeout=2.0).ready
    assert strict.code("ModelInfer", infer()) is Code.RESOURCE_EXHAUSTED
    codes = [call.code() for call in calls]
    assert codes.count(Code.RESOURCE_EXHAUSTED) == codes.count(Code.DEADLINE_EXCEEDED) == CALLS
    assert strict("ModelInfer", infer()).raw_output_contents[0] == labels(1)
    release.set()
    hostile.channel.close()


def test_what_needs_no_message_is_answered_each_time(client: Client) -> None:
    for _ in range(300):
        assert client("ServerLive").live


def test_a_connection_without_calls_is_ended(hasty: Client) -> None:
    with socket.create_connection(("127.0.0.1", hasty.port), timeout=20) as idle:
        idle.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        while idle.recv(4096):
            pass
    assert hasty("ServerLive").live


def test_a_stream_that_stands_still_is_ended(hasty: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    with slow(monkeypatch, 1.2):
        began = time.monotonic()
        found = hasty.stream(then_nothing([infer(3)], release))
        assert next(found).infer_response.raw_output_contents[0] == labels(3)  # what is computed does not stand still
        with pytest.raises(grpc.RpcError) as caught:
            next(found)
        assert caught.value.code() is Code.DEADLINE_EXCEEDED
        assert 1.7 <= time.monotonic() - began < 10
    release.set()


def test_a_stream_whose_answers_nobody_reads_is_ended(hasty: Client, wait_until: Any) -> None:
    wait_until(lambda: free(hasty))
    release = threading.Event()
    deaf = Client(hasty.port, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))
    found = deaf.stream(then_nothing([infer(n, side=512) for n in range(64)], release))
    next(found)
    assert not free(hasty)
    wait_until(lambda: free(hasty))
    release.set()
    got = 1
    with pytest.raises(grpc.RpcError):
        for _ in found:
            got += 1
    assert got < 64
    deaf.channel.close()


@pytest.mark.parametrize("busy", [False, True])
def test_a_stream_does_not_hold_up_the_servers_end(path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any, busy: bool) -> None:
    release = threading.Event()
    with served(path, drain_seconds=60.0) as (server, client), slow(monkeypatch, 0.5) as begun:
        found = client.stream(then_nothing([infer(1)], release))
        assert next(found).infer_response.raw_output_contents[0] == labels(1)
        asking = client.stream(then_nothing([infer(2), infer(3)], release)) if busy else iter(())
        wait_until(lambda: len(begun) == 1 + busy)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 20
        assert server.cut_off == 0
        with pytest.raises(grpc.RpcError) as caught:
            next(found)
        assert (caught.value.code(), "shutting down" in caught.value.details()) == (Code.UNAVAILABLE, True)
        if busy:  # what had come is answered
            assert next(asking).infer_response.raw_output_contents[0] == labels(2)
            with pytest.raises(grpc.RpcError):
                list(asking)
        release.set()


def test_a_call_that_its_client_ends_while_the_server_goes_down_was_not_cut_off(
    path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    with served(path, drain_seconds=20.0) as (server, client), slow(monkeypatch, 1.0) as begun:
        method = next(method for method in METHODS if method.name == "ModelInfer")
        call = client.channel.unary_unary(f"/{SERVICE}/ModelInfer", lambda m: m.SerializeToString(), method.response.FromString)
        asked = call.future(infer(1), timeout=60.0)
        wait_until(lambda: len(begun) == 1)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        time.sleep(0.2)
        asked.cancel()
        stopping.join(20)
        assert server.cut_off == 0


def test_a_call_that_takes_longer_than_there_is_time_at_the_end_is_cut_off_and_counted(
    path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    before = set(threading.enumerate())
    with served(path, drain_seconds=1.0) as (server, client), slow(monkeypatch, 3.0) as begun:
        method = next(method for method in METHODS if method.name == "ModelInfer")
        call = client.channel.unary_unary(f"/{SERVICE}/ModelInfer", lambda m: m.SerializeToString(), method.response.FromString)
        asked = call.future(infer(1), timeout=60.0)
        wait_until(lambda: len(begun) == 1)
        server.stop()
        assert server.cut_off == 1
        with pytest.raises(grpc.RpcError):
            asked.result()
    # The engine ends the batch when nobody waits for it any more; an exception in its thread would fail this test.
    wait_until(lambda: not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("muntin-engine")])


@pytest.mark.skipif(not Path("/dev/fd").exists(), reason="open connections are found there")
def test_answers_that_nobody_reads_count_and_their_connection_is_ended(strict: Client, wait_until: Any) -> None:
    def held() -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{strict.http_port}/metrics") as answer:
            return float(re.findall(r"\nmuntin_body_bytes (\S+)", answer.read().decode())[0])

    assert held() == 0
    with deaf(strict.port, [infer(side=512)] * 3) as connection:
        wait_until(lambda: held() > 3 * 512 * 512)
        assert strict("ModelInfer", infer()).raw_output_contents[0] == labels(1)
        began = time.monotonic()
        while connection.recv(1 << 16):  # until the server ends it
            assert time.monotonic() - began < 30
        wait_until(lambda: held() == 0)


@contextmanager
def deaf(port: int, requests: list[Any]) -> Iterator[socket.socket]:
    """A connection that asks, and whose HTTP/2 window lets no byte of an answer through."""

    def frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
        return len(content).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + content

    head = {":method": "POST", ":scheme": "http", ":path": f"/{SERVICE}/ModelInfer", ":authority": "x", "te": "trailers"}
    fields = {**head, "content-type": "application/grpc", "grpc-encoding": "gzip"}
    block = b"".join(bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in fields.items())
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, bytes([0, 4, 0, 0, 0, 0])) + frame(4, 1, 0, b""))
        for number, request in enumerate(requests):
            black = messages.ModelInferRequest()
            black.CopyFrom(request)
            black.raw_input_contents[0] = bytes(len(request.raw_input_contents[0]))  # which packs into one frame
            packed = gzip.compress(black.SerializeToString())
            stream = 2 * number + 1
            connection.sendall(frame(1, 4, stream, block) + frame(0, 1, stream, b"\1" + len(packed).to_bytes(4, "big") + packed))
        yield connection


def free(client: Client) -> bool:
    """Whether the server has a place for one more call."""
    try:
        return bool(client("ModelReady", messages.ModelReadyRequest(name="pixels")).ready)
    except grpc.RpcError:
        return False


def then_nothing(requests: list[Any], release: threading.Event) -> Iterator[Any]:
    yield from requests
    release.wait(30)


# ---- what is too much ----


def test_what_is_held_is_bounded(small: Client, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
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


def test_a_message_above_the_limit_is_refused(small: Client) -> None:
    assert small.code("ModelInfer", infer(side=300)) is Code.RESOURCE_EXHAUSTED
    assert small("ModelInfer", infer()).raw_output_contents[0] == labels(1)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_compressed_message_is_not_inflated_beyond_the_limit(small: Client) -> None:
    """The client is a process of its own: the message is large there."""
    assert small("ServerLive").live
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


@pytest.mark.parametrize("streamed", [False, True])
def test_of_what_waits_the_tensors_alone_are_kept(client: Client, monkeypatch: pytest.MonkeyPatch, wait_until: Any, streamed: bool) -> None:
    """Neither the message nor its bytes: a request would hold four times what it counts as."""
    read: list[Any] = []

    def reads(wire: bytes, kind: Any, limits: Any) -> Any:
        read.extend((wire, message := parse(wire, kind, limits)))
        return message

    with slow(monkeypatch, 0.5) as begun:
        monkeypatch.setattr("muntin.serving.grpc.parse", reads)
        if streamed:
            answers = client.stream(iter([infer(side=64)]))
        else:
            thread = threading.Thread(target=client, args=("ModelInfer", infer(side=64)))
            thread.start()
        wait_until(lambda: begun)
        kept = [sys.getrefcount(read[n]) for n in range(len(read))]
        nobody = sys.getrefcount([object()][0])
        if streamed:
            assert len(next(answers).infer_response.raw_output_contents[0]) == 64 * 64
        else:
            thread.join()
    assert kept == [nobody + 1] * 2  # here


@pytest.mark.usefixtures("uncollected")
def test_a_stream_that_waits_for_more_keeps_no_answer(client: Client, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    """It is not counted any more once it was sent."""
    made: list[bytes] = []
    final, over = grpc_face._final, threading.Event()

    def asked() -> Iterator[Any]:
        yield infer(side=64)
        assert over.wait(30)

    monkeypatch.setattr(grpc_face, "_final", lambda answer: made.append(final(answer)) or made[-1])
    answers = client.stream(asked())
    assert len(next(answers).infer_response.raw_output_contents[0]) == 64 * 64
    nobody = sys.getrefcount([object()][0])
    wait_until(lambda: sys.getrefcount(made[0]) == nobody + 1)  # here
    over.set()


def test_what_a_stream_holds_is_free_though_its_end_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """grpc cancels a call whose connection ends, while it waits for its last answer to be given up."""

    class Context:
        """Of a client that sends one request, and reads nothing."""

        def __init__(self) -> None:
            self.wires = [b"wire"]
            self.writes = asyncio.Event()

        async def read(self) -> bytes:
            if not self.wires:
                await asyncio.Event().wait()
            return self.wires.pop()

        async def write(self, answer: bytes) -> None:
            self.writes.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await asyncio.Event().wait()  # it takes its time

    async def answer(wire: bytes, call: Any) -> bytes:
        return bytes(100)

    async def scene() -> None:
        ledger, context = Ledger(Bounds(idle_seconds=0.05)), Context()
        stream = grpc_face._Stream(answer, context, ledger, 0)
        run = asyncio.create_task(stream.run())
        await context.writes.wait()
        assert ledger.held == 100
        await asyncio.wait_for(hung_up.wait(), 30)
        await asyncio.sleep(0.01)  # until it waits for what it gave up
        run.cancel()
        await asyncio.wait((run,), timeout=30)
        assert (run.done(), ledger.held) == (True, 0)

    hung_up = asyncio.Event()
    monkeypatch.setattr(grpc_face, "_hang_up", lambda *_: hung_up.set())
    asyncio.run(scene())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_what_is_refused_is_not_kept(client: Client) -> None:
    """Nor until the cyclic collector comes, which may be minutes."""
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


# ---- streams ----


def test_a_streams_requests_are_computed_together_and_answered_in_order(
    running: tuple[Server, Client], monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_a_client_that_goes_takes_its_requests_back(
    running: tuple[Server, Client], monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    server, client = running
    before = outcomes(server)
    with slow(monkeypatch, 0.5) as begun:
        found = client.stream(infer(n) for n in range(100))
        wait_until(lambda: len(begun) == 2)
        found.cancel()
        wait_until(lambda: (outcomes(server) - before)["cancelled"] > 0)
        time.sleep(1.5)
        counted = outcomes(server) - before
        assert 32 - 8 <= counted["cancelled"] <= 32  # of a stream so many are taken at once
        assert counted.total() - counted["cancelled"] <= 16
        assert len(begun) <= 3  # what waited was taken back


# ---- answers ----


@pytest.mark.parametrize(
    ("side", "classes", "apart"),
    [(8, None, False), (8, 64, False), (20, 1000, True), (512, None, False), (1100, None, True)],
)
def test_large_answers_are_put_into_form_beside_the_event_loop(
    client: Client, monkeypatch: pytest.MonkeyPatch, side: int, classes: int | None, apart: bool
) -> None:
    threads: list[str] = []

    def watched(*given: Any, **named: Any) -> Any:
        threads.append(threading.current_thread().name)
        return encode_infer(*given, **named)

    monkeypatch.setattr("muntin.serving.grpc.encode_infer", watched)
    request = infer(3, side=side)
    if classes is not None:
        request.outputs[0].name = "scores"
        request.outputs[0].parameters["classification"].int64_param = classes
    answer = client("ModelInfer", request).raw_output_contents[0]
    assert classes is not None or answer == labels(3, side)
    assert [name.startswith("muntin-encode") for name in threads] == [apart]


# ---- errors and deadlines ----


def test_what_cannot_be_read_is_counted_and_written_down(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    found = [(line["method"], line["status"], line["code"]) for line in lines if line["face"] == "grpc"]
    assert found == [("ModelInfer", *end) for end in ((400, "INVALID_ARGUMENT"), (413, "RESOURCE_EXHAUSTED")) for _ in range(2)]
    assert all(line["client"] for line in lines)


def test_every_call_is_written_down(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
def test_what_nobody_foresaw_is_told_by_its_kind(
    running: tuple[Server, Client], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, face: str
) -> None:
    def fail(*_: Any) -> None:
        raise LookupError("secret")

    server, client = running
    before = outcomes(server)
    monkeypatch.setattr("muntin.serving.grpc.encode_infer", fail)
    if face == "unary":
        assert client.failure("ModelInfer", infer()) == (Code.INTERNAL, "the server failed (LookupError)")
    else:
        answer = next(client.stream(iter([infer(identity="x")])))
        assert (answer.error_message, answer.infer_response.id) == ("the server failed (LookupError)", "x")
    assert outcomes(server) - before == {"failed": 1}
    assert [record.message for record in caplog.records if record.name == "asyncio"] == ["a call failed"]
    monkeypatch.setattr("muntin.serving.grpc.index_message", fail)
    assert client.failure("RepositoryIndex") == (Code.INTERNAL, "the server failed (LookupError)")


@pytest.mark.parametrize(
    ("call_s", "request_s", "least", "most"),
    [(20.0, 60, 5.0, 21.0), (60.0, 20, 19.9, 20.1), (20.0, None, 5.0, 21.0), (None, 20, 19.9, 20.1), (None, None, math.inf, math.inf)],
)
def test_the_earlier_of_a_calls_and_a_requests_deadline_counts(
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


# ---- what is asked of a model ----


def test_who_is_refused_is_told_when_to_try_again(small: Client) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        small("ModelInfer", infer(side=150))
    assert caught.value.code() is Code.UNAVAILABLE
    assert {("retry-after", "1"), ("grpc-retry-pushback-ms", "1000")} <= set(caught.value.trailing_metadata())


def test_whether_a_model_is_ready_is_said_of_any(running: tuple[Server, Client]) -> None:
    _, client = running
    ask = messages.ModelReadyRequest
    assert client("ModelReady", ask(name="pixels")).ready
    assert client("ModelReady", ask(name="pixels", version="1")).ready
    for other in (ask(name="other"), ask(name="pixels", version="9"), ask()):
        assert not client("ModelReady", other).ready


def test_a_server_that_goes_down_is_not_ready(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.serving.service.Service.ready", False)
    assert not client("ServerReady").ready
    assert not client("ModelReady", messages.ModelReadyRequest(name="pixels")).ready


def checked(client: Client, service: str, method: str = "Check") -> Any:
    kind = client.channel.unary_stream if method == "Watch" else client.channel.unary_unary
    call = kind(f"/grpc.health.v1.Health/{method}", lambda m: m.SerializeToString(), HealthCheckResponse.FromString)
    return call(HealthCheckRequest(service=service), timeout=30)


def test_grpcs_own_health(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(path, tokens=("secret",), bounds=Bounds(connections=1)) as (_, client):
        release = threading.Event()
        busy = client.stalled("ModelMetadata", release, metadata=(("authorization", "Bearer secret"),))
        for service in ("", "pixels", SERVICE):
            assert checked(client, service).status == 1
            assert next(checked(client, service, "Watch")).status == 1
        with pytest.raises(grpc.RpcError) as caught:
            checked(client, "other")
        assert (caught.value.code(), "'pixels'" in caught.value.details()) == (Code.NOT_FOUND, True)
        assert next(checked(client, "other", "Watch")).status == 3
        watch = checked(client, "", "Watch")
        assert next(watch).status == 1
        with monkeypatch.context() as patch:
            patch.setattr("muntin.serving.service.Service.ready", property(lambda _: False))
            assert checked(client, "pixels").status == 2
            assert next(watch).status == 2
        assert next(watch).status == 1
        release.set()
        assert busy.exception() is not None


def test_who_watches_does_not_hold_up_the_servers_end(path: Path) -> None:
    with served(path, drain_seconds=60) as (server, client):
        watch = checked(client, "", "Watch")
        assert next(watch).status == 1
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 20
        with pytest.raises(grpc.RpcError) as caught:
            list(watch)
        assert caught.value.code() is Code.UNAVAILABLE
        assert server.cut_off == 0


def test_who_watches_takes_nobodys_place(strict: Client, wait_until: Any) -> None:
    watches = []
    for _ in range(128):  # one after the other: of those whose message is still to come there are fewer places
        watches.append(checked(strict, "", "Watch"))
        assert next(watches[-1]).status == 1
    with pytest.raises(grpc.RpcError) as caught:
        next(checked(strict, "", "Watch"))
    assert caught.value.code() is Code.RESOURCE_EXHAUSTED
    assert checked(strict, "").status == 1
    assert strict("ModelInfer", infer()).raw_output_contents[0] == labels(1)
    for watch in watches:
        watch.cancel()

    def watched() -> bool:
        try:
            return bool(next(checked(strict, "", "Watch")).status == 1)
        except grpc.RpcError:
            return False

    wait_until(watched)


def test_messages_to_the_health_that_do_not_come_are_bounded(strict: Client, wait_until: Any) -> None:
    def ask() -> Any:
        call = strict.channel.stream_unary("/grpc.health.v1.Health/Check", lambda m: m)
        return call.future(waiting(release), timeout=30)

    release = threading.Event()
    stalled = [ask() for _ in range(17)]
    wait_until(lambda: any(call.done() for call in stalled))
    assert [call.code() for call in stalled if call.done()] == [Code.RESOURCE_EXHAUSTED]
    release.set()
    assert all(call.exception() is not None for call in stalled)
    assert checked(strict, "").status == 1


def test_probes_that_say_nothing_keep_no_other_one_waiting_for_long(
    strict: Client, monkeypatch: pytest.MonkeyPatch, wait_until: Any
) -> None:
    monkeypatch.setattr("muntin.serving.grpc._PROBE_S", 0.2)
    release = threading.Event()
    for method in ("Check", "Watch"):
        call = strict.channel.stream_unary(f"/grpc.health.v1.Health/{method}", lambda m: m)
        stalled = [call.future(waiting(release), timeout=30) for _ in range(16)]
        wait_until(lambda: all(call.done() for call in stalled), 5)  # noqa: B023 - it is over before the next one
        assert checked(strict, "").status == 1
    release.set()


def test_only_statistics_are_given_without_a_name(client: Client) -> None:
    assert client.code("ModelMetadata") is Code.NOT_FOUND
    assert client.code("ModelConfig") is Code.NOT_FOUND
    assert client.code("ModelInfer", infer(model="")) is Code.NOT_FOUND
    assert [model.name for model in client("ModelStatistics").model_stats] == ["pixels"]
    assert client("ModelMetadata", messages.ModelMetadataRequest(name="pixels")).name == "pixels"


# ---- what becomes of the server


def frames_of(path: bytes) -> bytes:
    """A connection's first bytes, and the head of a call."""

    def field(name: bytes, value: bytes) -> bytes:
        return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

    head = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"x", b"te": b"trailers"}
    block = b"".join(field(*entry) for entry in {**head, b"content-type": b"application/grpc"}.items())
    settings = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    return settings + len(block).to_bytes(3, "big") + b"\1\4" + (1).to_bytes(4, "big") + block


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # grpc's own task ends in what it met
def test_a_call_whose_path_is_no_text_ends_the_face_for_nobody(path: Path, wait_until: Any) -> None:
    told: list[str] = []
    with Server(path, ServeConfig(http_port=0, grpc_port=0, threads=1, name="pixels"), notify=told.append) as server:
        assert server.grpc_port is not None
        for number in (1, 2):
            with socket.create_connection(("127.0.0.1", server.grpc_port), timeout=30) as connection:
                connection.sendall(frames_of(b"/inference.GRPCInferenceService/\xff\xfe"))
                wait_until(lambda: sum("is begun again" in line for line in told) == number)  # noqa: B023
            client = Client(server.grpc_port)
            wait_until(lambda: free(client))  # noqa: B023
            assert client("ModelInfer", infer()).raw_output_contents[0] == labels(1)
            client.channel.close()


def test_who_is_told_twice_to_end_waits_for_nothing(path: Path, wait_until: Any) -> None:
    release = threading.Event()
    with served(path, drain_seconds=60.0) as (server, client):
        asked = client.stalled("ModelInfer", release)
        wait_until(lambda: server._grpc is not None and server._grpc._calls == 1)
        stop = threading.Thread(target=server.stop)
        stop.start()
        wait_until(lambda: server._served)
        assert stop.is_alive()
        server._tell_to_end(again=True)
        stop.join(30)
        assert not stop.is_alive()
        assert (server.cut_off, server.hurried) == (1, True)
        release.set()
        with pytest.raises(grpc.RpcError):
            asked.result()


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6")
def test_who_was_given_no_address_of_ipv6_answers_nobody_there(path: Path) -> None:
    with served(path, host="0.0.0.0") as (server, client):  # noqa: S104
        assert client("ModelInfer", infer()).raw_output_contents[0] == labels(1)
        for name in ("ModelInfer", "ServerLive", "ModelStreamInfer"):
            with grpc.insecure_channel(f"[::1]:{server.grpc_port}") as channel:
                call = channel.stream_stream(f"/{SERVICE}/{name}", lambda m: m.SerializeToString())
                with pytest.raises(grpc.RpcError) as caught:
                    list(call(iter([infer()]), timeout=30))
            assert caught.value.code() in (Code.PERMISSION_DENIED, Code.UNAVAILABLE)  # the latter where grpc listens to IPv4 alone


@pytest.mark.skipif(not Path("/dev/fd").exists() or not hasattr(socket, "AF_UNIX"), reason="open connections are found there")
def test_a_connection_is_found_behind_a_socket_with_a_name(tmp_path: Path) -> None:
    """A service manager makes one of a server's standard output."""

    class Peer:
        def __init__(self, name: str) -> None:
            self.name = name

        def peer(self) -> str:
            return self.name

    with socket.socket(socket.AF_UNIX) as journal, socket.socket(socket.AF_UNIX) as output:
        journal.bind(str(tmp_path / "journal"))
        journal.listen()
        output.connect(str(tmp_path / "journal"))
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port), timeout=10) as client, listening.accept()[0]:
                grpc_face._hang_up(Peer(f"ipv4:127.0.0.1:{client.getsockname()[1]}"), port)
                assert client.recv(1) == b""


def test_of_a_stream_an_answer_that_is_not_taken_ends_the_connection(path: Path, wait_until: Any) -> None:
    """However long a stream may stand still."""
    with served(path, bounds=Bounds(idle_seconds=600.0, body_seconds=1.0, connections=1)) as (_, client):
        deaf = Client(client.port, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16))
        release = threading.Event()
        found = deaf.stream(then_nothing([infer(n, side=512) for n in range(64)], release))
        next(found)
        assert not free(client)
        wait_until(lambda: free(client))
        release.set()
        with pytest.raises(grpc.RpcError):
            list(found)
        deaf.channel.close()


def test_an_answer_that_no_message_holds_is_refused() -> None:
    data = np.broadcast_to(np.zeros(1, np.uint8), (1 << 31,))
    response = InferResponse(model="m", version="1", id="", outputs=(InferOutput(name="labels", data=data),))
    with pytest.raises(ProtocolError, match=r"2,147,483,648 bytes is longer than a gRPC message") as caught:
        grpc_face._check_length(response)
    assert caught.value.status == 413


def test_what_names_no_output_goes_out_in_binary() -> None:
    signature = Signature(task="segment", channels=3, classes=tuple(ClassInfo(name=name, color=(0, 0, 0)) for name in "abc"))
    request = infer()
    del request.outputs[:]
    wanted = read_wanted(decode_infer(request, Limits()), signature, (1, 8, 8, 3))
    assert (wanted.names, wanted.binary) == (("labels", "scores"), True)
    assert read_wanted(decode_infer(request, Limits()), signature, (8, 4096, 4096, 3)).binary  # far more than JSON carries
