"""Which engines there are, and opening an artefact in one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from muntin.artifact import Artifact, open_artifact
from muntin.errors import DataError, DependencyError
from muntin.runtime.session import Session, check_threads

EngineName = Literal["openvino", "onnxruntime"]
Precision = Literal["recorded", "f32", "bf16", "f16"]
Engine = Callable[[Artifact, str, int | None], Session]

DEFAULT_ENGINE: EngineName = "openvino"
PRECISIONS = ("recorded", "f32", "bf16", "f16")


# An engine's library is loaded when a session is opened with it: a machine that serves with one needs no other.
def _openvino(artifact: Artifact, precision: str, threads: int | None) -> Session:
    from muntin.runtime.openvino import open_openvino

    return open_openvino(artifact, precision, threads)


def _onnxruntime(artifact: Artifact, precision: str, threads: int | None) -> Session:
    from muntin.runtime.onnxruntime import open_onnxruntime

    return open_onnxruntime(artifact, precision, threads)


ENGINES: dict[str, Engine] = {"openvino": _openvino, "onnxruntime": _onnxruntime}


def load(path: str | Path, *, engine: str = DEFAULT_ENGINE, precision: str = "recorded", threads: int | None = None) -> Session:
    """Opens an artefact directory as a session, after checking every digest.

    `engine`: a name in `ENGINES`. `precision`: "recorded" (what the manifest's figures were measured in, or f32 where the machine has no
    such kernels), "f32", "bf16" or "f16". `threads`: None for the usable physical cores.

    Raises ArtifactError for an altered artefact, DataError for an unknown engine, precision or number of threads, DependencyError when the
    engine is not installed or the machine lacks the precision asked for.
    """
    opener = ENGINES.get(engine)
    if opener is None:
        raise DataError(f'engine="{engine}": give one of {", ".join(ENGINES)}')
    if precision not in PRECISIONS:
        raise DataError(f'precision="{precision}": give one of {", ".join(PRECISIONS)}')
    check_threads(threads)
    artifact = open_artifact(path)
    try:
        return opener(artifact, precision, threads)
    except ModuleNotFoundError as error:
        raise DependencyError(f'engine="{engine}" needs the package {error.name}: pip install {error.name}') from error
