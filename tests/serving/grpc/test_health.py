"""gRPC's health service over a socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import grpc
import pytest

from muntin.serving.config import Bounds
from muntin.serving.grpc.health import MAX_CHECKS, MAX_WATCHES
from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.grpc_codec import SERVICE

SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3


Serve = Callable[..., AbstractContextManager[tuple[Any, grpc.Channel]]]


@pytest.fixture(scope="module")
def served(make_server: Any, write_pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Serve:
    """`with served(**settings) as (server, channel)`."""
    path = write_pixels(tmp_path_factory.mktemp("health") / "pixels")

    @contextmanager
    def serve(**settings: Any) -> Iterator[tuple[Any, grpc.Channel]]:
        with make_server(path, **settings) as server, grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            yield server, channel

    return serve


@pytest.fixture(scope="module")
def channel(served: Serve) -> Iterator[grpc.Channel]:
    with served(bounds=Bounds(connections=1)) as (_, channel):
        yield channel


def check(channel: grpc.Channel, service: str = "") -> int:
    call = channel.unary_unary("/grpc.health.v1.Health/Check", lambda m: m.SerializeToString(), messages.HealthCheckResponse.FromString)
    return int(call(messages.HealthCheckRequest(service=service), timeout=30).status)


def watch(channel: grpc.Channel, service: str = "") -> Any:
    call = channel.unary_stream("/grpc.health.v1.Health/Watch", lambda m: m.SerializeToString(), messages.HealthCheckResponse.FromString)
    return call(messages.HealthCheckRequest(service=service), timeout=60)


def stalled(channel: grpc.Channel, method: str, release: threading.Event, **options: Any) -> Any:
    """A call whose message does not arrive."""

    def requests() -> Iterator[bytes]:
        release.wait(30)
        yield from ()

    return channel.stream_unary(method, lambda m: m).future(requests(), timeout=30, **options)


def test_check_and_watch(served: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a token, and while all places for calls are taken."""
    with served(tokens=("secret",), bounds=Bounds(connections=1)) as (_, channel):
        release = threading.Event()
        busy = stalled(channel, f"/{SERVICE}/ModelMetadata", release, metadata=(("authorization", "Bearer secret"),))
        for service in ("", "pixels", SERVICE):
            assert check(channel, service) == SERVING
            assert next(watch(channel, service)).status == SERVING
        with pytest.raises(grpc.RpcError) as caught:
            check(channel, "other")
        assert (caught.value.code(), "'pixels'" in caught.value.details()) == (grpc.StatusCode.NOT_FOUND, True)
        assert next(watch(channel, "other")).status == SERVICE_UNKNOWN
        watching = watch(channel)
        assert next(watching).status == SERVING
        with monkeypatch.context() as patch:
            patch.setattr("muntin.serving.inference.service.Service.ready", property(lambda _: False))
            assert check(channel, "pixels") == NOT_SERVING
            assert next(watching).status == NOT_SERVING
        assert next(watching).status == SERVING
        release.set()
        assert busy.exception() is not None


def test_watches_end_when_the_server_stops(served: Serve) -> None:
    with served(drain_seconds=60) as (server, channel):
        watching = watch(channel)
        assert next(watching).status == SERVING
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 60  # the time for draining
        with pytest.raises(grpc.RpcError) as caught:
            list(watching)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.cut_off == 0


def test_watches_are_bounded(channel: grpc.Channel) -> None:
    watching = []
    for _ in range(MAX_WATCHES):  # one after the other: fewer may await their message at once
        watching.append(watch(channel))
        assert next(watching[-1]).status == SERVING
    with pytest.raises(grpc.RpcError) as caught:
        next(watch(channel))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert check(channel) == SERVING
    for call in watching:
        call.cancel()


def test_stalled_checks(channel: grpc.Channel, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    """They take the places of other checks, for a short time."""
    monkeypatch.setattr("muntin.serving.grpc.health.MESSAGE_TIMEOUT_S", 0.5)
    release = threading.Event()
    for method in ("Check", "Watch"):
        calls = [stalled(channel, f"/grpc.health.v1.Health/{method}", release) for _ in range(MAX_CHECKS + 1)]
        wait_until(lambda: all(call.done() for call in calls))  # noqa: B023 - it is over before the next one
        codes = [call.code() for call in calls]
        assert codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 1
        assert codes.count(grpc.StatusCode.DEADLINE_EXCEEDED) == MAX_CHECKS
        assert check(channel) == SERVING
    release.set()
