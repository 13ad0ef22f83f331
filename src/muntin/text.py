"""Texts for files, responses and lines."""

from __future__ import annotations


def plain(text: str) -> str:
    """The text as UTF-8, JSON and protobuf can carry it: bytes of a file's name that are no UTF-8 are written as escapes."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def count(number: int, noun: str) -> str:
    """The number with its noun: "1 thread", "2 threads", "2 passes"."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"
