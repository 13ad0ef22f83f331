"""The short way of inference, where it goes wrong in ways that nobody foresaw."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import pytest

from muntin.serving.http import HttpFace
from muntin.serving.metrics import Metrics
from muntin.serving.protocol import InferResponse, Limits
from muntin.serving.service import Answered

HEAD = json.dumps(
    {"inputs": [{"name": "images", "datatype": "UINT8", "shape": [1, 1, 1, 3], "parameters": {"binary_data_size": 3}}]}
).encode()
SCOPE: dict[str, Any] = {
    "type": "http", "method": "POST", "path": "/v2/models/m/infer",
    "headers": [(b"inference-header-content-length", b"%d" % len(HEAD))],
}  # fmt: skip


class Broken:
    """A service with a fault in it: at once, or in what it answers."""

    def __init__(self, *, at_once: bool) -> None:
        self.metrics, self.at_once = Metrics(), at_once

    def submit(self, request: Any, *, done: Any, **_: Any) -> Any:
        if self.at_once:
            raise ZeroDivisionError("a secret")
        nonsense: Any = "no outputs"
        done(Answered(response=InferResponse(model="m", version="1", id="", outputs=nonsense), queued=0, computed=0, total=0, batch_rows=1))
        return lambda: None


@pytest.mark.parametrize("at_once", [True, False])
def test_a_fault_is_answered_and_reported_and_goes_no_further(at_once: bool) -> None:
    async def run() -> tuple[list[Any], list[BaseException], Broken]:
        replies: list[Any] = []
        reported: list[BaseException] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        service = Broken(at_once=at_once)
        face = HttpFace(cast(Any, service), cast(Any, None), cast(Any, None), limits=Limits(), tokens=(), log=None)
        face.begin(SCOPE, HEAD + b"abc", 0.0, lambda *reply: replies.append(reply))()  # the client goes, and changes nothing any more
        return replies, reported, service

    replies, reported, service = asyncio.run(run())
    ((status, _, parts),) = replies
    assert status == 500
    assert b"secret" not in b"".join(parts)
    assert len(reported) == 1
    assert dict(service.metrics.requests) == {("http", "failed"): 1}
