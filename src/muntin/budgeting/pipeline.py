"""`muntin.compress`: the smallest or fastest form of a model whose deployed artefact keeps an accuracy budget.

reference artefact (FP32) -> tables of harm and cost -> search { plan -> apply -> train -> export -> evaluate the artefact } -> holdout
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from muntin.artifact import AnyArtifact, Signature, open_any_artifact
from muntin.artifact.file_lock import folder_in_use
from muntin.budgeting.budget import Budget, Objective
from muntin.budgeting.candidate import CandidateTraining, Course, TargetLoss, apply_plan, narrowed
from muntin.budgeting.deployed import Deployed, Interface, deploy, interface_of
from muntin.budgeting.forms import Form, Plan
from muntin.budgeting.latency import latency_settings
from muntin.budgeting.layer_forms import KEPT
from muntin.budgeting.scores import Evaluate, Score, drop_bound, drop_interval, score_of
from muntin.budgeting.search import Base, Search, front
from muntin.budgeting.tables import TableProgress, assign_forms, build_tables, model_digest
from muntin.budgeting.trials import ARTIFACT, MODEL, Trial, TrialFolder, batches_digest
from muntin.compression import load_compressed, save
from muntin.compression.calibration import calibration_list
from muntin.compression.history import history
from muntin.compression.quantization.embeddings import tables
from muntin.compression.rewrite import check_kept, keepable, named
from muntin.errors import MuntinError
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, check_eager, eager_copy
from muntin.training.config import BudgetConfig
from muntin.training.recipe import load_recipe, parse_recipe

LEARNING_RATE = 1e-3
"""Default of the training of candidates."""
SearchOutcome = Literal["kept", "not reachable", "not tried"]
OpenBase = Callable[[float, nn.Module, Sequence[ModelInputs], Path, Objective, TableProgress], Base]
"""Makes the plans of a width from the narrowed model, calibration batches, a folder for tables, and what is to be made least."""


class TablePlans:
    """The plans of least cost of one width, by the tables of the forms of its layers, which are measured if the folder has none.

    Bytes include those of the other parameters, in 16 bits: widths differ in them, too. `keep`, `dense`: as of `compress`.
    """

    def __init__(
        self, width: float, model: nn.Module, batches: Sequence[ModelInputs], folder: Path, objective: Objective, report: TableProgress,
        *, keep: Sequence[str] = (), dense: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.width, self.objective = width, objective
        self.tables = build_tables(model, batches, folder, objective=objective, progress=report).without(keep, dense)
        rows = self.tables.layers.values()
        self._least, self._most = (sum(which(row.harm for row in layer) for layer in rows) for which in (min, max))
        chosen = sum(next(row.parameters for row in layer if row.form == Form(None, KEPT)) for layer in rows)
        others = sum(parameter.numel() for parameter in model.parameters()) - chosen
        self._fixed = 2 * others if objective == "size" else 0

    def propose(self, limit: float) -> Plan | None:
        limit = min(limit, self._most)
        if limit < self._least:
            return None
        plan = assign_forms(self.tables, limit, self.objective)
        return replace(plan, width=self.width, cost=plan.cost + self._fixed)


@dataclass(frozen=True, kw_only=True)
class SearchProgress:
    """State of a search. `trials`: those so far; `number`: of the trial; `what`: of the tables is measured; `loss`: of the step."""

    stage: Literal["reference", "tables", "trial", "train", "holdout"]
    trials: tuple[Trial, ...] = ()
    number: int = 0
    what: str = ""
    step: int = 0
    steps: int = 0
    loss: float | None = None


SearchReport = Callable[[SearchProgress], None]


@dataclass(frozen=True, kw_only=True)
class Holdout:
    """The figures to report, on data that the search has not seen: scores, and the `interval` of the drop (95 %), None without samples."""

    reference: float
    score: float
    drop: float
    interval: tuple[float, float] | None
    samples: int | None


@dataclass(frozen=True, kw_only=True)
class CompressionResult:
    """The result of `muntin.compress`.

    `model`: for PyTorch, in integers; a copy of the FP32 model if nothing was tried. `artifact`: the chosen one, or the reference's.
    `kept`: True if the budget is kept by `evaluate` on it. `best`: the chosen trial. `rows`: plain values of the reference and each trial.
    `changes`: what the passes did to the model. `noise`: by how much two calls of `evaluate` differ.
    """

    model: nn.Module
    artifact: AnyArtifact
    kept: bool
    outcome: SearchOutcome
    budget: Budget
    reference: float
    noise: float
    best: Trial | None
    trials: tuple[Trial, ...]
    rows: tuple[dict[str, Any], ...]
    holdout: Holdout | None
    changes: tuple[Change, ...]
    notes: tuple[str, ...]
    folder: Path

    @property
    def front(self) -> tuple[Trial, ...]:
        return tuple(front(self.trials, self.budget.objective))


def compress(
    model: nn.Module,
    *,
    calibration: Iterable[ModelInputs],
    evaluate: Evaluate,
    budget: Budget,
    finetune: Iterable[Any] | None = None,
    loss: TargetLoss | None = None,
    holdout: Evaluate | None = None,
    recipe: BudgetConfig | Mapping[str, Any] | Path | str | None = None,
    folder: Path | str | None = None,
    signature: Signature | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    keep: Sequence[str] = (),
    dense: Sequence[str] = (),
    step_seconds: float = 0.0,
    progress: SearchReport = lambda progress: None,
    plans: OpenBase | None = None,
    course: Course | None = None,
) -> CompressionResult:
    """Find the form of a model with the fewest bytes, or the least latency, whose artefact keeps an accuracy budget.

    Works on copies. `calibration`: batches of typical inputs: raw pixels `(B, C, H, W)`, 0-255, or other tensors, alone, as a tuple or by
    name. `evaluate`: called with a callable that takes the model's own input tensors and answers from the deployed artefact; returns a
    score, higher is better, or one for each sample `(N,)`, or the intersection and union of each class in each sample `(N, K, 2)`, whose
    score is the mean IoU. `holdout`: like it, on other data, for the figures that are reported: called once with the FP32 model's artefact
    and once with the chosen one.

    `finetune`: batches of inputs, on which each candidate learns the FP32 model's answers, or of (inputs, targets) with
    `loss(answer, targets)`. Without it nothing is trained. `recipe`: limits and settings of the search, `BudgetConfig`, its values by name
    (`{"trials": 5}`), or the path of a recipe, of which its section `budget` counts. The search ends at the nearer limit of trials and
    minutes; no trial begins that would end later, if it takes as long as the longest one, and no tables of a width. `step_seconds`: time of
    a step of training, if known, by which the first trial is judged. What has begun is finished: the scores of the FP32 model, the tables
    of the first width.

    `signature`: of an image model, by default inferred. `folder`: of all trials, each with its artefact; by default a new temporary one. A
    search that was interrupted goes on if it is called again with the same arguments and folder, and the result is the same; a search of
    other settings in the folder is an error. `settings`: plain values that count among these, such as what `finetune` and `evaluate` depend
    on. `keep`: names or patterns of layers that stay in 16 bits, unfactored, with all their outputs, and of embeddings and products that
    stay in floats; `dense`: of layers that stay unfactored. `plans`: makes the plans of a width; by default from tables of harm and cost.
    `course`: trains candidates, in place of `finetune` and `loss`.

    Costs for each trial the passes and the training of one candidate, an export, and one evaluation. Raises `MuntinError` for a model that
    cannot be compressed or measured. A budget out of reach is no error: `kept` is then False, and the result is the trial with the least
    drop.
    """
    check_eager(model)
    if not isinstance(budget, Budget):
        raise MuntinError(f"budget is a {type(budget).__name__}: give muntin.Budget(max_drop=0.01)")
    check_kept(keep, {**keepable(model), **tables(model)})
    check_kept(dense, dict(named(model, nn.Linear, nn.Conv2d)), argument="dense")
    plans = plans or partial(TablePlans, keep=keep, dense=dense)
    config = budget_config(recipe)
    course = course or _training(finetune, loss, config)
    batches = calibration_list(calibration)
    teacher = eager_copy(model).eval()
    agreed = {
        **(settings or {}),
        "model": model_digest(teacher), "calibration": batches_digest(batches), "max_drop": budget.max_drop, "objective": budget.objective,
        "confidence": budget.confidence, "steps": None if course is None else course.steps, "loss": False, "learning_rate": None,
        **({} if course is None else course.settings), "widths": list(config.widths), "seed": seed,
        **{name: list(entries) for name, entries in (("keep", keep), ("dense", dense)) if entries},
        **(latency_settings(None) if budget.objective == "latency" else {}),  # milliseconds of two machines do not compare
    }  # fmt: skip
    place = Path(tempfile.mkdtemp(prefix="muntin-compress-")) if folder is None else Path(folder)
    with folder_in_use(place, "muntin.compress") as notes:
        work = _BudgetedCompression(
            teacher, batches, interface_of(teacher, batches, signature), TrialFolder(place, agreed), budget,
            evaluate=evaluate, course=course, open_base=plans, step_seconds=step_seconds, seed=seed, keep=keep,
            progress=progress,
        )  # fmt: skip
        result = work.run(config, holdout=holdout)
    kept_in = (f"the trials are in {place}: give folder to choose the place",) if folder is None else ()
    return replace(result, notes=(*notes, *result.notes, *kept_in))


def budget_config(recipe: BudgetConfig | Mapping[str, Any] | Path | str | None) -> BudgetConfig:
    """Settings of a search from what `compress` takes as `recipe`. Raises `RecipeError`."""
    if isinstance(recipe, BudgetConfig):
        return recipe
    if isinstance(recipe, Path | str):
        return load_recipe(recipe).budget
    return parse_recipe({"budget": dict(recipe or {})}, where="recipe").budget


def _training(finetune: Iterable[Any] | None, loss: TargetLoss | None, config: BudgetConfig) -> CandidateTraining | None:
    if finetune is None:
        if loss is not None or config.steps:
            raise MuntinError(f"{'loss' if loss is not None else 'steps'} is for training, and finetune has no data: give batches")
        return None
    steps = config.steps
    if steps is None:
        if not isinstance(finetune, Sized):
            raise MuntinError("finetune has no length: give steps in the recipe, the number of batches to train a candidate on")
        steps = len(finetune)
    rate = LEARNING_RATE if config.learning_rate is None else config.learning_rate
    return CandidateTraining(data=finetune, steps=steps, loss=loss, learning_rate=rate) if steps else None


class _BudgetedCompression:
    def __init__(
        self,
        teacher: nn.Module,
        batches: list[ModelInputs],
        interface: Interface,
        folder: TrialFolder,
        budget: Budget,
        *,
        evaluate: Evaluate,
        course: Course | None,
        open_base: OpenBase,
        step_seconds: float,
        seed: int,
        keep: Sequence[str],
        progress: SearchReport,
    ) -> None:
        self.teacher, self.batches, self.interface, self.folder, self.budget = teacher, batches, interface, folder, budget
        self.evaluate, self.course, self.make_base, self.seed, self.progress = evaluate, course, open_base, seed, progress
        self.keep, self.narrowed = keep, dict[float, nn.Module]()
        self.first_seconds = 0.0 if course is None else course.steps * step_seconds
        """Time that the first trial takes at least."""
        self.base_seconds = 0.0
        """The longest recorded time of the tables of a width."""
        self.exact_floats = False
        """True if float layers run in 32 bits, because 16 alone would spend more than half of the budget."""
        self.seconds = 0.0
        """Recorded time of everything so far, also of runs before this one."""
        self.trials: tuple[Trial, ...] = ()

    def run(self, config: BudgetConfig, *, holdout: Evaluate | None) -> CompressionResult:
        self.progress(SearchProgress(stage="reference"))
        record = self.folder.reference(self._reference)
        self.seconds += record["seconds"]
        self.reference = Score(record["score"], None if record["samples"] is None else np.asarray(record["samples"]))
        self.exact_floats = record.get("narrow_drop", 0.0) > self.budget.max_drop / 2
        minutes = config.minutes

        def may_go_on(done: Sequence[Trial], opening: bool) -> bool:
            ahead = max((trial.seconds for trial in done), default=self.first_seconds) + (self.base_seconds if opening else 0.0)
            return len(done) < config.trials and (minutes is None or self.seconds + ahead <= 60 * minutes) and minutes != 0

        search = Search(list(config.widths), self._open_base, self._attempt, self.budget, may_go_on=may_go_on)
        search.run()
        return self._result(search, record, holdout, minutes=minutes)

    def _reference(self, part: Path) -> dict[str, Any]:
        started = time.perf_counter()
        deploy(self.teacher, self.interface, self.batches[0], part / ARTIFACT)
        with self._deployed(part / ARTIFACT, precision="f32") as deployed:
            first, second = (self._score(self.evaluate, deployed, "evaluate", "the FP32 model") for _ in range(2))
            record = {
                "score": first.value, "noise": abs(first.value - second.value), "bytes": deployed.bytes,
                "ms": deployed.latency_ms(self.batches[0]), "samples": None if first.samples is None else first.samples.tolist(),
            }  # fmt: skip
        with self._deployed(part / ARTIFACT) as deployed:
            if deployed.session.precision != "f32":
                narrow = self._score(self.evaluate, deployed, "evaluate", "the model in 16 bits")
                record["narrow_drop"] = first.value - narrow.value
        return record | {"seconds": time.perf_counter() - started}

    def _open_base(self, width: float) -> Base:
        def report(what: str, done: int, total: int) -> None:
            self.progress(SearchProgress(stage="tables", trials=self.trials, what=what, step=done, steps=total))

        def open_in(folder: Path) -> Base:
            return self.make_base(width, self._narrowed(width), self.batches, folder, self.budget.objective, report)

        def make(part: Path) -> dict[str, Any]:
            started = time.perf_counter()
            open_in(part)
            return {"width": width, "seconds": time.perf_counter() - started}

        report("pruning" if width < 1 else "forms", 0, 1)
        place, record = self.folder.base(width, make)
        self.seconds += record["seconds"]
        self.base_seconds = max(self.base_seconds, record["seconds"])
        return open_in(place)

    def _narrowed(self, width: float) -> nn.Module:
        if width not in self.narrowed:
            self.narrowed[width] = narrowed(self.teacher, width, self.batches, keep=self.keep)
        return self.narrowed[width]

    def _attempt(self, number: int, plan: Plan, limit: float) -> Trial:
        self.progress(SearchProgress(stage="trial", trials=self.trials, number=number))
        trial = self.folder.trial(number, plan, limit, lambda part: self._measure(number, plan, part))
        self.folder.forget_training(number)
        self.trials = (*self.trials, trial)
        self.seconds += trial.seconds
        return trial

    def _measure(self, number: int, plan: Plan, part: Path) -> dict[str, Any]:
        started, course, earlier = time.perf_counter(), self.course, 0.0

        def report(step: int, loss: float) -> None:
            steps = 0 if course is None else course.steps
            self.progress(SearchProgress(stage="train", trials=self.trials, number=number, step=step, steps=steps, loss=loss))

        def train(model: nn.Module) -> None:
            nonlocal earlier
            assert course is not None
            earlier = course.train(model, self.teacher, seed=self.seed, folder=self.folder.training(number), report=report)

        base = self._narrowed(plan.width)
        model = apply_plan(base, plan, self.batches, keep=self.keep, train=None if course is None else train)
        deploy(model, self.interface, self.batches[0], part / ARTIFACT, exact=self.exact_floats)
        save(model, part / MODEL)
        with self._deployed(part / ARTIFACT) as deployed:
            score = self._score(self.evaluate, deployed, "evaluate", f"trial {number}")
            bound = drop_bound(self.reference, score, self.budget.confidence)
            return {
                "score": score.value, "drop": self.reference.value - score.value, "bound": bound, "kept": self.budget.keeps(bound),
                "bytes": deployed.bytes, "ms": deployed.latency_ms(self.batches[0]), "seconds": earlier + time.perf_counter() - started,
            }  # fmt: skip

    def _score(self, function: Evaluate, deployed: Deployed, called: str, what: str) -> Score:
        return score_of(function, deployed, called=called, what=what, folder=self.folder.folder)

    def _deployed(self, path: Path, *, precision: str = "recorded") -> Deployed:
        return Deployed(path, self.interface, precision=precision)

    def _result(self, search: Search, record: dict[str, Any], holdout: Evaluate | None, *, minutes: float | None) -> CompressionResult:
        best = search.best
        kept = best is not None and best.kept
        outcome: SearchOutcome = "not tried" if best is None else "kept" if kept else "not reachable"
        notes = [*self._noise(record["noise"]), *self._narrow(record), *self._uncertain(), *search.notes]
        if best is None:
            why = "minutes is 0" if minutes == 0 else "the limit of trials or minutes was reached before"
            if minutes and self.seconds <= 60 * minutes < self.seconds + self.first_seconds:
                why = f"minutes is {minutes:g}, of which {self.seconds / 60:.2g} are used, and a candidate's training takes at least "
                why += f"{self.first_seconds / 60:.2g}, at the speed of the first one: give more minutes, or fewer steps"
            notes.append(f"nothing was tried: {why}")
        elif not kept:
            what = "the least harmful plan loses more, too" if search.unreachable else f"none of {len(search.trials)} trials keeps it"
            notes.append(f"a drop of at most {self.budget.max_drop:g} was not reached: {what}; the result is the trial with the least drop")
            if (within := sum(self.budget.keeps(trial.drop) for trial in search.trials)) and self.reference.samples is not None:
                notes.append(
                    f"{within} of the trials keep it on the {len(self.reference.samples)} samples of evaluate, but not with a certainty of "
                    f"{self.budget.confidence} on others: give more samples, a greater drop or a smaller confidence"
                )
        elif search.stopped:
            better = "a smaller" if self.budget.objective == "size" else "a faster"
            notes.append(f"stopped at the limit of trials or minutes: with more, {better} model may be found")
        figures = None
        if holdout is not None and best is not None:
            self.progress(SearchProgress(stage="holdout", trials=self.trials))
            figures = self._held_out(holdout, best)
            notes += self._about(figures)
        model = eager_copy(self.teacher)
        path = self.folder.reference_artifact if best is None else best.artifact
        if best is not None:
            model = load_compressed(best.folder / MODEL, model)
        return CompressionResult(
            model=model, artifact=open_any_artifact(path), kept=kept, outcome=outcome, budget=self.budget,
            reference=self.reference.value, noise=record["noise"], best=best, trials=tuple(search.trials),
            rows=_rows(record, self.folder.reference_artifact, search.trials), holdout=figures, changes=history(model),
            notes=tuple(notes), folder=self.folder.folder,
        )  # fmt: skip

    def _noise(self, noise: float) -> list[str]:
        if not noise:
            return []
        note = f"evaluate is noisy: two calls on the FP32 model differ by {noise:.4g}"
        if noise > self.budget.max_drop / 2:
            note += f", more than half of max_drop {self.budget.max_drop:g}: whether the budget is kept is uncertain; use more samples"
        return [note]

    def _narrow(self, record: Mapping[str, Any]) -> list[str]:
        if not self.exact_floats:
            return []
        return [f"float layers run in 32 bits: in 16 the FP32 model alone loses {record['narrow_drop']:.4g}, more than half of max_drop"]

    def _uncertain(self) -> list[str]:
        samples = self.reference.samples
        if self.budget.confidence is None or (samples is not None and len(samples) > 1):
            return []
        got = "one number" if samples is None else "one sample"
        return [f"evaluate returned {got}: the measured drop counts as it is, without a margin for data that it has not seen"]

    def _held_out(self, holdout: Evaluate, best: Trial) -> Holdout:
        def measure(path: Path, what: str, precision: str) -> dict[str, Any]:
            with self._deployed(path, precision=precision) as deployed:
                score = self._score(holdout, deployed, "holdout", what)
            return {"score": score.value, "samples": None if score.samples is None else score.samples.tolist()}

        records = (
            self.folder.holdout(None, lambda: measure(self.folder.reference_artifact, "the FP32 model", "f32")),
            self.folder.holdout(best.number, lambda: measure(best.artifact, f"trial {best.number}", "recorded")),
        )
        reference, score = (
            Score(one["score"], None if one["samples"] is None else np.asarray(one["samples"], np.float64)) for one in records
        )
        return Holdout(
            reference=reference.value, score=score.value, drop=reference.value - score.value,
            interval=drop_interval(reference, score, seed=self.seed), samples=None if score.samples is None else len(score.samples),
        )  # fmt: skip

    def _about(self, figures: Holdout) -> list[str]:
        notes = []
        if figures.interval is None:
            notes.append("the figures of holdout have no interval: return a score for each sample, and there is one")
        if (times := self.folder.held_out) > 1:
            notes.append(f"holdout was called for {times} chosen trials of this folder: the figures are less independent")
        return notes


def _rows(reference: dict[str, Any], artifact: Path, trials: Iterable[Trial]) -> tuple[dict[str, Any], ...]:
    measured = {key: reference[key] for key in ("score", "bytes", "ms")}
    first = {"trial": 0, "width": 1.0, "drop": 0.0, "bound": 0.0, **measured, "kept": True, "artifact": str(artifact)}
    rest = [
        {
            "trial": trial.number, "width": trial.plan.width, "score": trial.score, "drop": trial.drop, "bound": trial.bound,
            "bytes": trial.bytes, "ms": trial.ms, "kept": trial.kept, "limit": trial.limit, "harm": trial.plan.harm,
            "cost": trial.plan.cost, "artifact": str(trial.artifact),
        }
        for trial in trials
    ]  # fmt: skip
    return (first, *rest)
