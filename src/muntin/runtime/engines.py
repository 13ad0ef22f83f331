"""Which engines there are, and opening an artefact in one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from muntin.artifact import Artifact, open_artifact
from muntin.errors import DataError, DependencyError
from muntin.runtime.session import Session, Shape, check_shapes, check_streams, check_threads

EngineName = Literal["openvino", "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt"]
Precision = Literal["recorded", "f32", "bf16", "f16"]
Engine = Callable[..., Session]
"""(artefact, precision, threads, streams, *, dynamic, cache) -> session; what an engine has no use for it leaves alone"""

DEFAULT_ENGINE: EngineName = "openvino"
PRECISIONS = ("recorded", "f32", "bf16", "f16")


# An engine's library is loaded when a session is opened with it: a machine that serves with one needs no other.
def _openvino(artifact: Artifact, precision: str, threads: int | None, streams: int, *, dynamic: bool, cache: bool) -> Session:
    from muntin.runtime.openvino import open_openvino

    return open_openvino(artifact, precision, threads, streams, dynamic=dynamic, cache=cache)


def _onnxruntime(artifact: Artifact, precision: str, threads: int | None, streams: int, *, dynamic: bool, cache: bool) -> Session:
    from muntin.runtime.onnxruntime import open_onnxruntime

    return open_onnxruntime(artifact, precision, threads, streams)


def _cuda(artifact: Artifact, precision: str, threads: int | None, streams: int, *, dynamic: bool, cache: bool) -> Session:
    from muntin.runtime.onnxruntime import open_cuda

    return open_cuda(artifact, precision, threads, streams)


def _tensorrt(artifact: Artifact, precision: str, threads: int | None, streams: int, *, dynamic: bool, cache: bool) -> Session:
    from muntin.runtime.onnxruntime import open_tensorrt

    return open_tensorrt(artifact, precision, threads, streams, cache=cache)


ENGINES: dict[str, Engine] = {
    "openvino": _openvino,
    "onnxruntime": _onnxruntime,
    "onnxruntime-cuda": _cuda,
    "onnxruntime-tensorrt": _tensorrt,
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
    """Opens an artefact directory as a session, after checking every digest.

    `engine`: a name in `ENGINES`. `precision`: "recorded" (what the manifest's figures were measured in, or f32 where the machine has no
    such kernels), "f32", "bf16" or "f16". `threads`: None for the usable physical cores. `streams`: how many calls compute at the same
    time: 1 for the lowest latency, as many as threads for the most images a second (with `Session.map`). `shapes`: the (B, H, W) to
    compile for and to compute once now, so that no call of these shapes pays for it later; None: the manifest's `example`, (): nothing.
    `dynamic`, of OpenVINO alone: True: sizes that are not in `shapes` are computed as they come, which is slower, and no call waits while
    the engine compiles; False: the first call of a size compiles for it. `cache`: whether what the engine compiles is kept in the user's
    cache, and taken from it.

    What a session keeps in memory beside its weights, in OpenVINO: a compiled model for each of `shapes`, for the last 4 sizes that came
    beside them and for dynamic sizes, each with the images that it was called with last, mapped ones too; and of answers that were dropped
    the memory of the last 4, 256 MiB in all at most.

    Raises ArtifactError for an altered artefact, DataError for an unknown engine, precision or number of threads, streams or shape,
    DependencyError when the engine is not installed or the machine lacks the precision or the device asked for.
    """
    opener = ENGINES.get(engine)
    if opener is None:
        raise DataError(f'engine="{engine}": give one of {", ".join(ENGINES)}')
    if precision not in PRECISIONS:
        raise DataError(f'precision="{precision}": give one of {", ".join(PRECISIONS)}')
    check_threads(threads)
    check_streams(streams)
    wanted = None if shapes is None else check_shapes(shapes)
    artifact = open_artifact(path)
    if wanted is None:
        wanted = () if artifact.manifest.example is None else (artifact.manifest.example,)
    try:
        session = opener(artifact, precision, threads, streams, dynamic=dynamic, cache=cache)
    except ModuleNotFoundError as error:
        raise DependencyError(f'engine="{engine}" needs the package {error.name}: pip install {error.name}') from error
    session.warm_up(wanted)
    return session
