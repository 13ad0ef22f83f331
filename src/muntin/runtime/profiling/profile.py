"""Profiles of an artefact: every executed kernel, compared with the machine's ceilings.

whole       one call of a plain session, without counters
profiled    one inference with counters on
kernel      time, multiply-adds and bytes; by the ceilings the latter two give its shortest time
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Artifact, Manifest, Signature, open_artifact
from muntin.errors import DataError, DependencyError
from muntin.runtime.engines.registry import open_session
from muntin.runtime.host.hardware import describe_hardware, memory_gib, physical_cores
from muntin.runtime.options import DEFAULT_OPTIONS, SessionOptions
from muntin.runtime.profiling.contention import BUSY, watch_cpu
from muntin.runtime.profiling.kernels import Ceilings, Execution, Kernel
from muntin.runtime.session import Session, Shape

SIDE = 512
"""Side of the image, in pixels, for an artefact without an example."""
WARM_UP = 2
TOLERANCE = 0.1
"""Share of the whole by which the kernels' sum may differ without a note."""

Profiler = Callable[[Artifact, NDArray[np.uint8], SessionOptions, int], Execution]
"""(artefact, images, options, rounds) -> the kernels that were executed."""


# An engine's library is imported when it is used.
def _openvino(artifact: Artifact, images_BHWC: NDArray[np.uint8], options: SessionOptions, rounds: int) -> Execution:
    from muntin.runtime.profiling.openvino_kernels import openvino_kernels

    return openvino_kernels(artifact, images_BHWC, options, rounds)


def _onnxruntime(artifact: Artifact, images_BHWC: NDArray[np.uint8], options: SessionOptions, rounds: int) -> Execution:
    from muntin.runtime.profiling.onnxruntime_kernels import onnxruntime_kernels

    return onnxruntime_kernels(artifact, images_BHWC, options, rounds)


PROFILERS: dict[str, Profiler] = {"openvino": _openvino, "onnxruntime": _onnxruntime}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Cost of one call on images of a shape (B, H, W), in total and by kernel.

    `whole_ms`: median latency of a plain session. `profiled_ms`: median of an inference with counters, `between_ms` of its time outside
    of kernels. `kernels`: in the order of execution. `physical_cores`: usable by this process. `others`: cores' worth of CPU time that
    other processes used meanwhile, None where unknown. `fewer_threads_ms`: latency with a thread a physical core, None unless
    there were more. `notes`: warnings for the reader, a line each.
    """

    artifact: Artifact
    bytes: int
    engine: str
    precision: str
    threads: int
    shape: Shape
    rounds: int
    whole_ms: float
    profiled_ms: float
    between_ms: float
    kernels: tuple[Kernel, ...]
    ceilings: Ceilings
    physical_cores: int
    others: float | None
    fewer_threads_ms: float | None
    notes: tuple[str, ...]
    created: str
    hardware: dict[str, Any]

    @property
    def kernels_ms(self) -> float:
        """Sum of the kernels' times."""
        return sum(kernel.ms for kernel in self.kernels)


def profile(
    path: str | Path,
    options: SessionOptions = DEFAULT_OPTIONS,
    *,
    shape: Shape | None = None,
    rounds: int = 30,
    ceilings: Ceilings | None = None,
) -> Profile:
    """Measures an artefact on one shape (B, H, W): the whole call and every executed kernel.

    `shape` None: the manifest's example, or one image of 512 x 512 (of the recorded side for "classify"). The images are the artefact's
    first golden ones, mirrored until they fill the shape. `ceilings` None: measured now, in some seconds. Opens the artefact two or three
    times (ONNX Runtime) and runs twice `rounds` inferences, three times `rounds` with more threads than physical cores.

    Raises the errors of `load` and of its session, and DataError for an engine that cannot be profiled, a shape or a number of rounds out
    of range, images that do not fit into memory.
    """
    profiler = _check(options.engine, shape, rounds)
    artifact = open_artifact(path)
    shape = default_shape(artifact) if shape is None else shape
    cores = physical_cores()
    with watch_cpu() as watch, _enough_memory(artifact.manifest.signature, shape):
        images_BHWC = fill(artifact.golden()[0][0], shape)
        session = open_session(path, options)
        whole_ms = latency(session, images_BHWC, rounds)
        session_threads = session.threads
        del session  # frees its threads and memory before the profile
        execution = profiler(artifact, images_BHWC, options, rounds)
        fewer_threads_ms = None
        if session_threads > cores:
            fewer_threads_ms = latency(open_session(path, replace(options, threads=cores)), images_BHWC, rounds)
    if ceilings is None:
        ceilings, ceiling_notes = _measured_ceilings(execution.threads)
    else:
        ceiling_notes = []
    return Profile(
        artifact=artifact,
        bytes=artifact.bytes,
        engine=options.engine,
        precision=execution.precision,
        threads=execution.threads,
        shape=shape,
        rounds=rounds,
        whole_ms=whole_ms,
        profiled_ms=execution.profiled_ms,
        between_ms=execution.between_ms,
        kernels=execution.kernels,
        ceilings=ceilings,
        physical_cores=cores,
        others=watch.others,
        fewer_threads_ms=fewer_threads_ms,
        notes=(*notes(artifact.manifest, execution, whole_ms), *ceiling_notes, *above(execution.kernels, ceilings)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=describe_hardware(),
    )


@contextmanager
def _enough_memory(signature: Signature, shape: Shape) -> Iterator[None]:
    """Raises DataError for images that do not fit into this machine's memory together with their scores, and where memory runs out."""
    needed = (1 + 4) * prod(shape) * signature.channels + 4 * prod(signature.scores_shape(*shape))
    description = f"shape={shape}: the images, in bytes and in float32, and their scores alone take {needed / 1e9:.3g} GB"
    memory = memory_gib()
    if memory is not None and needed > memory * 2**30:
        raise DataError(f"{description}, and this machine has {memory * 2**30 / 1e9:.3g} GB: give a smaller shape")
    try:
        yield
    except MemoryError as error:
        raise DataError(f"{description}, and there was not enough memory for the call: give a smaller shape") from error


def _measured_ceilings(threads: int) -> tuple[Ceilings, list[str]]:
    """Measures the ceilings; with a note if other processes were busy."""
    try:
        from muntin.runtime.profiling.ceilings import measure_ceilings  # measured with OpenVINO for every engine
    except ModuleNotFoundError as error:
        raise DependencyError(f"a machine's ceilings are measured with the package {error.name}: pip install {error.name}") from error
    measured = measure_ceilings(threads=threads)
    if measured.others is None or measured.others < BUSY:
        return measured, []
    return measured, [f"other processes used {measured.others:.1f} cores while the ceilings were measured: the ceilings are too low"]


def _check(engine: str, shape: Shape | None, rounds: int) -> Profiler:
    if engine not in PROFILERS:
        raise DataError(f'engine="{engine}": a profile is made in one of {", ".join(PROFILERS)}')
    if shape is not None and (len(shape) != 3 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in shape)):
        raise DataError(f"shape={shape!r}: give three whole numbers from 1: images, rows, columns")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 1000:
        raise DataError(f"rounds={rounds!r}: give a whole number from 1 to 1000")
    return PROFILERS[engine]


def default_shape(artifact: Artifact) -> Shape:
    """(B, H, W) of the manifest's example. Without one: 512 x 512, or for "classify" the recorded side, else the golden images' size."""
    manifest = artifact.manifest
    if manifest.example is not None:
        return manifest.example
    if manifest.signature.task != "classify":
        return (1, SIDE, SIDE)
    side = manifest.signature.side
    return (1, side, side) if side is not None else (1, *artifact.golden()[0][0].shape[1:3])


def fill(images_BHWC: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """Images of another shape (B, H, W): repeated to the batch, mirrored or cut to the size."""
    B, H, W = shape
    rows, columns = (max(0, target - side) for target, side in zip((H, W), images_BHWC.shape[1:3], strict=True))
    chosen = images_BHWC[np.arange(B) % len(images_BHWC)]
    mirrored = np.pad(chosen, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="symmetric")
    return np.ascontiguousarray(mirrored[:, :H, :W])


def latency(session: Session, images_BHWC: NDArray[np.uint8], rounds: int) -> float:
    """Median time of a call in ms, after a warm-up."""
    times = []
    for _ in range(WARM_UP + rounds):
        started = time.perf_counter()
        session(images_BHWC)
        times.append((time.perf_counter() - started) * 1e3)
    return median(times[WARM_UP:])


def notes(manifest: Manifest, execution: Execution, whole_ms: float) -> Iterable[str]:
    """Warnings about the kernels' times."""
    profiled, total = execution.profiled_ms, sum(kernel.ms for kernel in execution.kernels)
    if abs(total - profiled) > TOLERANCE * profiled:
        yield (
            f"the kernels' medians sum to {total:.2f} of {profiled:.2f} ms, of which {execution.between_ms:.2f} ms are between kernels: "
            "the others are interruptions that fell now into one kernel, now into another; measure on a quiet machine"
        )
    if abs(profiled - whole_ms) > 2 * TOLERANCE * whole_ms:
        yield f"an inference with counters on took {profiled:.2f} ms, one without {whole_ms:.2f}: believe the shares more than the times"
    executed = {kernel.layer for kernel in execution.kernels}
    if missing := [record.name for record in manifest.layers if record.name not in executed]:
        subject = (
            "1 recorded layer has no kernel of its" if len(missing) == 1 else f"{len(missing)} recorded layers have no kernel of their"
        )
        yield f"{subject} name: {', '.join(missing[:3])}{', ...' if missing[3:] else ''}"


def above(kernels: Iterable[Kernel], ceilings: Ceilings) -> Iterable[str]:
    """A warning about products that exceed their measured ceiling. Bytes are ignored: caches are faster than the copy."""
    faster = [kernel for kernel in kernels if kernel.macs and (kernel.bounds_ms(ceilings)[0] or 0.0) > (1 + TOLERANCE) * kernel.ms]
    if faster:
        subject = (
            f"1 product is faster than the ceiling of its precision, {faster[0].label}"
            if len(faster) == 1
            else f"{len(faster)} products are faster than the ceiling of their precision, {faster[0].label} for one"
        )
        yield f"{subject}: the ceilings are too low, so every share of them is too high"
