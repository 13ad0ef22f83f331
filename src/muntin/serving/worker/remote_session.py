"""Sessions whose engine runs in a process of its own (`engine_process`).

call -> a channel: named arrays into its memory -> the process computes -> the answer out of it
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import AnySignature, Signature, TensorSignature
from muntin.errors import MuntinError, VerificationError
from muntin.runtime.buffers import Buffers
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import Dims, ExecutedLayer, Labels, Named, Session, Shape, check_shapes
from muntin.runtime.tensors import TensorSession, check_dims
from muntin.serving.worker.calls import Call, image_call
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


class _Remote(EngineProcess):
    """The calls of a session whose engine runs in a process of its own."""

    def __init__(self, running: RunningEngine, start: Callable[..., RunningEngine], path: Path, signature: AnySignature) -> None:
        EngineProcess.__init__(self, running, start, path)
        self._named, self._results = NamedCalls(signature), Buffers()

    def layers(self) -> list[ExecutedLayer]:
        raise MuntinError("an engine in another process does not list its layers: use muntin.load")

    def _compile(self, dims: Dims, outputs: tuple[str, ...], *, compute: bool) -> None:
        self._on_channel(lambda channel: channel.warm_up(self._named, dims, outputs, compute=compute))
        self._compiled_for(Call(dims, self._named.signature.batch or "", outputs))

    def _compute(self, inputs: Named, dims: Dims, outputs: Sequence[str]) -> Named:
        answer: Named = self._on_channel(lambda channel: channel.compute(self._named, inputs, dims, outputs, self._results))
        return answer


class RemoteSession(_Remote, Session):
    """A session of images whose engine runs in a process of its own."""

    def __init__(self, running: RunningEngine, start: Callable[..., RunningEngine], path: Path) -> None:
        signature = Signature.model_validate(running.description["signature"])
        _Remote.__init__(self, running, start, path, signature)
        Session.__init__(self, signature=signature, **_description(running))

    def warm_up(self, shapes: Iterable[Shape], *, labels: bool = False, compute: bool = True) -> None:
        for shape in check_shapes(shapes, self.signature.sizes):
            call = image_call(shape, labels=labels)
            self._compile(call.dims, call.outputs, compute=compute)

    def _infer(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        return self._answer(images_BHWC, "scores")

    def _infer_labels(self, images_BHWC: NDArray[np.uint8]) -> Labels:
        return self._answer(images_BHWC, "labels")

    def _answer(self, images_BHWC: NDArray[np.uint8], name: str) -> NDArray[Any]:
        B, H, W, _ = images_BHWC.shape
        return self._compute({"images": images_BHWC}, image_call((B, H, W)).dims, [name])[name]


class RemoteTensorSession(_Remote, TensorSession):
    """A session of named tensors whose engine runs in a process of its own."""

    def __init__(self, running: RunningEngine, start: Callable[..., RunningEngine], path: Path) -> None:
        signature = TensorSignature.model_validate(running.description["signature"])
        _Remote.__init__(self, running, start, path, signature)
        TensorSession.__init__(self, signature=signature, **_description(running))

    def warm_up(self, dims: Iterable[Mapping[str, int] | Dims], *, compute: bool = True) -> None:
        for sizes in check_dims(dims, self.signature):
            self._compile(sizes, (), compute=compute)

    def _infer(self, inputs: Named, dims: Dims, outputs: Sequence[str]) -> Named:
        return self._compute(inputs, dims, outputs)
