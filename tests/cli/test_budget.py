"""`muntin compress RUN --max-drop`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muntin.artifact import open_artifact

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def searched(exported: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, for searches in its folder."""
    return Path(shutil.copytree(exported.run, tmp_path_factory.mktemp("budget") / "run"))


def test_search_and_its_page(call: Call, searched: Path) -> None:
    words = ("compress", searched, "--max-drop", "1", "--trials", "2", "--steps", "2")
    answer = call(*words)
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert all(word in lines[1] for word in ("width", "mIoU", "MB", "ms", "front"))
    assert [line.split()[1] for line in lines[3:6]] == ["FP32", "trial", "trial"]
    assert any(line.startswith("chosen    trial ") for line in lines) and any(line.startswith("held out  mIoU 0.") for line in lines)
    assert answer.err.splitlines()[-1].startswith("trial 2 ")
    page = searched / "budget" / "front.html"
    assert page.is_file() and lines[-1] == f"page      {page}"

    document = json.loads(call(*words, "--json").out)  # goes on: nothing is left to do
    assert document["kept"] and document["outcome"] == "kept" and [row["trial"] for row in document["rows"]] == [0, 1, 2]
    artifact = open_artifact(document["artifact"])
    assert artifact.bytes == document["rows"][document["chosen"]]["bytes"] and artifact.manifest.signature.task == "segment"
    assert document["holdout"]["interval"] is None and any("return a score for each sample" in note for note in document["notes"])

    assert "other settings (max_drop 1" in call("compress", searched, "--max-drop", "0.5", "--steps", "2").mistake()


def test_no_minutes(call: Call, searched: Path, tmp_path: Path) -> None:
    answer = call("compress", searched, "--max-drop", "0.1", "--minutes", "0", "--steps", "0", "-o", tmp_path / "none", "--json")
    document = json.loads(answer.out)
    assert answer.code == 1 and document["outcome"] == "not tried" and not document["kept"]
    assert Path(document["artifact"]) == tmp_path / "none" / "reference" / "artifact"


def test_options_that_do_not_fit(call: Call, searched: Path) -> None:
    assert call("compress", searched, "--minutes", "3").code == 2
    assert call("compress", searched, "--max-drop", "0.1", "--resume").code == 2
    assert "give size or latency" in call("compress", searched, "--max-drop", "0.1", "--objective", "speed").mistake()
    assert "only compression.KEY=VALUE" in call("compress", searched, "--max-drop", "0.1", "--set", "seed=3").mistake()
