"""The trace holds every kernel where it ran, in microseconds, and says where its times come from."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.chrome_trace import KERNELS, WHOLE, chrome_trace
from muntin.runtime.profiling.kernels import Ceilings
from muntin.runtime.profiling.profile import Profile, profile

CEILINGS = Ceilings(gmacs={"f32": 100.0, "i8": 400.0}, copy_gb_s=10.0, threads=1, others=0.0)


@pytest.fixture(scope="module", params=["openvino", "onnxruntime"])
def result(convolutions: Any, request: pytest.FixtureRequest) -> Profile:
    options = SessionOptions(engine=request.param, precision="f32", threads=1)
    return profile(convolutions.path, options, shape=(1, 24, 40), rounds=2, ceilings=CEILINGS)


def test_kernels_as_events(result: Profile) -> None:
    document = json.loads(json.dumps(chrome_trace(result), allow_nan=False))
    events = [event for event in document["traceEvents"] if event["ph"] == "X" and event["tid"] == KERNELS]
    assert [event["args"]["kernel"] for event in events] == [kernel.name for kernel in result.kernels]
    assert {"stem", "body", "depthwise", "head"} <= {event["name"] for event in events}
    assert sum(event["dur"] for event in events) == pytest.approx(1e3 * result.kernels_ms)
    assert {"precision", "macs", "bytes", "ceiling_share", "implementation"} <= events[0]["args"].keys()
    (whole,) = (event for event in document["traceEvents"] if event["ph"] == "X" and event["tid"] == WHOLE)
    assert whole["dur"] == pytest.approx(1e3 * result.profiled_ms)
    starts = [event["ts"] for event in events]
    if result.engine == "onnxruntime":
        assert starts == pytest.approx([1e3 * (kernel.start_ms or 0.0) for kernel in result.kernels])
        assert "as the engine stamps them" in document["otherData"]["times"]
    else:
        assert starts == pytest.approx([0.0, *accumulate(event["dur"] for event in events)][:-1])
        assert "the engine gives no time stamps: kernels are laid end to end" in document["otherData"]["times"]


def test_path_that_is_no_utf_8(result: Profile, tmp_path: Path) -> None:
    document = chrome_trace(replace(result, artifact=replace(result.artifact, path=tmp_path / os.fsdecode(b"caf\xe9"))))
    assert document["otherData"]["artifact"] == f"{tmp_path}/caf\\udce9"
