"""Latency of architectures: the sum of their parts, each profiled in INT8 in the engine on this machine.

    missing parts -> branches of one graph for each map size -> quantize -> export -> profile -> milliseconds, in the user's cache

A branch is a narrow layer, the part, a narrow layer. Kernels without a layer's name (conversions, transposes, softmaxes) count for the part
whose kernels ran before them. The sum leaves out what happens between kernels and how parts fuse, so it ranks networks; the error is that
of the networks that are deployed at the end.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import random
import re
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muntin.budgeting.forms.latency import LatencyCache
from muntin.compression import low_rank, quantize
from muntin.deployment import export
from muntin.errors import MuntinError
from muntin.models import ModelConfig
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.kernels import Ceilings, Kernel
from muntin.runtime.profiling.profile import profile
from muntin.searching.parts import BLOCK, PartProbe, parts_of
from muntin.searching.space import Architecture, Space, UnbuildableError

ROUNDS = 30
"""Timed inferences of a graph."""
NARROW = 8
"""Channels of the layers before and after a part."""
CACHE = "network-parts"
"""Folder of the user's cache."""
_CEILINGS = Ceilings(gmacs={}, copy_gb_s=1.0, threads=1, others=None)
"""Not used: the profile would measure the machine's."""
_BRANCH = re.compile(r"branches\.(\d+)\.(before|part|after)(?:\.|$)")
_FORM = "int8"


@dataclass(frozen=True, kw_only=True)
class PredictionError:
    """Errors of the predicted latencies of deployed networks, as shares of the measured ones.

    `rows`: predicted and measured milliseconds of each network.
    """

    rows: tuple[tuple[float, float], ...]

    @property
    def shares(self) -> list[float]:
        """|predicted - measured| / measured of each network."""
        return [abs(predicted - measured) / measured for predicted, measured in self.rows]

    @property
    def within_tenth(self) -> float:
        """Share of the networks whose latency is predicted within 10 %."""
        return sum(share <= 0.1 for share in self.shares) / len(self.rows)

    def row(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {
            "networks": len(self.rows), "median": statistics.median(self.shares), "largest": max(self.shares),
            "within_tenth": self.within_tenth, "predicted_measured_ms": [list(row) for row in self.rows],
        }  # fmt: skip


class ArchitectureLatency:
    """Predicts milliseconds of one image of `side` pixels. `threads`: None for the usable physical cores."""

    def __init__(self, side: int, *, threads: int | None = None) -> None:
        self.side = side
        self.options = SessionOptions(threads=threads, cache=False)
        self.cache = LatencyCache(self.options.thread_count, CACHE)

    def predict(self, architecture: Architecture) -> float:
        """Milliseconds of an architecture. Measures the parts that the cache lacks, each in some seconds."""
        parts = parts_of(architecture, self.side)
        self._measure([probe for _, _, probe in parts])
        return sum(times * self.cache.ms[key][_FORM] for key, times, _ in parts)

    def missing(self, architectures: Iterable[Architecture]) -> tuple[int, int]:
        """Number of parts of some architectures, and how many of these the cache lacks."""
        keys = {key for one in architectures for key, *_ in parts_of(one, self.side)}
        return len(keys), len(keys - self.cache.ms.keys())

    def _measure(self, probes: Iterable[PartProbe]) -> None:
        """Measure the parts that the cache lacks, one graph for each map size; the cache keeps each graph's times at once."""
        graphs: dict[tuple[Any, ...], list[PartProbe]] = {}
        known = set(self.cache.ms)
        for probe in probes:
            if not known.issuperset(probe.keys):
                graphs.setdefault((probe.pixels, probe.side, probe.rank_share), []).append(probe)
                known.update(probe.keys)
        for graph in graphs.values():
            for key, ms in measured(graph, self.options).items():
                if key not in self.cache.ms:  # the beginning of a stage, measured with another block: costs of a study stay as they are
                    self.cache.add(key, {_FORM: ms})


def drawn(space: Space, base: ModelConfig, count: int, seed: int) -> list[Architecture]:
    """Some random architectures of a space, the same for the same arguments."""
    generator = random.Random(f"latency:{seed}")  # noqa: S311 - no secret
    found: dict[str, Architecture] = {}
    for _ in range(100 * count):
        if len(found) == count:
            break
        try:
            one = space.architecture(space.sample(generator), base)
            found.setdefault(one.key, one)
        except UnbuildableError:
            continue
    return list(found.values())


class PartBranches(nn.Module):
    """The parts of some probes side by side: `(1, NARROW, H, W)` in, or a picture, one output for each part."""

    def __init__(self, probes: Sequence[PartProbe]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(_Branch(probe) for probe in probes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"part{index}": branch(x) for index, branch in enumerate(self.branches)}


class _Branch(nn.Module):
    def __init__(self, probe: PartProbe) -> None:
        super().__init__()
        self.low = probe.low > 0
        self.before = nn.ModuleList() if probe.pixels else nn.ModuleList([nn.Conv2d(NARROW, probe.channels, 1)])
        if self.low:
            self.before.append(nn.Conv2d(NARROW, probe.low, 1, stride=2))
        self.part = probe.build()
        self.after: nn.Module = nn.Conv2d(probe.outputs, NARROW, 1) if probe.outputs else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps = [before(x_BCHW) for before in self.before] or [x_BCHW]
        out: Tensor = self.after(self.part(*maps[::-1]))
        return out


def measured(probes: Sequence[PartProbe], options: SessionOptions, rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds of the parts of some probes, all of one map size, by their keys: medians of `rounds` inferences of one graph."""
    first = probes[0]
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PartBranches(probes).eval()
    shape = (1, first.channels if first.pixels else NARROW, first.side, first.side)
    values = torch.randint(0, 256, shape, generator=generator).float() if first.pixels else torch.randn(shape, generator=generator)
    example = {"x": values}
    with torch.random.fork_rng(devices=[]):
        for branch in model.branches if first.rank_share < 1 else ():
            keep = [name for name, layer in branch.named_modules() if isinstance(layer, nn.Conv2d) and not name.startswith("part.")]
            with suppress(MuntinError):  # layers that are too small for this share stay as they are
                low_rank(branch, [values], parameters=first.rank_share, criterion="energy", keep=keep)
        quantize(model, [example], min_sqnr_db=0.0, correct_bias=False, smooth=False)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "parts"
            export(model, example, path, progress=False)
            kernels = profile(path, options, rounds=rounds, ceilings=_CEILINGS).kernels
    return attributed(probes, kernels)


def attributed(probes: Sequence[PartProbe], kernels: Iterable[Kernel]) -> dict[str, float]:
    """Milliseconds of each part from the kernels of a graph of branches, in the order of execution.

    A part that several branches have gets the mean of them.
    """
    times = {(index, key): 0.0 for index, probe in enumerate(probes) for key in probe.keys}
    current: tuple[int, str] | None = None
    for kernel in kernels:
        match = _BRANCH.search(kernel.label) or _BRANCH.search(kernel.name)
        if match:
            index = int(match[1])
            keys = probes[index].keys
            in_block = len(keys) > 1 and BLOCK in f"{kernel.label}."
            current = (index, keys[1] if in_block else keys[0]) if match[2] == "part" else None
        if current is not None:
            times[current] += kernel.ms
    of_key: dict[str, list[float]] = {}
    for (_, key), ms in times.items():
        of_key.setdefault(key, []).append(ms)
    return {key: round(statistics.fmean(branches), 4) for key, branches in of_key.items()}
