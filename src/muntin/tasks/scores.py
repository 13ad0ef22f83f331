"""Scores of a session on samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from numpy.typing import NDArray
from torch import Tensor

from muntin.artifact.answers import Task
from muntin.runtime.tiles import Predictor, allowed_tile
from muntin.tasks.samples import Sample

PictureAnswers = list[NDArray[Any]]


class RankTurns(Protocol):
    """Processes that take turns with samples. `count`: of them; `index`: this one's number, from 0."""

    @property
    def count(self) -> int: ...
    @property
    def index(self) -> int: ...

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum of the processes' tensors of one shape."""


@dataclass(frozen=True, kw_only=True)
class Judging:
    """A session that is scored on samples.

    `tile`: largest side of tiles. `answers`: a list to which the answer of each sample is added. `similarity`: compute SSIM, too.
    """

    session: Predictor
    samples: Sequence[Sample]
    tile: int
    answers: PictureAnswers | None = None
    ranks: RankTurns
    progress: Callable[[int, int], None] = lambda done, total: None
    similarity: bool = True

    @property
    def side(self) -> int | None:
        """Side of the tiles."""
        return allowed_tile(self.session.signature, self.tile)

    def turns(self) -> Iterator[Sample]:
        """Yield this process's samples."""
        for index in range(self.ranks.index, len(self.samples), self.ranks.count):
            yield self.samples[index]
            self.progress(index + 1, len(self.samples))


@dataclass(frozen=True, kw_only=True)
class TaskScores(ABC):
    """Scores of a session, over all samples."""

    task: Task
    samples: int

    @property
    @abstractmethod
    def score(self) -> float:
        """Score of the task. Higher is better."""

    @property
    def by_class(self) -> dict[str, float | None]:
        """The score of each class by its name; None if it has none. Empty without classes."""
        return {}

    @property
    @abstractmethod
    def figures(self) -> dict[str, Any]:
        """The scores of a validation."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the score has to know."""
        return ()

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the score by the number of samples; None where they are no sample."""
        return None

    def lines(self, scale: int) -> tuple[str, ...]:
        """Return further scores in words; `scale`: that of the model's answer."""
        return ()

    @property
    def pictures(self) -> tuple[int, ...]:
        """The number of pictures of each class; empty where pictures are of several."""
        return ()

    def report(self, scale: int) -> dict[str, Any]:
        """Return what a report shows beside the score: `confusion`, `baseline`."""
        return {}
