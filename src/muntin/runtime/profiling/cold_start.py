"""Measures time and memory of opening an artefact or a checkpoint, in a new process each time.

In one process the first session would pay for importing the engine's library, and later ones would reuse freed memory. So a new process
imports the library, reads the clock and its memory, and then opens. A `Candidate` describes what to open by plain values, since a session
cannot be sent to another process.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from muntin.artifact import AnySignature, Artifact, open_artifact
from muntin.errors import DataError
from muntin.runtime.engines.registry import open_session
from muntin.runtime.host import quiet_imports
from muntin.runtime.host.helper_process import Outcome, answer_question, ask_helper, recorded_error
from muntin.runtime.host.memory import watch_memory
from muntin.runtime.inputs import Named
from muntin.runtime.options import DEFAULT_ENGINE, SessionOptions
from muntin.runtime.profiling.profile import default_dims, default_size_reason
from muntin.runtime.profiling.timing import Mapper


@dataclass(frozen=True, kw_only=True)
class ExampleInputs:
    """Named inputs to measure with; of an image model `images`. `dims`: the sizes of free dimensions to measure at, for the `reason`."""

    inputs: Named
    dims: Mapping[str, int]
    reason: str


@dataclass(frozen=True, kw_only=True)
class Candidate(ABC):
    """Base of what can be opened and measured. A subclass is a frozen dataclass of plain values in an importable module."""

    path: str

    @property
    def name(self) -> str:
        """Name in tables."""
        return Path(self.path).name or self.path

    @property
    def integers(self) -> bool:
        """True if layers run on integer kernels."""
        return False

    @property
    @abstractmethod
    def signature(self) -> AnySignature:
        """Task, channels and classes; or named inputs and outputs."""

    @abstractmethod
    def example(self) -> ExampleInputs:
        """Inputs of its own, and the size that it is measured at by default."""

    @abstractmethod
    def prepare(self) -> None:
        """Imports the libraries that opening needs; this is not measured."""

    @abstractmethod
    def open(self, options: SessionOptions) -> Mapper:
        """Opens a session that has computed once for each of the options' shapes. The candidate decides on engine and precision."""


@dataclass(frozen=True, kw_only=True)
class ArtifactCandidate(Candidate):
    """An artefact to open in an engine, as `load` does. Raises DataError for an unknown engine or precision."""

    engine: str = DEFAULT_ENGINE
    precision: str = "recorded"

    def __post_init__(self) -> None:
        SessionOptions(engine=self.engine, precision=self.precision)

    @property
    def integers(self) -> bool:
        return self._artifact().manifest.integers

    @property
    def signature(self) -> AnySignature:
        return self._artifact().manifest.signature

    def example(self) -> ExampleInputs:
        artifact = self._artifact()
        reason = default_size_reason(artifact.manifest)
        return ExampleInputs(inputs=artifact.golden()[0][0], dims=default_dims(artifact), reason=reason)

    def _artifact(self) -> Artifact:
        return open_artifact(self.path)

    def prepare(self) -> None:
        if self.engine == "openvino":
            quiet_imports.openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")  # loads the plugin for CPUs
        else:
            quiet_imports.onnxruntime.get_available_providers()

    def open(self, options: SessionOptions) -> Mapper:
        return open_session(self._artifact(), replace(options, engine=self.engine, precision=self.precision))


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Cost of opening.

    `load_s`: includes compiling or reading the cache, and a first call of every batch. `held_mib`, `peak_mib`: added resident memory at the
    end and at the peak, None where unknown. `cached`: True if the compiled models came from the user's cache, None where unknown.
    """

    load_s: float
    held_mib: float | None
    peak_mib: float | None
    cached: bool | None


def measure_loading(candidate: Candidate, options: SessionOptions) -> Loading:
    """Opens a candidate, with the options' threads, streams, shapes and dims, in a new process of this Python.

    Takes half a second longer than opening it (PyTorch: some seconds). Raises the errors of opening, and DataError if the process ends
    without an answer, as when the system kills it for lack of memory.
    """
    question = {
        "kind": [type(candidate).__module__, type(candidate).__qualname__],
        "fields": asdict(candidate),
        "options": asdict(options),
    }
    return _read(ask_helper(answer, question), candidate, options)


def _read(outcome: Outcome, candidate: Candidate, options: SessionOptions) -> Loading:
    images = ", ".join("x".join(map(str, shape)) for shape in options.shapes or ())
    tensors = "; ".join(", ".join(f"{name} {size}" for name, size in dims) for dims in options.dims or ())
    sizes = f"inputs of {tensors}" if tensors else f"images of {images}"
    if outcome.returncode < 0:
        raise DataError(
            f"{candidate.name}: opening it for {sizes} was ended by signal {-outcome.returncode}, "
            "as when memory runs out: choose a smaller size or batch"
        )
    if outcome.returncode:
        raise DataError(f"{candidate.name} cannot be opened in a process of its own: {outcome.last_line}")
    record: Mapping[str, Any] = json.loads(outcome.answer)
    if "error" not in record:
        return Loading(**record)
    error = recorded_error(record)
    if isinstance(error, MemoryError):
        raise DataError(f"{candidate.name}: no memory to open it for {sizes}: choose a smaller size or batch")
    raise error


# ---- in the new process ----


def answer() -> None:
    """Answer the question of `measure_loading`: open the candidate, and write a `Loading` or an error."""
    answer_question(_measure)


def _measure(question: dict[str, Any]) -> dict[str, Any]:
    module, name = question["kind"]
    candidate: Candidate = getattr(import_module(module), name)(**question["fields"])
    options = SessionOptions(**question["options"])
    with suppress(ImportError):  # opening tells which package is missing
        candidate.prepare()
    started = time.perf_counter()
    with watch_memory() as watch:
        session = candidate.open(options)
    return {
        "load_s": time.perf_counter() - started,
        "held_mib": _mib(watch.held),
        "peak_mib": _mib(watch.peak),
        "cached": getattr(session, "from_cache", None),
    }


def _mib(count: int | None) -> float | None:
    return None if count is None else count / 2**20
