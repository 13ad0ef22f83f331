"""Real processes on 127.0.0.1 that train together, and what they do. A fork server has imported the slow packages once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from muntin.compression.quantization.qat import prepare_qat
from muntin.models import create_model
from muntin.training.checkpoint import checkpoints_in
from muntin.training.config import TrainingConfig
from muntin.training.distributed.ranks import Ranks, joined_processes, local
from muntin.training.fitting import fit
from muntin.training.precision import resolve_precision
from muntin.training.recipe import load_recipe
from muntin.training.trainer import Trainer

BATCH, SIDE, CLASSES = 12, 12, 3
TIMEOUT_S = 120
FP32 = resolve_precision("fp32", "cpu")
PRELOADED = ["rank_processes", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.distributed.checkpoint"]


class Block(nn.Module):
    """A residual block with rows that no number of processes divides, and a scalar."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(2, width)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.norm(self.conv(x)).relu()


class Plain(nn.Module):
    """(B, 3, H, W) -> (B, K, H, W), without norms that take several pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 10, 3, padding=1), nn.Conv2d(10, CLASSES, 1)
        self.blocks = nn.ModuleList([Block(10), Block(10)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x / 255)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Short(Plain):
    """Lacks memory in the second process, after some calls, for more than three pictures."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 3 and os.environ.get("RANK") == "1":
            Short.calls += 1
            if Short.calls > 4:
                raise MemoryError
        return super().forward(x)


class Killed(Plain):
    """Kills the second process in the fifth step, when there is a checkpoint, unless it was started again."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 3 and os.environ.get("RANK") == "1" and "TORCHELASTIC_RESTART_COUNT" not in os.environ:
            Killed.calls += 1
            if Killed.calls > 4:
                end = time.monotonic() + TIMEOUT_S / 2
                while not checkpoints_in(Path(os.environ["RUN"]) / "checkpoints") and time.monotonic() < end:
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


def plain(**options: Any) -> nn.Module:
    return Plain()


def killed(**options: Any) -> nn.Module:
    return Killed()


def short(**options: Any) -> nn.Module:
    return Short()


def rows(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    return images, images.float().mean(1).div(256 / CLASSES).long().clamp(max=CLASSES - 1)


Curve = tuple[list[float], dict[str, np.ndarray], int]


def curves(*runs: dict[str, Any]) -> list[Curve]:
    """Losses of some steps, the averaged weights, and this process's bytes of optimiser state, for the options of each run."""
    with joined_processes() as ranks:
        return [_curve(ranks, **run) for run in runs]


SMALL = {"stem": [8, 8, 16], "dims": [32], "depths": [2], "head_dim": 16, "window": 2, "latents": 4, "decoder": 16, "pairs": [1, 1]}


def _curve(ranks: Ranks, *, steps: int, quantized: bool = False, hybrid: bool = False, **options: Any) -> Curve:
    torch.manual_seed(0)
    model = create_model("hybrid-xs", task="segment", classes=CLASSES, options=SMALL) if hybrid else Plain()
    if quantized:
        prepare_qat(model.eval(), [rows(99)[0].float()], bits=8)
    config = TrainingConfig.model_validate({"steps": steps, "batch_size": BATCH, "average": 0.9} | options)
    trainer = Trainer(model, config, task="segment", precision=FP32, ranks=ranks)
    losses = []
    for step in range(steps):
        own = slice(ranks.index * trainer.rows, (ranks.index + 1) * trainer.rows)
        images, target = (values[own] for values in rows(step))
        losses.append(trainer.update(step, images, target, done=step / steps))
    state = trainer.optimizer.state.values()
    held = sum(local(value).nbytes for entry in state for value in entry.values())
    with trainer.average.whole() as average:
        return losses, {name: value.numpy().copy() for name, value in average.state_dict().items()}, held


def fit_recipe(recipe: Path, directory: Path, overrides: list[str], resume: bool) -> dict[str, Any]:
    """The result of `fit` and its notes."""
    result = fit(load_recipe(recipe, overrides), root=recipe.parent, directory=directory, resume=resume)
    return {"step": result.step, "notes": result.notes, "score": result.validation[-1]["score"]}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def _work(environment: dict[str, str], pipe: Any, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    try:
        pipe.send((True, work(*arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        raise


def run_ranks(count: int, work: Callable[..., Any], *arguments: Any, **variables: str) -> list[Any]:
    """The results of `work(*arguments)` in `count` processes with these environment variables.

    Raises RuntimeError with the traceback of the first that fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", **variables}
    pipes, processes = [], []
    for index in range(count):
        receiver, sender = context.Pipe(duplex=False)
        environment = {**shared, "RANK": str(index), "LOCAL_RANK": str(index)}
        processes.append(context.Process(target=_work, args=(environment, sender, work, arguments)))
        pipes.append(receiver)
        processes[-1].start()
        sender.close()
    try:
        answers = []
        for index, pipe in enumerate(pipes):
            if not pipe.poll(TIMEOUT_S):
                raise TimeoutError(f"process {index} of {count} has not answered in {TIMEOUT_S} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append((False, f"process {index} was killed"))
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    for right, answer in answers:
        if not right:
            raise RuntimeError(answer)
    return [answer for _, answer in answers]
