"""Activation checkpointing from outside of a model."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy

import muntin
from muntin.training.config import Checkpointing
from muntin.training.memory.checkpointing import ActivationCheckpointing, _policy, blocks_of, perceptrons_of

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
        assert not {"forward", "attend"} & {key for module in one.modules() for key in module.__dict__}
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)
    assert sizes[0] > 1.2 * sizes[2]


def test_perceptrons_in_chunks() -> None:
    """Chunks of the tokens have the gradient of the whole; layers that mix tokens or draw numbers are left alone."""
    torch.manual_seed(0)
    vit = muntin.create_model("timm:vit_tiny_patch16_224", task="classify", classes=3)
    assert {type(each).__name__ for each in perceptrons_of(vit)} == {"Mlp"} and len(perceptrons_of(vit)) == 12
    hybrid = muntin.create_model("hybrid-xs", task="segment", classes=3, options=SMALL)
    assert {type(each).__name__ for each in perceptrons_of(hybrid)} == {"Perceptron"}
    random = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    mixing = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    assert perceptrons_of(nn.ModuleList([random, mixing])) == []
    plain = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)).double()
    model = nn.Sequential(nn.Sequential(nn.Sequential(plain)))
    tokens, gradients, kept = torch.rand(3, 50, 16, dtype=torch.float64), [], []
    for chunked in (False, True):
        checkpointing = ActivationCheckpointing(model)
        checkpointing.blocks = {"0.0": model[0][0]}
        widest = 0

        def watch(layer: nn.Module, inputs: tuple[Tensor], answer: Tensor) -> None:
            nonlocal widest
            widest = max(widest, answer.numel())

        handle = plain[0].register_forward_hook(watch)
        checkpointing.apply_all("full") if chunked else checkpointing.apply({"0.0": "full"}, chunked=False)
        model(tokens).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        kept.append(widest)
        handle.remove()
        checkpointing.remove()
        model.zero_grad()
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert kept == [150 * 64, 38 * 64]


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
