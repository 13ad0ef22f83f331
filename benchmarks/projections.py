"""Compare two products that read the same tokens at the start of a block with one product whose result is split.

    python benchmarks/projections.py [--dims 128 256 384] [--networks hybrid-xxs hybrid-xs hybrid-s] [--sides 512 1024]

"Fused projections" are one of the reasons that are given for parallel residuals. The second test is `HybridAttention`, whose windows and
latents read the same tokens, in hybrid networks with random weights. Times are medians of a call on one image, in eager PyTorch, compiled,
and deployed in OpenVINO, in turns. Time on two cores: a quarter of an hour. Run it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import muntin
from documents import Document, Row, crossed
from harness import Benchmark, Options, Run, main, option
from measures import ms_in_turns
from muntin.artifact.manifest import ClassInfo, Signature, Task
from muntin.errors import DependencyError
from muntin.layers import Grid, HybridAttention
from muntin.models import PRESETS, TorchSession, create_model
from resumed import network_of

STRIDE, BLOCKS, CLASSES = 16, 6, 4
WAYS = ("eager f32", "compiled f32", "deployed f32", "deployed bf16", "deployed int8")
PROTOCOL = 2
"""Before 2 the larger size was compiled for every size where the smaller one came before it in the same process."""


class Beginnings(nn.Module):
    """A classifier of blocks of which only the products are left. `(B, 3, H, W)` pixels 0-255 -> `(B, CLASSES)`."""

    def __init__(self, dim: int, form: str) -> None:
        super().__init__()
        self.widths = (3 * dim, 2 * dim)
        self.patch = nn.Conv2d(3, dim, STRIDE, STRIDE)
        firsts = self.widths if form == "two" else (sum(self.widths),)
        self.first = nn.ModuleList(nn.ModuleList(nn.Linear(dim, width) for width in firsts) for _ in range(BLOCKS))
        self.last = nn.ModuleList(nn.ModuleList(nn.Linear(width, dim) for width in self.widths) for _ in range(BLOCKS))
        self.head = nn.Linear(dim, CLASSES)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        t_BHWC = self.patch(x_BCHW / 64 - 2).permute(0, 2, 3, 1)
        for firsts, lasts in zip(self.first, self.last, strict=True):
            parts = [layer(t_BHWC) for layer in firsts]
            attention, mlp = parts if len(parts) == 2 else parts[0].split(self.widths, -1)
            t_BHWC = t_BHWC + lasts[0](attention.clamp(-3, 3)) + lasts[1](mlp.relu())
        return self.head(t_BHWC.mean((1, 2)))


class OneProduct(HybridAttention):
    """Windows and latents from one product that is split."""

    def __init__(self, other: HybridAttention) -> None:
        super().__init__(other.dim, heads=other.heads, window=other.window, latents=other.latent.latents)
        self.widths = [other.project_local.out_features, other.project_latent.out_features]
        self.project = nn.Linear(other.dim, sum(self.widths))
        del self.project_local, self.project_latent

    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        local, latent = self.project(t_STC).split(self.widths, -1)
        return self.out(torch.cat([self.local(local, grid), self.latent(latent, grid)], -1))

    @property
    def entrances(self) -> tuple[nn.Module, ...]:
        return (self.project,)


def beginnings(dim: int, form: str) -> nn.Module:
    torch.manual_seed(0)
    return Beginnings(dim, form).eval()


def network(name: str, form: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, task="segment", classes=CLASSES)
    parents = [(parent, *child) for parent in model.modules() for child in parent.named_children()] if form == "one" else []
    for parent, place, child in parents:
        if isinstance(child, HybridAttention):
            setattr(parent, place, OneProduct(child))
    return model.eval()


def session(model: nn.Module, way: str, side: int, folder: Path, threads: int) -> Any:
    kind, precision = way.split()
    if kind != "deployed":
        classes = tuple(ClassInfo(name=str(n), color=(n, n, n)) for n in range(CLASSES))
        task: Task = "classify" if isinstance(model, Beginnings) else "segment"
        return TorchSession(model, Signature(task=task, channels=3, scale=1, classes=classes), compile=kind == "compiled")
    example = torch.randint(0, 256, (2, 3, 256, 256), generator=torch.Generator().manual_seed(0)).float()
    changes = muntin.quantize(model, [example], min_sqnr_db=0) if precision == "int8" else []
    muntin.export(model, example, folder, changes=changes, sizes="widest")
    return muntin.load(folder, precision="recorded" if precision == "int8" else precision, threads=threads, shapes=[(1, side, side)])


def measure(make: Callable[[str], nn.Module], way: str, side: int, folder: Path, threads: int, rounds: int) -> Row:
    torch.set_num_threads(threads)
    torch._dynamo.reset()  # else the second size of this process is compiled for every size, and rows depend on which were there
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3)).astype(np.uint8)
    try:
        sessions = {form: session(make(form), way, side, folder / form, threads) for form in ("two", "one")}
    except DependencyError as error:  # no such type on this CPU, or no compiler
        return {"cannot": str(error)}
    two, one = ms_in_turns(sessions, image, rounds).values()
    return {"two_ms": two, "one_ms": one, "gain": two / one}


class ProjectionsOptions(Options):
    dims: tuple[int, ...] = option((128, 256, 384), "channels of the beginnings", least=16, selects=True)
    networks: tuple[str, ...] = option(("hybrid-xxs", "hybrid-xs", "hybrid-s"), "networks", choices=list(PRESETS), selects=True)
    ways: tuple[str, ...] = option(WAYS, "ways of running", choices=WAYS, selects=True)
    sides: tuple[int, ...] = option((512, 1024), "sides of the image, pixels", least=64, selects=True)
    rounds: int = option(20, "timed calls", least=1)
    threads: int = option(2, "threads of PyTorch and of the engine", least=1)


def rows(run: Run) -> Iterator[Row]:
    options = run.options
    subjects: dict[str, Callable[[str], nn.Module]] = {f"beginnings {dim}": partial(beginnings, dim) for dim in options.dims}
    subjects |= {name: partial(network, name) for name in options.networks}
    for name, make in subjects.items():
        structure = network_of(name) | ({} if name in PRESETS else {"structure": {"stride": STRIDE, "blocks": BLOCKS}})
        for way, side in ((way, side) for way in options.ways for side in options.sides):
            folder = run.folder / f"{name}-{way}-{side}".replace(" ", "-")
            arguments = (make, way, side, folder, options.threads, options.rounds)
            row = run.row(f"{folder.name}/row", measure, *arguments, protocol=PROTOCOL, **structure)
            yield {"subject": name, "way": way, "side": side, **row}


def longer(rows: list[Row], subject: str, kind: str) -> str:
    """Times with one product over those with two, lowest and highest."""
    ratios = [row["one_ms"] / row["two_ms"] for row in rows if subject in row["subject"] and kind in row["way"] and "gain" in row]
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "not measured"


def newest(document: Document) -> str:
    blocks, networks = (longer(document.rows, subject, "deployed") for subject in ("beginnings", "hybrid"))
    return f"deployed, one product that is split takes so many times as long as two: blocks {blocks}, whole hybrids {networks}"


def cell(row: Row) -> str:
    return f"{row['gain']:.2f} ({row['two_ms']:.2f}, {row['one_ms']:.2f} ms)"


BENCHMARK = Benchmark(
    name="projections",
    options=ProjectionsOptions,
    measure=rows,
    about="""Gain (and both times): two products of the same tokens, as in muntin, over one product that is split; above 1 where one is
faster. `beginnings`: six blocks of which only these products are left, by channels.""",
    newest=newest,
    variant=lambda document: ", ".join(dict.fromkeys(row["subject"] for row in document.rows)),
    tables=(crossed("subject, side", "way", cell),),
)

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
