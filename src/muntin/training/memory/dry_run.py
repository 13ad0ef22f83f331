"""A dry run: two steps of a recipe on random crops, what they take of memory, whether it fits, and what would make it fit.

    states       parameters, gradients, optimiser, averaged weights     by formula, and of the tensors that exist after a step
    a step       activations and temporaries                            the activations by count, the peak as measured
    the process  what it holds before a step, plus the step's peak      against training.memory, or the machine's free memory

Nothing is written. The levers are measured one by one, each by a step; sharding over N processes is by formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from muntin.data import open_source
from muntin.errors import RecipeError
from muntin.models.trusted_code import trust_model
from muntin.runtime.host.hardware import available_memory_gib, memory_limit_gib
from muntin.runtime.host.memory import resident
from muntin.training.memory.budget import block_costs, size
from muntin.training.memory.memory_format import keep_freed_memory, return_freed_memory
from muntin.training.memory.peak import watch_peak
from muntin.training.model_checks import check_maps, check_model, measured_precision, random_batch
from muntin.training.optimizer import Muon
from muntin.training.precision import prepare_hardware
from muntin.training.progress.best import BestWeights
from muntin.training.recipe import Recipe, settled
from muntin.training.recovery.memory_bound import memory_bound
from muntin.training.recovery.out_of_memory import LEVELS, MemoryUse
from muntin.training.teachers.opening import open_teacher
from muntin.training.trainer import Trainer
from muntin.training.weights import new_model

PROCESSES = (2, 4, 8, 16)
"""Numbers of processes that are tried for sharding."""


@dataclass(frozen=True, kw_only=True)
class MemoryEntry:
    """One kind of memory, bytes. None: no formula, or unknown on this system."""

    name: str
    formula: int | None
    measured: int | None


@dataclass(frozen=True, kw_only=True)
class Lever:
    """A change, and the process's peak with it, bytes; None where memory was short or is unknown. `settings`: words for `--set`."""

    name: str
    settings: tuple[str, ...]
    peak: int | None
    measured: bool
    fits: bool | None


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Result of `dry_run`, bytes of one process. `limit_name`: where `limit` comes from."""

    device: str
    precision: str
    memory: str
    """Micro-batch and checkpointing, in words."""
    entries: tuple[MemoryEntry, ...]
    held: int | None
    """By the process before a step."""
    peak: int | None
    """Of the process in a step."""
    limit: int | None
    limit_name: str
    fits: bool | None
    """None if the limit or the peak is unknown."""
    levers: tuple[Lever, ...]
    notes: tuple[str, ...]

    @property
    def advice(self) -> str:
        """Return the change that makes the recipe fit, in one line; empty if it fits."""
        if self.fits is not False:
            return ""
        needs = "needs more memory than there is" if self.peak is None else f"needs {size(self.peak)} at its peak"
        text = f"a step with {self.memory} {needs}, and {self.limit_name} is {size(self.limit or 0)}"
        lever = next((lever for lever in self.levers if lever.fits), None)
        if lever is None:
            return f"{text}: no lever makes it fit: take a smaller data.crop or model, or more memory"
        words = " ".join(f"--set {word}" for word in lever.settings)
        if not lever.measured:
            return f"{text}: by formula, {lever.name} makes it fit: {words}, started by torchrun"
        return f"{text}: {words} makes it {size(lever.peak or 0)}, as measured"


def dry_run(recipe: Recipe, *, root: Path) -> DryRun:
    """Run two steps of a recipe on random crops, and one for each lever. Costs the start of a run and about eight steps.

    Raises the errors that `fit` raises for a recipe, data or a model that do not suit.
    """
    trust_model(recipe.model.name)
    recipe = settled(recipe, root)
    source = open_source(recipe.data, task=recipe.task, root=root)
    if source.task != recipe.task:
        raise RecipeError(f"task: the data are for '{source.task}' and the recipe says '{recipe.task}'; make them agree")
    config, data, classes = recipe.training, recipe.data, tuple(source.classes)
    precision = prepare_hardware(config, begun=None)
    torch.manual_seed(recipe.seed)
    model = new_model(recipe, classes)
    notes = check_model(model, recipe, classes)
    teacher, taught = open_teacher(recipe, classes, root)
    precision = measured_precision(model, precision, recipe, classes, teacher=teacher)
    precision = check_maps(model, precision, crop=data.crop, channels=data.channels, requested=config.precision)
    images, target = random_batch(recipe, len(classes), config.batch_size)
    machine = _machine_limit(precision.device)
    with keep_freed_memory(), memory_bound(machine if precision.device == "cpu" else None):
        weight = 0.0 if recipe.teacher is None else recipe.teacher.weight
        trainer = Trainer(model, config, task=recipe.task, precision=precision, teacher=teacher, distillation=weight, seed=recipe.seed)
        steps = _Steps(trainer, images, target)
        first = trainer.memory
        steps.peak(first)  # creates the optimiser's state
        peak = steps.peak(first)
        best = BestWeights(trainer.average, kept=config.gate_budget == 1)
        best.judge([{"step": 0, "score": 0.0}])  # a run holds them from its first validation on
        states = _states(trainer, steps.gradients, best)
        activations = _activations(trainer, images)
        held = steps.held()
        limit, name = (machine, "the free memory") if config.memory is None else (int(config.memory), "training.memory")
        process = None if peak is None or held is None else held + peak
        chosen = tuple(trainer.notes)
        measured = list(_measured_levers(steps, first, compiled=config.compile))
    fits = _fits(process, limit, short=peak is None and steps.known)
    beyond = None if peak is None else max(0, peak - steps.gradients)  # of the peak, what no state is
    entries = (*states, MemoryEntry(name="activations and temporaries", formula=activations, measured=beyond))
    levers = [replace(lever, fits=_fits(lever.peak, limit, short=lever.peak is None and steps.known)) for lever in measured]
    if process is not None:
        levers += [replace(lever, fits=_fits(lever.peak, limit)) for lever in _sharded(trainer, states, process, beyond or 0, limit)]
    return DryRun(
        device=precision.device, precision=f"{precision.name}: {precision.reason}", memory=first.text, entries=entries, held=held,
        peak=process, limit=limit, limit_name=name, fits=fits, levers=tuple(levers), notes=(*notes, *taught, *chosen),
    )  # fmt: skip


def _fits(peak: int | None, limit: int | None, *, short: bool = False) -> bool | None:
    if short:
        return False
    return None if peak is None or limit is None else peak <= limit


class _Steps:
    """Steps of a trainer that leave its weights as they are. `gradients`: bytes of a step's gradients."""

    def __init__(self, trainer: Trainer, images: Tensor, target: Tensor) -> None:
        self.trainer, self.images, self.target = trainer, images, target
        self.gradients = 0
        self.known = True
        """False if this system does not tell the peak."""
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._count)  # type: ignore[no-untyped-call]
        self._counted: set[int] = set()

    def _count(self, parameter: Tensor) -> None:
        if id(parameter) not in self._counted and parameter.grad is not None:
            self._counted.add(id(parameter))
            self.gradients += parameter.grad.untyped_storage().nbytes()

    def peak(self, use: MemoryUse) -> int | None:
        """Peak of a step beyond what is held before it, bytes; None if memory was short, or is unknown."""
        self.trainer.use_memory(use)
        with watch_peak(self.trainer.precision.device) as watch:
            self.trainer.update(0, self.images, self.target, done=0.0)  # the learning rate is 0 at the start
        if self.trainer.memory.micro_batch != use.micro_batch and use.checkpointing != "budget":
            return None  # it shrank
        self.known = watch.peak is not None
        return watch.peak

    def held(self) -> int | None:
        """Bytes that the process holds between steps."""
        if self.trainer.precision.device == "cuda":
            return torch.cuda.memory_allocated()
        return_freed_memory()
        return resident()[0]


def _machine_limit(device: str) -> int | None:
    """Bytes that this process may hold, with those that it holds already; None where unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    held, available, container = resident()[0], available_memory_gib(), memory_limit_gib()
    limits = [] if held is None or available is None else [held + int(available * 2**30)]
    limits += [] if container is None else [int(container * 2**30)]
    return min(limits, default=None)


def _states(trainer: Trainer, gradients: int, best: BestWeights) -> list[MemoryEntry]:
    """The states of a trainer after a step."""
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    weights = sum(t.numel() * t.element_size() for t in _weights(trainer.model))
    optimizer = trainer.optimizer
    kept = [tensor for state in optimizer.state.values() for tensor in state.values() if isinstance(tensor, Tensor)]
    by_formula = None
    if isinstance(optimizer, Muon):  # a momentum for matrices, two moments for the rest
        by_formula = sum(
            (1 if group["matrices"] else 2) * p.numel() * p.element_size() for group in optimizer.param_groups for p in group["params"]
        )
    return [
        MemoryEntry(name="parameters and buffers", formula=weights, measured=_bytes(_weights(trainer.model))),
        MemoryEntry(name="gradients", formula=trained, measured=gradients),
        MemoryEntry(name="optimiser", formula=by_formula, measured=_bytes(kept)),
        MemoryEntry(name="averaged weights", formula=weights, measured=_bytes(_weights(trainer.average.model))),
        MemoryEntry(name="best averaged weights", formula=weights if best.kept else 0, measured=best.bytes),
        *(
            [MemoryEntry(name="teacher", formula=_bytes(_weights(trainer.teacher)), measured=_bytes(_weights(trainer.teacher)))]
            if trainer.teacher is not None
            else []
        ),
    ]


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, each counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _activations(trainer: Trainer, images: Tensor) -> int | None:
    """Bytes that a micro-batch's forward pass keeps for the gradient, counted on the smallest micro-batch; None if only some blocks are
    recomputed."""
    use, level = trainer.memory, trainer.memory.checkpointing
    if level not in ("none", "full") or trainer.config.compile:
        return None
    part = images[: min(use.unit, use.micro_batch)]
    pixels = part.to(trainer.precision.device, torch.float32, memory_format=torch.channels_last)
    weights = {tensor.untyped_storage().data_ptr() for tensor in _weights(trainer.model)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # see `block_costs`

    if level == "full":
        trainer.checkpointing.remove()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), trainer.precision.autocast():
        answer = trainer.model(pixels)
    del answer
    total = sum(kept.values())
    if level == "full":
        with trainer.precision.autocast():
            costs = block_costs(trainer.checkpointing, trainer.model, lambda: trainer.model(pixels))
        total -= sum(cost.kept for cost in costs.values())
    return max(0, total) * use.micro_batch // len(part)


def _measured_levers(steps: _Steps, use: MemoryUse, *, compiled: bool) -> Iterator[Lever]:
    """The levers of one process, from the cheapest to the most expensive in time."""
    levels = () if compiled else tuple(level for level in ("selective", "full") if LEVELS.index(level) > LEVELS.index(use.checkpointing))
    smaller = (use.unit,) if use.unit < use.micro_batch else ()
    changes: list[dict[str, object]] = [{"checkpointing": level} for level in levels[:1]]
    changes += [{"micro_batch": micro_batch} for micro_batch in smaller]
    changes += [{"checkpointing": level} for level in levels[1:]]
    changes += [{"micro_batch": micro_batch, "checkpointing": level} for micro_batch in smaller for level in levels[-1:]]
    for change in changes:
        peak, held = steps.peak(use.model_copy(update=change)), steps.held()
        settings = tuple(f"training.{key}={value}" for key, value in change.items())
        name = ", ".join(f"{key} {value}" for key, value in change.items())
        process = None if peak is None or held is None else held + peak
        yield Lever(name=name, settings=settings, peak=process, measured=True, fits=None)


def _sharded(trainer: Trainer, states: list[MemoryEntry], process: int, activations: int, limit: int | None) -> Iterator[Lever]:
    """The levels of sharding by formula, each over the fewest processes that make it fit, or over the most."""
    parameters, gradients, optimizer, average, best = (entry.measured or 0 for entry in states[:5])
    average += best
    rest = process - parameters - gradients - optimizer - average - activations
    blocks = trainer.checkpointing.blocks.values()
    largest = max((_bytes(block.parameters()) for block in blocks), default=0)
    batch, micro_batch = trainer.config.batch_size, trainer.memory.micro_batch
    whole = {
        "zero1": (parameters + gradients + average, optimizer),
        "zero2": (parameters, gradients + average + optimizer),
        "zero3": (largest, parameters + gradients + average + optimizer),
    }
    counts = [count for count in PROCESSES if batch % count == 0 and batch // count % min(trainer.memory.unit, batch // count) == 0]
    for level, (each, shared) in whole.items():
        for count in counts:
            rows = min(micro_batch, batch // count)
            peak = rest + each + shared // count + activations * rows // micro_batch
            if count == counts[-1] or limit is None or peak <= limit:
                settings = (f"training.sharding={level}",)
                yield Lever(name=f"sharding {level} over {count} processes", settings=settings, peak=peak, measured=False, fits=None)
                break
