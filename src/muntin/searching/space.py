"""Space: the choices of an architecture search, and the architectures that they make.

    model:                        # not part of a space: fields that no choice names are those of the recipe's model
    stem: [[8, 16, 32], [16, 24, 48]]     a field of ModelConfig, with its values
    depths.0: [1, 2, 4]                   one entry of a field, counted from 0; an entry after the last one is appended
    stages: [1, 2]                        how many attention stages are kept
    resolution: [0.75, 1]                 side of the pictures over data.crop; classify only

Fields without effect (latents without latent heads, the decoder of a classifier) have the base's value, so that two choices that make the
same network are one architecture.
"""

from __future__ import annotations

import difflib
import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from muntin.artifact.answers import ANSWERS, Task
from muntin.errors import RecipeError
from muntin.models import ModelConfig

Value = bool | int | float | str | tuple[int, ...]
FIELDS = (
    "stem", "pairs", "dims", "depths", "attention", "block", "window", "latents", "latent_share", "mlp_ratio", "gate", "decoder", "fusion",
    "finest",
)  # fmt: skip
"""Fields of ModelConfig that may be searched. `head_dim` is the unit of widths, and the others are the task's."""
SEQUENCES = ("stem", "pairs", "dims", "depths")
RANGES: dict[str, tuple[float, float]] = {"stages": (1, 8), "resolution": (0.25, 1)}
"""Choices beside the fields of ModelConfig, with their least and greatest value."""
WHOLE = ("stages",)
WHOLE_FIELDS = ("window", "latents", "decoder", "finest")
EXHAUSTIVE = 2000
"""Most combinations that are all tried when a space is checked; of more, `SAMPLES` are drawn."""
SAMPLES = 300


class UnbuildableError(RecipeError):
    """A combination of choices makes no network."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One point of a space: a network, and the side of its pictures over the recipe's."""

    config: ModelConfig
    resolution: float = 1.0

    @property
    def key(self) -> str:
        """The same text for the same architecture."""
        return json.dumps({**self.config.model_dump(mode="json"), "resolution": self.resolution}, sort_keys=True)

    def options(self, base: ModelConfig) -> dict[str, Any]:
        """Fields of the configuration that differ from those of `base`, as plain values."""
        own, other = self.config.model_dump(mode="json"), base.model_dump(mode="json")
        return {name: value for name, value in own.items() if value != other[name]}


class Space(BaseModel):
    """The values of each choice, by its name; see the head of this file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    choices: dict[str, tuple[Value, ...]]

    @model_validator(mode="after")
    def _known(self) -> Self:
        if not self.choices:
            raise ValueError(f"the space is empty: give lists of values for some of {', '.join((*FIELDS, *RANGES))}")
        for name, values in self.choices.items():
            _check_name(name)
            if not values:
                raise ValueError(f"{name} is an empty list: give its values, or leave it out to keep the recipe's")
            if len({json.dumps(value) for value in values}) != len(values):
                raise ValueError(f"{name} names a value twice: {list(values)}")
            _check_values(name, values)
        return self

    @property
    def size(self) -> int:
        """Number of combinations of the choices."""
        return math.prod(map(len, self.choices.values()))

    def architecture(self, chosen: Mapping[str, Value], base: ModelConfig) -> Architecture:
        """The architecture of some choices; fields that none names are those of `base`. Raises `UnbuildableError` if there is none."""
        fields: dict[str, Any] = {name: getattr(base, name) for name in FIELDS}
        fields |= {name: value for name, value in chosen.items() if name in FIELDS}
        for name, value in sorted(chosen.items()):
            field, dot, position = name.partition(".")
            if dot:
                fields[field] = _with_entry(field, fields[field], int(position), value)
        if (stages := chosen.get("stages")) is not None:
            assert isinstance(stages, int)
            if stages > len(fields["dims"]):
                raise UnbuildableError(f"stages {stages}: dims has {len(fields['dims'])} entries: give more of them, or fewer stages")
            fields |= {name: fields[name][:stages] for name in ("dims", "depths")}
        try:
            config = ModelConfig.model_validate({**base.model_dump(), **_without_effect(fields, base)})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise UnbuildableError(f"{where}: {first['msg']}".removeprefix(": ").replace("Value error, ", "")) from error
        resolution = chosen.get("resolution", 1.0)
        assert not isinstance(resolution, str | tuple)
        if resolution != 1 and not base.answer.one:
            raise UnbuildableError(
                f"resolution {resolution:g}: pictures of {base.task} keep their size: search `stem` and `finest` instead"
            )
        return Architecture(config=config, resolution=float(resolution))

    def sample(self, generator: random.Random) -> dict[str, Value]:
        """Draw a value of each choice, uniformly."""
        return {name: generator.choice(values) for name, values in self.choices.items()}

    def chosen_for(self, config: ModelConfig, base: ModelConfig) -> dict[str, Value] | None:
        """The choices that make a network, with `base` for the other fields; None if there are none."""
        chosen: dict[str, Value] = {}
        for name, values in self.choices.items():
            field, dot, position = name.partition(".")
            if dot:
                entries = getattr(config, field)
                wanted: Any = entries[int(position)] if int(position) < len(entries) else values[0]
            else:
                usual = {"stages": len(config.dims), "resolution": 1.0}
                wanted = usual[name] if name in usual else getattr(config, name)
            found = [value for value in values if value == wanted]
            if not found:
                return None
            chosen[name] = found[0]
        if self._reason(chosen, base) is not None or self.architecture(chosen, base).config != config:
            return None
        return chosen

    def check(self, base: ModelConfig) -> None:
        """Raise `RecipeError`, which names the choice, for a value with which no architecture can be built.

        Tries all combinations of a small space; of a large one some hundred random ones for each value. The choice to blame is the one
        without which a network can be built; if there are two, they exclude each other and both are named.
        """
        buildable: set[tuple[str, str]] = set()
        if self.size <= EXHAUSTIVE:
            for values in itertools.product(*self.choices.values()):
                chosen = dict(zip(self.choices, values, strict=True))
                if self._reason(chosen, base) is None:
                    buildable.update((name, json.dumps(value)) for name, value in chosen.items())
        for name, values in self.choices.items():
            for value in values:
                if (name, json.dumps(value)) in buildable or (self.size > EXHAUSTIVE and self._with(name, value, base)):
                    continue
                raise RecipeError(f"space: {self._blame(name, value, base)}")

    def _reason(self, chosen: Mapping[str, Value], base: ModelConfig) -> str | None:
        """Why some choices make no network; None if they make one."""
        try:
            self.architecture(chosen, base)
        except UnbuildableError as error:
            return str(error)
        return None

    def _with(self, name: str, value: Value, base: ModelConfig, without: str = "") -> bool:
        """Return True if some architecture has this value. `without`: a choice to leave to `base`."""
        choices = {other: values for other, values in {**self.choices, name: (value,)}.items() if other != without}
        if math.prod(map(len, choices.values())) <= EXHAUSTIVE:
            combinations: Iterable[Iterable[Value]] = itertools.product(*choices.values())
        else:
            generator = random.Random(0)  # noqa: S311 - no secret
            combinations = ([generator.choice(values) for values in choices.values()] for _ in range(SAMPLES))
        return any(self._reason(dict(zip(choices, values, strict=True)), base) is None for values in combinations)

    def _blame(self, name: str, value: Value, base: ModelConfig) -> str:
        """Say in one line why no architecture has this value, by the choice that is at fault."""
        helpful = [other for other in self.choices if self._with(name, value, base, without=other)]
        others = [other for other in helpful if other != name]
        if others and name not in helpful and not any(self._with(others[0], one, base) for one in self.choices[others[0]]):
            name, value = others[0], self.choices[others[0]][0]
        elif others:
            excluded = self.choices[others[0]]
            reason = self._why({name: value, others[0]: excluded[0]}, base)
            pair = f"{name} {_shown(value)} with {others[0]} {' or '.join(map(_shown, excluded))}"
            return f"{pair}: no network can be built ({reason}): remove one of them"
        elif name not in helpful:  # several faults: the first value that fails alone, too
            alone = ((key, one) for key, values in self.choices.items() for one in values if self._reason({key: one}, base))
            name, value = next((pair for pair in alone if not self._with(*pair, base)), (name, value))
        return f"{name} {_shown(value)}: with it no network can be built ({self._why({name: value}, base)}): remove it, or change that"

    def _why(self, chosen: Mapping[str, Value], base: ModelConfig) -> str:
        """Why no architecture has these values: as the only changes of `base`, or else with the first value of each other choice."""
        return str(
            self._reason(chosen, base) or self._reason({**{name: values[0] for name, values in self.choices.items()}, **chosen}, base)
        )

    def kinds(self, field: str, base: ModelConfig) -> tuple[Any, ...]:
        """The values of a field that is no sequence."""
        return self.choices.get(field, (getattr(base, field),))


def load_space(path: Path | str) -> Space:
    """Read a space from a YAML file. Raises `RecipeError` for a missing file, broken YAML, an unknown choice or value."""
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"space {path}: {error.strerror or error}; give the path of a YAML file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"space {path}: not YAML: {' '.join(str(error).split())}") from error
    return parse_space(content, where=f"space {path}")


def parse_space(content: Any, *, where: str = "space") -> Space:
    """Check a space's content, lists of values by choice. `where` names it in errors. Raises `RecipeError`."""
    if not isinstance(content, dict):
        raise RecipeError(f"{where}: holds {type(content).__name__}, not choices with lists of values, such as `depths.0: [1, 2, 4]`")
    for name, values in content.items():
        if not isinstance(values, list | tuple):
            raise RecipeError(f"{where}: {name} is {values!r:.60}: give a list of values, [{values!r:.60}] for a single one")
    try:
        return Space(choices={str(name): tuple(_frozen(value) for value in values) for name, values in content.items()})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = str(first["loc"][1]) if len(first["loc"]) > 1 else ""
        message = first["msg"].removeprefix("Value error, ")
        reason = f"{place}: {first['input']!r:.60} is neither a number nor a name nor a list of whole numbers" if place else message
        raise RecipeError(f"{where}: {reason}") from error


def default_space(task: Task, head_dim: int = 64, *, gated: bool = False) -> Space:
    """The space around the presets, up to hybrid-s, for a task. Widths of attention stages are multiples of `head_dim`.

    `gated`: all networks have channel gates, as `training.gate_budget` needs.
    """
    unit = head_dim
    choices: dict[str, tuple[Any, ...]] = {
        "stem": ((8, 16, 32), (16, 24, 48), (16, 32, 64)),
        "pairs.0": (0, 1),
        "pairs.1": (0, 1, 2),
        "stages": (1, 2),
        "dims.0": (2 * unit, 3 * unit, 4 * unit),
        "dims.1": (2 * unit, 3 * unit, 4 * unit),
        "depths.0": (1, 2, 3, 4),
        "depths.1": (1, 2),
        "attention": ("hybrid", "local", "global"),
        "block": ("parallel", "serial"),
        "window": (4, 8),
        "latents": (8, 16, 32),
        "gate": (True,) if gated else (True, False),
        "mlp_ratio": (1.0, 2.0),
    }
    if ANSWERS[task].one:
        choices["resolution"] = (0.75, 1.0)
    else:
        finest = (4, 8) if ANSWERS[task].has_classes else (2, 4, 8)
        choices |= {"decoder": (32, 48, 64), "fusion": ("progressive", "one-step", "upernet"), "finest": finest}
    return Space(choices=choices)


def _check_name(name: str) -> None:
    field, dot, position = name.partition(".")
    if dot and field in SEQUENCES and position.isdecimal():
        return
    if not dot and name in (*FIELDS, *RANGES):
        return
    if dot and field in FIELDS:
        raise ValueError(f"unknown choice '{name}': {'give a position from 0' if field in SEQUENCES else f'{field} has no entries'}")
    known = [*FIELDS, *RANGES]
    near = difflib.get_close_matches(name, known, 1)
    meant = f"did you mean '{near[0]}'? " if near else ""
    raise ValueError(f"unknown choice '{name}': {meant}known: {', '.join(known)}, and entries such as depths.0")


def _check_values(name: str, values: tuple[Value, ...]) -> None:
    """Raise ValueError, which names choice and value, for a value of another kind. Ranges of the fields are ModelConfig's."""
    field, entry, _ = name.partition(".")
    least, most = RANGES.get(name, (-math.inf, math.inf))
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if field in RANGES:
            kind = f"{'whole ' if name in WHOLE else ''}numbers from {least:g} to {most:g}"
            sound = isinstance(value, int if name in WHOLE else int | float) and number and least <= value <= most
        elif field in SEQUENCES and not entry:
            kind, sound = "lists of whole numbers, such as [16, 32]", isinstance(value, tuple)
        elif field in WHOLE_FIELDS or entry:
            kind, sound = "whole numbers, such as 2", number and isinstance(value, int)
        elif field == "gate":
            kind, sound = "true or false", isinstance(value, bool)
        elif field in ("mlp_ratio", "latent_share"):
            kind, sound = "numbers, such as 1.5", number
        else:
            kind, sound = "names", isinstance(value, str)
        if not sound:
            raise ValueError(f"{name} {_shown(value)}: give {kind}")


def _shown(value: Value) -> str:
    """A value as it is written in YAML: "8" with quotes is no number."""
    return (
        json.dumps(value)
        if isinstance(value, str) and not value.isidentifier()
        else str(list(value) if isinstance(value, tuple) else value)
    )


def _with_entry(field: str, values: Any, position: int, value: Any) -> tuple[Any, ...]:
    if position > len(values):
        raise UnbuildableError(f"{field}.{position}: {field} has {len(values)} entries before it: name those up to {position}, too")
    return (*values[:position], value, *values[position + 1 :])


def _without_effect(fields: dict[str, Any], base: ModelConfig) -> dict[str, Any]:
    """The fields, with the base's value where they have no effect."""
    unused = {
        "local": ("latents", "latent_share"),
        "global": ("window", "latent_share"),
        "dense": ("window", "latents", "latent_share"),
    }.get(str(fields["attention"]), ())
    names = (*unused, *(("decoder", "fusion", "finest") if base.answer.one else ()))
    return {**fields, **{name: getattr(base, name) for name in names}}


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
