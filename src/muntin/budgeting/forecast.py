"""Time of a search: its limit, and before it begins what it is going to do and about how long that takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from muntin.budgeting.forms.harm import probe_of
from muntin.compression.quantization.embeddings import tables
from muntin.models.eager import ModelInputs, call

QAT_STEPS = 2.0
"""Time of a step of quantisation-aware training with a teacher, in steps of FP32 training."""
PASSES = 2.5
"""Forward passes over the probed rows that the forms of a layer cost."""
PARAMETER_S = 5e-6
"""Seconds for each parameter of the layers, besides the passes: fitted to hybrid-s, ResNet-18 and MobileNetV2 on one machine of two cores,
whose tables took 1.4 to 5 times the passes alone."""


class OutOfTime(BaseException):
    """The time limit has passed between two steps of work; no error, so that no handler of errors catches it."""


class Deadline:
    """The end of a call that began when this was made. `minutes`: None for no limit. `clock`: seconds."""

    def __init__(self, minutes: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if minutes is None else clock() + 60 * minutes
        self.reserve = 0.0
        """Seconds before the end that are kept for the scores on held-out data."""

    def allows(self, seconds: float) -> bool:
        """Return True if work of this length ends in time."""
        return self._end is None or self._clock() + seconds + self.reserve <= self._end

    def check(self) -> None:
        """Raise `OutOfTime` if the time is over."""
        if not self.allows(0.0):
            raise OutOfTime


@dataclass(frozen=True, kw_only=True)
class SearchForecast:
    """Work of a search. Seconds are estimates: of the tables of one width, and of the training of one trial, None if not known.

    `layers`: in the tables; `measured`: trials of earlier calls; `samples`: a sentence on the evaluation data, empty if they are not known.
    """

    layers: int
    table_s: float
    measured: int
    trials: int
    steps: int
    training_s: float | None
    minutes: float | None
    samples: str = ""

    @property
    def text(self) -> str:
        """The forecast in one sentence a line."""
        lines = [
            "FP32 and plain INT8 are exported and scored first",
            f"tables of {self.layers} layers: about {_minutes(self.table_s)}, again for each width that is pruned to",
        ]
        about = "without training" if not self.steps else f"of {self.steps} training steps"
        if self.steps and self.training_s:
            about += f", about {_minutes(self.training_s)} each"
        known = f", {self.measured} of them measured" if self.measured else ""
        lines.append(f"at most {self.trials} trials {about}, then an export and a score each{known}")
        if self.minutes is not None:
            lines.append(f"the limit of {self.minutes:g} minutes covers all of it; no trial begins that is expected to end later")
        return "\n".join([*lines, *([self.samples] if self.samples else [])])


def forecast(
    model: nn.Module, batches: list[ModelInputs], *, steps: int, step_s: float, trials: int, measured: int, minutes: float | None,
    clock: Callable[[], float] = time.perf_counter,
) -> SearchForecast:  # fmt: skip
    """Estimate a search's work. Costs two forward passes over a few rows, whose time the estimate of the tables is based on."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    count, parameters = len(layers) + len(tables(model)), sum(layer.weight.numel() for layer in layers)
    probe = probe_of(model, batches[0])
    with torch.no_grad():
        call(model, probe)
        started = clock()
        call(model, probe)
        pass_s = clock() - started
    return SearchForecast(
        layers=count, table_s=PASSES * count * pass_s + PARAMETER_S * parameters, measured=measured, trials=trials, steps=steps,
        training_s=QAT_STEPS * steps * step_s or None, minutes=minutes,
    )  # fmt: skip


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} seconds" if seconds < 90 else f"{seconds / 60:.1f} minutes"
