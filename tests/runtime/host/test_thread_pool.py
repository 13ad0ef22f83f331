from __future__ import annotations

import sys
from pathlib import Path
from threading import get_native_id
from time import sleep

import pytest

from muntin.runtime.host.thread_pool import thread_pool


def identify(_: int) -> int:
    sleep(0.001)
    return get_native_id()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="tasks are listed on Linux only")
def test_threads_have_ended_after_the_block() -> None:
    for _ in range(20):
        with thread_pool(4, "test") as pool:
            ids = set(pool.map(identify, range(8)))
            assert all(Path(f"/proc/self/task/{id_}").exists() for id_ in ids)
        assert len(ids) > 1
        assert not any(Path(f"/proc/self/task/{id_}").exists() for id_ in ids)
