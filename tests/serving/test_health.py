"""gRPC's own health: its messages on the wire, and what is told to whom."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from muntin.serving import health
from muntin.serving.health import Health
from muntin.serving.health_pb2 import HealthCheckRequest, HealthCheckResponse
from muntin.serving.protocol import ProtocolError


def test_the_messages_are_the_protocols() -> None:
    assert HealthCheckRequest(service="m").SerializeToString() == b"\x0a\x01m"
    assert [HealthCheckResponse(status=state).SerializeToString() for state in range(4)] == [b"", b"\x08\x01", b"\x08\x02", b"\x08\x03"]
    assert HealthCheckResponse.ServingStatus.items() == [("UNKNOWN", 0), ("SERVING", 1), ("NOT_SERVING", 2), ("SERVICE_UNKNOWN", 3)]


def test_a_service_that_there_is_not_is_named() -> None:
    checked = Health(lambda: True, "m")
    assert checked.check("").status == checked.check("m").status == 1
    assert Health(lambda: False).check("").status == 2
    with pytest.raises(ProtocolError, match="'other': there is '', 'm'") as caught:
        checked.check("other")
    assert caught.value.status == 404


def test_who_watches_is_told_each_change_once_until_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "LOOK_S", 0.001)

    async def watch() -> list[int]:
        states, told = iter([True, True, False, False, True]), []
        watched = Health(lambda: next(states, True))

        async def tell(message: Any) -> None:
            told.append(message.status)
            if len(told) == 3:
                watched.end()

        await asyncio.wait_for(watched.watch("", tell), 20)
        return told

    assert asyncio.run(watch()) == [1, 2, 1]
