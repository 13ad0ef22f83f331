"""Checkpointing by a budget: the choice of blocks, and steps within a measured peak."""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

import muntin
from muntin.errors import MuntinError
from muntin.training.config import TrainingConfig
from muntin.training.memory.budget import BlockCost, block_costs, cheapest, keep_to_budget, plan_budget
from muntin.training.memory.checkpointing import ActivationCheckpointing
from muntin.training.precision import resolve_precision
from muntin.training.recovery.out_of_memory import Level, MemoryUse, memory_use
from muntin.training.trainer import Trainer

COSTS = {
    name: BlockCost(kept=kept, seconds=seconds) for name, kept, seconds in (("a", 100, 4.0), ("b", 60, 1.0), ("c", 50, 1.5), ("d", 0, 1))
}
SCRIPT = """
import json, sys, torch, muntin
from muntin.training.config import TrainingConfig
from muntin.training.memory.memory_format import keep_freed_memory
from muntin.training.precision import resolve_precision
from muntin.training.trainer import Trainer

torch.set_num_threads(1)
options = {"stem": [8, 8, 16], "dims": [32], "depths": [2], "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "pairs": [1, 1]}
generator = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (2, 16, 3, 64, 64), dtype=torch.uint8, generator=generator)
targets = torch.randint(0, 4, (2, 16, 64, 64), generator=generator)

def run(budget):
    torch.manual_seed(0)
    model = muntin.create_model("hybrid-xs", task="segment", classes=4, options=options).double()
    config = TrainingConfig(batch_size=16, checkpointing="none" if budget is None else {"budget": budget}, learning_rate=1e-3)
    trainer = Trainer(model, config, task="segment", precision=resolve_precision("fp32", "cpu"))
    for step in range(2):
        trainer.update(step, images[step], targets[step], done=0.5)
    peaks.append(trainer.gradient_peak(2, images[0], targets[0]))
    return trainer, [float(p.detach().abs().sum()) for p in (*model.parameters(), *trainer.average.model.buffers())]

peaks = []
with keep_freed_memory():
    plain, sums = run(None)
    trainer, budgeted = run(int(peaks[0] * float(sys.argv[1])))
use = trainer.memory.model_dump()
print(json.dumps({"peaks": peaks, "sums": [sums, budgeted], "notes": trainer.notes, "use": use, "loss": trainer.loss.memory}))
"""


def test_least_time_for_the_bytes() -> None:
    def seconds(names: tuple[str, ...]) -> float:
        return sum(COSTS[name].seconds for name in names)

    for freed in (1, 45, 55, 99, 105, 130, 155, 200):
        every = [names for size in range(5) for names in itertools.combinations(COSTS, size)]
        enough = [names for names in every if sum(COSTS[name].kept for name in names) >= freed]
        assert seconds(cheapest(COSTS, freed)) == min(map(seconds, enough)), freed
    assert cheapest(COSTS, 211) == tuple(COSTS)


def test_more_is_recomputed_until_the_peak_fits() -> None:
    """A peak that falls by less than the costs promise."""
    measured = {(): 500, ("b", "c"): 465, ("a", "b", "c"): 380}
    plan = plan_budget(400, COSTS, lambda blocks, chunked: measured[blocks])
    assert plan.fits and plan.recomputed == ("a", "b", "c") and plan.peaks == (500, 465, 380)
    short = plan_budget(400, COSTS, lambda blocks, chunked: 390 if chunked else None)
    assert short.fits and short.chunked and short.recomputed == tuple(COSTS) and short.peaks[0] is None


def test_smaller_micro_batch_or_an_error() -> None:
    use = memory_use(nn.Conv2d(3, 3, 1), TrainingConfig(checkpointing={"budget": "1MiB"}), 8)  # type: ignore[arg-type]
    budget = 1 << 20
    result, note = keep_to_budget(budget, use, lambda use: COSTS, lambda use, blocks, chunked: budget * use.micro_batch // 3)
    assert result == MemoryUse(micro_batch=2, unit=1, checkpointing="budget")
    assert "nothing is computed again; measured peak 682.7 KiB with micro-batches of 2" in note
    with pytest.raises(
        MuntinError, match=r"budget 1\.0 MiB: with micro-batches of 1 and all blocks computed again the peak is 2\.0 MiB: give"
    ):
        keep_to_budget(budget, use, lambda use: COSTS, lambda use, blocks, chunked: 2 * budget)


@pytest.mark.parametrize(
    ("checkpointing", "remembered", "level"),
    [("none", "budget", "none"), ("none", "full", "full"), ({"budget": "1GiB"}, "budget", "budget"), ({"budget": "1GiB"}, "full", "full")],
)
def test_resumed_with_another_recipe(checkpointing: Any, remembered: Level, level: Level) -> None:
    """A budget that was taken out of the recipe does not come back from a checkpoint."""
    config = TrainingConfig(checkpointing=checkpointing, batch_size=8)
    trainer = Trainer(nn.Conv2d(3, 3, 1), config, task="segment", precision=resolve_precision("fp32", "cpu"))
    trainer.remember(MemoryUse(micro_batch=4, unit=1, checkpointing=remembered))
    assert trainer.memory == MemoryUse(micro_batch=4, unit=1, checkpointing=level)


def test_costs_of_blocks_are_freed_again() -> None:
    model = muntin.create_model("timm:resnet18", task="classify", classes=3).train()
    checkpointing = ActivationCheckpointing(model)
    costs = block_costs(checkpointing, model, lambda: checkpointing.blocks["model.layer1.0"](torch.rand(2, 64, 8, 8)))
    map_bytes = 2 * 64 * 8 * 8 * 4
    assert list(costs) == ["model.layer1.0"]
    assert 2 * map_bytes <= costs["model.layer1.0"].kept <= 5 * map_bytes
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each) is torch.Tensor and each.shape == (2, 64, 8, 8)]


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is Linux's")
def test_measured_peak_is_within_the_budget() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, "0.8"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    plain, budgeted = result["peaks"]
    assert budgeted < 0.85 * plain
    assert result["sums"][1] == pytest.approx(result["sums"][0], rel=1e-12)
    assert result["notes"][0].startswith("checkpointing by a budget of ") and len(result["notes"]) == 1
    assert result["use"]["checkpointing"] == "budget" and result["loss"] == 16 << 20
