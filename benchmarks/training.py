"""Measure what each lever of training gains and costs, alone and all together: images a second, memory, loss after equal steps.

    python benchmarks/training.py [--models hybrid-s dense-s] [--sides 256 512] [--steps 60] [--warm-up 6] [--batch 8] [--threads N]
                                  [--levers bf16 ...] [--peers] [--output runs/benchmark-training] [--json]

Data are the demonstration's (source earth), the model and the optimiser (Muon and AdamW) those of its recipe. Every row trains for the
same steps on the same crops, in a process of its own:
    baseline        FP32, eager, contiguous tensors, all activations kept, crops cut between steps, no chunks
    bf16            products in BF16 (autocast)
    channels last   kernels and images in channels-last order
    compile         torch.compile
    allocator       freed memory kept in the process (glibc)
    prefetch        crops cut in a thread while a step computes
    chunked         the loss within 16 MiB of temporaries
    selective, full what checkpointing recomputes; chunked loss, and operators in chunks of 16 MiB (full)
    all, compiled   `muntin fit` with BF16 where it is faster, compiled
    all, selective  the same with checkpointing instead of the compiler; `all, full` likewise; `all` without either
    fabric, accelerate   (`--peers`) the same model, loss, optimiser and crops trained by Lightning Fabric and by Accelerate, each in
                    its mixed precision where BF16 is faster, with a DataLoader of one worker; if they are installed

    images/s        of the steps after the warm-up, waiting for crops and optimiser included
    MiB             peak of the process minus what it held before the first step (allocated tensors on CUDA)
    loss            mean of the last ten steps; `loss %` its difference from the baseline's
    gain, memory %  images/s and MiB over the baseline's

Goals: all together 4 times the images a second where the CPU has BF16 matrix units (AMX), elsewhere 80 % of the machine's own BF16/FP32
ratio, which is printed; at most half of the memory; the loss within 1 %; not slower than the peers. Rows measured already are not
measured again. Time on two cores: one to ten minutes a row, by model and side; run it alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import muntin
from kept import Row, kept_row, now
from muntin.data import Crops, open_source, prefetch
from muntin.runtime import describe_hardware
from muntin.training.config import Checkpointing
from muntin.training.distributed.averaging import WeightAverage
from muntin.training.loss import Loss
from muntin.training.memory.checkpointing import OPERATOR_MEMORY, ActivationCheckpointing
from muntin.training.memory.memory_format import channels_last, keep_freed_memory
from muntin.training.memory.peak import watch_peak
from muntin.training.optimizer import make_optimizer
from muntin.training.precision import MIN_GAIN, TrainingPrecision, cpu_computes_bf16, resolve_precision
from muntin.training.recipe import Recipe
from muntin.training.trainer import Trainer
from options import at_least
from resumed import demo_recipe

LEVERS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "bf16": {"bf16": True},
    "channels last": {"channels_last": True},
    "compile": {"compile": True},
    "allocator": {"allocator": True},
    "prefetch": {"prefetch": True},
    "chunked": {"chunked": True},
    "selective": {"checkpointing": "selective", "chunked": True},
    "full": {"checkpointing": "full", "chunked": True},
    "all": {"fit": {}},
    "all, compiled": {"fit": {"compile": True}},
    "all, selective": {"fit": {"checkpointing": "selective"}},
    "all, full": {"fit": {"checkpointing": "full"}},
}
PEERS = {"fabric": "lightning_fabric", "accelerate": "accelerate"}
"""Rows of other trainers, and the modules that they need."""
GOALS = {"gain_with_matrix_units": 4.0, "share_of_ratio": 0.8, "memory": 0.5, "loss": 0.01}
Step = Callable[[int, Tensor, Tensor], float]


def faster_precision(device: str) -> TrainingPrecision:
    """BF16 (FP16 on old GPUs) where its products are faster, the same for all rows."""
    if device == "cuda":
        return resolve_precision("auto", device)
    return resolve_precision("bf16" if cpu_computes_bf16() and bf16_gain() >= MIN_GAIN else "fp32", device)


@cache
def bf16_gain() -> float:
    """Speed of BF16 matrix products over FP32 on this CPU."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1024, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(partial(torch.mm, a, b), number=1, repeat=9))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def plain_step(recipe: Recipe, model: nn.Module, flags: Row, device: str) -> Step:
    """One step of a plain PyTorch loop, with one lever or none."""
    config = recipe.training
    precision = resolve_precision("bf16" if flags.get("bf16") else "fp32", device)
    model = model.to(device).train()
    if flags.get("channels_last"):
        channels_last(model)
    order = torch.channels_last if flags.get("channels_last") else torch.contiguous_format
    level: Checkpointing = flags.get("checkpointing", "none")
    ActivationCheckpointing(model).apply_all(level, OPERATOR_MEMORY if level == "full" else None)
    average, optimizer = WeightAverage(model, config.average), make_optimizer(model, config)
    loss = Loss(task=recipe.task, overlap=config.overlap_loss, memory=OPERATOR_MEMORY if flags.get("chunked") else None)
    forward = torch.compile(model, dynamic=False) if flags.get("compile") else model

    def step(number: int, images: Tensor, target: Tensor) -> float:
        for group in optimizer.param_groups:
            group["lr"] = config.rate_at((number + 0.5) / config.steps)
        with precision.autocast():
            scores = forward(images.to(device, torch.float32, memory_format=order))
        value = loss(scores, target.to(device))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, number)
        return float(value.detach())

    return step


def fit_step(recipe: Recipe, model: nn.Module, device: str) -> Step:
    """One step of `muntin fit`."""
    trainer = Trainer(model, recipe.training, task=recipe.task, precision=faster_precision(device), seed=recipe.seed)

    def step(number: int, images: Tensor, target: Tensor) -> float:
        return trainer.update(number, images, target, done=(number + 0.5) / recipe.training.steps)

    return step


def peer_step(name: str, recipe: Recipe, model: nn.Module, device: str) -> Step:
    """One step by Lightning Fabric or by Accelerate: their precision, backward and clipping; the rest as in `plain_step`."""
    config, sixteen = recipe.training, faster_precision(device).dtype is torch.bfloat16
    loss = Loss(task=recipe.task, overlap=config.overlap_loss)
    average, optimizer = WeightAverage(model, config.average), make_optimizer(model, config)
    trainer: Any
    if name == "fabric":
        from lightning_fabric import Fabric

        trainer = Fabric(accelerator=device, devices=1, precision="bf16-mixed" if sixteen else "32-true")
        trainer.launch()
        wrapped, prepared = trainer.setup(model, optimizer)
    else:
        from accelerate import Accelerator

        trainer = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if sixteen else "no")
        wrapped, prepared = trainer.prepare(model, optimizer)
    wrapped.train()

    def step(number: int, images: Tensor, target: Tensor) -> float:
        for group in optimizer.param_groups:
            group["lr"] = config.rate_at((number + 0.5) / config.steps)
        value = loss(wrapped(images.to(device, torch.float32)), target.to(device))
        trainer.backward(value)
        if name == "fabric":
            trainer.clip_gradients(wrapped, prepared, max_norm=config.clip)
        else:
            trainer.clip_grad_norm_(wrapped.parameters(), config.clip)
        prepared.step()
        prepared.zero_grad()
        average.update(model, number)
        return float(value.detach())

    return step


def loaded(crops: Crops, steps: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """The crops by a DataLoader with one worker."""

    class Batches(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
        def __len__(self) -> int:
            return steps

        def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
            return crops.batch(step)

    return enumerate(torch.utils.data.DataLoader(Batches(), batch_size=None, num_workers=1))


def measure(name: str, settings: Row) -> Row:
    """Train one row in this process."""
    if settings["threads"]:
        torch.set_num_threads(settings["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flags = LEVERS.get(name, {})
    steps, warm_up = settings["steps"], settings["warm_up"]
    changes = {"data.crop": settings["side"], "model.name": settings["model"], "training.batch_size": settings["batch"], "seed": 0}
    changes |= {"training.steps": steps, **{f"training.{key}": value for key, value in flags.get("fit", {}).items()}}
    recipe = demo_recipe(changes)
    source = open_source(recipe.data, root=Path.cwd())
    crops = Crops(
        source.split("train"), task=recipe.task, crop=recipe.data.crop, batch_size=recipe.training.batch_size, seed=recipe.seed,
        augmentation=recipe.data.augmentation,
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    model = muntin.create_model(recipe.model.name, task=recipe.task, classes=len(source.classes))
    if name in PEERS:
        step = peer_step(name, recipe, model, device)
    else:
        step = fit_step(recipe, model, device) if "fit" in flags else plain_step(recipe, model, flags, device)
    ahead = "fit" in flags or flags.get("prefetch")
    batches: Any = ((number, crops.batch(number)) for number in range(steps))
    if ahead or name in PEERS:
        batches = prefetch(crops.batch, 0, steps) if ahead else loaded(crops, steps)
    losses: list[float] = []
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(keep_freed_memory() if "fit" in flags or flags.get("allocator") else nullcontext())
        watch = stack.enter_context(watch_peak(device))
        for number, (images, target) in batches:
            if number == warm_up:
                started = time.perf_counter()
            losses.append(step(number, images, target))
        seconds = time.perf_counter() - started
    images_per_s = (steps - warm_up) * recipe.training.batch_size / seconds
    return {"images_per_s": images_per_s, "peak_bytes": watch.peak, "loss": fmean(losses[-10:]), "first_loss": losses[0], "device": device}


def in_process(name: str, settings: Row) -> Row:
    """Measure one row in a process of its own. A failure is a row, too."""
    command = [sys.executable, __file__, "--row", json.dumps([name, settings])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)  # noqa: S603 - this file
    if done.returncode:
        return {"cannot": f"exit code {done.returncode}; its error is above"}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def compared(rows: dict[str, Row], ratio: float | None, matrix_units: bool) -> Row:
    """Gains over the baseline, and the goals. `ratio`: speed of BF16 products over FP32."""
    base = rows.get("baseline")
    if base is None or "cannot" in base:
        return {}
    figures = {
        name: {
            "gain": row["images_per_s"] / base["images_per_s"],
            "memory": row["peak_bytes"] / base["peak_bytes"] if row["peak_bytes"] and base["peak_bytes"] else None,
            "loss": row["loss"] / base["loss"] - 1,
        }
        for name, row in rows.items()
        if "cannot" not in row
    }
    together = [name for name in figures if "fit" in LEVERS.get(name, {})]
    if not together:
        return {"figures": figures}
    gain_goal = GOALS["gain_with_matrix_units"] if matrix_units or ratio is None else GOALS["share_of_ratio"] * ratio
    gain = max(figures[name]["gain"] for name in together)
    memory = min((figures[name]["memory"] for name in together if figures[name]["memory"] is not None), default=None)
    peers = {name: gain >= figures[name]["gain"] for name in PEERS if name in figures}
    loss = max(abs(figures[name]["loss"]) for name in together)
    goals = {
        "gain": [gain, gain_goal, gain >= gain_goal],
        "memory": [memory, GOALS["memory"], memory is not None and memory <= GOALS["memory"]],
        "loss": [loss, GOALS["loss"], loss <= GOALS["loss"]],
        "not_slower_than": peers,
    }
    return {"figures": figures, "goals": goals}


def show(title: str, rows: dict[str, Row], result: Row) -> None:
    print(f"\n{title}\n{'':<16}{'images/s':>10}{'gain':>7}{'MiB':>8}{'memory %':>10}{'loss':>8}{'loss %':>8}")
    for name, row in rows.items():
        if "cannot" in row:
            print(f"{name:<16}cannot: {row['cannot']}")
            continue
        figures = result.get("figures", {}).get(name, {})
        mib = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}"
        cells = [
            f"{figures[key] * 100:.{digits}f}" if figures.get(key) is not None else "-" for key, digits in (("memory", 0), ("loss", 1))
        ]
        gain = f"{figures['gain']:.2f}" if figures else "-"
        print(f"{name:<16}{row['images_per_s']:>10.2f}{gain:>7}{mib:>8}{cells[0]:>10}{row['loss']:>8.4f}{cells[1]:>8}")
    for name, goal in result.get("goals", {}).items():
        print(f"goal {name}: {goal}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["hybrid-s", "dense-s"])
    parser.add_argument("--sides", nargs="+", type=at_least(32), default=[256, 512])
    parser.add_argument("--levers", nargs="+", choices=list(LEVERS), default=list(LEVERS), help="rows; the baseline is always one")
    parser.add_argument("--peers", action="store_true", help="also Lightning Fabric and Accelerate, if they are installed")
    for name, default, least in (("steps", 60, 2), ("warm-up", 6, 1), ("batch", 8, 1)):
        parser.add_argument(f"--{name}", type=at_least(least), default=default)
    parser.add_argument("--threads", type=at_least(1), default=None)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-training"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.row:
        print(json.dumps(measure(*given.row)))
        return
    if given.warm_up >= given.steps:
        raise SystemExit(f"--warm-up {given.warm_up}: give less than --steps {given.steps}")
    hardware = describe_hardware()
    names = list(dict.fromkeys(["baseline", *given.levers]))
    missing = [name for name, module in PEERS.items() if given.peers and importlib.util.find_spec(module) is None]
    names += [name for name in PEERS if given.peers and name not in missing]
    ratio = bf16_gain() if cpu_computes_bf16() and not torch.cuda.is_available() else None
    documents = []
    for model in given.models:
        for side in given.sides:
            common = {"model": model, "side": side, "steps": given.steps, "warm_up": given.warm_up, "batch": given.batch}
            rows = {}
            for name in names:
                settings = {**common, "threads": given.threads, "row": name, "levers": LEVERS.get(name, name)}
                path = given.output / f"{model}-{side}" / f"{name.replace(', ', '-').replace(' ', '-')}.json"
                rows[name] = kept_row(path, settings, partial(in_process, name, settings), hardware=hardware)
            result = compared(rows, ratio, "amx_bf16" in hardware["features"])
            documents.append({**common, "rows": rows, **result})
            if not given.json:
                show(f"{model} at {side}x{side}, batches of {given.batch}, {given.steps} steps", rows, result)
    summary = {"bf16_over_fp32": ratio, "least_gain_of_auto": MIN_GAIN, "peers_missing": missing, "hardware": hardware, "created": now()}
    if given.json:
        print(json.dumps({"benchmark": "training", "results": documents, **summary}, indent=1))
        return
    words = (
        "no BF16 products" if ratio is None else f"multiplies {ratio:.2f} times as fast in BF16 as in FP32 (auto takes it from {MIN_GAIN})"
    )
    print(f"\n{hardware['cpu']}, torch {hardware.get('torch')}: {words}; {now()}")
    for name in missing:
        print(f"{name} is not installed: pip install {'lightning-fabric' if name == 'fabric' else name}")


if __name__ == "__main__":
    main()
