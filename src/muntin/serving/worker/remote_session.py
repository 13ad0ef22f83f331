"""Sessions whose engine runs in a process of its own (`engine_process`).

call -> a channel: images or named arrays into its memory -> the process computes -> the answer out of it
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from muntin.artifact import Signature, TensorSignature
from muntin.errors import MuntinError, VerificationError
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import ExecutedLayer, Labels, Session, Shape, check_shapes
from muntin.runtime.tensors import Dims, Named, TensorSession, check_dims
from muntin.serving.worker.calls import AnyCall, Call, TensorCall
from muntin.serving.worker.channel import LABELS, SCORES, EngineChannel
from muntin.serving.worker.engine_process import EngineProcess
from muntin.serving.worker.launch import RunningEngine, start_engine
from muntin.serving.worker.named_arrays import NamedCalls
from muntin.serving.worker.opening import EngineDiedError, NotReadyError, Opened


def can_open_remote() -> bool:
    """Return whether this system can pass an open file to another process, as shared memory requires. Windows cannot."""
    return hasattr(socket, "send_fds") and hasattr(socket, "AF_UNIX")


def open_remote(
    path: Path,
    options: SessionOptions,
    calls: Iterable[AnyCall],
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
    named = running.description["signature"]["task"] == "tensors"
    session = RemoteTensorSession(running, start, path) if named else RemoteSession(running, start, path)
    try:
        session.check_channel()
    except BaseException as error:
        session.close()
        if isinstance(error, EngineDiedError | NotReadyError):
            raise VerificationError(str(error)) from error
        raise
    return Opened(session=session, signature=session.signature, digest=running.description["digest"], calls=tuple(session.calls))


def _description(running: RunningEngine) -> dict[str, Any]:
    """The engine's part of the description that a process gives of its session."""
    return {name: running.description[name] for name in ("engine", "precision", "threads", "streams")}


def _no_layers() -> MuntinError:
    return MuntinError("an engine in another process does not list its layers: use muntin.load")


class RemoteSession(EngineProcess, Session):
    """A session of images whose engine runs in a process of its own."""

    def __init__(self, running: RunningEngine, start: Callable[..., RunningEngine], path: Path) -> None:
        EngineProcess.__init__(self, running, start, path)
        Session.__init__(self, signature=Signature.model_validate(running.description["signature"]), **_description(running))

    def warm_up(self, shapes: Iterable[Shape], *, labels: bool = False, compute: bool = True) -> None:
        for shape in check_shapes(shapes, self.signature.sizes):
            call = Call(shape, labels)
            self._on_channel(partial(EngineChannel.warm_up, call=call, compute=compute))
            self._compiled_for(call)

    def layers(self) -> list[ExecutedLayer]:
        raise _no_layers()

    def _infer(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._compute(SCORES, images_BHWC, self.signature.scores_shape(*images_BHWC.shape[:3]), np.float32)

    def _infer_labels(self, images_BHWC: NDArray[np.uint8]) -> Labels:
        B, _, *sides = self.signature.scores_shape(*images_BHWC.shape[:3])
        return self._compute(LABELS, images_BHWC, (B, *sides), self.signature.label_type)

    def _compute(self, operation: int, images_BHWC: NDArray[np.uint8], shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        answer = self.outputs.take(shape, dtype)
        self._on_channel(lambda channel: channel.compute(operation, images_BHWC, answer))
        return answer


class RemoteTensorSession(EngineProcess, TensorSession):
    """A session of named tensors whose engine runs in a process of its own."""

    def __init__(self, running: RunningEngine, start: Callable[..., RunningEngine], path: Path) -> None:
        EngineProcess.__init__(self, running, start, path)
        signature = TensorSignature.model_validate(running.description["signature"])
        TensorSession.__init__(self, signature=signature, **_description(running))
        self._named = NamedCalls(signature)

    def warm_up(self, dims: Iterable[Mapping[str, int] | Dims], *, compute: bool = True) -> None:
        for sizes in check_dims(dims, self.signature):
            self._on_channel(partial(EngineChannel.warm_up_named, calls=self._named, dims=sizes, compute=compute))
            self._compiled_for(TensorCall(sizes, self.signature.batch or ""))

    def layers(self) -> list[ExecutedLayer]:
        raise _no_layers()

    def _infer(self, inputs: Named, dims: Dims, outputs: Sequence[str]) -> Named:
        answer: Named = self._on_channel(lambda channel: channel.compute_named(self._named, inputs, dims, outputs, self.buffers))
        return answer
