"""A run whose recipe names the user's own code as its model: refused by every command until `--trust-code`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muntin.compression import load_model
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.errors import CheckpointError
from muntin.models import trusted_code
from muntin.runtime.host.helper_process import Outcome
from muntin.runtime.profiling.cold_start import _measure
from muntin.training.checkpoint import read_checkpoint
from muntin.training.fitting import fit
from muntin.training.recipe import load_recipe
from muntin.training.teachers.opening import open_teacher

MODULE = "code_of_a_run"
FACTORY = """
import torch
def make(*, task, classes, channels):
    return torch.nn.Conv2d(channels, classes, 3, padding=1)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Any]) -> Any:
    """A run of two steps; `code` holds its module."""
    made = write_tiny(tmp_path_factory.mktemp("trust") / "data", training={"steps": 2}, model={"name": f"{MODULE}:make", "options": {}})
    (made.root / "code").mkdir()
    (made.root / "code" / f"{MODULE}.py").write_text(FACTORY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(made.root / "code")
        fit(made.recipe, directory=made.root / "run", progress=False)  # the user's own recipe needs no consent
        export_checkpoint(read_checkpoint(made.root / "run"), made.root / "run" / "artifact")
    sys.modules.pop(MODULE)
    return made


@pytest.fixture(autouse=True)
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that measures loading, which knows what it is told alone, without the seconds that its import of PyTorch takes."""

    def ask(entry: Any, question: dict[str, Any]) -> Outcome:
        with monkeypatch.context() as patch:
            patch.setattr(trusted_code, "_trusted", set())
            patch.delitem(sys.modules, MODULE, raising=False)
            return Outcome(returncode=0, answer=json.dumps(_measure(json.loads(json.dumps(question)))).encode(), last_line="")

    monkeypatch.setattr("muntin.runtime.profiling.cold_start.ask_helper", ask)


@pytest.fixture(autouse=True)
def new_process(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No consent, the module within reach and not imported."""
    monkeypatch.setattr(trusted_code, "_trusted", set())
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    monkeypatch.syspath_prepend(run.root / "code")


@pytest.mark.parametrize(
    "words",
    [
        ["export"], ["evaluate"], ["bench"], ["compare"], ["report"], ["compress"],
        ["compress", "--dry-run"], ["profile"], ["update", "--data", "train"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_commands(run: Any, call: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str]) -> None:
    monkeypatch.chdir(run.root)
    command, *options = words
    output = [] if command in ("evaluate", "bench", "compare") or "--dry-run" in options else ["--output", str(tmp_path / "output")]
    answer = call(command, str(run.root / "run"), *options, *output)
    assert f"{MODULE}:make" in answer.err and "--trust-code" in answer.err and answer.code == 1
    assert MODULE not in sys.modules


def test_consent(run: Any, call: Callable[..., Any]) -> None:
    answer = call("evaluate", str(run.root / "run"), "--trust-code")
    assert answer.code == 0 and MODULE in sys.modules


def test_consent_reaches_the_process_that_measures_loading(run: Any, call: Callable[..., Any]) -> None:
    answer = call("bench", str(run.root / "run"), "--rounds", "1", "--trust-code")
    assert answer.code == 0, answer.err


def test_python(run: Any) -> None:
    with pytest.raises(CheckpointError, match="trust_code=True"):
        load_model(read_checkpoint(run.root / "run"))
    assert isinstance(load_model(read_checkpoint(run.root / "run", trust_code=True)), torch.nn.Conv2d)


def test_teacher(run: Any) -> None:
    """A stranger's run as a teacher of a recipe of one's own."""
    recipe = load_recipe(run.recipe, ["model.name=hybrid-xxs", "teacher.model=run"])
    classes = read_checkpoint(run.root / "run").classes
    with pytest.raises(CheckpointError, match=r"teacher\.trust_code"):
        open_teacher(recipe, classes, run.root)
    trusting = load_recipe(run.recipe, ["model.name=hybrid-xxs", "teacher.model=run", "teacher.trust_code=true"])
    teacher, _ = open_teacher(trusting, classes, run.root)
    assert isinstance(teacher, torch.nn.Conv2d)
