"""Trials of candidates: the cost of the deployed network before it is trained, then short trainings by the very recipe, in rungs.

    candidate -> cost -> rung 0: a ninth of the training -> rung 1: a third -> for the best few the whole (`finalists`)

After a rung the best third of those that came so far go on, by fronts of score and cost. Each rung is a training of its own from random
weights, so that its schedule ends.
Source: successive halving for several objectives by non-dominated sorting (Schmucker et al., 2106.12639).

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.data import Source, calibration_batches
from muntin.deployment.checkpoint_export import export_side
from muntin.deployment.export import export
from muntin.errors import MuntinError
from muntin.models import HybridNet, ModelConfig
from muntin.runtime.engines.registry import open_image_session
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.searching.cost import artifact_bytes, memory_bytes
from muntin.searching.point_recipe import network_recipe, recipe_of
from muntin.searching.space import Architecture, UnbuildableError
from muntin.training.checkpoint import checkpoints_in
from muntin.training.fitting import fit
from muntin.training.progress.report import FitReport
from muntin.training.recipe import Recipe

RUNGS = (9, 3)
"""By how much the training of each rung is shorter than that of a network that is trained alone."""
KEPT = 3
"""One in so many candidates goes on to the next rung."""
ROUNDS = 30
"""Timed calls of a candidate and of the recipe's own network."""
IMAGES = 16
"""Training pictures with which a candidate is quantised."""
TRIALS = "trials"
"""Folder of the runs of candidates, which are removed when they are scored."""
NOT_DEPLOYED = "the network cannot be deployed"
Judged = tuple[float, float]
"""Score, higher is better, and cost, lower is better."""


class StoppedTrialError(MuntinError):
    """A training was ended by the user; the same search goes on with it."""


@contextmanager
def _refused(reason: str) -> Iterator[None]:
    """Turn an error into the refusal of a candidate, so that the search goes on with others."""
    try:
        yield
    except MuntinError as error:
        raise UnbuildableError(f"{reason}: {error}") from error


class CandidateTrials:
    """Costs and scores of candidates. `recipe`: with the length of a training of a network alone. `objective`: latency, size or memory.

    `reference_ms`: latency of the recipe's own network, 0: it is measured; candidates are timed in turns with it. Errors of that network
    end the search; those of others are `UnbuildableError`.
    """

    def __init__(
        self, recipe: Recipe, base: ModelConfig, source: Source, *, folder: Path, root: Path, objective: str, reference_ms: float = 0.0
    ) -> None:
        self.recipe, self.base, self.source = recipe, base, source
        self.folder, self.root, self.objective, self.reference_ms = folder / TRIALS, root, objective, reference_ms
        for place in self.folder.glob("*.untrained"):  # of a process that was killed
            shutil.rmtree(place)

    def cost(self, architecture: Architecture) -> float:
        """Milliseconds of the deployed network with random weights, or bytes. Raises `UnbuildableError` if it cannot be deployed."""
        if self.objective == "size":
            return artifact_bytes(architecture)
        if self.objective == "memory":
            return memory_bytes(architecture, export_side(self.recipe))
        reference, place = self._reference, self._place(architecture).with_suffix(".untrained")
        try:
            with _refused(NOT_DEPLOYED):
                self._deploy(architecture, place)
            ms, own = self._latencies(place, reference, architecture)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        self.reference_ms = self.reference_ms or own
        return ms / own * self.reference_ms

    def score(
        self, architecture: Architecture, cost: float, earlier: Sequence[Sequence[Judged]], report: FitReport = lambda progress: None
    ) -> tuple[float, ...]:
        """Validation scores of the rungs that a candidate comes to. `earlier`: of each rung those that came there.

        Goes on with a trial that was interrupted. Raises `StoppedTrialError` if it is interrupted, and `UnbuildableError` if it fails.
        """
        place, scores = self._place(architecture), list[float]()
        try:
            for rung, divisor in enumerate(RUNGS):
                scores.append(self._train(architecture, place / f"rung-{rung}", divisor, report))
                if not goes_on((scores[-1], cost), earlier[rung]):
                    break
        except UnbuildableError:
            shutil.rmtree(place, ignore_errors=True)
            raise
        shutil.rmtree(place, ignore_errors=True)
        return tuple(scores)

    @cached_property
    def _reference(self) -> Path:
        """The recipe's own network with random weights, exported anew by each call of a search."""
        place = self.folder / "reference"
        self._deploy(Architecture(config=self.base), place)
        return place

    def _place(self, architecture: Architecture) -> Path:
        return self.folder / hashlib.sha256(architecture.key.encode()).hexdigest()[:12]

    def _train(self, architecture: Architecture, folder: Path, divisor: int, report: FitReport) -> float:
        recipe = shorter(network_recipe(self.recipe, architecture, architecture.options(self.base), self.recipe.name), divisor)
        resume = bool(checkpoints_in(folder / "checkpoints"))
        with nullcontext() if architecture == Architecture(config=self.base) else _refused("training"):
            result = fit(recipe, directory=folder, root=self.root, resume=resume, progress=report, check=False)
        if result.interrupted or result.stop_requested:
            raise StoppedTrialError("the training of a candidate was interrupted")
        return float((result.result or result.validation[-1])["score"])

    def _batches(self, side: int) -> list[Tensor]:
        batches = calibration_batches(
            self.source.split("train"), task=self.recipe.task, crop=self.recipe.data.crop, count=IMAGES, batch_size=8, seed=self.recipe.seed
        )  # fmt: skip
        return [F.interpolate(images.float(), (side, side)).round().clamp(0, 255) for images in batches]

    def _deploy(self, architecture: Architecture, place: Path) -> None:
        recipe = recipe_of(self.recipe, architecture)
        batches = self._batches(export_side(recipe))
        torch.manual_seed(0)
        model = HybridNet(architecture.config).eval()
        place.parent.mkdir(parents=True, exist_ok=True)
        export(
            model, batches[0], place, signature=recipe.signature(tuple(self.source.classes)), calibration=batches,
            quantization=recipe.quantization, sizes="fixed", progress=False,
        )  # fmt: skip

    def _latencies(self, place: Path, reference: Path, architecture: Architecture) -> tuple[float, float]:
        """Median milliseconds of a candidate and of the recipe's own network, in turns."""
        options = SessionOptions(threads=self.recipe.training.threads, cache=False)
        sides = export_side(recipe_of(self.recipe, architecture)), export_side(self.recipe)
        image, other_image = (np.zeros((1, side, side, self.recipe.data.channels), np.uint8) for side in sides)
        with closing(open_image_session(reference, options)) as other:
            with _refused(NOT_DEPLOYED):
                session = open_image_session(place, options)
            with closing(session):
                calls: dict[str, Any] = {"candidate": lambda _: session(image), "reference": lambda _: other(other_image)}
                found = interleaved_latency(calls, image, rounds=ROUNDS)
        return found["candidate"].median_ms, found["reference"].median_ms


def shorter(recipe: Recipe, divisor: int) -> Recipe:
    """The recipe with a training that is so many times shorter, in steps and in minutes."""
    training = recipe.training
    limits = {"steps": max(1, training.steps // divisor), "minutes": None if training.minutes is None else training.minutes / divisor}
    return recipe.model_copy(update={"training": training.model_copy(update=limits)})


def goes_on(candidate: Judged, others: Sequence[Judged]) -> bool:
    """Return True if a candidate is among the best third of all, front by front of score and cost."""
    left, places = [candidate, *others], -(-(1 + len(others)) // KEPT)
    while places > 0:
        front = [one for one in left if not any(_beats(other, one) for other in left)]
        if candidate in front:
            return True  # a front is kept whole
        places -= len(front)
        left = [one for one in left if one not in front]
    return False


def _beats(one: Judged, other: Judged) -> bool:
    return one != other and one[0] >= other[0] and one[1] <= other[1]
