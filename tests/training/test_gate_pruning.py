"""Gates close under a budget, the least important ones first. Axes: C channels of a gate."""

from __future__ import annotations

import copy
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muntin import create_model
from muntin.compression import load_model, remove_closed_channels
from muntin.deployment import image_macs
from muntin.errors import RecipeError
from muntin.layers import ChannelGate
from muntin.layers.gate import BLOCK
from muntin.training import fit, loop, read_checkpoint
from muntin.training.config import TrainingConfig
from muntin.training.distributed.averaging import WeightAverage
from muntin.training.gate_pruning import FIRST, LAST, GateClosing
from muntin.training.optimizer import make_optimizer
from muntin.training.recipe import load_recipe
from muntin.training.trainer import Trainer

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


def closing_of(model: nn.Module, keep: float, average: nn.Module | None = None) -> GateClosing:
    return GateClosing(model, copy.deepcopy(model) if average is None else average, IMAGE, keep=keep)


def stepped(model: nn.Module, mean_square: Callable[[ChannelGate], Tensor]) -> torch.optim.Optimizer:
    """An optimiser after one step, with the given second moments of the gates' gradients."""
    optimizer = make_optimizer(model, TrainingConfig(steps=STEPS))
    for gate in gates_of(model):
        optimizer.state[gate.logit] |= {"step": torch.tensor(1.0), "exp_avg_sq": mean_square(gate)}
    return optimizer


def open_share(closing: GateClosing) -> float:
    return sum(closing.costs[gate] * int(gate.open_channels().sum()) for gate in closing.costs) / closing.total


def trained(model: nn.Module, closing: GateClosing, average: WeightAverage, *, until: int = STEPS) -> None:
    """Train on noise, in the trainer's order of steps."""
    optimizer = make_optimizer(model, TrainingConfig(steps=STEPS))
    generator = torch.Generator().manual_seed(1)
    for step in range(until):
        scores: Tensor = model(torch.randint(0, 256, (2, 3, 64, 64), generator=generator).float())
        scores.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step)
        closing.update((step + 0.5) / STEPS, optimizer)


@pytest.mark.parametrize("keep", [0.6, 0.35])
def test_closed_channels_by_budget(keep: float) -> None:
    model = network()
    whole = macs(model)
    average = WeightAverage(model, 0.9)
    closing = closing_of(model, keep, average.model)
    trained(model, closing, average)
    for gate in gates_of(model):
        assert int(gate.open_channels().sum()) % BLOCK == 0 and gate.open_channels().any()
    for one in (model, average.model):  # the average is what is kept, and it is cut alike
        remove_closed_channels(one)
        saved = whole - macs(one)
        assert (1 - keep) * closing.total <= saved < (1 - keep) * closing.total + BLOCK * max(closing.costs.values())
    assert [gate.dim for gate in gates_of(model)] == [gate.dim for gate in gates_of(average.model)]


def test_least_important_channels_first() -> None:
    model = network()
    closing = closing_of(model, 0.5)
    needed = {}
    for gate in closing.costs:
        needed[gate] = torch.zeros(gate.dim, dtype=torch.bool)
        needed[gate][torch.randperm(gate.dim)[: gate.dim // 2 // BLOCK * BLOCK]] = True
    # Alike for what they cost: every gate has as many that are needed.
    closing.update(1, stepped(model, lambda gate: (torch.where(needed[gate], 2.0, 1.0) * closing.costs[gate]) ** 2))
    assert 0.5 - BLOCK * max(closing.costs.values()) / closing.total < open_share(closing) <= 0.5
    unneeded_open = any(bool((gate.open_channels() & ~needed[gate]).any()) for gate in needed)
    needed_closed = any(bool((~gate.open_channels() & needed[gate]).any()) for gate in needed)
    assert not (unneeded_open and needed_closed)
    for gate, needed_C in needed.items():
        open_C = gate.open_channels()
        assert bool((open_C <= needed_C).all() or (needed_C <= open_C).all())


def test_cost_of_channels() -> None:
    model = network()
    closing = closing_of(model, 0.5)
    closing.update(1, stepped(model, lambda gate: torch.ones(gate.dim)))
    shares = {cost: float(gate.open_channels().float().mean()) for gate, cost in closing.costs.items()}
    dearest, cheapest = max(shares), min(shares)
    assert dearest > cheapest
    assert shares[dearest] < 1 and shares[cheapest] == 1


def test_closed_channels_stay_closed() -> None:
    model = network()
    closing = closing_of(model, 0.5)
    closing.update(1, stepped(model, lambda gate: torch.rand(gate.dim)))
    before = [gate.open_channels() for gate in gates_of(model)]
    assert not all(open_C.all() for open_C in before)
    with torch.no_grad():
        for gate in gates_of(model):
            gate.logit.masked_fill_(~gate.open_channels(), 0.3)  # the optimiser has opened them, and they seem important
    closing.update(1, stepped(model, lambda gate: torch.full((gate.dim,), 1e6)))
    assert all(gate.open_channels().equal(open_C) for gate, open_C in zip(gates_of(model), before, strict=True))


def test_resumed_run() -> None:
    model = network()
    gate = gates_of(model)[0]
    with torch.no_grad():
        gate.logit[:3] = torch.tensor([0.0, -0.2, 0.4])  # closed by this; by the optimiser, which may open it again; half open
    closing = closing_of(model, 0.9)
    with torch.no_grad():
        gate.logit[:3] += 0.3
    closing.update(0, stepped(model, lambda gate: torch.ones(gate.dim)))
    assert gate.open_channels()[:3].tolist() == [False, True, True]


def budget_of(tiny: Any, *options: str) -> Any:
    given = [f"model.options={json.dumps(OPTIONS)}", "training.gate_budget=0.5", "training.validate_every=2", *options]
    return load_recipe(tiny.recipe, given)


def kept(checkpoint: Path) -> float:
    return open_share(closing_of(load_model(read_checkpoint(checkpoint)), 0.5))


@pytest.mark.parametrize("slow", ["step", "validation"])
def test_early_end_by_minutes(tmp_path: Path, tiny: Any, monkeypatch: pytest.MonkeyPatch, clock: Any, slow: str) -> None:
    """One step, or the validation, takes the rest of the time; the gates close then."""
    update, judge = Trainer.update, loop.Training._judge

    def slow_update(self: Trainer, step: int, *arguments: Any, **options: Any) -> float:
        clock.now += 10 if slow == "step" and step == 1 else 0
        return update(self, step, *arguments, **options)

    def slow_judge(self: Any, *arguments: Any) -> None:
        clock.now += 10 if slow == "validation" else 0
        judge(self, *arguments)

    monkeypatch.setattr(Trainer, "update", slow_update)
    monkeypatch.setattr(loop.Training, "_judge", slow_judge)
    recipe = budget_of(tiny, "training.minutes=0.1", "training.steps=1000000")
    result = fit(recipe, directory=tmp_path / "run", root=tiny.root)
    judged = [2] if slow == "step" else [2, 3]  # in the latter the gates' closing has made it another model
    assert not result.interrupted and [point["step"] for point in result.validation] == judged and result.step == judged[-1]
    assert kept(result.checkpoint) <= 0.5


def test_fewer_steps(tmp_path: Path, tiny: Any) -> None:
    def stop(progress: Any) -> None:
        if progress.kind == "validation" and progress.step == 4:
            signal.raise_signal(signal.SIGINT)

    options = ("training.steps=40",)
    result = fit(budget_of(tiny, *options), directory=tmp_path / "run", root=tiny.root, progress=stop)
    assert result.interrupted and kept(result.checkpoint) > 0.5
    shorter = budget_of(tiny, f"training.steps={result.step}")
    again = fit(shorter, directory=tmp_path / "run", root=tiny.root, resume=True)
    assert again.step == result.step and kept(again.checkpoint) <= 0.5
    assert [point["step"] for point in again.validation] == [2, 4]
    assert again.validation[-1] != result.validation[-1]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["score"] for line in lines if line["kind"] == "validation"] == [point["score"] for point in again.validation]
    once_more = fit(shorter, directory=tmp_path / "run", root=tiny.root, resume=True)
    assert (once_more.checkpoint, once_more.validation) == (again.checkpoint, again.validation)


def test_before_the_first_share() -> None:
    model = network()
    closing = closing_of(model, 0.35)
    closing.update(0, stepped(model, lambda gate: torch.rand(gate.dim)))
    assert open_share(closing) == 1


def test_budget_by_share() -> None:
    closing = GateClosing(network(), network(), IMAGE, keep=0.4)
    shares = [closing.share((step + 0.5) / 1000) for step in range(1000)]
    first, last = int(FIRST * 1000), int(LAST * 1000)
    assert set(shares[:first]) == {1.0}
    assert shares[first:last] == sorted(shares[first:last], reverse=True) and shares[first] < 1
    assert shares[last:] == pytest.approx([0.4] * (1000 - last))


@pytest.mark.parametrize("steps", [0, None])
def test_before_the_first_step(steps: float | None) -> None:
    model = network()
    closing = closing_of(model, 0.4)
    optimizer = stepped(model, lambda gate: torch.zeros(gate.dim))
    for gate in gates_of(model):  # a scaler of FP16 leaves steps out: the fused optimiser has made its state, and counts none
        if steps is None:
            optimizer.state[gate.logit].clear()
        else:
            optimizer.state[gate.logit]["step"] = torch.tensor(float(steps))
    closing.update(1, optimizer)
    assert open_share(closing) == 1


def test_model_without_gates() -> None:
    with pytest.raises(RecipeError, match=r"training.gate_budget 0.3: this model has no channel gates to close; leave it at 1"):
        closing_of(network(gate=False), 0.3)


def test_budget_below_one_block() -> None:
    with pytest.raises(RecipeError, match=r"one block of 16 channels of each gate stays open, which is 0\.\d+ of the multiply-adds"):
        closing_of(network(), 0.05)


def test_advised_budget() -> None:
    model = create_model("hybrid-xxs", classes=3)
    with pytest.raises(RecipeError) as error:
        closing_of(model, 0.05)
    closing_of(model, float(re.findall(r"which is ([\d.]+) of", str(error.value))[0]))


def test_cost_measurement_changes_nothing() -> None:
    model = network().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    GateClosing(model, copy.deepcopy(model), torch.rand(1, 3, 64, 64) * 255, keep=0.4)
    assert model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(gate._forward_pre_hooks for gate in gates_of(model))
