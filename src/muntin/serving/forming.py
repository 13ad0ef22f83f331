"""Puts answers into the form that goes out: small ones on the event loop, large ones on threads beside it, within a bound of bytes."""

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
FORM_BYTES = 1 << 30
"""Of answers that are to be put into form beside the event loop, from their requests' admission until that is done: a request whose answer
would go beyond is refused, unless there is no other."""
ENCODERS = 2
"""Answers that are put into form at the same time."""

Formed = TypeVar("Formed")


class Forming:
    """Of one server. Called on its event loop."""

    def __init__(self) -> None:
        self.held = 0
        """Bytes, of those that `FORM_BYTES` bounds."""
        self._threads = ThreadPoolExecutor(max_workers=ENCODERS, thread_name_prefix="muntin-encode")

    def hold(self, wanted: Wanted, *, copies: bool) -> int:
        """Bytes of an answer that is to be put into form beside the event loop, held until `let_go`; 0: not beside it.

        `copies`: what goes out as it was computed is copied for it. Raises RefusedRequestError where `FORM_BYTES` wait already.
        """
        few = wanted.listed <= LISTED
        if few and wanted.nbytes <= (INLINE if wanted.labels else 4 * INLINE):
            return 0
        if few and wanted.as_it_is and not (copies and wanted.nbytes > COPIED):
            return 0
        if self.held and self.held + wanted.nbytes > FORM_BYTES:
            raise RefusedRequestError("large answers fill what this server puts into form: try again, or ask for one output in binary")
        self.held += wanted.nbytes
        return wanted.nbytes

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


def _closed() -> RefusedRequestError:
    return RefusedRequestError("the server is shutting down")
