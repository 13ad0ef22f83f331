"""`muntin update`: options, output, exit codes."""

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
from products import UPDATE, copy_of, product

LOOSE = ["--accept", "max_slowdown=50", "--accept", "max_drop=1", "--accept", "max_class_drop=1", "--accept", "min_gain=-1"]
LABELS = ["--accept", "max_relabel_gain=1"]
THREAD = ["--threads", "1"]


def invoke(*words: str | Path) -> Result:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit | MuntinError), result.exception
    return result


@pytest.fixture(scope="module")
def updated() -> Path:
    """The folder of a `run` with an accepted update, beside the `new` images of it. Not to be changed: copy first."""
    return product("updated")


@pytest.fixture
def run(updated: Path, tmp_path: Path) -> Path:
    return copy_of(updated / "run", tmp_path)


def test_accepted_refused_and_json(updated: Path, run: Path, tmp_path: Path) -> None:
    """The update is there, as after a kill between verdict and version, and then as before the verdict, with other conditions."""
    words = ["update", run, "--data", updated / "new", *THREAD, *(word for value in UPDATE for word in ("--set", value))]
    accepted = invoke(*words, "--repository", tmp_path / "versions")
    assert accepted.exit_code == 0, accepted.output
    assert [path.name for path in (run / "updates").iterdir()] == ["1"]
    for text in ("gain on new data", "size, times the old", "accepted", f"version   {tmp_path / 'versions' / '1'}"):
        assert text in accepted.stdout
    assert (tmp_path / "versions" / "1" / "manifest.json").is_file()
    (run / "updates" / "1" / "verdict.json").unlink()
    refused = invoke(*words, "--accept", "min_gain=1", "--json")
    document = json.loads(refused.stdout[refused.stdout.index("{") :])
    assert refused.exit_code == 1 and document["accepted"] is False and not document["verdict"]["accepted"]
    assert "refused: " in refused.stderr and "gain on new data" in refused.stderr
    assert "; try: " in refused.stderr and "for a gain more new images, or more steps (--set update.share=" in refused.stderr
    assert any("update.share" in line for line in document["advice"])


def test_images_that_an_update_learned(updated: Path, run: Path) -> None:
    assert "no new picture" in str(invoke("update", run, "--data", updated / "new", *THREAD).exception)


def test_update_of_the_first_training(run: Path, write_scenes: Callable[..., None], tmp_path: Path) -> None:
    """RUN names its newest update, RUN/checkpoints the training before it."""
    write_scenes(tmp_path / "new", "later", 8, 1900)
    learned: list[Any] = []
    words = ["--data", tmp_path / "new", "--output", tmp_path / "out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("muntin.updating.update.learn", lambda plan, *given, **options: (learned.append(plan.parent.path), 1 / 0))
        for folder in (run, run / "checkpoints"):
            CliRunner().invoke(app, ["update", *map(str, (folder, *words))])
    assert learned == [run / "updates" / "1" / "checkpoints" / "step-00000015", run / "checkpoints" / "step-00000150"]


def test_watch_ends_after_its_rounds(run: Path, write_scenes: Callable[..., None], tmp_path: Path) -> None:
    folder = tmp_path / "arriving"
    write_scenes(folder, "later", 6, 1300)
    for path in folder.rglob("*.png"):
        os.utime(path, (0, 0))
    done = invoke("update", run, "--data", folder, "--every", 6, "--rounds", 1, *THREAD, *LOOSE, *LABELS, "--set", "update.share=0.02")
    assert done.exit_code == 0 and done.stdout.startswith("update 1: accepted"), done.output
    assert "6 of 6 new pictures" in done.stderr


def test_options_of_a_watch(run: Path, tmp_path: Path) -> None:
    assert "it counts the updates of a watch" in str(invoke("update", run, "--data", tmp_path, "--rounds", 2).exception)
    assert "leave out --output or --every" in str(invoke("update", run, "--data", tmp_path, "--every", 3, "-o", tmp_path / "out").exception)


def test_server_that_is_not_there(updated: Path, run: Path) -> None:
    for url, message in (("http://127.0.0.1:9", "does not answer"), ("localhost", "give the address of a server")):
        failed = invoke("update", run, "--data", updated / "new", "--push", url)
        assert message in str(failed.exception)


def test_classes_and_conditions() -> None:
    specs = parse_classes(["tree", "road=7", "wall=1,2,3", "a=b=9"])
    assert [(spec.name, spec.value) for spec in specs] == [("tree", None), ("road", 7), ("wall", (1, 2, 3)), ("a=b", 9)]
    with pytest.raises(DataError, match="--class road=x: write NAME"):
        parse_classes(["road=x"])
    assert all_overrides(["update.share=1"], ["max_drop=0.1"]) == ["update.share=1", "update.accept.max_drop=0.1"]
