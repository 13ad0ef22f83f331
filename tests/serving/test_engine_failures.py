"""Requests while engines die, hang or lack memory: none is lost if a version can compute it."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from muntin.runtime.host.memory import kills_for_memory
from muntin.runtime.options import SessionOptions
from muntin.runtime.tiles import TILE
from muntin.serving.batching.batcher import Batcher
from muntin.serving.batching.job import Job
from muntin.serving.batching.latency_model import LatencyModel
from muntin.serving.batching.workers import Runner
from muntin.serving.inference.executor import Executor, Work
from muntin.serving.inference.groups import image_group
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.versions.rollout import Rollout
from muntin.serving.versions.slot import Slot
from muntin.serving.worker.launch import RunningEngine
from muntin.serving.worker.opening import EngineDiedError
from muntin.serving.worker.remote_session import RemoteSession, can_open_remote, open_remote
from serving_parts import image_call, random_images, state_of, stop_process

pytestmark = pytest.mark.skipif(not can_open_remote(), reason="files cannot be passed to another process here")
LINUX = sys.platform.startswith("linux")
OPTIONS = SessionOptions(threads=1, dynamic=True)
EXAMPLE = image_call((1, 8, 8))


SMALL = random_images(1, 1, 8, 8, 3)


def running_of(session: RemoteSession) -> RunningEngine:
    running = session._running
    assert running is not None
    return running


def pid_of(session: RemoteSession) -> int:
    return running_of(session).process.pid


@pytest.fixture
def session(write_pixels: Any, tmp_path: Path) -> Iterator[RemoteSession]:
    """A session of a model whose scores are the pixels, of this test's own: its memory is bounded."""
    path = write_pixels(tmp_path / "pixels")
    session = open_remote(path, OPTIONS, [EXAMPLE], seconds=60.0).session
    assert isinstance(session, RemoteSession)
    yield session
    session.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.serving.batching.latency_model.OVERDUE_UNKNOWN_S", 1.5)
    monkeypatch.setattr("muntin.serving.batching.latency_model.OVERDUE_S", 1.5)
    monkeypatch.setattr("muntin.serving.batching.workers._GRACE_S", 0.05)


def answered(runner: Runner, slot: Slot, images: NDArray[np.uint8] = SMALL) -> tuple[Any, Work]:
    """The answer to a request for labels, and how it was computed."""
    done, answers = threading.Event(), []
    lease = slot.lease()
    work = Work(inputs={"images": images}, lease=lease)

    def take(answer: Any) -> None:
        answers.append(answer)
        lease.release()
        done.set()

    runner.submit(Job(group=image_group(lease.version, *images.shape[1:3], labels=True), rows=len(images), payload=work), take)
    assert done.wait(60)
    return answers[0]["labels"] if isinstance(answers[0], dict) else answers[0], work


def runner_of(slot: Slot) -> Runner:
    batcher = Batcher(LatencyModel(), objective=None, max_rows=8, queue_rows=100, queue_bytes=1 << 20)
    return Runner(batcher, Executor(slot), interrupt=slot.interrupt)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGSEGV])
def test_old_version_answers_when_the_new_one_fails(write_version: Any, tmp_path: Path, wait_until: Any, number: signal.Signals) -> None:
    lines: list[str] = []
    slot = Slot("m", ArtifactLoader(options=OPTIONS), rollout=Rollout(for_requests=10**6, max_slowdown=inf), notify=lines.append)
    for name in ("1", "2"):
        slot.load(write_version(tmp_path / name, int(name)), name)
    runner, new = runner_of(slot), slot.current
    assert new is not None
    assert isinstance(new.session, RemoteSession)
    pid = pid_of(new.session)
    assert (answered(runner, slot)[0] == 2).all()
    stop_process(pid)
    if number != signal.SIGSTOP:
        threading.Timer(0.3, lambda: [os.kill(pid, each) for each in (number, signal.SIGCONT)]).start()  # type: ignore[func-returns-value]
    assert (answered(runner, slot)[0] == 1).all()
    assert (answered(runner, slot)[0] == 1).all()
    (rollback,) = [line for line in lines if "rolled back to 1" in line]
    if number == signal.SIGSEGV:
        ended = "the process of its engine has ended (signal 11, Segmentation fault)"
        assert [line for line in lines if line.endswith(ended)] == [f"m: version 2: {ended}", rollback]
    wait_until(lambda: state_of(pid) == "Z")
    assert runner.hanging == 0
    assert runner.close(30)
    slot.close()


@pytest.mark.usefixtures("impatient")
def test_only_version_is_restarted_after_a_hang(write_version: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.serving.batching.workers.HANGING", 0)  # no other thread may take the place of one that hangs
    for name in ("OVERDUE_UNKNOWN_S", "OVERDUE_S"):
        monkeypatch.setattr(f"muntin.serving.batching.latency_model.{name}", 3.0)  # longer than a restart takes
    lines: list[str] = []
    slot = Slot("m", ArtifactLoader(options=OPTIONS), rollout=Rollout(), notify=lines.append)
    session = slot.load(write_version(tmp_path / "1", 1), "1").session
    assert isinstance(session, RemoteSession)
    runner = runner_of(slot)
    stop_process(pid_of(session))
    assert isinstance(answered(runner, slot)[0], EngineDiedError)
    assert (answered(runner, slot)[0] == 1).all()
    assert runner.able
    os.kill(pid_of(session), signal.SIGSEGV)  # between two calls
    running_of(session).process.wait()
    assert (answered(runner, slot)[0] == 1).all()
    deaths = [line.partition("has ended ")[2] for line in lines if "the process of its engine" in line]
    assert deaths == ["(signal 9, Killed)", "(signal 11, Segmentation fault)"]
    assert runner.close(30)
    slot.close()


# ---- where there is no memory ----


def limit(folder: Path, bytes_: int) -> None:
    """Make a control group whose processes may have so much memory."""
    folder.mkdir()
    try:
        for name in ("memory.max", "memory.limit_in_bytes"):  # of version 2 and of version 1
            if (folder / name).exists():
                (folder / name).write_text(str(bytes_), encoding="ascii")
                break
        else:
            pytest.skip("control groups here do not limit memory")
        for name, value in (("memory.swap.max", 0), ("memory.memsw.limit_in_bytes", bytes_)):
            if (folder / name).exists():
                (folder / name).write_text(str(value), encoding="ascii")
    except OSError as error:
        pytest.skip(f"no limit can be set here: {error}")


@pytest.fixture
def control_group() -> Iterator[Path]:
    """The path of a control group below this process's own. Skips where none can be made."""
    if kills_for_memory() is None:
        pytest.skip("the kernel does not count whom it ends for want of memory")
    for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines() if LINUX else ():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory") and path:
            folder = Path("/sys/fs/cgroup", controllers, path.lstrip("/"), f"muntin-test-{os.getpid()}")
            try:
                folder.mkdir()
            except OSError:
                continue
            known = any((folder / name).exists() for name in ("memory.max", "memory.limit_in_bytes"))
            folder.rmdir()
            if known:
                yield folder
                until = time.monotonic() + 10
                while folder.exists() and time.monotonic() < until:  # until what was in it has ended
                    with suppress(OSError):
                        folder.rmdir()
                    time.sleep(0.01)
                return
    pytest.skip("no control group can be made here that limits memory")


@pytest.fixture
def bounded(control_group: Path, session: RemoteSession) -> RemoteSession:
    """A session whose process, and each later one, can have 16 MiB more."""
    limit(control_group, 16 << 20)

    def bound(running: RunningEngine) -> RunningEngine:
        (control_group / "cgroup.procs").write_text(str(running.process.pid), encoding="ascii")
        return running

    start = session._start
    session._start = lambda *args, **options: bound(start(*args, **options))
    session.labels(SMALL)
    assert Path(f"/proc/{pid_of(session)}/oom_score_adj").read_text(encoding="ascii").strip() == "300"
    bound(running_of(session))
    return session


def slot_of(shelf: Any, monkeypatch: pytest.MonkeyPatch, *sessions: RemoteSession) -> Slot:
    """A slot in which each session has taken over from the one before."""
    slot = Slot("m", shelf, rollout=Rollout(for_requests=10**6, max_slowdown=inf))
    for number, session in enumerate(sessions, 1):
        shelf.signatures[str(number)] = session.signature
        monkeypatch.setattr(slot.load(Path(str(number)), str(number)), "_session", session)
    return slot


def test_image_that_the_kernel_ends_the_engine_for(bounded: RemoteSession, shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux grants memory that it does not have, and ends a process that uses it."""
    slot = slot_of(shelf, monkeypatch, bounded)
    assert slot.current is not None
    runner = runner_of(slot)
    images = random_images(1, 1, 1600, 1600, 3)
    for _ in range(2):
        labels, work = answered(runner, slot, images)
        np.testing.assert_array_equal(labels, images.argmax(3))
        assert work.recovered == f"in tiles of {TILE} pixels"
        assert bounded.deaths == 1
    assert bounded.last_death == "the process of its engine has ended (signal 9, Killed: out of memory)"
    assert slot.current.latencies.calls == ()
    small = random_images(2, 1, 8, 8, 3)
    labels, work = answered(runner, slot, small)
    np.testing.assert_array_equal(labels, small.argmax(3))
    assert work.recovered == ""
    runner.close()


@pytest.mark.skipif(not LINUX, reason="one process limits another by Linux's prlimit")
def test_image_that_the_system_refuses_memory_for(session: RemoteSession, shelf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slot = slot_of(shelf, monkeypatch, session)
    runner = runner_of(slot)
    small, large = random_images(1, 1, TILE, TILE, 3), random_images(1, 1, 2500, 2000, 3)
    answered(runner, slot, small)
    mapped = int(Path(f"/proc/{pid_of(session)}/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(pid_of(session), resource.RLIMIT_AS, (mapped + large.nbytes + (32 << 20),) * 2)  # its images it has mapped, too
    labels, work = answered(runner, slot, large)
    np.testing.assert_array_equal(labels, large.argmax(3))
    assert work.recovered == f"in tiles of {TILE} pixels"
    assert session.deaths == 0
    runner.close()
