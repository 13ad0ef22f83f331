"""Latency: every session is treated alike, and what is reported is what was measured. Axes: B images, H W map, C channels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from muntin import TorchSession
from muntin.artifact import ClassInfo, Signature
from muntin.runtime import load
from muntin.runtime.profiling.timing import BATCHES, interleaved_latency, interleaved_throughput, latency_report

SIGNATURE = Signature(task="segment", channels=3, classes=(ClassInfo(name="a", color=(0, 0, 0)), ClassInfo(name="b", color=(9, 9, 9))))


def pictures(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


class Counting:
    """A session that counts its calls, in a list shared with others, and may wait first."""

    streams = 1

    def __init__(self, name: str, calls: list[str], *, wait_s: float = 0) -> None:
        torch.manual_seed(0)
        self.session = TorchSession(nn.Sequential(nn.Conv2d(3, 2, 1)), SIGNATURE)
        self.signature = SIGNATURE
        self.name, self.calls, self.wait_s = name, calls, wait_s
        self.shapes: set[tuple[int, ...]] = set()

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
        self.calls.append(self.name)
        self.shapes.add(images_BHWC.shape)
        assert images_BHWC.flags.c_contiguous
        time.sleep(self.wait_s)
        return self.session(images_BHWC)

    def map(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
        return map(self, batches)


def test_interleaved_calls() -> None:
    calls: list[str] = []
    one, other = Counting("one", calls), Counting("other", calls)
    images = pictures(1, 16, 24, 3).transpose(0, 2, 1, 3)  # not contiguous
    figures = interleaved_latency({"one": one, "other": other}, images, rounds=3)
    assert calls == ["one", "other"] + 3 * ["one", "one", "other", "other"]
    assert one.shapes == other.shapes == {(1, 24, 16, 3)}
    assert figures.keys() == {"one", "other"}
    for row in figures.values():
        assert math.isfinite(row.median_ms) and 0 < row.median_ms <= row.p90_ms <= row.p99_ms and row.calls == 3


def test_figures_of_a_waiting_session() -> None:
    sessions = {"quick": Counting("quick", []), "slow": Counting("slow", [], wait_s=0.02)}
    figures = interleaved_latency(sessions, pictures(1, 8, 8, 3), rounds=3)
    assert figures["slow"].median_ms >= 20
    assert figures["quick"].median_ms < figures["slow"].median_ms
    assert 0 < interleaved_throughput({"slow": sessions["slow"]}, pictures(2, 8, 8, 3), rounds=1)["slow"] <= 100


def test_latency_report() -> None:
    rows = {"fp32": ("PyTorch eager", Counting("fp32", [])), "deployed": ("openvino INT8", Counting("deployed", []))}
    report = latency_report(rows, pictures(1, 16, 24, 3)[0], rounds=2)
    assert (report["height"], report["width"], report["rounds"]) == (16, 24, 2)
    assert [(row["name"], row["engine"]) for row in report["rows"]] == [("fp32", "PyTorch eager"), ("deployed", "openvino INT8")]
    assert all(row["median_ms"] > 0 for row in report["rows"])


def test_throughput_keeps_every_stream_busy(convolutions: Any, images_of: Callable[..., Any]) -> None:
    sessions = {"one": load(convolutions.path, threads=2), "two": load(convolutions.path, threads=2, streams=2)}
    called: dict[str, int] = dict.fromkeys(sessions, 0)
    for name, session in sessions.items():
        infer = session._infer

        def counting(*given: Any, name: str = name, infer: Any = infer) -> Any:
            called[name] += 1
            return infer(*given)

        session._infer = counting  # type: ignore[method-assign]
    rates = interleaved_throughput(sessions, images_of(3, batch=2, height=8, width=8), rounds=2)
    assert called == {"one": 3 * BATCHES, "two": 3 * BATCHES * 2}
    assert all(rate > 0 for rate in rates.values())


@pytest.mark.parametrize("measure", [interleaved_latency, interleaved_throughput])
def test_no_rounds(measure: Any) -> None:
    with pytest.raises(ValueError, match="rounds=0"):
        measure({"one": Counting("one", [])}, pictures(1, 8, 8, 3), rounds=0)
