"""Profiles of an artefact: every executed kernel, compared with the machine's ceilings.

whole       one call of a plain session, without counters
profiled    one inference with counters on
kernel      time, multiply-adds and bytes; by the ceilings the latter two give its shortest time
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import AnySignature, Artifact, Manifest, Signature, open_artifact
from muntin.errors import DataError, DependencyError
from muntin.runtime.engines.registry import open_session
from muntin.runtime.host.hardware import describe_hardware, memory_gib
from muntin.runtime.inputs import Named, Shape, check_inputs, check_shape, image_dims
from muntin.runtime.options import DEFAULT_OPTIONS, SessionOptions
from muntin.runtime.profiling.contention import BUSY, notes_on, watch_cpu
from muntin.runtime.profiling.kernels import Ceilings, Execution, Kernel, ProfiledInputs
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.text import count

SIDE = 512
"""Side of the image, in pixels, for an artefact without an example."""
TOLERANCE = 0.1
"""Share of the whole by which the kernels' sum may differ without a note."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Cost of one call on images of a shape (B, H, W), or on named inputs whose free dimensions are `dims`, in total and by kernel.

    `whole_ms`: median latency of a plain session. `profiled_ms`: median of an inference with counters, `between_ms` of its time outside
    of kernels. `kernels`: in the order of execution. `others`: cores' worth of CPU time that other processes used meanwhile, None where
    unknown. `notes`: warnings for the reader, a line each.
    """

    artifact: Artifact
    bytes: int
    engine: str
    precision: str
    threads: int
    shape: Shape | None
    rounds: int
    whole_ms: float
    profiled_ms: float
    between_ms: float
    kernels: tuple[Kernel, ...]
    ceilings: Ceilings
    others: float | None
    notes: tuple[str, ...]
    created: str
    hardware: dict[str, Any]
    dims: Mapping[str, int] | None = None

    @property
    def size(self) -> str:
        """Shape of the images, or the sizes of free dimensions, in words."""
        if self.shape is not None:
            return " x ".join(map(str, self.shape))
        return ", ".join(f"{name} {size}" for name, size in (self.dims or {}).items()) or "the only size"

    @property
    def kernels_ms(self) -> float:
        """Sum of the kernels' times."""
        return sum(kernel.ms for kernel in self.kernels)


def profile(
    path: str | Path,
    options: SessionOptions = DEFAULT_OPTIONS,
    *,
    shape: Shape | None = None,
    dims: Mapping[str, int] | None = None,
    rounds: int = 30,
    ceilings: Ceilings | None = None,
) -> Profile:
    """Measures an artefact on one shape (B, H, W): the whole call and every executed kernel.

    `shape` None: the manifest's example, or one image of 512 x 512 (of the recorded side where a picture has one answer). A shape of a
    size that the model does not take is replaced by the nearest one, with a note. The images are the artefact's first golden ones, mirrored
    until they fill the shape. `dims`: for named tensors, sizes of some free dimensions; the others are those of
    the manifest's example. The first golden inputs are repeated to these sizes. `ceilings` None: measured now, in some seconds. Opens the
    artefact twice and runs twice `rounds` inferences.

    Raises the errors of `load` and of its session, and DataError for an engine that cannot be profiled, a shape or a number of rounds out
    of range, inputs that do not fit into memory.
    """
    _check(options.engine, shape, rounds)
    from muntin.runtime.profiling.openvino_kernels import openvino_kernels  # of an engine that may not be installed

    artifact = open_artifact(path)
    remarks: list[str] = []
    signature, images = artifact.manifest.signature, artifact.manifest.named is None
    if images:
        if dims:
            raise DataError(f"dims of {', '.join(dims)}: {path} takes images: give a shape")
        requested = default_shape(artifact) if shape is None else shape
        shape = (requested[0], *artifact.picture.sizes.at_least(*requested[1:]))
        sizes = dict(image_dims(shape))
        if shape != requested:
            remarks.append(f"measured at {shape[1]} x {shape[2]}, the nearest size to {requested[1]} x {requested[2]} that the model takes")
    else:
        sizes = _tensor_dims(artifact, dims or {}, shape)
    with watch_cpu() as watch, enough_memory(signature, sizes):
        inputs = sized_inputs(artifact.golden()[0][0], signature, sizes)
        batch: ProfiledInputs = inputs["images"] if images else inputs
        sessions = {"whole": open_session(artifact, options)}
        whole_ms = interleaved_latency(sessions, batch, rounds=rounds)["whole"].median_ms
        sessions.clear()  # frees its threads and memory before the profile
        execution = openvino_kernels(artifact, batch, options, rounds)
    remarks = [*notes_on(watch.others, threads=execution.threads), *notes(artifact.manifest, execution, whole_ms), *remarks]
    if ceilings is None:
        ceilings = _measured_ceilings(execution.threads)
        if ceilings.others is not None and ceilings.others >= BUSY:
            remarks.append(f"other processes used {ceilings.others:.1f} cores while the ceilings were measured: the ceilings are too low")
    return Profile(
        artifact=artifact,
        bytes=artifact.bytes,
        engine=options.engine,
        precision=execution.precision,
        threads=execution.threads,
        shape=shape,
        dims=None if images else sizes,
        rounds=rounds,
        whole_ms=whole_ms,
        profiled_ms=execution.profiled_ms,
        between_ms=execution.between_ms,
        kernels=execution.kernels,
        ceilings=ceilings,
        others=watch.others,
        notes=(*remarks, *above(execution.kernels, ceilings)),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=describe_hardware(),
    )


def _tensor_dims(artifact: Artifact, dims: Mapping[str, int], shape: Shape | None) -> dict[str, int]:
    """Sizes of all free dimensions: those given, then `default_dims`. Raises DataError for others."""
    signature = artifact.manifest.signature.tensors
    names = ", ".join(signature.dims) or "it has none"
    if shape is not None:
        raise DataError(f"shape {shape}: {artifact.path} takes named tensors: give dims, sizes of its free dimensions ({names})")
    own = default_dims(artifact)
    if (problem := signature.dims_problem({**own, **dims})) is not None:
        raise DataError(f"dims with {problem}")
    return {**own, **dims}


@contextmanager
def enough_memory(signature: AnySignature, dims: Mapping[str, int]) -> Iterator[None]:
    """Raises DataError for inputs that do not fit into this machine's memory together with their outputs, and where memory runs out."""
    if isinstance(signature, Signature):
        B, H, W = (dims[name] for name in ("batch", "height", "width"))
        needed = (1 + 4) * B * H * W * signature.channels + 4 * prod(signature.scores_shape(B, H, W))
        description = f"{B} images of {H} x {W} pixels, in bytes and in float32, and their scores alone take {needed / 1e9:.3g} GB"
    else:
        sizes = (*signature.input_shapes(dims).values(), *signature.output_sizes(dims).values())
        needed = sum(map(prod, sizes))
        text = ", ".join(f"{name} {size}" for name, size in dims.items())
        description = f"inputs of {text or 'the only size'} and their outputs alone have {needed:,} values"
    memory = memory_gib()
    if memory is not None and needed > memory * 2**30:
        raise DataError(f"{description}, and this machine has {memory * 2**30 / 1e9:.3g} GB: give a smaller size or batch")
    try:
        yield
    except MemoryError as error:
        raise DataError(f"{description}, and there was not enough memory for the call: give a smaller size or batch") from error


def _measured_ceilings(threads: int) -> Ceilings:
    try:
        from muntin.runtime.profiling.ceilings import measure_ceilings  # measured with OpenVINO for every engine
    except ModuleNotFoundError as error:
        raise DependencyError(f"a machine's ceilings are measured with the package {error.name}: pip install {error.name}") from error
    return measure_ceilings(threads=threads)


def _check(engine: str, shape: Shape | None, rounds: int) -> None:
    if engine != "openvino":
        raise DataError(f'engine="{engine}": a profile is made in openvino, whose counters it reads: leave it out')
    if shape is not None:
        check_shape(shape)
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 1000:
        raise DataError(f"rounds={rounds!r}: give a whole number from 1 to 1000")


def default_shape(artifact: Artifact) -> Shape:
    """(B, H, W) of the manifest's example.

    Without one: 512 x 512 or the nearest allowed size, or the recorded side where a picture has one answer, else the golden images' size.
    """
    manifest = artifact.manifest
    if manifest.shape is not None:
        return manifest.shape
    if not manifest.picture.answer.one:
        return (1, *manifest.picture.sizes.at_least(SIDE, SIDE))
    side = manifest.picture.side
    return (1, side, side) if side is not None else (1, *artifact.golden_images()[0][0].shape[1:3])


def default_dims(artifact: Artifact) -> dict[str, int]:
    """Sizes of all free dimensions: those of the manifest's example, else of `default_shape`, or of the first golden inputs."""
    if artifact.manifest.named is None:
        return dict(image_dims(default_shape(artifact)))
    return artifact.manifest.example or dict(check_inputs(artifact.golden()[0][0], artifact.manifest.signature)[1])


def default_size_reason(manifest: Manifest) -> str:
    """Why `default_dims` has its sizes, in words."""
    if manifest.named is not None:
        return "the sizes of the export" if manifest.example is not None else "the sizes of its golden inputs"
    if manifest.example is not None:
        return "the size of the export"
    if not manifest.picture.answer.one:
        return "the default, as the artefact records no size"
    return "the side of its training" if manifest.picture.side is not None else "the size of its golden images"


def sized_inputs(inputs: Named, signature: AnySignature, dims: Mapping[str, int]) -> Named:
    """Inputs of other sizes of the free dimensions: images mirrored or cut (`fill`), others repeated from the start or cut."""
    if isinstance(signature, Signature):
        return {"images": fill(inputs["images"], (dims["batch"], dims["height"], dims["width"]))}
    repeated = dict(inputs)
    for name, shape in signature.input_shapes(dims).items():
        for axis, size in enumerate(shape):
            repeated[name] = np.take(repeated[name], np.arange(size) % inputs[name].shape[axis], axis=axis)
    return repeated


def fill(images_BHWC: NDArray[np.uint8], shape: Shape) -> NDArray[np.uint8]:
    """Images of another shape (B, H, W): repeated to the batch, mirrored or cut to the size."""
    B, H, W = shape
    rows, columns = (max(0, target - side) for target, side in zip((H, W), images_BHWC.shape[1:3], strict=True))
    chosen = images_BHWC[np.arange(B) % len(images_BHWC)]
    mirrored = np.pad(chosen, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="symmetric")
    return np.ascontiguousarray(mirrored[:, :H, :W])


def notes(manifest: Manifest, execution: Execution, whole_ms: float) -> Iterable[str]:
    """Warnings about the kernels' times."""
    profiled, total = execution.profiled_ms, sum(kernel.ms for kernel in execution.kernels)
    if abs(total - profiled) > TOLERANCE * profiled:
        yield (
            f"the kernels' medians sum to {total:.2f} of {profiled:.2f} ms, of which {execution.between_ms:.2f} ms are between kernels: "
            "the rest are interruptions, of another kernel in each inference; measure on a quiet machine"
        )
    if abs(profiled - whole_ms) > 2 * TOLERANCE * whole_ms:
        yield f"an inference with counters on took {profiled:.2f} ms, one without {whole_ms:.2f}: believe the shares more than the times"
    executed = {kernel.layer for kernel in execution.kernels}
    if missing := [record.name for record in manifest.layers if record.name not in executed]:
        names = ", ".join(missing[:3]) + (", ..." if missing[3:] else "")
        yield f"{count(len(missing), 'recorded layer')} without a kernel of the same name: {names}"


def above(kernels: Iterable[Kernel], ceilings: Ceilings) -> Iterable[str]:
    """A warning about products that exceed their measured ceiling. Bytes are ignored: caches are faster than the copy."""
    faster = [kernel for kernel in kernels if kernel.macs and (kernel.bounds_ms(ceilings)[0] or 0.0) > (1 + TOLERANCE) * kernel.ms]
    if faster:
        yield (
            f"{count(len(faster), 'product')} faster than the ceiling of the precision, such as {faster[0].label}: "
            "the ceilings are too low, so every share of them is too high"
        )
