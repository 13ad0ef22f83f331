"""Settings of a search, the time left of a call, and the file `search.json`: settings, progress and, at the end, results."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from muntin.artifact.atomic_files import write_files
from muntin.budgeting.forms.latency import latency_settings
from muntin.errors import MuntinError, RecipeError
from muntin.searching.space import Space
from muntin.searching.study import Sampler
from muntin.training.checkpoint import FREE, value_changes
from muntin.training.recipe import Recipe

SearchObjective = Literal["latency", "size", "memory"]
FILE = "search.json"
FORMAT = 3
CANDIDATES, FINALISTS = 40, 3
"""Defaults: networks that are tried, and those that are trained alone."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of a search besides recipe and space. `objective`: what is made least.

    `minutes`: of one call, latencies included; it is exceeded by one step of work at most (one candidate, or one network's training and
    export). `candidates`: networks that are tried. `finalists`: those that are trained alone. `own`: train the recipe's own model,
    too, for comparison.
    """

    objective: SearchObjective = "latency"
    minutes: float | None = None
    candidates: int = CANDIDATES
    finalists: int = FINALISTS
    sampler: Sampler = "tpe"
    own: bool = True

    def __post_init__(self) -> None:
        if self.objective not in ("latency", "size", "memory"):
            raise RecipeError(f"objective '{self.objective}': give latency, size or memory")
        if self.sampler not in ("tpe", "random"):
            raise RecipeError(f"sampler '{self.sampler}': give tpe or random")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise RecipeError(f"minutes {self.minutes:g}: give a number above 0, or leave it out for no limit")
        for name in ("candidates", "finalists"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} {getattr(self, name)}: give a whole number from 1")


class CallMinutes:
    """Time left of one call of a search. `minutes` None: no limit. `clock`: seconds."""

    def __init__(self, minutes: float | None, clock: Callable[[], float]) -> None:
        self.minutes, self.clock, self.started = minutes, clock, clock()

    @property
    def used(self) -> float:
        """Seconds since the call began."""
        return self.clock() - self.started

    def left(self, share: float = 1.0) -> float:
        """Seconds left of a share of the minutes; infinite without a limit."""
        return math.inf if self.minutes is None else 60 * self.minutes * share - self.used


class SearchFile:
    """`search.json` of a search in `folder`. If the search has begun, the stored settings are compared with the given ones.

    `seconds`: of the search so far. `reference_ms`: latency of the recipe's own network, 0 until it is measured. `scored`, `study_seconds`:
    candidates so far, and their time. `first`: the settings that the search began with. They size its trainings, so
    another call may have more candidates and other minutes. Raises `RecipeError` for other settings, and `MuntinError` for a file that
    holds none.
    """

    def __init__(self, folder: Path, recipe: Recipe, space: Space, settings: SearchSettings) -> None:
        self.folder = folder
        content = {
            "format": FORMAT, "recipe": recipe.model_dump(mode="json"),
            "space": {name: list(values) for name, values in space.choices.items()},
            "settings": asdict(settings), "first": asdict(settings), "latencies": latency_settings(recipe.training.threads),
        }  # fmt: skip
        self.content: dict[str, Any] = json.loads(json.dumps(content))
        self.notes: list[str] = []
        self.seconds, self.reference_ms, self.scored, self.study_seconds = 0.0, 0.0, 0, 0.0
        if (folder / FILE).is_file():
            self._continue(folder / FILE)
        self.first = SearchSettings(**self.content["first"])

    def _continue(self, file: Path) -> None:
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
            if earlier["format"] != FORMAT:
                raise RecipeError(
                    f"{file}: a search of format {earlier['format']}, by another version of muntin; this one goes on with format {FORMAT}: "
                    "give another --output"
                )
            self.seconds, self.reference_ms = float(earlier["seconds"]), float(earlier["reference_ms"])
            self.scored, self.study_seconds = int(earlier["scored"]), float(earlier["study_seconds"])
            before, minutes = int(earlier["settings"]["candidates"]), earlier["settings"]["minutes"]
            self.content["first"], measured = earlier["first"], earlier["latencies"]
            stored, given = _compared(earlier), _compared(self.content)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise MuntinError(f"{file}: not the settings of a search ({error}): give another --output") from error
        if given["settings"]["candidates"] > before:
            stored["settings"]["candidates"] = given["settings"]["candidates"]
        if minutes is not None and given["settings"]["minutes"] is not None:
            stored["settings"]["minutes"] = given["settings"]["minutes"]
        if changes := value_changes(stored, given):
            raise RecipeError(
                f"{self.folder} holds a search with other settings ({changes}): give those again to go on with it, or another --output"
            )
        if self.content["settings"]["objective"] == "latency" and (changes := value_changes(measured, self.content["latencies"])):
            self.notes.append(
                f"candidates scored before keep latencies of other conditions ({changes}): give another --output to renew them"
            )

    def save(self, **results: Any) -> None:
        """Write the file. `results`: further values in it."""
        progress = {name: getattr(self, name) for name in ("seconds", "reference_ms", "scored", "study_seconds")}
        text = json.dumps({**self.content, **progress, **results}, indent=1, default=str)
        write_files(self.folder, {FILE: text.encode()})


def _compared(content: dict[str, Any]) -> dict[str, Any]:
    """Return what has to stay the same while a search goes on: all but the keys of `data` that do not change a batch."""
    recipe = content["recipe"]
    data = {key: value for key, value in recipe["data"].items() if key not in FREE}
    return {**{key: content[key] for key in ("format", "space", "settings")}, "recipe": {**recipe, "data": data}}
