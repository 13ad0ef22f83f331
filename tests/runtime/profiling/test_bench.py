"""bench: every combination is a row, all candidates in the same run, and what makes the times doubtful is said."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from muntin.errors import DataError
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.bench import bench, distinct_names
from muntin.runtime.profiling.cold_start import ArtifactCandidate, Loading
from muntin.text import count


def candidate(written: Any, **options: str) -> ArtifactCandidate:
    return ArtifactCandidate(path=str(written.path), **options)


def name_of(written: Any) -> str:
    return f"{written.path.parent.name}/{written.path.name}"


@pytest.fixture
def loaded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading is not measured: it takes half a second for each row."""
    loading = Loading(load_s=0.1, held_mib=None, peak_mib=None, cached=None)
    monkeypatch.setattr(sys.modules[bench.__module__], "measure_loading", lambda candidate, options: loading)


def test_every_combination_is_a_row(convolutions: Any) -> None:
    done: list[tuple[int, int]] = []
    result = bench(
        [candidate(convolutions)],
        batches=(1, 3),
        threads=(1, 2),
        streams=(1, 2),
        size=(16, 24),
        rounds=3,
        report=lambda *at: done.append(at),
    )
    settings = [(row.threads, row.streams, row.shape) for row in result.rows]
    # two streams of one thread are one stream: no row twice
    assert settings == [(t, s, (b, 16, 24)) for t, s in ((1, 1), (2, 1), (2, 2)) for b in (1, 3)]
    for row in result.rows:
        assert (row.name, row.engine, row.precision) == (name_of(convolutions), "openvino", "f32")
        assert 0 < row.latency.median_ms <= row.latency.p90_ms <= row.latency.p99_ms and row.latency.calls == 3
        assert row.images_per_s > 0 and row.load_s > 0 and row.ratio is None
        assert row.peak_mib is None or row.peak_mib >= 0
    assert done == [(n, 6) for n in range(7)]  # each setting is loaded, then timed
    assert result.notes[-1] == "2 streams on 1 thread: a stream needs a thread, so they count as 1"


@pytest.mark.usefixtures("loaded_at_once")
def test_candidates_and_ratios(convolutions: Any) -> None:
    candidates = [candidate(convolutions, engine="onnxruntime"), candidate(convolutions), candidate(convolutions, precision="f32")]
    result = bench(candidates, batches=(1, 2), size=(8, 8), rounds=3)
    assert [row.name for row in result.rows] == [f"{name_of(convolutions)}{number}" for number in ("", " (2)", " (3)")] * 2
    assert [row.engine for row in result.rows] == ["onnxruntime", "openvino", "openvino"] * 2
    assert result.size_reason == "as given"
    for first, *others in (result.rows[:3], result.rows[3:]):
        assert first.ratio == 1
        for row in others:
            assert row.ratio == pytest.approx(first.latency.median_ms / row.latency.median_ms)
            assert math.isfinite(row.ratio)


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a/artifact", "small", "runs/b/artifact"], ["a/artifact", "small", "b/artifact"]),
        (["x/3-mixed/artifact", "y/3-mixed/artifact"], ["x/3-mixed/artifact", "y/3-mixed/artifact"]),
        (["a", "b", "a", ".", "/c"], ["a", "b", "a (2)", ".", "/c"]),
    ],
)
def test_distinct_names(paths: list[str], names: list[str]) -> None:
    assert distinct_names(paths) == names


class OneStream(ArtifactCandidate):
    """As PyTorch is: its calls have all threads."""

    def open(self, options: SessionOptions) -> Any:
        return super().open(replace(options, streams=1))


@pytest.mark.usefixtures("loaded_at_once")
@pytest.mark.parametrize("streams", [1, 2])
def test_ratio_of_other_streams(convolutions: Any, streams: int) -> None:
    result = bench(
        [OneStream(path=str(convolutions.path)), candidate(convolutions)], threads=(2,), streams=(streams,), size=(8, 8), rounds=3
    )
    base, row = result.rows
    assert (base.streams, row.streams, base.ratio) == (1, streams, 1)
    assert (row.ratio is None) == (streams > 1)
    assert ("latencies of different streams are not compared: compare images/s" in " ".join(result.notes)) == (streams > 1)


@pytest.mark.usefixtures("loaded_at_once")
def test_default_size_is_the_example(write_layers: Callable[..., Any], convolutions: Any, tmp_path: Path) -> None:
    written = write_layers(tmp_path / "a", convolutions.layers, example=(1, 12, 20))
    result = bench([candidate(written)], batches=(2,), rounds=1)
    assert result.rows[0].shape == (2, 12, 20) and result.size_reason == "the size of the export"
    both = bench([candidate(written), candidate(convolutions)], rounds=1)
    assert {row.shape for row in both.rows} == {(1, 12, 20)} and both.size_reason == f"the size of the export of {name_of(written)}"


@pytest.mark.usefixtures("loaded_at_once")
def test_plain_values(convolutions: Any) -> None:
    document = asdict(bench([candidate(convolutions)], size=(8, 8), rounds=1))
    assert document["rows"][0]["latency"]["calls"] == 1
    assert document["hardware"]["physical_cores"] == physical_cores()


def test_memory_of_loading_is_repeatable(convolutions: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path))
    options: dict[str, Any] = {"threads": (1, 2), "size": (96, 96), "rounds": 1}
    bench([candidate(convolutions)], **options)  # compiles: from here on all come from the cache
    rows = bench([candidate(convolutions)] * 2, **options).rows
    assert [row.cached for row in rows] == [True] * 4
    peaks = [row.peak_mib for row in rows if row.peak_mib is not None]
    if not peaks:
        pytest.skip("the system does not say how much memory a process has")
    assert len(peaks) == 4
    assert min(peaks) > 5
    assert max(peaks) - min(peaks) < max(peaks) / 4


@pytest.mark.usefixtures("loaded_at_once")
def test_candidates_that_compute_something_else(
    write_layers: Callable[..., Any], convolutions: Any, per_pixel: Any, tmp_path: Path
) -> None:
    """Each kind is measured at its own size; only those of the first one's kind are compared with it."""
    first = write_layers(tmp_path / "a", convolutions.layers, example=(1, 12, 20))
    other = write_layers(tmp_path / "b", per_pixel.layers, example=(1, 8, 10))
    result = bench([candidate(first), candidate(other), candidate(convolutions)], rounds=1)
    rows = {row.name: row for row in result.rows}
    assert rows[name_of(other)].shape == (1, 8, 10) and rows[name_of(other)].ratio is None
    assert rows[name_of(convolutions)].shape == (1, 12, 20) and rows[name_of(convolutions)].ratio is not None
    one, two = f"{name_of(other)} (segment, 4 channels, 6 classes)", f"{name_of(first)} (segment, 3 channels, 5 classes)"
    assert f"{one} and {two} differ in task, channels or classes: not compared" in result.notes
    assert result.size_reason == f"the size of the export of {name_of(first)}, the size of the export of {name_of(other)}"
    pair = bench([candidate(per_pixel), candidate(convolutions)], size=(8, 8), rounds=1)
    assert [(row.shape, row.ratio) for row in pair.rows] == [((1, 8, 8), None)] * 2
    assert not any("streams" in note for note in pair.notes)


def test_images_larger_than_memory(convolutions: Any) -> None:
    with pytest.raises(DataError, match=r"^100 images of 99999 x 99999 pixels.* alone take .* GB.*: give a smaller size or batch$"):
        bench([candidate(convolutions)], batches=(1, 100), size=(99999, 99999))


@pytest.mark.usefixtures("loaded_at_once")
def test_too_many_threads_are_named(convolutions: Any) -> None:
    many = physical_cores() + 3
    notes = bench([candidate(convolutions)], size=(8, 8), threads=(many,), rounds=1).notes
    assert any(f"{many} threads on {count(physical_cores(), 'physical core')}:" in note for note in notes)


@pytest.mark.usefixtures("loaded_at_once")
@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not say what others use")
def test_others_at_work_are_named(convolutions: Any) -> None:
    spin = "import time\nprint('up', flush=True)\nend = time.monotonic() + 30\nwhile time.monotonic() < end: pass"
    with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "up\n"
            result = bench([candidate(convolutions)], size=(64, 64), rounds=200)
        finally:
            other.kill()
    assert result.others is not None and result.others > 0.1
    assert any("other processes used" in note and "measure alone" in note for note in result.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (0,)}, "batch=0: give a whole number of images"),
        ({"batches": ()}, "batches=()"),
        ({"threads": (0,)}, "threads=0"),
        ({"streams": (0,)}, "streams=0"),
        ({"size": (0, 4)}, r"shape \(1, 0, 4\)"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_wrong_arguments(convolutions: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        bench([candidate(convolutions)], **options)
    with pytest.raises(DataError, match="at least one artefact or run"):
        bench([])
    with pytest.raises(DataError, match="openvino"):
        candidate(convolutions, engine="abacus")
    assert "\n" not in str(caught.value)
