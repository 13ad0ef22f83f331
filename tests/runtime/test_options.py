"""Session options: what is checked, and what goes through JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from muntin.errors import DataError
from muntin.runtime import ENGINES, load
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.options import SessionOptions


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "tensorrt"}, 'engine="tensorrt": give one of openvino, onnxruntime'),
        ({"precision": "int8"}, 'precision="int8": give one of recorded, f32'),
        ({"threads": 0}, "threads=0"),
        ({"threads": 4097}, "threads=4097: give a whole number from 1 to 4096"),
        ({"threads": 1.0}, "threads=1.0"),
        ({"threads": True}, "threads=True"),
        ({"streams": 0}, "streams=0"),
        ({"streams": "many"}, "streams='many'"),
        ({"shapes": [(1, 8)]}, r"shape \(1, 8\)"),
        ({"shapes": [(1, 8, 0)]}, r"shape \(1, 8, 0\)"),
        ({"shapes": [(True, 8, 8)]}, r"shape \(True, 8, 8\)"),
        ({"shapes": 5}, "shapes=5"),
    ],
)
def test_options_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SessionOptions(**values)


def test_options_through_json() -> None:
    options = SessionOptions(threads=2, shapes=((1, 8, 8),), dynamic=True)
    assert SessionOptions(**json.loads(json.dumps(asdict(options)))) == options


def test_thread_count_by_default() -> None:
    assert SessionOptions().thread_count == physical_cores()
    assert SessionOptions(threads=3).thread_count == 3


def test_load_passes_every_option(per_pixel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[SessionOptions] = []
    engine = ENGINES["onnxruntime"]

    def record(artifact: Any, options: SessionOptions) -> Any:
        opened.append(options)
        return engine(artifact, options)

    monkeypatch.setitem(ENGINES, "onnxruntime", record)
    given: dict[str, Any] = {"precision": "f32", "threads": 3, "streams": 2, "shapes": ((1, 8, 8),), "dynamic": True, "cache": False}
    load(per_pixel.path, engine="onnxruntime", **given)
    assert opened == [SessionOptions(engine="onnxruntime", **given)]
