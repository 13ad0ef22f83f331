"""Measurements of a search, on disk: each trial is a folder that is written whole or not at all.

FOLDER/settings.json             what the search was started with; another search is refused
FOLDER/reference/                the FP32 model's artefact and its scores
FOLDER/trials/001/artifact/      an artefact, ready to run
FOLDER/trials/001/model/         the same model for PyTorch (`muntin.load_compressed`)
FOLDER/trials/001/trial.json     its forms, predictions and measurements
FOLDER/training/002/             what the training of a trial goes on from after an interruption; removed when the trial is measured
FOLDER/tables/1/                 harm and cost of the forms of each layer, for each width
FOLDER/holdout.json              the scores that are reported
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from muntin.artifact.atomic_files import sync_directory, write_files
from muntin.budgeting.forms import Form, Plan
from muntin.errors import MuntinError
from muntin.models.eager import ModelInputs, tensors_of

SETTINGS, REFERENCE, TRIALS, TRIAL, HOLDOUT = "settings.json", "reference", "trials", "trial.json", "holdout.json"
BASES, BASE = "tables", "base.json"
ARTIFACT, MODEL, TRAINING = "artifact", "model", "training"


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One plan that was applied, exported and measured.

    `limit`: of harm, at which the plan was proposed. `score`: of `evaluate` on the artefact; `drop`: from the reference; `bound`: the drop
    that counts (`Budget.confidence`). `bytes`: of the artefact; `ms`: median of a call of one row. `kept`: True if it keeps the budget.
    """

    number: int
    plan: Plan
    limit: float
    score: float
    drop: float
    bound: float
    bytes: int
    ms: float
    kept: bool
    seconds: float
    folder: Path

    @property
    def artifact(self) -> Path:
        """The folder of the artefact."""
        return self.folder / ARTIFACT

    def cost(self, objective: str) -> float:
        """Measured bytes or milliseconds."""
        return float(self.bytes) if objective == "size" else self.ms


class TrialFolder:
    """The folder of a search. Raises `MuntinError` if it holds one with other settings."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        existing = _read(folder / SETTINGS)
        if existing is None:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / TRIALS).exists():
                raise MuntinError(f"{folder} holds trials without {SETTINGS}: give another folder")
            _write(folder, SETTINGS, settings)
        elif other := sorted(key for key in {*existing, *settings} if existing.get(key) != settings.get(key)):
            shown = ", ".join(f"{key} {_short(existing.get(key))}, not {_short(settings.get(key))}" for key in other)
            raise MuntinError(f"{folder} holds a search with other settings ({shown}): give another folder, or the same settings to go on")

    def reference(self, make: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The record of the reference; `make` writes into a folder and returns the record if there is none."""
        return self._once(self.folder / REFERENCE, "reference.json", make)

    @property
    def reference_artifact(self) -> Path:
        return self.folder / REFERENCE / ARTIFACT

    def trial(self, number: int, plan: Plan, limit: float, make: Callable[[Path], dict[str, Any]]) -> Trial:
        """The trial of a plan; `make` writes artefact and model into a folder and returns the measurements if there is none yet.

        A trial that is there keeps its own plan: an integer programme that its time limit ends may find another one.
        """
        folder = self.folder / TRIALS / f"{number:03d}"
        own = {"number": number, "limit": limit, "width": plan.width, "harm": plan.harm, "cost": plan.cost, "forms": _forms(plan)}
        record = self._once(folder, TRIAL, lambda part: own | make(part))
        if record["width"] != plan.width:
            raise MuntinError(f"{folder} is of another plan than this search proposes (another version or machine?): give another folder")
        measured = {key: record[key] for key in ("limit", "score", "drop", "bound", "bytes", "ms", "kept", "seconds")}
        return Trial(number=number, plan=plan_of(record), folder=folder, **measured)

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
    return f"{value!r}"[:40]
