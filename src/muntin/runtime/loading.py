"""What opening something costs: seconds and memory, each measured in a process of its own.

In a process that has opened others before, the first pays for loading the engine's library and the later ones use memory that was freed:
the same artefact twice would get two figures. So a fresh process loads the library, then looks at the clock and at its memory, then opens.
What it opens is described by plain values (`Candidate`), since a process cannot be handed a session.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any, TextIO

from muntin import errors
from muntin.artifact import open_artifact
from muntin.errors import DataError, MuntinError
from muntin.runtime import quiet
from muntin.runtime.cache import cache_folder, compiled_folder
from muntin.runtime.engines import open_session
from muntin.runtime.hardware import memory_gib
from muntin.runtime.latency import Mapper
from muntin.runtime.memory import watch_memory
from muntin.runtime.options import DEFAULT_ENGINE, SessionOptions
from muntin.runtime.session import Shape

_START = "import sys; sys.path[:] = {path!r}; from muntin.runtime.loading import answer; answer()"
_KEEPS = {"openvino": ("openvino", "openvino"), "onnxruntime-tensorrt": ("tensorrt", "onnxruntime")}
"""An engine that keeps what it compiles -> its name in the cache, and the library whose version counts."""

Files = frozenset[tuple[Path, int]]
"""Files and the time of their last change, in ns."""


@dataclass(frozen=True, kw_only=True)
class Candidate(ABC):
    """Something to be opened and measured. A subclass is a frozen dataclass of plain values, in a module that can be imported."""

    path: str

    @property
    def name(self) -> str:
        """What it is called in a table."""
        return Path(self.path).name or self.path

    @abstractmethod
    def prepare(self) -> None:
        """Loads the libraries that opening needs: once a process, so no cost of this candidate."""

    @abstractmethod
    def open(self, options: SessionOptions) -> Mapper:
        """Opens a session that has computed once for each of the options' shapes. The candidate decides on engine and precision."""

    def from_cache(self, before: Files) -> bool | None:
        """After opening: whether all that is compiled was kept by an earlier process; None where nothing is ever kept. `before`: what the
        cache held before."""
        return None


@dataclass(frozen=True, kw_only=True)
class ArtifactCandidate(Candidate):
    """An artefact in an engine, as `load` opens it."""

    engine: str = DEFAULT_ENGINE
    precision: str = "recorded"

    def prepare(self) -> None:
        if self.engine == "openvino":
            quiet.openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")  # its plugin for CPUs is a library that is loaded when first used
        else:
            quiet.onnxruntime.get_available_providers()

    def open(self, options: SessionOptions) -> Mapper:
        return open_session(self.path, replace(options, engine=self.engine, precision=self.precision))

    def from_cache(self, before: Files) -> bool | None:
        if self.engine not in _KEEPS:
            return None
        name, library = _KEEPS[self.engine]
        folder = compiled_folder(name, getattr(quiet, library).__version__, open_artifact(self.path).manifest.sha256)
        files = frozenset() if folder is None else _files(folder)
        return bool(files) and files <= before


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What opening took.

    `load_s`: compilation or the cache's copy and a first call of every batch included. `held_mib`, `peak_mib`: resident memory that it
    added, after and at the most; None where the system does not say. `cached`: whether what the engine compiles came from the user's
    cache, None for an engine that keeps nothing there. `channels`: of the images that it takes.
    """

    load_s: float
    held_mib: float | None
    peak_mib: float | None
    cached: bool | None
    channels: int


def measure_loading(candidate: Candidate, options: SessionOptions) -> Loading:
    """Opens a candidate, with the options' threads, streams and shapes, in a new process of this Python.

    Takes half a second longer than opening it (PyTorch: some seconds).

    Raises what opening raises, and DataError where the process ends without an answer, as when the system kills it for its memory.
    """
    question = {
        "kind": [type(candidate).__module__, type(candidate).__qualname__],
        "fields": asdict(candidate),
        "options": asdict(options),
    }
    shapes = options.shapes or ()
    done = subprocess.run(  # noqa: S603 - this Python, and a text of ours
        [sys.executable, "-c", _START.format(path=sys.path)], input=json.dumps(question), capture_output=True, text=True, check=False
    )
    if done.returncode < 0:
        raise DataError(
            f"{candidate.name}: opening it for images of {_sizes(shapes)} was ended by signal {-done.returncode}, as when memory runs out: "
            "choose a smaller size or batch"
        )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise DataError(f"{candidate.name} cannot be opened in a process of its own: {lines[-1]}")
    return _read(json.loads(done.stdout), candidate, shapes)


def too_large(shapes: tuple[Shape, ...], channels: int) -> DataError:
    """The error for images that no memory holds: how many bytes the largest batch of these shapes alone takes."""
    B, H, W = max(shapes, key=prod)
    count, there = B * H * W * channels, memory_gib()
    memory = "more than can be had" if there is None else f"and this process may use {there:g} GiB"
    size = f"{count} bytes ({count / 2**30:.1f} GiB)"
    return DataError(
        f"{B} images of {H} x {W} pixels in {channels} channels: they alone take {size}, {memory}: choose a smaller size or batch"
    )


def _sizes(shapes: tuple[Shape, ...]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _read(answer: Mapping[str, Any], candidate: Candidate, shapes: tuple[Shape, ...]) -> Loading:
    if "error" not in answer:
        return Loading(**answer)
    if answer["error"] == "MemoryError":
        raise DataError(f"{candidate.name}: no memory to open it for images of {_sizes(shapes)}: choose a smaller size or batch")
    kind: type[MuntinError] = getattr(errors, answer["error"], MuntinError)
    raise kind(answer["text"])


# ---- in the new process ----


def answer() -> None:
    """Reads what to open from standard input, opens it, writes a `Loading` or an error, as JSON, to standard output."""
    with _answers_alone() as answers:
        question = json.load(sys.stdin)
        module, name = question["kind"]
        try:
            candidate: Candidate = getattr(import_module(module), name)(**question["fields"])
            found = asdict(_open(candidate, SessionOptions(**question["options"])))
        except (MuntinError, MemoryError) as error:
            found = {"error": type(error).__name__, "text": str(error)}
        json.dump(found, answers)


def _answers_alone() -> TextIO:
    """Standard output for the answer alone: what libraries print there goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _open(candidate: Candidate, options: SessionOptions) -> Loading:
    _prepare(candidate)
    before = _compiled()
    started = time.perf_counter()
    with watch_memory() as watch:
        session = candidate.open(options)
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
    """What was compiled before. Without a home there is no cache, and nothing in it."""
    try:
        return _files(cache_folder() / "compiled")
    except RuntimeError:
        return frozenset()


def _files(folder: Path) -> Files:
    found = set()
    for file in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another process makes room, or renames what it has written
            if file.is_file():
                found.add((file, file.stat().st_mtime_ns))
    return frozenset(found)


def _mib(count: int | None) -> float | None:
    return None if count is None else count / 2**20
