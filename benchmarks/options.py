"""Numbers on a command line, refused before anything is measured if they are too small."""

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
