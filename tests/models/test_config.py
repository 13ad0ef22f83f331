"""ModelConfig: frozen, closed, consistent; the named networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from muntin.deployment import image_macs
from muntin.layers import Grid, ParallelBlock
from muntin.models import PRESETS, HybridNet, ModelConfig, create_model


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig().classes = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": 0}, "greater than or equal to 1"),
        ({"classes": 65536}, "less than or equal to 65535"),
        ({"channels": 17}, "less than or equal to 16"),
        ({"scale": 5, "task": "restore"}, "less than or equal to 4"),
        ({"scale": 2}, "scale=2 is for task 'restore'; 'segment' answers at the input's size"),
        ({"task": "detect"}, "'segment', 'classify' or 'restore'"),
        ({"dims": (128,)}, "dims names 1 attention stages and depths 2: give as many of each"),
        ({"dims": (128, 100)}, "dim 100 must be a multiple of head_dim 64 and at least 128"),
        ({"dims": (128, 64)}, "dim 64 must be a multiple of head_dim 64 and at least 128"),
        ({"mlp_ratio": 0.001}, "mlp_ratio=0.001 leaves nothing of dim 256: give at least 0.00390625"),
        ({"dims": (), "depths": ()}, "at least 1 item"),
        ({"stem": (8, 16)}, "pairs has 2 entries for a stem of 2 stages: give one for each stage from stride 4 on, 1"),
        ({"stem": (8,), "pairs": ()}, "at least 2 items"),
        ({"finest": 16}, "2, 4 or 8"),
        ({"depths": (1, 0)}, "greater than or equal to 1"),
        ({"mlp_ratio": 0}, "greater than 0"),
        ({"windows": 8}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**fields)


def test_one_head() -> None:
    assert ModelConfig(attention="local", dims=(64,), depths=(1,)).dims == (64,)


def test_outputs() -> None:
    assert ModelConfig(classes=7).outputs == 7
    assert ModelConfig(task="restore", classes=7, channels=4, scale=2).outputs == 4


def test_preset_names() -> None:
    assert {"hybrid-xxs", "hybrid-xs", "hybrid-s", "hybrid-m", "dense-s"} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_configurations(name: str) -> None:
    model = create_model(name, classes=5, channels=2)
    assert isinstance(model, HybridNet)
    assert model.config == ModelConfig(classes=5, channels=2, **PRESETS[name])


def test_dense_s_against_hybrid_s() -> None:
    hybrid, dense = (create_model(name).config.model_dump() for name in ("hybrid-s", "dense-s"))
    assert {key for key in hybrid if hybrid[key] != dense[key]} == {"attention"}
    assert dense["attention"] == "dense"


def test_sizes_from_xxs_to_m() -> None:
    with torch.device("meta"):
        sizes = [sum(p.numel() for p in create_model(name).parameters()) for name in ("hybrid-xxs", "hybrid-xs", "hybrid-s", "hybrid-m")]
    assert sizes == sorted(sizes) and sizes[-1] > 2 * sizes[0]


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("hybrid-")])
def test_share_of_attention_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(block: ParallelBlock, t_STC: Tensor, grid: Grid) -> Tensor:
        return t_STC

    with torch.device("meta"):
        model, image = create_model(name, classes=6), torch.empty(1, 3, 512, 512)
    whole = image_macs(model, image)
    monkeypatch.setattr(ParallelBlock, "attend", skip)
    assert (whole - image_macs(model, image)) / whole >= 0.25
