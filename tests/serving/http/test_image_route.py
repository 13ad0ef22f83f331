"""The picture route: cancelled pictures, limits, versions. What pictures give is tested in `test_predict`."""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muntin.serving.http.image_route import CODERS, ImageRoute
from muntin.serving.inference.executor import Work
from muntin.serving.inference.metrics import Metrics
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.slot import Slot

TILES = 9
"""Tiles of a picture of 20 pixels a side, in tiles of 8 with 2 shared."""
BODY_BYTES = 3 * 100 * 100


class BlockedService:
    """The parts of a service that the route needs; calls wait until `free` is set."""

    name, max_pixels, keep = "m", 10_000, None

    def __init__(self, slot: Slot) -> None:
        self.slot, self.calls, self.cancelled = slot, 0, 0
        self.metrics = Metrics()
        self.entered, self.free = asyncio.Event(), asyncio.Event()

    def lease_to_compute(self, model: str, version: str | None) -> Any:
        return self.slot.lease(version)

    async def compute(self, inputs: Any, group: Any, lease: Any, **_: Any) -> tuple[Any, Work]:
        self.calls += 1
        self.entered.set()
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return group.compute(lease.version.session, inputs), Work(inputs=inputs, lease=lease, by=lease.version)


class FallbackService(BlockedService):
    """Version 2 steps in for version 1 after `after` calls; if `always`, version 1 also steps in for version 2."""

    def __init__(self, slot: Slot, versions: dict[str, Any], *, after: int, always: bool) -> None:
        super().__init__(slot)
        self.versions, self.after, self.always = versions, after, always

    async def compute(self, inputs: Any, group: Any, lease: Any, **_: Any) -> tuple[Any, Work]:
        self.calls += 1
        name = lease.version.name
        falls = self.calls > self.after if name == "1" else self.always
        by = self.versions[{"1": "2", "2": "1"}[name]] if falls else lease.version
        return group.compute(by.session, inputs), Work(inputs=inputs, lease=lease, by=by)


@pytest.fixture
def slot(write_version: Any, in_process: ArtifactLoader, tmp_path: Path) -> Slot:
    slot = Slot("m", in_process, rollout=Rollout())
    slot.load(write_version(tmp_path / "1"), "1")
    return slot


def picture(side: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def leases(slot: Slot) -> int:
    assert slot.current is not None
    return slot.current.leases


async def cancelled(*tasks: asyncio.Task[Any]) -> None:
    """Cancel the tasks and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=60)
    assert all(task.cancelled() for task in tasks)


def test_cancelled_between_tiles(slot: Slot) -> None:
    async def ask() -> None:
        service: Any = BlockedService(slot)
        route = ImageRoute(service, body_bytes=BODY_BYTES, tile=8)
        task = asyncio.create_task(route.answer(picture(), {}))
        await asyncio.wait_for(service.entered.wait(), 60)
        assert (route.in_work, leases(slot)) == (1, 1)
        await cancelled(task)
        assert (service.calls, service.cancelled, route.in_work, leases(slot)) == (1, 1, 0, 0)
        service.free.set()
        assert (await route.answer(picture(), {})).media_type == "image/png"
        assert service.calls == 1 + TILES
        route.close()

    asyncio.run(ask())


@pytest.mark.parametrize(("tile", "after"), [(64, 0), (8, 2)])
@pytest.mark.parametrize("output", ["json", "overlay", "mask", "labels"])
def test_fallback_with_other_classes(shelf: Any, signature_of: Any, tile: int, after: int, output: str) -> None:
    """The version that steps in computes all of the picture."""
    shelf.signatures["2"] = signature_of(classes=("sea", "field", "roof", "road", "tree"))  # one more
    slot, beside = Slot("m", shelf, rollout=Rollout()), Slot("m", shelf, rollout=Rollout())
    versions = {"1": slot.load(Path("1"), "1"), "2": beside.load(Path("2"), "2")}

    async def ask(*, always: bool) -> Any:
        service: Any = FallbackService(slot, versions, after=after, always=always)
        route = ImageRoute(service, body_bytes=BODY_BYTES, tile=tile)
        return await route.answer(picture(), {"output": output}), service.calls

    answer, calls = asyncio.run(ask(always=False))
    assert calls == after + 1 + (1 if tile == 64 else TILES)
    assert answer.version == "2"
    if output == "json":
        assert len(json.loads(answer.content)["classes"]) == 5
    with pytest.raises(RefusedRequestError, match="change faster"):
        asyncio.run(ask(always=True))


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [({"channels": 5}, "1, 2, 3 or 4"), ({"channels": 2, "task": "restore", "classes": ()}, "1, 3 or 4"), ({"channels": 2}, None)],
)
def test_models_without_pictures(shelf: Any, signature_of: Any, changes: dict[str, Any], allowed: str | None) -> None:
    shelf.signatures["m"] = signature_of(**changes)
    slot = Slot("m", shelf, rollout=Rollout())
    slot.load(Path("m"), "1")
    service: Any = BlockedService(slot)
    text = f"the model has {changes['channels']} channels, and /predict is for models of {allowed}: send tensors (/v2/models/m/infer)"
    with pytest.raises(ProtocolError, match=re.escape(text) if allowed else "bytes that are no PNG") as error:
        asyncio.run(ImageRoute(service, body_bytes=BODY_BYTES).answer(b"not looked at", {}))
    assert error.value.status == 400


def test_cancelled_while_decoding(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder cannot be stopped: the picture counts until its thread has ended, unless it is cancelled twice."""
    decoding, go_on = threading.Semaphore(0), threading.Event()

    def decode(*_: Any, **__: Any) -> Any:
        decoding.release()
        assert go_on.wait(60)
        return np.zeros((8, 8, 3), np.uint8)

    monkeypatch.setattr("muntin.serving.http.image_route.decode_image", decode)

    async def ask() -> None:
        service: Any = BlockedService(slot)
        route = ImageRoute(service, body_bytes=BODY_BYTES)
        once, twice = (asyncio.create_task(route.answer(picture(), {})) for _ in range(2))
        for _ in range(2):
            assert await asyncio.to_thread(decoding.acquire, timeout=60)
        once.cancel()
        twice.cancel()
        await asyncio.sleep(0.05)
        assert (route.in_work, leases(slot)) == (2, 2)
        await cancelled(twice)
        assert (route.in_work, leases(slot)) == (1, 1)
        go_on.set()
        await cancelled(once)
        assert (service.calls, route.in_work, leases(slot)) == (0, 0, 0)
        route.close()

    asyncio.run(ask())


@pytest.mark.parametrize(("content", "status"), [(picture(101), 413), (b"x", 400)])
def test_status_of_an_unusable_picture(slot: Slot, content: bytes, status: int) -> None:
    async def ask() -> None:
        service: Any = BlockedService(slot)
        route = ImageRoute(service, body_bytes=BODY_BYTES)
        with pytest.raises(ProtocolError) as caught:
            await route.answer(content, {})
        assert (caught.value.status, route.in_work, leases(slot)) == (status, 0, 0)

    asyncio.run(ask())


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("make", [lambda: b"no picture" * 10, lambda: picture(101), lambda: picture(50)[:-30]])
def test_memory_of_a_refused_picture(slot: Slot, make: Callable[[], bytes]) -> None:
    """It is freed without the cyclic collector."""
    content = make()

    async def ask() -> None:
        service: Any = BlockedService(slot)
        try:
            await ImageRoute(service, body_bytes=BODY_BYTES).answer(content, {})
        except ProtocolError:
            return
        pytest.fail("the picture was accepted")

    before, end = sys.getrefcount(content), time.monotonic() + 60
    asyncio.run(ask())
    while (after := sys.getrefcount(content)) > before and time.monotonic() < end:
        time.sleep(0.001)  # the thread that answered lets go of it afterwards
    assert after <= before


def test_cancelled_while_waiting_for_a_decoder(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def count(*_: Any, **__: Any) -> int:
        assert go_on.wait(60)
        return 64

    monkeypatch.setattr("muntin.serving.http.image_route.pixel_count", count)

    async def ask() -> None:
        service: Any = BlockedService(slot)
        route = ImageRoute(service, body_bytes=BODY_BYTES)
        *decoding, waiting = (asyncio.create_task(route.answer(picture(8), {})) for _ in range(CODERS + 1))
        await asyncio.sleep(0.05)
        await cancelled(waiting)
        assert route.in_work == CODERS
        go_on.set()
        await cancelled(*decoding)
        route.close()

    asyncio.run(ask())


def test_room_for_pixels(slot: Slot) -> None:
    async def ask() -> None:
        service: Any = BlockedService(slot)
        route = ImageRoute(service, body_bytes=BODY_BYTES, tile=64)
        tasks = [asyncio.create_task(route.answer(picture(100), {})) for _ in range(2)]
        while service.calls < 2:
            await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(route.answer(picture(100), {})))
        while not route._turn.locked():
            await asyncio.sleep(0.01)
        tasks.append(asyncio.create_task(route.answer(picture(70), {})))
        await asyncio.sleep(0.05)
        assert service.calls == 2  # the last would fit, and waits behind the third
        await cancelled(tasks[2])
        service.free.set()
        assert [(await task).media_type for task in (tasks[0], tasks[1], tasks[3])] == ["image/png"] * 3
        assert service.calls == 3 * 4  # tiles, none of the cancelled picture
        assert (route._pixels, route.in_work, leases(slot)) == (0, 0, 0)
        route.close()

    asyncio.run(ask())


def test_picture_larger_than_the_room_alone(slot: Slot) -> None:
    async def ask() -> None:
        service: Any = BlockedService(slot)
        service.free.set()
        route = ImageRoute(service, body_bytes=BODY_BYTES, tile=8)
        route._max_pixels = 1
        answers = await asyncio.gather(*(route.answer(picture(), {}) for _ in range(3)))
        assert [answer.media_type for answer in answers] == ["image/png"] * 3

    asyncio.run(ask())


def test_number_of_pictures_in_work(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.serving.http.image_route.MAX_PICTURES", 2)

    async def ask() -> None:
        service: Any = BlockedService(slot)
        route = ImageRoute(service, body_bytes=BODY_BYTES, tile=8)
        tasks = [asyncio.create_task(route.answer(picture(), {})) for _ in range(2)]
        while route.in_work < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(RefusedRequestError, match="2 pictures are in the works"):
            await route.answer(picture(), {})
        assert service.metrics.refused == {"pictures": 1}
        service.free.set()
        assert [answer.media_type for answer in await asyncio.gather(*tasks)] == ["image/png"] * 2

    asyncio.run(ask())


def test_picture_for_a_classifier_in_one_piece(write_pixels: Any, in_process: ArtifactLoader, tmp_path: Path) -> None:
    """It is not larger than an inference request could be."""
    slot = Slot("m", in_process, rollout=Rollout())
    slot.load(write_pixels(tmp_path / "1", task="classify"), "1")

    async def ask() -> None:
        service: Any = BlockedService(slot)
        service.free.set()
        route = ImageRoute(service, body_bytes=3 * 50 * 50)
        with pytest.raises(
            ProtocolError, match=r"2,601 pixels, .* in one piece: send it smaller, of at most 2,500 \(--max-body\)"
        ) as caught:
            await route.answer(picture(51), {})
        assert caught.value.status == 413
        assert (await route.answer(picture(50), {})).media_type == "application/json"
        assert (service.calls, leases(slot)) == (1, 0)

    asyncio.run(ask())
