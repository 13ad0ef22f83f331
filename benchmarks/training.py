"""Measure what each lever of training gains and costs, alone and all together: images a second, memory, loss after equal steps.

    python benchmarks/training.py [--models hybrid-s dense-s] [--sides 256 512] [--steps 60] [--warm-up 6] [--levers bf16 ...] [--peers]

Every row trains for the same steps on the same crops, in a process of its own. The baseline is FP32, eager, contiguous,
without checkpointing, prefetching and chunks; `allocator` keeps freed memory in the process, `chunked` computes the loss within 16 MiB of
temporaries, checkpointing is `selective` or `full` (with chunks). `all` is `muntin fit` with BF16 where it is faster. `--peers`: the same
training by Lightning Fabric and by Accelerate. The loss is the mean of the last ten steps. Time on two cores: one to ten minutes a row.
Run it alone.
"""

from __future__ import annotations

import importlib.util
import math
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

import muntin
from documents import Document, Goal, Row, Table, columns, crossed
from harness import Benchmark, Options, Run, apart, main, option
from muntin.data import Crops, open_source, prefetch
from muntin.training.distributed.averaging import WeightAverage
from muntin.training.loss import Loss
from muntin.training.memory.checkpointing import OPERATOR_MEMORY, ActivationCheckpointing
from muntin.training.memory.memory_format import channels_last, keep_freed_memory
from muntin.training.memory.peak import watch_peak
from muntin.training.optimizer import make_optimizer
from muntin.training.precision import MIN_GAIN, TrainingPrecision, cpu_computes_bf16, resolve_precision
from muntin.training.recipe import Recipe
from muntin.training.trainer import Trainer
from resumed import demo_recipe

LEVERS: dict[str, Row] = {
    "baseline": {},
    **{name: {name.replace(" ", "_"): True} for name in ("bf16", "channels last", "compile", "allocator", "prefetch", "chunked")},
    **{name: {"checkpointing": name, "chunked": True} for name in ("selective", "full")},
    "all": {"fit": {}},
    "all, compiled": {"fit": {"compile": True}},
    **{f"all, {name}": {"fit": {"checkpointing": name}} for name in ("selective", "full")},
}
FIT = [name for name, lever in LEVERS.items() if "fit" in lever]
PEERS = {"fabric": "lightning_fabric", "accelerate": "accelerate"}
"""Rows of other trainers, and the modules that they need."""
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


def loop_step(recipe: Recipe, model: nn.Module, gradient: Callable[[Tensor, Tensor], Tensor], optimizer: Any) -> Step:
    """One step of a loop in which `gradient` computes the loss and the clipped gradient."""
    config, average = recipe.training, WeightAverage(model, recipe.training.average)

    def step(number: int, images: Tensor, target: Tensor) -> float:
        for group in optimizer.param_groups:
            group["lr"] = config.rate_at((number + 0.5) / config.steps)
        value = gradient(images, target)
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, number)
        return float(value.detach())

    return step


def plain_step(recipe: Recipe, model: nn.Module, flags: Row, device: str) -> Step:
    """One step of a plain PyTorch loop, with one lever or none."""
    precision = resolve_precision("bf16" if flags.get("bf16") else "fp32", device)
    model = model.to(device).train()
    order = torch.channels_last if flags.get("channels_last") else torch.contiguous_format
    if flags.get("channels_last"):
        channels_last(model)
    level = flags.get("checkpointing", "none")
    ActivationCheckpointing(model).apply_all(level, OPERATOR_MEMORY if level == "full" else None)
    loss = Loss(task=recipe.task, overlap=recipe.training.overlap_loss, memory=OPERATOR_MEMORY if flags.get("chunked") else None)
    forward = torch.compile(model, dynamic=False) if flags.get("compile") else model

    def gradient(images: Tensor, target: Tensor) -> Tensor:
        with precision.autocast():
            scores = forward(images.to(device, torch.float32, memory_format=order))
        value = loss(scores, target.to(device))
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.training.clip)
        return value

    return loop_step(recipe, model, gradient, make_optimizer(model, recipe.training))


def peer_step(name: str, recipe: Recipe, model: nn.Module, device: str) -> Step:
    """One step by Lightning Fabric or by Accelerate: their precision, backward and clipping; the rest as in `plain_step`."""
    sixteen, optimizer = faster_precision(device).dtype is torch.bfloat16, make_optimizer(model, recipe.training)
    loss = Loss(task=recipe.task, overlap=recipe.training.overlap_loss)
    trainer: Any
    if name == "fabric":
        from lightning_fabric import Fabric

        trainer = Fabric(accelerator=device, devices=1, precision="bf16-mixed" if sixteen else "32-true")
        trainer.launch()
        wrapped, prepared = trainer.setup(model, optimizer)
        clip = partial(trainer.clip_gradients, wrapped, prepared, max_norm=recipe.training.clip)
    else:
        from accelerate import Accelerator

        trainer = Accelerator(cpu=device == "cpu", mixed_precision="bf16" if sixteen else "no")
        wrapped, prepared = trainer.prepare(model, optimizer)
        clip = partial(trainer.clip_grad_norm_, list(wrapped.parameters()), recipe.training.clip)
    wrapped.train()

    def gradient(images: Tensor, target: Tensor) -> Tensor:
        value = loss(wrapped(images.to(device, torch.float32)), target.to(device))
        trainer.backward(value)
        clip()
        return value

    return loop_step(recipe, model, gradient, prepared)


def fit_step(recipe: Recipe, model: nn.Module, device: str) -> Step:
    """One step of `muntin fit`."""
    trainer = Trainer(model, recipe.training, task=recipe.task, precision=faster_precision(device), seed=recipe.seed)
    return lambda number, images, target: trainer.update(number, images, target, done=(number + 0.5) / recipe.training.steps)


def measure(name: str, model_name: str, side: int, options: TrainingOptions) -> Row:
    """Train one row in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    flags, steps = LEVERS.get(name, {}), options.steps
    changes = {"data.crop": side, "model.name": model_name, "training.batch_size": options.batch, "seed": 0, "training.steps": steps}
    recipe = demo_recipe(changes | {f"training.{key}": value for key, value in flags.get("fit", {}).items()})
    source = open_source(recipe.data, task=recipe.task, root=Path.cwd())
    crops = Crops(
        source.split("train"), task=recipe.task, crop=recipe.data.crop, batch_size=recipe.training.batch_size, seed=recipe.seed,
        augmentation=recipe.data.augmentation,
    )  # fmt: skip
    torch.manual_seed(recipe.seed)
    model = muntin.create_model(recipe.model.name, task=recipe.task, classes=len(source.classes))
    batches: Any = ((number, crops.batch(number)) for number in range(steps))
    if name in PEERS:
        step = peer_step(name, recipe, model, device)
        batches = enumerate(torch.utils.data.DataLoader(range(steps), batch_size=None, num_workers=1, collate_fn=crops.batch))
    else:
        step = fit_step(recipe, model, device) if "fit" in flags else plain_step(recipe, model, flags, device)
        if "fit" in flags or flags.get("prefetch"):
            batches = prefetch(crops.batch, 0, steps)
    losses: list[float] = []
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(keep_freed_memory() if "fit" in flags or flags.get("allocator") else nullcontext())
        watch = stack.enter_context(watch_peak(device))
        for number, (images, target) in batches:
            if number == options.warm_up:
                started = time.perf_counter()
            losses.append(step(number, images, target))
        seconds = time.perf_counter() - started
    images_per_s = (steps - options.warm_up) * recipe.training.batch_size / seconds
    return {"images_per_s": images_per_s, "peak_bytes": watch.peak, "loss": fmean(losses[-10:]), "first_loss": losses[0], "device": device}


class TrainingOptions(Options):
    models: tuple[str, ...] = option(("hybrid-s", "dense-s"), "networks", selects=True)
    sides: tuple[int, ...] = option((256, 512), "sides of the crops, pixels", least=32, selects=True)
    levers: tuple[str, ...] = option(tuple(LEVERS), "rows; the baseline is always one", choices=list(LEVERS), selects=True)
    peers: bool = option(False, "also Lightning Fabric and Accelerate, if they are installed", selects=True)
    steps: int = option(60, "steps of a row", least=2)
    warm_up: int = option(6, "steps that are not timed", least=1)
    batch: int = option(8, "crops a step", least=1)

    def __post_init__(self) -> None:
        if self.warm_up >= self.steps:
            raise ValueError(f"--warm-up {self.warm_up}: give less than --steps {self.steps}")


def rows(run: Run) -> Iterator[Row]:
    options = run.options
    if cpu_computes_bf16() and not torch.cuda.is_available():
        yield {"part": "machine", "bf16_over_fp32": [bf16_gain()]}
    names = [*dict.fromkeys(["baseline", *options.levers]), *(PEERS if options.peers else ())]
    for model, side, name in product(options.models, options.sides, names):
        case = {"part": "training", "model": model, "side": side, "row": name}
        case |= {"steps": options.steps, "warm_up": options.warm_up, "batch": options.batch}
        if name in PEERS and importlib.util.find_spec(PEERS[name]) is None:
            yield {**case, "cannot": f"not installed: pip install {PEERS[name].replace('_', '-')}"}
            continue
        yield {**case, **run.row(f"{model}-{side}/{name}", apart, measure, name, model, side, options, levers=LEVERS.get(name, name))}


def compared(found: list[Row]) -> list[Row]:
    """Rows of trainings with their speed, memory and loss over the baseline's of the same network and size."""
    rows = [{**row, "crops": f"{row['model']} {row['side']}²"} for row in found if row["part"] == "training"]
    base = {row["crops"]: row for row in rows if row["row"] == "baseline" and "cannot" not in row}
    for row in rows:
        if "cannot" not in row and (other := base.get(row["crops"])):
            row |= {"gain": row["images_per_s"] / other["images_per_s"], "change": row["loss"] / other["loss"] - 1}
            row["memory"] = row["peak_bytes"] / other["peak_bytes"] if row["peak_bytes"] and other["peak_bytes"] else None
    return rows


def extreme(figure: str, names: Iterable[str], document: Document) -> dict[str, float]:
    """By network and size over some rows: the highest gain, the least memory, the largest change of the loss."""
    values: dict[str, list[float]] = {}
    for row in compared(document.rows):
        if row["row"] in names and row.get(figure) is not None:
            values.setdefault(row["crops"], []).append(abs(row[figure]))
    return {crops: min(each) if figure == "memory" else max(each) for crops, each in values.items()}


def over_peers(document: Document) -> dict[str, float]:
    ours, peers = extreme("gain", FIT, document), {name: extreme("gain", [name], document) for name in PEERS}
    return {f"{crops}, {name}": ours[crops] / gain for name, gains in peers.items() for crops, gain in gains.items() if crops in ours}


def machine(found: list[Row]) -> list[Row]:
    return [row for row in found if row["part"] == "machine"]


def over_ratio(document: Document) -> dict[str, float]:
    """Gains over those of BF16 products; none of a machine that has matrix units for them, or no BF16."""
    ratios = max((row["bf16_over_fp32"] for row in machine(document.rows) if "amx_bf16" not in document.machine["features"]), default=None)
    return {crops: gain / max(ratios) for crops, gain in extreme("gain", FIT, document).items()} if ratios else {}


def span(document: Document, figure: str, *names: str) -> str:
    """The lowest and the highest gain, or percent of memory saved, of some rows."""
    values, form = list(extreme(figure, names, document).values()) or [math.nan], "{:.2f}"
    if figure == "memory":
        values, form = [100 * (1 - value) for value in values], "{:.0f}"
    return f"{form.format(min(values))} to {form.format(max(values))}"


def newest(document: Document) -> str:
    gains = ", ".join(f"{crops} {gain:.2f}" for crops, gain in extreme("gain", FIT, document).items())
    memory = span(document, "memory", "all, full")
    return f"all levers together, times the images a second of plain PyTorch: {gains}; with everything recomputed {memory} % less memory"


def speed(documents: list[Document]) -> str:
    low, *_, high = sorted(machine(documents[-1].rows)[0]["bf16_over_fp32"] * 2)
    gain, prefetched = span(documents[-1], "gain", *FIT), span(documents[-1], "gain", "prefetch")
    return (
        f"all levers together: {gain} times plain PyTorch. This CPU multiplies {low:.2f} to {high:.2f} times as fast in BF16 as in FP32. "
        f"Prefetching batches alone: {prefetched}"
    )


def memory(documents: list[Document]) -> str:
    selective, full = (span(documents[-1], "memory", name) for name in ("all, selective", "all, full"))
    gain = span(documents[-1], "gain", "all, full")
    return f"with all levers: {selective} % less with `selective`, {full} % with `full`, at {gain} times the baseline's speed"


def cell(row: Row) -> str:
    texts = [f"{row['images_per_s']:.2f}", f"{(row['peak_bytes'] or 0) / 2**20:,.0f} MiB", f"{row['loss']:.4f}"]
    shares = (("gain", ".2f"), ("memory", ".0%"), ("change", "+.1%"))
    return ", ".join(text + (f" ({row[key]:{form}})" if row.get(key) else "") for text, (key, form) in zip(texts, shares, strict=True))


BENCHMARK = Benchmark(
    name="training",
    options=TrainingOptions,
    measure=rows,
    about="""Images a second, MiB beyond those before the first step, and loss, each with what it is over the baseline's, plain PyTorch in
FP32. Goals of all levers together: 4 times the images a second where the CPU has matrix units for BF16, elsewhere 80 % of the machine's
own BF16/FP32 ratio; at most half of the memory; the loss within 1 %; not slower than Lightning Fabric and Accelerate.""",
    newest=newest,
    tables=(
        crossed("row", "crops", cell, select=compared),
        Table(columns=columns("BF16 products over FP32=bf16_over_fp32"), rows=machine),
    ),
    goals=(
        Goal(name="gain", values=lambda each: {} if over_ratio(each) else extreme("gain", FIT, each), at_least=4, form="{:.2f}"),
        Goal(name="gain over the BF16/FP32 ratio", values=over_ratio, at_least=0.8, form="{:.2f}"),
        Goal(name="share of the memory", values=partial(extreme, "memory", FIT), at_most=0.5, form="{:.0%}"),
        Goal(name="change of the loss", values=partial(extreme, "change", FIT), at_most=0.01, form="{:.2%}"),
        Goal(name="speed over the peers'", values=over_peers, at_least=1, form="{:.2f}"),
    ),
    blocks={"M10": speed, "M12": memory},
)

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
