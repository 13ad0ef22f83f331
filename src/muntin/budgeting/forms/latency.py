"""The time of each form of a layer in the engine on this machine, measured once for each shape of layer and kept in the user's cache.

    shape of a layer -> a model with one branch for each form -> export -> profile in OpenVINO -> milliseconds of each branch's kernels

    CACHE/latency/<engine>-<version>-<digest of CPU and threads>.json   {"engine", "version", "cpu", "threads", "ms": {shape: {form: ms}}}

A branch is narrow layer, form, narrow layer; the narrow ones in integers, as most layers of a plan are, so that a form in floats has the
time of converting its result, too: a depthwise convolution may be faster in floats alone, and slower with that. Every inference runs all
branches, so they are measured interleaved, and weights come from memory as in a network.
Weights of fewer than 8 bits run in 8, so they have the time of these.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muntin.artifact.atomic_files import write_files
from muntin.budgeting.forms.layer_forms import KEPT, FormLayer, ranks_of
from muntin.budgeting.forms.plans import Form
from muntin.compression import quantize
from muntin.compression.low_rank.factored_layers import shell
from muntin.compression.low_rank.factorization import Dense
from muntin.deployment import export
from muntin.runtime.engines.compile_cache import cache_folder
from muntin.runtime.host.hardware import cpu_identity, describe_hardware
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.kernels import Ceilings
from muntin.runtime.profiling.profile import profile
from muntin.runtime.tiles import Progress

ROUNDS = 30
"""Timed inferences of each shape."""
NARROW = 8
"""Channels of the layers before and after the form."""
SEED = 0
"""Seed of weights and inputs, whose values do not matter."""
_CEILINGS = Ceilings(gmacs={}, copy_gb_s=1.0, threads=1, others=None)
"""Not used: the profile would measure the machine's."""
_OF_FORM, _OF_BRANCH = re.compile(r"forms\.(\d+)\.1(?!\d)"), re.compile(r"forms\.(\d+)\.(?!.*sink_port)")
"""Labels of kernels of a form; names of conversions in a branch, without that of its result."""
Milliseconds = dict[str, dict[str, float]]
"""By shape and form."""


def measured_latencies(
    layers: Mapping[str, FormLayer], *, threads: int | None = None, rounds: int = ROUNDS, progress: Progress = lambda done, total: None
) -> dict[str, dict[Form, float]]:
    """Milliseconds of each form of each layer for one row of the model's inputs: the median of `rounds`, times the calls of the layer.

    A layer with a single form costs 0, since no choice depends on it. Costs 4 to 20 seconds for each shape of layer that the cache does not
    hold, the more ranks the longer, most of it the export. `threads`: None for the usable physical cores. `progress`: called with the
    shapes done and their number.
    """
    options = SessionOptions(threads=threads, cache=False)
    cache = LatencyCache(options.thread_count)
    wanted: dict[str, tuple[FormLayer, dict[str, Form]]] = {}
    timed = {name: one for name, one in layers.items() if len(one.forms) > 1}
    for one in timed.values():
        wanted.setdefault(shape_text(one), (one, {}))[1].update({_form_text(form): form for form in one.forms})
    missing = {key: given for key, given in wanted.items() if not given[1].keys() <= cache.ms.get(key, {}).keys()}
    for done, (key, (one, forms)) in enumerate(missing.items()):
        progress(done, len(missing))
        cache.add(key, _measure(one, forms, options, rounds))
    progress(len(missing), len(missing))
    return {
        name: {form: one.calls * cache.ms[shape_text(one)][_form_text(form)] if name in timed else 0.0 for form in one.forms}
        for name, one in layers.items()
    }


def latency_settings(threads: int | None) -> dict[str, Any]:
    """Conditions of the times besides layers: engine, version, CPU and threads, None for the usable physical cores."""
    version = importlib.metadata.version("openvino")
    used = SessionOptions(threads=threads).thread_count
    return {"engine": "openvino", "version": version, "cpu": describe_hardware()["cpu"], "threads": used}


def shape_text(one: FormLayer) -> str:
    """Conditions of a layer's time in words: "conv 3x3, stride 2x2, 32 to 64 channels, 56x56"."""
    layer = one.layer
    if isinstance(layer, nn.Linear):
        return f"linear, {layer.in_features} to {layer.out_features} features, {'x'.join(map(str, one.shape[:-1])) or '1'} rows"
    sides: list[tuple[str, Any]] = [("stride", layer.stride), ("padding", layer.padding), ("dilation", layer.dilation)]
    usual = {"stride": (1, 1), "padding": tuple(k // 2 for k in layer.kernel_size), "dilation": (1, 1)}
    parts = [f"conv {_by(layer.kernel_size)}", *(f"{name} {_by(value)}" for name, value in sides if tuple(value) != usual[name])]
    parts += [f"{layer.in_channels} to {layer.out_channels} channels", *([f"{layer.groups} groups"] if layer.groups > 1 else [])]
    return ", ".join([*parts, _by(one.shape)])


def _by(sides: Iterable[int]) -> str:
    return "x".join(map(str, sides))


def _form_text(form: Form) -> str:
    rank = "dense" if form.rank is None else f"rank {form.rank}"
    return f"{rank}, {'16 bits' if form.bits == KEPT else '8 bits'}"


class LatencyCache:
    """Measured times in a file of the user's cache; without a cache folder they last as long as this object."""

    def __init__(self, threads: int) -> None:
        self._head = latency_settings(threads)
        digest = hashlib.sha256(f"{cpu_identity()}\n{threads}".encode()).hexdigest()[:16]
        folder = cache_folder()
        self._file = None if folder is None else folder / "latency" / f"{self._head['engine']}-{self._head['version']}-{digest}.json"
        self.ms: Milliseconds = self._read()

    def _read(self) -> Milliseconds:
        """The content of the file; nothing where it is missing or damaged, so that its times are measured again."""
        try:
            content = json.loads(self._file.read_text(encoding="utf-8")) if self._file is not None else {}
            return {str(shape): {str(form): float(ms) for form, ms in forms.items()} for shape, forms in content.get("ms", {}).items()}
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def add(self, shape: str, ms: Mapping[str, float]) -> None:
        """Add the times of a shape and write the file, with those that other processes have added."""
        self.ms = {**self._read(), **self.ms}
        self.ms[shape] = {**self.ms.get(shape, {}), **ms}
        if self._file is None:
            return
        text = json.dumps({**self._head, "ms": self.ms}, indent=1, sort_keys=True)
        with suppress(OSError):  # a full disk, a read-only home
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_files(self._file.parent, {self._file.name: text.encode()})


class _Branches(nn.Module):
    """Narrow layer, form, narrow layer, for each form; (1, ..., NARROW) or (1, NARROW, H, W) in, one output for each form."""

    def __init__(self, layer: Dense, forms: Mapping[str, nn.Module]) -> None:
        super().__init__()
        outputs, inputs = len(layer.weight), layer.weight.shape[1] * getattr(layer, "groups", 1)
        self.names = list(forms)
        kind: Any = nn.Linear if isinstance(layer, nn.Linear) else partial(nn.Conv2d, kernel_size=1)
        self.forms = nn.ModuleList(nn.Sequential(kind(NARROW, inputs), form, kind(outputs, NARROW)) for form in forms.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {f"form{index}": form(x) for index, form in enumerate(self.forms)}


def _measure(one: FormLayer, forms: Mapping[str, Form], options: SessionOptions, rounds: int) -> dict[str, float]:
    """Milliseconds of one call of a layer in each form, by the form's text."""
    generator = torch.Generator().manual_seed(SEED)
    layer = copy.deepcopy(one.layer).cpu().float()
    model = _Branches(layer, {text: _floats(layer, form) for text, form in forms.items()})
    with torch.no_grad():
        for parameter in model.parameters():
            fan = max(1, parameter[0].numel())
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan**0.5)
    shape = (*one.shape[:-1], NARROW) if isinstance(layer, nn.Linear) else (NARROW, *one.shape[1:])
    example = {"x": torch.randn(1, *shape, generator=generator)}
    kept = [f"forms.{index}.1" for index, form in enumerate(forms.values()) if form.bits == KEPT]
    with torch.random.fork_rng(devices=[]):
        quantize(model.eval(), [example], keep=kept, min_sqnr_db=0.0)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "forms"
            export(model, example, path, progress=False)
            kernels = profile(path, options, rounds=rounds, ceilings=_CEILINGS).kernels
    times = dict.fromkeys(forms, 0.0)
    texts = list(forms)
    for kernel in kernels:
        match = _OF_FORM.match(kernel.label) or (_OF_BRANCH.match(kernel.name) if kernel.layer is None else None)
        if match:
            times[texts[int(match[1])]] += kernel.ms
    return {text: round(ms, 4) for text, ms in times.items()}


def _floats(layer: Dense, form: Form) -> nn.Module:
    return copy.deepcopy(layer) if form.rank is None else shell(layer, ranks_of(layer, form.rank))
