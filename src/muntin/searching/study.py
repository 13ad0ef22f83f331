"""The study: architectures that Optuna proposes, their scores and costs, in a journal on the disk.

    the presets that the space has -> history
    history -> sampler, seeded by the number of proposals -> choices -> score, cost -> history

A new sampler is seeded for each proposal, so a proposal depends on the history and the seed alone, and a study that was killed and resumed
is the same as an uninterrupted one. An architecture that was scored before has its old score.
Source: the tree-structured Parzen estimator for several objectives (Ozaki et al., 2022), by optuna.samplers.TPESampler.
"""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from muntin.errors import DataError
from muntin.models import ModelConfig
from muntin.searching.space import Architecture, Space, UnbuildableError, Value

JOURNAL = "study.log"
NAME = "search"
Sampler = Literal["tpe", "random"]
RANDOM_ONES = 10
"""Proposals before the sampler learns from their scores."""
FEWEST_RANKED = 16
"""Points below which choices have no worth."""
_REFUSED, _KEY, _SCORES = "unbuildable", "key", "scores"
"""User attributes of a trial: why its choices make no network; its architecture; its scores by rung."""


@dataclass(frozen=True, kw_only=True)
class StudyPoint:
    """A scored architecture.

    `number`: of the proposal. `scores`: of the rungs that it came to, higher is better. `cost`: of the objective, lower is better.
    """

    number: int
    chosen: Mapping[str, Value]
    architecture: Architecture
    scores: tuple[float, ...]
    cost: float

    @property
    def score(self) -> float:
        """The score of the last rung."""
        return self.scores[-1]


class ArchitectureStudy:
    """The proposals of one search in `folder`. `begin`: networks that are proposed first, as far as the space has them. `rungs`: how many
    there are; points of the last one are compared."""

    def __init__(
        self, space: Space, base: ModelConfig, folder: Path, *, begin: Sequence[ModelConfig] = (), rungs: int = 1, seed: int = 0,
        sampler: Sampler = "tpe",
    ) -> None:  # fmt: skip
        self.space, self.base, self.seed, self.sampler, self.rungs = space, base, seed, sampler, rungs
        known = [chosen for config in begin if (chosen := space.chosen_for(config, base)) is not None]
        self.begin = list({json.dumps(chosen, sort_keys=True): chosen for chosen in known}.values())
        self._labels = {name: {_label(value): value for value in values} for name, values in space.choices.items()}
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / JOURNAL
        _mend(file)
        try:
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(file)))
            self.study = optuna.create_study(study_name=NAME, storage=storage, directions=["maximize", "minimize"], load_if_exists=True)
        except (ValueError, KeyError, OSError) as error:
            raise DataError(f"{file}: not the journal of a study ({error}): search anew, with another --output") from error
        for _ in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
            self.study.ask()  # makes it a running one
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)  # its process was killed

    @property
    def proposals(self) -> list[FrozenTrial]:
        """Trials that were scored, or whose choices make no network; not those of a killed process."""
        return [
            trial for trial in self.study.get_trials(deepcopy=False)
            if trial.state == TrialState.COMPLETE or _REFUSED in trial.user_attrs
        ]  # fmt: skip

    @property
    def refusal(self) -> str | None:
        """Why the last refused proposal makes no network; None if none was refused."""
        return next((trial.user_attrs[_REFUSED] for trial in reversed(self.proposals) if _REFUSED in trial.user_attrs), None)

    @property
    def points(self) -> list[StudyPoint]:
        """The scored architectures in the order of their proposal, each once."""
        points: dict[str, StudyPoint] = {}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            if trial.user_attrs[_KEY] not in points:
                points[trial.user_attrs[_KEY]] = self._point(trial)
        return list(points.values())

    @property
    def front(self) -> list[StudyPoint]:
        """The points of the last rung that no other one beats in score and cost, by cost."""
        return pareto_front([point for point in self.points if len(point.scores) == self.rungs])

    def step(self, judge: Callable[[Architecture], tuple[Sequence[float], float]]) -> StudyPoint | None:
        """Propose one architecture and judge it by (scores, cost); None if the choices make no network."""
        proposals = self.proposals
        seed = zlib.crc32(f"{self.seed}:{len(proposals)}".encode())
        self.study.sampler = (
            optuna.samplers.RandomSampler(seed=seed) if self.sampler == "random"
            else optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM_ONES)
        )  # fmt: skip
        if len(proposals) < len(self.begin):
            self.study.enqueue_trial({name: _label(value) for name, value in self.begin[len(proposals)].items()})
        trial = self.study.ask()
        chosen = {name: labels[trial.suggest_categorical(name, list(labels))] for name, labels in self._labels.items()}
        try:
            architecture = self.space.architecture(chosen, self.base)
            known = next((one for one in proposals if one.user_attrs.get(_KEY) == architecture.key), None)
            trial.set_user_attr(_KEY, architecture.key)
            if known is not None and _REFUSED in known.user_attrs:
                raise UnbuildableError(known.user_attrs[_REFUSED])
            scores, cost = judge(architecture) if known is None else (known.user_attrs[_SCORES], known.values[1])
        except UnbuildableError as error:
            trial.set_user_attr(_REFUSED, str(error))
            self.study.tell(trial, state=TrialState.FAIL)
            return None
        trial.set_user_attr(_SCORES, list(scores))
        self.study.tell(trial, [scores[-1], cost])
        return self._point(self.study.trials[trial.number])

    def importances(self) -> dict[str, dict[str, float]]:
        """Worth of each choice for the score of the first rung and for the cost: shares that add up to 1, largest first; empty for few
        points.

        Source: PED-ANOVA (Watanabe et al., 2304.10255).
        """
        if len(self.points) < FEWEST_RANKED:
            return {}
        found = {}
        for index, name in enumerate(("score", "cost")):
            evaluator = optuna.importance.PedAnovaImportanceEvaluator(evaluate_on_local=False)

            def target(trial: FrozenTrial, index: int = index) -> float:
                return -float(trial.user_attrs[_SCORES][0]) if index == 0 else float(trial.values[1])

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that low targets count as good, which the sign above takes care of
                found[name] = dict(optuna.importance.get_param_importances(self.study, evaluator=evaluator, target=target))
        return found

    def _point(self, trial: FrozenTrial) -> StudyPoint:
        chosen = {name: self._labels[name][label] for name, label in trial.params.items()}
        architecture = self.space.architecture(chosen, self.base)
        scores = tuple(trial.user_attrs[_SCORES])
        return StudyPoint(number=trial.number, chosen=chosen, architecture=architecture, scores=scores, cost=trial.values[1])


def pareto_front(points: Sequence[StudyPoint]) -> list[StudyPoint]:
    """The points that no other one beats in score and cost, by cost."""
    front: list[StudyPoint] = []
    for point in sorted(points, key=lambda point: (point.cost, -point.score, point.number)):
        if not front or point.score > front[-1].score:
            front.append(point)
    return front


def _label(value: Any) -> str:
    return json.dumps(value)


def _mend(file: Path) -> None:
    """Remove the half line and the lock of a process that was killed while it wrote. The caller holds the folder."""
    Path(f"{file}.lock").unlink(missing_ok=True)
    if not file.is_file():
        return
    content = file.read_bytes()
    if content and not content.endswith(b"\n"):
        file.write_bytes(content[: content.rfind(b"\n") + 1])
