"""The report of a run: a failed verification, and a classifier's figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import softmax

from muntin.compression import load_model
from muntin.deployment import comparison
from muntin.deployment.comparison import _Comparison
from muntin.errors import VerificationError
from muntin.images import read_image, write_image
from muntin.models import TorchSession
from muntin.runtime import predict
from muntin.training import evaluate, fit, read_checkpoint


def test_no_report_after_a_failed_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    result = SimpleNamespace(passed=False, problems=["layer a computes something else"])
    monkeypatch.setattr(comparison, "verify", lambda path, *, layers: result)
    made: Any = SimpleNamespace(_timed=lambda name, work: work())
    artifact: Any = SimpleNamespace(path=Path("artifact"))
    with pytest.raises(VerificationError, match="artifact: layer a computes something else"):
        _Comparison._verify(made, artifact)


CLASSIFIER = """
from scipy.special import softmax
from torch import nn

class Classifier(nn.Sequential):
    def forward(self, x):
        return super().forward(x / 128 - 1).mean((2, 3))

def make(*, task, classes, channels):
    return Classifier(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1))
"""


def test_report_of_a_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step and the curve of it: a whole report exports, which takes seconds."""
    (tmp_path / "own_classifier.py").write_text(CLASSIFIER)
    monkeypatch.syspath_prepend(tmp_path)
    for label, name in enumerate(("cat", "dog", "emu")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for number in range(8):
            picture = np.random.default_rng(number).integers(0, 100, (40, 40, 3)) + 50 * label
            write_image(tmp_path / "pets" / name / f"{number}.png", picture.astype(np.uint8))
    content = {
        "task": "classify",
        "data": {"source": "folders", "images": "pets", "validation": 0.3, "test": 0.3, "seed": 1, "crop": 32},
        "model": {"name": "own_classifier:make"},
        "training": {"steps": 1, "batch_size": 4, "threads": 1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(content))  # JSON is YAML
    checkpoint = read_checkpoint(fit(tmp_path / "recipe.yaml", directory=tmp_path / "run").checkpoint)
    work, model = _Comparison(checkpoint, tmp_path / "report", lambda name: None), load_model(checkpoint)
    work.probe, session = torch.zeros(1, 3, 32, 32), TorchSession(model, checkpoint.signature)
    on_test, on_validation = (evaluate(session, work.source.split(split), tile=64) for split in ("test", "validation"))
    assert on_test.recall != on_test.iou and on_validation.recall != on_validation.iou, "it errs nowhere: this test plants nothing"
    labels: Any = []
    row = work._row("fp32", "PyTorch FP32", evaluate(session, work.test, tile=64, answers=labels), {})
    undescribed: Any = SimpleNamespace(manifest=SimpleNamespace(layers=()))
    assert len(labels) == on_test.samples
    assert (row["miou"], row["iou"]) == (on_test.accuracy, on_test.recall)
    curve = [{"step": 1, "miou": on_validation.accuracy, "iou": on_validation.recall}]
    assert work._about(undescribed)["validation"] == curve
    pictures: Any = work._pictures(session, labels)
    wrong = [s for s, label in zip(work.test, labels, strict=True) if label[0] != s.target]
    names = ("cat", "dog", "emu")
    wrong.sort(key=lambda s: float(np.log(softmax(predict(session, s.image))[int(np.asarray(s.target))])))  # the largest loss first
    assert [entry["name"].split(":")[0] for entry in pictures["examples"]] == [s.name for s in wrong]
    assert f": true {names[int(np.asarray(wrong[0].target))]}, predicted " in pictures["examples"][0]["name"]
    assert read_image(tmp_path / "report" / pictures["examples"][0]["image"]).shape == (40, 40, 3)
    right: Any = work._pictures(session, [np.array([s.target]) for s in work.test])  # none is wrong: the least sure one comes first
    margins = {s.name: float(np.diff(np.sort(predict(session, s.image))[-2:])[0]) for s in work.test}
    assert [entry["name"].split(":")[0] for entry in right["examples"]] == sorted(margins, key=lambda name: margins[name])
    old = [{"step": 1, "score": on_validation.accuracy, "iou": on_validation.recall}]  # as checkpoints were written before
    work.checkpoint = replace(checkpoint, state=checkpoint.state.model_copy(update={"validation": old}))
    assert work._about(undescribed)["validation"] == curve
