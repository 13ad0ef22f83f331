"""Numbers that a command takes: one that is too small is refused before anything is measured."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """What argparse reads an integer from `least` on with."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise ArgumentTypeError(f"{text}: give at least {least}")
        return value

    return number
