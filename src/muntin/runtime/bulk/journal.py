"""The results that a folder holds already: a file of one JSON line for each, so that an interrupted run can go on.

A line is added when all files of a result have their names. It says what was computed from which source: a digest of the artefact and the
options, size and time of the source, sizes and times of the files. A result counts only while all of these are as recorded. A line that a
kill cut off is ignored.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import Any

from pydantic import BaseModel

from muntin.artifact.atomic_files import write_files
from muntin.runtime.bulk.items import PredictOptions, SourceState, source_state
from muntin.runtime.session import Session
from muntin.tasks.base import Result

JOURNAL = ".muntin-predict.jsonl"
"""Name of the file in the folder of the results."""
FILE_KINDS = ("mask", "overlay", "image", "difference")
"""Keys of a result that hold the path of a file."""


class JournalEntry(BaseModel):
    """A line of the file. `files`: names relative to the folder, with their states, by kind of result. `result`: its other values."""

    source: str
    run: str
    state: SourceState
    files: dict[str, tuple[str, SourceState]]
    result: dict[str, Any]


class ResultJournal:
    """The results in a folder, by source, of one process. `run`: digest of what they depend on besides it. Threads may add results."""

    def __init__(self, folder: Path, run: str) -> None:
        self._folder, self._file, self._run = folder, folder / JOURNAL, run
        self._lock = Lock()
        self._entries = self._read()
        self._compact()

    def result(self, source: Path) -> Result | None:
        """The recorded result of a source, if this run would compute the same again and its files are there; else None."""
        entry = self._entries.get(_key(source))
        if entry is None or entry.run != self._run or source_state(source) != entry.state:
            return None
        if any(source_state(self._folder / name) != state for name, state in entry.files.values()):
            return None
        files = {kind: str(self._folder / name) for kind, (name, _) in entry.files.items()}
        return {"source": str(source), **files, **entry.result}

    def add(self, source: Path, state: SourceState, result: Result) -> None:
        """Record a result whose files have been written, `state` being that of the source before it was read."""
        files: dict[str, tuple[str, SourceState]] = {}
        for kind in FILE_KINDS:
            if kind in result:
                written = source_state(Path(result[kind]))
                if written is None:  # removed by another program meanwhile
                    return
                files[kind] = (os.path.relpath(result[kind], self._folder), written)
        values = {key: value for key, value in result.items() if key not in ("source", *files)}
        entry = JournalEntry(source=_key(source), run=self._run, state=state, files=files, result=values)
        with self._lock, self._file.open("ab") as stream:
            stream.write(_line(entry))

    def _read(self) -> dict[str, JournalEntry]:
        """The last entry of each source; lines that are none are left out."""
        entries: dict[str, JournalEntry] = {}
        self._lines = 0
        with suppress(FileNotFoundError), self._file.open("rb") as stream:
            for line in stream:
                whole = line.endswith(b"\n")
                self._lines += 1 if whole else 2  # never as many as entries: written again, so that the next line begins at a line's start
                with suppress(ValueError):
                    entry = JournalEntry.model_validate_json(line)
                    entries.pop(entry.source, None)
                    entries[entry.source] = entry
        return entries

    def _compact(self) -> None:
        """Write the file again, whole or not at all, if it has lines that count no more."""
        if self._lines != len(self._entries):
            write_files(self._folder, {JOURNAL: b"".join(map(_line, self._entries.values()))})


def open_journal(folder: Path, artifact: str, session: Session, options: PredictOptions) -> ResultJournal:
    """The journal of a folder, for results of an artefact (its digest) with these options in this version of muntin."""
    settings = {"artifact": artifact, "muntin": version("muntin"), "engine": session.engine, "precision": session.precision}
    chosen = {name: value for name, value in asdict(options).items() if name != "max_pixels"}  # which only refuses
    content = json.dumps(settings | chosen, sort_keys=True, default=str)
    return ResultJournal(folder, sha256(content.encode()).hexdigest())


def _key(source: Path) -> str:
    return str(source.parent.resolve() / source.name)  # a symbolic link counts by its own name


def _line(entry: JournalEntry) -> bytes:
    return json.dumps(entry.model_dump()).encode() + b"\n"  # escapes bytes of names that are not UTF-8
