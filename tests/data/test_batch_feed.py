from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from muntin.data import batch_feed
from muntin.data.batch_feed import BatchFeed, ImageBatch, prefetch, worker_count
from muntin.errors import DataError
from muntin.runtime.host.hardware import usable_cores


class Numbered:
    """Batches that hold their step. The step `bad` raises DataError; each batch takes `seconds`."""

    def __init__(self, bad: int = -1, seconds: float = 0.0) -> None:
        self.bad, self.seconds, self.batches, self.threads = bad, seconds, 0, 0

    def batch(self, step: int) -> ImageBatch:
        if step == self.bad:
            raise DataError("this picture is damaged")
        time.sleep(self.seconds)
        self.batches += 1
        self.threads = torch.get_num_threads()
        return torch.tensor([step]), torch.tensor([step])


def workers() -> Sequence[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("muntin-prefetch")]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 3])
def test_prefetch_in_order_on_one_core(two_threads: None, count: int) -> None:
    """Later batches are ready first: the wait falls with the step."""
    crops = Numbered()

    def batch(step: int) -> ImageBatch:
        time.sleep(0.002 * (8 - step))
        return crops.batch(step)

    batches = prefetch(batch, 3, 9, workers=count)
    assert [(step, int(images)) for step, (images, _) in batches] == [(step, step) for step in range(3, 9)]
    assert list(prefetch(crops.batch, 3, 3, workers=count)) == []
    assert crops.threads == 1
    assert torch.get_num_threads() == 2
    assert workers() == []


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted on Linux")
def test_prefetch_without_openmp_threads(two_threads: None) -> None:
    class Computed:
        def batch(self, step: int) -> ImageBatch:
            whole = torch.zeros(1 << 22).exp_().to(torch.int64)  # large enough that torch would use several threads
            return whole, whole

    torch.zeros(1 << 22).exp_()
    before = len(list(Path("/proc/self/task").iterdir()))
    assert [len(list(Path("/proc/self/task").iterdir())) - before for _ in prefetch(Computed().batch, 0, 3)] == [1, 1, 1]


def test_prefetch_at_most_depth_ahead() -> None:
    crops = Numbered()
    batches = prefetch(crops.batch, 0, 100, depth=3)
    next(batches)
    time.sleep(0.05)
    assert crops.batches <= 3
    batches.close()  # type: ignore[attr-defined]
    assert workers() == []


def test_prefetch_with_break_ends_within_one_batch() -> None:
    crops = Numbered(seconds=0.05)
    for _ in prefetch(crops.batch, 0, 100, depth=10):
        break
    assert crops.batches <= 3  # of ten requested: the first, the one in progress, and one of tolerance
    assert workers() == []


def test_prefetch_with_a_failing_consumer() -> None:
    def consume() -> None:
        for step, _ in prefetch(Numbered().batch, 0, 100):
            if step == 2:
                raise RuntimeError("the training step failed")

    with pytest.raises(RuntimeError) as error:
        consume()
    assert workers() == []  # although the traceback still holds the generator
    del error


def test_prefetch_with_a_failing_batch() -> None:
    steps = []
    with pytest.raises(DataError, match="damaged"):
        for step, _ in prefetch(Numbered(bad=4).batch, 0, 100):
            steps.append(step)
    assert steps == [0, 1, 2, 3]
    assert workers() == []


def test_prefetch_with_several_workers_at_once() -> None:
    """Three batches are made at one time: none is finished before the third has begun."""
    together = threading.Barrier(3, timeout=30)

    def batch(step: int) -> ImageBatch:
        together.wait()
        return torch.tensor([step]), torch.tensor([step])

    assert [step for step, _ in prefetch(batch, 0, 6, workers=3)] == list(range(6))


@pytest.mark.parametrize(
    ("requested", "device", "cores", "count"),
    [(None, "cpu", 2, 1), (None, "cpu", 16, 4), (None, "cuda", 1, 1), (None, "cuda", 6, 5), (None, "cuda", 96, 8), (3, "cpu", 2, 3)],
)
def test_worker_count(requested: int | None, device: str, cores: int, count: int) -> None:
    assert worker_count(requested, device=device, cores=cores) == count


def test_workers_of_processes_that_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(usable_cores()))
    assert worker_count(None, device="cuda") == 1


class Clock:
    """Seconds that pass only by `sleep`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class Slow(Future[Any]):
    """A batch that one waits `seconds` for."""

    def __init__(self, clock: Clock, seconds: float) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def result(self, timeout: float | None = None) -> Any:
        self.clock.now += self.seconds


def test_share_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(batch_feed, "time", clock)
    monkeypatch.setattr(batch_feed, "usable_cores", lambda: 8)
    feed = BatchFeed(3, device="cpu")

    def step(wait: float, work: float) -> None:
        feed._receive(Slow(clock, wait))
        clock.now += work
        feed.end_step()
        clock.now += 100  # a validation

    step(50, 1)  # the first one, for which nothing could be ready
    assert (feed.waiting, feed.recent_waiting()) == (None, {})
    step(1, 3)
    assert feed.waiting == feed.recent_waiting()["waiting"] == 0.25
    step(0, 4)
    assert (feed.waiting, feed.recent_waiting()) == (0.125, {"waiting": 0.0})
    assert feed.advice() == ()
    for _ in range(20):
        step(4, 4)
    (advice,) = feed.advice()
    assert "waited for its batches 48% of the time (3 workers): set data.workers to 6 (8 cores are usable)" in advice
    monkeypatch.setattr(batch_feed, "usable_cores", lambda: 2)
    assert "(3 workers): raise data.cache_mib" in feed.advice()[0]


def test_copies_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of a GPU, with PyTorch's streams of the CPU: batches are pinned, copied, and recorded for the computing stream."""
    calls: list[str] = []

    def named(name: str) -> Any:
        return lambda tensor, *_: (calls.append(name), tensor)[1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", named("pin"))
    monkeypatch.setattr(torch.Tensor, "record_stream", named("record"))
    copies = batch_feed._DeviceCopies(torch.device("cpu"))
    copies.use_device()
    images, target = copies.receive(copies.send((torch.arange(3), torch.arange(2))))
    assert (images.tolist(), target.tolist()) == ([0, 1, 2], [0, 1])
    assert calls == ["pin", "pin", "record", "record"]
