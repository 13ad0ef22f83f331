"""Latency: every session is treated alike, and what is reported is what was measured. Axes: B images, H W map, C channels."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from muntin import TorchSession
from muntin.artifact import ClassInfo, Signature
from muntin.deployment.latency import interleaved_latency, latency_report
from muntin.errors import DataError

SIGNATURE = Signature(task="segment", channels=3, classes=(ClassInfo(name="a", color=(0, 0, 0)), ClassInfo(name="b", color=(9, 9, 9))))


class Counting:
    """A session that counts its calls, in a list shared with others, and may wait first."""

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


def test_every_session_is_called_alike_in_turns(pictures: Callable[..., NDArray[np.uint8]]) -> None:
    calls: list[str] = []
    one, other = Counting("one", calls), Counting("other", calls)
    image = pictures(1, 16, 24, 3)[0].transpose(1, 0, 2)  # not contiguous
    figures = interleaved_latency({"one": one, "other": other}, image, rounds=3)
    assert calls == ["one", "other"] + 3 * ["one", "one", "other", "other"]
    assert one.shapes == other.shapes == {(1, 24, 16, 3)}
    assert figures.keys() == {"one", "other"}
    for row in figures.values():
        assert math.isfinite(row["median_ms"]) and 0 < row["median_ms"] <= row["p90_ms"]


def test_a_session_that_waits_takes_as_much_longer(pictures: Callable[..., NDArray[np.uint8]]) -> None:
    sessions = {"quick": Counting("quick", []), "slow": Counting("slow", [], wait_s=0.02)}
    figures = interleaved_latency(sessions, pictures(1, 8, 8, 3)[0], rounds=3)
    assert figures["slow"]["median_ms"] >= 20
    assert figures["quick"]["median_ms"] < figures["slow"]["median_ms"]


def test_the_report_names_engines_and_keeps_the_baseline_first(pictures: Callable[..., NDArray[np.uint8]]) -> None:
    rows = {"fp32": ("PyTorch eager", Counting("fp32", [])), "deployed": ("openvino INT8", Counting("deployed", []))}
    report = latency_report(rows, pictures(1, 16, 24, 3)[0], rounds=2)
    assert (report["height"], report["width"], report["rounds"]) == (16, 24, 2)
    assert [(row["name"], row["engine"]) for row in report["rows"]] == [("fp32", "PyTorch eager"), ("deployed", "openvino INT8")]
    assert all(row["median_ms"] > 0 for row in report["rows"])


def test_an_error_of_a_session_is_not_swallowed(pictures: Callable[..., NDArray[np.uint8]]) -> None:
    with pytest.raises(DataError, match="shape"):
        interleaved_latency({"one": Counting("one", [])}, pictures(1, 8, 8, 4)[0], rounds=1)
