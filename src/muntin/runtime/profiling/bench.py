"""Benchmark of one or several candidates over batches, threads and streams, in one run.

    for each number of threads and streams: open every candidate in a process of its own (time and memory)
    for each number of threads and streams: open all candidates here
        for each batch: latency, one call after the other, interleaved; images a second, all streams busy, interleaved

Candidates of another task or other classes, or with other named tensors, are measured in the same run, at their own size, and not compared.

Quote medians and the ratios between rows of the same run: a machine's absolute times drift.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from muntin.artifact import AnySignature, Signature, TensorSignature
from muntin.errors import DataError
from muntin.runtime.host.hardware import describe_hardware
from muntin.runtime.inputs import Named, Shape, check_dims, check_shape
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.cold_start import ArtifactCandidate, Candidate, Loading, measure_loading
from muntin.runtime.profiling.contention import notes_on, watch_cpu
from muntin.runtime.profiling.profile import enough_memory, sized_inputs
from muntin.runtime.profiling.timing import Latency, Mapper, interleaved_latency, interleaved_throughput
from muntin.text import count

ROUNDS = 50
"""Timed calls a row; a 99th percentile needs that many."""


@dataclass(frozen=True, kw_only=True)
class BenchRow:
    """One candidate with one number of threads and streams on batches of one shape.

    `images_per_s`: with every stream busy. `load_s`, `held_mib`, `peak_mib`, `cached`: of opening it with these threads and streams for all
    batches of the run (`Loading`). `shape`: (B, H, W) of images; None for named tensors, which have `rows` and the sizes of other free
    dimensions, `dims`. `integers`: True if layers run on integer kernels; `precision` is that of the others. `ratio`: the first candidate's
    median latency over this one; None for a single candidate, for another task, other classes or tensors, and where the first has another
    number of streams, since a call has the threads of its stream.
    """

    name: str
    engine: str
    precision: str
    integers: bool
    threads: int
    streams: int
    shape: Shape | None
    latency: Latency
    images_per_s: float
    load_s: float
    held_mib: float | None
    peak_mib: float | None
    cached: bool | None
    ratio: float | None = None
    dims: Mapping[str, int] | None = None
    rows: int = 1

    @property
    def batch(self) -> int:
        """Images, or rows, of a call."""
        return self.rows if self.shape is None else self.shape[0]

    @property
    def size(self) -> str:
        """Height and width, or the free sizes other than the batch's."""
        if self.shape is not None:
            return f"{self.shape[1]}x{self.shape[2]}"
        return ",".join(f"{name}={size}" for name, size in (self.dims or {}).items()) or "-"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """All rows of a run. `size_reason`: why its images have their height and width. `others`: cores' worth of CPU time that other processes
    used meanwhile. `notes`: reasons to doubt the times."""

    rows: tuple[BenchRow, ...]
    size_reason: str
    others: float | None
    notes: tuple[str, ...]
    created: str
    hardware: dict[str, Any]


def bench(
    candidates: Sequence[Candidate],
    *,
    batches: Sequence[int] = (1,),
    threads: Sequence[int | None] = (None,),
    streams: Sequence[int] = (1,),
    size: tuple[int, int] | None = None,
    dims: Mapping[str, int] | None = None,
    rounds: int = ROUNDS,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Bench:
    """Measures candidates (`ArtifactCandidate(path=...)`) in turns. The first one is the base of the ratios.

    `batches`, `threads`, `streams`: every combination is a row (None threads: the usable physical cores; streams are limited to the number
    of threads, with a note). `rounds`: timed calls a row. The images are the golden ones of the first artefact (of a run's training split
    where there is no artefact), mirrored up to the size. `size`: height and width in pixels, by default of that example; of a size that the
    artefact does not take, the nearest one. Of named tensors the golden inputs are repeated to the number of rows; `dims`: sizes of other
    free dimensions, by default those of the export. Candidates of another task, other channels, classes or tensors have inputs and sizes of
    their own, no ratio, and a note. `report` is called with (steps done, number of steps).

    Raises the errors of `load`, and DataError for a value out of range and for images larger than memory.
    """
    _check(candidates, batches, threads, streams, size, rounds)
    combinations = [SessionOptions(threads=n, streams=s) for n in threads for s in streams]
    named = dict(zip(distinct_names([candidate.path for candidate in candidates]), candidates, strict=True))
    groups = _groups(named, batches, size, dims or {})
    settings = _settings(combinations)
    loadings: list[dict[str, Loading]] = []
    for done, setting in enumerate(settings):
        report(done, 2 * len(settings))
        loadings.append({name: loading for group in groups for name, loading in group.load(setting).items()})
    rows: list[BenchRow] = []
    with watch_cpu() as watch:  # begins after the processes that loaded, which would count as others
        for done, (setting, loaded) in enumerate(zip(settings, loadings, strict=True), len(settings)):
            report(done, 2 * len(settings))
            for group in groups:
                rows += group.measure(loaded, setting, rounds)
    report(2 * len(settings), 2 * len(settings))
    pairs = dict.fromkeys((options.thread_count, options.streams) for options in combinations)
    notes = notes_on(watch.others, threads=max(n for n, _ in pairs))
    notes += [f"{s} streams on {count(n, 'thread')}: a stream needs a thread, so they count as {n}" for n, s in pairs if s > n]
    if any(row.ratio is None for row in rows if row.name in groups[0].candidates):
        notes.append("a call has the threads of its stream, so latencies of different streams are not compared: compare images/s")
    compared = groups[0].candidates if len(groups[0].candidates) > 1 else {}
    first = next(iter(named))
    notes += [
        f"{', '.join(group.candidates)} ({group.kind}) and {first} ({groups[0].kind}) differ in {group.differs_in}: not compared"
        for group in groups[1:]
    ]
    reasons = [f"{group.reason} of {group.owner}" if len(named) > 1 and size is None else group.reason for group in groups]
    return Bench(
        rows=tuple(row if row.name in compared else replace(row, ratio=None) for row in rows),
        size_reason=", ".join(dict.fromkeys(reasons)),
        others=watch.others,
        notes=tuple(notes),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        hardware=describe_hardware(),
    )


def distinct_names(paths: Sequence[str]) -> list[str]:
    """A name for each path: its last two parts; the path where another ends alike. A path that is given again has a number."""
    last = {path: str(Path(*Path(path).parts[-2:])) for path in paths}
    names = [last[path] if list(last.values()).count(last[path]) == 1 else path for path in paths]
    return [name if name not in names[:index] else f"{name} ({names[: index + 1].count(name)})" for index, name in enumerate(names)]


def _settings(combinations: Sequence[SessionOptions]) -> list[SessionOptions]:
    """Each different combination once, with at most as many streams as threads."""
    limited = (
        replace(options, threads=options.thread_count, streams=min(options.streams, options.thread_count)) for options in combinations
    )
    return list(dict.fromkeys(limited))


@dataclass(frozen=True, kw_only=True)
class _Comparable:
    """Candidates that compute the same from the same inputs.

    `owner`: whose `example` is taken. `reason`: why it has its sizes. `dims`: sizes of all free dimensions, with one of the `batches`.
    """

    signature: AnySignature
    example: Named
    dims: Mapping[str, int]
    reason: str
    batches: tuple[int, ...]
    owner: str
    candidates: Mapping[str, Candidate]

    @property
    def kind(self) -> str:
        """Task, channels and classes, or tensors, in words."""
        signature = self.signature
        if not isinstance(signature, Signature):
            return signature.text
        classes = f", {count(len(signature.classes), 'class')}" if signature.answer.has_classes else ""
        return f"{signature.task}, {count(signature.channels, 'channel')}{classes}"

    @property
    def differs_in(self) -> str:
        """Where candidates may differ from others."""
        return "task, channels or classes" if isinstance(self.signature, Signature) else "task or tensors"

    def sized(self, options: SessionOptions) -> SessionOptions:
        """Options that compile for every batch."""
        every = [self._dims(batch) for batch in self.batches]
        if isinstance(self.signature, Signature):
            return replace(options, shapes=tuple((dims["batch"], dims["height"], dims["width"]) for dims in every))
        return replace(options, dims=check_dims(every, self.signature))

    def inputs(self, rows: int) -> Any:
        """A batch of so many rows: images, or arrays by name."""
        inputs = sized_inputs(self.example, self.signature, self._dims(rows))
        return inputs["images"] if isinstance(self.signature, Signature) else inputs

    def size(self, rows: int) -> dict[str, Any]:
        """`shape`, `dims` and `rows` of a `BenchRow`."""
        if isinstance(self.signature, Signature):
            return {"shape": (rows, self.dims["height"], self.dims["width"]), "rows": rows}
        return {"shape": None, "rows": rows, "dims": {name: size for name, size in self.dims.items() if name != self.signature.batch}}

    def load(self, options: SessionOptions) -> dict[str, Loading]:
        with self._memory():
            return {name: measure_loading(candidate, self.sized(options)) for name, candidate in self.candidates.items()}

    def measure(self, loaded: Mapping[str, Loading], options: SessionOptions, rounds: int) -> list[BenchRow]:
        with self._memory():
            return _measure(self, loaded, self.sized(options), rounds)

    def _memory(self) -> AbstractContextManager[None]:
        return enough_memory(self.signature, self._dims(max(self.batches)))

    def _dims(self, rows: int) -> dict[str, int]:
        batch = self.signature.tensors.batch
        return {**self.dims, **({} if batch is None else {batch: rows})}


def _groups(
    named: Mapping[str, Candidate], batches: Sequence[int], size: tuple[int, int] | None, dims: Mapping[str, int]
) -> list[_Comparable]:
    """The candidates by what they compute, that of the first candidate first."""
    signatures = {name: candidate.signature for name, candidate in named.items()}
    members: dict[tuple[object, ...], dict[str, Candidate]] = {}
    for name, candidate in named.items():
        signature = signatures[name]
        key: tuple[object, ...] = (signature.task, signature)
        if isinstance(signature, Signature):
            key = (signature.task, signature.channels, signature.scale, *(entry.name for entry in signature.classes))
        members.setdefault(key, {})[name] = candidate
    return [_group(candidates, signatures, tuple(batches), size, dims) for candidates in members.values()]


def _group(
    candidates: Mapping[str, Candidate],
    signatures: Mapping[str, AnySignature],
    batches: tuple[int, ...],
    size: tuple[int, int] | None,
    dims: Mapping[str, int],
) -> _Comparable:
    # An artefact holds its inputs; a run needs its data, which may be gone.
    owner = next((name for name, candidate in candidates.items() if isinstance(candidate, ArtifactCandidate)), next(iter(candidates)))
    example, signature = candidates[owner].example(), signatures[owner]
    reason = example.reason if size is None and not dims else "as given"
    if not isinstance(signature, Signature):
        _check_tensors(owner, signature, batches, size, dims)
    elif dims:
        raise DataError(f"dims of {', '.join(dims)}: {owner} takes images: give size")
    elif size is not None:
        measured = signature.sizes.at_least(*size)
        dims = {"height": measured[0], "width": measured[1]}
        reason = "as given" if measured == size else f"nearest to {size[0]}x{size[1]} that it takes"
    return _Comparable(
        signature=signature, example=example.inputs, dims={**example.dims, **dims}, reason=reason, batches=batches, owner=owner,
        candidates=candidates,
    )  # fmt: skip


def _check_tensors(
    owner: str, signature: TensorSignature, batches: Sequence[int], size: tuple[int, int] | None, dims: Mapping[str, int]
) -> None:
    if size is not None:
        raise DataError(f"size {size[0]}x{size[1]}: {owner} takes named tensors: give dims ({', '.join(signature.dims) or 'it has none'})")
    if set(batches) != {1} and signature.batch is None:
        raise DataError(f"batches {list(batches)}: {owner} has no dimension of independent rows: leave them out")
    free = [name for name in signature.dims if name != signature.batch]
    for name, number in dims.items():
        if name not in free or type(number) is not int or number < 1:
            raise DataError(f"dims with {name}={number!r}: give a number from 1 for some of {', '.join(free) or 'none'}; batches are apart")


def _measure(group: _Comparable, loading: Mapping[str, Loading], options: SessionOptions, rounds: int) -> list[BenchRow]:
    """One row for each candidate and batch; the first candidate is the base of the ratios."""
    sessions: dict[str, Mapper] = {name: candidate.open(options) for name, candidate in group.candidates.items()}
    first, rows = next(iter(sessions)), []
    for number in group.batches:
        batch = group.inputs(number)
        latencies = interleaved_latency(sessions, batch, rounds=rounds)
        rates = interleaved_throughput(sessions, batch, rounds=max(1, rounds // 10), rows=number)
        for name, session in sessions.items():
            described: Any = {key: getattr(session, key) for key in ("engine", "precision")}
            described |= {key: getattr(loading[name], key) for key in ("load_s", "held_mib", "peak_mib", "cached")}
            comparable = session.streams == sessions[first].streams
            rows.append(
                BenchRow(
                    name=name,
                    integers=group.candidates[name].integers,
                    threads=options.thread_count,
                    streams=session.streams,
                    latency=latencies[name],
                    images_per_s=rates[name],
                    ratio=latencies[first].median_ms / latencies[name].median_ms if comparable else None,
                    **group.size(number),
                    **described,
                )
            )
    return rows


def _check(
    candidates: Sequence[Candidate],
    batches: Sequence[int],
    threads: Sequence[int | None],
    streams: Sequence[int],
    size: tuple[int, int] | None,
    rounds: int,
) -> None:
    if not candidates:
        raise DataError("nothing to measure: give at least one artefact or run")
    for name, values in (("batches", batches), ("threads", threads), ("streams", streams)):
        if not values:
            raise DataError(f"{name}={values!r}: give at least one number")
    for batch in batches:
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
            raise DataError(f"batch={batch!r}: give a whole number of images from 1")
    if size is not None:
        check_shape((1, *size))
    if isinstance(rounds, bool) or not isinstance(rounds, int) or not 1 <= rounds <= 10_000:
        raise DataError(f"rounds={rounds!r}: give a whole number from 1 to 10000")
