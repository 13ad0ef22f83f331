"""Compare two products that read the same tokens at the start of a block with one product whose result is split.

    python benchmarks/projections.py [--dims 128 256 384] [--networks hybrid-xxs hybrid-xs hybrid-s] [--sides 512 1024] [--rounds 20]
                                     [--threads 2] [--output runs/benchmark-projections] [--json]

"Fused projections" are one of the reasons that are given for parallel residuals: attention and perceptron read the same normalised tokens,
so their first layers can be one. The first test is a network of six such layers after a patch embedding of stride 16: attention gets 3 x
dim channels, the perceptron 2 x dim; each is bounded, projected back and added. (The rest of attention is the same for both and left out.)
It runs in eager PyTorch, compiled, and deployed in OpenVINO in FP32, BF16 and INT8. The second test is `HybridAttention`, whose windows and
latents read the same tokens, in hybrid networks with random weights: `two` is as in muntin, `one` is one product, split. Columns:
    two, one   median milliseconds of a call on one image, pixels in and scores out, in turns
    gain       two / one: above 1 where one product is faster

A row that is there already is not measured again; one of another machine is refused. Time on two cores: a quarter of an hour. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import muntin
from kept import Row, kept_row, now
from muntin.artifact.manifest import ClassInfo, Signature, Task
from muntin.compression import quantize
from muntin.errors import DependencyError
from muntin.layers import Grid, HybridAttention
from muntin.models import PRESETS, TorchSession, create_model
from muntin.runtime import describe_hardware
from muntin.runtime.profiling.timing import interleaved_latency
from options import at_least
from resumed import network_of

STRIDE, BLOCKS, CLASSES = 16, 6, 4
WAYS = ("eager f32", "compiled f32", "deployed f32", "deployed bf16", "deployed int8")
NETWORKS = ("hybrid-xxs", "hybrid-xs", "hybrid-s")
FORMS = ("two", "one")
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
            parts = [layer(t_BHWC) for layer in firsts]  # type: ignore[union-attr]
            attention, perceptron = parts if len(parts) == 2 else parts[0].split(self.widths, -1)
            t_BHWC = t_BHWC + lasts[0](attention.clamp(-3, 3)) + lasts[1](perceptron.relu())  # type: ignore[index]
        out: Tensor = self.head(t_BHWC.mean((1, 2)))
        return out


class OneProduct(HybridAttention):
    """Windows and latents from one product that is split."""

    def __init__(self, other: HybridAttention) -> None:
        super().__init__(other.dim, heads=other.heads, window=other.window, latents=other.latent.latents)
        self.widths = [other.project_local.out_features, other.project_latent.out_features]
        self.project = nn.Linear(other.dim, sum(self.widths))
        del self.project_local, self.project_latent

    def attend(self, t_STC: Tensor, grid: Grid) -> Tensor:
        local, latent = self.project(t_STC).split(self.widths, -1)
        out: Tensor = self.out(torch.cat([self.local(local, grid), self.latent(latent, grid)], -1))
        return out

    @property
    def entrances(self) -> tuple[nn.Module, ...]:
        return (self.project,)


def beginnings(dim: int, form: str) -> nn.Module:
    torch.manual_seed(0)
    return Beginnings(dim, form).eval()


def network(name: str, form: str) -> nn.Module:
    torch.manual_seed(0)
    model = create_model(name, task="segment", classes=CLASSES)
    if form == "one":
        for parent in list(model.modules()):
            for place, child in list(parent.named_children()):
                if isinstance(child, HybridAttention):
                    setattr(parent, place, OneProduct(child))
    return model.eval()


def session(model: nn.Module, way: str, side: int, folder: Path, threads: int) -> Any:
    kind, precision = way.split()
    if kind != "deployed":
        classes = tuple(ClassInfo(name=str(n), color=(n, n, n)) for n in range(CLASSES))
        task: Task = "classify" if isinstance(model, Beginnings) else "segment"
        signature = Signature(task=task, channels=3, scale=1, classes=classes)
        return TorchSession(model, signature, compile=kind == "compiled")
    example = torch.randint(0, 256, (2, 3, 256, 256), generator=torch.Generator().manual_seed(0)).float()
    changes = quantize(model, [example], min_sqnr_db=0) if precision == "int8" else []
    muntin.export(model, example, folder, changes=changes)
    return muntin.load(folder, precision="recorded" if precision == "int8" else precision, threads=threads, shapes=[(1, side, side)])


def measure(make: Callable[[str], nn.Module], way: str, side: int, folder: Path, given: argparse.Namespace) -> Row:
    torch.set_num_threads(given.threads)
    torch._dynamo.reset()  # else the second size of this process is compiled for every size, and rows depend on which were there
    image = np.random.default_rng(0).integers(0, 256, (1, side, side, 3)).astype(np.uint8)
    try:
        sessions = {form: session(make(form), way, side, folder / form, given.threads) for form in FORMS}
    except DependencyError as error:  # no such type on this CPU, or no compiler
        return {"cannot": str(error)}
    found = interleaved_latency(sessions, image, rounds=given.rounds)
    two, one = (found[form].median_ms for form in FORMS)
    return {"two_ms": two, "one_ms": one, "gain": two / one}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=at_least(16), nargs="*", default=[128, 256, 384], help="channels of the beginnings")
    parser.add_argument("--networks", nargs="*", choices=list(PRESETS), default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--sides", type=at_least(64), nargs="+", default=[512, 1024], help="of the image, pixels")
    parser.add_argument("--rounds", type=at_least(1), default=20)
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-projections"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    given = parser.parse_args()
    hardware = describe_hardware()
    subjects: dict[str, Callable[[str], nn.Module]] = {f"beginnings {dim}": partial(beginnings, dim) for dim in given.dims}
    subjects |= {name: partial(network, name) for name in given.networks}
    rows = []
    for name, make in subjects.items():
        for way in given.ways:
            for side in given.sides:
                place = given.output / f"{name}-{way}-{side}".replace(" ", "-")
                of_network = network_of(name) | ({} if name in PRESETS else {"structure": {"stride": STRIDE, "blocks": BLOCKS}})
                settings = {"protocol": PROTOCOL, "rounds": given.rounds, "threads": given.threads, **of_network}
                print(f"{name}, {way}, {side}²", file=sys.stderr)
                row = kept_row(place / "row.json", settings, partial(measure, make, way, side, place, given), hardware=hardware)
                if "cannot" in row:
                    print(f"left out: {name}, {way}: {row['cannot']}", file=sys.stderr)
                    break
                rows.append({"subject": name, "way": way, "side": side, **{key: row[key] for key in ("two_ms", "one_ms", "gain")}})
    if given.json:
        print(json.dumps({"benchmark": "projections", "hardware": {**hardware, "created": now()}, "rows": rows}, indent=1))
        return
    print(f"{'':<18}{'':<16}{'':>6}{'two ms':>10}{'one ms':>10}{'gain':>8}")
    for row in rows:
        print(f"{row['subject']:<18}{row['way']:<16}{row['side']:>5}²{row['two_ms']:>10.2f}{row['one_ms']:>10.2f}{row['gain']:>8.2f}")
    print(f"\n{hardware['cpu']}, {hardware['physical_cores']} cores; {now()}")


if __name__ == "__main__":
    main()
