"""The HTTP application over a service that answers at once, and a client that speaks ASGI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest

from muntin.serving.config import Bounds
from muntin.serving.http.app import HttpApp
from muntin.serving.inference.metrics import Metrics
from muntin.serving.inference.service import Answered
from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.protocol.messages import InferResponse, Limits

TENSOR = {"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 3]}
BODY = json.dumps({"inputs": [TENSOR]}).encode()
INFER = "/v2/models/m/infer"


class Service:
    """Answers with no tensor. `seconds`: that it takes. `error`: raised in place of an answer."""

    name, ready, objective = "m", True, None

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.seconds = 0.0
        self.error: Exception | None = None
        self.requests, self.cancelled = 0, 0

    async def infer(self, request: Any, *, model: str, version: str | None, arrived: float, encode: Any) -> Answered:
        self.requests += 1
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        response = InferResponse(model="m", version="1", id=request.id, outputs=(), parameters={})
        return Answered(response=response, read=0, queued=0, computed=0, total=0, batch_rows=1, encoded=encode(response))


class Lines:
    """An access log that keeps its entries."""

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []

    def write(self, **entry: Any) -> None:
        self.entries.append(entry)


class Harness:
    """An application with its service, memory budget and access log."""

    def __init__(self, ask: Any, **bounds: Any) -> None:
        self._ask, self.service, self.log = ask, Service(), Lines()
        self.budget = MemoryBudget(Bounds(**bounds))
        self.app = HttpApp(
            cast(Any, self.service),
            cast(Any, None),
            cast(Any, None),
            limits=Limits(),
            budget=self.budget,
            tokens=(),
            log=cast(Any, self.log),
        )

    async def ask(
        self, path: str, *pieces: bytes, method: str = "POST", headers: Any = (), stays: bool = True
    ) -> tuple[int, dict[str, str], bytes]:
        """The answer to a request whose body comes in these pieces. `stays`: the client waits for the answer."""
        names = {name for name, _ in headers}
        length = [] if names & {b"content-length", b"transfer-encoding"} or not pieces else [(b"transfer-encoding", b"chunked")]
        answer: tuple[int, dict[str, str], bytes] = await self._ask(self.app, method, path, pieces, [*headers, *length], stays=stays)
        return answer


@pytest.fixture
def harness(ask_app: Any) -> Callable[..., Harness]:
    """`harness(**bounds)`."""
    return partial(Harness, ask_app)


@pytest.fixture(scope="session")
def infer_body() -> bytes:
    return BODY
