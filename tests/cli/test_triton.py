"""`muntin triton`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensor_models import write_tensors


def test_export_and_refusals(call: Callable[..., Any], tmp_path: Path) -> None:
    artifact, models = tmp_path / "named", tmp_path / "new" / "models"
    write_tensors(artifact)
    words = ("triton", artifact, models)
    document = call(*words, "--objective-ms", 500, "--max-batch", 2, "--threads", 1, "--json").document()
    assert (document["model"], document["version"], document["backend"]) == (str(models / "named"), 1, "python")
    assert set(document["batching"]["latency_ms"]) == {"1", "2"}
    assert f"max_queue_delay_microseconds: {document['batching']['delay_us']} " in (models / "named" / "config.pbtxt").read_text()
    for options, reason in (
        ((), f"{models / 'named' / '1'} exists and is not replaced: give another --version or --name, or remove it"),
        (("--backend", "pytorch"), "--backend: Input should be 'python', 'onnxruntime', 'openvino' or 'tensorrt'"),
        (("--name", "a/b"), "--name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'"),
    ):
        assert call(*words, *options).mistake() == reason
