from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from muntin.runtime.bulk.items import source_state
from muntin.runtime.bulk.journal import JOURNAL, ResultJournal


@pytest.fixture
def recorded(tmp_path: Path) -> tuple[Path, Path]:
    """A source and a folder with its recorded result."""
    source, folder = tmp_path / "a.jpg", tmp_path / "out"
    (folder / "x").mkdir(parents=True)
    source.write_bytes(b"picture")
    add(folder, source)
    return source, folder


def add(folder: Path, source: Path, run: str = "one") -> dict[str, Any]:
    result = {"source": str(source), "mask": str(folder / "x" / f"{source.name}.png"), "shares": {"sea": 0.5}}
    (folder / "x" / f"{source.name}.png").write_bytes(b"mask")
    state = source_state(source)
    assert state is not None
    ResultJournal(folder, run).add(source, state, result)
    return result


def test_result_as_recorded(recorded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    source, folder = recorded
    assert ResultJournal(folder, "one").result(source) == add(folder, source)
    assert ResultJournal(folder, "two").result(source) is None
    monkeypatch.chdir(source.parent)  # as a user calls it from elsewhere
    assert ResultJournal(Path("out"), "one").result(Path("a.jpg")) == {
        "source": "a.jpg", "mask": "out/x/a.jpg.png", "shares": {"sea": 0.5}
    }  # fmt: skip


@pytest.mark.parametrize("changed", ["source", "time", "mask", "no mask", "no source"])
def test_result_after_a_change(recorded: tuple[Path, Path], changed: str) -> None:
    source, folder = recorded
    mask = folder / "x" / "a.jpg.png"
    match changed:
        case "source":
            source.write_bytes(b"another picture")
        case "time":
            os.utime(source, ns=(1, 1))
        case "mask":
            mask.write_bytes(b"by hand")
        case "no mask":
            mask.unlink()
        case "no source":
            source.unlink()
    assert ResultJournal(folder, "one").result(source) is None


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_line_that_a_kill_cut_off(recorded: tuple[Path, Path], cut: int) -> None:
    source, folder = recorded
    other = source.with_name("b.jpg")
    other.write_bytes(b"more")
    add(folder, other)
    file = folder / JOURNAL
    file.write_bytes(file.read_bytes()[:-cut])
    journal = ResultJournal(folder, "one")
    assert journal.result(source) is not None
    assert (journal.result(other) is None) == (cut > 1)  # only the end of the line is missing
    add(folder, other)
    reread = ResultJournal(folder, "one")
    assert reread.result(source) is not None and reread.result(other) is not None


def test_lines_that_count_no_more(recorded: tuple[Path, Path]) -> None:
    source, folder = recorded
    for _ in range(3):
        add(folder, source)
    with (folder / JOURNAL).open("ab") as file:
        file.write(b'{"source": 3}\nno JSON \xff\n')
    assert ResultJournal(folder, "one").result(source) is not None
    assert (folder / JOURNAL).read_bytes().count(b"\n") == 1


def test_links_and_odd_names(recorded: tuple[Path, Path]) -> None:
    source, folder = recorded
    link, odd = source.with_name("link.jpg"), source.with_name(os.fsdecode(b"\xff.jpg"))
    link.symlink_to(source)
    assert ResultJournal(folder, "one").result(link) is None
    odd.write_bytes(b"picture")
    add(folder, odd)  # cannot be read again, and is computed again
    assert ResultJournal(folder, "one").result(source) is not None
