"""A version on trial in another process: what it finds, and that nothing it does reaches this one."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from muntin.artifact import open_artifact
from muntin.errors import ArtifactError, DataError, MuntinError, RecipeError, VerificationError
from muntin.runtime.cache import cache_folder
from muntin.runtime.options import SessionOptions
from muntin.serving.probation import ArtifactLoader, Limits, Probation, examine, probe
from muntin.serving.scheduling import Demand
from muntin.serving.version import Call, NotReadyError

OPENING = SessionOptions(threads=1)
EXAMPLE = Call((1, 8, 8))
LABELS = Call((2, 4, 4), labels=True)

# ---- what a trial may come upon, in the other process ----


def ends_by_signal(path: Path, opening: SessionOptions, lately: Any) -> Probation:
    os.kill(os.getpid(), int(path.name))
    raise AssertionError


def reads_nowhere(path: Path, opening: SessionOptions, lately: Any) -> Probation:
    ctypes.string_at(0)
    raise AssertionError


def hangs(path: Path, opening: SessionOptions, lately: Any) -> Probation:
    while True:
        pass


def hoards(path: Path, opening: SessionOptions, lately: Any) -> Probation:
    kept = []
    while True:
        kept.append(np.ones(1 << 20))


def finds_no_memory(path: Path, opening: SessionOptions, lately: Any) -> Probation:
    raise MemoryError


def makes_a_mistake(path: Path, opening: SessionOptions, lately: Any) -> Probation:
    raise RuntimeError("first\nlast")


def leaves(path: Path, opening: SessionOptions, lately: Any) -> Probation:
    os._exit(0)


def prints_and_looks_around(path: Path, opening: SessionOptions, lately: Any) -> Probation:
    for descriptor in (1, 2):
        os.write(descriptor, b"a library's own words\n" * 50_000)  # more than a pipe holds
    adjusted = Path("/proc/self/oom_score_adj").read_text().strip()
    alarm = round(signal.getitimer(signal.ITIMER_REAL)[0])
    own_group = os.getpgid(0) == os.getpid() != os.getsid(0)
    if os.sched_getscheduler(0) == os.SCHED_IDLE:
        time.sleep(100)  # it gets nothing done
    raise DataError(f"{os.nice(0)} {adjusted} {alarm} {resource.getrlimit(resource.RLIMIT_CORE)[0]} {own_group}")


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried above is found by name in the other process."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    for function in (ends_by_signal, reads_nowhere, hangs, hoards, finds_no_memory, makes_a_mistake, leaves, prints_and_looks_around):
        monkeypatch.setattr(function, "__module__", "test_probation")


def refused(path: Path, examine: Any, **limits: Any) -> str:
    with pytest.raises(VerificationError) as caught:
        probe(path, OPENING, [], limits=Limits(**limits), examine=examine)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def compiled_files() -> set[Path]:
    return set((cache_folder() / "compiled").rglob("*.bin"))


def test_what_is_tried_there_is_quick_to_open_here(
    write_version: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path / "cache"))
    path = write_version(tmp_path / "1", 3)
    found = probe(path, OPENING, [EXAMPLE, LABELS], limits=Limits())
    assert (found.digest, found.signature) == (open_artifact(path).digest, open_artifact(path).manifest.signature)
    assert set(found.latency_ms) == {EXAMPLE, LABELS}
    assert min(found.latency_ms.values()) > 0
    assert found.open_s > 0
    before = compiled_files()
    opened = ArtifactLoader(opening=OPENING).open(path, {EXAMPLE: 1, LABELS: 1}, found)
    assert compiled_files() == before  # nothing was left to compile
    assert opened.calls == (EXAMPLE, LABELS)
    opened.session.close()


def test_what_became_of_the_directory_meanwhile_is_not_opened(write_version: Callable[..., Path], tmp_path: Path) -> None:
    loader = ArtifactLoader(opening=OPENING)
    found = examine(write_version(tmp_path / "1", 1), OPENING, ())
    write_version(tmp_path / "1", 2)
    with pytest.raises(VerificationError, match="1: it was replaced while it was being opened: load it again"):
        loader.open(tmp_path / "1", {}, found)


def test_only_what_comes_often_is_compiled_where_it_need_not_be(
    write_version: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lately = write_version(tmp_path / "1"), {Call((1, 8, 8)): 1, Call((2, 8, 8)): 9}
    asked: list[Any] = []
    monkeypatch.setattr("muntin.serving.probation.probe", lambda path, opening, calls, **rest: asked.append(calls))
    for dynamic in (False, True):
        ArtifactLoader(opening=SessionOptions(dynamic=dynamic)).probe(path, lately, lambda: False)
    assert asked == [(Call((1, 8, 8)), Call((2, 8, 8))), (Call((2, 8, 8)),)]


def test_what_was_asked_most_is_compiled_within_the_budget(
    write_version: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Call((1, 8, 8), labels=True)
    lately = {Call((1, 10, 10)): 9, Call((1, 30, 30)): 40, Call((1, 20, 20)): 30, start: 5}
    asked: list[Any] = []
    monkeypatch.setattr("muntin.serving.probation.probe", lambda path, opening, calls, **rest: asked.append(calls))
    loader = ArtifactLoader(opening=SessionOptions(dynamic=True), max_batch=1, budget=lambda channels: 3000 / channels)
    loader.probe(write_version(tmp_path / "1"), lately, lambda: False)
    assert asked == [(start, Call((1, 10, 10)), Call((1, 30, 30)))]


def test_of_a_version_that_is_to_be_tried_the_manifest_alone_is_read_here(
    write_version: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_version(tmp_path / "1")
    (path / "weights.safetensors").write_bytes(b"?")
    asked: list[Any] = []
    monkeypatch.setattr("muntin.serving.probation.probe", lambda path, opening, calls, **rest: asked.append(calls))
    ArtifactLoader(opening=SessionOptions(dynamic=True), max_batch=2).probe(path, {}, lambda: False)
    assert asked == [tuple(Call((rows, 8, 8), labels=True) for rows in (1, 2))]


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"shift": 30}, VerificationError, "golden pair 0"),
        ({"activation_bits": 8}, VerificationError, "layer head, recorded with 8-bit activations, ran as"),
        ({"altered": "model.onnx"}, ArtifactError, r"model\.onnx: its content is not what"),
        ({"missing": "weights.safetensors"}, ArtifactError, r"weights\.safetensors: missing"),
    ],
)
def test_a_broken_artefact_is_named(
    write_version: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], kind: type[MuntinError], message: str
) -> None:
    altered, missing = changes.pop("altered", None), changes.pop("missing", None)
    path = write_version(tmp_path / "1", **changes)
    if altered:
        (path / altered).write_bytes(b"?" + (path / altered).read_bytes()[1:])
    if missing:
        (path / missing).unlink()
    with pytest.raises(kind, match=message):
        examine(path, OPENING, ())


def test_its_errors_come_over_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere: no such artefact directory"):
        probe(tmp_path / "nowhere", OPENING, [], limits=Limits())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are watched on Linux")
@pytest.mark.parametrize(
    ("examine", "name", "limits", "message"),
    [
        (ends_by_signal, "9", {}, "its engine ended the process that tried it, by signal 9 (Killed)"),
        (ends_by_signal, "6", {}, "by signal 6 (Aborted)"),
        (reads_nowhere, "x", {}, "by signal 11 (Segmentation fault)"),
        (hangs, "x", {"seconds": 2}, "it was not open, verified and warm after 2 s"),
        (hoards, "x", {"memory_gib": 0.4}, "GiB of memory (allowed: 0.40)"),
        (finds_no_memory, "x", {}, "there is no memory to open it"),
        (makes_a_mistake, "x", {}, "the process that tried it failed: last"),
        (leaves, "x", {}, "the process that tried it ended without an answer"),
    ],
)
def test_whatever_an_engine_does_is_one_line_here(
    importable: None, tmp_path: Path, examine: Any, name: str, limits: dict[str, Any], message: str
) -> None:
    line = refused(tmp_path / name, examine, **limits)
    assert line.startswith(f"{tmp_path / name}: ")
    assert message in line


def test_a_trial_that_the_system_ended_for_want_of_memory_says_so(
    importable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = count(3)
    monkeypatch.setattr("muntin.serving.probation.kills_for_memory", lambda: next(ended))
    assert "the system ended the process that tried it, for want of memory" in refused(tmp_path / "9", ends_by_signal)
    assert "by signal 6" in refused(tmp_path / "6", ends_by_signal)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read in Linux's form")
@pytest.mark.parametrize("idle", [0.0, 1.5])
def test_it_stands_back_and_goes_by_itself(importable: None, tmp_path: Path, idle: float) -> None:
    with pytest.raises(DataError) as caught:
        probe(tmp_path, OPENING, [], limits=Limits(niceness=7, seconds=100, idle_seconds=idle), examine=prints_and_looks_around)
    nice, adjusted, alarm, core, own_group = str(caught.value).split()
    assert (nice, adjusted, core, own_group) == (str(min(19, os.nice(0) + 7)), "1000", "0", "True")
    assert 95 <= int(alarm) <= 105


def test_what_is_paced_has_as_much_more_time(importable: None, tmp_path: Path) -> None:
    started = time.monotonic()
    with pytest.raises(VerificationError, match=r"warm after 1 s: it hangs"):
        probe(tmp_path, OPENING, [], limits=Limits(seconds=1, idle_seconds=0.9), demand=lambda: Demand.SERVED, examine=hangs)
    assert not sys.platform.startswith("linux") or time.monotonic() - started > 2  # half of the second was in idle time


def test_a_trial_ends_with_the_server(importable: None, tmp_path: Path) -> None:
    stopped = threading.Event()
    timer = threading.Timer(0.2, stopped.set)
    timer.start()
    started = time.monotonic()
    with pytest.raises(NotReadyError, match="ended with the server"):
        probe(tmp_path, OPENING, [], limits=Limits(), stopped=stopped.is_set, examine=hangs)
    timer.join()
    assert time.monotonic() - started < 10


def endless(channels: int) -> onnx.ModelProto:
    """A graph that adds to its image for longer than anybody waits."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"], name="go_on"),
            helper.make_node("Add", ["x", "one"], ["y"], name="add"),
        ],
        "body",
        [
            helper.make_tensor_value_info("n", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor_value_info("go_on", TensorProto.BOOL, []), helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.float32(1), "one")],
    )
    return graph_around([helper.make_node("Loop", ["trips", "true", "nchw"], ["scores"], name="loop", body=body)], channels)


def enormous(channels: int) -> onnx.ModelProto:
    """A graph that repeats its image 20 million times, 25 GB for one of 8 x 8, and gives the first copy."""
    nodes = [
        helper.make_node("Tile", ["nchw", "times"], ["wide"], name="tile"),
        helper.make_node("Relu", ["wide"], ["rectified"], name="relu"),
        helper.make_node("ReduceMax", ["rectified", "first_axis"], ["scores"], name="max", keepdims=1),
    ]
    return graph_around(nodes, channels)


def graph_around(nodes: list[onnx.NodeProto], channels: int) -> onnx.ModelProto:
    constants = {
        "trips": np.int64(1 << 40),
        "true": np.bool_(True),
        "times": np.array([20_000_000, 1, 1, 1], np.int64),
        "first_axis": np.array([0], np.int64),
    }
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["images"], ["float"], name="cast", to=TensorProto.FLOAT),
            helper.make_node("Transpose", ["float"], ["nchw"], name="to_nchw", perm=[0, 3, 1, 2]),
            *nodes,
        ],
        "hostile",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["B", "H", "W", channels])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["B", channels, "H", "W"])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits are watched on Linux")
@pytest.mark.parametrize(
    ("model", "limits", "message"),
    [(endless, {"seconds": 6}, "after 6 s: it hangs"), (enormous, {"memory_gib": 0.7}, "GiB of memory (allowed: 0.70)")],
)
def test_a_real_model_that_asks_too_much_is_ended(
    write_version: Callable[..., Path],
    signature_of: Callable[..., Any],
    tmp_path: Path,
    model: Callable[[int], onnx.ModelProto],
    limits: dict[str, Any],
    message: str,
) -> None:
    path = write_version(tmp_path / "1", signature=signature_of(classes=("a", "b", "c")), model=model(3))
    with pytest.raises(VerificationError) as caught:
        probe(path, OPENING, [], limits=Limits(**limits))
    assert message in str(caught.value)


def looks_at_its_policy(path: Path, opening: SessionOptions, lately: Any) -> Probation:
    raise DataError(f"policy {os.sched_getscheduler(0)}")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a policy of Linux")
def test_at_first_it_takes_only_what_is_idle(importable: None, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"policy {os.SCHED_IDLE}"):
        probe(tmp_path, OPENING, [], limits=Limits(), examine=looks_at_its_policy)


@pytest.mark.parametrize("values", [{"seconds": 0}, {"idle_seconds": -1}, {"memory_gib": 0}, {"niceness": 20}, {"niceness": -1}])
def test_limits_are_checked_when_they_are_made(values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(values))):
        Limits(**values)
