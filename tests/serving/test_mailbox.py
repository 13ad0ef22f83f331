"""The mailbox: everything that is put arrives, in order, and one failing call takes no other with it."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from muntin.serving.mailbox import Mailbox


def test_what_threads_put_arrives_in_their_order() -> None:
    async def run() -> list[tuple[int, int]]:
        box, found = Mailbox(asyncio.get_running_loop()), []
        here = threading.get_ident()

        def take(what: tuple[int, int]) -> None:
            assert threading.get_ident() == here
            found.append(what)

        threads = [threading.Thread(target=lambda n=n: [box.put(take, (n, k)) for k in range(2000)]) for n in range(4)]
        for thread in threads:
            thread.start()
        while len(found) < 8000:
            await asyncio.sleep(0.001)
        for thread in threads:
            thread.join()
        return found

    found = asyncio.run(asyncio.wait_for(run(), 30))
    for n in range(4):
        assert [k for m, k in found if m == n] == list(range(2000))


def test_on_the_loop_itself_it_is_called_at_once() -> None:
    async def run() -> list[int]:
        box, found = Mailbox(asyncio.get_running_loop()), list[int]()
        box.put(found.append, 1)
        return list(found)

    assert asyncio.run(run()) == [1]


def test_a_loop_that_is_busy_may_look_in_between() -> None:
    async def run() -> list[int]:
        box, found = Mailbox(asyncio.get_running_loop()), list[int]()
        thread = threading.Thread(target=lambda: [box.put(found.append, n) for n in range(3)])
        thread.start()
        thread.join()
        assert found == []  # the loop has had no turn
        box.empty()
        assert found == [0, 1, 2]
        await asyncio.to_thread(box.put, found.append, 3)
        while len(found) < 4:
            await asyncio.sleep(0.001)
        return found

    assert asyncio.run(asyncio.wait_for(run(), 30)) == [0, 1, 2, 3]


def test_a_call_that_fails_is_reported_and_the_next_is_made() -> None:
    async def run() -> tuple[list[Any], list[int]]:
        loop, reported, found = asyncio.get_running_loop(), list[Any](), list[int]()
        loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
        box = Mailbox(loop)

        def fail(_: int) -> None:
            raise ValueError("no")

        def put() -> None:
            box.put(fail, 0)
            box.put(found.append, 1)

        await asyncio.to_thread(put)
        while not found:
            await asyncio.sleep(0.001)
        return reported, found

    reported, found = asyncio.run(asyncio.wait_for(run(), 10))
    assert [type(error) for error in reported] == [ValueError]
    assert found == [1]


def test_a_closed_loop_is_said() -> None:
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
