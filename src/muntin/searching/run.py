"""A whole search: a recipe and a space in, a front and a few trained and deployed networks out.

    supernet/            checkpoints of the shared weights
    study.log            proposals, scores and costs
    latency.json         how well the table of parts predicts whole networks
    networks/NNN.yaml    recipes of the points of the front
    networks/NNN/        runs of `muntin fit` of the best few, each with its artefact; networks/recipe: of the recipe's own model
    search.json          the settings and, at the end, the results

A search that was interrupted goes on when it is started again with the same settings. Scores are of the validation split alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muntin.artifact.file_lock import folder_in_use
from muntin.data import Source, open_source
from muntin.deployment.checkpoint_export import export_side
from muntin.errors import RecipeError
from muntin.models import ModelConfig
from muntin.searching.candidates import CandidateScorer
from muntin.searching.cost import artifact_bytes, layer_macs, memory_bytes, parameters_of
from muntin.searching.finalists import Finalist, rank_correlation, spread, train_finalist, with_latencies
from muntin.searching.latency_table import ArchitectureLatency, PredictionError
from muntin.searching.point_recipe import NETWORKS, commands, network_recipe, place_name, write_recipes
from muntin.searching.preparation import base_config, check_data, check_gates, check_model, unused_settings
from muntin.searching.settings import SearchFile, SearchSettings
from muntin.searching.space import Architecture, Space, default_space
from muntin.searching.study import ArchitectureStudy, StudyPoint
from muntin.searching.supernet_training import SupernetTraining
from muntin.training.checkpoint import checkpoints_in, newest_sound
from muntin.training.precision import TrainingPrecision, prepare_hardware
from muntin.training.progress.interrupt import Interruption
from muntin.training.progress.report import FitProgress
from muntin.training.recipe import Recipe, settled

SUPERNET_SHARE, STUDY_SHARE = 0.4, 0.2
"""Shares of the minutes for the supernet and for the table and the study; the rest is for the networks that are trained alone."""
TRAINING_SHARE = 0.75
"""Share of a network's minutes that its training may take; the rest is for its export."""
MANY_STEPS = 10_000_000
"""Steps of a training that its minutes end."""
SUPERNET = "supernet"
"""Folder of the shared weights in that of a search."""


@dataclass(frozen=True, kw_only=True)
class SearchStage:
    """Progress of a search. `stage`: "data", "supernet", "parts", "check", "study" or "train"; `done` of `total`; `text`: a figure or name.

    `front`: the best points so far.
    """

    stage: str
    done: int
    total: int
    text: str = ""
    front: Sequence[StudyPoint] = ()


SearchStageReport = Callable[[SearchStage], None]


@dataclass(frozen=True, kw_only=True)
class ArchitectureSearch:
    """The result. `finished`: False after an interruption. `networks`: trained and deployed, the recipe's own model first.

    `correlation`: Spearman's, of the scores with shared weights and of the networks trained alone; None for fewer than three. `seconds`:
    of the search without `table_seconds`, those of the measurement of latencies before the study.
    """

    folder: Path
    settings: SearchSettings
    finished: bool
    base: ModelConfig
    front: tuple[StudyPoint, ...] = ()
    points: tuple[StudyPoint, ...] = ()
    networks: tuple[Finalist, ...] = ()
    importances: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    latency_error: PredictionError | None = None
    correlation: float | None = None
    seconds: float = 0.0
    table_seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def command(self, point: StudyPoint) -> str:
        """The commands that train and export a point of the front by its recipe, `networks/NNN.yaml`."""
        return commands(self.folder / NETWORKS, place_name(point), point.architecture)


def search_architectures(
    recipe: Recipe,
    space: Space | None = None,
    *,
    folder: Path | str,
    root: Path | str = ".",
    settings: SearchSettings | None = None,
    report: SearchStageReport = lambda stage: None,
) -> ArchitectureSearch:
    """Search architectures for a recipe's data and task. `space` None: `default_space` of the task. `root`: of the recipe's paths.

    Raises `RecipeError` for another model than muntin's own, a space without networks, and a folder of a search with other settings.
    """
    settings = SearchSettings() if settings is None else settings
    folder, root = Path(folder), Path(root).resolve()
    with folder_in_use(folder, "muntin search"):
        return _Search(recipe, space, folder, root, settings, report).run()


class _Search:
    def __init__(
        self, recipe: Recipe, space: Space | None, folder: Path, root: Path, settings: SearchSettings,
        report: SearchStageReport,
    ) -> None:  # fmt: skip
        check_model(recipe)
        recipe = settled(recipe, root)
        self.recipe, self.folder, self.root = recipe, folder, root
        self.settings, self.report = settings, report
        self.source: Source = open_source(recipe.data, root=root)
        if self.source.task != recipe.task:
            raise RecipeError(f"task: the data are for '{self.source.task}' and the recipe says '{recipe.task}'; make them agree")
        self.base = base_config(recipe, self.source)
        self.space = space or default_space(recipe.task, self.base.head_dim, gated=recipe.training.gate_budget < 1)
        self.space.check(self.base)
        check_gates(recipe, self.space, self.base)
        self.notes = check_data(
            recipe, self.source, root, lambda done, total: report(SearchStage(stage="data", done=done, total=total))
        )  # fmt: skip
        self.notes += unused_settings(recipe)
        self.file = SearchFile(folder, recipe, self.space, settings)
        self.seconds, self.table_seconds = self.file.seconds, self.file.table_seconds

    def _save(self, seconds: float, **results: Any) -> None:
        self.file.save(seconds, self.table_seconds, **results)

    def run(self) -> ArchitectureSearch:
        started, before, table_before = time.perf_counter(), self.seconds, self.table_seconds

        def used() -> float:
            self.seconds = before + time.perf_counter() - started - (self.table_seconds - table_before)
            return self.seconds

        written = checkpoints_in(self.folder / SUPERNET / "checkpoints")
        begun = newest_sound(written[0].parent, note=self.notes.append).state.precision if written else None
        training = self._training(prepare_hardware(self.recipe.training, begun=begun))
        with Interruption() as interruption:
            interruption.work = "this step"
            trained = training.run(
                stopped=lambda: interruption.requested,
                report=lambda done: self.report(
                    SearchStage(stage="supernet", done=done.step, total=done.steps, text=f"{done.position}, loss {done.loss:.3f}")
                ),
            )
            before = max(before, trained.seconds - (time.perf_counter() - started))  # those of a search that was killed
            self._save(used())
            self.notes += trained.notes
            if not trained.finished:
                return self._result(finished=False)
            scorer = CandidateScorer(trained.supernet, self.recipe, self.source, training.precision)
            study = ArchitectureStudy(
                self.space, self.base, self.folder, candidates=self.file.first_candidates, seed=self.recipe.seed,
                sampler=self.settings.sampler,
            )  # fmt: skip
            interruption.work = "this candidate"
            measuring = time.perf_counter()
            latency = self._latency(study, scorer, lambda: interruption.requested)
            self.table_seconds += time.perf_counter() - measuring
            self._study(study, scorer, latency, stopped=lambda: interruption.requested, used=used)
            self._save(used())
            if interruption.requested:
                return self._result(study, latency, finished=False)
        return self._finish(study, latency, used)

    def _training(self, precision: TrainingPrecision) -> SupernetTraining:
        recipe = self._limited(None if self.settings.minutes is None else SUPERNET_SHARE * self.settings.minutes)
        return SupernetTraining(
            self.space, self.base, recipe, self.source, folder=self.folder / SUPERNET, root=self.root, precision=precision
        )  # fmt: skip

    def _limited(self, minutes: float | None) -> Recipe:
        """The recipe with other minutes, which then end the training; None: as it is."""
        if minutes is None:
            return self.recipe
        limits = {"minutes": minutes, "steps": MANY_STEPS}
        return self.recipe.model_copy(update={"training": self.recipe.training.model_copy(update=limits)})

    def _latency(
        self, study: ArchitectureStudy, scorer: CandidateScorer, stopped: Callable[[], bool]
    ) -> ArchitectureLatency | None:  # fmt: skip
        if self.settings.objective != "latency":
            return None
        side = export_side(self.recipe)
        model = ArchitectureLatency(self.base, side, self.folder, threads=self.recipe.training.threads)
        if model.notes and study.points:
            model.notes.append("candidates scored before keep their predicted latencies: search anew, with another --output, to renew them")
        self.notes += model.notes
        model.prepare(
            self.space, seed=self.recipe.seed, stopped=stopped,
            progress=lambda done, total: self.report(SearchStage(stage="parts", done=done, total=total)),
        )  # fmt: skip
        if not stopped():
            model.check(
                self.space, scorer, count=self.settings.checked, seed=self.recipe.seed, stopped=stopped,
                progress=lambda done, total: self.report(SearchStage(stage="check", done=done, total=total)),
            )  # fmt: skip
        return model

    def _study(
        self, study: ArchitectureStudy, scorer: CandidateScorer, latency: ArchitectureLatency | None, *, stopped: Callable[[], bool],
        used: Callable[[], float],
    ) -> None:  # fmt: skip
        """Score candidates until there are enough, until their minutes are over and there is one, or until the search is stopped.

        `used`: seconds of the search so far.
        """
        minutes = self.settings.minutes
        deadline = math.inf if minutes is None else 60 * minutes * (SUPERNET_SHARE + STUDY_SHARE)
        while len(study.proposals) < self.settings.candidates and not stopped() and not (study.points and used() > deadline):
            study.step(lambda one: (scorer.score(one), self._cost(one, latency)))
            done = len(study.proposals)
            self._save(used())  # of a search that is killed, too, no minute counts twice
            self.report(SearchStage(stage="study", done=done, total=self.settings.candidates, front=study.front))
        if (missing := self.settings.candidates - len(study.proposals)) > 0 and not stopped():
            self.notes.append(f"the minutes of the study ended with {missing} of {self.settings.candidates} candidates not scored")
        if not study.points and not stopped():
            raise RecipeError(
                f"space: none of {self.settings.candidates} proposals makes a network: remove choices that exclude each other"
            )

    def _cost(self, architecture: Architecture, latency: ArchitectureLatency | None) -> float:
        if latency is not None:
            return latency.predict(architecture)
        return artifact_bytes(architecture) if self.settings.objective == "size" else memory_bytes(architecture, export_side(self.recipe))

    def _finish(self, study: ArchitectureStudy, latency: ArchitectureLatency | None, used: Callable[[], float]) -> ArchitectureSearch:
        """Train, deploy and measure the best few and the recipe's own model."""
        own: list[tuple[str, Architecture, StudyPoint | None]] = [("recipe", Architecture(config=self.base), None)]
        chosen = [(place_name(point), point.architecture, point) for point in spread(study.front, self.settings.finalists)]
        wanted = [*(own if self.settings.own else ()), *chosen]
        share = (1 - SUPERNET_SHARE - STUDY_SHARE) * TRAINING_SHARE / len(wanted)
        recipe = self._limited(None if self.settings.minutes is None else share * self.settings.minutes)

        def recipe_of(name: str, one: Architecture) -> Recipe:
            return network_recipe(recipe, one, one.options(self.base), name)

        front = [(recipe_of(place_name(point), point.architecture), point.architecture) for point in study.front]
        write_recipes(self.folder / NETWORKS, front, root=self.root)
        networks: list[Finalist] = []
        for done, (name, architecture, point) in enumerate(wanted):

            def show(text: str, done: int = done, name: str = name) -> None:
                self.report(SearchStage(stage="train", done=done, total=len(wanted), text=f"{name}{text}", front=study.front))

            def show_step(progress: FitProgress, show: Callable[[str], None] = show) -> None:
                if progress.kind == "step":
                    show(f", {progress.position}")

            show("")
            finalist = train_finalist(
                recipe_of(name, architecture), architecture, name=name, folder=self.folder / NETWORKS / name, root=self.root,
                source=self.source, point=point,
                report=show_step,
            )  # fmt: skip
            self._save(used())
            if finalist is None:
                return self._result(study, latency, finished=False)
            self.notes += [f"{name}: {note}" for note in finalist.notes if note not in self.notes]
            networks.append(finalist)
        networks = with_latencies(networks, threads=self.recipe.training.threads)
        result = self._result(study, latency, tuple(networks), finished=True)
        self._save(used(), results=document(result))
        return result

    def _result(
        self, study: ArchitectureStudy | None = None, latency: ArchitectureLatency | None = None, networks: tuple[Finalist, ...] = (), *,
        finished: bool,
    ) -> ArchitectureSearch:  # fmt: skip
        return ArchitectureSearch(
            folder=self.folder, settings=self.settings, finished=finished, base=self.base,
            front=() if study is None else tuple(study.front),
            points=() if study is None else tuple(study.points), networks=networks,
            importances={} if study is None else study.importances(),
            latency_error=None if latency is None else latency.error, correlation=rank_correlation(networks), seconds=self.seconds,
            table_seconds=self.table_seconds, notes=tuple(self.notes),
        )  # fmt: skip


def document(result: ArchitectureSearch) -> dict[str, Any]:
    """The result as plain values."""
    return {
        "finished": result.finished, "folder": str(result.folder), "objective": result.settings.objective,
        "seconds": result.seconds, "table_seconds": result.table_seconds, "scored": len(result.points),
        "front": [_point_row(result, point) for point in result.front],
        "networks": [network.row() for network in result.networks], "correlation": result.correlation,
        "latency_error": None if result.latency_error is None else result.latency_error.row(),
        "importances": {name: dict(values) for name, values in result.importances.items()}, "notes": list(result.notes),
    }  # fmt: skip


def _point_row(result: ArchitectureSearch, point: StudyPoint) -> dict[str, Any]:
    one = point.architecture
    return {
        "number": point.number + 1, "score": point.score, "cost": point.cost, "choices": dict(point.chosen),
        "options": one.options(result.base), "parameters": parameters_of(one.config), "macs": layer_macs(one.config, one.resolution),
        "command": result.command(point) if result.finished else None,
    }  # fmt: skip
