"""Muon for matrices, AdamW for the rest: against the singular value decomposition and PyTorch's AdamW."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from muntin.compression.quantization.qat import prepare_qat
from muntin.models import create_model
from muntin.training.config import OptimizerName, TrainingConfig
from muntin.training.optimizer import (
    LENGTH,
    MOMENTUM,
    Muon,
    averaged_weights,
    load_optimizer,
    make_optimizer,
    optimizer_tensors,
    orthogonalised,
)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 0.7, 1.3), (torch.bfloat16, 0.6, 1.5)])
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 40, 5), (1, 24, 16), (4, 1, 7)])
def test_orthogonalised_directions(shape: tuple[int, int, int], dtype: torch.dtype, least: float, most: float) -> None:
    torch.manual_seed(0)
    x_NRC = torch.randn(shape)
    updates = orthogonalised(x_NRC, dtype)
    assert updates.dtype == torch.float32
    u, s, v = torch.linalg.svd(updates, full_matrices=False)
    assert float(s.min()) > least and float(s.max()) < most
    turned = x_NRC @ (u @ v).mT  # its own polar factor: symmetric, positive
    assert torch.allclose(turned, turned.mT, atol=0.03 * float(x_NRC.norm()))
    assert float(torch.linalg.eigvalsh(turned).min()) > -0.02


def test_orthogonalised_stack() -> None:
    torch.manual_seed(0)
    x_NRC = torch.randn(3, 6, 9) * torch.tensor([1e-6, 1.0, 1e6]).reshape(3, 1, 1)
    together = orthogonalised(x_NRC)
    assert all(torch.allclose(together[i], orthogonalised(x_NRC[i : i + 1])[0], atol=1e-5) for i in range(3))
    assert not orthogonalised(torch.zeros(1, 4, 4)).any()


def test_parameter_groups() -> None:
    model = nn.ModuleDict(
        {
            "conv": nn.Conv2d(1, 8, 3), "grouped": nn.Conv2d(8, 8, 3, groups=2), "depthwise": nn.Conv2d(8, 8, 3, groups=8),
            "linear": nn.Linear(4, 5), "attention": nn.MultiheadAttention(8, 2), "table": nn.Embedding(9, 4), "norm": nn.BatchNorm2d(8),
            "wide_norm": nn.LayerNorm([4, 5]),
        }
    )  # fmt: skip
    model.register_parameter("position", nn.Parameter(torch.zeros(1, 7, 4)))
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    matrices, others, vectors = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert matrices == {"conv.weight", "linear.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert others == {"depthwise.weight", "grouped.weight", "table.weight", "position"}
    assert matrices | others | vectors == set(names.values()) and all("bias" in name or "norm" in name for name in vectors)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3, 0.0]


class OwnNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(1, dim, 1, 1)), nn.Parameter(torch.zeros(1, dim, 1, 1))


def test_norm_weights_are_vectors() -> None:
    model = nn.ModuleDict({"norm": OwnNorm(8), "conv": nn.Conv2d(8, 8, 1)})
    model.register_parameter("layer_scale", nn.Parameter(torch.full((8, 1, 1), 1e-5)))
    model.register_parameter("class_token", nn.Parameter(torch.zeros(1, 1, 8)))
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.3))
    assert _matrices(optimizer, model) == {"conv.weight"}
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]  # and none that are decayed by AdamW


def test_quantised_weights_are_matrices() -> None:
    model = create_model("hybrid-xs", task="classify", classes=3)
    expected = _matrices(make_optimizer(model, TrainingConfig()), model)
    model.eval()
    prepare_qat(model, [torch.rand(2, 3, 64, 64) * 255], bits=4)
    matrices = _matrices(make_optimizer(model, TrainingConfig()), model)
    assert expected == matrices and "head.weight" in matrices


def _matrices(optimizer: Muon, model: nn.Module) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in optimizer.param_groups[0]["params"]}


def test_matrix_step() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, bias=False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(layer, TrainingConfig(learning_rate=0.01, weight_decay=0.5))
    expected, momentum = layer.weight.detach().clone(), torch.zeros(6, 4, 3, 3)
    for _ in range(3):
        gradient = torch.randn(6, 4, 3, 3)
        layer.weight.grad = gradient.clone()
        optimizer.step()
        momentum = MOMENTUM * momentum + gradient
        update = orthogonalised((gradient + MOMENTUM * momentum).reshape(1, 6, 36)).reshape(6, 4, 3, 3)
        expected = expected * (1 - 0.01 * 0.5) - 0.01 * LENGTH * math.sqrt(36) * update
        assert torch.allclose(layer.weight, expected, atol=1e-6)


def test_adamw_step() -> None:
    torch.manual_seed(0)
    depthwise, norm, linear = nn.Conv2d(3, 3, 3, groups=3), nn.BatchNorm2d(3), nn.Linear(4, 4)
    optimizer = make_optimizer(nn.Sequential(depthwise, norm, linear), TrainingConfig(learning_rate=1.0, weight_decay=0.1))
    kernel, *vectors = mine = [depthwise.weight, *(p for p in (depthwise.bias, *norm.parameters(), linear.bias) if p is not None)]
    twins = [parameter.detach().clone().requires_grad_() for parameter in mine]
    groups: list[dict[str, Any]] = [{"params": twins[:1], "weight_decay": 0.1}, {"params": twins[1:], "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups)
    for rate in (0.1, 0.01):
        for group in (*optimizer.param_groups, *plain.param_groups):
            group["lr"] = rate
        for parameter, twin in zip(mine, twins, strict=True):
            parameter.grad = torch.randn_like(parameter)
            twin.grad = parameter.grad.clone()
        optimizer.step()
        plain.step()
    assert kernel.ndim == 4 and len(vectors) == 4
    assert all(torch.allclose(parameter, twin, atol=1e-7) for parameter, twin in zip(mine, twins, strict=True))


def test_one_kind_of_parameters() -> None:
    for model in (nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = make_optimizer(model, TrainingConfig(learning_rate=0.1))
        (model(torch.randn(8, 4)) * torch.randn(8, 4)).sum().backward()
        optimizer.step()
        assert all(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_gradients_not_finite() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = make_optimizer(model, TrainingConfig())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    scaler.scale((model(torch.randn(8, 4)) * torch.inf).sum()).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)) and scaler.get_scale() == 2.0


def test_complex_weights() -> None:
    model = nn.Linear(3, 2, dtype=torch.complex64)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(model, TrainingConfig())
    model(torch.ones(1, 3, dtype=torch.complex64)).abs().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before) and model.weight.isfinite().all()


@pytest.mark.parametrize("name", ["muon", "adamw", "lion", "schedule-free"])
def test_each_optimizer_learns_and_resumes(name: OptimizerName) -> None:
    """Six steps, and three that continue from three by their tensors, end in the same bits."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(64, 6, generator=generator), torch.randn(64, 2, generator=generator)
    config = TrainingConfig(optimizer=name, **({} if name == "lion" else {"learning_rate": 0.02}))
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
        return model, make_optimizer(model, config)

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    model, optimizer = fresh()
    losses = go(model, optimizer, 6)
    assert losses == sorted(losses, reverse=True)
    first, saved = fresh()
    go(first, saved, 3)
    second, restored = fresh()
    second.load_state_dict(first.state_dict())
    load_optimizer(second, restored, scaler, optimizer_tensors(first, saved, scaler))
    assert go(second, restored, 3) == losses[3:]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), second.parameters(), strict=True))
    before = [p.detach().clone() for p in model.parameters()]
    with averaged_weights(optimizer):
        changed = not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert changed == (name == "schedule-free")
    torch.testing.assert_close(before, [p.detach() for p in model.parameters()])


def test_learning_rate_after_loading_a_state() -> None:
    """AdamW's groups are those of Muon, also after `load_state_dict`, which makes new ones."""
    model = nn.Linear(3, 3)
    optimizer = make_optimizer(model, TrainingConfig())
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [parameter.detach().clone() for parameter in model.parameters()]
    for _ in range(2):
        model(torch.rand(2, 3)).sum().backward()
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert len(optimizer.state[model.bias]) > 1  # AdamW's state is Muon's
