"""Recipe: all settings of a run, read from YAML and checked before the run starts.

The fields of each section are in `data.config` and `training.config`. Errors are one line that says what to write instead.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from muntin.artifact import ClassInfo, Signature
from muntin.artifact.answers import ANSWERS, Answer, Task
from muntin.data.config import DataConfig, with_scale
from muntin.errors import RecipeError
from muntin.section import Section
from muntin.tasks.answers import ANSWERING
from muntin.tasks.learning import LEARNING
from muntin.training.config import (
    CompressionConfig,
    ModelChoice,
    QuantizationConfig,
    TeacherConfig,
    TrainingConfig,
    UpdateConfig,
)


class Recipe(Section):
    """One run. Relative paths in it start at the recipe's folder, `root`."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the run's folder: letters, digits, . _ -")
    task: Task = Field(
        default="segment", description="segment: a class for every pixel; classify: one class for a picture; restore: a better picture"
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="of the weights, the crops and their order")
    data: DataConfig = DataConfig()
    model: ModelChoice = ModelChoice()
    training: TrainingConfig = TrainingConfig()
    teacher: TeacherConfig | None = Field(default=None, description="a trained model to learn from, too; null: none")
    quantization: QuantizationConfig = QuantizationConfig()
    compression: CompressionConfig = CompressionConfig()
    update: UpdateConfig = UpdateConfig()

    @model_validator(mode="after")
    def _check_masks(self) -> Recipe:
        learning, folders, answer = LEARNING[self.task], ANSWERING[self.task].folders, self.answer
        if folders.keys and not self.data.given(folders.keys) and (self.data.source == "folders" or not folders.guessed):
            raise ValueError(folders.needs)
        for task, other in ANSWERING.items():
            if task != self.task and (given := self.data.given(other.folders.keys)):
                raise ValueError(f"task: {self.task} has no data.{given[0]}: leave it out, or write task: {task}")
        if not learning.overlaps and self.training.loss in ("dice", "dice-cross-entropy"):
            raise ValueError(f"training.loss {self.training.loss} is for masks, and the task is {self.task}: take cross-entropy or focal")
        if not answer.has_classes and (self.training.loss != "cross-entropy" or self.training.class_weights is not None):
            raise ValueError(f"training.loss and class_weights are for classes, which {self.task} has not: leave them out")
        for name, value in self.data.augmentation.changes(self.data.augment).items():
            task = next((task for task, each in LEARNING.items() if name in each.mixtures), self.task)
            if value and task != self.task:
                raise ValueError(f"data.augmentation.{name} {value:g} is for task: {task}, and the task is {self.task}: remove it")
            if value and name == "rotation" and not learning.rotates:
                raise ValueError(f"data.augmentation.rotation {value:g}: crops of {self.task} are not rotated: remove it")
        if not answer.masks and self.data.rare:
            raise ValueError(
                f"data.rare {self.data.rare:g}: a crop is centred on a pixel of a class by its mask, which {self.task} lacks: remove it"
            )
        if self.teacher is not None and self.teacher.unlabelled is not None and not answer.has_classes:
            raise ValueError(
                f"teacher.unlabelled is for segment and classify: for {self.task} a photograph is its own target: put it in data.images"
            )
        return self

    @property
    def answer(self) -> Answer:
        """Facts of the task."""
        return ANSWERS[self.task]

    def signature(self, classes: Iterable[ClassInfo]) -> Signature:
        """Inputs and outputs of a model that is trained by this recipe on data with `classes`."""
        side = self.data.crop if self.answer.one else None
        scale = self.data.output_scale
        return Signature(task=self.task, channels=self.data.channels, classes=tuple(classes), side=side, scale=scale)


def present_keys(recipe: Any) -> Any:
    """The values of a stored recipe without keys that earlier versions had and that do not change the trained model."""
    if not isinstance(recipe, dict) or not isinstance(compression := recipe.get("compression"), dict):
        return recipe
    known = {key: value for key, value in compression.items() if key in CompressionConfig.model_fields}
    return {key: value for key, value in recipe.items() if key != "budget"} | {"compression": known}


def settled(recipe: Recipe, root: Path) -> Recipe:
    """The recipe with what is read from the data: `data.scale` of pairs."""
    return recipe.model_copy(update={"data": with_scale(recipe.data, root=root)})


def recipe_text(recipe: Recipe, *, defaults: bool = False) -> str:
    """A recipe as YAML for `load_recipe`; values that equal their default only if `defaults` is True."""
    values = recipe.model_dump(mode="json", exclude_defaults=not defaults)
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    # PyYAML folds lines at U+0085 and reads blanks back
    return text if "\x85" not in text else yaml.safe_dump(values, sort_keys=False)


def load_recipe(path: Path | str, overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a YAML recipe. `overrides`: `section.key=value` with YAML values; the last one for a key counts.

    Raises `RecipeError` for a missing file, broken YAML, an unknown key (naming the nearest one) or a value out of range.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_EachKeyOnce)  # noqa: S506 - it is a SafeLoader
    except OSError as error:
        inside = path / "recipe.yaml"
        advice = f"did you mean {inside}?" if inside.is_file() else "give the path of a YAML file, or write one with `muntin init DIR`"
        raise RecipeError(f"recipe {path}: {error.strerror or error}; {advice}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that is none (2024-13-45)
        raise RecipeError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"recipe {path}: holds {type(content).__name__}, not keys and values; `muntin init DIR` writes an example")
    for override in overrides:
        set_value(content, override)
    return parse_recipe(content, where=f"recipe {path}")


class _EachKeyOnce(yaml.SafeLoader):
    """Refuse duplicate keys, as the YAML standard does; PyYAML takes the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"'{key.value}' is in line {seen[key.value]} and again in line {line}: keep one of them")
            seen[str(key.value)] = line
        return super().construct_mapping(node, deep)


def parse_recipe(content: dict[str, Any], *, where: str) -> Recipe:
    """Check a recipe's content. `where` names it in errors."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(f"{where}: {_explain(error)}") from error


def override_recipe(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """A recipe with each `section.key=value` replaced, checked like a recipe from a file."""
    content = recipe.model_dump(mode="json")
    for override in overrides:
        set_value(content, override)
    return parse_recipe(content, where=f"recipe {recipe.name}")


def set_value(content: dict[str, Any], override: str) -> None:
    """Replace a value of a recipe's content by `section.key=value`, whose value is YAML. Raises RecipeError for another form."""
    keys, equals, value = override.partition("=")
    if not equals or not keys:
        raise RecipeError(f"'{override}': write section.key=value, for example training.steps=200")
    *parents, last = keys.split(".")
    for key in parents:
        content = content.setdefault(key, {})
        if not isinstance(content, dict):
            raise RecipeError(f"'{override}': '{key}' holds a value, not keys")
    try:
        content[last] = yaml.safe_load(value)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"'{override:.80}': '{value:.80}' is not a YAML value") from error


_ALLOWED = "Input should be "


def _explain(error: ValidationError) -> str:
    """The first mistake in one line: unknown keys first, then the deepest one."""
    mistakes = sorted(error.errors(include_url=False), key=lambda e: (e["type"] != "extra_forbidden", -len(e["loc"])))
    first = mistakes[0]
    if first["type"] == "extra_forbidden":
        *parents, key = first["loc"]
        place, model = _follow(parents)
        known = list(model.model_fields)
        near = difflib.get_close_matches(str(key), known, 1, cutoff=0.5)
        if not place:  # a key without its section
            near = [f"{name}.{key}" for name in known if str(key) in _follow([name])[1].model_fields] or near
        meant = f"did you mean '{near[0]}'? " if near else ""
        return f"unknown key '{f'{place}.{key}' if place else key}'; {meant}known here: {', '.join(known)}"
    place, _ = _follow(first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    same = [one for one in mistakes if one["msg"].startswith(_ALLOWED) and _follow(one["loc"])[0] == place]
    allowed = ["keys with values" if one["type"] in ("model_type", "dict_type") else one["msg"].removeprefix(_ALLOWED) for one in same]
    if message.startswith(_ALLOWED):  # of a union, each member's own
        message = _ALLOWED + " or ".join(dict.fromkeys(allowed))
    value = first.get("input")
    shown = "" if isinstance(value, dict | list) or value is None else f" (got {value!r})"
    near = difflib.get_close_matches(value, re.findall("'([^']+)'", message), 1, cutoff=0.5) if isinstance(value, str) else []
    return f"{place or 'recipe'}: {message}{shown}{f'; did you mean {near[0]!r}?' if near else ''}"


def _follow(location: Iterable[int | str]) -> tuple[str, type[BaseModel]]:
    """The dotted place of pydantic's location in a recipe, and the model whose fields are allowed there."""
    model: type[BaseModel] = Recipe
    place = []
    for part in location:
        field = model.model_fields.get(str(part))
        if field is None and not isinstance(part, int):
            continue  # a member of a union, which has no name in a recipe
        place.append(str(part))
        candidates = [] if field is None else [field.annotation, *get_args(field.annotation)]
        nested = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        model = nested[0] if nested else model
    return ".".join(place), model
