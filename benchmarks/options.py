"""Numbers on a command line, refused before anything is measured if they are too small."""

from __future__ import annotations

from argparse import ArgumentTypeError
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """Return a function with which argparse reads an integer of at least `least`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise ArgumentTypeError(f"{text}: give at least {least}")
        return value

    return number
