"""Encodes answers: small ones on the event loop, large ones on threads beside it.

The server bounds the bytes of large answers from the admission of their requests: the answer to an image of a few hundred kilobytes may
have many megabytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from muntin.serving.inference.requests import Wanted
from muntin.serving.protocol.messages import RefusedRequestError

INLINE_NUMBERS = 1 << 16
"""Largest number of values of a JSON answer that is encoded on the event loop. On a thread others are answered meanwhile, except while
JSON is written, which keeps the interpreter's lock."""
INLINE_BYTES = 1 << 20
"""Largest binary answer that is encoded on the event loop: copying it takes less than handing it to a thread."""
INLINE_CLASSES = 256
"""Largest number of best classes that are encoded on the event loop."""
HELD_BYTES = 1 << 30
"""Bound of the large answers between admission and the end of encoding; after that the sender counts what its client has not taken
(`MemoryBudget`). A request whose answer would exceed it is refused, unless there is no other."""
JSON_EXPANSION = 4
"""Bytes of JSON for each byte of `Wanted.nbytes`, at most or nearly: "-12.345678, " for four of scores."""
THREADS = 2

Encoded = TypeVar("Encoded")


class AnswerEncoder:
    """Encodes the answers of one server. Called on its event loop."""

    def __init__(self) -> None:
        self.held_bytes = 0
        """Reserved bytes, bounded by `HELD_BYTES`."""
        self._threads = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="muntin-encode")

    def reserve(self, wanted: Wanted) -> int:
        """Reserve and return the bytes of a large answer, which is encoded on a thread; 0: it is small.

        Raises RefusedRequestError beyond `HELD_BYTES`.
        """
        if _is_small(wanted):
            return 0
        nbytes = wanted.nbytes if wanted.binary else JSON_EXPANSION * wanted.nbytes
        if self.held_bytes and self.held_bytes + nbytes > HELD_BYTES:
            raise RefusedRequestError("large answers fill what this server may hold of them: try again, or ask for one output in binary")
        self.held_bytes += nbytes
        return nbytes

    def release(self, nbytes: int) -> None:
        self.held_bytes -= nbytes

    async def encode(self, encode: Callable[[], Encoded], nbytes: int) -> Encoded:
        """Return the result of `encode`, called on a thread if `nbytes` are reserved, which are released when it ends."""
        if not nbytes:
            return encode()
        try:
            encoding = asyncio.get_running_loop().run_in_executor(self._threads, encode)
        except RuntimeError as error:  # the threads were closed
            self.release(nbytes)
            raise RefusedRequestError("the server is shutting down") from error
        encoding.add_done_callback(lambda _: self.release(nbytes))
        try:
            return await asyncio.shield(encoding)  # a cancelled request holds its answer until the thread has ended
        finally:
            del encoding  # it holds an error, which holds this frame by its traceback

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)


def _is_small(wanted: Wanted) -> bool:
    if wanted.binary:
        return wanted.nbytes <= INLINE_BYTES
    return wanted.listed <= INLINE_CLASSES and wanted.nbytes <= 4 * INLINE_NUMBERS
