"""The service `grpc.health.v1.Health`, by which Kubernetes (`grpc:` probes), Envoy and gRPC clients ask for a server's health.

A client names the server (""), the model or the inference service. No token is needed, so the number of calls is bounded apart from that of
other calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import grpc

from muntin.serving.grpc.calls import Calls, CallSlots, RpcCall
from muntin.serving.protocol import open_inference_pb2 as messages
from muntin.serving.protocol.messages import Limits, ProtocolError, RefusedRequestError, shown
from muntin.serving.protocol.wire import parse

SERVICE = "grpc.health.v1.Health"
SERVING, NOT_SERVING, SERVICE_UNKNOWN = 1, 2, 3
POLL_S = 0.5
"""Interval at which the state is read for those that watch, seconds."""
MAX_CHECKS, MAX_WATCHES = 16, 128
"""Calls whose message is awaited or answered, and calls that watch, at once."""
MESSAGE_TIMEOUT_S = 2.0
"""Seconds that the message of a call may take: it has a few bytes, and comes with the call."""


class Health:
    """The methods of the service. `ready`: whether requests are answered. `names`: what may be asked for beside the server, "".

    `stopping`: set when the server shuts down, which ends watching.
    """

    def __init__(self, ready: Callable[[], bool], names: tuple[str, ...], calls: Calls, limits: Limits, stopping: asyncio.Event) -> None:
        self._ready, self._names, self._calls, self._limits = ready, frozenset(("", *names)), calls, limits
        self._stopping = stopping
        self._checks = CallSlots(MAX_CHECKS, "calls for its health", calls.unread)
        self._watches = CallSlots(MAX_WATCHES, "calls that watch its health", calls.unread)

    def handlers(self) -> grpc.GenericRpcHandler:
        """The handlers of both methods."""
        handler = self._calls.handler
        handlers = {
            "Check": handler("Check", self._check, needs_token=False),
            "Watch": handler("Watch", self._watch, needs_token=False),
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def _check(self, call: RpcCall) -> None:
        with self._checks.take():
            service = await self._service(call)
            if service not in self._names:
                names = ", ".join(map(shown, sorted(self._names)))
                raise ProtocolError(f"service {shown(service)}: there is {names}", status=404)
            await call.context.write(_encode(self._status(service)))

    async def _watch(self, call: RpcCall) -> None:
        """Send the state at once and after each change, until the server shuts down."""
        with self._checks.take():
            service = await self._service(call)
        with self._watches.take():
            sent = None
            while True:
                status = self._status(service)
                if status != sent:
                    await call.context.write(_encode(status))
                    sent = status
                if self._stopping.is_set():
                    raise RefusedRequestError("the server is shutting down: watch another one")
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), POLL_S)

    async def _service(self, call: RpcCall) -> str:
        request = parse(await self._calls.message(call, MESSAGE_TIMEOUT_S), messages.HealthCheckRequest, self._limits)
        return str(request.service)

    def _status(self, service: str) -> int:
        if service not in self._names:
            return SERVICE_UNKNOWN
        return SERVING if self._ready() else NOT_SERVING


def _encode(status: int) -> bytes:
    return messages.HealthCheckResponse(status=status).SerializeToString()
