"""The mailbox makes every call, in order, and a failing call affects no other."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from muntin.serving.inference.mailbox import Mailbox


def test_calls_from_threads_in_order() -> None:
    async def run() -> list[tuple[int, int]]:
        box, calls = Mailbox(asyncio.get_running_loop()), []
        here = threading.get_ident()

        def take(what: tuple[int, int]) -> None:
            assert threading.get_ident() == here
            calls.append(what)

        threads = [threading.Thread(target=lambda n=n: [box.put(take, (n, k)) for k in range(2000)]) for n in range(4)]
        for thread in threads:
            thread.start()
        while len(calls) < 8000:
            await asyncio.sleep(0.001)
        for thread in threads:
            thread.join()
        return calls

    calls = asyncio.run(asyncio.wait_for(run(), 30))
    for n in range(4):
        assert [k for m, k in calls if m == n] == list(range(2000))


def test_call_on_the_loop_at_once() -> None:
    async def run() -> list[int]:
        box, calls = Mailbox(asyncio.get_running_loop()), list[int]()
        box.put(calls.append, 1)
        return list(calls)

    assert asyncio.run(run()) == [1]


def test_empty_on_a_busy_loop() -> None:
    async def run() -> list[int]:
        box, calls = Mailbox(asyncio.get_running_loop()), list[int]()
        thread = threading.Thread(target=lambda: [box.put(calls.append, n) for n in range(3)])
        thread.start()
        thread.join()
        assert calls == []  # the loop has had no turn
        box.empty()
        assert calls == [0, 1, 2]
        await asyncio.to_thread(box.put, calls.append, 3)
        while len(calls) < 4:
            await asyncio.sleep(0.001)
        return calls

    assert asyncio.run(asyncio.wait_for(run(), 30)) == [0, 1, 2, 3]


def test_failing_call_is_reported() -> None:
    async def run() -> tuple[list[Any], list[int]]:
        loop, reported, calls = asyncio.get_running_loop(), list[Any](), list[int]()
        loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
        box = Mailbox(loop)

        def fail(_: int) -> None:
            raise ValueError("no")

        def put() -> None:
            box.put(fail, 0)
            box.put(calls.append, 1)

        await asyncio.to_thread(put)
        while not calls:
            await asyncio.sleep(0.001)
        return reported, calls

    reported, calls = asyncio.run(asyncio.wait_for(run(), 10))
    assert [type(error) for error in reported] == [ValueError]
    assert calls == [1]


def test_closed_loop_raises() -> None:
    loop = asyncio.new_event_loop()
    boxes: list[Mailbox] = []
    loop.call_soon(lambda: (boxes.append(Mailbox(loop)), loop.stop()))
    loop.run_forever()
    loop.close()
    failed: list[BaseException] = []

    def put() -> None:
        try:
            boxes[0].put(print, None)
        except RuntimeError as error:
            failed.append(error)

    thread = threading.Thread(target=put)
    thread.start()
    thread.join()
    assert [type(error) for error in failed] == [RuntimeError]
