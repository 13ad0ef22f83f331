"""Measure what opening an artefact costs, seconds and memory, in a new process for each.

In one process for all, the first artefact would pay for loading the engine's library, and later ones would use memory that was freed: the
same artefact twice would get two figures. A new process loads the library, reads the clock and its memory, and then opens the artefact.
Plain values (`Candidate`) describe what it opens, because a session cannot be passed to a process.
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

from muntin.artifact import open_artifact
from muntin.errors import DataError
from muntin.runtime import quiet
from muntin.runtime.cache import cache_folder, compiled_folder
from muntin.runtime.engines import DEFAULT_ENGINE, load
from muntin.runtime.hardware import memory_gib
from muntin.runtime.helper_process import Outcome, answer_question, ask_helper, recorded_error
from muntin.runtime.latency import Mapper
from muntin.runtime.memory import watch_memory
from muntin.runtime.session import Shape

_KEEPS = {"openvino": ("openvino", "openvino"), "onnxruntime-tensorrt": ("tensorrt", "onnxruntime")}
"""Engines that keep compiled models in the cache: their names there, and the library whose version counts."""

Files = frozenset[tuple[Path, int]]
"""Files and the time of their last change, in ns."""


@dataclass(frozen=True, kw_only=True)
class Candidate(ABC):
    """A model to open and measure. A subclass is a frozen dataclass of plain values, in a module that can be imported."""

    path: str

    @property
    def name(self) -> str:
        """Its name in a table."""
        return Path(self.path).name or self.path

    @abstractmethod
    def prepare(self) -> None:
        """Load the libraries that opening needs. This is done once in a process, and is no cost of this candidate."""

    @abstractmethod
    def open(self, threads: int, streams: int, shapes: tuple[Shape, ...]) -> Mapper:
        """Return a session that has computed once for each shape (B, H, W)."""

    def from_cache(self, before: Files) -> bool | None:
        """Return whether everything compiled came from the cache; None if the engine keeps nothing there. `before`: the cache's files
        before opening."""
        return None


@dataclass(frozen=True, kw_only=True)
class ArtifactCandidate(Candidate):
    """An artefact to open in an engine, as `load` does."""

    engine: str = DEFAULT_ENGINE
    precision: str = "recorded"

    def prepare(self) -> None:
        if self.engine == "openvino":
            quiet.openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")  # its plugin for CPUs is a library that is loaded when first used
        else:
            quiet.onnxruntime.get_available_providers()

    def open(self, threads: int, streams: int, shapes: tuple[Shape, ...]) -> Mapper:
        return load(self.path, engine=self.engine, precision=self.precision, threads=threads, streams=streams, shapes=shapes)

    def from_cache(self, before: Files) -> bool | None:
        if self.engine not in _KEEPS:
            return None
        name, library = _KEEPS[self.engine]
        folder = compiled_folder(name, getattr(quiet, library).__version__, open_artifact(self.path).manifest.sha256)
        files = frozenset() if folder is None else _files(folder)
        return bool(files) and files <= before


@dataclass(frozen=True, kw_only=True)
class Loading:
    """Costs of opening.

    `load_s`: seconds, with compilation or reading the cache, and a first call of every batch. `held_mib`, `peak_mib`: resident memory
    added, afterwards and at the peak; None if the system does not tell. `cached`: whether everything compiled came from the user's cache;
    None for an engine that keeps nothing there. `channels`: number of channels of its images.
    """

    load_s: float
    held_mib: float | None
    peak_mib: float | None
    cached: bool | None
    channels: int


def measure_loading(candidate: Candidate, *, threads: int, streams: int, shapes: tuple[Shape, ...]) -> Loading:
    """Open a candidate in a new process of this Python. Takes half a second longer than opening it (PyTorch: some seconds).

    Raises the error that opening raises, and DataError if the process ends without an answer, as when the system kills it for its memory.
    """
    question = {
        "kind": [type(candidate).__module__, type(candidate).__qualname__],
        "fields": asdict(candidate),
        "setting": {"threads": threads, "streams": streams, "shapes": shapes},
    }
    return _read(ask_helper(answer, question), candidate, shapes)


def too_large(shapes: tuple[Shape, ...], channels: int) -> DataError:
    """Return the error for images that do not fit into memory. It names the bytes of the largest batch of these shapes."""
    B, H, W = max(shapes, key=prod)
    count, limit_gib = B * H * W * channels, memory_gib()
    memory = "more than can be had" if limit_gib is None else f"and this process may use {limit_gib:g} GiB"
    size = f"{count} bytes ({count / 2**30:.1f} GiB)"
    return DataError(
        f"{B} images of {H} x {W} pixels in {channels} channels: they alone take {size}, {memory}: choose a smaller size or batch"
    )


def _sizes(shapes: tuple[Shape, ...]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _read(outcome: Outcome, candidate: Candidate, shapes: tuple[Shape, ...]) -> Loading:
    if outcome.returncode < 0:
        raise DataError(
            f"{candidate.name}: opening it for images of {_sizes(shapes)} was ended by signal {-outcome.returncode}, "
            "as when memory runs out: choose a smaller size or batch"
        )
    if outcome.returncode:
        raise DataError(f"{candidate.name} cannot be opened in a process of its own: {outcome.last_line}")
    record: Mapping[str, Any] = json.loads(outcome.answer)
    if "error" not in record:
        return Loading(**record)
    error = recorded_error(record)
    if isinstance(error, MemoryError):
        raise DataError(f"{candidate.name}: no memory to open it for images of {_sizes(shapes)}: choose a smaller size or batch")
    raise error


# ---- in the new process ----


def answer() -> None:
    """Answer the question of `measure_loading`: open the candidate, and write a `Loading` or an error."""
    answer_question(_measure)


def _measure(question: dict[str, Any]) -> dict[str, Any]:
    module, name = question["kind"]
    setting = question["setting"]
    shapes = tuple((B, H, W) for B, H, W in setting["shapes"])
    candidate: Candidate = getattr(import_module(module), name)(**question["fields"])
    return asdict(_open(candidate, setting["threads"], setting["streams"], shapes))


def _open(candidate: Candidate, threads: int, streams: int, shapes: tuple[Shape, ...]) -> Loading:
    _prepare(candidate)
    before = _compiled()
    started = time.perf_counter()
    with watch_memory() as watch:
        session = candidate.open(threads, streams, shapes)
    return Loading(
        load_s=time.perf_counter() - started,
        held_mib=_mib(watch.held),
        peak_mib=_mib(watch.peak),
        cached=candidate.from_cache(before),
        channels=session.signature.channels,
    )


def _prepare(candidate: Candidate) -> None:
    try:
        candidate.prepare()
    except ImportError:
        return  # opening says what is missing, and what to install


def _compiled() -> Files:
    """Return the files in the cache of compiled models. Without a home directory there is no cache."""
    try:
        return _files(cache_folder() / "compiled")
    except RuntimeError:
        return frozenset()


def _files(folder: Path) -> Files:
    files = set()
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process may delete or rename it meanwhile
            if file.is_file():
                files.add((file, file.stat().st_mtime_ns))
    return frozenset(files)


def _mib(count: int | None) -> float | None:
    return None if count is None else count / 2**20
