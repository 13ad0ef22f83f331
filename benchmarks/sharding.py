"""Bytes that each process holds in training, beside the formula, and what the sharding costs in time.

    python benchmarks/sharding.py [--model hybrid-m] [--processes 1 2 4] [--side 32] [--steps 10]

A row for each number of processes and each `training.sharding`, FP32 on CPU processes (gloo), one thread each, 8 crops of `--side` in each.
P are the bytes of the parameters, N the processes, B those of the largest block, S the optimiser's state: 1 P for the matrices (momentum)
and 2 P for the rest (moments), without vectors where zero1 divides. A parameter and its average are 2 P.
    rest  storages of all tensors that live after a step; formula: none 2 P + S; zero1 2 P + S / N; zero2, zero3 (2 P + S) / N
    peak  rest, and what the system gave beyond it until the last gradient is there, less the activations of one process; formula: none,
          zero1 rest + P; zero2 rest + P + P / N + 2 B; zero3 rest + P / N + 3 B (a block, its gradient, a message)
`exchange ms`: two messages in which Muon's matrices travel to their owners and back. Time: a minute or two a row. Run it alone.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from documents import Document, Goal, Row, Table, columns
from harness import Benchmark, Options, Run, main, option
from muntin.models import create_model
from muntin.training.config import TrainingConfig
from muntin.training.distributed.matrices import MatrixExchange
from muntin.training.distributed.ranks import Ranks, is_sharded, joined_processes, local
from muntin.training.gradients import kept_buffers
from muntin.training.memory.checkpointing import blocks_of
from muntin.training.memory.peak import watch_peak
from muntin.training.precision import resolve_precision
from muntin.training.trainer import Trainer

SHARDINGS = ("none", "zero1", "zero2", "zero3")
ROWS, CLASSES = 8, 6


def live_bytes() -> int:
    """Bytes of the storages of all tensors that live."""
    gc.collect()
    tensors = [local(entry) for entry in gc.get_objects() if issubclass(type(entry), Tensor)]
    gradients = [local(t.grad) for t in tensors if t.is_leaf and t.grad is not None]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*tensors, *gradients) if t.device.type == "cpu"}
    return sum(storages.values())


def peak_of(work: Callable[[], object]) -> int:
    """The most bytes of memory that a call has taken from the system beyond those before. FSDP frees storages outside of operators, which
    PyTorch's profiler does not see."""
    work()  # libraries and communication take their own memory at the first call
    gc.collect()
    with watch_peak("cpu") as watch:
        work()
    return watch.peak or 0


def measure(ranks: Ranks, model_name: str, sharding: str, side: int, steps: int) -> Row:
    """One process's row."""
    torch.manual_seed(0)
    before = live_bytes()
    model: nn.Module = create_model(model_name, task="segment", classes=CLASSES)
    parameters = sum(p.nbytes for p in model.parameters())
    vectors = sum(p.nbytes for p in model.parameters() if sum(length > 1 for length in p.shape) < 2)
    block = max(sum(p.nbytes for p in part.parameters()) for part in blocks_of(model).values())
    config = TrainingConfig.model_validate({"steps": steps + 9, "batch_size": ROWS * ranks.count, "sharding": sharding})
    trainer = Trainer(model, config, task="segment", precision=resolve_precision("fp32", "cpu"), ranks=ranks)
    images = torch.randint(0, 256, (ROWS, 3, side, side), dtype=torch.uint8)
    target = torch.randint(0, CLASSES, (ROWS, side, side))
    for step in range(2):
        trainer.update(step, images, target, done=0.5)
    rest = live_bytes() - before
    state = sum(local(value).nbytes for entry in trainer.optimizer.state.values() for value in entry.values())

    def gradient() -> None:
        trainer.optimizer.zero_grad()
        trainer._gradient(2, images, target, kept_buffers(trainer.model))

    peak = rest + peak_of(gradient)
    gradients = sum(local(p.grad).nbytes for p in trainer.model.parameters() if p.grad is not None)
    trainer.optimizer.zero_grad()
    times, updates = [], []
    for step in range(3, 3 + steps):
        started = time.perf_counter()
        trainer._gradient(step, images, target, kept_buffers(trainer.model))
        trainer.placement.reduce(trainer.model.parameters())
        reduced = time.perf_counter()
        trainer.placement.step(trainer.optimizer, trainer.scaler)
        trainer.optimizer.zero_grad()
        times.append(time.perf_counter() - started)
        updates.append(time.perf_counter() - reduced)
    return {
        "parameters": parameters, "vectors": vectors, "block": block, "state": state, "gradients": gradients, "rest": rest, "peak": peak,
        "step_ms": median(times) * 1e3, "update_ms": median(updates) * 1e3, "exchange_ms": exchange_ms(trainer, ranks, steps),
    }  # fmt: skip


def exchange_ms(trainer: Trainer, ranks: Ranks, steps: int) -> float:
    """Milliseconds in which all sharded matrices travel to their owners and back."""
    matrices = [p for group in trainer.optimizer.param_groups if group["matrices"] for p in group["params"] if is_sharded(p)]
    if not matrices:
        return 0.0
    exchange, parts, times = MatrixExchange(ranks), [local(p.detach()).flatten(1) for p in matrices], []
    for _ in range(steps):
        started = time.perf_counter()
        exchange(parts, [len(p) for p in matrices], lambda whole: whole)
        times.append(time.perf_counter() - started)
    return median(times) * 1e3


def work(environment: dict[str, str], arguments: tuple[Any, ...]) -> Row:
    os.environ.update(environment)
    torch.set_num_threads(1)
    with joined_processes() as ranks:
        return measure(ranks, *arguments)


def row(count: int, *arguments: Any) -> Row:
    """The figures of the process with the highest peak."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # larger tensors go back to the system as soon as they are freed
    with socket.create_server(("127.0.0.1", 0)) as server:
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
        ranks = [shared | {"RANK": str(index), "LOCAL_RANK": str(index)} for index in range(count)]
        answers = [pool.submit(work, environment, arguments) for environment in ranks]
        return max((answer.result() for answer in answers), key=lambda answer: int(answer["peak"]))


def with_formulas(rows: list[Row]) -> list[Row]:
    """Add the formulas and the deviations. Activations are those of one process."""
    alone = next(row for row in rows if row["processes"] == 1 and row["sharding"] == "none")
    whole, state = alone["parameters"], alone["state"]
    activations = alone["peak"] - alone["rest"] - whole
    for entry in rows:
        count, sharding = entry["processes"], entry["sharding"] if entry["processes"] > 1 else "none"
        block, replicated, divided = entry["block"], 2 * entry["vectors"], (2 * whole + state) / count
        held, more = {
            "none": (2 * whole + state, whole),
            "zero1": (2 * whole + (state - replicated) / count + replicated, whole),
            "zero2": (divided, whole + whole / count + 2 * block),
            "zero3": (divided, whole / count + 3 * block),
        }[sharding]
        entry["rest_formula"], entry["peak_formula"] = held, held + more
        entry["peak"] -= activations
        for key in ("rest", "peak"):
            entry[f"{key}_deviation"] = entry[key] / entry[f"{key}_formula"] - 1
    return rows


class ShardingOptions(Options):
    model: str = option("hybrid-m", "network")
    processes: tuple[int, ...] = option((1, 2, 4), "numbers of processes; 1 is always measured", least=1, selects=True)
    side: int = option(32, "side of a crop, pixels", least=16)
    steps: int = option(10, "timed steps", least=1)


def rows(run: Run) -> list[Row]:
    found = []
    for count in sorted({1, *run.options.processes}):
        for sharding in SHARDINGS if count > 1 else ("none",):
            arguments = (count, run.options.model, sharding, run.options.side, run.options.steps)
            found.append({"processes": count, "sharding": sharding, **run.row(f"{count}-{sharding}", row, *arguments)})
    return with_formulas(found)


def newest(document: Document) -> str:
    last = [row for row in document.rows if row["processes"] == max(row["processes"] for row in document.rows)]
    held = ", ".join(f"{row['sharding']} {row['rest'] / 1e6:.0f} MB" for row in last)
    return f"at rest a process of {last[0]['processes']} holds: {held}"


def megabytes(found: list[Row]) -> Iterator[Row]:
    for row in found:
        shown = {f"{key}_mb": row[key] / 1e6 for key in ("rest", "rest_formula", "peak", "peak_formula")}
        yield row | shown | {f"{key}_off": abs(row[f"{key}_deviation"]) for key in ("rest", "peak")}


BENCHMARK = Benchmark(
    name="sharding",
    options=ShardingOptions,
    measure=rows,
    about="MB of the process that holds most, measured and by the formula in the command's docstring.",
    newest=newest,
    tables=(
        Table(
            columns=columns(
                "processes, sharding, rest MB=rest_mb:.1f, formula=rest_formula_mb:.1f, peak MB=peak_mb:.1f, formula=peak_formula_mb:.1f, "
                "step ms=step_ms:.1f, update ms=update_ms:.1f, exchange ms=exchange_ms:.1f"
            ),
            rows=megabytes,
        ),
    ),
    goals=tuple(
        Goal(
            name=f"{key} beside the formula",
            values=f"{key}_off",
            case="{sharding} of {processes}",
            rows=megabytes,
            at_most=0.05,
            form="{:.1%}",
        )
        for key in ("rest", "peak")
    ),
    unrecorded="hybrid-m, 1, 2, 4 processes, Xeon, 30 November: at rest within 0.5 % of the formula; peaks of zero2 and zero3 with two "
    "processes **missed** (1.25 and 1.38 times the formula); of four, one holds 163 MB whole, 122 (zero1), 41 MB (zero2, zero3).",
)

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
