"""The trace holds every kernel where it ran, in microseconds, and says where its times come from."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muntin.runtime.chrome_trace import KERNELS, WHOLE, chrome_trace
from muntin.runtime.kernels import Ceilings
from muntin.runtime.options import SessionOptions
from muntin.runtime.profile import Profile, profile

CEILINGS = Ceilings(gmacs={"f32": 100.0, "i8": 400.0}, copy_gb_s=10.0, threads=1, others=0.0)


def measured(convolutions: Any, engine: str) -> Profile:
    return profile(
        convolutions.path, SessionOptions(engine=engine, precision="f32", threads=1), shape=(1, 24, 40), rounds=2, ceilings=CEILINGS
    )


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_kernels_as_events(convolutions: Any, engine: str) -> None:
    result = measured(convolutions, engine)
    document = json.loads(json.dumps(chrome_trace(result), allow_nan=False))
    events = [event for event in document["traceEvents"] if event["ph"] == "X" and event["tid"] == KERNELS]
    assert [event["args"]["kernel"] for event in events] == [kernel.name for kernel in result.kernels]
    assert {"stem", "body", "depthwise", "head"} <= {event["name"] for event in events}
    assert sum(event["dur"] for event in events) == pytest.approx(1e3 * result.kernels_ms)
    assert {"precision", "macs", "bytes", "ceiling_share", "implementation"} <= events[0]["args"].keys()
    (whole,) = (event for event in document["traceEvents"] if event["ph"] == "X" and event["tid"] == WHOLE)
    assert whole["dur"] == pytest.approx(1e3 * result.profiled_ms)


def test_path_that_is_no_utf_8(convolutions: Any, tmp_path: Path) -> None:
    result = measured(convolutions, "onnxruntime")
    document = chrome_trace(replace(result, artifact=replace(result.artifact, path=tmp_path / os.fsdecode(b"caf\xe9"))))
    assert document["otherData"]["artifact"] == f"{tmp_path}/caf\\udce9"


def test_kernels_without_time_stamps(convolutions: Any) -> None:
    document = chrome_trace(measured(convolutions, "openvino"))
    events = [event for event in document["traceEvents"] if event["ph"] == "X" and event["tid"] == KERNELS]
    end = 0.0
    for event in events:
        assert event["ts"] == pytest.approx(end)
        end += event["dur"]
    assert "the engine gives no time stamps: kernels are laid end to end" in document["otherData"]["times"]


def test_time_stamps_are_the_engines(convolutions: Any) -> None:
    result = measured(convolutions, "onnxruntime")
    document = chrome_trace(result)
    events = [event for event in document["traceEvents"] if event["ph"] == "X" and event["tid"] == KERNELS]
    assert [event["ts"] for event in events] == pytest.approx([1e3 * (kernel.start_ms or 0.0) for kernel in result.kernels])
    assert "as the engine stamps them" in document["otherData"]["times"]
