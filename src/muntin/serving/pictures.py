"""The route for people: a picture file in, a picture or JSON out. Nothing of tensors has to be known.

    PNG, JPEG, WebP --decode--> uint8 (H, W, C) --tiles through the runner--> labels --encode--> PNG

A picture up to `TILE` pixels a side is one image like any other; a larger one is computed in overlapping tiles, as `muntin predict` does
it, each of which waits for its turn beside other requests: a large picture makes nobody else late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.errors import DataError
from muntin.runtime import predict
from muntin.runtime.images import decode_image, encode_png, overlay
from muntin.serving.json_codec import encode_json
from muntin.serving.protocol import ProtocolError, shown
from muntin.serving.service import PRIORITY, RefusedRequestError, Service
from muntin.serving.slot import Lease
from muntin.serving.version import Version

TILE = 1024
"""Pixels a side."""
DECODERS = 2
"""Pictures that are decoded, or whose answers are encoded, at the same time."""
WAITING = 16
"""Pictures that may be in the works; beyond, they are refused."""
OUTPUTS = {"segment": ("mask", "overlay", "labels", "json"), "classify": ("json",), "restore": ("image",)}
"""What may be asked of a task; the first is what it gives unasked."""


@dataclass(frozen=True, kw_only=True)
class PictureAnswer:
    """A file and its type. `headers`: of which version it is."""

    content: bytes
    media_type: str
    headers: dict[str, str] = field(default_factory=dict)


class Pictures:
    """Answers picture files. Decoding and encoding run on threads of their own."""

    def __init__(self, service: Service, *, tile: int = TILE) -> None:
        self._service, self._tile = service, tile
        self._threads = ThreadPoolExecutor(max_workers=WAITING, thread_name_prefix="muntin-picture")
        self._decoding = asyncio.Semaphore(DECODERS)
        self._pending = 0

    async def answer(self, content: bytes, query: Mapping[str, str]) -> PictureAnswer:
        """The answer to a picture file. `query`: `output`, of those that `OUTPUTS` has for the task.

        mask: a PNG of class numbers, coloured by a palette. overlay: the classes' colours over the picture, as PNG. labels: the class
        numbers as grey values. json: for segment the share of each class, for classify every class with its probability. image: a PNG.
        Raises ProtocolError: 400 for what is no picture or no such output, 413 for too many pixels, 503 as inference does.
        """
        for name in query:
            if name != "output":
                raise ProtocolError(f'query parameter {shown(name)}: there is "output"')
        if self._pending >= WAITING:
            raise RefusedRequestError(f"{WAITING} pictures are in the works: try again")
        self._pending += 1
        try:
            with self._service.lease(self._service.name, None) as lease:
                version = lease.version
                output = _output(query.get("output"), version.signature)
                return await self._computed(content, output, version)
        finally:
            self._pending -= 1

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    async def _computed(self, content: bytes, output: str, version: Version) -> PictureAnswer:
        loop = asyncio.get_running_loop()
        signature = version.signature
        try:
            async with self._decoding:
                image = await loop.run_in_executor(self._threads, _decoded, content, signature.channels, self._service.max_pixels)
            through = _Through(self._service, version, loop)
            answer = await loop.run_in_executor(self._threads, self._predicted, through, image)
            async with self._decoding:
                return await loop.run_in_executor(self._threads, _encoded, image, answer, output, version)
        except DataError as error:
            raise ProtocolError(str(error)) from error

    def _predicted(self, through: _Through, image: NDArray[np.uint8]) -> NDArray[Any]:
        if through.signature.task == "classify":
            return predict(through, image)
        if max(image.shape[:2]) > self._tile:
            return predict(through, image, tile=self._tile)
        if through.signature.task == "segment":
            labels: NDArray[np.uint8] = through.labels(image[None])[0]
            return labels
        return predict(through, image)


class _Through:
    """A session as `predict` wants it, whose calls wait for their turn beside the other requests. For threads outside the event loop."""

    def __init__(self, service: Service, version: Version, loop: asyncio.AbstractEventLoop) -> None:
        self.signature: Signature = version.signature
        self._service, self._version, self._loop = service, version, loop

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
        return self._run(images_BHWC, labels=False)

    def labels(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return self._run(images_BHWC, labels=True)

    def _run(self, images: NDArray[np.uint8], *, labels: bool) -> NDArray[Any]:
        return asyncio.run_coroutine_threadsafe(self._computed(np.ascontiguousarray(images), labels), self._loop).result()

    async def _computed(self, images: NDArray[np.uint8], labels: bool) -> NDArray[Any]:
        lease = Lease(self._version, _keep)  # whoever answers the picture holds the real one until the last of its tiles
        answer, _ = await self._service.compute(images, lease, labels=labels, priority=PRIORITY)
        return answer


def _keep(version: Version) -> None:
    return


def _output(asked: str | None, signature: Signature) -> str:
    allowed = OUTPUTS[signature.task]
    if asked is not None and asked not in allowed:
        raise ProtocolError(f"output={shown(asked)}: this model gives {', '.join(allowed)}")
    return asked or allowed[0]


def _decoded(content: bytes, channels: int, max_pixels: int) -> NDArray[np.uint8]:
    return decode_image(content, channels, max_pixels=max_pixels)


def _encoded(image: NDArray[np.uint8], answer: NDArray[Any], output: str, version: Version) -> PictureAnswer:
    classes, headers = version.signature.classes, {"x-model-version": version.name}
    if output == "json":
        if version.signature.task == "classify":
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
        scaled = (
            image
            if image.shape[:2] == answer.shape
            else np.repeat(np.repeat(image, version.signature.scale, 0), version.signature.scale, 1)
        )
        png = encode_png(overlay(scaled, answer, classes))
    elif output == "mask":
        png = encode_png(answer, [entry.color for entry in classes])
    else:
        png = encode_png(answer)
    return PictureAnswer(content=png, media_type="image/png", headers=headers)
