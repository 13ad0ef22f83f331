"""A live PyTorch model measured beside what is deployed: as a baseline of `bench`, and layer by layer in PyTorch's own profiler.

Every layer is a range of its dotted name there, and on CUDA an NVTX range too: Nsight Systems shows muntin's names over the kernels.

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

from muntin.compression import load_model
from muntin.errors import DataError
from muntin.models import TorchSession
from muntin.runtime.session import Shape
from muntin.training import Checkpoint

PREFIX = "muntin:"
"""What the names of layers begin with in a trace: PyTorch's own operators have names without it."""
WHOLE = "muntin, one call"
"""The range around all layers in a trace."""


def checkpoint_session(checkpoint: Checkpoint, *, compile: bool = False) -> TorchSession:
    """A checkpoint's model in FP32, compressed or not, as a session on the best device there is. Of one that was quantised it is the
    simulation of training, which is slower than the model in floats, and the session's `engine` says so."""
    session = TorchSession(load_model(checkpoint).to(best_device()), checkpoint.signature, compile=compile)
    if checkpoint.quantized:
        session.engine += ", simulating integers"
    return session


def best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def named_ranges(model: nn.Module) -> Iterator[None]:
    """Inside the block every layer that the model calls is a range of its dotted name: in `torch.profiler`, and on CUDA by NVTX.

    For Nsight Systems: `with named_ranges(model): ...` in a script that `nsys profile --trace=cuda,nvtx` starts. Costs some microseconds a
    layer. The hooks are gone after the block.
    """
    local = threading.local()  # a model may be called by several threads, each with ranges of its own
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
    """Every layer by its dotted name; a model without layers goes by its class."""
    layers = [(name, module) for name, module in model.named_modules() if name]
    yield from layers or [(type(model).__name__, model)]


@dataclass(frozen=True, kw_only=True)
class LiveLayer:
    """A layer without layers of its own: its time in ms, the median over the rounds of all its calls in one forward pass."""

    name: str
    kind: str
    ms: float


@dataclass(frozen=True, kw_only=True)
class LiveProfile:
    """Where a live model's time goes. `whole_ms`: of a forward pass with the profiler on, median; `trace`: the Chrome trace's file."""

    engine: str
    precision: str
    threads: int
    shape: Shape
    whole_ms: float
    layers: tuple[LiveLayer, ...]
    trace: Path


def profile_live(session: TorchSession, images_BHWC: NDArray[np.uint8], trace: Path, *, rounds: int = 10) -> LiveProfile:
    """Profiles a session's model on some images and writes a Chrome trace of the last round. On a GPU a layer's time is the device's.

    Raises DataError for a compiled session, whose layers are fused and never called, and for less than one round.
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
            # A range is there once more as the device saw it, with no time of the CPU's.
            events = [event for event in profiler.key_averages() if event.device_type.name == "CPU"]
            found = {event.key: event for event in events if event.key.startswith((PREFIX, WHOLE))}
            field = "device_time_total" if session.device.type == "cuda" else "cpu_time_total"
            whole.append(found[WHOLE].cpu_time_total / 1e3)
            for name in kinds:
                event = found.get(f"{PREFIX}{name}")
                times[name].append(getattr(event, field) / 1e3 if event is not None else 0.0)
            if round_ == rounds - 1:
                trace.parent.mkdir(parents=True, exist_ok=True)
                profiler.export_chrome_trace(str(trace))
    layers = [LiveLayer(name=name, kind=kinds[name], ms=median(values)) for name, values in times.items() if any(values)]
    return LiveProfile(
        engine=session.engine, precision=session.precision, threads=session.threads, shape=images_BHWC.shape[:3], whole_ms=median(whole),
        layers=tuple(sorted(layers, key=lambda layer: -layer.ms)), trace=trace,
    )  # fmt: skip
