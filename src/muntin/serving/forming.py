"""Puts answers into the form that goes out: small ones on the event loop, large ones on threads beside it.

Of large ones a server holds no more than a bound of bytes, from the admission of their requests on: the answer to an image of a few hundred
kilobytes may have many megabytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from muntin.serving.outputs import Wanted
from muntin.serving.protocol import RefusedRequestError

INLINE = 1 << 16
"""Numbers of an answer up to which it is put into its form on the event loop; beyond, on a thread, beside which others are answered (but
while its JSON is written, which lets nobody else go on)."""
LISTED = 256
"""Best classes up to which they are written on the event loop."""
COPIED = 1 << 20
"""Bytes of an answer that are copied on the event loop at most, where it goes out as it was computed."""
HELD_BYTES = 1 << 30
"""Of large answers, from their requests' admission until they are in form, and whoever sends them counts what is not taken (`Ledger`): a
request whose answer would go beyond is refused, unless there is no other."""
TEXT = 4
"""Bytes of JSON for each that was computed, at most or nearly: "255," for one of labels, "-12.345678, " for four of scores."""
ENCODERS = 2
"""Answers that are put into form at the same time."""

Formed = TypeVar("Formed")


class Forming:
    """Of one server. Called on its event loop."""

    def __init__(self) -> None:
        self.held = 0
        """Bytes, of those that `HELD_BYTES` bounds."""
        self._threads = ThreadPoolExecutor(max_workers=ENCODERS, thread_name_prefix="muntin-encode")

    def hold(self, wanted: Wanted) -> int:
        """Bytes of a large answer, held until `let_go`; 0: it is small. Raises RefusedRequestError where `HELD_BYTES` would be exceeded."""
        if _small(wanted):
            return 0
        nbytes = wanted.nbytes if wanted.binary else TEXT * wanted.nbytes
        if self.held and self.held + nbytes > HELD_BYTES:
            raise RefusedRequestError("large answers fill what this server may hold of them: try again, or ask for one output in binary")
        self.held += nbytes
        return nbytes

    def let_go(self, nbytes: int) -> None:
        self.held -= nbytes

    def form(self, make: Callable[[], Formed], done: Callable[[Formed | Exception], None]) -> None:
        """Calls `make`, which raises nothing, on a thread, and `done` with what it gave on the event loop."""
        try:
            forming = asyncio.get_running_loop().run_in_executor(self._threads, make)
        except RuntimeError:  # it was closed
            done(_closed())
            return
        forming.add_done_callback(lambda found: done(_closed() if found.cancelled() else found.result()))

    def close(self) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)


def formed_apart(wanted: Wanted, *, copies: bool) -> bool:
    """Whether an answer is put into form beside the event loop. `copies`: what goes out as it was computed is copied for it."""
    if _small(wanted):
        return False
    return wanted.listed > LISTED or not wanted.as_it_is or (copies and wanted.nbytes > COPIED)


def _small(wanted: Wanted) -> bool:
    return wanted.listed <= LISTED and wanted.nbytes <= (INLINE if wanted.labels else 4 * INLINE)


def _closed() -> RefusedRequestError:
    return RefusedRequestError("the server is shutting down")
