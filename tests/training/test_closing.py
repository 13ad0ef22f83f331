"""Gates close under a budget, the least needed first. Axes: B images, C channels that a gate weighs, H W image."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from muntin import create_model
from muntin.compression import remove_closed_channels
from muntin.deployment import image_macs
from muntin.layers import ChannelGate
from muntin.layers.gate import BLOCK
from muntin.training.closing import FIRST, LAST, GateClosing
from muntin.training.config import TrainingConfig
from muntin.training.trainer import make_optimizer

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
STEPS = 20
IMAGE = torch.zeros(1, 3, 64, 64)


def network(gate: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return create_model("hybrid-xs", options={**OPTIONS, "gate": gate})


def gates_of(model: nn.Module) -> list[ChannelGate]:
    return [module for module in model.modules() if isinstance(module, ChannelGate)]


def macs(model: nn.Module) -> int:
    return image_macs(copy.deepcopy(model).to("meta"), IMAGE.to("meta"))


def trained(model: nn.Module, closing: GateClosing, average: nn.Module, *, until: int = STEPS) -> None:
    """Real gradients of a loss on noise, real steps."""
    optimizer = make_optimizer(model, TrainingConfig(steps=STEPS))
    generator = torch.Generator().manual_seed(1)
    for step in range(until):
        scores: Tensor = model(torch.randint(0, 256, (2, 3, 64, 64), generator=generator).float())
        scores.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        closing.update(step, optimizer, average=average)


@pytest.mark.parametrize("keep", [0.6, 0.35])
def test_what_is_cut_is_what_the_budget_takes(keep: float) -> None:
    model = network()
    whole = macs(model)
    average = copy.deepcopy(model)
    closing = GateClosing(model, IMAGE, keep=keep, steps=STEPS)
    gated = sum(cost * gate.dim for gate, cost in closing.costs.items())
    trained(model, closing, average)
    for gate in gates_of(model):
        assert int(gate.open_channels().sum()) % BLOCK == 0 and gate.open_channels().any()
    for one in (model, average):  # the average is what is kept, and it is cut alike
        remove_closed_channels(one)
        saved = whole - macs(one)
        assert (1 - keep) * gated <= saved < (1 - keep) * gated + BLOCK * max(closing.costs.values())
    assert [gate.dim for gate in gates_of(model)] == [gate.dim for gate in gates_of(average)]


def test_the_channels_that_the_loss_needs_least_close_first() -> None:
    model = network()
    closing = GateClosing(model, IMAGE, keep=0.5, steps=STEPS)
    optimizer = make_optimizer(model, TrainingConfig(steps=STEPS))
    needed = {}
    for gate, cost in closing.costs.items():  # alike for what they cost: every gate has as many that are needed
        needed[gate] = torch.zeros(gate.dim, dtype=torch.bool)
        needed[gate][torch.randperm(gate.dim)[: gate.dim // 2 // BLOCK * BLOCK]] = True
        optimizer.state[gate.logit]["exp_avg_sq"] = (torch.where(needed[gate], 2.0, 1.0) * cost) ** 2
    closing.update(STEPS - 1, optimizer, average=copy.deepcopy(model))
    for gate, needed_C in needed.items():
        open_C = gate.open_channels()
        assert bool((open_C <= needed_C).all() or (needed_C <= open_C).all())
        assert closing.closed[gate].equal(~open_C)


def test_a_channel_that_costs_more_closes_before_one_that_is_needed_as_much() -> None:
    model = network()
    closing = GateClosing(model, IMAGE, keep=0.5, steps=STEPS)
    optimizer = make_optimizer(model, TrainingConfig(steps=STEPS))
    for gate in closing.costs:
        optimizer.state[gate.logit]["exp_avg_sq"] = torch.ones(gate.dim)
    closing.update(STEPS - 1, optimizer, average=copy.deepcopy(model))
    shares = {cost: float(gate.open_channels().float().mean()) for gate, cost in closing.costs.items()}
    dearest, cheapest = max(shares), min(shares)
    assert dearest > cheapest
    assert shares[dearest] < 1 and shares[cheapest] == 1


def test_what_is_closed_stays_closed_whatever_the_optimiser_does() -> None:
    model = network()
    closing = GateClosing(model, IMAGE, keep=0.5, steps=STEPS)
    average = copy.deepcopy(model)
    trained(model, closing, average, until=STEPS // 2)
    before = [~gate.open_channels() for gate in gates_of(model)]
    assert any(closed_C.any() for closed_C in before)
    with torch.no_grad():
        for gate in gates_of(model):
            gate.logit.add_(0.3)
    optimizer = make_optimizer(model, TrainingConfig(steps=STEPS))
    for gate in gates_of(model):
        optimizer.state[gate.logit]["exp_avg_sq"] = torch.ones(gate.dim)
    closing.update(STEPS - 1, optimizer, average=average)
    for gate, closed_C in zip(gates_of(model), before, strict=True):
        assert not gate.open_channels()[closed_C].any()


def test_nothing_closes_at_first_and_all_that_has_to_before_the_end() -> None:
    closing = GateClosing(network(), IMAGE, keep=0.3, steps=1000)
    shares = [closing.share(step) for step in range(1000)]
    first, last = int(FIRST * 1000), int(LAST * 1000)
    assert set(shares[:first]) == {1.0}
    assert shares[first:last] == sorted(shares[first:last], reverse=True) and shares[first] < 1
    assert shares[last - 1 :] == pytest.approx([0.3] * (1001 - last))


def test_before_the_first_step_of_an_optimiser_nothing_closes() -> None:
    model = network()
    closing = GateClosing(model, IMAGE, keep=0.3, steps=STEPS)
    closing.update(STEPS - 1, make_optimizer(model, TrainingConfig(steps=STEPS)), average=copy.deepcopy(model))
    assert all(gate.open_channels().all() for gate in gates_of(model))


def test_a_model_without_gates_is_left_alone() -> None:
    model = network(gate=False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    closing = GateClosing(model, IMAGE, keep=0.3, steps=STEPS)
    closing.update(STEPS - 1, make_optimizer(model, TrainingConfig(steps=STEPS)), average=copy.deepcopy(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_finding_what_channels_cost_changes_nothing_of_the_model() -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    GateClosing(model, torch.rand(1, 3, 64, 64) * 255, keep=0.3, steps=STEPS)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(gate._forward_pre_hooks for gate in gates_of(model))
