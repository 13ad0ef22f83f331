"""`muntin update` and `muntin watch`: options, output, exit codes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from muntin.cli import app
from muntin.cli.updating.update import all_overrides, parse_classes
from muntin.errors import DataError, MuntinError
from muntin.training import fit

MODEL = """
from torch import nn

def make(*, task, classes, channels):
    return nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1))
"""
LOOSE = ["--accept", "max_slowdown=50", "--accept", "max_drop=1", "--accept", "max_class_drop=1", "--accept", "min_gain=-1"]
LABELS = ["--accept", "max_relabel_gain=1"]
THREAD = ["--threads", "1"]


def invoke(*words: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit | MuntinError), result.exception
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Any], write_scenes: Callable[..., None]) -> Any:
    """The folder of a run, with a folder of new pictures beside it."""
    root = tmp_path_factory.mktemp("update")
    (root / "two_layers_of_a_command.py").write_text(MODEL)
    tiny = write_tiny(root / "data", model={"name": "two_layers_of_a_command:make", "options": {}})
    write_scenes(root / "new", "new", 8, 900)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        fit(tiny.recipe, directory=root / "run")
        yield root


def test_accepted_refused_and_json(trained: Path) -> None:
    words = ["update", trained / "run", "--data", trained / "new", *THREAD]
    accepted = invoke(*words, *LOOSE, *LABELS)
    assert accepted.exit_code == 0, accepted.output
    done = invoke(*words, *LOOSE, *LABELS, "--repository", trained / "versions")  # as after a kill between verdict and version
    assert done.exit_code == 0, done.output
    assert [path.name for path in (trained / "run" / "updates").iterdir()] == ["1"]
    for text in ("gain on new data", "size, times the old", "accepted", f"version   {trained / 'versions' / '1'}"):
        assert text in done.stdout
    assert (trained / "versions" / "1" / "manifest.json").is_file()
    fresh = ["--output", trained / "strict", "--accept", "min_gain=1", "--json"]
    refused = invoke("update", trained / "run" / "checkpoints", *words[2:], *fresh)
    document = json.loads(refused.stdout[refused.stdout.index("{") :])
    assert refused.exit_code == 1 and document["accepted"] is False and not document["verdict"]["accepted"]
    assert "refused: " in refused.stderr and "gain on new data" in refused.stderr
    assert "; try: " in refused.stderr and "for a gain more new images, or more steps (--set update.share=" in refused.stderr
    assert any("update.share" in line for line in document["advice"])
    assert "no new picture" in str(invoke(*words).exception)


def test_watch_ends_after_its_rounds(trained: Path, write_scenes: Callable[..., None]) -> None:
    folder = trained / "arriving"
    write_scenes(folder, "later", 6, 1300)
    for path in folder.rglob("*.png"):
        os.utime(path, (0, 0))
    done = invoke("watch", folder, trained / "run", "--every", 6, "--rounds", 1, *THREAD, *LOOSE, *LABELS, "--set", "update.share=0.2")
    assert done.exit_code == 0 and done.stdout.startswith("update 1: accepted"), done.output
    assert "6 of 6 new pictures" in done.stderr


def test_server_that_is_not_there(trained: Path) -> None:
    for url, message in (("http://127.0.0.1:9", "does not answer"), ("localhost", "give the address of a server")):
        failed = invoke("update", trained / "run", "--data", trained / "new", "--push", url)
        assert message in str(failed.exception)


def test_classes_and_conditions() -> None:
    specs = parse_classes(["tree", "road=7", "wall=1,2,3", "a=b=9"])
    assert [(spec.name, spec.value) for spec in specs] == [("tree", None), ("road", 7), ("wall", (1, 2, 3)), ("a=b", 9)]
    with pytest.raises(DataError, match="--class road=x: write NAME"):
        parse_classes(["road=x"])
    assert all_overrides(["update.share=1"], ["max_drop=0.1"]) == ["update.share=1", "update.accept.max_drop=0.1"]
