"""Joins the parts between an HTTP listener and the engine, for `muntin serve` and for Ray Serve's replicas."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from muntin.serving.batching.batcher import Batcher
from muntin.serving.batching.latency_model import LatencyModel
from muntin.serving.batching.workers import Runner
from muntin.serving.config import ServeConfig
from muntin.serving.http.app import HttpApp
from muntin.serving.http.image_route import ImageRoute
from muntin.serving.http.page.routes import PageRoutes
from muntin.serving.inference.executor import Executor
from muntin.serving.inference.metrics import Metrics
from muntin.serving.inference.service import Service
from muntin.serving.memory_budget import MemoryBudget
from muntin.serving.protocol.messages import Limits
from muntin.serving.telemetry.access_log import AccessLog
from muntin.serving.telemetry.exposure import expose
from muntin.serving.telemetry.notify import Notify
from muntin.serving.telemetry.samples import SampleKeeper
from muntin.serving.telemetry.tracing import Tracing
from muntin.serving.versions.control import Control
from muntin.serving.versions.loader import ArtifactLoader
from muntin.serving.versions.repository import Repository
from muntin.serving.versions.slot import Slot

MARGIN_S, MARGIN_SHARE = 0.001, 0.05
"""Seconds, or share of an objective, for reading a request and writing its answer: 0.6 to 0.9 ms at 512 x 512."""


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """The assembled parts that a listener needs."""

    service: Service
    control: Control
    app: HttpApp
    limits: Limits
    budget: MemoryBudget
    log: AccessLog | None


def make_loader(config: ServeConfig) -> ArtifactLoader:
    """Return the loader of the configuration's engine, sizes and batches."""
    return ArtifactLoader(options=config.session_options, max_batch=config.max_batch, sizes=config.sizes, dims=config.dims)


def make_slot(path: str | Path, config: ServeConfig, *, notify: Notify) -> Slot:
    """Return an empty slot, named by the configuration or the folder."""
    return Slot(config.name or model_name(Path(path)), make_loader(config), rollout=config.rollout, notify=notify)


def assemble(
    slot: Slot,
    repository: Repository,
    config: ServeConfig,
    *,
    ending: AsyncExitStack,
    left: Callable[[], float],
    notify: Notify,
    local: bool,
    tracing: Tracing | None = None,
) -> Assembly:
    """Start the parts around a loaded slot. `ending` ends them in the opposite order, but not the slot.

    `left`: seconds left for requests in flight, asked when the parts end. `local`: as of `HttpApp`; otherwise clients
    load and unload with a token, or if the configuration opens that.
    """
    samples = None if config.samples is None else SampleKeeper(config.samples)
    if samples is not None:
        ending.push_async_callback(asyncio.to_thread, samples.close)
        if slot.current is not None and slot.current.signature.task == "tensors":
            notify("--keep-samples: the model takes named tensors, of which none are kept")
    service = _service(slot, config, notify, samples)
    budget = MemoryBudget(config.bounds)
    log = AccessLog() if config.access_log else None
    if log is not None:
        ending.push_async_callback(asyncio.to_thread, log.close)
    expose(service.metrics, service, service.runner, budget, log, samples)
    control = Control(slot, repository, closed=not (local or config.tokens or config.open_control))
    ending.push_async_callback(asyncio.to_thread, control.close)
    pictures = ImageRoute(service, body_bytes=config.bounds.body_bytes)

    def end_computing() -> None:
        pictures.close(left())
        if not service.runner.close(left()):
            slot.end_calls()  # else a hanging engine outlives the server
        service.close()

    ending.push_async_callback(asyncio.to_thread, end_computing)
    limits = Limits(
        body_bytes=config.bounds.body_bytes, json_bytes=config.bounds.json_bytes, elements=config.bounds.body_bytes
    )  # no element takes less than a byte
    page = PageRoutes(service) if config.page else None
    app = HttpApp(
        service, control, pictures, limits=limits, budget=budget, tokens=config.tokens, log=log, tracing=tracing, local=local,
        hosts=config.allowed_hosts, page=page,
    )  # fmt: skip
    ending.push_async_callback(asyncio.to_thread, app.close)
    return Assembly(service=service, control=control, app=app, limits=limits, budget=budget, log=log)


def _service(slot: Slot, config: ServeConfig, notify: Notify, samples: SampleKeeper | None) -> Service:
    """Return the service with its batcher and runner."""
    streams = config.streams
    if (current := slot.current) is not None and current.session.streams < streams:
        streams = current.session.streams
        notify(f"--streams {config.streams}, and there are threads for {streams}: so many batches are computed at once")
    metrics = Metrics(max_rows=config.max_batch)
    executor = Executor(slot)
    objective = None if config.objective_ms is None else config.objective_ms / 1e3
    batcher = Batcher(
        LatencyModel(),
        objective=objective,
        max_rows=config.max_batch,
        queue_rows=config.queue_rows,
        queue_bytes=config.bounds.held_bytes,
        workers=streams,
        margin=MARGIN_S if objective is None else min(MARGIN_S, MARGIN_SHARE * objective),
    )
    runner = Runner(batcher, executor, interrupt=slot.interrupt)
    return Service(
        slot, runner, executor, metrics=metrics, objective=objective, max_rows=config.max_batch, max_pixels=config.bounds.image_pixels,
        keep=None if samples is None else samples.offer,
    )  # fmt: skip


def model_name(path: Path) -> str:
    """Return the name of a model: that of its folder or link, with characters not allowed in a URL replaced."""
    folder = path.resolve().name if path.name in ("", "..") else path.name
    name = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in folder).lstrip("._-")
    return name[:100] or "model"
