"""The engines, and opening an artefact in one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

from muntin.artifact import Artifact, open_artifact
from muntin.errors import DependencyError
from muntin.runtime.options import DEFAULT_ENGINE, SessionOptions
from muntin.runtime.session import Session, Shape, check_shapes

Engine = Callable[[Artifact, SessionOptions], Session]
"""Opens an artefact; `shapes` is left to the caller, and options that an engine has no use for are ignored."""


def _imported(module: str, function: str) -> Engine:
    """An engine whose library is imported when a session is opened with it: a machine needs only the engine that it serves with."""

    def open_in_engine(artifact: Artifact, options: SessionOptions) -> Session:
        session: Session = getattr(import_module(f"muntin.runtime.engines.{module}"), function)(artifact, options)
        return session

    return open_in_engine


ENGINES: dict[str, Engine] = {
    "openvino": _imported("openvino.session", "open_openvino"),
    "onnxruntime": _imported("onnxruntime", "open_onnxruntime"),
    "onnxruntime-cuda": _imported("onnxruntime", "open_cuda"),
    "onnxruntime-tensorrt": _imported("onnxruntime", "open_tensorrt"),
}


def load(
    path: str | Path,
    *,
    engine: str = DEFAULT_ENGINE,
    precision: str = "recorded",
    threads: int | None = None,
    streams: int = 1,
    shapes: Iterable[Shape] | None = None,
    dynamic: bool = False,
    cache: bool = True,
) -> Session:
    """Opens an artefact directory as a session, after checking every digest. The arguments are those of `SessionOptions`.

    Beside its weights an OpenVINO session keeps in memory: a compiled model for each of `shapes`, for the last 4 other sizes and for
    dynamic sizes, each with the images of its last call; and the memory of the last 4 dropped answers, at most 256 MiB.

    Raises ArtifactError for an altered artefact, DataError for an option that is not allowed, DependencyError when the engine is not
    installed or the machine lacks the precision or the device.
    """
    options = SessionOptions(
        engine=engine,
        precision=precision,
        threads=threads,
        streams=streams,
        shapes=None if shapes is None else check_shapes(shapes),
        dynamic=dynamic,
        cache=cache,
    )
    return open_session(path, options)


def open_session(path: str | Path, options: SessionOptions) -> Session:
    """Opens an artefact directory as `load` does."""
    artifact = open_artifact(path)
    try:
        session = ENGINES[options.engine](artifact, options)
    except ModuleNotFoundError as error:
        raise DependencyError(f'engine="{options.engine}" needs the package {error.name}: pip install {error.name}') from error
    example = artifact.manifest.example
    session.warm_up(options.shapes if options.shapes is not None else () if example is None else (example,))
    return session
