"""Training under a bound on memory, which the system enforces."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from muntin.errors import RecipeError
from muntin.training.config import TrainingConfig
from muntin.training.recovery.memory_bound import memory_bound
from muntin.training.recovery.out_of_memory import Level, MemoryUse, memory_use

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the bound is Linux's")

SCRIPT = """
import json, sys, torch, muntin
from muntin.runtime.host.memory import resident
from muntin.training.config import TrainingConfig
from muntin.training.precision import resolve_precision
from muntin.training.recovery.memory_bound import memory_bound
from muntin.training.trainer import Trainer

torch.set_num_threads(1)
steps = 3
options = {"stem": [8, 8, 16], "dims": [32], "depths": [1], "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "pairs": [1, 1]}
config = TrainingConfig(batch_size=32, memory=1 << 30, steps=steps, learning_rate=1e-3)

def run(free):
    torch.manual_seed(0)
    model = muntin.create_model("hybrid-xs", task="segment", classes=4, options=options).double()
    trainer = Trainer(model, config, task="segment", precision=resolve_precision("fp32", "cpu"))
    images = [torch.randint(0, 256, (32, 3, 64, 64), dtype=torch.uint8) for _ in range(steps)]
    targets = [torch.randint(0, 4, (32, 64, 64)) for _ in range(steps)]
    losses = []
    for step in range(steps):
        bound = resident()[0] + (free << 20) if step >= 1 and free is not None else None
        with memory_bound(bound):
            losses.append(trainer.update(step, images[step], targets[step], done=step / steps))
    sums = [float(p.detach().abs().sum()) for p in (*model.parameters(), *trainer.average.model.buffers())]
    return {"losses": losses, "sums": sums, "notes": trainer.notes, "memory": trainer.memory.model_dump()}

print(json.dumps([run(4), run(None)]))
"""


@needs_linux
def test_shrunk_steps_have_the_same_weights() -> None:
    """Three steps in FP64, from the second on with 4 MiB beyond what the process holds then, and without a bound.

    The first step keeps freed memory in the process, so that bounds are far below what a step of 32 crops needs.
    """
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-2000:]
    tight, roomy = json.loads(result.stdout)
    assert not roomy["notes"] and roomy["memory"]["micro_batch"] == 32
    assert tight["memory"]["micro_batch"] < 32
    assert tight["notes"][0].startswith("out of memory at step 2 with micro-batches of 32, checkpointing none: goes on with ")
    assert tight["losses"] == pytest.approx(roomy["losses"], rel=1e-12)
    assert tight["sums"] == pytest.approx(roomy["sums"], rel=1e-12)


@needs_linux
def test_bound_is_refused_below_what_is_held() -> None:
    with pytest.raises(RecipeError, match=r"training\.memory 67,108,864 bytes: the process holds"), memory_bound(1 << 26):
        pass


@pytest.mark.parametrize(("level", "levels"), [("none", ["selective", "full"]), ("budget", ["full"]), ("full", [])])
def test_order_of_shrinking(level: Level, levels: list[Level]) -> None:
    use: MemoryUse | None = MemoryUse(micro_batch=24, unit=4, checkpointing=level)
    seen = []
    while use is not None:
        seen.append((use.micro_batch, use.checkpointing))
        use = use.smaller()
    assert seen == [(24, level), (12, level), (4, level), *((4, each) for each in levels)]


def test_micro_batch_of_norms() -> None:
    plain, batch_norm = nn.Conv2d(3, 3, 1), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    assert memory_use(plain, TrainingConfig(micro_batch=3), 16).micro_batch == 3
    assert memory_use(batch_norm, TrainingConfig(), 16) == MemoryUse(micro_batch=16, unit=16, checkpointing="none")
    with pytest.raises(
        RecipeError,
        match=r"training\.micro_batch 8: its batch norms take the whole batch \(see training\.norm_group\): give a multiple of 16",
    ):
        memory_use(batch_norm, TrainingConfig(micro_batch=8), 16)
    assert torch.is_grad_enabled()
