"""Measurements of a search, on disk: each trial is a folder that is written whole or not at all.

FOLDER/settings.json             settings of the search; the budget is none of them, so that other budgets can be judged
FOLDER/state.json                the budget of the last call, and whether its search has ended
FOLDER/reference/                artifact and score of the FP32 model
FOLDER/trials/000/               plain INT8, without training
FOLDER/trials/001/artifact/      artifact, ready to run
FOLDER/trials/001/model/         the same model for PyTorch (`muntin.load_compressed`)
FOLDER/trials/001/checkpoints/   a run's: the model in training, from which `muntin update` goes on
FOLDER/trials/001/trial.json     forms, predictions and measurements, or why there are none
FOLDER/trials/001/samples.npy    what `evaluate` returned for each sample
FOLDER/training/002/             checkpoints of a trial's training; removed when the trial is measured
FOLDER/tables/1/                 harm and cost of the forms of each layer, for each width
FOLDER/holdout.json              scores on held-out data
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from muntin.artifact.atomic_files import sync_directory, write_files
from muntin.budgeting.budget import Budget, TrialVerdict
from muntin.budgeting.forms.plans import Form, Plan
from muntin.budgeting.scores import Score
from muntin.errors import MuntinError
from muntin.models.eager import ModelInputs, tensors_of
from muntin.training.checkpoint import checkpoints_in

SETTINGS, REFERENCE, TRIALS, TRIAL, HOLDOUT = "settings.json", "reference", "trials", "trial.json", "holdout.json"
BASES, BASE, STATE = "tables", "base.json", "state.json"
ARTIFACT, MODEL, TRAINING, CHECKPOINTS, SAMPLES = "artifact", "model", "training", "checkpoints", "samples.npy"
FORMAT = 3
"""Version of a search's folder."""
Judge = Callable[[Score], dict[str, Any]]
"""Returns the fields `drop`, `bound`, `verdict` and `accepted` of a trial with a score."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A plan that was applied, exported and measured, or could not be.

    `limit`: of harm, at which the plan was proposed. `score`: of `evaluate` on the artifact; `drop`: from the reference; `bound`: its upper
    confidence bound; `accepted`: of `Budget.accepts`. `bytes`: of the artifact; `ms`: median of a call of one row. `failed`: why there are
    no measurements; its score is then minus infinity. `seconds`: time that the trial took.
    """

    number: int
    plan: Plan
    limit: float
    score: float
    drop: float
    bound: float
    bytes: int
    ms: float
    verdict: TrialVerdict
    accepted: bool
    seconds: float
    folder: Path
    failed: str = ""

    @property
    def within(self) -> bool:
        """True if the measured drop is within the budget."""
        return self.verdict in ("kept", "uncertain")

    @property
    def artifact(self) -> Path:
        """The folder of the artifact."""
        return self.folder / ARTIFACT

    def cost(self, objective: str) -> float:
        """Measured bytes or milliseconds."""
        return float(self.bytes) if objective == "size" else self.ms


class TrialFolder:
    """The folder of a search. Raises `MuntinError` if it holds one with other settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        settings = {"format": FORMAT, **settings}
        existing = _read(folder / SETTINGS)
        if existing is None:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / TRIALS).exists():
                raise MuntinError(f"{folder} holds trials without {SETTINGS}: give another folder")
            _write(folder, SETTINGS, settings)
        elif existing.get("format") != FORMAT:
            raise MuntinError(f"{folder} holds a search of another version of muntin: give another folder, or remove this one")
        elif other := sorted(key for key in {*existing, *settings} if existing.get(key) != settings.get(key)):
            shown = ", ".join(f"{key} {_short(existing.get(key))}, not {_short(settings.get(key))}" for key in other)
            raise MuntinError(f"{folder} holds a search with other settings ({shown}): give another folder, or the same settings to go on")

    def reference(self, make: Callable[[Path], tuple[dict[str, Any], Score]]) -> tuple[dict[str, Any], Score]:
        """Return the record and the score of the reference; `make` writes into a folder and returns both if there is none."""
        folder = self.folder / REFERENCE
        record = self._once(folder, "reference.json", lambda part: _recorded(part, *make(part)))
        return record, _score_of(folder, record)

    @property
    def reference_artifact(self) -> Path:
        return self.folder / REFERENCE / ARTIFACT

    def trials(self, judge: Judge) -> list[Trial]:
        """Return the measured trials by number."""
        numbers = sorted(int(path.name) for path in (self.folder / TRIALS).glob("[0-9]*") if (path / TRIAL).exists())
        return [self._trial(number, judge) for number in numbers]

    def trial(self, number: int, plan: Plan, limit: float, make: Callable[[Path], tuple[dict[str, Any], Score]], judge: Judge) -> Trial:
        """Measure a plan: `make` writes artifact and model into a folder, and returns measurements and score.

        An error of `make` is recorded as the trial's failure, unless the disk is full. Nothing is measured if the trial is there.
        """

        def measure(part: Path) -> dict[str, Any]:
            own = {"number": number, "limit": limit, "width": plan.width, "harm": plan.harm, "cost": plan.cost, "forms": _forms(plan)}
            started = time.perf_counter()
            try:
                return own | _recorded(part, *make(part))
            except Exception as error:  # a trial is one of several, and its artifact or score may be at fault
                if isinstance(error, OSError) or isinstance(error.__cause__, OSError):
                    raise
                return own | {"failed": failure(error), "seconds": time.perf_counter() - started}

        self._once(self.folder / TRIALS / f"{number:03d}", TRIAL, measure)
        return self._trial(number, judge)

    def _trial(self, number: int, judge: Judge) -> Trial:
        folder = self.folder / TRIALS / f"{number:03d}"
        record = _read(folder / TRIAL)
        assert record is not None
        common: dict[str, Any] = {"number": number, "plan": plan_of(record), "limit": record["limit"], "folder": folder}
        common["seconds"] = record["seconds"]
        if failed := record.get("failed"):
            lost: dict[str, Any] = {"score": -math.inf, "drop": math.inf, "bound": math.inf, "bytes": 0, "ms": 0.0}
            return Trial(**common, **lost, verdict="failed", accepted=False, failed=failed)
        score = _score_of(folder, record)
        judged = judge(score)
        return Trial(**common, score=score.value, bytes=record["bytes"], ms=record["ms"], **judged)

    def begin(self, terms: Mapping[str, Any]) -> bool:
        """Record the terms of a call. Return True if the search had ended by itself under other terms: then trials are only judged."""
        before = _read(self.folder / STATE) or {}
        ended = bool(before.get("ended")) and before.get("terms") != dict(terms)
        if before.get("terms") != dict(terms):
            _write(self.folder, STATE, {"terms": dict(terms), "ended": False})
        return ended

    def end(self) -> None:
        """Record that the search has ended by itself under its terms."""
        _write(self.folder, STATE, {**(_read(self.folder / STATE) or {}), "ended": True})

    def training(self, number: int) -> Path:
        """The folder for the training of a trial that is not measured yet."""
        return self.folder / TRAINING / f"{number:03d}"

    def forget_training(self, number: int) -> None:
        """Remove the folder of a trial's training, and that of all if it is empty."""
        shutil.rmtree(self.training(number), ignore_errors=True)
        with suppress(OSError):
            (self.folder / TRAINING).rmdir()

    def base(self, width: float, make: Callable[[Path], dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
        """The folder of the tables of a width, and its record; `make` fills the folder if there is none.

        `make` may find what an interrupted call has written whole, and goes on from it.
        """
        folder = self.folder / BASES / f"{width:g}"
        if (record := _read(folder / BASE)) is None:
            folder.mkdir(parents=True, exist_ok=True)
            record = make(folder)
            _write(folder, BASE, record)
        return folder, record

    def holdout(self, number: int | None, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The scores on held-out data of a trial, or of the reference (None); measured by `make` if they are not there."""
        records = _read(self.folder / HOLDOUT) or {}
        key = REFERENCE if number is None else f"{number:03d}"
        if key not in records:
            records[key] = make()
            _write(self.folder, HOLDOUT, records)
        record: dict[str, Any] = records[key]
        return record

    @property
    def held_out(self) -> int:
        """Number of trials whose figures on held-out data are known."""
        return len([key for key in _read(self.folder / HOLDOUT) or {} if key != REFERENCE])

    @staticmethod
    def _once(folder: Path, name: str, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        if (existing := _read(folder / name)) is not None:
            return existing
        part = folder.with_name(f".{folder.name}.partial")
        for left in (part, folder):
            shutil.rmtree(left, ignore_errors=True)
        part.mkdir(parents=True)
        record = make(part)
        _write(part, name, record)
        part.rename(folder)
        sync_directory(folder.parent)
        return record


def measured_trials(folder: Path) -> int:
    """Return the number of measured trials in a search's folder, plain INT8 not counted."""
    return sum(1 for record in (folder / TRIALS).glob(f"[0-9]*/{TRIAL}") if int(record.parent.name))


def recorded_steps(folder: Path) -> int | None:
    """Return the training steps of a search's trials; None for a folder without a search."""
    steps = (_read(folder / SETTINGS) or {}).get("steps")
    return steps if isinstance(steps, int) else None


def keep_newest(training: Path, trial: Path) -> None:
    """Copy the newest checkpoint of a training into the folder of its trial, if there is one."""
    for newest in checkpoints_in(training / CHECKPOINTS)[-1:]:
        shutil.copytree(newest, trial / CHECKPOINTS / newest.name)


def terms_of(budget: Budget) -> dict[str, Any]:
    """Return the values of a budget by which trials are judged."""
    return {"max_drop": budget.max_drop, "confidence": budget.confidence}


def batches_digest(batches: Iterable[ModelInputs]) -> str:
    """sha256 over the tensors of batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in tensors_of(batch):
            _add(digest, tensor)
    return digest.hexdigest()[:16]


def _add(digest: Any, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())


def failure(error: BaseException) -> str:
    """Return an error in one line of at most 300 characters, with its type unless it is muntin's."""
    text = " ".join(str(error).split())[:300] or "no message"
    return text if isinstance(error, MuntinError) else f"{type(error).__name__}: {text}"


def _recorded(part: Path, record: dict[str, Any], score: Score) -> dict[str, Any]:
    """Write the samples of a score beside its record, and return the record with the score."""
    if score.samples is not None:
        np.save(part / SAMPLES, score.samples, allow_pickle=False)
    return {"score": score.value, **record}


def _score_of(folder: Path, record: Mapping[str, Any]) -> Score:
    try:
        samples = np.load(folder / SAMPLES, allow_pickle=False) if (folder / SAMPLES).exists() else None
    except (OSError, ValueError) as error:
        raise MuntinError(f"{folder / SAMPLES} cannot be read ({error}): remove {folder}, and it is measured again") from error
    return Score(record["score"], samples)


def _forms(plan: Plan) -> dict[str, list[int | None]]:
    return {name: [form.rank, form.bits] for name, form in plan.forms.items()}


def plan_of(record: Mapping[str, Any]) -> Plan:
    """The plan of a trial's record."""
    forms = {name: Form(rank, bits) for name, (rank, bits) in record["forms"].items()}
    return Plan(width=record["width"], forms=forms, harm=record["harm"], cost=record["cost"])


def _read(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise MuntinError(f"{file} cannot be read ({reason}): remove its folder, and it is measured again") from error
    if not isinstance(content, dict):
        raise MuntinError(f"{file} holds no record: remove its folder, and it is measured again")
    return content


def _write(folder: Path, name: str, record: Mapping[str, Any]) -> None:
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        write_files(folder, {name: f"{text}\n".encode()})
    except OSError as error:
        raise MuntinError(f"{folder / name} cannot be written ({error.strerror or error}): make room or give another folder") from error


def _short(value: Any) -> str:
    return f"{value!r}"[:120]
