"""Settings of a search, and the file `search.json` that holds them, the time that it took and, at the end, its results."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from muntin.artifact.atomic_files import write_files
from muntin.errors import MuntinError, RecipeError
from muntin.searching.space import Space
from muntin.searching.study import Sampler
from muntin.training.checkpoint import FREE, value_changes
from muntin.training.recipe import Recipe

SearchObjective = Literal["latency", "size", "memory"]
FILE = "search.json"
FORMAT = 1
CANDIDATES, FINALISTS, CHECKED = 200, 3, 6
"""Defaults: architectures that are scored, those that are trained alone, and whole networks that check the predicted latency."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """Settings of a search besides recipe and space. `objective`: what is made least.

    `minutes`: of the whole search, without the measurement of latencies, which is kept for other searches on this machine. `candidates`:
    architectures that are scored. `finalists`: those that are trained alone. `checked`: whole networks that check predicted latencies.
    `own`: train the recipe's own model, too, for comparison.
    """

    objective: SearchObjective = "latency"
    minutes: float | None = None
    candidates: int = CANDIDATES
    finalists: int = FINALISTS
    checked: int = CHECKED
    sampler: Sampler = "nsga2"
    own: bool = True

    def __post_init__(self) -> None:
        if self.objective not in ("latency", "size", "memory"):
            raise RecipeError(f"objective '{self.objective}': give latency, size or memory")
        if self.sampler not in ("nsga2", "random"):
            raise RecipeError(f"sampler '{self.sampler}': give nsga2 or random")
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise RecipeError(f"minutes {self.minutes:g}: give a number above 0, or leave it out for no limit")
        for name in ("candidates", "finalists"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} {getattr(self, name)}: give a whole number from 1")
        if self.checked < 0:
            raise RecipeError(f"checked {self.checked}: give a whole number from 0")


class SearchFile:
    """`search.json` of a search in `folder`, written anew or, of a search that goes on, compared with the settings given.

    `seconds`, `table_seconds`: of the search and of the measurement of latencies so far. `first_candidates`: number of candidates when the
    search began, by which its generations are sized: more may be given to go on. Raises `RecipeError` for other settings, and `MuntinError`
    for a file that holds none.
    """

    def __init__(self, folder: Path, recipe: Recipe, space: Space, settings: SearchSettings) -> None:
        self.folder = folder
        content = {
            "format": FORMAT, "recipe": recipe.model_dump(mode="json"),
            "space": {name: list(values) for name, values in space.choices.items()},
            "settings": asdict(settings),
        }  # fmt: skip
        self.content: dict[str, Any] = json.loads(json.dumps(content))
        self.seconds, self.table_seconds, self.first_candidates = 0.0, 0.0, settings.candidates
        if (folder / FILE).is_file():
            self._continue(folder / FILE)
        self.content["first_candidates"] = self.first_candidates
        self.save(self.seconds, self.table_seconds)

    def _continue(self, file: Path) -> None:
        try:
            earlier = json.loads(file.read_text(encoding="utf-8"))
            self.seconds, self.table_seconds = float(earlier["seconds"]), float(earlier["table_seconds"])
            before = int(earlier["settings"]["candidates"])
            self.first_candidates = int(earlier.get("first_candidates", before))
            stored, given = _compared(earlier), _compared(self.content)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise MuntinError(f"{file}: not the settings of a search ({error}): give another --output") from error
        if given["settings"]["candidates"] > before:
            stored["settings"]["candidates"] = given["settings"]["candidates"]
        if changes := value_changes(stored, given):
            raise RecipeError(
                f"{self.folder} holds a search with other settings ({changes}): give those again to go on with it, or another --output"
            )

    def save(self, seconds: float, table_seconds: float, **results: Any) -> None:
        """Write the file. `results`: further values in it."""
        text = json.dumps({**self.content, "seconds": seconds, "table_seconds": table_seconds, **results}, indent=1, default=str)
        write_files(self.folder, {FILE: text.encode()})


def _compared(content: dict[str, Any]) -> dict[str, Any]:
    """Return what has to stay the same while a search goes on: all but the keys of `data` that do not change a batch."""
    recipe = content["recipe"]
    data = {key: value for key, value in recipe["data"].items() if key not in FREE}
    return {**{key: content[key] for key in ("format", "space", "settings")}, "recipe": {**recipe, "data": data}}
