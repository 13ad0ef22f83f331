"""A whole search: a recipe and a space in, a front and a few trained and deployed networks out.

    study.log            proposals, scores and costs
    trials/              short trainings of the candidate that is tried, and the recipe's own network for its latency
    networks/NNN.yaml    recipes of the points of the front
    networks/NNN/        runs of `muntin fit` of the best few, each with its artefact; networks/recipe: of the recipe's own model
    search.json          the settings, the progress and, at the end, the results

A search that was interrupted, killed or ended by its minutes goes on when it is started again. Scores are of the validation split alone.
With minutes, no step of work begins after their end. A step is a candidate, or a network's training and export.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from muntin.artifact.file_lock import folder_in_use
from muntin.data import Source, open_source
from muntin.errors import RecipeError
from muntin.models import PRESETS, ModelConfig
from muntin.models.create import preset_config
from muntin.searching.cost import layer_macs, parameters_of
from muntin.searching.finalists import Finalist, rank_correlation, spread, train_finalist, unbeaten, with_latencies
from muntin.searching.plan import SearchPlan, candidate_seconds
from muntin.searching.point_recipe import NETWORKS, commands, network_recipe, place_name, write_recipes
from muntin.searching.preparation import base_config, check_data, check_gates, check_model
from muntin.searching.settings import CallMinutes, SearchFile, SearchSettings
from muntin.searching.space import Architecture, Space, default_space
from muntin.searching.study import ArchitectureStudy, StudyPoint
from muntin.searching.trials import RUNGS, CandidateTrials, Judged, StoppedTrialError
from muntin.training.fitting import fit
from muntin.training.progress.report import FitProgress
from muntin.training.recipe import Recipe, settled

STUDY_SHARE = 0.6
"""Share of the minutes for the candidates; the rest is for the networks that are trained alone."""
TRAINING_SHARE = 0.75
"""Share of a network's minutes that its training may take; the rest is for its export."""
MANY_STEPS = 10_000_000
"""Steps of a training that its minutes end."""
TIMED_STEPS = 3
"""Steps that are trained to time one, for the plan of a search without minutes."""


@dataclass(frozen=True, kw_only=True)
class SearchStage:
    """Progress of a search. `stage`: "data", "plan", "study" or "train"; `done` of `total`; `text`: a figure or name.

    `left`: seconds left of the stage, by the speed so far. `front`: the best points so far.
    """

    stage: str
    done: int
    total: int
    text: str = ""
    left: float | None = None
    front: Sequence[StudyPoint] = ()


SearchStageReport = Callable[[SearchStage], None]


@dataclass(frozen=True, kw_only=True)
class ArchitectureSearch:
    """The result. `finished`: False if no network was trained alone, after an interruption or because the minutes ended.

    `out_of_time`: the minutes ended before all networks were trained. `networks`: trained and deployed, the recipe's own model first.
    `correlation`: Spearman's, of the scores of the last short training and of the networks trained alone; None for fewer than three.
    `seconds`: of all calls.
    """

    folder: Path
    settings: SearchSettings
    finished: bool
    base: ModelConfig
    out_of_time: bool = False
    front: tuple[StudyPoint, ...] = ()
    points: tuple[StudyPoint, ...] = ()
    networks: tuple[Finalist, ...] = ()
    importances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    correlation: float | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def command(self, point: StudyPoint) -> str:
        """The commands that train and export a point of the front by its recipe, `networks/NNN.yaml`."""
        return commands(self.folder / NETWORKS, place_name(point))


def search_architectures(
    recipe: Recipe,
    space: Space | None = None,
    *,
    folder: Path | str,
    root: Path | str = ".",
    settings: SearchSettings | None = None,
    report: SearchStageReport = lambda stage: None,
    planned: Callable[[SearchPlan], None] = lambda plan: None,
    clock: Callable[[], float] = time.perf_counter,
) -> ArchitectureSearch:
    """Search architectures for a recipe's data and task. `space` None: `default_space` of the task. `root`: of the recipe's paths.

    `planned` is called with the plan before anything is trained or written. `clock`: seconds, by which the minutes are counted.
    Raises `RecipeError` for another model than muntin's own, a space without networks, minutes that end before the first step, and a
    folder of a search with other settings.
    """
    call = CallMinutes((settings or SearchSettings()).minutes, clock)
    folder = Path(folder)
    with folder_in_use(folder, "muntin search"):
        search = _Search(recipe, space, folder, Path(root).resolve(), settings or SearchSettings(), report, call)
        planned(search.plan())
        search.check_data()
        return search.run()


def plan_search(
    recipe: Recipe, space: Space | None = None, *, folder: Path | str, root: Path | str = ".", settings: SearchSettings | None = None,
    report: SearchStageReport = lambda stage: None,
) -> SearchPlan:  # fmt: skip
    """Plan of the next call of `search_architectures` with these arguments. Without minutes it trains three steps; writes nothing."""
    settings = settings or SearchSettings()
    call = CallMinutes(settings.minutes, time.perf_counter)
    return _Search(recipe, space, Path(folder), Path(root).resolve(), settings, report, call).plan()


class _Search:
    def __init__(
        self, recipe: Recipe, space: Space | None, folder: Path, root: Path, settings: SearchSettings, report: SearchStageReport,
        call: CallMinutes,
    ) -> None:  # fmt: skip
        check_model(recipe)
        recipe = settled(recipe, root)
        self.recipe, self.folder, self.root = recipe, folder, root
        self.settings, self.report, self.call = settings, report, call
        self.source: Source = open_source(recipe.data, task=recipe.task, root=root)
        if self.source.task != recipe.task:
            raise RecipeError(f"task: the data are for '{self.source.task}' and the recipe says '{recipe.task}'; make them agree")
        self.base = base_config(recipe, self.source)
        self.space = space or default_space(recipe.task, self.base.head_dim, gated=recipe.training.gate_budget < 1)
        self.space.check(self.base)
        check_gates(recipe, self.space, self.base)
        self.file = SearchFile(folder, recipe, self.space, settings)
        self.notes = [*self.file.notes]
        self.out_of_time = False
        self._seconds_before = self.file.seconds

    def check_data(self) -> None:
        """Open every image once, and write the settings. Raises `RecipeError` if this takes all the minutes."""
        self.notes += check_data(
            self.recipe, self.source, self.root, lambda done, total: self.report(SearchStage(stage="data", done=done, total=total))
        )  # fmt: skip
        if self.call.left() <= 0:
            raise RecipeError(
                f"minutes {self.settings.minutes:g}: the plan and the check of the data took {self.call.used / 60:.1f} minutes: give more"
            )
        self._save()

    def _save(self, **results: Any) -> None:
        self.file.seconds = self._seconds_before + self.call.used
        self.file.save(**results)

    def plan(self) -> SearchPlan:
        """The plan of this call. Without minutes it takes some steps of training, in a folder that is removed."""
        self.report(SearchStage(stage="plan", done=0, total=1))
        file, settings, training = self.file, self.settings, self._alone.training
        network_s = training.steps * self._step_seconds() if training.minutes is None else 60 * training.minutes
        candidate_s, first_s, rough = candidate_seconds(
            network_s, scored=file.scored, study_s=file.study_seconds, deployed=settings.objective == "latency"
        )
        limit = math.inf if settings.minutes is None else max(60 * settings.minutes * STUDY_SHARE, first_s)
        study_s = min((settings.candidates - file.scored) * candidate_s, limit)
        return SearchPlan(
            settings=settings, scored=file.scored, candidate_s=candidate_s, first_s=first_s, rough=rough, study_s=max(0.0, study_s),
            networks=self._network_count, network_s=network_s,
        )  # fmt: skip

    def _step_seconds(self) -> float:
        """Seconds of a training step of the recipe's own network. Raises KeyboardInterrupt after Ctrl-C."""
        limits = {"steps": TIMED_STEPS, "validate_every": TIMED_STEPS}
        recipe = self.recipe.model_copy(update={"training": self.recipe.training.model_copy(update=limits)})
        ends: list[float] = []

        def note_end(progress: FitProgress) -> None:
            if progress.kind == "step":
                ends.append(time.perf_counter())

        with tempfile.TemporaryDirectory() as folder:
            result = fit(recipe, directory=Path(folder) / "run", root=self.root, progress=note_end)
        if result.interrupted or result.stop_requested:
            raise KeyboardInterrupt
        return ends[-1] - ends[-2]

    @property
    def _network_count(self) -> int:
        return self.settings.finalists + self.settings.own

    @staticmethod
    def _network_share(count: int) -> float:
        return (1 - STUDY_SHARE) * TRAINING_SHARE / count

    @property
    def _alone(self) -> Recipe:
        """The recipe with the length of the training of a network alone."""
        return self._limited(self._network_share(self._network_count))

    def _limited(self, share: float) -> Recipe:
        """The recipe with a share of the minutes that the search began with, which then end a training; without minutes as it is."""
        minutes = self.file.first.minutes
        if minutes is None:
            return self.recipe
        limits = {"minutes": share * minutes, "steps": MANY_STEPS}
        return self.recipe.model_copy(update={"training": self.recipe.training.model_copy(update=limits)})

    def run(self) -> ArchitectureSearch:
        study = ArchitectureStudy(
            self.space, self.base, self.folder, begin=[*self._known().values()], rungs=len(RUNGS), seed=self.recipe.seed,
            sampler=self.settings.sampler,
        )  # fmt: skip
        try:
            self._study(study)
            return self._finish(study) if study.front else self._unfinished(study, out_of_time=True)
        except (StoppedTrialError, KeyboardInterrupt):
            return self._unfinished(study, out_of_time=False)

    def _known(self) -> dict[str, ModelConfig]:
        """Networks that need no search, by name: the recipe's own, and the presets. They are tried first."""
        own: dict[str, Any] = {
            "task": self.base.task,
            "classes": self.base.classes,
            "channels": self.base.channels,
            "scale": self.base.scale,
        }
        unused = {name: getattr(self.base, name) for name in ("decoder", "fusion", "finest") if self.base.answer.one}
        presets = {f"the preset {name}": preset_config(name, **own, options=unused, encoder=None) for name in PRESETS}
        return {"the recipe's own model": self.base, **presets}

    def _unfinished(self, study: ArchitectureStudy, *, out_of_time: bool) -> ArchitectureSearch:
        self.out_of_time = out_of_time
        self._save()
        return self._result(study, finished=False)

    def _study(self, study: ArchitectureStudy) -> None:
        """Try candidates until there are enough, or until no other one fits in their minutes and there is one of the last rung."""
        file, total, scored_before = self.file, self.settings.candidates, len(study.proposals)
        trials = CandidateTrials(
            self._alone, self.base, self.source, folder=self.folder, root=self.root, objective=self.settings.objective,
            reference_ms=file.reference_ms,
        )  # fmt: skip
        file.scored = scored_before
        study_before, started = file.study_seconds, self.call.used
        shown = SearchStage(stage="study", done=scored_before, total=total, front=study.front)
        self.report(shown)

        def show_step(progress: FitProgress) -> None:
            if progress.kind == "step":
                self.report(replace(shown, text=f", {progress.position}"))

        def judge(one: Architecture) -> tuple[Sequence[float], float]:
            cost = trials.cost(one)
            return trials.score(one, cost, _by_rung(study.points), show_step), cost

        while (done := len(study.proposals)) < total and self.call.left() > 0:
            expected = file.study_seconds / done if done else 0.0
            if study.front and self.call.left(STUDY_SHARE) < expected:
                break
            study.step(judge)
            file.scored, file.study_seconds = len(study.proposals), study_before + self.call.used - started
            file.reference_ms = trials.reference_ms
            self._save()
            left = (self.call.used - started) / (file.scored - scored_before) * (total - file.scored)
            left = min(left, self.call.left(STUDY_SHARE))
            shown = SearchStage(stage="study", done=file.scored, total=total, left=max(0.0, left), front=study.front)
            self.report(shown)
        if (missing := total - len(study.proposals)) > 0:
            self.notes.append(f"the minutes of the study ended with {missing} of {total} candidates not tried: the same command goes on")
        elif not study.points:
            raise RecipeError(f"space: none of {total} proposals makes a network; the last one: {study.refusal}")

    def _finish(self, study: ArchitectureStudy) -> ArchitectureSearch:
        """Train, deploy and measure the best few and the recipe's own model, which comes last: without time it is left out."""
        chosen = sorted(spread(study.front, self.settings.finalists), key=lambda point: -point.score)
        wanted: list[tuple[str, Architecture, StudyPoint | None]] = [(place_name(point), point.architecture, point) for point in chosen]
        wanted += [("recipe", Architecture(config=self.base), None)] if self.settings.own else []
        recipe = self._limited(self._network_share(len(wanted)))

        def recipe_of(name: str, one: Architecture) -> Recipe:
            return network_recipe(recipe, one, one.options(self.base), name)

        front = [recipe_of(place_name(point), point.architecture) for point in study.front]
        write_recipes(self.folder / NETWORKS, front, root=self.root)
        networks: list[Finalist] = []
        longest = 0.0
        for done, (name, architecture, point) in enumerate(wanted):
            begun_at = self.call.used
            if not may_begin(self.call.left(), first=done == 0, longest=longest, training=60 * (recipe.training.minutes or 0.0)):
                self.out_of_time = True
                self.notes.append(
                    f"the minutes ended with {len(wanted) - done} of {len(wanted)} networks not trained alone: the same command goes on"
                )
                break

            def show(text: str, left: float | None = None, done: int = done, name: str = name) -> None:
                self.report(SearchStage(stage="train", done=done, total=len(wanted), text=f"{name}{text}", left=left, front=study.front))

            def show_step(progress: FitProgress, show: Callable[..., None] = show) -> None:
                if progress.kind == "step":
                    show(f", {progress.position}")

            show("")
            finalist = train_finalist(
                recipe_of(name, architecture), architecture, name=name, folder=self.folder / NETWORKS / name, root=self.root,
                source=self.source, point=point, report=show_step,
            )  # fmt: skip
            self._save()
            if finalist is None:
                return self._result(study, finished=False)
            longest = max(longest, self.call.used - begun_at)
            self.notes += [f"{name}: {note}" for note in finalist.notes if note not in self.notes]
            networks.append(finalist)
        if not networks:
            return self._result(study, finished=False)
        networks = with_latencies(networks, threads=self.recipe.training.threads)
        known = {Architecture(config=config).key: name for name, config in self._known().items()}
        self.notes += unbeaten(networks, known, objective=self.settings.objective)
        result = self._result(study, tuple(sorted(networks, key=lambda network: network.point is not None)), finished=True)
        self._save(results=document(result))
        return result

    def _result(
        self, study: ArchitectureStudy | None = None, networks: tuple[Finalist, ...] = (), *, finished: bool
    ) -> ArchitectureSearch:  # fmt: skip
        return ArchitectureSearch(
            folder=self.folder, settings=self.settings, finished=finished, out_of_time=self.out_of_time, base=self.base,
            front=() if study is None else tuple(study.front),
            points=() if study is None else tuple(study.points), networks=networks,
            importances={} if study is None else study.importances(),
            correlation=rank_correlation(networks), seconds=self.file.seconds, notes=tuple(self.notes),
        )  # fmt: skip


def _by_rung(points: Sequence[StudyPoint]) -> list[list[Judged]]:
    """For each rung score and cost of the points that came to it."""
    return [[(point.scores[rung], point.cost) for point in points if len(point.scores) > rung] for rung in range(len(RUNGS))]


def may_begin(left: float, *, first: bool, longest: float, training: float) -> bool:
    """Whether a network may be trained in the seconds left: the first of a call always if some are left, others if one more fits.

    `longest`: seconds of the longest network of this call. `training`: of its training by its minutes.
    """
    return left > 0 if first else left >= max(longest, training)


def document(result: ArchitectureSearch) -> dict[str, Any]:
    """The result as plain values."""
    return {
        "finished": result.finished, "folder": str(result.folder), "objective": result.settings.objective,
        "seconds": result.seconds, "out_of_time": result.out_of_time, "scored": len(result.points),
        "front": [_point_row(result, point) for point in result.front],
        "networks": [network.row() for network in result.networks], "correlation": result.correlation,
        "importances": {name: dict(values) for name, values in result.importances.items()}, "notes": list(result.notes),
    }  # fmt: skip


def _point_row(result: ArchitectureSearch, point: StudyPoint) -> dict[str, Any]:
    one = point.architecture
    return {
        "number": point.number + 1, "score": point.score, "cost": point.cost, "choices": dict(point.chosen),
        "options": one.options(result.base), "parameters": parameters_of(one.config), "macs": layer_macs(one.config, one.resolution),
        "command": result.command(point) if result.finished else None,
    }  # fmt: skip
