"""The gRPC server over a socket: stalled, cancelled and hostile calls, restarts, the end. `test_calls` has what needs no socket."""

from __future__ import annotations

import gzip
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from muntin.serving.config import Bounds
from muntin.serving.grpc.server import GrpcServer
from muntin.serving.inference.executor import Executor
from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.grpc_codec import METHODS, SERVICE
from muntin.serving.protocol.wire import parse
from serving_parts import has_ipv6, listens
from serving_protocols import label_request, labels_of

Code = grpc.StatusCode
CALLS = 4
"""Calls that a server of these tests answers at once."""


class Client:
    """Every method of the service, by its name."""

    def __init__(self, server: Any, host: str = "127.0.0.1") -> None:
        self.server, self.port = server, server.grpc_port
        self.channel = grpc.insecure_channel(f"{host}:{self.port}", options=[("grpc.use_local_subchannel_pool", 1)])

    def __call__(self, name: str, request: Any = None, *, timeout: float | None = 30.0) -> Any:
        return self.begin(name, request, timeout=timeout).result()

    def begin(self, name: str, request: Any = None, *, timeout: float | None = 60.0) -> Any:
        """Begin a call, and return it."""
        method = next(method for method in METHODS if method.name == name)
        message = method.request() if request is None else request
        call = self.channel.unary_unary(f"/{SERVICE}/{name}", lambda m: m.SerializeToString(), method.response.FromString)
        return call.future(message, timeout=timeout)

    def stream(self, requests: Iterator[Any]) -> Any:
        answer = messages.ModelStreamInferResponse.FromString
        return self.channel.stream_stream(f"/{SERVICE}/ModelStreamInfer", lambda m: m.SerializeToString(), answer)(requests, timeout=30.0)

    def stalled(self, name: str, release: threading.Event) -> Any:
        """A call whose message does not arrive."""
        return self.channel.stream_unary(f"/{SERVICE}/{name}", lambda m: m).future(then_nothing([], release), timeout=30.0)

    def code(self, name: str, request: Any = None) -> Any:
        with pytest.raises(grpc.RpcError) as caught:
            self(name, request)
        return caught.value.code()


def then_nothing(requests: list[Any], release: threading.Event) -> Iterator[Any]:
    yield from requests
    release.wait(30)


Serve = Callable[..., AbstractContextManager[tuple[Any, Client]]]


@pytest.fixture(scope="module")
def served(make_server: Any, write_pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """`with served(**settings) as (server, client)`."""
    path = write_pixels(tmp_path_factory.mktemp("serving") / "pixels")

    @contextmanager
    def serve(**settings: Any) -> Iterator[tuple[Any, Client]]:
        with make_server(path, **settings) as server:
            client = Client(server)
            yield server, client
            client.channel.close()

    return serve


@pytest.fixture(scope="module")
def strict(served: Serve) -> Iterator[Client]:
    """Client of a server that answers few calls at once, with short timeouts."""
    with served(bounds=Bounds(connections=CALLS, body_seconds=1.5)) as (_, client):
        yield client


@pytest.fixture(scope="module")
def client(served: Serve) -> Iterator[Client]:
    with served() as (_, client):
        yield client


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


def test_stalled_calls_leave_the_server_alive(strict: Client) -> None:
    release, hostile = threading.Event(), Client(strict.server)
    calls = [hostile.stalled("ModelInfer", release) for _ in range(2 * CALLS)]
    assert hostile.stalled("ServerLive", release).code() is Code.OK
    assert strict("ServerLive", timeout=2.0).live
    assert strict("ServerReady", timeout=2.0).ready
    assert strict.code("ModelInfer", label_request()) is Code.RESOURCE_EXHAUSTED
    codes = [call.code() for call in calls]
    assert codes.count(Code.RESOURCE_EXHAUSTED) == codes.count(Code.DEADLINE_EXCEEDED) == CALLS
    assert strict.stalled("RepositoryIndex", release).details() == "the request did not arrive in time"
    assert strict("ModelInfer", label_request()).raw_output_contents[0] == labels_of(1)
    release.set()
    assert strict.stalled("ModelInfer", release).code() is Code.INVALID_ARGUMENT  # ended without a message
    hostile.channel.close()


def test_idle_connection_is_closed(served: Serve) -> None:
    with served(bounds=Bounds(idle_seconds=0.5)) as (_, client):
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as idle:
            idle.sendall(PREFACE + frame(4, 0, 0, b""))
            while idle.recv(4096):
                pass
        assert client("ServerLive").live


def test_streams_end_when_the_server_stops(served: Serve, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    release = threading.Event()
    with served(drain_seconds=60.0) as (server, client), slow(monkeypatch, 0.3) as begun:
        idle = client.stream(then_nothing([label_request(1)], release))
        assert next(idle).infer_response.raw_output_contents[0] == labels_of(1)
        busy = client.stream(then_nothing([label_request(2), label_request(3)], release))
        wait_until(lambda: len(begun) == 2)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 60  # the time for draining
        assert server.cut_off == 0
        with pytest.raises(grpc.RpcError) as caught:
            next(idle)
        assert (caught.value.code(), "shutting down" in caught.value.details()) == (Code.UNAVAILABLE, True)
        assert next(busy).infer_response.raw_output_contents[0] == labels_of(2)  # requests that have arrived are answered
        with pytest.raises(grpc.RpcError):
            list(busy)
        release.set()


def test_cancelled_call_during_shutdown_is_not_cut_off(served: Serve, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    with served(drain_seconds=20.0) as (server, client), slow(monkeypatch, 0.6) as begun:
        call = client.begin("ModelInfer", label_request(1))
        wait_until(lambda: len(begun) == 1)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        time.sleep(0.2)
        call.cancel()
        stopping.join(20)
        assert server.cut_off == 0


def test_call_longer_than_drain_time_is_cut_off(served: Serve, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    before = set(threading.enumerate())
    with served(drain_seconds=0.3) as (server, client), slow(monkeypatch, 1.5) as begun:
        call = client.begin("ModelInfer", label_request(1))
        wait_until(lambda: len(begun) == 1)
        server.stop()
        assert server.cut_off == 1
        with pytest.raises(grpc.RpcError):
            call.result()
    # The engine ends the batch for which nobody waits any more; an exception in its thread would fail this test.
    wait_until(lambda: not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("muntin-engine")])


def test_unread_answers_count_as_held(strict: Client, fetch: Any, wait_until: Any) -> None:
    """Until their connection ends."""

    def held() -> float:
        return float(re.findall(r"\nmuntin_body_bytes (\S+)", fetch(strict.server, "/metrics")[2].decode())[0])

    assert held() == 0
    with socket.create_connection(("127.0.0.1", strict.port), timeout=30) as connection:
        connection.sendall(PREFACE + frame(4, 0, 0, bytes([0, 4, 0, 0, 0, 0])) + frame(4, 1, 0, b""))  # a window of no bytes
        for number in range(3):
            request = label_request(side=512)
            request.raw_input_contents[0] = bytes(512 * 512 * 3)  # packed, it fits into one frame
            packed = gzip.compress(request.SerializeToString())
            connection.sendall(head_frame(b"/%s/ModelInfer" % SERVICE.encode(), 2 * number + 1))
            connection.sendall(frame(0, 1, 2 * number + 1, b"\1" + len(packed).to_bytes(4, "big") + packed))
        wait_until(lambda: held() > 3 * 512 * 512)
        assert strict("ModelInfer", label_request()).raw_output_contents[0] == labels_of(1)
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


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_message_above_the_limit(served: Serve) -> None:
    """The client is a process of its own: the message is large there."""
    with served(bounds=Bounds(held_bytes=50_000, body_bytes=100_000)) as (_, client):
        assert client.code("ModelInfer", label_request(side=300)) is Code.RESOURCE_EXHAUSTED
        before = peak = resident()
        command = [sys.executable, "-c", BOMB, str(client.port), str(100 << 20)]  # which is short enough packed
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as hostile:
            while hostile.poll() is None:
                peak = max(peak, resident())
                time.sleep(0.001)
            assert hostile.stdout is not None
            assert hostile.stdout.read().strip() == "RESOURCE_EXHAUSTED"
        assert peak - before < 64 << 20
        assert client("ModelInfer", label_request()).raw_output_contents[0] == labels_of(1)


def test_waiting_request_keeps_only_its_tensors(client: Client, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    """Neither the message nor its bytes are kept: a request would hold four times what it counts as."""
    read: list[Any] = []

    def reads(wire: bytes, kind: Any, limits: Any) -> Any:
        read.extend((wire, message := parse(wire, kind, limits)))
        return message

    with slow(monkeypatch, 0.3) as begun:
        monkeypatch.setattr("muntin.serving.grpc.servicer.parse", reads)
        answers = client.stream(iter([label_request(side=64)]))
        call = client.begin("ModelInfer", label_request(side=64))
        wait_until(lambda: begun and len(read) == 4)
        kept = [sys.getrefcount(read[n]) for n in range(len(read))]
        alone = sys.getrefcount([object()][0]) + 1  # in the list here
        assert call.result().raw_output_contents[0] == next(answers).infer_response.raw_output_contents[0] == labels_of(1, 64)
    assert kept == [alone] * 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
@pytest.mark.usefixtures("uncollected")
def test_refused_messages_are_freed(client: Client) -> None:
    """Without the cyclic garbage collector, which may take minutes to run."""
    wrong = messages.ModelInferRequest(model_name="pixels", raw_input_contents=[bytes(8 << 20)])
    wrong.inputs.add(name="images", datatype="UINT8", shape=[1, 2048, 2048, 2])
    sizes = []
    for _ in range(20):
        assert client.code("ModelInfer", wrong) is Code.INVALID_ARGUMENT
        sizes.append(resident())
    assert sizes[-1] - sizes[4] < 64 << 20


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


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # grpc's task ends with the error
def test_paths_that_are_not_utf8(served: Serve, fetch: Any, wait_until: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends grpc's server, and another one is started. Ended ones are not kept, and calls are answered afterwards."""
    monkeypatch.setattr("muntin.serving.grpc.server._GRACE_S", 0.2)
    monkeypatch.setattr("muntin.serving.grpc.server._POLL_S", 0.02)
    faces, told, kept = list[Any](), list[str](), 0
    start = GrpcServer.start
    monkeypatch.setattr(GrpcServer, "start", lambda self, *addresses: (faces.append(self), start(self, *addresses))[1])
    with served(notify=told.append) as (server, client):
        (face,) = faces
        for number in range(1, 7):

            def restarted() -> bool:
                with suppress(OSError), socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
                    connection.sendall(PREFACE + frame(4, 0, 0, b"") + head_frame(b"/inference.GRPCInferenceService/\xff\xfe", 1))
                return face._restarts >= number  # noqa: B023

            wait_until(restarted)
            kept = max(kept, len(face._ending))
        assert kept <= 4
        counted = 0
        while counted != face._restarts:  # calls that were sent and not yet read end a server, too
            counted = face._restarts
            time.sleep(0.5)
        assert sum("is begun again" in line for line in told) == counted
        assert f"muntin_grpc_restarts_total {counted}.0" in fetch(server, "/metrics")[2].decode()
        wait_until(lambda: free(client))
        assert client("ModelInfer", label_request()).raw_output_contents[0] == labels_of(1)


def test_second_stop_cuts_off(served: Serve, wait_until: Any) -> None:
    release = threading.Event()
    with served(drain_seconds=60.0) as (server, client):
        call = client.stalled("ModelInfer", release)
        time.sleep(0.3)  # until the call has reached the server
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


@pytest.mark.skipif(not has_ipv6(), reason="there is no IPv6")
def test_ipv6_without_ipv6_address(served: Serve) -> None:
    with served(host="0.0.0.0") as (server, client):  # noqa: S104
        assert client("ModelInfer", label_request()).raw_output_contents[0] == labels_of(1)
        for name in ("ModelInfer", "ServerLive", "ModelStreamInfer"):
            with grpc.insecure_channel(f"[::1]:{server.grpc_port}") as channel:
                call = channel.stream_stream(f"/{SERVICE}/{name}", lambda m: m.SerializeToString())
                with pytest.raises(grpc.RpcError) as caught:
                    list(call(iter([label_request()]), timeout=30))
            assert caught.value.code() in (Code.PERMISSION_DENIED, Code.UNAVAILABLE)  # the latter where grpc listens to IPv4 alone
