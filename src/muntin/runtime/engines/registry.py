"""The engines, and opening an artefact in one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path

from muntin.artifact import Artifact, open_artifact
from muntin.errors import DataError, DependencyError
from muntin.runtime.inputs import Shape, check_dims, check_shapes
from muntin.runtime.options import DEFAULT_ENGINE, SessionOptions
from muntin.runtime.session import Session

Engine = Callable[[Artifact, SessionOptions], Session]
"""Opens an artefact; `shapes` and `dims` are left to the caller, and options that an engine has no use for are ignored."""


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
    dims: Iterable[Mapping[str, int]] | None = None,
    dynamic: bool = False,
    cache: bool = True,
) -> Session:
    """Opens an artefact directory, after checking every digest.

    The arguments are those of `SessionOptions`.

    Beside its weights an OpenVINO session keeps in memory: a compiled model for each of `shapes` or `dims`, for the last 4 other sizes and
    for dynamic sizes, each with the inputs of its last call; and the memory of the last 4 dropped answers, at most 256 MiB.

    Raises ArtifactError for an altered artefact, DataError for an option that is not allowed, DependencyError when the engine is not
    installed or the machine lacks the precision or the device.
    """
    options = SessionOptions(
        engine=engine,
        precision=precision,
        threads=threads,
        streams=streams,
        shapes=None if shapes is None else check_shapes(shapes),
        dims=None if dims is None else check_dims(dims),
        dynamic=dynamic,
        cache=cache,
    )
    return open_session(open_artifact(path), options)


def open_image_session(path: str | Path, options: SessionOptions) -> Session:
    """Opens the artefact directory of an image model as `load` does. Raises ArtifactError for one with named tensors."""
    artifact = open_artifact(path)
    _ = artifact.picture  # raises
    return open_session(artifact, options)


def open_session(artifact: Artifact, options: SessionOptions) -> Session:
    """Opens an artefact as `load` does."""
    images = artifact.manifest.named is None
    if not images and options.shapes:
        dims = ", ".join(artifact.manifest.signature.tensors.dims) or "there is none"
        raise DataError(f"shapes={list(options.shapes)}: {artifact.path} takes named tensors: give dims, sizes of its dimensions ({dims})")
    if images and options.dims:
        raise DataError(f"dims={[dict(sizes) for sizes in options.dims]}: {artifact.path} takes images: give shapes, each (B, H, W)")
    try:
        session = ENGINES[options.engine](artifact, options)
    except ModuleNotFoundError as error:
        raise DependencyError(f'engine="{options.engine}" needs the package {error.name}: pip install {error.name}') from error
    session.opened = artifact, options
    example, sizes = artifact.manifest.example, options.shapes if images else options.dims
    session.warm_up(sizes if sizes is not None else () if example is None else (example,))
    return session
