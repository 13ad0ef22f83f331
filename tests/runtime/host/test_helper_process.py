"""A helper process: its question and answer, its errors, and its end."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from muntin.errors import ArtifactError
from muntin.runtime.host.helper_process import (
    TEXT_CHARACTERS,
    answer_question,
    ask_helper,
    error_record,
    helper_socket,
    recorded_error,
    start_socket_helper,
)


def doubles() -> None:
    answer_question(double)


def double(question: Any) -> dict[str, Any]:
    print("a library's own words", flush=True)
    return {"answer": 2 * question["number"], "path": sys.path[0]}


def echoes() -> None:
    with helper_socket() as sock:
        sock.sendall(sock.recv(5))


def sleeps() -> None:
    import time

    time.sleep(60)


def fails() -> None:
    os.write(2, b"x" * 100_000)
    raise KeyError("first\nlast")


class UnknownError(ArtifactError):
    """Known in the process that raises it alone."""


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The functions above can be imported by the other process."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    for function in (doubles, echoes, sleeps, fails):
        monkeypatch.setattr(function, "__module__", "test_helper_process")


def test_question_and_answer() -> None:
    outcome = ask_helper(doubles, {"number": 21})
    assert (outcome.returncode, outcome.last_line) == (0, "a library's own words")
    assert json.loads(outcome.answer) == {"answer": 42, "path": str(Path(__file__).parent)}


def test_process_that_fails() -> None:
    outcome = ask_helper(fails, {})
    assert (outcome.returncode, outcome.last_line) == (1, r"KeyError: 'first\nlast'")


def test_watch_ends_the_process() -> None:
    processes: list[int] = []

    def watch(process: int) -> None:
        processes.append(process)
        if len(processes) == 3:
            raise TimeoutError

    with pytest.raises(TimeoutError):
        ask_helper(sleeps, {}, watch=watch)
    assert len(set(processes)) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(processes[0], 0)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no such sockets here")
def test_socket_to_a_process() -> None:
    process, sock = start_socket_helper(echoes)
    with process, sock:
        sock.sendall(b"hello")
        assert sock.recv(5) == b"hello"
        assert sock.recv(1) == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (ArtifactError("a layer"), ArtifactError, "a layer"),
        (MemoryError("std::bad_alloc"), MemoryError, "std::bad_alloc"),
        (RuntimeError("out of memory"), RuntimeError, "out of memory"),
        (KeyError("name"), RuntimeError, "KeyError: 'name'"),
        (RuntimeError("x" * 10**6), RuntimeError, "x" * TEXT_CHARACTERS),
    ],
)
def test_recorded_errors(error: Exception, kind: type[Exception], text: str) -> None:
    recorded = recorded_error(error_record(error))
    assert type(recorded) is kind
    assert str(recorded) == text


def test_recorded_error_of_an_unknown_kind() -> None:
    record: dict[str, Any] = error_record(UnknownError("a layer"))
    record["error"][0] = "NowhereError"
    assert type(recorded_error(record)) is ArtifactError
