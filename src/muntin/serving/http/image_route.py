"""The picture route: a PNG, JPEG, WebP, TIFF or BMP file in, a picture or JSON out.

    file --decode--> uint8 (H, W, C) --tiles through the batcher--> labels --encode--> PNG

A picture of at most `TILE` pixels a side is computed like the image of any other request. A larger one is computed in overlapping tiles, as
`muntin predict` does, and a picture of a size that the model does not take is extended or resized (`runtime.tiles`). Tiles have no
objective and a lower priority, so they delay other requests by one tile at most. A small file may hold a large picture: it is decoded only
when its pixels fit beside those of the pictures that are decoded and not answered yet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import AnySignature, Signature
from muntin.errors import DataError, bare
from muntin.images import TooManyPixelsError, decode_image, pixel_count
from muntin.runtime import predict
from muntin.runtime.session import Labels
from muntin.runtime.tiles import allowed_tile, extended
from muntin.serving.inference.groups import image_group
from muntin.serving.inference.service import PRIORITY, Service
from muntin.serving.protocol.json_codec import encode_json
from muntin.serving.protocol.messages import ProtocolError, RefusedRequestError, shown
from muntin.serving.threads import Threads
from muntin.serving.versions.slot import Lease
from muntin.serving.versions.version import Version
from muntin.tasks.answers import ANSWERING

T = TypeVar("T")

TILE = 1024
"""Side of a tile, pixels: larger than in `runtime.tiles`, since each tile is a request with its own wait and overlap."""
CODERS = 2
"""Number of pictures that are decoded or encoded at the same time."""
MAX_PICTURES = 16
"""Number of pictures in work; further ones are refused."""
ATTEMPTS = 3
"""Number of times that a picture is begun: again when a version with other classes steps in for one that fails."""
LARGEST = 2
"""All pictures that are decoded and not answered have at most as many pixels as this number of the largest allowed ones."""


@dataclass(frozen=True, kw_only=True)
class PictureAnswer:
    """A file and its type. `version`: the version that computed it; several, separated by commas, if one failed between two tiles.

    Seconds: `waited` for batches and `computed` in them, tiles summed; `total`: from the end of the file's receipt. Decoding and encoding
    are the rest.
    """

    content: bytes
    media_type: str
    version: str
    waited: float
    computed: float
    total: float = 0.0

    @property
    def headers(self) -> dict[str, str]:
        """`x-model-version`, and the times in milliseconds as browsers' tools read them."""
        durations = {"wait": self.waited, "compute": self.computed, "total": self.total}
        timing = ", ".join(f"{name};dur={1e3 * seconds:.2f}" for name, seconds in durations.items())
        return {"x-model-version": self.version, "server-timing": timing}


class ImageRoute:
    """Answers picture files. `body_bytes`: maximum size of an inference request; a picture computed in one piece has no more pixels."""

    def __init__(self, service: Service, *, body_bytes: int, tile: int = TILE) -> None:
        self._service, self._body_bytes, self._tile = service, body_bytes, tile
        self._coders = Threads("muntin-picture", most=CODERS)
        self._predictors = Threads("muntin-tiles", most=MAX_PICTURES)
        self.in_work = 0
        """Number of pictures that are being answered."""
        self._max_pixels, self._pixels = LARGEST * service.max_pixels, 0
        self._turn, self._released = asyncio.Lock(), asyncio.Event()

    async def answer(self, content: bytes, query: Mapping[str, str]) -> PictureAnswer:
        """Answer a picture file.

        `query`: `output`, one of the task's `Answering.routes`; `version`, one in service, in place of the one that would answer.

        mask: a PNG of class numbers with a colour palette; of more than 255 classes, labels. overlay: the classes' colours over the
        picture, as PNG. labels: class numbers as grey values, of 16 bits for more than 255 classes. json: for segment the share of each
        class, for classify every class with its probability. image: a PNG.
        Raises ProtocolError: 400 for an unreadable picture, an unknown output, or a model of channels that its task does not allow; 404 for
        an unknown version; 413 for too many pixels; 503 as inference does.
        Cancelled, it returns once its thread has ended, and computes no further tile.
        """
        for name in query:
            if name not in ("output", "version"):
                raise ProtocolError(f'query parameter {shown(name)}: there are "output" and "version"')
        if self.in_work >= MAX_PICTURES:
            self._service.metrics.refused["pictures"] += 1
            raise RefusedRequestError(f"{MAX_PICTURES} pictures are in the works: try again")
        self.in_work += 1
        began = time.monotonic()
        try:
            with self._service.lease_to_compute(self._service.name, query.get("version")) as lease:
                signature = self._check_pictures(lease.version.signature)
                output = _check_output(query.get("output"), signature)
                answer = await self._answer(content, output, lease.version)
                return replace(answer, total=time.monotonic() - began)
        except TooManyPixelsError as error:
            raise ProtocolError(f"{error} (--max-pixels)", status=413) from bare(error)
        except DataError as error:
            raise ProtocolError(str(error)) from bare(error)
        finally:
            self.in_work -= 1

    def close(self, timeout: float | None = None) -> None:
        """Wait for the threads, at most `timeout` seconds. All calls of `answer` must have ended or been cancelled."""
        self._coders.join(timeout)
        self._predictors.join(timeout)

    async def _answer(self, content: bytes, output: str, version: Version) -> PictureAnswer:
        signature, max_pixels = _of_images(version), self._service.max_pixels
        count = await _run(self._coders, partial(pixel_count, content, max_pixels=max_pixels))
        self._check_whole(count, signature)
        async with self._room(count * signature.scale**2):
            image = await _run(self._coders, partial(decode_image, content, signature.channels, max_pixels=max_pixels))
            session = _QueuedSession(self._service, version)
            result = await _run(self._predictors, partial(self._predict, session, image), session.cancel)
            if self._service.keep is not None:
                self._service.keep(image[None])
            return await _run(self._coders, partial(_encode, image, result, output, session))

    def _check_pictures(self, signature: AnySignature) -> Signature:
        """Return the signature. Raises ProtocolError for a model that `refusal` refuses."""
        if reason := refusal(signature):
            raise ProtocolError(f"{reason}: send tensors (/v2/models/{self._service.name}/infer)")
        assert isinstance(signature, Signature)
        return signature

    def _check_whole(self, count: int, signature: Signature) -> None:
        """Raise ProtocolError for a picture of too many pixels for a model that takes all of it at once."""
        most = self._body_bytes // signature.channels
        resized = signature.side is not None or signature.sizes.fixed
        if signature.answer.one and not resized and count > most:
            raise ProtocolError(
                f"the picture has {count:,} pixels, and this model computes it in one piece: send it smaller, of at most {most:,} "
                "(--max-body)",
                status=413,
            )

    @asynccontextmanager
    async def _room(self, count: int) -> AsyncIterator[None]:
        """Reserve room for so many pixels, in the order of arrival. A picture alone always fits."""
        async with self._turn:
            while self._pixels and self._pixels + count > self._max_pixels:
                self._released.clear()
                await self._released.wait()
            self._pixels += count
        try:
            yield
        finally:
            self._pixels -= count
            self._released.set()

    def _predict(self, session: _QueuedSession, image: NDArray[np.uint8]) -> NDArray[Any]:
        for _ in range(ATTEMPTS):
            with suppress(_OtherClassesError):
                return self._predict_once(session, image)
        raise RefusedRequestError("the versions of the model change faster than the picture is computed: try again")

    def _predict_once(self, session: _QueuedSession, image: NDArray[np.uint8]) -> NDArray[Any]:
        if session.signature.answer.one:
            return predict(session, image)
        sizes, (height, width), scale = session.signature.sizes, image.shape[:2], session.signature.scale
        tile = allowed_tile(session.signature, self._tile)
        rows, columns = sizes.at_most(height, width) if tile is None else (tile, tile)
        if height > rows or width > columns:
            session.patient = True
            return predict(session, image, tile=tile)
        if session.signature.answer.argmax:
            labels: Labels = session.labels(extended(image, *sizes.at_least(height, width))[None])[0]
            return labels[: scale * height, : scale * width]
        return predict(session, image)


def refusal(signature: AnySignature) -> str:
    """Return why picture files cannot be sent to a model, or "": it takes no images, or images that no picture file holds."""
    if not isinstance(signature, Signature):
        return f"the model takes named tensors ({signature.text}), and /predict is for pictures"
    allowed = signature.answer.channels
    if signature.channels in allowed:
        return ""
    listed = ", ".join(map(str, allowed[:-1]))
    return f"the model has {signature.channels} channels, and /predict is for models of {listed} or {allowed[-1]}"


class _OtherClassesError(Exception):
    """A version with other classes stepped in for the one that the picture was begun with."""


class _QueuedSession:
    """A session for `predict` whose images wait in the service's queue. Made on the event loop, called on another thread.

    `versions`: names of the versions that computed, in order. `waited`, `computed`: seconds, all calls together. `patient`: its calls have
    no objective and a lower priority.
    """

    def __init__(self, service: Service, version: Version) -> None:
        self._service, self._loop = service, asyncio.get_running_loop()
        self._version = version
        self.signature = _of_images(version)
        self.versions: dict[str, None] = {}
        self.waited = self.computed = 0.0
        self.patient = False
        self._call: Future[NDArray[Any]] | None = None
        self._cancelled = False

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
        return self._compute(images_BHWC, labels=False)

    def labels(self, images_BHWC: NDArray[np.uint8]) -> Labels:
        return self._compute(images_BHWC, labels=True)

    def cancel(self) -> None:
        """Cancel the call in progress and further ones, which raise `concurrent.futures.CancelledError`."""
        self._cancelled = True
        if self._call is not None:
            self._call.cancel()

    def _compute(self, images: NDArray[np.uint8], *, labels: bool) -> NDArray[Any]:
        call = self._call = asyncio.run_coroutine_threadsafe(self._queue(np.ascontiguousarray(images), labels), self._loop)
        if self._cancelled:
            call.cancel()
        try:
            return call.result()
        finally:
            del call  # the traceback of an error keeps this frame
            self._call = None

    async def _queue(self, images: NDArray[np.uint8], labels: bool) -> NDArray[Any]:
        lease = Lease(self._version, lambda version: None)  # `ImageRoute.answer` holds the real one
        priority = PRIORITY + 1 if self.patient else PRIORITY
        group = image_group(self._version, images.shape[1], images.shape[2], labels=labels)
        named, work = await self._service.compute({"images": images}, group, lease, priority=priority, patient=self.patient)
        answer: NDArray[Any] = named[group.outputs[0]]
        self.waited += max(work.started - work.admitted, 0.0)
        self.computed += work.computed
        if work.by is not None and (signature := _of_images(work.by)).outputs != self.signature.outputs:
            self._version, self.signature = work.by, signature
            self.versions.clear()
            raise _OtherClassesError
        self.versions[work.version] = None
        return answer


def _of_images(version: Version) -> Signature:
    signature = version.signature
    assert isinstance(signature, Signature)
    return signature


async def _run(pool: Threads, call: Callable[[], T], cancel: Callable[[], None] = lambda: None) -> T:
    """Run a call on a thread. Cancelled while it runs, calls `cancel` and waits for its end: its memory is in use until then."""
    thread_future = pool.submit(call)
    future: asyncio.Future[T] = asyncio.wrap_future(thread_future)
    try:
        await asyncio.wait((future,))
        return future.result()
    except asyncio.CancelledError:
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else reads its error
        if not thread_future.cancel():
            cancel()
            await asyncio.wait((future,))
        raise
    finally:
        del future, thread_future  # the traceback of an error keeps this frame, and they keep the error


def _check_output(output: str | None, signature: Signature) -> str:
    allowed = ANSWERING[signature.task].routes
    if output is not None and output not in allowed:
        raise ProtocolError(f"output={shown(output)}: this model's task is {signature.task}, for which output may be {', '.join(allowed)}")
    return output or allowed[0]


def _encode(image: NDArray[np.uint8], result: NDArray[Any], output: str, session: _QueuedSession) -> PictureAnswer:
    signature = session.signature
    answer = partial(PictureAnswer, version=", ".join(session.versions), waited=session.waited, computed=session.computed)
    content = ANSWERING[signature.task].encode(image, result, output, signature)
    if isinstance(content, bytes):
        return answer(content=content, media_type="image/png")
    return answer(content=encode_json(content), media_type="application/json")
