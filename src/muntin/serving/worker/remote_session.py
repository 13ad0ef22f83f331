"""Sessions whose engine runs in a process of its own (`engine_process`).

call -> a channel: named arrays into its memory -> the process computes -> the answer out of it
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from muntin.artifact import AnySignature
from muntin.errors import MuntinError, VerificationError
from muntin.runtime.inputs import Dims, Named
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import ExecutedLayer, Session
from muntin.serving.worker.calls import Call
from muntin.serving.worker.engine_process import EngineProcess
from muntin.serving.worker.launch import RunningEngine, start_engine
from muntin.serving.worker.named_arrays import NamedCalls
from muntin.serving.worker.opening import EngineDiedError, NotReadyError, Opened

_SIGNATURE: TypeAdapter[AnySignature] = TypeAdapter(AnySignature)


def can_open_remote() -> bool:
    """Return whether this system can pass an open file to another process, as shared memory requires. Windows cannot."""
    return hasattr(socket, "send_fds") and hasattr(socket, "AF_UNIX")


def open_remote(
    path: Path,
    options: SessionOptions,
    calls: Iterable[Call],
    *,
    seconds: float,
    digest: str = "",
    busy: Callable[[], bool] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    progress: Callable[[str], None] = lambda step: None,
) -> Opened:
    """Verify and open an artefact in a new process (`start_engine`). `digest`: that it must have; empty: any.

    Takes a second longer than here, in which the process starts.
    """
    start = partial(start_engine, path, options, seconds=seconds)
    running = start(calls, digest=digest, busy=busy, stopped=stopped, verify=True, progress=progress)
    session = RemoteSession(running, start, path)
    try:
        session.check_channel()
    except BaseException as error:
        session.close()
        if isinstance(error, EngineDiedError | NotReadyError):
            raise VerificationError(str(error)) from error
        raise
    return Opened(session=session, signature=session.signature, digest=running.description["digest"], calls=tuple(session.calls))


class RemoteSession(EngineProcess, Session):
    """A session whose engine runs in a process of its own."""

    def __init__(self, running: RunningEngine, start: Callable[..., RunningEngine], path: Path) -> None:
        description = running.description
        signature: AnySignature = _SIGNATURE.validate_python(description["signature"])
        EngineProcess.__init__(self, running, start, path)
        Session.__init__(self, signature=signature, **{name: description[name] for name in ("engine", "precision", "threads", "streams")})
        self._named = NamedCalls(signature)

    def layers(self) -> list[ExecutedLayer]:
        raise MuntinError("an engine in another process does not list its layers: use muntin.load")

    def prepare(self, dims: Dims, outputs: Sequence[str], *, compute: bool = True) -> None:
        self._on_channel(lambda channel: channel.warm_up(self._named, dims, outputs, compute=compute))
        self._compiled_for(Call(dims, self.tensors.batch or "", tuple(outputs)))

    def _infer(self, inputs: Named, dims: Dims, outputs: tuple[str, ...]) -> Named:
        answer: Named = self._on_channel(lambda channel: channel.compute(self._named, inputs, dims, outputs, self.buffers))
        return answer
