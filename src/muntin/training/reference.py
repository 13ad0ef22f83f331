"""The page docs/recipe.md: every key of a recipe, from the models that check recipes.

python -m muntin.training.reference > docs/recipe.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from muntin.models.config import ModelConfig
from muntin.training.recipe import Recipe

Schema = dict[str, Any]

_HEAD = """# The keys of a recipe

A recipe is YAML: the keys below, each of which may be left out and has its default then. `muntin init DIR` writes one for your own
images, `recipes/demo.yaml` is the demonstration's. `muntin fit RECIPE --set training.steps=200` replaces a value. An unknown key or a value
out of range is an error of one line, before anything starts. Relative paths start at the recipe's folder; runs go to `runs/` of the current
one.

A run keeps its recipe. `compress` and `export` go by that, and not by a file that was edited since: `--set compression.average_bits=5` and
`--set quantization.min_sqnr_db=20` change what is theirs.

This page is written by `python -m muntin.training.reference > docs/recipe.md`.
"""
_OPTIONS = """
Of the named models (`muntin models`) alone. Each has its own defaults; those of `hybrid-s` are shown. Strides are in pixels of the image.
"""
_FIXED = ("task", "classes", "channels", "scale")
"""Fields of `ModelConfig` that are no options in a recipe."""
_NAMES = {"integer": "whole number", "number": "number", "boolean": "true or false", "null": "null", "string": "text", "object": "keys"}


def recipe_reference() -> str:
    """The page in Markdown: a table for each section of a recipe."""
    schema = Recipe.model_json_schema()
    return "\n".join([_HEAD, *_sections("", schema, schema["$defs"], {})])


def _sections(place: str, schema: Schema, defs: dict[str, Schema], defaults: dict[str, Any]) -> Iterator[str]:
    """A section's table, then those of its sections. `defaults`: values for this place that differ from the schema's."""
    title = f"## {place}\n\n" if place else ""
    description = f"{schema['description'].splitlines()[0]}\n\n" if place and "description" in schema else ""
    yield f"{title}{description}{_table(schema['properties'], defs, defaults)}"
    for name, entry in schema["properties"].items():
        inner = f"{place}.{name}" if place else name
        for ref, many in _references(entry):
            own = defaults.get(name, entry.get("default"))
            yield from _sections(inner + ("[]" if many else ""), defs[ref], defs, own if isinstance(own, dict) else {})
    if place == "model":
        properties = ModelConfig.model_json_schema()["properties"]
        rows = {name: entry for name, entry in properties.items() if name not in _FIXED}
        yield f"## model.options\n{_OPTIONS}\n{_table(rows, defs, {})}"


def _references(entry: Schema) -> Iterator[tuple[str, bool]]:
    """The sections in a key's value, by name, and whether the value is a list of them."""
    for choice in entry.get("anyOf", [entry]):
        for inner, many in ((choice, False), (choice.get("items", {}), True)):
            if isinstance(inner, dict) and "$ref" in inner:
                yield inner["$ref"].rpartition("/")[2], many


def _table(properties: dict[str, Schema], defs: dict[str, Schema], defaults: dict[str, Any]) -> str:
    rows = ["| key | value | default | |", "| --- | --- | --- | --- |"]
    for name, entry in properties.items():
        inner = defs[entry["$ref"].rpartition("/")[2]] if "$ref" in entry else {}
        value = "keys, see below" if inner else _value(entry, defs)
        default = _default(defaults.get(name, entry["default"])) if "default" in entry else "" if inner else "needed"
        cells = (f"`{name}`", value, default, entry.get("description") or inner.get("description", ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(value: Any) -> str:
    return "" if isinstance(value, dict) and value else f"`{json.dumps(value, ensure_ascii=False)}`"


def _value(entry: Schema, defs: dict[str, Schema]) -> str:
    """The allowed values, in words."""
    if "anyOf" in entry:
        return "; or ".join(_value(choice, defs) for choice in entry["anyOf"])
    if "$ref" in entry:
        return f"{{{', '.join(defs[entry['$ref'].rpartition('/')[2]]['properties'])}}}"
    if "enum" in entry:
        return ", ".join(f"`{choice}`" for choice in entry["enum"])
    if entry.get("type") == "array":
        if "prefixItems" in entry:
            return f"list of {len(entry['prefixItems'])}: {_value(entry['prefixItems'][0], defs)}"
        least, most = entry.get("minItems"), entry.get("maxItems")
        count = "" if least is None or most is None else f" of {least} to {most}"
        return f"list{count}: {_value(entry['items'], defs)}"
    if entry.get("format") == "path":
        return "path"
    return " ".join(filter(None, (_NAMES[entry["type"]], _range(entry))))


def _range(entry: Schema) -> str:
    words = (("minimum", "from"), ("exclusiveMinimum", "above"), ("maximum", "to"), ("exclusiveMaximum", "below"))
    return " ".join(f"{word} {entry[bound]}" for bound, word in words if bound in entry)


if __name__ == "__main__":
    sys.stdout.write(recipe_reference())
