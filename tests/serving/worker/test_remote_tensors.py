"""An engine of named tensors in a process of its own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from muntin.artifact import TensorInfo, TensorSignature
from muntin.errors import DataError
from muntin.runtime.engines.registry import load
from muntin.runtime.options import SessionOptions
from muntin.serving.worker import engine_process
from muntin.serving.worker.calls import Call
from muntin.serving.worker.channel import KEPT_BYTES
from muntin.serving.worker.remote_session import RemoteSession, can_open_remote, open_remote
from tensor_models import model, text_inputs, write_tensors

pytestmark = pytest.mark.skipif(not can_open_remote(), reason="files cannot be passed to another process here")


def test_answers_equal_a_session_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before and after the process was ended."""
    monkeypatch.setattr(engine_process, "_RESTART_S", 60.0)
    path = write_tensors(tmp_path / "texts").path
    example, warm = Call((("batch", 1), ("tokens", 8)), "batch"), Call((("batch", 2), ("tokens", 5)), "batch")
    local = load(path, threads=1, dynamic=True)
    session = open_remote(path, SessionOptions(threads=1, dynamic=True), [example], seconds=60.0).session
    assert isinstance(session, RemoteSession)
    session.warm_up([{"batch": 2, "tokens": 5}])
    assert session.calls == [example, warm]
    for inputs in (text_inputs(2, 5), text_inputs(3, 4)):
        answer, due = session(inputs), local(inputs)
        assert list(answer) == list(due)
        for name, array in answer.items():
            np.testing.assert_allclose(array, due[name], rtol=0.02, atol=0.05)
    with pytest.raises(DataError, match="computes integers in 32 bits"):
        session(text_inputs(1, 8) | {"ids": np.full((1, 8), 1 << 40)})
    running = session._running
    assert running is not None
    running.process.kill()
    running.process.wait(20)
    assert list(session(text_inputs(2, 5), outputs=["label"])) == ["label"]
    assert (session.deaths, session.calls) == (1, [example, warm])
    session.close()


def test_every_type_and_sizes_by_values(every_type: Path) -> None:
    """The last output, of as many elements as there are true values, is larger than the memory that the sizes were reckoned with."""
    session = open_remote(every_type, SessionOptions(threads=1, dynamic=True), [], seconds=60.0).session
    assert isinstance(session, RemoteSession)
    for count in (5, 22_310):
        inputs = {info.name: (np.arange(count) % 100 + 1).astype(info.dtype) for info in session.signature.inputs}
        answer = session(inputs)
        for name, array in inputs.items():
            np.testing.assert_array_equal(answer[f"{name}_out"], array[None])
            assert answer[f"{name}_out"].dtype == name
        np.testing.assert_array_equal(answer["places"], np.arange(count)[None])
    session.close()


def test_more_memory_than_is_kept(tmp_path: Path) -> None:
    x, y = (TensorInfo(name=name, dtype="float32", shape=("n",)) for name in "xy")
    proto, inputs = model("(float[n] x) => (float[n] y) { y = Relu(x) }"), [{"x": np.float32([1, -2, 3])}]
    path = write_tensors(tmp_path / "x", proto, signature=TensorSignature(inputs=(x,), outputs=(y,)), inputs=inputs, example={"n": 3}).path
    session = open_remote(path, SessionOptions(threads=1, dynamic=True), [], seconds=60.0).session
    assert isinstance(session, RemoteSession)
    for count in (5, KEPT_BYTES // 8 + 1000, 7):
        values = np.arange(count, dtype=np.float32)
        np.testing.assert_array_equal(session({"x": values})["y"], values)
    session.close()
