"""Texts for files, responses and lines."""

from __future__ import annotations

from collections.abc import Sequence


def plain(text: str) -> str:
    """Return the text as valid UTF-8: bytes of a file name that are not UTF-8 become escapes."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def count(number: int, noun: str) -> str:
    """Return the number with its noun: "1 thread", "2 threads", "2 passes"."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def number_format(precision: str, *, integers: bool) -> str:
    """Return the numbers that a model computes in: "INT8, float layers in bf16", or only the precision of its floats."""
    return f"INT8, float layers in {precision}" if integers else precision


def list_some(values: Sequence[object], count: int = 5) -> str:
    """The first `count` values, separated by commas, and how many more there are."""
    return ", ".join(str(value) for value in values[:count]) + (f" and {len(values) - count} more" if len(values) > count else "")
