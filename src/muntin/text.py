"""Texts that go out: into files, answers and lines."""

from __future__ import annotations


def plain(text: str) -> str:
    """A text as UTF-8, JSON and protobuf can carry it: of a file's name that is none, which errors repeat, the bytes are written out."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()
