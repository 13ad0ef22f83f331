"""The named networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from muntin.deployment import image_macs
from muntin.layers import Grid, ParallelBlock
from muntin.models import PRESETS, HybridNet, ModelConfig, create_model


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
