"""`grpc.health.v1.Health`: what Kubernetes (`grpc:` probes), Envoy and gRPC's own clients ask a server's health by.

It is of the server (""), or of what it serves by its name.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from muntin.serving.health_pb2 import HealthCheckResponse
from muntin.serving.protocol import ProtocolError, shown

SERVICE = "grpc.health.v1.Health"
LOOK_S = 0.5
"""Between two looks for who watches."""
_SERVING, _NOT_SERVING, _SERVICE_UNKNOWN = 1, 2, 3


class Health:
    """`ready`: whether requests are answered. `names`: of what is asked for; "", the server as a whole, is one of them in any case."""

    def __init__(self, ready: Callable[[], bool], *names: str) -> None:
        self._ready, self._names = ready, frozenset(("", *names))
        self._ended = asyncio.Event()

    def end(self) -> None:
        """Nobody watches any more."""
        self._ended.set()

    def check(self, service: str) -> HealthCheckResponse:
        """The answer of the method Check. Raises ProtocolError 404 for a service that there is not."""
        state = self._state(service)
        if state == _SERVICE_UNKNOWN:
            raise ProtocolError(f"service {shown(service)}: there is {', '.join(map(shown, sorted(self._names)))}", status=404)
        return HealthCheckResponse(status=state)

    async def watch(self, service: str, tell: Callable[[HealthCheckResponse], Awaitable[object]]) -> None:
        """Tells the state at once and whenever it is another, as the method Watch does, until `end`."""
        told = None
        while True:
            state = self._state(service)
            if state != told:
                await tell(HealthCheckResponse(status=state))
                told = state
            if self._ended.is_set():
                return
            try:
                await asyncio.wait_for(self._ended.wait(), LOOK_S)
            except TimeoutError:
                continue

    def _state(self, service: str) -> int:
        if service not in self._names:
            return _SERVICE_UNKNOWN
        return _SERVING if self._ready() else _NOT_SERVING
