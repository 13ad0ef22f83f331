"""`muntin triton` as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tensor_models import write_tensors


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "muntin", "triton", *map(str, words)], capture_output=True, text=True, check=False)


def test_export_and_refusals(tmp_path: Path) -> None:
    artifact, models = tmp_path / "named", tmp_path / "new" / "models"
    write_tensors(artifact)
    done = run(artifact, models, "--objective-ms", 500, "--max-batch", 2, "--threads", 1, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["model"], document["version"], document["backend"]) == (str(models / "named"), 1, "python")
    assert set(document["batching"]["latency_ms"]) == {"1", "2"}
    assert f"max_queue_delay_microseconds: {document['batching']['delay_us']} " in (models / "named" / "config.pbtxt").read_text()
    for words, reason in (
        ((), f"muntin: {models / 'named' / '1'} exists and is not replaced: give another --version or --name, or remove it"),
        (("--backend", "pytorch"), "muntin: --backend: Input should be 'python', 'onnxruntime', 'openvino' or 'tensorrt'"),
        (("--name", "a/b"), "muntin: --name: String should match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'"),
    ):
        refused = run(artifact, models, *words)
        assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", f"{reason}\n")
