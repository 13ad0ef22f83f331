"""The route for people: a picture file in, a picture or JSON out. Nothing of tensors has to be known.

    PNG, JPEG, WebP --decode--> uint8 (H, W, C) --tiles through the runner--> labels --encode--> PNG

A picture up to `TILE` pixels a side is one image like any other; a larger one is computed in overlapping tiles, as `muntin predict` does
it, each of which waits for its turn beside other requests, without an objective and behind those that have one, but not for ever: a large
picture makes nobody else late by more than a tile, and is answered however many others there are. A small file may hold a large picture:
before it is decoded it waits until there is room for its pixels beside those of the pictures that are not answered yet. Where its client
gives a picture up, no further tile of it is computed; it counts, and holds its version, until its thread has seen that, and no longer where
it waits for room.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.errors import DataError, bare
from muntin.images import TooManyPixelsError, decode_image, encode_png, overlay, pixel_count
from muntin.runtime import predict
from muntin.serving.inference.service import PRIORITY, Service
from muntin.serving.protocol.json_codec import encode_json
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError, shown
from muntin.serving.threads import Threads
from muntin.serving.versions.slot import Lease
from muntin.serving.versions.version import Version

TILE = 1024
"""Pixels a side."""
DECODERS = 2
"""Pictures that are decoded, or whose answers are encoded, at the same time."""
WAITING = 16
"""Pictures that may be in the works; beyond, they are refused."""
BEGUN = 3
"""How often a picture is begun at the most: anew where another version steps in, of other classes."""
LARGEST = 2
"""So many of the largest pictures that are taken are as many pixels as all that are decoded and not answered may have together."""
OUTPUTS = {"segment": ("mask", "overlay", "labels", "json"), "classify": ("json",), "restore": ("image",)}
"""What may be asked of a task; the first is what it gives unasked."""


@dataclass(frozen=True, kw_only=True)
class PictureAnswer:
    """A file and its type. `headers`: which version computed it; several where one failed between two tiles."""

    content: bytes
    media_type: str
    headers: dict[str, str] = field(default_factory=dict)


class Pictures:
    """Answers picture files. Decoding and encoding run on threads of their own.

    `body_bytes`: of a request for inference, at most. A picture that is computed in one piece has no more pixels than such a request could.
    """

    def __init__(self, service: Service, *, body_bytes: int, tile: int = TILE) -> None:
        self._service, self._body_bytes, self._tile = service, body_bytes, tile
        self._threads = Threads("muntin-picture")
        self._decoding = asyncio.Semaphore(DECODERS)
        self._room = _Room(LARGEST * service.max_pixels)
        self._pending: set[_Through] = set()

    async def answer(self, content: bytes, query: Mapping[str, str]) -> PictureAnswer:
        """The answer to a picture file. `query`: `output`, of those that `OUTPUTS` has for the task.

        mask: a PNG of class numbers, coloured by a palette. overlay: the classes' colours over the picture, as PNG. labels: the class
        numbers as grey values. json: for segment the share of each class, for classify every class with its probability. image: a PNG.
        Raises ProtocolError: 400 for what is no picture or no such output, 413 for too many pixels, 503 as inference does.
        """
        for name in query:
            if name != "output":
                raise ProtocolError(f'query parameter {shown(name)}: there is "output"')
        if len(self._pending) >= WAITING:
            self._service.metrics.refused["pictures"] += 1
            raise RefusedRequestError(f"{WAITING} pictures are in the works: try again")
        lease = self._service.lease_to_compute(self._service.name, None)
        try:
            output = _output(query.get("output"), lease.version.signature)
        except ProtocolError:
            lease.release()
            raise
        through = _Through(self._service, lease.version, asyncio.get_running_loop(), content)
        self._pending.add(through)
        del content  # where the client goes before its picture is read, nothing else holds it
        task = asyncio.create_task(self._held(output, lease, through))
        try:
            await asyncio.wait((task,))  # which does not cancel it
        except asyncio.CancelledError:
            through.give_up()
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody else asks what came of it
            raise
        try:
            return task.result()
        finally:
            del task  # an error holds this frame by its traceback, and its task holds the error

    def close(self, timeout: float | None = None) -> None:
        """Gives up what is in the works, and waits for its threads: as long as decoding or encoding takes, `timeout` seconds at most."""
        for through in tuple(self._pending):
            through.give_up()
        self._threads.join(timeout)

    async def _held(self, output: str, lease: Lease, through: _Through) -> PictureAnswer:
        """The answer, by a task that nobody cancels: it ends when its threads have."""
        try:
            with lease:
                return await self._computed(output, through)
        finally:
            self._pending.discard(through)

    async def _computed(self, output: str, through: _Through) -> PictureAnswer:
        loop = asyncio.get_running_loop()
        version = through.version
        try:
            async with self._decoding:
                count = await loop.run_in_executor(self._threads, _counted, through.file(), self._service.max_pixels)
            self._check_whole(count, version.signature)
            async with self._room.taken(count * version.signature.scale**2, through):
                async with self._decoding:
                    image = await loop.run_in_executor(
                        self._threads, _decoded, through.file(), version.signature.channels, self._service.max_pixels
                    )
                through.decoded()
                answer = await loop.run_in_executor(self._threads, self._predicted, through, image)
                async with self._decoding:
                    through.check()
                    return await loop.run_in_executor(self._threads, _encoded, image, answer, output, through)
        except _GivenUpError as error:
            raise RefusedRequestError("the server is shutting down: send the picture to another one") from bare(error)
        except TooManyPixelsError as error:
            raise ProtocolError(str(error), status=413) from bare(error)
        except DataError as error:
            raise ProtocolError(str(error)) from bare(error)

    def _check_whole(self, count: int, signature: Signature) -> None:
        """Raises ProtocolError for a picture of too many pixels for a model that takes all of it at once."""
        most = self._body_bytes // signature.channels
        if signature.task == "classify" and signature.side is None and count > most:
            raise ProtocolError(
                f"the picture has {count:,} pixels, and this model computes it in one piece: send it smaller, of at most {most:,}",
                status=413,
            )

    def _predicted(self, through: _Through, image: NDArray[np.uint8]) -> NDArray[Any]:
        for _ in range(BEGUN):
            try:
                return self._once(through, image)
            except _OtherClassesError as other:
                through.begin_again(other.version)
        raise RefusedRequestError("the versions of the model change faster than the picture is computed: try again")

    def _once(self, through: _Through, image: NDArray[np.uint8]) -> NDArray[Any]:
        if through.signature.task == "classify":
            return predict(through, image)
        if max(image.shape[:2]) > self._tile:
            through.patient = True
            return predict(through, image, tile=self._tile)
        if through.signature.task == "segment":
            labels: NDArray[np.uint8] = through.labels(image[None])[0]
            return labels
        return predict(through, image)


class _Room:
    """Room for pixels. What does not fit waits, in the order in which it came; alone, everything fits."""

    def __init__(self, most: int) -> None:
        self._most, self._taken = most, 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def taken(self, count: int, through: _Through) -> AsyncIterator[None]:
        """While it is held, there is so much less. Raises `_GivenUpError` where the picture is given up before."""
        turn = asyncio.get_running_loop().create_future()
        through.waits_for(turn)
        self._waiting.append((count, turn))
        self._admit()
        try:
            await turn
            through.check()
        except BaseException:
            if turn.done() and not turn.cancelled():  # it had its turn in the moment that it was given up
                self._taken -= count
            self._admit()  # those behind it may fit
            through.check()
            raise
        try:
            yield
        finally:
            self._taken -= count
            self._admit()

    def _admit(self) -> None:
        while self._waiting:
            count, turn = self._waiting[0]
            if not turn.done():  # else it was given up
                if self._taken and self._taken + count > self._most:
                    return
                self._taken += count
                turn.set_result(None)
            self._waiting.popleft()


class _GivenUpError(Exception):
    """Nobody waits for the picture any more."""


class _OtherClassesError(Exception):
    """A version stepped in that has other classes than the one that the picture was begun with."""

    def __init__(self, version: Version) -> None:
        super().__init__(version.name)
        self.version = version


class _Through:
    """A session as `predict` wants it, whose calls wait for their turn beside the other requests. For threads outside the event loop.

    After `give_up`, which any thread may call, every call raises `_GivenUpError`: the one in progress does not wait for its answer.
    `computed`: names of the versions that computed, in the order in which they came: others than its own where that failed. `patient`:
    its calls have no objective, and are less urgent than others.
    """

    def __init__(self, service: Service, version: Version, loop: asyncio.AbstractEventLoop, content: bytes) -> None:
        self._content = content
        """The file; empty once it is decoded or given up."""
        self.signature: Signature = version.signature
        self.version = version
        self._service, self._loop = service, loop
        self._lock = threading.Lock()
        self._given_up = False
        self._asked: Future[NDArray[Any]] | None = None
        self._turn: asyncio.Future[None] | None = None
        self.computed: dict[str, None] = {}
        self.patient = False

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
        return self._run(images_BHWC, labels=False)

    def labels(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self._run(images_BHWC, labels=True)

    def give_up(self) -> None:
        with self._lock:
            self._given_up, asked, self._content = True, self._asked, b""
        if asked is not None:
            asked.cancel()
        if self._turn is not None:
            self._loop.call_soon_threadsafe(self._turn.cancel)

    def waits_for(self, turn: asyncio.Future[None]) -> None:
        """Until it has its turn nothing is done, so it is given up at once."""
        self._turn = turn
        if self._given_up:
            turn.cancel()

    def file(self) -> bytes:
        """The picture's bytes. Raises `_GivenUpError` if it was given up."""
        with self._lock:
            self.check()
            return self._content

    def decoded(self) -> None:
        """Nobody needs its bytes any more."""
        self._content = b""

    def begin_again(self, version: Version) -> None:
        """For this version, which need not be leased: where it goes, another one steps in."""
        self.version, self.signature = version, version.signature
        self.computed.clear()

    def check(self) -> None:
        """Raises `_GivenUpError` if it was given up."""
        if self._given_up:
            raise _GivenUpError("the picture was given up")

    def _run(self, images: NDArray[np.uint8], *, labels: bool) -> NDArray[Any]:
        with self._lock:
            self.check()
            asked = self._asked = asyncio.run_coroutine_threadsafe(self._computed(np.ascontiguousarray(images), labels), self._loop)
        try:
            return asked.result()
        except CancelledError as error:
            raise _GivenUpError("the picture was given up") from error
        finally:
            del asked  # an error holds this frame by its traceback
            self._asked = None

    async def _computed(self, images: NDArray[np.uint8], labels: bool) -> NDArray[Any]:
        lease = Lease(self.version, _keep)  # whoever answers the picture holds the real one until the last of its tiles
        priority = PRIORITY + 1 if self.patient else PRIORITY
        answer, work = await self._service.compute(images, lease, labels=labels, priority=priority, patient=self.patient)
        if work.by is not None and work.by.signature.outputs != self.signature.outputs:
            raise _OtherClassesError(work.by)
        self.computed[work.version] = None
        return answer


def _keep(version: Version) -> None:
    return


def _output(asked: str | None, signature: Signature) -> str:
    allowed = OUTPUTS[signature.task]
    if asked is not None and asked not in allowed:
        raise ProtocolError(f"output={shown(asked)}: this model gives {', '.join(allowed)}")
    return asked or allowed[0]


def _counted(content: bytes, max_pixels: int) -> int:
    return pixel_count(content, max_pixels=max_pixels)


def _decoded(content: bytes, channels: int, max_pixels: int) -> NDArray[np.uint8]:
    return decode_image(content, channels, max_pixels=max_pixels)


def _encoded(image: NDArray[np.uint8], answer: NDArray[Any], output: str, through: _Through) -> PictureAnswer:
    signature, headers = through.signature, {"x-model-version": ", ".join(through.computed)}
    classes = signature.classes
    if output == "json":
        if signature.task == "classify":
            weights = np.exp(answer - answer.max())
            found = sorted(zip((weights / weights.sum()).tolist(), classes, strict=True), key=lambda pair: -pair[0])
            document: dict[str, Any] = {"classes": [{"name": entry.name, "probability": share} for share, entry in found]}
        else:
            counts = np.bincount(answer.ravel(), minlength=len(classes))
            document = {"height": answer.shape[0], "width": answer.shape[1]}
            document["classes"] = [
                {"name": entry.name, "share": float(count) / answer.size} for entry, count in zip(classes, counts, strict=True)
            ]
        return PictureAnswer(content=encode_json(document), media_type="application/json", headers=headers)
    if output == "overlay":
        scaled = image if image.shape[:2] == answer.shape else np.repeat(np.repeat(image, signature.scale, 0), signature.scale, 1)
        png = encode_png(overlay(scaled, answer, classes))
    elif output == "mask":
        png = encode_png(answer, [entry.color for entry in classes])
    else:
        png = encode_png(answer)
    return PictureAnswer(content=png, media_type="image/png", headers=headers)
