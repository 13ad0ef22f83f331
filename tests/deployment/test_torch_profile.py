"""Layer ranges in PyTorch's profiler, and profiles of a model in PyTorch."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from muntin.artifact import ClassInfo, Signature
from muntin.deployment import torch_profile
from muntin.deployment.torch_profile import PREFIX, WHOLE, named_ranges, profile_torch
from muntin.errors import DataError
from muntin.models import TorchSession

SIGNATURE = Signature(task="segment", channels=3, classes=(ClassInfo(name="a", color=(0, 0, 0)), ClassInfo(name="b", color=(9, 9, 9))))


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.Sequential(nn.ReLU(), nn.Conv2d(32, 32, 7, padding=3)), nn.Conv2d(32, 2, 1))


def names_in(profiler: Any) -> set[str]:
    return {event.key for event in profiler.key_averages() if event.key.startswith(PREFIX)}


def test_named_ranges_inside_the_block(model: nn.Sequential) -> None:
    image = torch.zeros(1, 3, 8, 8)
    with profile(activities=[ProfilerActivity.CPU]) as inside, named_ranges(model):
        model(image)
    assert names_in(inside) == {f"{PREFIX}{name}" for name in ("0", "1", "1.0", "1.1", "2")}
    with profile(activities=[ProfilerActivity.CPU]) as outside:
        model(image)
    assert names_in(outside) == set()


def test_named_ranges_after_an_error(model: nn.Sequential) -> None:
    with named_ranges(model):
        with pytest.raises(RuntimeError):
            model(torch.zeros(1, 4, 8, 8))
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            model(torch.zeros(1, 3, 8, 8))
    assert f"{PREFIX}2" in names_in(profiler)


def test_named_ranges_by_thread(model: nn.Sequential, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[int, str]] = []
    closed: list[tuple[int, str]] = []

    class Range:
        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> None:
            opened.append((threading.get_ident(), self.name))

        def __exit__(self, *_: object) -> None:
            closed.append((threading.get_ident(), self.name))

    monkeypatch.setattr(torch_profile, "record_function", Range)

    def call(channels: int) -> None:
        for _ in range(20):
            with suppress(RuntimeError):
                model(torch.zeros(1, channels, 8, 8))

    with named_ranges(model):
        threads = [threading.Thread(target=call, args=(channels,)) for channels in (3, 4, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(opened) == 2 * 20 * 5 + 20  # of four channels the first layer raises
    assert sorted(opened) == sorted(closed)


def test_profile_finds_the_slow_layer(model: nn.Sequential, tmp_path: Path) -> None:
    images = np.zeros((1, 96, 96, 3), np.uint8)
    result = profile_torch(TorchSession(model, SIGNATURE), images, tmp_path / "new" / "trace.json", rounds=3)
    assert {layer.name: layer.kind for layer in result.layers} == {"0": "Conv2d", "1.0": "ReLU", "1.1": "Conv2d", "2": "Conv2d"}
    assert [layer.ms for layer in result.layers] == sorted((layer.ms for layer in result.layers), reverse=True)
    assert sum(layer.ms for layer in result.layers) <= result.whole_ms * 1.05
    assert result.shape == (1, 96, 96)
    events = json.loads(result.trace.read_text())["traceEvents"]
    assert {f"{PREFIX}1.1", WHOLE} <= {event.get("name") for event in events}


def test_named_ranges_of_a_shared_model(model: nn.Sequential) -> None:
    images = torch.zeros(1, 3, 16, 16)
    with named_ranges(model), ThreadPoolExecutor(4) as pool:
        assert len(list(pool.map(lambda _: model(images), range(80)))) == 80


def test_profile_of_unusual_models(tmp_path: Path) -> None:
    images = np.zeros((1, 8, 8, 3), np.uint8)
    alone = profile_torch(TorchSession(nn.Conv2d(3, 2, 1), SIGNATURE), images, tmp_path / "a.json", rounds=1)
    assert [(layer.name, layer.kind) for layer in alone.layers] == [("Conv2d", "Conv2d")]
    named = nn.Sequential(OrderedDict(whole=nn.Conv2d(3, 8, 3, padding=1), last=nn.Conv2d(8, 2, 1)))
    result = profile_torch(TorchSession(named, SIGNATURE), images, tmp_path / "b.json", rounds=1)
    assert {layer.name for layer in result.layers} == {"whole", "last"}
    assert result.whole_ms > sum(layer.ms for layer in result.layers) / 2


def test_profile_mistakes(model: nn.Sequential, tmp_path: Path) -> None:
    images = np.zeros((1, 8, 8, 3), np.uint8)
    with pytest.raises(DataError, match="rounds=0"):
        profile_torch(TorchSession(model, SIGNATURE), images, tmp_path / "a.json", rounds=0)
    compiled = TorchSession(model, SIGNATURE)
    compiled.compiled = True  # as where there is a compiler
    with pytest.raises(DataError, match="without compile=True"):
        profile_torch(compiled, images, tmp_path / "a.json")
