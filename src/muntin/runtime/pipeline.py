"""Many items through one function on several threads, with the results in the order of the items and bounded memory.

Each thread takes one item through all its steps: it decodes a picture, computes it, and encodes the answer. Pillow, numpy, FFmpeg and the
engines release the interpreter's lock, so the steps of different pictures overlap. A session computes `streams` calls at a time and lets
others wait: with more threads than that, the others decode and encode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future
from threading import Condition, Event
from typing import TypeVar

from muntin.runtime.host.thread_pool import thread_pool

WorkT = TypeVar("WorkT")
ResultT = TypeVar("ResultT")

WINDOW = 1024
"""Default number of items that are begun before the first of them has given its result."""
_END = object()


class StoppedError(Exception):
    """Raised by a function of `ordered` that returns early, because nobody takes its result."""


def ordered(
    function: Callable[[WorkT], ResultT],
    items: Iterable[WorkT],
    *,
    workers: int,
    window: int = WINDOW,
    cost: Callable[[WorkT], float] = lambda item: 0,
    capacity: float = float("inf"),
    stop: Event | None = None,
) -> Generator[ResultT, None, None]:
    """Yields `function(item)` of each item, in order, computed by `workers` threads.

    `window`: items that are begun and whose results the caller has not taken. `cost`, `capacity`: items that are begun and have not ended
    cost at most `capacity` together; an item that costs more is computed alone. Items are read in the caller's thread.

    An error of `function` is raised in place of its result, an error of reading items after the results of those before it; both end the
    run. `stop` is set when the run ends, also by Ctrl-C or because the caller takes no more: a long `function` looks at it and raises
    StoppedError. The threads have ended when this iterator has.
    """
    stop = stop or Event()
    changed = Condition()
    pending: deque[Future[ResultT]] = deque()
    running, load = 0, 0.0

    def begin(item: WorkT, price: float) -> None:
        nonlocal running, load
        with changed:
            running, load = running + 1, load + price
        future = pool.submit(function, item)
        pending.append(future)
        future.add_done_callback(lambda _: end(price))

    def end(price: float) -> None:
        nonlocal running, load
        with changed:
            running, load = running - 1, load - price
            changed.notify()

    def fits(price: float) -> bool:
        return not running or load + price <= capacity

    def first_ended() -> bool:
        return bool(pending) and pending[0].done()

    errors: list[Exception] = []
    readable = _until_failure(items, errors)
    with thread_pool(workers, "muntin-pipeline") as pool:
        try:
            while True:
                while len(pending) >= window:
                    yield pending.popleft().result()
                item = next(readable, _END)
                if item is _END:
                    break
                price = cost(item)  # type: ignore[arg-type]
                while not fits(price):
                    with changed:
                        changed.wait_for(lambda: fits(price) or first_ended())  # noqa: B023 - called before the next item
                    while first_ended():
                        yield pending.popleft().result()
                begin(item, price)  # type: ignore[arg-type]
            while pending:
                yield pending.popleft().result()
            for error in errors:
                raise error
        finally:
            stop.set()
            for future in pending:
                future.cancel()


def prefetched(items: Iterable[WorkT], depth: int = 2) -> Generator[WorkT, None, None]:
    """Yields the items, which another thread reads `depth` ahead. An error of reading is raised in place of its item."""
    iterator = iter(items)
    with thread_pool(1, "muntin-prefetch") as pool:
        pending = deque(pool.submit(next, iterator, _END) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not _END:
                pending.append(pool.submit(next, iterator, _END))
                yield item  # type: ignore[misc]
        finally:
            for future in pending:
                future.cancel()


def _until_failure(items: Iterable[WorkT], errors: list[Exception]) -> Iterator[WorkT]:
    """Yields the items before the first one that cannot be read, whose error is appended to `errors`."""
    try:
        yield from items
    except Exception as error:  # noqa: BLE001 - the caller raises it after the results of earlier items
        errors.append(error)
