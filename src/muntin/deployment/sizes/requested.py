"""Sizes as a user gives them, in Python and on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import ValidationError

from muntin.artifact import Sizes
from muntin.artifact.answers import ANSWERS, Task
from muntin.errors import ExportError

RequestedSizes = Literal["any", "fixed", "widest"] | Mapping[str, int]
Size = tuple[int, int]


def requested_sizes(requested: RequestedSizes, example: Size) -> Sizes:
    """Return the sizes of `export(sizes=...)`, except for "widest".

    Raises `ExportError` for other values, and for an example of a size that is not allowed.
    """
    allowed = 'give "any", "fixed", "widest", or {"multiple": 32, "min": 64, "max": 1024}, each key optional'
    if requested == "any":
        return Sizes()
    if requested == "fixed":
        return Sizes.only(*example)
    if not isinstance(requested, Mapping) or not {"multiple", "min", "max"}.issuperset(requested):
        raise ExportError(f"sizes={requested!r}: {allowed}")
    try:
        sizes = Sizes.both(**requested)
    except ValidationError as error:
        raise ExportError(f"sizes={requested!r}: {error.errors(include_url=False)[0]['msg']}: {allowed}") from error
    check_allowed(sizes, example)
    return sizes


def usual_sizes(task: Task) -> Literal["fixed", "widest"]:
    """Return the sizes of an artefact for which none are given: "fixed" for a classifier, whose pictures are resized, else "widest"."""
    return "fixed" if ANSWERS[task].one else "widest"


def parse_sizes(text: str) -> RequestedSizes:
    """Return the sizes of `--sizes`: any, fixed, widest, or multiple=32,min=64,max=1024. Raises `ExportError` for another text."""
    if text in ("any", "fixed", "widest"):
        return text  # type: ignore[return-value]
    entries = [entry.partition("=") for entry in text.split(",")]
    if not all(key in ("multiple", "min", "max") and value.isdecimal() for key, _, value in entries):
        raise ExportError(f"--sizes {text}: give any, fixed, widest, or multiple=32,min=64,max=1024, each of the three optional")
    return {key: int(value) for key, _, value in entries}


def check_allowed(sizes: Sizes, example: Size) -> None:
    """Raise `ExportError` for an example of a size that is not allowed."""
    if not sizes.takes(*example):
        height, width = sizes.at_least(*example)
        raise ExportError(f"the example of {example[0]} x {example[1]} is not of the sizes, {sizes.text}: give one of {height} x {width}")
