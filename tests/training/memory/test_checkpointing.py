"""Activation checkpointing from outside of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import muntin
from muntin.training.config import Checkpointing
from muntin.training.memory.checkpointing import ActivationCheckpointing, blocks_of

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


@pytest.mark.parametrize("source", ["hybrid", "timm:resnet18", "timm:vit_tiny_patch16_224"])
def test_same_gradients_statistics_and_less_memory(source: str) -> None:
    torch.manual_seed(0)
    task = "segment" if source == "hybrid" else "classify"
    name, options = ("hybrid-xs", SMALL) if source == "hybrid" else (source, {})
    model = muntin.create_model(name, task=task, classes=3, options=options).double().train()
    image = torch.rand(4, 3, *((64, 64) if source != "timm:vit_tiny_patch16_224" else (224, 224)), dtype=torch.float64) * 255
    results, sizes = [], []
    levels: tuple[Checkpointing, ...] = ("none", "selective", "full")
    for level in levels:
        one = copy.deepcopy(model)
        checkpointing = ActivationCheckpointing(one)
        checkpointing.apply_all(level)
        torch.manual_seed(1)
        one(image).square().mean().backward()
        results.append([p.grad for p in one.parameters()] + list(one.buffers()))
        sizes.append(saved_bytes(one, image))
        assert list(one.state_dict()) == list(model.state_dict())
        checkpointing.remove()
        assert "forward" not in {key for module in one.modules() for key in module.__dict__}
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert sizes[0] > 1.2 * sizes[2]


def test_blocks() -> None:
    assert set(blocks_of(muntin.create_model("timm:resnet18", task="classify", classes=3))) == {
        f"model.layer{stage}.{number}" for stage in range(1, 5) for number in range(2)
    }
    plain = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1))
    assert blocks_of(plain) == {}
