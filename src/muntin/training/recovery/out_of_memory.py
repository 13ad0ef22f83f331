"""Reaction to a lack of memory: smaller micro-batches first, then more of the forward pass computed again.

Neither changes the mathematics of a step (see `gradients`), so a run that had to shrink ends where a roomy one does, up to rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict
from torch import nn

from muntin.artifact.atomic_files import write_files
from muntin.errors import MuntinError, RecipeError
from muntin.layers.norm import MapNorm, TokenNorm
from muntin.training.config import ActivationBudget, TrainingConfig

Level = Literal["none", "selective", "budget", "full"]
LEVELS: tuple[Level, ...] = ("none", "selective", "budget", "full")
_NEXT: dict[Level, Level] = {"none": "selective", "selective": "full", "budget": "full"}
SMALLER = "memory.json"
"""File of a run with the use of memory that its processes begin with after one lacked memory."""


class MemoryUse(BaseModel):
    """How a step uses memory. `micro_batch`: rows of a process in one pass; `unit`: rows that cannot be separated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    micro_batch: int
    unit: int
    checkpointing: Level

    def halved(self) -> MemoryUse | None:
        """The same with half the micro-batch; None if there is none."""
        half = self.micro_batch // 2 // self.unit * self.unit
        return self.model_copy(update={"micro_batch": half}) if half else None

    def smaller(self) -> MemoryUse | None:
        """The next smaller use; None if there is none."""
        level = _NEXT.get(self.checkpointing)
        return self.halved() or (None if level is None else self.model_copy(update={"checkpointing": level}))

    @property
    def text(self) -> str:
        """In words."""
        return f"micro-batches of {self.micro_batch}, checkpointing {'by ' * (self.checkpointing == 'budget')}{self.checkpointing}"


class MemoryShortError(MuntinError):
    """A process lacked memory while others waited for it. `use`: with which all can start again."""

    def __init__(self, message: str, use: MemoryUse) -> None:
        super().__init__(message)
        self.use = use


def remember_use(directory: Path, use: MemoryUse) -> None:
    """Write how the processes of a run begin after they were started again."""
    write_files(directory, {SMALLER: use.model_dump_json().encode()})


def remembered_use(directory: Path) -> MemoryUse | None:
    """Read what `remember_use` has written; None if nothing."""
    file = directory / SMALLER
    return MemoryUse.model_validate_json(file.read_bytes()) if file.is_file() else None


def forget_use(directory: Path) -> None:
    """Remove it, for a new run."""
    (directory / SMALLER).unlink(missing_ok=True)


def memory_use(model: nn.Module, config: TrainingConfig, rows: int) -> MemoryUse:
    """How a run begins, by its recipe. `rows`: of a batch in each process. Raises `RecipeError` for a micro_batch that norms forbid."""
    unit = inseparable_rows(model.train(), rows, config.norm_group)
    micro_batch = min(rows, config.micro_batch or rows)
    if micro_batch < rows and micro_batch % unit:
        norms = f"its norms take {unit} crops together" if unit < rows else "its batch norms take the whole batch (see training.norm_group)"
        raise RecipeError(f"training.micro_batch {micro_batch}: {norms}: give a multiple of {unit}")
    level: Level = "budget" if isinstance(config.checkpointing, ActivationBudget) else config.checkpointing
    return MemoryUse(micro_batch=micro_batch, unit=unit, checkpointing=level)


def inseparable_rows(model: nn.Module, batch_size: int, norm_group: int | None = None) -> int:
    """Number of rows of a batch that share statistics while training, and so stay in one part: 1 without such norms.

    Those of muntin's models are fixed groups; PyTorch's batch norms take a whole batch. `norm_group`: the recipe's group for both.
    """
    norms = [module for module in model.modules() if module.training]
    if any(isinstance(norm, nn.modules.batchnorm._BatchNorm) for norm in norms):
        return batch_size if norm_group is None else norm_group
    groups = {norm.group for norm in norms if isinstance(norm, MapNorm | TokenNorm)}
    return max(groups, default=1) if norm_group is None or not groups else norm_group
