"""Cutting closed channels reduces the cost and keeps the answer. Axes: B images, C channels, H W map."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from model_helpers import answer, pixels
from muntin import create_model
from muntin.compression import fold, quantize
from muntin.compression.channels.slimming import apply_widths, remove_closed_channels, widths_of
from muntin.compression.low_rank.factorization import apply_structure, low_rank, structure_of
from muntin.deployment import image_macs
from muntin.errors import MuntinError
from muntin.layers import ChannelGate, MapNorm, ResidualPair
from muntin.layers.gate import BLOCK

OPTIONS = {
    "stem": (16, 48, 48),
    "depths": (1, 1),
    "dims": (64, 64),
    "head_dim": 32,
    "window": 4,
    "latents": 4,
    "decoder": 16,
    "pairs": (1, 1),
}
GATED = {"stage4.0": 48, "stage8.1": 48, "stages.0.blocks.0.mlp": 128, "stages.1.blocks.0.mlp": 128}


def closed(share: float, *, block: str = "parallel") -> nn.Module:
    """A model whose gates have a random `share` of closed channels; the others are half open."""
    torch.manual_seed(0)
    model = create_model("hybrid-xs", options={**OPTIONS, "block": block})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ChannelGate):
                module.logit.uniform_(0.3, 1)
                module.logit[torch.randperm(module.dim)[: round(share * module.dim)]] = torch.tensor(-0.05)
            elif isinstance(module, MapNorm):
                module.weight.uniform_(-1.5, 1.5)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.5)
                module.running_var.uniform_(0.2, 3)
    return model.eval()


def alike(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())


def macs(model: nn.Module) -> int:
    return image_macs(copy.deepcopy(model).to("meta"), torch.empty(1, 3, 64, 64, device="meta"))


@pytest.mark.parametrize("block", ["parallel", "serial"])
def test_answer_and_work_after_cutting(block: str) -> None:
    model, x = closed(0.5, block=block), pixels(2, 3, 37, 50)
    before, cost = answer(model, x), macs(model)
    changes = remove_closed_channels(model)
    assert widths_of(model) == {"stage4.0": 32, "stage8.1": 32, "stages.0.blocks.0.mlp": 64, "stages.1.blocks.0.mlp": 64}
    assert {change.layer: change.done for change in changes} == {
        name: f"{widths_of(model)[name]} of {width} channels" for name, width in GATED.items()
    }
    assert alike(answer(model, x), before)
    assert macs(model) < 0.8 * cost
    fold(model)
    assert alike(answer(model, x), before)


def test_factored_model() -> None:
    model, x = closed(0.5), pixels(2, 3, 37, 50)
    low_rank(model, [pixels(4, 3, 64, 64)], parameters=0.6, multiple=4)
    before = answer(model, x)
    remove_closed_channels(model)
    assert any(structure_of(model)) and widths_of(model)["stages.0.blocks.0.mlp"] == 64
    assert alike(answer(model, x), before)
    other = create_model("hybrid-xs", options=OPTIONS).eval()
    apply_widths(other, widths_of(model))
    apply_structure(other, structure_of(model))
    other.load_state_dict(model.state_dict())
    assert torch.equal(answer(other, x), answer(model, x))


def test_training_after_cutting() -> None:
    model = closed(0.5).train()
    remove_closed_channels(model)
    model(pixels(8, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


def test_frozen_weights() -> None:
    model = closed(0.5)
    model.requires_grad_(False)
    remove_closed_channels(model)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_open_gates() -> None:
    model = closed(0)
    assert remove_closed_channels(model) == []
    assert widths_of(model) == GATED


def test_blocks_stay_full() -> None:
    model = closed(4 / 48)
    changes = {change.layer: change for change in remove_closed_channels(model)}
    assert changes["stage4.0"].kept and changes["stage4.0"].reason == "4 of 48 channels are closed: the open ones need as many blocks of 16"
    assert widths_of(model)["stages.0.blocks.0.mlp"] == 128  # 11 of 128 are closed


def test_all_channels_closed() -> None:
    model, x = closed(1.0), pixels(1, 3, 33, 40)
    before = answer(model, x)
    remove_closed_channels(model)
    assert set(widths_of(model).values()) == {BLOCK}
    assert alike(answer(model, x), before)


def test_models_without_gates() -> None:
    assert remove_closed_channels(create_model("hybrid-xs", options={**OPTIONS, "gate": False}).eval()) == []
    assert remove_closed_channels(nn.Linear(3, 4)) == []


def test_widths_of_another_model() -> None:
    model = closed(0)
    with pytest.raises(MuntinError, match="'stage5' is not in the model"):
        apply_widths(model, {"stage4.0": 16, "stage5": 16})
    with pytest.raises(MuntinError, match=r"'stage4.0' has 48 hidden channels, not 64"):
        apply_widths(model, {"stage8.1": 16, "stage4.0": 64})
    assert widths_of(model) == GATED


def test_quantize_cuts_first() -> None:
    model, x = closed(0.5), pixels(4, 3, 64, 64)
    before = answer(model, x)
    changes = quantize(model, [x])
    assert [change.layer for change in changes if change.pass_ == "slim"] == list(GATED)
    assert model.get_submodule("stages.0.blocks.0.mlp.expand").weight.shape[0] == 64
    after = answer(model, x)
    assert (after - before).square().mean() < 0.02 * before.var()


def test_pair_with_another_norm() -> None:
    model, x = closed(0.5), pixels(2, 3, 37, 50)
    pair = model.get_submodule("stage4.0")
    assert isinstance(pair, ResidualPair)
    pair.first.norm = nn.BatchNorm2d(48).eval()
    with torch.no_grad():
        pair.first.norm.running_mean.normal_(0, 0.5)
        pair.first.norm.bias.normal_(0, 0.5)
    before = answer(model, x)
    (change,) = (change for change in remove_closed_channels(model) if change.layer == "stage4.0")
    assert change.kept and change.reason == "a BatchNorm2d before the gate cannot be cut"
    fold(model)
    assert isinstance(pair.gate, ChannelGate) and alike(answer(model, x), before)


def test_layer_used_elsewhere() -> None:
    model = closed(0.5)
    pairs = [module for module in model.modules() if isinstance(module, ResidualPair)]
    other = nn.Sequential(pairs[0].first)  # its convolution gives the channels of the gate
    model.other = other
    changes = {change.layer: change for change in remove_closed_channels(model)}
    name = next(name for name, module in model.named_modules() if module is pairs[0])
    assert changes[name].kept and "also used elsewhere" in (changes[name].reason or "")
    assert sum(change.kept for change in changes.values()) == 1
