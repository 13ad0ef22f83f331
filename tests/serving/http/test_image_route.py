"""Pictures that nobody waits for any more. What pictures give is in `test_server`."""

from __future__ import annotations

import asyncio
import io
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muntin.serving.http.image_route import DECODERS, Pictures, _Room
from muntin.serving.inference.executor import Work
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError
from muntin.serving.telemetry.metrics import Metrics
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.slot import Slot

TILES = 9
"""Of a picture of 20 pixels a side, in tiles of 8 with 2 shared."""
BODY_BYTES = 3 * 100 * 100
"""Of a request for inference."""


class Stuck:
    """Of a service what pictures need of it; a call waits until it is let go."""

    name, max_pixels = "m", 10_000

    def __init__(self, slot: Slot) -> None:
        self.slot, self.calls, self.cancelled = slot, 0, 0
        self.metrics = Metrics()
        self.entered, self.free = asyncio.Event(), asyncio.Event()

    def lease_to_compute(self, model: str, version: str | None) -> Any:
        return self.slot.lease(version)

    async def compute(self, images: Any, lease: Any, **_: Any) -> tuple[Any, Work]:
        self.calls += 1
        self.entered.set()
        try:
            await self.free.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return lease.version.session(images), Work(images=images, lease=lease, by=lease.version)


class Fallen(Stuck):
    """Version 2 steps in for version 1 `after` so many calls; where `always`, version 1 for version 2, too."""

    def __init__(self, slot: Slot, versions: dict[str, Any], *, after: int, always: bool) -> None:
        super().__init__(slot)
        self.versions, self.after, self.always = versions, after, always

    async def compute(self, images: Any, lease: Any, *, labels: bool, **_: Any) -> tuple[Any, Work]:
        self.calls += 1
        asked = lease.version.name
        falls = self.calls > self.after if asked == "1" else self.always
        by = self.versions[{"1": "2", "2": "1"}[asked]] if falls else lease.version
        answer = by.session.labels(images) if labels else by.session(images)
        return answer, Work(images=images, lease=lease, by=by)


@pytest.fixture
def slot(write_version: Callable[..., Path], in_process: ArtifactLoader, tmp_path: Path) -> Slot:
    made = Slot("m", in_process, rollout=Rollout())
    made.load(write_version(tmp_path / "1"), "1")
    return made


def picture(side: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("by", ["the client", "the server"])
def test_no_tile_is_computed_that_nobody_waits_for(slot: Slot, by: str) -> None:
    async def give_up() -> None:
        service: Any = Stuck(slot)
        pictures = Pictures(service, body_bytes=BODY_BYTES, tile=8)
        task = asyncio.create_task(pictures.answer(picture(), {}))
        await asyncio.wait_for(service.entered.wait(), 60)
        assert (len(pictures._pending), slot.current.leases) == (1, 1)  # type: ignore[union-attr]
        if by == "the client":
            task.cancel()
        else:
            await asyncio.wait_for(asyncio.to_thread(pictures.close), 60)
        with pytest.raises(asyncio.CancelledError if by == "the client" else RefusedRequestError):
            await task
        while pictures._pending:  # until its thread has ended
            await asyncio.sleep(0.01)
        assert (service.calls, service.cancelled, slot.current.leases) == (1, 1, 0)  # type: ignore[union-attr]
        service.free.set()
        if by == "the client":
            assert (await pictures.answer(picture(), {})).media_type == "image/png"  # the next is answered
            assert service.calls > TILES
            pictures.close()

    asyncio.run(give_up())


@pytest.mark.parametrize(("tile", "after"), [(64, 0), (8, 2)])
@pytest.mark.parametrize("output", ["json", "overlay", "mask", "labels"])
def test_a_version_of_other_classes_that_steps_in_computes_all_of_the_picture(
    shelf: Any, signature_of: Any, tile: int, after: int, output: str
) -> None:
    shelf.signatures["2"] = signature_of(classes=("sea", "field", "roof", "road", "tree"))  # one more
    slot, beside = Slot("m", shelf, rollout=Rollout()), Slot("m", shelf, rollout=Rollout())
    versions = {"1": slot.load(Path("1"), "1"), "2": beside.load(Path("2"), "2")}

    async def ask(*, always: bool) -> Any:
        service: Any = Fallen(slot, versions, after=after, always=always)
        pictures = Pictures(service, body_bytes=BODY_BYTES, tile=tile)
        try:
            return await pictures.answer(picture(), {"output": output}), service.calls
        finally:
            await asyncio.to_thread(pictures.close)

    answer, calls = asyncio.run(ask(always=False))
    assert calls == after + 1 + (1 if tile == 64 else TILES)
    assert answer.headers == {"x-model-version": "2"}
    if output == "json":
        assert len(json.loads(answer.content)["classes"]) == 5
    with pytest.raises(RefusedRequestError, match="change faster"):
        asyncio.run(ask(always=True))


def test_what_goes_on_counts_and_holds_its_version(slot: Slot) -> None:
    """A thread that decodes cannot be stopped: until it has ended the picture is in the works."""

    async def give_up(monkeypatch: pytest.MonkeyPatch) -> None:
        decoding, let_go = asyncio.Event(), threading.Event()
        loop = asyncio.get_running_loop()

        def decode(*_: Any, **__: Any) -> Any:
            loop.call_soon_threadsafe(decoding.set)
            assert let_go.wait(60)
            return np.zeros((8, 8, 3), np.uint8)

        monkeypatch.setattr("muntin.serving.http.image_route.decode_image", decode)
        service: Any = Stuck(slot)
        pictures = Pictures(service, body_bytes=BODY_BYTES)
        task = asyncio.create_task(pictures.answer(picture(), {}))
        await asyncio.wait_for(decoding.wait(), 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (len(pictures._pending), slot.current.leases) == (1, 1)  # type: ignore[union-attr]
        let_go.set()
        while pictures._pending:
            await asyncio.sleep(0.01)
        assert (service.calls, slot.current.leases) == (0, 0)  # type: ignore[union-attr]
        pictures.close()

    with pytest.MonkeyPatch.context() as monkeypatch:
        asyncio.run(give_up(monkeypatch))


def test_too_many_pixels_are_told_apart(slot: Slot) -> None:
    async def ask(content: bytes) -> int:
        service: Any = Stuck(slot)
        pictures = Pictures(service, body_bytes=BODY_BYTES)
        with pytest.raises(ProtocolError) as caught:
            await pictures.answer(content, {})
        pictures.close()
        assert not pictures._pending
        return caught.value.status

    assert asyncio.run(ask(picture(101))) == 413
    assert asyncio.run(ask(b"x")) == 400


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("made", [lambda: b"no picture" * 10, lambda: picture(101), lambda: picture(50)[:-30]])
def test_a_picture_that_is_refused_is_not_kept(slot: Slot, made: Callable[[], bytes]) -> None:
    """Nor until the cyclic collector comes."""
    content = made()

    async def ask() -> None:
        service: Any = Stuck(slot)
        pictures = Pictures(service, body_bytes=BODY_BYTES)
        try:
            await pictures.answer(content, {})
        except ProtocolError:
            pass
        else:
            pytest.fail("it is no picture that is taken")
        pictures.close()

    before, end = sys.getrefcount(content), time.monotonic() + 60
    asyncio.run(ask())
    while (after := sys.getrefcount(content)) > before and time.monotonic() < end:
        time.sleep(0.001)  # the thread that answered lets go of it afterwards
    assert after <= before


def test_a_picture_that_waits_for_a_decoder_goes_with_its_client(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go, contents = threading.Event(), [picture(8) + bytes([number]) for number in range(DECODERS + 1)]

    def count(*_: Any, **__: Any) -> int:
        assert let_go.wait(60)
        return 64

    async def give_up() -> None:
        service: Any = Stuck(slot)
        pictures = Pictures(service, body_bytes=BODY_BYTES)
        before = sys.getrefcount(contents[-1])
        tasks = [asyncio.create_task(pictures.answer(content, {})) for content in contents]
        await asyncio.sleep(0.05)
        meanwhile = sys.getrefcount(contents[-1])
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        assert len(pictures._pending) == DECODERS + 1
        after = sys.getrefcount(contents[-1])
        assert meanwhile > after == before
        let_go.set()
        while pictures._pending:
            await asyncio.sleep(0.01)
        pictures.close()

    monkeypatch.setattr("muntin.serving.http.image_route.pixel_count", count)
    asyncio.run(give_up())


@pytest.mark.parametrize("by", ["the client", "the server"])
def test_pictures_wait_until_there_is_room_for_their_pixels(slot: Slot, by: str) -> None:
    async def ask() -> None:
        service: Any = Stuck(slot)
        pictures = Pictures(service, body_bytes=BODY_BYTES, tile=64)
        tasks = [asyncio.create_task(pictures.answer(picture(side), {})) for side in (100, 100, 100, 70)]
        while service.calls < 2 or len(pictures._room._waiting) < 2:  # the last would fit, and waits behind the third
            await asyncio.sleep(0.01)
        assert service.calls == 2
        if by == "the server":
            await asyncio.wait_for(asyncio.to_thread(pictures.close), 60)
            for task in tasks:
                with pytest.raises(RefusedRequestError):
                    await task
        else:
            tasks[2].cancel()
            while len(pictures._pending) > 3:  # though nothing is free yet
                await asyncio.sleep(0.01)
            service.free.set()
            assert [(await task).media_type for task in (tasks[0], tasks[1], tasks[3])] == ["image/png"] * 3
            while pictures._pending:
                await asyncio.sleep(0.01)
            assert service.calls == 3 * 4  # tiles, none of the one that was given up
            pictures.close()
        assert (pictures._room._taken, slot.current.leases) == (0, 0)  # type: ignore[union-attr]

    asyncio.run(ask())


@pytest.mark.parametrize("admitted", [False, True])
def test_who_gives_up_while_waiting_for_room_takes_none(admitted: bool) -> None:
    async def scene() -> None:
        room = _Room(10)

        class Waits:
            def waits_for(self, turn: asyncio.Future[None]) -> None:
                return

            def check(self) -> None:
                return

        waits: Any = Waits()

        async def hold(count: int, until: asyncio.Event) -> None:
            async with room.taken(count, waits):
                await until.wait()

        end, never = asyncio.Event(), asyncio.Event()
        first = asyncio.create_task(hold(8, end))
        second = asyncio.create_task(hold(8, never))
        third = asyncio.create_task(hold(2, never))
        await asyncio.sleep(0.01)
        if admitted:  # in the very moment that its turn comes
            end.set()
            await first
        second.cancel()
        await asyncio.sleep(0.01)
        assert room._taken == (2 if admitted else 10)  # the third, which waited behind it
        for task in (first, third):
            task.cancel()
        await asyncio.gather(first, second, third, return_exceptions=True)
        assert room._taken == 0

    asyncio.run(scene())


def test_so_many_pictures_are_in_the_works_and_one_more_is_refused(slot: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.serving.http.image_route.WAITING", 2)

    async def ask() -> None:
        service: Any = Stuck(slot)
        pictures = Pictures(service, body_bytes=BODY_BYTES, tile=8)
        tasks = [asyncio.create_task(pictures.answer(picture(), {})) for _ in range(2)]
        while len(pictures._pending) < 2:
            await asyncio.sleep(0.01)
        with pytest.raises(RefusedRequestError, match="2 pictures are in the works"):
            await pictures.answer(picture(), {})
        assert service.metrics.refused == {"pictures": 1}
        service.free.set()
        assert [answer.media_type for answer in await asyncio.gather(*tasks)] == ["image/png"] * 2
        pictures.close()

    asyncio.run(ask())


def test_a_picture_that_is_alone_has_room(slot: Slot) -> None:
    async def ask() -> None:
        service: Any = Stuck(slot)
        service.free.set()
        pictures = Pictures(service, body_bytes=BODY_BYTES, tile=8)
        pictures._room = _Room(1)
        answers = await asyncio.gather(*(pictures.answer(picture(), {}) for _ in range(3)))
        assert [answer.media_type for answer in answers] == ["image/png"] * 3
        pictures.close()

    asyncio.run(ask())


def test_what_a_classifier_computes_in_one_piece_is_no_larger_than_a_request_could_bring(
    write_pixels: Callable[..., Path], in_process: ArtifactLoader, tmp_path: Path
) -> None:
    slot = Slot("m", in_process, rollout=Rollout())
    slot.load(write_pixels(tmp_path / "1", task="classify"), "1")

    async def ask() -> None:
        service: Any = Stuck(slot)
        service.free.set()
        pictures = Pictures(service, body_bytes=3 * 50 * 50)
        with pytest.raises(ProtocolError, match=r"2,601 pixels, .* in one piece: send it smaller, of at most 2,500") as caught:
            await pictures.answer(picture(51), {})
        assert caught.value.status == 413
        assert (await pictures.answer(picture(50), {})).media_type == "application/json"
        assert (service.calls, slot.current.leases) == (1, 0)  # type: ignore[union-attr]
        pictures.close()

    asyncio.run(ask())
