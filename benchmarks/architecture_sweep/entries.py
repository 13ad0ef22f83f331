"""The list of models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

LIST = Path(__file__).parents[1] / "architectures.txt"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model. `size`: side of its pictures in pixels; None: the package's."""

    source: str
    size: int | None = None

    @property
    def kind(self) -> str:
        """The part before the colon: timm, torchvision, smp, hf, onnx."""
        return self.source.partition(":")[0]

    @property
    def file_name(self) -> str:
        return self.source.replace(":", "-")


def read_list(path: Path = LIST) -> list[Entry]:
    """Read the entries: a source and, after a space, the size; lines with # are comments. Ends the program for a damaged line."""
    entries: list[Entry] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        source, *size = line.split()
        if ":" not in source or len(size) > 1 or not all(text.isdecimal() for text in size):
            raise SystemExit(f"{path}, line {number}: '{line}' is no model: give a source and, if needed, the side of its pictures")
        if any(entry.source == source for entry in entries):
            raise SystemExit(f"{path}, line {number}: {source} is there twice")
        entries.append(Entry(source=source, size=int(size[0]) if size else None))
    return entries


def select(entries: Iterable[Entry], patterns: Iterable[str]) -> list[Entry]:
    """Return the entries whose source contains one of the patterns; all without patterns. Ends the program for a pattern without one."""
    entries, patterns = list(entries), list(patterns)
    for pattern in patterns:
        if not any(pattern in entry.source for entry in entries):
            raise SystemExit(f"--only {pattern}: no model of the list has this in its name")
    return [entry for entry in entries if not patterns or any(pattern in entry.source for pattern in patterns)]
