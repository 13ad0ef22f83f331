"""An engine in a process of its own: it answers as one in this process does, and its death is only an error here."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.errors import ArtifactError, VerificationError
from muntin.runtime.options import SessionOptions
from muntin.serving.worker import engine_process
from muntin.serving.worker import launch as engine_start
from muntin.serving.worker.channel import KEPT_BYTES
from muntin.serving.worker.engine_process import DEATHS
from muntin.serving.worker.launch import RunningEngine
from muntin.serving.worker.opening import EngineDiedError, NotReadyError, OutOfMemoryError, TookTooLongError, open_version
from muntin.serving.worker.remote_session import RemoteSession, can_open_remote, open_remote
from serving_parts import image_call, random_images, state_of, stop_process

pytestmark = pytest.mark.skipif(not can_open_remote(), reason="files cannot be passed to another process here")
LINUX = sys.platform.startswith("linux")
OPTIONS = SessionOptions(threads=1, dynamic=True)
EXAMPLE = image_call((1, 8, 8))


SMALL = random_images(1, 1, 8, 8, 3)


def opened(path: Path, *, seconds: float = 60.0, stopped: Callable[[], bool] = lambda: False) -> RemoteSession:
    session = open_remote(path, OPTIONS, [EXAMPLE], seconds=seconds, stopped=stopped).session
    assert isinstance(session, RemoteSession)
    return session


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a restart takes its time."""
    monkeypatch.setattr(engine_process, "_RESTART_S", 60.0)


@pytest.fixture(scope="module")
def path(write_pixels: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose scores are the pixels."""
    return write_pixels(tmp_path_factory.mktemp("remote") / "pixels")


@pytest.fixture(scope="module")
def shared(path: Path) -> Iterator[RemoteSession]:
    session = opened(path)
    yield session
    session.close()


@pytest.fixture
def session(shared: RemoteSession) -> RemoteSession:
    """The session of all tests, which runs and never died."""
    shared._restart_at = 0.0
    shared.labels(SMALL)
    shared.deaths, shared.last_death, shared.calls = 0, "", [EXAMPLE]
    return shared


def running_of(session: RemoteSession) -> RunningEngine:
    running = session._running
    assert running is not None
    return running


def pid_of(session: RemoteSession) -> int:
    return running_of(session).process.pid


def files_of(pid: int) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())


def shared_bytes(pid: int) -> int:
    """Resident bytes of memory that is shared."""
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("RssShmem")]
    return int(line.split()[1]) << 10


def die(session: RemoteSession, *, calls: int = 1, number: signal.Signals = signal.SIGKILL) -> list[EngineDiedError]:
    """End the process during some calls, and return what they raise."""
    running, raised = running_of(session), []
    stop_process(running.process.pid)

    def ask() -> None:
        with pytest.raises(EngineDiedError) as caught:
            session(SMALL)
        raised.append(caught.value)

    threads = [threading.Thread(target=ask) for _ in range(calls)]
    for thread in threads:
        thread.start()
    while len([channel for channel in running.busy.copy() if channel.asked_at < inf]) < calls:
        time.sleep(0.001)
    os.kill(running.process.pid, number)
    os.kill(running.process.pid, signal.SIGCONT)
    for thread in threads:
        thread.join(20)
    assert len(raised) == calls
    return raised


# ---- answers ----


def test_answers_equal_a_session_in_this_process(session: RemoteSession, path: Path) -> None:
    local = open_version(path, OPTIONS, [EXAMPLE]).session
    for name in ("signature", "engine", "precision", "threads", "streams"):
        assert getattr(session, name) == getattr(local, name)
    kept = []
    for seed in range(16):
        images = random_images(1 + seed % 3, seed, 5 + seed % 7, 8, 3)
        kept.append((session(images), local(images), session.labels(images), local.labels(images)))
    for scores, expected_scores, labels, expected_labels in kept:  # no later call has overwritten them
        np.testing.assert_array_equal(scores, expected_scores)
        np.testing.assert_array_equal(labels, expected_labels)
    session.warm_up([(2, 9, 9)], labels=True)
    session.warm_up([(2, 9, 9)])
    assert session.calls[-2:] == [image_call((2, 9, 9), labels=True), image_call((2, 9, 9))]


@pytest.mark.skipif(not LINUX, reason="memory is read in Linux's form")
def test_memory_of_large_calls_is_freed(session: RemoteSession) -> None:
    images = np.full((1, 1, KEPT_BYTES // 14, 3), 7, np.uint8)  # with their scores a little more than is kept
    before = files_of(os.getpid()), files_of(pid_of(session))
    assert (session(images) == 7).all()
    assert shared_bytes(pid_of(session)) < KEPT_BYTES // 2
    for width in range(1, 20):
        session.labels(images[:, :, :width])
    assert files_of(os.getpid()) - before[0] <= 2  # a socket, and a mapping holds its file once more
    assert files_of(pid_of(session)) - before[1] <= 4


def test_threads_may_share_a_session(session: RemoteSession) -> None:
    batches = [random_images(1 + seed % 3, seed, 8, 8 + seed % 5, 3) for seed in range(40)]
    with ThreadPoolExecutor(5) as pool:
        for images, labels in zip(batches, pool.map(session.labels, batches), strict=True):
            np.testing.assert_array_equal(labels, images.argmax(3))


def test_a_failed_call_leaves_the_process_usable(session: RemoteSession) -> None:
    pid, signature = session.process_ids, session.signature
    session.signature = signature.model_copy(update={"classes": signature.classes * 2})
    with pytest.raises(ArtifactError, match="the model gave"):
        session(SMALL)
    session.signature = signature
    np.testing.assert_array_equal(session.labels(SMALL), SMALL.argmax(3))
    np.testing.assert_allclose(session(SMALL)[0].transpose(1, 2, 0), SMALL[0], rtol=0.01)
    assert session.process_ids == pid


# ---- deaths and restarts ----


def test_death_during_a_call_and_restart(session: RemoteSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.warm_up([(2, 4, 6)], labels=True)
    start, compiled = session._start, []
    monkeypatch.setattr(session, "_start", lambda calls, **options: compiled.append(list(calls)) or start(calls, **options))
    (error,) = die(session, number=signal.SIGSEGV)
    assert re.search(r"pixels: the process of its engine has ended \(signal 11, ", str(error))
    assert session.able
    np.testing.assert_array_equal(session.labels(SMALL), SMALL.argmax(3))
    assert session.deaths == 1
    assert compiled == [[EXAMPLE, image_call((2, 4, 6), labels=True)]]


def test_death_between_calls_fails_no_call(session: RemoteSession) -> None:
    os.kill(pid_of(session), signal.SIGKILL)
    running_of(session).process.wait()
    np.testing.assert_array_equal(session.labels(SMALL), SMALL.argmax(3))
    assert session.deaths == 1


def test_slow_restart_goes_on_without_the_call(session: RemoteSession, monkeypatch: pytest.MonkeyPatch, wait_until: Any) -> None:
    monkeypatch.setattr(engine_process, "_RESTART_S", 0.01)
    die(session)
    for _ in range(2):  # one restart for both
        with pytest.raises(NotReadyError, match="is being begun again"):
            session(SMALL)
    wait_until(lambda: session.process_ids)
    np.testing.assert_array_equal(session.labels(SMALL), SMALL.argmax(3))
    assert session.deaths == 1


def test_pause_after_deaths_in_a_row(session: RemoteSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_process, "PAUSE_S", 1.0)
    die(session)

    def fail(*calls: Any, **options: Any) -> Any:
        raise VerificationError("there is no memory to open it")

    with monkeypatch.context() as patch:
        patch.setattr(session, "_start", fail)
        for _ in range(DEATHS - 1):
            assert session.able
            with pytest.raises(NotReadyError, match="no memory"):
                session(SMALL)
        assert not session.able
        with pytest.raises(NotReadyError, match=f"died {DEATHS} times in a row: it is begun again in [01] s"):
            session(SMALL)
    while not session.able:
        time.sleep(0.01)
    assert session(SMALL).shape == (1, 3, 8, 8)
    die(session)
    assert session.able  # it answered between the deaths


def test_restart_refuses_a_replaced_artefact(write_version: Any, tmp_path: Path) -> None:
    session = opened(write_version(tmp_path / "1", 1))
    write_version(tmp_path / "1", 2)
    assert (session.labels(SMALL) == 1).all()
    die(session)
    for _ in range(DEATHS - 1):
        with pytest.raises(NotReadyError, match="1: it was replaced meanwhile: load it again"):
            session.labels(SMALL)
    with pytest.raises(NotReadyError, match="times in a row"):
        session.labels(SMALL)
    session.close()


def test_revive_waits_for_a_restart(session: RemoteSession, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session.revive(0.0)
    start = session._start
    monkeypatch.setattr(session, "_start", lambda *args, **options: (time.sleep(0.2), start(*args, **options))[1])
    die(session)
    assert not session.revive(0.1)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(session.revive, [20.0] * 3)) == [True] * 3

    def fail(*args: Any, **options: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(session, "_start", fail)
    die(session)
    assert not session.revive(20.0)  # at once


def test_interrupt_ends_a_call_that_hangs(session: RemoteSession) -> None:
    raised: list[str] = []
    stop_process(pid_of(session))

    def ask() -> None:
        with pytest.raises(EngineDiedError) as caught:
            session(SMALL)
        raised.append(str(caught.value))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join(0.2)
    assert not session.interrupt(60)
    assert thread.is_alive()
    assert session.interrupt(0.1)
    thread.join(20)
    assert len(raised) == 1
    np.testing.assert_array_equal(session.labels(SMALL), SMALL.argmax(3))


# ---- the end ----


def test_signals_to_a_whole_service_are_ignored(session: RemoteSession) -> None:
    before = session.process_ids
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid_of(session), number)
    time.sleep(0.05)
    assert session(SMALL).shape == (1, 3, 8, 8)
    assert session.process_ids == before


def test_close_ends_the_process_and_its_files(path: Path) -> None:
    gc.collect()  # sockets of earlier tests
    before = files_of(os.getpid()) if LINUX else 0
    session = opened(path)
    pid = pid_of(session)
    session.labels(SMALL)
    session.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not session.able
    assert not session.interrupt(0)
    with pytest.raises(NotReadyError, match="it is closed"):
        session.labels(SMALL)
    session.close()
    assert not LINUX or files_of(os.getpid()) == before


ORPHAN = """
import os, sys
from pathlib import Path
from muntin.serving.worker.remote_session import open_remote
from muntin.runtime.options import SessionOptions
opened = open_remote(Path(sys.argv[1]), SessionOptions(threads=1), [], seconds=60.0)
print(*opened.session.process_ids, flush=True)
os._exit(0)
"""


def test_process_ends_with_its_server(path: Path, wait_until: Any) -> None:
    server = subprocess.run([sys.executable, "-c", ORPHAN, str(path)], stdout=subprocess.PIPE, check=True, timeout=60)
    wait_until(lambda: state_of(int(server.stdout)) == "Z")


def test_process_that_hangs_in_opening_ends_itself() -> None:
    """The server that would end it may be gone."""
    code = """
import json, socket, time
from muntin.serving.worker import child
child.open_version = lambda *given, **named: time.sleep(60)
question = {"path": ".", "options": json.loads(%r), "calls": [], "digest": "", "verify": False, "hurry": False, "seconds": 0.2}
child._open(socket.socketpair()[0], question)
"""
    ended = subprocess.run([sys.executable, "-c", code % json.dumps(asdict(OPTIONS))], timeout=50, check=False)
    assert ended.returncode == -signal.SIGALRM


# ---- opening ----


def test_errors_of_opening_are_raised_here(write_version: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere: no such artefact directory"):
        opened(tmp_path / "nowhere")
    with pytest.raises(VerificationError, match="golden pair"):
        opened(write_version(tmp_path / "1", shift=30))
    with pytest.raises(TookTooLongError, match=r"not open and warm after 0\.01 s: it hangs"):
        opened(write_version(tmp_path / "2"), seconds=0.01)
    with pytest.raises(NotReadyError, match="was ended with the server"):
        opened(tmp_path / "2", stopped=lambda: True)


def test_death_while_opening(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_start.child, "main", os.abort)
    with pytest.raises(VerificationError, match=r"ended the process that opened it: signal 6, Aborted"):
        opened(path)


def test_death_right_after_opening(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(session: RemoteSession) -> None:
        raise die(session)[0]

    monkeypatch.setattr(RemoteSession, "check_channel", crash)
    with pytest.raises(VerificationError, match="pixels: the process of its engine has ended"):
        opened(path)


# ---- the cause of a death ----


def test_interrupted_process_did_not_lack_memory(session: RemoteSession, monkeypatch: pytest.MonkeyPatch) -> None:
    running = running_of(session)
    running._kills = 0
    monkeypatch.setattr(engine_start, "kills_for_memory", lambda: 1)
    running.interrupt()
    assert running.cause_of_end() == ("signal 9, Killed", False)


def test_death_while_the_kernel_ends_processes(session: RemoteSession, monkeypatch: pytest.MonkeyPatch) -> None:
    """All calls of a process die of the same cause, and count as one death."""
    monkeypatch.setattr(engine_start, "kills_for_memory", lambda: 10**9)  # more than when it was started
    errors = die(session, calls=6)
    assert {type(error) for error in errors} == {OutOfMemoryError}
    assert {str(error).partition("has ended ")[2] for error in errors} == {"(signal 9, Killed: out of memory)"}
    assert session.deaths == 1
    session.labels(SMALL)
    (error,) = die(session)
    assert type(error) is EngineDiedError  # the number of kills has not grown since the restart
