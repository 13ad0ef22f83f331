"""Activation checkpointing from outside of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy

import muntin
from muntin.training.config import Checkpointing
from muntin.training.memory.checkpointing import ActivationCheckpointing, _policy, blocks_of

SMALL = {"stem": [8, 8, 16], "dims": [32], "depths": [2], "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "pairs": [1, 1]}


def saved_bytes(model: nn.Module, image: Tensor) -> int:
    """Bytes that the graph of a forward pass keeps."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = model(image)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert answer.requires_grad
    return sum(size for place, size in kept.items() if place not in weights)


@pytest.mark.parametrize("source", ["hybrid", "timm:test_resnet", "timm:test_vit"])
def test_same_gradients_statistics_and_less_memory(source: str) -> None:
    torch.manual_seed(0)
    task = "segment" if source == "hybrid" else "classify"
    name, options = ("hybrid-xs", SMALL) if source == "hybrid" else (source, {})
    model = muntin.create_model(name, task=task, classes=3, options=options).double().train()
    image = torch.rand(*((4, 3, 64, 64) if source != "timm:test_vit" else (1, 3, 160, 160)), dtype=torch.float64) * 255
    results, sizes = [], []
    levels: tuple[Checkpointing, ...] = ("none", "selective", "full")
    for level in levels:
        one = copy.deepcopy(model)
        checkpointing = ActivationCheckpointing(one)
        checkpointing.apply_all(level, 100_000 if level == "full" else None)
        torch.manual_seed(1)
        one(image).square().mean().backward()
        results.append([p.grad for p in one.parameters()] + list(one.buffers()))
        sizes.append(saved_bytes(one, image))
        assert list(one.state_dict()) == list(model.state_dict())
        checkpointing.remove()
        assert not {"forward", "attend"} & {key for module in one.modules() for key in module.__dict__}
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert sizes[0] > 1.2 * sizes[2]


@pytest.mark.parametrize("level", ["none", "full"])
def test_operators_in_chunks(level: Checkpointing) -> None:
    """Chunks of the tokens have the gradient of the whole, inside recomputed blocks and outside; selective blocks stay whole."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).double()
    model = nn.Sequential(nn.Sequential(nn.Sequential(plain)))
    checkpointing = ActivationCheckpointing(model)
    checkpointing.blocks = {"0.0": model[0][0]}
    tokens, widest = torch.rand(3, 50, 16, dtype=torch.float64), 0

    def watch(layer: nn.Module, inputs: tuple[Tensor], answer: Tensor) -> None:
        nonlocal widest
        widest = max(widest, len(answer.flatten(0, -2)))

    plain[0].register_forward_hook(watch)
    results = []
    for levels, memory, rows in (({}, None, 150), ({"0.0": level}, 100_000, 38), ({"0.0": "selective"}, 100_000, 150)):
        widest = 0
        checkpointing.apply(levels, memory)
        results.append(torch.autograd.grad(model(tokens).square().sum(), list(model.parameters())))
        assert widest == rows
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-14)


def test_selective_keeps_long_products() -> None:
    aten = torch.ops.aten
    narrow, wide, kernel = torch.rand(4, 16), torch.rand(4, 512), torch.rand(8, 64, 3, 3)
    keep = [_policy(None, aten.mm.default, wide, wide.T), _policy(None, aten.convolution.default, wide, kernel, None, (1, 1))]
    assert keep == [CheckpointPolicy.MUST_SAVE] * 2
    drop = [_policy(None, aten.mm.default, narrow, narrow.T), _policy(None, aten.addmm.default, wide, narrow, narrow.T)]
    drop += [_policy(None, aten.convolution.default, wide, kernel[:, :16], None), _policy(None, aten.gelu.default, wide)]
    assert drop == [CheckpointPolicy.PREFER_RECOMPUTE] * 4


def test_blocks() -> None:
    stages = set(blocks_of(muntin.create_model("hybrid-xs", task="segment", classes=3, options=SMALL)))
    assert {
        "stage4.0",
        "stages.0.reduce",
        "stages.0.blocks.0",
        "stages.0.blocks.1",
        "decoder.smooth.0",
    } <= stages and "stages.0" not in stages
    assert set(blocks_of(muntin.create_model("timm:resnet18", task="classify", classes=3))) == {
        f"model.layer{stage}.{number}" for stage in range(1, 5) for number in range(2)
    }
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    assert blocks_of(plain) == {}
