"""The best few of a front: trained alone, deployed in INT8, scored as artefacts and timed in turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from muntin.data import Source
from muntin.deployment.checkpoint_export import ARTIFACT, export_checkpoint, export_side
from muntin.runtime import load
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.searching.cost import layer_macs, memory_bytes, parameters_of
from muntin.searching.space import Architecture
from muntin.searching.study import StudyPoint
from muntin.training.checkpoint import checkpoints_in, read_checkpoint
from muntin.training.evaluation import evaluate, tile_of
from muntin.training.fitting import FitResult, ended_early, fit
from muntin.training.progress.report import FitReport
from muntin.training.recipe import Recipe

ROUNDS = 40
"""Timed calls of each network."""
ENDED_BEFORE = "ended at step "
"""Begins the note of `fit` on a run that it found finished."""
FEWEST_RANKED = 3
"""Networks below which a rank correlation says nothing."""
CHEAPER = 1.2
"""Ratio of costs from which a network counts as cheaper. Scores differ from the margin of the task's score on."""


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A network that was trained alone. `score`: of the artefact on the validation split; `float_score`: of the checkpoint.

    `bytes`: of the artefact. `ms`: median latency of one picture of `export_side` pixels, all networks in turns. `point`: None for the
    recipe's own model. `notes`: of its training.
    """

    name: str
    architecture: Architecture
    point: StudyPoint | None
    run: Path
    artifact: Path
    recipe: Recipe
    float_score: float
    score: float
    bytes: int
    ms: float = 0.0
    notes: tuple[str, ...] = ()

    def row(self) -> dict[str, Any]:
        """The figures as plain values."""
        own = {name: getattr(self, name) for name in ("name", "float_score", "score", "bytes", "ms")}
        short = {"short_score": None if self.point is None else self.point.score}
        config = self.architecture.config
        counts = {"parameters": parameters_of(config), "macs": layer_macs(config, self.architecture.resolution)}
        return {**own, **short, **counts, "run": str(self.run), "artifact": str(self.artifact)}


def spread(front: Sequence[StudyPoint], count: int) -> list[StudyPoint]:
    """Points at even distances along a front, the one with the highest score among them."""
    if count >= len(front):
        return list(front)
    if count == 1:
        return [front[-1]]
    return [front[round(index * (len(front) - 1) / (count - 1))] for index in range(count)]


def train_finalist(
    recipe: Recipe,
    architecture: Architecture,
    *,
    name: str,
    folder: Path,
    root: Path,
    source: Source,
    point: StudyPoint | None = None,
    report: FitReport = lambda progress: None,
) -> Finalist | None:
    """Train a network by a recipe, or go on with it, and export it in INT8.

    Returns None if the training was interrupted. `folder`: of its run.
    """
    result = fit(recipe, directory=folder, root=root, resume=bool(checkpoints_in(folder / "checkpoints")), progress=report)
    if result.interrupted or result.stop_requested:
        return None
    artifact = export_checkpoint(read_checkpoint(result.checkpoint), folder / ARTIFACT)
    with closing(load(artifact.path)) as session:
        score = evaluate(session, source.split("validation"), tile=tile_of(recipe.data.crop), similarity=False).score
    return Finalist(
        name=name, architecture=architecture, point=point, run=folder, artifact=artifact.path, recipe=recipe,
        float_score=float((result.result or result.validation[-1])["score"]), score=score, bytes=artifact.bytes,
        notes=_notes(result, recipe),
    )  # fmt: skip


def _notes(result: FitResult, recipe: Recipe) -> tuple[str, ...]:
    """Notes of a training, without those on its length, which the search has set."""
    of_length = ended_early(recipe.training, result.step, result.validation)
    return tuple(note for note in result.notes if note not in of_length and not note.startswith(ENDED_BEFORE))


def with_latencies(networks: Sequence[Finalist], *, threads: int | None = None) -> list[Finalist]:
    """The networks with their latencies, measured in turns."""
    timed = []
    sides = {network.name: export_side(network.recipe) for network in networks}
    for side in sorted(set(sides.values())):
        group = [network for network in networks if sides[network.name] == side]
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (1, side, side, group[0].recipe.data.channels), dtype=np.uint8)
        sessions = {network.name: load(network.artifact, threads=threads) for network in group}
        latencies = interleaved_latency(sessions, images, rounds=ROUNDS)
        for session in sessions.values():
            session.close()
        timed += [replace(network, ms=latencies[network.name].median_ms) for network in group]
    order = [network.name for network in networks]
    return sorted(timed, key=lambda network: order.index(network.name))


def unbeaten(networks: Sequence[Finalist], known: Mapping[str, str], *, objective: str) -> tuple[str, ...]:
    """Return a note if no other network is better than the presets and the recipe's own model that were trained beside it.

    `known`: their names by `Architecture.key`. Better: a higher score without a higher cost, or a lower cost without a lower score.
    """
    beside = [network for network in networks if network.architecture.key in known]
    if not beside:
        return ()
    side, margin = export_side(beside[0].recipe), beside[0].architecture.config.answer.score.margin

    def cost(network: Finalist) -> float:
        return {"latency": network.ms, "size": network.bytes, "memory": memory_bytes(network.architecture, side)}[objective]

    def better(one: Finalist, other: Finalist) -> bool:
        gain, ratio = one.score - other.score, cost(other) / cost(one)
        return (gain >= margin and ratio > 1 / CHEAPER) or (gain > -margin and ratio >= CHEAPER)

    if any(better(one, other) for one in networks if one not in beside for other in beside):
        return ()
    names = " or ".join({known[network.architecture.key]: None for network in beside})
    return (f"no network of the search is better than {names} at its cost: take {names}",)


def rank_correlation(networks: Sequence[Finalist]) -> float | None:
    """Spearman's rank correlation of the scores of short trainings and of the networks trained alone, both in floats."""
    pairs = [(network.point.score, network.float_score) for network in networks if network.point is not None]
    if len(pairs) < FEWEST_RANKED or len({a for a, _ in pairs}) == 1 or len({b for _, b in pairs}) == 1:
        return None
    return float(spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic)
