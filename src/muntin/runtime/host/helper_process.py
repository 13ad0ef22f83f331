"""Start another process of this Python, for work that may crash, hang or take too much memory.

The process calls one function of a module. It has the `sys.path` and the environment of this process, and its standard output goes to
standard error, because engines print what they like. It is in a process group of its own: Ctrl-C at the terminal reaches only this process,
which ends the other one itself. It is in no session of its own: where Linux groups threads by session (sched_autogroup), a low priority
counts only inside the session, and the process would take half of a core from this one.

    ask_helper            one question and one answer, as JSON over pipes; `answer_question` is the other end
    start_socket_helper   a process that stays, and a socket to it
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from tempfile import TemporaryFile
from typing import IO, Any

from muntin.errors import MuntinError

POLL_S = 0.02
"""Polling interval while an answer is awaited, seconds."""
PRINTED_BYTES = 4096
"""Bytes at the end of standard error in which the last line is looked for."""
TEXT_CHARACTERS = 4000
"""Maximum length of an error's text in a message. An engine's error may name every layer."""

Entry = Callable[[], None]
"""A function without arguments, at the top level of a module that can be imported."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a helper process ended: its return code (negative: a signal), its answer, and the last line of its standard error."""

    returncode: int
    answer: bytes
    last_line: str


def start_socket_helper(entry: Entry) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a process that calls `entry`, and return it with a socket. The other end is the process's standard input. Not on Windows."""
    here, there = socket.socketpair()
    with there:
        try:
            process = _start(entry, stdin=there.fileno(), stdout=2)
        except BaseException:
            here.close()
            raise
    return process, here


def helper_socket() -> socket.socket:
    """Return the socket that `start_socket_helper` gave to this process."""
    return socket.socket(fileno=os.dup(0))


def ask_helper(entry: Entry, question: Mapping[str, Any], *, watch: Callable[[int], None] = lambda process: None) -> Outcome:
    """Start a process that calls `entry`, send it a question, and wait until it ends.

    `watch` is called with the process's number when it has started and every `POLL_S`. An error that it raises ends the process.
    """
    message: bytes | None = json.dumps(question).encode()
    with (
        TemporaryFile() as printed,  # not a pipe: a process that prints without end must not fill this process's memory
        _start(entry, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed) as process,
    ):
        try:
            while True:
                watch(process.pid)
                try:
                    answer: bytes = process.communicate(message, timeout=POLL_S)[0]
                    break
                except subprocess.TimeoutExpired:
                    message = None  # `communicate` goes on sending it, and must not be given it again
        finally:
            process.kill()
        return Outcome(returncode=process.returncode, answer=answer, last_line=_last_line(printed) or f"exit code {process.returncode}")


def answer_question(handle: Callable[[Any], Mapping[str, Any]]) -> None:
    """Read a question from standard input, and write what `handle` returns for it to standard output.

    A MuntinError or MemoryError is written as `error_record`. Any other error ends the process with a traceback.
    """
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what libraries print to standard output from now on goes to standard error
        try:
            answer = handle(json.load(sys.stdin))
        except (MuntinError, MemoryError) as error:
            answer = error_record(error)
        json.dump(answer, answers)


def error_record(error: BaseException) -> dict[str, Any]:
    """Describe an error by values that JSON has: the names of its classes, its own first, and its text."""
    return {"error": [kind.__name__ for kind in type(error).__mro__], "text": str(error)[:TEXT_CHARACTERS]}


def recorded_error(record: Mapping[str, Any]) -> Exception:
    """Return the error that `error_record` described: a MuntinError and a MemoryError as they were, any other one as RuntimeError."""
    names, text = record["error"], record["text"]
    if "MemoryError" in names:
        return MemoryError(text)
    known = {kind.__name__: kind for kind in _subclasses(MuntinError)}
    for name in names:
        if name in known:
            return known[name](text)
    return RuntimeError(text if names[0] == "RuntimeError" else f"{names[0]}: {text}")


def _subclasses(kind: type[MuntinError]) -> Iterator[type[MuntinError]]:
    yield kind
    for derived in kind.__subclasses__():
        yield from _subclasses(derived)


def _start(entry: Entry, *, stdin: int, stdout: int, stderr: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    code = f"import sys; sys.path[:] = {sys.path!r}; from {entry.__module__} import {entry.__qualname__} as entry; entry()"
    return subprocess.Popen(  # noqa: S603 - this Python, and a function of ours
        [sys.executable, "-c", code], stdin=stdin, stdout=stdout, stderr=stderr, process_group=0
    )


def _last_line(printed: IO[bytes]) -> str:
    printed.seek(max(0, printed.seek(0, os.SEEK_END) - PRINTED_BYTES))
    lines = printed.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
