"""Profiling of a PyTorch model layer by layer in PyTorch's own profiler.

Each layer is a range with its dotted name, on CUDA also an NVTX range, which Nsight Systems shows above the kernels.

Axes: B images, H W map, C channels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from muntin.errors import DataError
from muntin.models import TorchSession
from muntin.runtime.inputs import Shape

PREFIX = "muntin:"
"""Prefix of the names of layers in a trace, which PyTorch's own operators do not have."""
WHOLE = "muntin, one call"
"""Name of the range around all layers in a trace."""


@contextmanager
def named_ranges(model: nn.Module) -> Iterator[None]:
    """Mark each call of a layer inside the block as a range with its dotted name, in `torch.profiler` and on CUDA by NVTX.

    For Nsight Systems: `with named_ranges(model): ...` in a script that `nsys profile --trace=cuda,nvtx` starts. Costs some microseconds a
    layer. The hooks are removed after the block.
    """
    local = threading.local()  # several threads may call the model
    on_gpu = torch.cuda.is_available()

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if on_gpu:
                torch.cuda.nvtx.range_push(f"{PREFIX}{name}")  # type: ignore[no-untyped-call]
            if not hasattr(local, "ranges"):
                local.ranges = []
            local.ranges.append(record_function(f"{PREFIX}{name}"))
            local.ranges[-1].__enter__()

        return hook

    def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        local.ranges.pop().__exit__(None, None, None)
        if on_gpu:
            torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]

    handles = []
    for name, module in _layers(model):
        handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield each layer with its dotted name; a model without layers has the name of its class."""
    layers = [(name, module) for name, module in model.named_modules() if name]
    yield from layers or [(type(model).__name__, model)]


@dataclass(frozen=True, kw_only=True)
class TorchLayerTime:
    """A layer without sublayers. `ms`: time of all its calls in one forward pass, median over the rounds."""

    name: str
    kind: str
    ms: float


@dataclass(frozen=True, kw_only=True)
class TorchProfile:
    """Times of a PyTorch model. `whole_ms`: median of a forward pass with the profiler on; `trace`: file of the Chrome trace."""

    engine: str
    precision: str
    threads: int
    shape: Shape
    whole_ms: float
    layers: tuple[TorchLayerTime, ...]
    trace: Path


def profile_torch(session: TorchSession, images_BHWC: NDArray[np.uint8], trace: Path, *, rounds: int = 10) -> TorchProfile:
    """Profile a session's model on images and write a Chrome trace of the last round. On a GPU the time of a layer is the device's.

    Raises DataError for a compiled session, which calls no layers, and for less than one round.
    """
    if session.compiled:
        raise DataError(f"a session in {session.engine} calls no layers: profile it without compile=True")
    if rounds < 1:
        raise DataError(f"rounds={rounds}: give a whole number from 1")
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if session.device.type == "cuda" else [])
    kinds = {name: type(module).__name__ for name, module in _layers(session.model) if not any(module.children())}
    times: dict[str, list[float]] = {name: [] for name in kinds}
    whole: list[float] = []
    with named_ranges(session.model):
        session(images_BHWC)
        for round_ in range(rounds):
            with profile(activities=activities) as profiler, record_function(WHOLE):
                session(images_BHWC)
            # The profiler lists each range again for the device, without CPU time.
            events = [event for event in profiler.key_averages() if event.device_type.name == "CPU"]
            ranges = {event.key: event for event in events if event.key.startswith((PREFIX, WHOLE))}
            field = "device_time_total" if session.device.type == "cuda" else "cpu_time_total"
            whole.append(ranges[WHOLE].cpu_time_total / 1e3)
            for name in kinds:
                event = ranges.get(f"{PREFIX}{name}")
                times[name].append(getattr(event, field) / 1e3 if event is not None else 0.0)
            if round_ == rounds - 1:
                trace.parent.mkdir(parents=True, exist_ok=True)
                profiler.export_chrome_trace(str(trace))
    layers = [TorchLayerTime(name=name, kind=kinds[name], ms=median(values)) for name, values in times.items() if any(values)]
    return TorchProfile(
        engine=session.engine, precision=session.precision, threads=session.threads, shape=images_BHWC.shape[:3], whole_ms=median(whole),
        layers=tuple(sorted(layers, key=lambda layer: -layer.ms)), trace=trace,
    )  # fmt: skip
