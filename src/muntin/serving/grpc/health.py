"""The service `grpc.health.v1.Health` for Kubernetes (`grpc:` probes), Envoy and gRPC clients.

A client names the server (""), the model or the inference service. No token is needed, so these calls have limits of their own.
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
"""Interval at which the state is read for watching calls, seconds."""
MAX_CHECKS, MAX_WATCHES = 16, 128
"""Maximum number of calls in progress, and of watching calls."""
MESSAGE_TIMEOUT_S = 2.0
"""Seconds for the message of a call, which has a few bytes."""


class Health:
    """The methods of the service. `names`: those known beside the server's, "". `stopping`: set when the server shuts down."""

    def __init__(self, ready: Callable[[], bool], names: tuple[str, ...], calls: Calls, limits: Limits, stopping: asyncio.Event) -> None:
        self._ready, self._names, self._calls, self._limits = ready, frozenset(("", *names)), calls, limits
        self._stopping = stopping
        self._checks = CallSlots(MAX_CHECKS, "calls for its health", calls.unread)
        self._watches = CallSlots(MAX_WATCHES, "calls that watch its health", calls.unread)

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the handlers of both methods."""
        methods = {"Check": self._check, "Watch": self._watch}
        handlers = {name: self._calls.handler(name, method, needs_token=False) for name, method in methods.items()}
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
