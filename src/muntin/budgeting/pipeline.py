"""`muntin.compress`: the smallest or fastest form of a model whose deployed artifact keeps an accuracy budget.

FP32 artifact -> plain INT8 (trial 0) -> tables of harm and cost -> search { plan -> apply -> train -> export -> evaluate } -> holdout
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from muntin.artifact import Signature, open_artifact
from muntin.artifact.file_lock import folder_in_use
from muntin.budgeting.budget import Budget, Objective
from muntin.budgeting.candidate import CandidateTraining, Course, CourseStage, TargetLoss, apply_plan, course_stages, narrowed, plain_int8
from muntin.budgeting.deployed import Deployed, Interface, deploy, interface_of
from muntin.budgeting.display import shown_search
from muntin.budgeting.forecast import QAT_STEPS, Deadline, OutOfTime, SearchForecast, forecast
from muntin.budgeting.forms.latency import latency_settings
from muntin.budgeting.forms.plans import Plan
from muntin.budgeting.result import (
    CompressionResult,
    Holdout,
    SearchProgress,
    SearchReport,
    certainty_note,
    outcome_notes,
    outcome_of,
    rows_of,
    trial_name,
)
from muntin.budgeting.scores import Evaluate, Score, drop_bound, drop_interval, least_certain_drop, score_of
from muntin.budgeting.search import Base, Search
from muntin.budgeting.tables import TablePlans, TableProgress, model_digest
from muntin.budgeting.trials import ARTIFACT, MODEL, Trial, TrialFolder, batches_digest, keep_newest, measured_trials, terms_of
from muntin.compression import load_compressed, save
from muntin.compression.calibration import calibration_list
from muntin.compression.history import history
from muntin.compression.quantization.embeddings import tables
from muntin.compression.rewrite import check_kept, keepable, named
from muntin.deployment.export import check_pixels
from muntin.errors import MuntinError
from muntin.models.eager import ModelInputs, check_eager, eager_copy
from muntin.models.foreign import Statistic, takes_raw_pixels
from muntin.training.config import CompressionConfig
from muntin.training.recipe import load_recipe, parse_recipe

LEARNING_RATE = 1e-3
"""Default learning rate of candidates."""
FAILURES = 3
"""Trials in a row that fail before the search ends."""
OpenBase = Callable[[float, nn.Module, Sequence[ModelInputs], Path, Objective, TableProgress], Base]
"""Makes the plans of a width from the narrowed model, calibration batches, a folder for tables, and what is to be made least."""


def compress(
    model: nn.Module,
    *,
    calibration: Iterable[ModelInputs],
    evaluate: Evaluate,
    budget: Budget,
    finetune: Iterable[Any] | None = None,
    loss: TargetLoss | None = None,
    holdout: Evaluate | None = None,
    recipe: CompressionConfig | Mapping[str, Any] | Path | str | None = None,
    folder: Path | str | None = None,
    signature: Signature | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    keep: Sequence[str] = (),
    dense: Sequence[str] = (),
    step_seconds: float = 0.0,
    mean: Statistic | None = None,
    std: Statistic | None = None,
    progress: bool | SearchReport = True,
    plans: OpenBase | None = None,
    course: Course | None = None,
) -> CompressionResult:
    """Find the form of a model with the fewest bytes, or the least latency, whose artifact keeps an accuracy budget.

    Works on copies. `calibration`: batches of typical inputs: raw pixels `(B, C, H, W)`, 0-255, or other tensors, alone, as a tuple or by
    name. `evaluate`: called with a callable that takes the model's own input tensors and answers from the deployed artifact; returns a
    score, higher is better, or one for each sample `(N,)`, or the intersection and union of each class in each sample `(N, K, 2)`, whose
    score is the mean IoU. `holdout`: like it, on other data, for the figures that are reported: called once with the FP32 model's artifact
    and once with the chosen one.

    `finetune`: batches of inputs, on which each candidate learns the FP32 model's outputs, or of (inputs, targets) with
    `loss(output, targets)`. Without it nothing is trained. `recipe`: limits and settings of the search, by name (`{"trials": 5}`), or the
    path of a recipe, of which its section `compression` counts, without its budget, `keep` and `dense`. `minutes` limits this call: no
    trial begins that is expected to end later, and tables and training end between two steps. It is exceeded by at most one export, one
    call of `evaluate`, or the preparation of tables or of a candidate.
    `step_seconds`: time of a step of training, if known, by which the first trial is judged.

    Trial 0 is plain INT8 without training. A trial that cannot be made, exported or scored is a row with its reason. `folder`: of all
    trials, each with its artifact; by default a new temporary one. The same call with the same folder goes on, after an interruption or the
    time limit, too. Another budget judges the measured trials again; if the search had ended, nothing is trained then, and the same call
    once more goes on. Other settings are an error. `settings`: plain values that count among these, such as what `finetune` and `evaluate`
    depend on.

    `mean`, `std`: for a model that expects normalised pixels, as of `muntin.export`: batches and `evaluate` have raw pixels then, too,
    and names of layers begin with `model.`.
    `signature`: of an image model, by default inferred. `keep`: names or patterns of layers that stay in 16 bits, unfactored, with all
    their outputs, and of embeddings and products that stay in floats; `dense`: of layers that stay unfactored. `plans`: makes the plans of
    a width; by default from tables of harm and cost. `course`: trains candidates, in place of `finetune` and `loss`. `progress`: True
    shows the plan and the work in progress on standard error, False nothing; a function is called with each `SearchProgress` instead.

    Costs for each trial the passes and the training of one candidate, an export, and one evaluation. Raises `MuntinError` for a model that
    cannot be compressed or measured. A budget out of reach is no error: `kept` is then False, and the result is the trial with the least
    drop.
    """
    check_eager(model)
    if not isinstance(budget, Budget):
        raise MuntinError(f"budget is a {type(budget).__name__}: give muntin.Budget(max_drop=0.01)")
    batches = calibration_list(calibration, model)
    model = takes_raw_pixels(model, batches[0], mean=mean, std=std)
    if mean is not None:
        for batch in batches:
            check_pixels(batch, "calibration batch")
    check_kept(keep, {**keepable(model), **tables(model)})
    check_kept(dense, dict(named(model, nn.Linear, nn.Conv2d)), argument="dense")
    plans = plans or partial(TablePlans, keep=keep, dense=dense)
    config = search_config(recipe)
    course = course or _training(finetune, loss, config)
    teacher = eager_copy(model).eval()
    agreed = {
        **(settings or {}),
        "model": model_digest(teacher), "calibration": batches_digest(batches), "objective": budget.objective,
        "steps": steps_of(course), "course": [] if course is None else [stage.text for stage in course.stages],
        **({} if course is None else course.settings), "widths": list(config.widths), "seed": seed,
        **{name: list(entries) for name, entries in (("keep", keep), ("dense", dense)) if entries},
        **(latency_settings(None) if budget.objective == "latency" else {}),  # milliseconds of two machines do not compare
    }  # fmt: skip
    place = Path(tempfile.mkdtemp(prefix="muntin-compress-")) if folder is None else Path(folder)
    deadline = Deadline(config.minutes)
    with folder_in_use(place, "muntin.compress") as notes, shown_search(budget.objective, progress or (lambda state: None)) as report:
        trials = TrialFolder(place, agreed)
        plan = search_forecast(teacher, batches, course, config, place, step_seconds=step_seconds)
        report(SearchProgress(stage="plan", forecast=plan))
        work = _BudgetedCompression(
            teacher, batches, interface_of(teacher, batches, signature), trials, budget, deadline,
            evaluate=evaluate, course=course, open_base=plans, step_seconds=step_seconds, seed=seed, keep=keep,
            progress=report,
        )  # fmt: skip
        result = work.run(config, holdout=holdout)
    kept_in = (f"the trials are in {place}: give folder to choose the place",) if folder is None else ()
    return replace(result, notes=(*notes, *result.notes, *kept_in))


def search_forecast(
    model: nn.Module, batches: list[ModelInputs], course: Course | None, config: CompressionConfig, folder: Path, *, step_seconds: float
) -> SearchForecast:
    """Return what a search is going to do (`forecast`), with the trials that its folder holds."""
    return forecast(
        model, batches, steps=steps_of(course), step_s=step_seconds, trials=config.trials,
        measured=measured_trials(folder), minutes=config.minutes,
    )  # fmt: skip


def search_config(recipe: CompressionConfig | Mapping[str, Any] | Path | str | None) -> CompressionConfig:
    """Settings of a search from what `compress` takes as `recipe`. Raises `RecipeError`."""
    if isinstance(recipe, CompressionConfig):
        return recipe
    if isinstance(recipe, Path | str):
        return load_recipe(recipe).compression
    return parse_recipe({"compression": dict(recipe or {})}, where="recipe").compression


def _training(finetune: Iterable[Any] | None, loss: TargetLoss | None, config: CompressionConfig) -> CandidateTraining | None:
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
    return CandidateTraining(data=finetune, stages=course_stages(config, steps, rate), loss=loss) if steps else None


def steps_of(course: Course | None) -> int:
    """Training steps of a candidate."""
    return 0 if course is None else sum(stage.steps for stage in course.stages)


class _BudgetedCompression:
    def __init__(
        self,
        teacher: nn.Module,
        batches: list[ModelInputs],
        interface: Interface,
        folder: TrialFolder,
        budget: Budget,
        deadline: Deadline,
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
        self.deadline, self.evaluate, self.course, self.make_base, self.seed = deadline, evaluate, course, open_base, seed
        self.keep, self.progress, self.narrowed = keep, progress, dict[float, nn.Module]()
        self.training_seconds = QAT_STEPS * steps_of(course) * step_seconds
        """Estimated time of the training of the first trial."""
        self.base_seconds = 0.0
        """The longest recorded time of the tables of a width."""
        self.exact_floats = False
        """True if float layers run in 32 bits, because 16 alone would spend more than half of the budget."""
        self.trials: tuple[Trial, ...] = ()

    def run(self, config: CompressionConfig, *, holdout: Evaluate | None) -> CompressionResult:
        self.progress(SearchProgress(stage="reference"))
        record, self.reference = self.folder.reference(self._reference)
        self.deadline.reserve = 0.0 if holdout is None else 2 * record["evaluate_seconds"]
        self.exact_floats = record.get("narrow_drop", 0.0) > self.budget.max_drop / 2
        self._say(certainty_note(self.reference, self.budget))
        self.trials = tuple(self.folder.trials(self._judge))
        search = Search(
            list(config.widths), self._open_base, self._attempt, self.budget.objective, known=self.trials,
            trained=self.course is not None, may_go_on=lambda done, opening: self._may_go_on(done, opening, config),
        )  # fmt: skip
        rejudged = self.folder.begin(terms_of(self.budget))
        notes = []
        if rejudged:
            notes.append("the trials were judged again by this budget; the same call once more goes on with the search")
        elif config.minutes != 0:
            try:
                self._int8(search, record)
                search.run()
                if not search.stopped:
                    self.folder.end()
            except OutOfTime:
                search.stopped = True
        return self._result(search, record, holdout, notes, config)

    def _may_go_on(self, done: Sequence[Trial], opening: bool, config: CompressionConfig) -> bool:
        trained = [trial for trial in done if trial.number]
        if len(trained) >= config.trials or (len(trained) >= FAILURES and all(trial.failed for trial in trained[-FAILURES:])):
            return False
        return self.deadline.allows(self._expected(done) + (self.base_seconds if opening else 0.0))

    def _expected(self, done: Sequence[Trial]) -> float:
        """Return the seconds that the next trial is expected to take: as the longest one, or by the speed of training before the first."""
        int8 = next((trial.seconds for trial in done if not trial.number), 0.0)
        return max((trial.seconds for trial in done if trial.number), default=self.training_seconds + int8)

    def _judge(self, score: Score) -> dict[str, Any]:
        drop, bound = self.reference.value - score.value, drop_bound(self.reference, score, self.budget.confidence)
        return {"drop": drop, "bound": bound, "verdict": self.budget.judge(drop, bound), "accepted": self.budget.accepts(drop, bound)}

    def _say(self, note: str) -> None:
        if note:
            self.progress(SearchProgress(stage="note", trials=self.trials, note=note))

    def _reference(self, part: Path) -> tuple[dict[str, Any], Score]:
        started = time.perf_counter()
        deploy(self.teacher, self.interface, self.batches[0], part / ARTIFACT)
        with self._deployed(part / ARTIFACT, precision="f32") as deployed:
            begun = time.perf_counter()
            first, second = (self._score(self.evaluate, deployed, "evaluate", "the FP32 model") for _ in range(2))
            record = {
                "evaluate_seconds": (time.perf_counter() - begun) / 2, "noise": abs(first.value - second.value), "bytes": deployed.bytes,
                "ms": deployed.latency_ms(self.batches[0]),
            }  # fmt: skip
        with self._deployed(part / ARTIFACT) as deployed:
            if deployed.session.precision != "f32":
                narrow = self._score(self.evaluate, deployed, "evaluate", "the model in 16 bits")
                record["narrow_drop"] = first.value - narrow.value
        return record | {"seconds": time.perf_counter() - started}, first

    def _int8(self, search: Search, record: Mapping[str, Any]) -> None:
        """Measure trial 0 if it is missing and the time allows it, and say what the evaluation data can certify."""
        if not any(trial.number == 0 for trial in search.trials):
            if not self.deadline.allows(record["seconds"]):
                raise OutOfTime
            search.trials.insert(0, self._attempt(0, Plan(), 0.0))
        if least_certain_drop(self.reference.samples, self.budget.confidence) is None and self.reference.samples is not None:
            self._say(certainty_note(self.reference, self.budget, search.trials[0]))

    def _open_base(self, width: float) -> Base:
        def report(what: str, done: int, total: int) -> None:
            self.deadline.check()
            self.progress(SearchProgress(stage="tables", trials=self.trials, what=what, step=done, steps=total))

        def open_in(folder: Path) -> Base:
            return self.make_base(width, self._narrowed(width), self.batches, folder, self.budget.objective, report)

        def make(part: Path) -> dict[str, Any]:
            started = time.perf_counter()
            open_in(part)
            return {"width": width, "seconds": time.perf_counter() - started}

        report("pruning" if width < 1 else "forms", 0, 1)
        place, record = self.folder.base(width, make)
        self.base_seconds = max(self.base_seconds, record["seconds"])
        return open_in(place)

    def _narrowed(self, width: float) -> nn.Module:
        if width not in self.narrowed:
            self.narrowed[width] = narrowed(self.teacher, width, self.batches, keep=self.keep)
        return self.narrowed[width]

    def _attempt(self, number: int, plan: Plan, limit: float) -> Trial:
        self.progress(SearchProgress(stage="trial", trials=self.trials, number=number))
        trial = self.folder.trial(number, plan, limit, lambda part: self._measure(number, plan, part), self._judge)
        self.folder.forget_training(number)
        self.trials = (*self.trials, trial)
        return trial

    def _measure(self, number: int, plan: Plan, part: Path) -> tuple[dict[str, Any], Score]:
        started, course, earlier, done = time.perf_counter(), self.course, 0.0, 0
        steps, folder = steps_of(course), self.folder.training(number)

        def report(step: int, loss: float) -> None:
            self.deadline.check()
            self.progress(SearchProgress(stage="train", trials=self.trials, number=number, step=done + step, steps=steps, loss=loss))

        def train(stage: CourseStage, model: nn.Module) -> None:
            nonlocal earlier, done
            assert course is not None
            earlier += course.train(stage, model, self.teacher, seed=self.seed, folder=folder / stage.name, report=report)
            done += stage.steps

        base = self._narrowed(plan.width)
        if number:
            model = apply_plan(base, plan, self.batches, keep=self.keep, stages=() if course is None else course.stages, train=train)
            keep_newest(folder / "mixed", part)
        else:
            model = plain_int8(base, self.batches, keep=self.keep)
        self.deadline.check()
        deploy(model, self.interface, self.batches[0], part / ARTIFACT, exact=self.exact_floats)
        save(model, part / MODEL)
        with self._deployed(part / ARTIFACT) as deployed:
            score = self._score(self.evaluate, deployed, "evaluate", trial_name(number))
            self._judge(score)  # refuses other samples than the reference's
            record = {"bytes": deployed.bytes, "ms": deployed.latency_ms(self.batches[0])}
        return record | {"seconds": earlier + time.perf_counter() - started}, score

    def _score(self, function: Evaluate, deployed: Deployed, called: str, what: str) -> Score:
        return score_of(function, deployed, called=called, what=what, folder=self.folder.folder)

    def _deployed(self, path: Path, *, precision: str = "recorded") -> Deployed:
        return Deployed(path, self.interface, precision=precision)

    def _result(
        self, search: Search, record: dict[str, Any], holdout: Evaluate | None, notes: list[str], config: CompressionConfig
    ) -> CompressionResult:
        best, budget = search.best, self.budget
        int8 = next((trial for trial in search.trials if trial.number == 0), None)
        notes += [*self._noise(record["noise"]), *self._narrow(record), *filter(None, [certainty_note(self.reference, budget, int8)])]
        notes += [*outcome_notes(search.trials, best, budget, unreachable=search.unreachable), *search.notes]
        notes += self._limits(search, config)
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
            model=model, artifact=open_artifact(path), kept=best is not None and best.within, outcome=outcome_of(best), budget=budget,
            reference=self.reference.value, noise=record["noise"], best=best, trials=tuple(search.trials),
            rows=rows_of(record | {"score": self.reference.value}, self.folder.reference_artifact, search.trials), holdout=figures,
            changes=history(model), notes=tuple(notes), folder=self.folder.folder,
        )  # fmt: skip

    def _limits(self, search: Search, config: CompressionConfig) -> list[str]:
        """Return notes on what a limit of trials or minutes left out."""
        if config.minutes == 0:
            return [] if search.trials else ["nothing was tried: minutes is 0"]
        trained = [trial for trial in search.trials if trial.number]
        if len(trained) >= FAILURES and all(trial.failed for trial in trained[-FAILURES:]):
            return [f"the search ended after {FAILURES} failed trials in a row: mend the reason, and remove the folders of these trials"]
        if not search.stopped:
            return []
        if len(trained) >= config.trials:
            return ["stopped at the limit of trials: more may find a better model"]
        if trained or self.course is None:
            tried = "" if trained else " before a candidate beyond plain INT8 was tried"
            return [f"stopped at the limit of {config.minutes:g} min{tried}: the same call goes on where it ended"]
        training = f", its training about {self.training_seconds / 60:.2g}" if self.training_seconds else ""
        return [
            f"no trained candidate was tried: plain INT8, tables and final scores take most of the {config.minutes:g} minutes{training}; "
            "the same call goes on; give more minutes, or fewer steps"
        ]

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

    def _held_out(self, holdout: Evaluate, best: Trial) -> Holdout:
        def measure(path: Path, what: str, precision: str) -> dict[str, Any]:
            with self._deployed(path, precision=precision) as deployed:
                score = self._score(holdout, deployed, "holdout", what)
            return {"score": score.value, "samples": None if score.samples is None else score.samples.tolist()}

        records = (
            self.folder.holdout(None, lambda: measure(self.folder.reference_artifact, "the FP32 model", "f32")),
            self.folder.holdout(best.number, lambda: measure(best.artifact, trial_name(best.number), "recorded")),
        )
        reference, score = (
            Score(one["score"], None if one["samples"] is None else np.asarray(one["samples"], np.float64)) for one in records
        )
        return Holdout(
            reference=reference.value, score=score.value, drop=reference.value - score.value,
            interval=drop_interval(reference, score), samples=None if score.samples is None else len(score.samples),
        )  # fmt: skip

    def _about(self, figures: Holdout) -> list[str]:
        notes = []
        if figures.interval is None:
            notes.append("the figures of holdout have no interval: return a score for each sample, and there is one")
        if (times := self.folder.held_out) > 1:
            notes.append(f"the held-out data were scored for {times} chosen trials of this folder: their figures are less independent")
        return notes
