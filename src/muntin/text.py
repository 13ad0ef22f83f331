"""Texts for files, responses and lines."""

from __future__ import annotations

from dataclasses import dataclass


def plain(text: str) -> str:
    """Return the text as valid UTF-8: bytes of a file name that are not UTF-8 become escapes."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


def count(number: int, noun: str) -> str:
    """Return the number with its noun: "1 thread", "2 threads", "2 passes"."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def number_format(precision: str, *, integers: bool) -> str:
    """Return the numbers that a model computes in: "INT8, float layers in bf16", or only the precision of its floats."""
    return f"INT8, float layers in {precision}" if integers else precision


@dataclass(frozen=True, kw_only=True)
class ScoreFormat:
    """How the score of a task is written: its name, its unit and its digits."""

    name: str
    unit: str = ""
    digits: int = 3

    def __call__(self, value: float) -> str:
        return f"{value:.{self.digits}f}{self.unit}"


SCORES = {
    "segment": ScoreFormat(name="mIoU"),
    "classify": ScoreFormat(name="accuracy"),
    "restore": ScoreFormat(name="PSNR", unit=" dB", digits=2),
}
"""By task."""
