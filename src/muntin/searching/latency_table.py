"""Latency of architectures: parts profiled in INT8 in the engine on this machine, added up, and fitted to some whole networks.

    missing parts -> branches of one graph for each map size -> quantize -> export -> profile -> milliseconds, in the user's cache
    whole networks -> export -> latency;   latency = offset + factor · sum of parts, by least squares

A branch is a narrow layer, the part, a narrow layer. Kernels without a layer's name (conversions, transposes, softmaxes) count for the part
whose kernels ran before them. The sum leaves out what happens between kernels and how parts fuse; offset and factor stand for both.
The error is that of predictions for networks that the fit did not see (leave one out).

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.artifact.atomic_files import write_files
from muntin.budgeting.forms.latency import LatencyCache, latency_settings
from muntin.compression import low_rank, quantize
from muntin.deployment import export
from muntin.errors import MuntinError
from muntin.models import ModelConfig
from muntin.runtime import load
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.kernels import Ceilings, Kernel
from muntin.runtime.profiling.profile import profile
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.searching.candidates import CandidateScorer, recipe_of
from muntin.searching.parts import BLOCK, PartProbe, parts_of
from muntin.searching.space import Architecture, Space, UnbuildableError
from muntin.training.checkpoint import value_changes

BRANCHES = 12
"""Parts that are measured in one graph, at most: an export costs much more than a part."""
ROUNDS = 30
"""Timed inferences of a graph, and of whole networks."""
NARROW = 8
"""Channels of the layers before and after a part."""
SURVEYED = 400
"""Random architectures whose parts are measured before the study, so that few are missing in it."""
FEWEST_FITTED = 3
"""Whole networks from which an offset is fitted, too; of fewer, only the factor."""
CALIBRATION_BATCHES, EXAMPLES = 2, 2
"""Batches that calibrate a whole network, whose accuracy does not matter here, and pictures of its golden pairs."""
FILE = "latency.json"
CACHE = "network-parts"
"""Folder of the user's cache."""
_CEILINGS = Ceilings(gmacs={}, copy_gb_s=1.0, threads=1, others=None)
"""Not used: the profile would measure the machine's."""
_BRANCH = re.compile(r"branches\.(\d+)\.(before|part|after)(?:\.|$)")
_FORM = "int8"


@dataclass(frozen=True, kw_only=True)
class PredictionError:
    """Errors of predicted latencies of whole networks, as shares of the measured ones, each network left out of the fit.

    `rows`: sum of parts, predicted and measured milliseconds of each network.
    """

    rows: tuple[tuple[float, float, float], ...]

    @property
    def shares(self) -> list[float]:
        """|predicted - measured| / measured of each network."""
        return [abs(predicted - measured) / measured for _, predicted, measured in self.rows]

    @property
    def within_tenth(self) -> float:
        """Share of the networks whose latency is predicted within 10 %."""
        return sum(share <= 0.1 for share in self.shares) / len(self.rows)

    def row(self) -> dict[str, Any]:
        """The figures as plain values."""
        return {
            "networks": len(self.rows), "median": statistics.median(self.shares), "largest": max(self.shares),
            "within_tenth": self.within_tenth, "sum_predicted_measured_ms": [list(row) for row in self.rows],
        }  # fmt: skip


class ArchitectureLatency:
    """Predicts milliseconds of one picture of `side` pixels. `folder`: where the measured whole networks are kept.

    `threads`: None for the usable physical cores.
    """

    def __init__(self, base: ModelConfig, side: int, folder: Path, *, threads: int | None = None) -> None:
        self.base, self.side, self.folder = base, side, folder
        self.options = SessionOptions(threads=threads, cache=False)
        self.cache = LatencyCache(self.options.thread_count, CACHE)
        self.conditions = {"side": side, **latency_settings(self.options.thread_count)}
        """Conditions of the latencies of whole networks: side of the picture, engine, version, CPU and threads."""
        self.notes: list[str] = []
        self._measured = self._read()
        self.error: PredictionError | None = None
        self.offset, self.factor = 0.0, 1.0

    def predict(self, architecture: Architecture) -> float:
        """Milliseconds of an architecture. Parts that are missing are measured, in some ten seconds each."""
        parts = parts_of(architecture, self.side)
        self.measure([probe for _, _, probe in parts])
        return self.offset + self.factor * self._sum(architecture)

    def prepare(
        self,
        space: Space,
        *,
        seed: int,
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Measure the parts of `SURVEYED` random architectures of a space."""
        probes = [probe for one in drawn(space, self.base, SURVEYED, seed) for _, _, probe in parts_of(one, self.side)]
        self.measure(probes, stopped=stopped, progress=progress)

    def measure(
        self, probes: Iterable[PartProbe], *, stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:  # fmt: skip
        """Measure the parts that the cache lacks. `progress`: called with the parts measured and their number."""
        missing: dict[tuple[Any, ...], dict[tuple[str, ...], PartProbe]] = {}
        known = set(self.cache.ms)
        for probe in probes:
            if not known.issuperset(probe.keys):
                missing.setdefault((probe.pixels, probe.side, probe.rank_share), {})[probe.keys] = probe
                known.update(probe.keys)
        total, done = sum(map(len, missing.values())), 0
        for group in missing.values():
            all_ = list(group.values())
            for start in range(0, len(all_), BRANCHES):
                if stopped():
                    return
                progress(done, total)
                part = all_[start : start + BRANCHES]
                for key, ms in measured(part, self.options).items():
                    if key not in self.cache.ms:  # the beginning of a stage, measured with another block: costs of a study stay as they are
                        self.cache.add(key, {_FORM: ms})
                done += len(part)
        if total:
            progress(total, total)

    def check(
        self,
        space: Space,
        scorer: CandidateScorer,
        *,
        count: int,
        seed: int,
        stopped: Callable[[], bool] = lambda: False,
        progress: Callable[[int, int], None] = lambda *_: None,
    ) -> None:
        """Measure `count` random whole networks of a space, and fit the prediction to them."""
        for done, one in enumerate(drawn(space, self.base, count, seed + 1)):
            if stopped():
                return
            progress(done, count)
            self.measure([probe for _, _, probe in parts_of(one, self.side)])
            if one.key not in self._measured:
                with suppress(UnbuildableError):  # too small for its ranks
                    self._measured[one.key] = whole_latency(one, scorer, self.side, self.options)
                    self._write()
        whole = [one for one in drawn(space, self.base, count, seed + 1) if one.key in self._measured]
        self._fit([(self._sum(one), self._measured[one.key]) for one in whole])
        progress(count, count)

    def _sum(self, architecture: Architecture) -> float:
        return sum(times * self.cache.ms[key][_FORM] for key, times, _ in parts_of(architecture, self.side))

    def _fit(self, pairs: Sequence[tuple[float, float]]) -> None:
        if not pairs:
            return
        self.offset, self.factor = fitted(pairs)
        if len(pairs) > 1:
            rows = []
            for index, (total, ms) in enumerate(pairs):
                offset, factor = fitted([*pairs[:index], *pairs[index + 1 :]])
                rows.append((total, offset + factor * total, ms))
            self.error = PredictionError(rows=tuple(rows))

    def _read(self) -> dict[str, float]:
        """The stored latencies of whole networks; none, and a note, if they were measured under other conditions than this object's."""
        try:
            content = json.loads((self.folder / FILE).read_text(encoding="utf-8"))
            networks = {str(key): float(ms) for key, ms in content["networks"].items()}
            stored = {key: content.get(key) for key in self.conditions}
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return {}
        if networks and (changes := value_changes(stored, self.conditions)):
            self.notes.append(f"{FILE} holds latencies of whole networks under other conditions ({changes}): they are measured anew")
            return {}
        return networks

    def _write(self) -> None:
        write_files(self.folder, {FILE: json.dumps({**self.conditions, "networks": self._measured}, indent=1).encode()})


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


def fitted(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Offset and factor from (sum of parts, latency), by least squares of relative errors; both 0 or more."""
    sums, latencies = (np.asarray(values, np.float64) for values in zip(*pairs, strict=True))
    scaled = sums / latencies
    factor = float(scaled.sum() / (scaled * scaled).sum())
    if len(pairs) < FEWEST_FITTED:
        return 0.0, factor
    matrix = np.stack([1 / latencies, scaled], axis=1)
    (offset, slope), *_ = np.linalg.lstsq(matrix, np.ones(len(pairs)), rcond=None)
    return (float(offset), float(slope)) if offset >= 0 and slope > 0 else (0.0, factor)


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
            export(model, example, path)
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


def whole_latency(architecture: Architecture, scorer: CandidateScorer, side: int, options: SessionOptions) -> float:
    """Median milliseconds of a network with its shared weights, exported in INT8 for one picture of this size alone."""
    recipe = recipe_of(scorer.recipe, architecture)
    side = max(1, round(architecture.resolution * side))
    network = scorer.network(architecture).cpu()
    batches = [F.interpolate(images.float(), size=(side, side)) for images in scorer.batches[:CALIBRATION_BATCHES]]
    signature = recipe.signature(scorer.classes)
    calibration = None if architecture.bits is not None else batches
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network"
        export(network, batches[0][:EXAMPLES], path, signature=signature, calibration=calibration, sizes="fixed")
        images = np.random.default_rng(0).integers(0, 256, (1, side, side, signature.channels), dtype=np.uint8)
        with closing(load(path, threads=options.threads)) as session:
            calls: Mapping[str, Any] = {"network": session}
            return interleaved_latency(calls, images, rounds=ROUNDS)["network"].median_ms
