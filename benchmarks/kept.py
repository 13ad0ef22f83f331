"""Rows that benchmarks measure once and keep.

A row is written whole or not at all, and used only with the same settings on the same machine. This module does not import
PyTorch, because the load generator does not need it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from muntin.runtime import describe_hardware

Row = dict[str, Any]
MACHINE = ("cpu", "cores", "features", "gpus", "openvino", "torch")
"""Properties of the hardware that two rows must share to be compared."""
SHOWN = 4
"""Differences that are named."""


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_whole(path: Path, content: Any) -> None:
    """As JSON, beside its place and then renamed into it: whoever is interrupted leaves no part of a file that looks like one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    draft.replace(path)


def refuse_other(path: Path, row: Any, settings: Mapping[str, Any], hardware: Row | None = None) -> None:
    """Ends the program, and says what differs, where a row is of other settings or, if `hardware` is given, of another machine."""
    if not isinstance(row, dict) or "settings" not in row:
        raise SystemExit(f"{path} does not say what it was measured with: give another --output")
    found, wanted = dict(row["settings"]), dict(settings)
    if hardware is not None:
        there = row.get("hardware", {})
        found["hardware"], wanted["hardware"] = ({key: one.get(key) for key in MACHINE} for one in (there, hardware))
    wanted = json.loads(json.dumps(wanted))  # where a tuple is the list that it is read as
    if found == wanted:
        return
    old, new = _flat(found), _flat(wanted)
    differ = [f"{key} {old.get(key)} (now {new.get(key)})" for key in {**old, **new} if old.get(key) != new.get(key)]
    more = f" and {len(differ) - SHOWN} more" if len(differ) > SHOWN else ""
    raise SystemExit(f"{path} was measured with {'; '.join(differ[:SHOWN]) or 'other settings'}{more}: give another --output")


def _flat(values: Mapping[str, Any], where: str = "") -> Row:
    """Values of dictionaries inside it by the whole way to them: `training.steps`."""
    found: Row = {}
    for key, value in values.items():
        found |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return found


def read_row(path: Path, settings: Mapping[str, Any], hardware: Row | None = None) -> Row | None:
    """The row that lies there; None where there is none, or only a failure, which may be mended by now. Refuses as `refuse_other` does."""
    if not path.is_file():
        return None
    row = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(row, dict) and "cannot" in row:
        return None
    refuse_other(path, row, settings, hardware)
    return dict(row)


def kept_row(path: Path, settings: Mapping[str, Any], measure: Callable[[], Row], *, hardware: Row | None = None) -> Row:
    """The row that lies there already, or a new one. One of other settings ends the program; a failure (`cannot`) is told and not kept.

    `hardware`: this machine as `describe_hardware` saw it before this process was bound to some of its cores; then a row of another one
    ends the program too. None: rows of any machine are taken, and each says of which it is.
    """
    row = read_row(path, settings, hardware)
    if row is not None:
        return row
    row = {"settings": dict(settings), **measure(), "created": now(), "hardware": describe_hardware() if hardware is None else hardware}
    if "cannot" not in row:
        write_whole(path, row)
    return row
