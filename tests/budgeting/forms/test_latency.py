"""Times of forms: one measurement for each shape, kept in the cache of the user."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

from model_helpers import pixels
from muntin.budgeting.forms.latency import latency_settings, measured_latencies, shape_text
from muntin.budgeting.forms.layer_forms import FormLayers, layer_forms
from muntin.budgeting.forms.plans import Form


@pytest.fixture(scope="module")
def layers() -> FormLayers:
    """Two layers of one shape, and one that is wide and called for each of 1024 positions."""
    features = [nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU()]
    return layer_forms(nn.Sequential(*features, nn.Conv2d(16, 512, 1), nn.ReLU(), nn.Conv2d(512, 8, 1)).eval(), [pixels(2, 3, 32, 32)])


def test_shapes_in_words() -> None:
    found = layer_forms(nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 16, 5, groups=16)), [pixels(1, 3, 32, 32)]).layers
    assert [shape_text(one) for one in found.values()] == [
        "conv 3x3, stride 2x2, 3 to 16 channels, 3x32x32",
        "conv 5x5, padding 0x0, 16 to 16 channels, 16 groups, 16x16x16",
    ]
    tokens = layer_forms(nn.Sequential(nn.Linear(8, 4), nn.Flatten(), nn.Linear(20, 3)), [pixels(2, 5, 8)]).layers
    assert [shape_text(one) for one in tokens.values()] == ["linear, 8 to 4 features, 5 rows", "linear, 20 to 3 features, 1 rows"]


@pytest.mark.slow
def test_times_are_measured_once_for_each_shape(layers: FormLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path))
    steps: list[tuple[int, int]] = []
    chosen = {name: layers.layers[name] for name in ("2", "4", "6")}
    ms = measured_latencies(chosen, threads=1, rounds=10, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(0, 2), (1, 2), (2, 2)]
    assert ms["2"] == ms["4"] and set(ms["6"]) == set(chosen["6"].forms)
    assert ms["6"][Form(None, 3)] == ms["6"][Form(None, 8)] > 0 < ms["6"][Form(None, 16)]
    (file,) = (tmp_path / "latency").iterdir()
    content = json.loads(file.read_text())
    assert {key: content[key] for key in ("engine", "version", "cpu", "threads")} == latency_settings(1)
    assert content["ms"][shape_text(chosen["2"])]["dense, 8 bits"] == ms["2"][Form(None, 8)]
    again: list[tuple[int, int]] = []
    assert measured_latencies(chosen, threads=1, progress=lambda done, total: again.append((done, total))) == ms
    assert again == [(0, 0)]


@pytest.mark.slow
def test_damaged_cache_is_measured_again(layers: FormLayers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUNTIN_CACHE", str(tmp_path))
    chosen = {"2": layers.layers["2"]}
    measured_latencies(chosen, threads=1, rounds=3)
    (file,) = (tmp_path / "latency").iterdir()
    file.write_text('{"ms": ')
    measured_latencies(chosen, threads=1, rounds=3)
    assert shape_text(chosen["2"]) in json.loads(file.read_text())["ms"]
