"""An engine in a process of its own: it answers as one here does, and whatever becomes of it is an error here, and no more."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from muntin.errors import ArtifactError, DataError, VerificationError
from muntin.runtime.buffers import KEPT as BUFFERS
from muntin.runtime.memory import kills_for_memory
from muntin.runtime.options import SessionOptions
from muntin.serving import engine_process, engine_start
from muntin.serving.batcher import Batcher, Job
from muntin.serving.engine_host import KEPT, PLACES, error_of, said_of
from muntin.serving.engine_process import DEATHS, EngineProcess, can_open_apart, open_apart
from muntin.serving.engine_start import Running
from muntin.serving.executor import TILE, Executor, Group, Work
from muntin.serving.latency import LatencyModel
from muntin.serving.probation import ArtifactLoader
from muntin.serving.rollout import Rollout
from muntin.serving.runner import Runner
from muntin.serving.scheduling import Standing, take_short_turns
from muntin.serving.slot import Slot
from muntin.serving.version import Call, EngineDiedError, NotReadyError, OutOfMemoryError, TookTooLongError, open_version

pytestmark = pytest.mark.skipif(not can_open_apart(), reason="files cannot be handed to another process here")
LINUX = sys.platform.startswith("linux")
OPENING = SessionOptions(threads=1, dynamic=True)
EXAMPLE = Call((1, 8, 8))


def stop(process: int) -> None:
    """It hangs from now on: where a core is busy, a signal takes its time."""
    os.kill(process, signal.SIGSTOP)
    while LINUX and Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.001)


def images_of(seed: int, rows: int, height: int, width: int, channels: int = 3) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (rows, height, width, channels)).astype(np.uint8)


def apart(path: Path, *, rest: float = 0.0, seconds: float = 60.0, stopped: Callable[[], bool] = lambda: False) -> EngineProcess:
    session = open_apart(path, OPENING, [EXAMPLE], rest=rest, seconds=seconds, stopped=stopped).session
    assert isinstance(session, EngineProcess)
    return session


@pytest.fixture(scope="module")
def path(write_pixels: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose scores are the pixels."""
    return write_pixels(tmp_path_factory.mktemp("apart") / "pixels")


@pytest.fixture
def session(path: Path) -> Iterator[EngineProcess]:
    opened = apart(path)
    yield opened
    opened.close()


def pid_of(session: EngineProcess) -> int:
    (pid,) = session.process_ids
    return pid


def test_it_answers_as_a_session_here_does(session: EngineProcess, path: Path) -> None:
    here = open_version(path, OPENING, [EXAMPLE]).session
    said = ("signature", "engine", "precision", "threads", "streams", "plan")
    assert [getattr(session, name) for name in said] == [getattr(here, name) for name in said]
    kept = []
    for seed in range(4 * PLACES):  # sizes that come again, and more of them than a lane knows
        images = images_of(seed, 1 + seed % 3, 5 + seed % (PLACES + 3), 8)
        kept.append((session(images), here(images), session.labels(images), here.labels(images)))
    for scores, due_scores, labels, due_labels in kept:  # arrays of their own: none was written over by a later call
        np.testing.assert_array_equal(scores, due_scores)
        np.testing.assert_array_equal(labels, due_labels)
    assert session.layers() == here.layers()
    session.warm_up([(2, 9, 9)], labels=True)


@pytest.mark.skipif(not LINUX, reason="memory is read in Linux's form")
def test_large_images_and_answers_leave_nothing_behind(session: EngineProcess) -> None:
    images = images_of(1, 1, 1, KEPT // 3 + 100)
    before = files_of(os.getpid()), files_of(pid_of(session))
    np.testing.assert_array_equal(session.labels(images)[0], images[0].argmax(2))
    found = session(images)
    np.testing.assert_allclose(found[0].transpose(1, 2, 0), images[0], rtol=0.01)
    del found
    assert shared_bytes(pid_of(session)) < KEPT
    for _ in range(3):
        for width in range(1, 2 * PLACES):
            session.labels(images[:, :, :width])
    here, there = files_of(os.getpid()) - before[0], files_of(pid_of(session)) - before[1]
    assert there <= 2 + 3 + PLACES  # of a lane, its images in each of two models, and its answers
    assert here <= 2 + 1 + 2 * BUFFERS  # a mapping holds the file once more


def files_of(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def shared_bytes(pid: int) -> int:
    """Resident, of memory that is shared."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssShmem")]
    return int(line.split()[1]) << 10


def test_threads_may_share_it(session: EngineProcess) -> None:
    batches = [images_of(seed, 1 + seed % 3, 8, 8 + seed % 5) for seed in range(60)]
    with ThreadPoolExecutor(5) as pool:
        for images, labels in zip(batches, pool.map(session.labels, batches), strict=True):
            np.testing.assert_array_equal(labels, images.argmax(3))


def test_what_is_no_image_is_refused_here(session: EngineProcess) -> None:
    pid = session.process_ids
    wrongs: list[Any] = [images_of(1, 1, 4, 4, channels=4), np.zeros((1, 2, 2, 3), np.float32)]
    for wrong in wrongs:
        with pytest.raises(DataError):
            session(wrong)
    assert session.process_ids == pid


def die(session: EngineProcess, number: signal.Signals = signal.SIGKILL) -> EngineDiedError:
    """Ends its process in the midst of a call; what that raises."""
    pid, raised = pid_of(session), []
    stop(pid)

    def ask() -> None:
        with pytest.raises(EngineDiedError) as caught:
            session(images_of(1, 1, 8, 8))
        raised.append(caught.value)

    thread = threading.Thread(target=ask)
    thread.start()
    while not any(lane.asked_at < inf for lane in session._now.running.busy.copy()):  # type: ignore[union-attr]
        time.sleep(0.001)
    os.kill(pid, number)
    os.kill(pid, signal.SIGCONT)
    thread.join(20)
    return raised[0]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_an_engine_that_dies_fails_one_call_and_is_begun_again(session: EngineProcess, number: signal.Signals) -> None:
    images = images_of(1, 1, 8, 8)
    assert re.search(rf"pixels: the process of its engine has ended \(signal {number:d}, ", str(die(session, number)))
    assert session.able
    np.testing.assert_array_equal(session.labels(images), images.argmax(3))
    assert session.deaths == 1


def test_one_that_died_while_nobody_asked_it_fails_no_call(session: EngineProcess) -> None:
    images = images_of(1, 1, 8, 8)
    os.kill(pid_of(session), signal.SIGKILL)
    session._now.running.process.wait()  # type: ignore[union-attr]
    np.testing.assert_array_equal(session.labels(images), images.argmax(3))
    assert session.deaths == 1


def test_who_comes_while_it_is_begun_again_need_not_wait(session: EngineProcess) -> None:
    die(session)
    with session._beginning, pytest.raises(NotReadyError, match="is being begun again"):
        session(images_of(1, 1, 8, 8))
    assert session(images_of(1, 1, 8, 8)).shape == (1, 3, 8, 8)


def test_where_it_cannot_be_begun_now_the_next_call_tries_again(session: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    die(session)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(NotReadyError, match="cannot be begun again now"):
            session(images_of(1, 1, 8, 8))
    assert session(images_of(1, 1, 8, 8)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(("seconds", "stopped", "kind"), [(0.2, False, TookTooLongError), (60.0, True, NotReadyError)])
def test_a_first_call_that_does_not_come_back_is_ended(
    session: EngineProcess, path: Path, seconds: float, stopped: bool, kind: type[Exception]
) -> None:
    running = session._now.running
    assert running is not None
    stop(running.process.pid)
    began = time.monotonic()
    with pytest.raises(kind), engine_process._ended_in_time(running, path, seconds, lambda: stopped):
        session.try_out()
    assert time.monotonic() - began < 30
    assert running.process.poll() is not None


def test_a_first_call_that_dies_is_no_late_one(session: EngineProcess, path: Path) -> None:
    running = session._now.running
    assert running is not None
    with pytest.raises(EngineDiedError), engine_process._ended_in_time(running, path, 60.0, lambda: False):
        die(session)
        raise EngineDiedError("it died")


def test_a_call_does_not_wait_for_another_process_until_it_counts_as_one_that_hangs(
    session: EngineProcess, monkeypatch: pytest.MonkeyPatch, wait_until: Callable[..., None]
) -> None:
    monkeypatch.setattr(engine_process, "_BEGIN_S", 0.01)
    images = images_of(1, 1, 8, 8)
    die(session)
    with pytest.raises(NotReadyError, match="is being begun again"):
        session(images)
    wait_until(lambda: session.process_ids)  # it goes on without the call
    np.testing.assert_array_equal(session.labels(images), images.argmax(3))
    assert session.deaths == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_ends_a_service_as_a_whole_leaves_it_to_the_server_to_end_it(session: EngineProcess, number: signal.Signals) -> None:
    before = session.process_ids
    os.kill(pid_of(session), number)
    time.sleep(0.05)
    assert session(images_of(1, 1, 8, 8)).shape == (1, 3, 8, 8)
    assert session.process_ids == before


def test_one_that_dies_again_and_again_is_left_alone_for_a_while(session: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "PAUSE_S", 1.5)
    images, begin = images_of(1, 1, 8, 8), session._begin
    die(session)

    def fail(*calls: Any, **given: Any) -> Any:
        raise VerificationError("there is no memory to open it")

    session._begin = fail
    for _ in range(DEATHS - 1):
        assert session.able
        with pytest.raises(VerificationError, match="no memory"):
            session(images)
    assert not session.able and session.dead
    with pytest.raises(NotReadyError, match=f"died {DEATHS} times in a row: it is begun again in [12] s"):
        session(images)
    session._begin = begin
    while not session.able:
        time.sleep(0.01)
    assert session.dead  # until it has been begun
    assert session(images).shape == (1, 3, 8, 8)
    assert not session.dead
    die(session)
    assert session.able  # it answered between


def test_another_process_is_compiled_for_the_same(session: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    session.warm_up([(2, 4, 6)], labels=True)
    assert session.calls == [EXAMPLE, Call((2, 4, 6), labels=True)]
    begin, asked = session._begin, []
    session._begin = lambda calls, **given: asked.append(list(calls)) or begin(calls, **given)  # type: ignore[func-returns-value]
    die(session)
    session(images_of(1, 1, 8, 8))
    assert asked == [session.calls]


class Wider:
    """A signature that gives two classes more."""

    def __init__(self, signature: Any) -> None:
        self.signature = signature

    def __getattr__(self, name: str) -> Any:
        return getattr(self.signature, name)

    def scores_shape(self, batch: int, height: int, width: int) -> tuple[int, ...]:
        return (batch, 5, height, width)


def test_after_an_error_both_ends_begin_anew(session: EngineProcess) -> None:
    """A call that fails may have handed memory over, or not."""
    images = images_of(1, 1, 8, 8)
    np.testing.assert_array_equal(session.labels(images), images.argmax(3))
    usual = session.signature
    session.signature = Wider(usual)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="ValueError"):  # its answer does not fit into the place
        session(images)
    session.signature = usual
    pid = session.process_ids
    for seed in range(3):
        images = images_of(seed, 1, 8, 8)
        np.testing.assert_array_equal(session.labels(images), images.argmax(3))
        np.testing.assert_allclose(session(images)[0].transpose(1, 2, 0), images[0], rtol=0.01)
    assert session.process_ids == pid


def test_one_that_hangs_is_interrupted(session: EngineProcess) -> None:
    images, raised = images_of(1, 1, 8, 8), []
    stop(pid_of(session))

    def ask() -> None:
        with pytest.raises(EngineDiedError) as caught:
            session(images)
        raised.append(str(caught.value))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(0.2)
    assert thread.is_alive()
    assert not session.interrupt(60)
    assert thread.is_alive()
    assert session.interrupt(0.1)
    thread.join(20)
    assert len(raised) == 1
    np.testing.assert_array_equal(session.labels(images), images.argmax(3))


def test_what_took_its_place_on_disk_is_not_begun(write_version: Callable[..., Path], tmp_path: Path) -> None:
    session = apart(write_version(tmp_path / "1", 1))
    write_version(tmp_path / "1", 2)
    images = images_of(1, 1, 8, 8)
    assert (session.labels(images) == 1).all()
    die(session)
    for _ in range(DEATHS - 1):
        with pytest.raises(VerificationError, match="1: it was replaced while it served: load it again"):
            session.labels(images)
    with pytest.raises(NotReadyError, match="times in a row"):  # what cannot be begun is not tried again at each call either
        session.labels(images)
    session.close()


def test_closing_ends_the_process_and_leaves_no_file(path: Path) -> None:
    before = files_of(os.getpid()) if LINUX else 0
    session = apart(path)
    pid = pid_of(session)
    session.labels(images_of(1, 1, 8, 8))
    session.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not session.able
    assert not session.interrupt(0)
    with pytest.raises(NotReadyError, match="it is closed"):
        session.labels(images_of(1, 1, 8, 8))
    session.close()
    session._answers._free.clear()
    assert not LINUX or files_of(os.getpid()) == before


ORPHAN = """
import os, sys
from pathlib import Path
from muntin.serving.engine_process import open_apart
from muntin.runtime.options import SessionOptions
opened = open_apart(Path(sys.argv[1]), SessionOptions(threads=1), [], rest=0.0, seconds=60.0, stopped=lambda: False)
print(*opened.session.process_ids, flush=True)
os._exit(0)
"""


def test_it_goes_with_the_process_that_began_it(path: Path, wait_until: Callable[..., None]) -> None:
    told = subprocess.run([sys.executable, "-c", ORPHAN, str(path)], stdout=subprocess.PIPE, check=True, timeout=60)
    wait_until(lambda: not alive(int(told.stdout)))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_one_that_hangs_while_it_opens_goes_by_itself(path: Path) -> None:
    """Where the server that would end it is gone."""
    code = """
import json, socket, time
from muntin.serving import engine_host
engine_host.open_version = lambda *given, **named: time.sleep(60)
question = {"path": ".", "opening": json.loads(%r), "lately": [], "rest": 0.0, "seconds": 0.2}
engine_host._open(socket.socketpair()[0], question)
"""
    opening = json.dumps(asdict(OPENING))
    ended = subprocess.run([sys.executable, "-c", code % opening], timeout=50, check=False)
    assert ended.returncode == -signal.SIGALRM


def test_what_opening_raises_is_raised_here(write_version: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere: no such artefact directory"):
        apart(tmp_path / "nowhere")
    with pytest.raises(VerificationError, match="standard deviations off a golden pair"):
        apart(write_version(tmp_path / "1", shift=30))
    with pytest.raises(VerificationError, match=r"not open and warm after 0\.01 s: it hangs"):
        apart(write_version(tmp_path / "2"), seconds=0.01)
    with pytest.raises(NotReadyError, match="was ended with the server"):
        apart(tmp_path / "2", stopped=lambda: True)


def test_one_that_dies_while_it_opens(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_start, "_START", "import os; os.abort()  # {path} {idle}")
    with pytest.raises(VerificationError, match=r"ended the process that opened it: signal 6, Aborted"):
        apart(path)


@pytest.mark.skipif(not LINUX or not Standing.allowed(), reason="the way back is not allowed here")
def test_it_opens_on_what_the_cores_have_left_and_then_has_its_share(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    mind = Standing.mind

    def watched(self: Standing, process: int, stood: float = 0.0) -> None:
        seen.append(os.sched_getscheduler(process))
        mind(self, process, stood)

    monkeypatch.setattr(Standing, "mind", watched)
    opened: list[EngineProcess] = []

    def open_from_a_thread_of_short_turns() -> None:
        take_short_turns()
        opened.append(apart(path, rest=3.0))

    thread = threading.Thread(target=open_from_a_thread_of_short_turns)
    thread.start()
    thread.join()
    (session,) = opened
    assert set(seen[1:]) == {os.SCHED_IDLE}  # at first it may not have said so yet
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    threads = [int(entry.name) for entry in Path(f"/proc/{pid_of(session)}/task").iterdir()]
    assert {(os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread)) for thread in threads} == {(os.SCHED_OTHER, usual)}
    turns = {turn_of(pid_of(session), thread) for thread in threads}
    assert turns == {turn_of(os.getpid(), threading.get_native_id())}
    session.close()


def turn_of(process: int, thread: int) -> str:
    """The length of a thread's turns, empty where this kernel does not tell it."""
    path = Path(f"/proc/{process}/task/{thread}/sched")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split()[-1] for line in lines if line.startswith("se.slice")), "")


def test_where_there_is_no_way_back_it_rests_between_its_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Standing, "allowed", lambda: False)
    session = apart(path, rest=0.1)
    assert not LINUX or os.sched_getscheduler(pid_of(session)) == os.SCHED_OTHER
    session.close()


class UnheardOfError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ArtifactError("a layer"), ArtifactError, "a layer"),
        (NotReadyError("not yet"), NotReadyError, "not yet"),
        (MemoryError("std::bad_alloc"), MemoryError, "std::bad_alloc"),
        (RuntimeError("out of memory"), RuntimeError, "out of memory"),
        (UnheardOfError("what"), RuntimeError, "UnheardOfError: what"),
        (RuntimeError("x" * 10**6), RuntimeError, "x" * 4000),
    ],
)
def test_errors_come_over_as_far_as_they_are_known(error: Exception, kind: type[Exception], text: str) -> None:
    found = error_of(said_of(error))
    assert type(found) is kind
    assert str(found) == text


# ---- behind a slot ----


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.serving.latency.OVERDUE_UNKNOWN_S", 2.0)
    monkeypatch.setattr("muntin.serving.latency.OVERDUE_S", 2.0)
    monkeypatch.setattr("muntin.serving.runner._GRACE_S", 0.05)


def ask(runner: Runner, slot: Slot, version: str | None = None) -> Any:
    """What a request is answered."""
    return asked(runner, slot, images_of(1, 1, 8, 8), version)[0]


def asked(runner: Runner, slot: Slot, images: NDArray[np.uint8], version: str | None = None) -> tuple[Any, Work]:
    """What a request for labels is answered, and what is known of it then."""
    answered, told = threading.Event(), []
    lease = slot.lease(version)
    work = Work(images=images, lease=lease)
    job = Job(group=Group(lease.version, *images.shape[1:3], labels=True), rows=len(images), payload=work)

    def done(answer: Any) -> None:
        told.append(answer)
        lease.release()
        answered.set()

    runner.submit(job, done)
    assert answered.wait(60)
    return told[0], work


def runner_of(slot: Slot) -> Runner:
    batcher = Batcher(LatencyModel(), objective=None, max_rows=8, queue_rows=100, queue_bytes=1 << 20)
    return Runner(batcher, Executor(slot), interrupt=slot.interrupt)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGSEGV])
def test_what_a_new_version_hangs_or_dies_with_is_answered_by_the_old_one(
    write_version: Callable[..., Path], tmp_path: Path, wait_until: Callable[..., None], number: signal.Signals
) -> None:
    loader = ArtifactLoader(opening=OPENING)
    told: list[str] = []
    slot = Slot("m", loader, rollout=Rollout(for_requests=10**6, max_slowdown=inf), notify=told.append)
    for name in ("1", "2"):
        slot.load(write_version(tmp_path / name, int(name)), name)
    batcher = Batcher(LatencyModel(), objective=None, max_rows=1, queue_rows=100, queue_bytes=1 << 20)
    runner = Runner(batcher, Executor(slot), interrupt=slot.interrupt)
    new = slot.current
    assert new is not None
    assert isinstance(new.session, EngineProcess)
    pid = pid_of(new.session)
    assert (ask(runner, slot) == 2).all()
    stop(pid)
    if number != signal.SIGSTOP:
        threading.Timer(0.3, lambda: [os.kill(pid, each) for each in (number, signal.SIGCONT)]).start()  # type: ignore[func-returns-value]
    assert (ask(runner, slot) == 1).all()
    assert (ask(runner, slot) == 1).all()
    (back,) = [line for line in told if "rolled back to 1" in line]
    if number == signal.SIGSEGV:
        ended = "the process of its engine has ended (signal 11, Segmentation fault)"
        assert [line for line in told if line.endswith(ended)] == [f"m: version 2: {ended}", back]
    wait_until(lambda: not alive(pid))
    assert runner.hanging == 0
    assert runner.close(30)
    slot.close()


@pytest.mark.usefixtures("impatient")
def test_the_only_version_that_hangs_is_begun_again(
    write_version: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muntin.serving.runner.HANGING", 0)  # a thread that hung for good would be the end
    told: list[str] = []
    slot = Slot("m", ArtifactLoader(opening=OPENING), rollout=Rollout(), notify=told.append)
    session = slot.load(write_version(tmp_path / "1", 1), "1").session
    assert isinstance(session, EngineProcess)
    batcher = Batcher(LatencyModel(), objective=None, max_rows=1, queue_rows=100, queue_bytes=1 << 20)
    runner = Runner(batcher, Executor(slot), interrupt=slot.interrupt)
    for _ in range(2):
        stop(pid_of(session))
        assert isinstance(ask(runner, slot), EngineDiedError)
        assert (ask(runner, slot) == 1).all()
    assert runner.able
    os.kill(pid_of(session), signal.SIGSEGV)  # while nobody asks it anything
    session._now.running.process.wait()  # type: ignore[union-attr]
    assert (ask(runner, slot) == 1).all()
    deaths = [line.partition("has ended ")[2] for line in told if "the process of its engine" in line]
    assert deaths == ["(signal 9, Killed)", "(signal 9, Killed)", "(signal 11, Segmentation fault)"]
    assert runner.close(30)
    slot.close()


def test_an_engine_that_dies_before_its_first_call_is_told_as_what_could_not_be_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(self: EngineProcess) -> None:
        raise NotReadyError("its engine died, and is being begun again")

    monkeypatch.setattr(EngineProcess, "try_out", gone)
    with pytest.raises(VerificationError, match="its engine died"):
        apart(path)
    over = threading.Event()
    monkeypatch.setattr(EngineProcess, "try_out", lambda self: (over.set(), gone(self)))
    with pytest.raises(NotReadyError):
        apart(path, stopped=over.is_set)


# ---- where there is no memory ----


def limit(folder: Path, bytes_: int) -> None:
    """Makes a control group whose processes may have so much memory from now on."""
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
    """A place for one below this process's own. Skips where there is none to be had: few may make one."""
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
def bounded(control_group: Path, session: EngineProcess) -> EngineProcess:
    """Its process, and each that is begun in its place, can have 16 MiB more and no other one is bounded so."""
    limit(control_group, 16 << 20)

    def bound(running: Running) -> Running:
        (control_group / "cgroup.procs").write_text(str(running.process.pid), encoding="ascii")
        return running

    begin = session._begin
    session._begin = lambda *args, **options: bound(begin(*args, **options))
    session.labels(images_of(1, 1, 8, 8))
    assert Path(f"/proc/{pid_of(session)}/oom_score_adj").read_text(encoding="ascii").strip() == "300"
    assert session._now.running is not None
    bound(session._now.running)
    return session


def slot_of(shelf: Any, monkeypatch: pytest.MonkeyPatch, *sessions: EngineProcess) -> Slot:
    """One in which each has taken over from the one before."""
    slot = Slot("m", shelf, rollout=Rollout(for_requests=10**6, max_slowdown=inf))
    for number, session in enumerate(sessions, 1):
        shelf.signatures[str(number)] = session.signature
        monkeypatch.setattr(slot.load(Path(str(number)), str(number)), "_session", session)
    return slot


def test_a_picture_that_the_kernel_ends_the_engine_for_is_computed_in_tiles(
    bounded: EngineProcess, shelf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux grants memory that it does not have, and ends a process when it is used."""
    slot = slot_of(shelf, monkeypatch, bounded)
    assert slot.current is not None
    runner = runner_of(slot)
    images = images_of(1, 1, 2000, 2000)
    for deaths in (1, 2, 2):  # from the second on it is known; a call beside it might have been to blame for the first
        labels, work = asked(runner, slot, images)
        np.testing.assert_array_equal(labels, images.argmax(3))
        assert work.recovered == f"in tiles of {TILE} pixels"
        assert bounded.deaths == deaths
    assert bounded.last_death == "the process of its engine has ended (signal 9, Killed: out of memory)"
    assert slot.current.latencies.examples == {}  # a new version is not asked to compute it in one piece
    small = images_of(1, 2, 8, 8)
    labels, work = asked(runner, slot, small)
    np.testing.assert_array_equal(labels, small.argmax(3))
    assert work.recovered == ""
    runner.close()


@pytest.mark.skipif(not LINUX, reason="one process limits another by Linux's prlimit")
def test_a_picture_that_the_system_refuses_memory_for_is_computed_in_tiles(
    session: EngineProcess, shelf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = slot_of(shelf, monkeypatch, session)
    runner = runner_of(slot)
    small, large = images_of(1, 1, TILE, TILE), images_of(1, 1, 4000, 3000)
    asked(runner, slot, small)
    mapped = int(Path(f"/proc/{pid_of(session)}/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.prlimit(pid_of(session), resource.RLIMIT_AS, (mapped + large.nbytes + (32 << 20),) * 2)  # its images it has mapped, too
    labels, work = asked(runner, slot, large)
    np.testing.assert_array_equal(labels, large.argmax(3))
    assert work.recovered == f"in tiles of {TILE} pixels"
    assert session.deaths == 0
    runner.close()


def test_a_version_that_the_kernel_ends_is_sent_back_where_the_one_before_can_compute(
    path: Path, bounded: EngineProcess, shelf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = apart(path)
    slot = slot_of(shelf, monkeypatch, before, bounded)
    runner = runner_of(slot)
    images = images_of(1, 1, 2000, 2000)
    labels, work = asked(runner, slot, images)
    np.testing.assert_array_equal(labels, images.argmax(3))
    assert (work.version, work.recovered, before.deaths, bounded.deaths) == ("1", "", 0, 1)
    assert slot.current is not None
    assert slot.current.name == "1"
    runner.close()
    before.close()


def test_what_this_process_ends_did_not_lack_memory(session: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the kernel does to others meanwhile."""
    running = session._now.running
    assert running is not None
    running._kills = 0
    monkeypatch.setattr(engine_start, "kills_for_memory", lambda: 1)
    running.interrupt()
    assert running.how_it_ended() == ("signal 9, Killed", False)


def test_two_calls_that_die_at_once_die_of_the_same(session: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_start, "kills_for_memory", lambda: 10**9)  # more than when it was begun
    pid, died = pid_of(session), []
    stop(pid)

    def ask() -> None:
        with pytest.raises(OutOfMemoryError) as caught:
            session(images_of(1, 1, 8, 8))
        died.append((str(caught.value), caught.value.process))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    running = session._now.running
    assert running is not None
    while len([lane for lane in running.busy.copy() if lane.asked_at < inf]) < len(threads):
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.kill(pid, signal.SIGCONT)
    for thread in threads:
        thread.join(20)
    assert len(died) == len(threads)
    assert len(set(died)) == 1
    assert died[0][1] == pid
    assert session.deaths == 1


def test_an_engine_is_there_again(session: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.revive(0.0)
    begin = session._begin
    monkeypatch.setattr(session, "_begin", lambda *args, **options: (time.sleep(0.3), begin(*args, **options))[1])
    die(session)
    assert not session.revive(0.1)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(session.revive, [20.0] * 3)) == [True] * 3

    def fails(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(session, "_begin", fails)
    die(session)
    assert not session.revive(20.0)  # and says so at once


def test_who_was_killed_while_the_kernel_ended_somebody_may_have_lacked_memory(
    session: EngineProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = 5
    monkeypatch.setattr(engine_start, "kills_for_memory", lambda: kills)
    monkeypatch.setattr(engine_start, "_LOOK_S", 0.0)
    session.labels(images_of(1, 1, 8, 8))
    monkeypatch.setattr(engine_start, "_LOOK_S", 1e6)  # it has looked just now
    kills = 6
    died = die(session)
    assert type(died) is OutOfMemoryError
    assert str(died).endswith("(signal 9, Killed: out of memory)")
    session.labels(images_of(1, 1, 8, 8))
    died = die(session)
    assert type(died) is EngineDiedError  # nobody more was
    assert str(died).endswith("(signal 9, Killed)")
