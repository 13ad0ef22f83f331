"""`muntin compress`, what the other commands make of its trials, and `muntin quantize`."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from muntin.artifact import open_artifact
from muntin.artifact.file_lock import folder_in_use
from muntin.budgeting.run_budget import RecipeCourse
from muntin.training import read_checkpoint
from products import SEARCH, copy_of, product

Call = Callable[..., Any]
WORDS = ("--trials", "2", "--steps", "2", "--max-drop", "1", "--confidence", "0.5")
"""As `SEARCH`."""
pytestmark = pytest.mark.usefixtures("loading_here", "fixed_sizes")


@pytest.fixture(scope="module")
def compressed() -> Path:
    """The run with its search. Not to be changed: copy first."""
    return product("compressed") / "run"


@pytest.fixture
def copied(compressed: Path, tmp_path: Path) -> Path:
    return copy_of(compressed, tmp_path)


# ---- compress ----


def test_search_and_its_page(call: Call, copied: Path) -> None:
    """The search is done, so that only what comes after it is left."""
    answer = call("compress", copied, *WORDS)
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert all(word in lines[1] for word in ("width", "mIoU", "at worst", "MB", "ms", "front"))
    assert [" ".join(line.split()[1:3]) for line in lines[3:7]] == ["FP32 │", "INT8 │", "trial 1", "trial 2"]
    assert any(line.startswith("chosen    ") for line in lines) and any(line.startswith("held out  mIoU ") for line in lines)
    page = copied / "compressed" / "front.html"
    assert page.is_file() and lines[-1] == f"page      {page}"

    document = json.loads(call("compress", copied, *(word for change in SEARCH for word in ("--set", change)), "--json").out)
    assert document["kept"] and document["outcome"] == "kept" and [row["trial"] for row in document["rows"]] == [None, 0, 1, 2]
    artifact = open_artifact(document["artifact"])
    assert artifact.bytes == document["rows"][1 + document["chosen"]]["bytes"] and artifact.manifest.signature.task == "segment"
    low, high = document["holdout"]["interval"]
    assert low <= document["holdout"]["drop"] <= high and document["holdout"]["samples"] >= 2

    again = json.loads(call("compress", copied, "--max-drop", "0", "--trials", "2", "--steps", "2", "--minutes", "0", "--json").out)
    assert [row["score"] for row in again["rows"]] == [row["score"] for row in document["rows"]]
    assert [row["kept"] for row in again["rows"]] == [row["drop"] <= 1e-9 for row in again["rows"]]
    assert "other settings (distillation " in call("compress", copied, *WORDS, "--set", "compression.distillation=0").mistake()


def test_dry_run(call: Call, compressed: Path, tmp_path: Path) -> None:
    words = ("compress", compressed, "--steps", "2", "--minutes", "3", "-o", tmp_path / "none", "--dry-run")
    answer = call(*words)
    lines = answer.out.splitlines()
    assert answer.code == 0 and lines[0].startswith("plan      ") and "the limit of 3 minutes covers all of it" in answer.out
    assert "candidates are judged on " in lines[-1] and not (tmp_path / "none").exists()
    document = json.loads(call(*words, "--json").out)
    plan = document["plan"]
    assert plan["trials"] == 12 and plan["steps"] == 2 and plan["layers"] == 3 and plan["table_s"] > 0
    assert (document["max_drop"], document["objective"]) == (0.01, "size")


def test_search_without_minutes(call: Call, compressed: Path, tmp_path: Path) -> None:
    """A reference is there, as after a search that was ended early."""
    folder = tmp_path / "none"
    for name in ("reference", "tables"):
        shutil.copytree(compressed / "compressed" / name, folder / name)
    shutil.copyfile(compressed / "compressed" / "settings.json", folder / "settings.json")
    answer = call("compress", compressed, "--max-drop", "0.1", "--minutes", "0", "--trials", "2", "--steps", "2", "-o", folder, "--json")
    document = json.loads(answer.out)
    assert answer.code == 1 and document["outcome"] == "not tried" and not document["kept"]
    assert Path(document["artifact"]) == tmp_path / "none" / "reference" / "artifact"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--set", "training.steps=9"],
            "the model is trained already; what can be set is compression.KEY=VALUE, quantization.calibration_images, quantization.keep",
        ),
        (["--set", "quantization.min_sqnr_db=9"], "'quantization.min_sqnr_db=9': the model is trained already"),
        (["--set", "quantization.calibration_images=0"], "quantization.calibration_images: Input should be greater than or equal to 1"),
        (["--set", "compression.trial=5"], "unknown key 'compression.trial'; did you mean 'trials'?"),
        (["--set", "compression.keep=[nosuch]"], "keep names no layer: nosuch; the model has"),
        (["--objective", "speed"], "compression.objective: Input should be 'size' or 'latency'"),
        (["--confidence", "1"], "compression.confidence: Input should be less than 1"),
        (["--course", "two"], "compression.course: Input should be 'direct' or 'stages'"),
    ],
)
def test_compress_mistakes(call: Call, exported: Any, tmp_path: Path, words: list[str], says: str) -> None:
    assert says in call("compress", exported.run, "-o", tmp_path / "out", *words).mistake()
    assert not (tmp_path / "out").exists()


def test_several_processes(call: Call, compressed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "start it without torchrun" in call("compress", compressed, *WORDS).mistake()


def test_folders_that_are_refused(call: Call, compressed: Path, tmp_path: Path, tree: Callable[[Path], Any]) -> None:
    assert "holds no checkpoint" in call("compress", tmp_path).mistake()
    before = tree(compressed)
    trial = compressed / "compressed" / "trials" / "001"
    assert "is compressed already" in call("compress", trial, "-o", tmp_path / "out").mistake() and not (tmp_path / "out").exists()
    with folder_in_use(compressed / "compressed", "muntin.compress"):
        assert f"{compressed}/compressed is in use by muntin.compress (process " in call("compress", compressed, *WORDS).mistake()
    assert tree(compressed) == before


def test_ctrl_c(call: Call, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real SIGINT in the training of the first trial; the same command goes on."""
    train, out = RecipeCourse.train, tmp_path / "a folder"

    def interrupted(self: RecipeCourse, *arguments: Any, **named: Any) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return train(self, *arguments, **named)

    words = ("compress", exported.run, "-o", out, "--trials", "1", "--steps", "2", "--max-drop", "1", "--set", "compression.widths=[1]")
    with monkeypatch.context() as patch:
        patch.setattr(RecipeCourse, "train", interrupted)
        answer = call(*words)
    assert answer.code == 1 and answer.err.endswith("muntin: interrupted; the same command goes on\n")
    assert [path.name for path in (out / "trials").glob("[0-9]*")] == ["000"]
    assert [row["trial"] for row in call(*words, "--json").document()["rows"]] == [None, 0, 1]


def test_commands_after_an_interrupted_training(call: Call, exported: Any, tmp_path: Path) -> None:
    run, note = tmp_path / "run", "step 75 of 150: `muntin fit RECIPE --resume` goes on"
    shutil.copytree(exported.run / "checkpoints" / "step-00000075", run / "checkpoints" / "step-00000075")
    assert f"note      {note}\n" in call("evaluate", run).out
    assert note in call("export", run, "--json").document()["notes"]
    assert note in call("report", run, "--json").document()["notes"]
    assert note in call("compress", run, "--trials", "0", "--max-drop", "1", "--json").document()["notes"]
    older = call("evaluate", exported.run / "checkpoints" / "step-00000075", "--json").document()
    assert older["notes"] == ["step 75 of 150: step-00000150 is there, too"]
    assert call("evaluate", exported.run, "--json").document()["notes"] == []


# ---- what the other commands make of a trial ----


def test_export_and_evaluate_a_trial(call: Call, copied: Path, tmp_path: Path) -> None:
    trial = copied / "compressed" / "trials" / "001"
    assert "is the artefact that the search measured" in call("export", trial).mistake()
    document = call("export", trial, "-o", tmp_path / "again", "--json").document()
    changes = read_checkpoint(trial).changes
    qat = {change.layer: change.done for change in changes if change.pass_ == "qat" and not change.kept}
    assert document["int8_layers"] == len(qat) > 0
    scores = [
        call("evaluate", place, "--json").document()["score"] for place in (trial, trial / "artifact")
    ]  # fmt: skip
    scores.append(call("evaluate", copied, "--artifact", tmp_path / "again", "--json").document()["score"])
    assert max(scores) - min(scores) < 0.05
    assert "leave out --float" in call("export", trial, "--float", "-o", tmp_path / "a").mistake() and not (tmp_path / "a").exists()


def test_export_prints_the_replaced_artefact(call: Call, copied: Path) -> None:
    weights = read_checkpoint(copied).state.weights
    created = open_artifact(copied / "artifact").manifest.created
    words = ("export", copied / "compressed" / "trials" / "001", "-o", copied / "artifact")
    assert f"replaced  what was there, plain INT8 of weights {weights[:8]}, exported {created}\n" in call(*words).out
    assert call(*words, "--json").document()["replaced"] is None  # its own: taken as it is
    floats = call("export", copied, "--float", "--json").document()
    assert floats["replaced"].startswith("compressed INT8 of weights ") and floats["int8_layers"] == 0


class ReachedError(Exception):
    """A command reaches what it is stopped at."""


def test_report_of_the_artefact_to_take(call: Call, copied: Path, tree: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    call("compress", copied, *WORDS)
    chosen = json.loads(call("compress", copied, *WORDS, "--json").out)["artifact"]
    before = tree(copied / "artifact")
    document = call("report", copied, "--json").document()
    assert tree(copied / "artifact") == before
    artifacts = {row["name"]: row for row in document["artifacts"]["rows"]}
    places = {"fp32": read_checkpoint(copied).path, "int8": copied / "artifact", "compressed": Path(chosen)}
    assert {name: Path(row["path"]) for name, row in artifacts.items()} == places
    take = document["artifacts"]["take"]
    assert take in ("int8", "compressed")
    steps = {step["name"]: step for step in document["steps"]}
    assert list(steps) == (["fp32", "int8", "deployed"] if take == "compressed" else ["fp32", "deployed"])
    assert [row["name"] for row in document["latency"]["rows"]][::2] == ["fp32", "deployed"]
    assert (steps["deployed"]["miou"], steps["deployed"]["bytes"]) == (artifacts[take]["test"], artifacts[take]["bytes"])
    assert bool(document["ranks"]) == (take == "compressed") and document["agreement"] == artifacts[take]["same_labels"] > 0.9
    page = (copied / "report.html").read_text()
    assert all(part in page for part in (">int8<", ">compressed<", "Which artefact to take"))
    assert call("compare", copied, "--rounds", "1", "--json").document()["missing"] == []
    compared: list[Any] = []

    def compare(checkpoint: Any, artifacts: Any, *arguments: Any, **options: Any) -> None:
        compared.extend(artifacts)
        raise ReachedError

    monkeypatch.setattr("muntin.deployment.comparison.compare_artifacts", compare)
    written = tree(copied)
    with pytest.raises(ReachedError):  # a second report begins to measure: nothing is exported twice
        call("report", copied)
    shutil.rmtree(copied / "artifact")
    with pytest.raises(ReachedError):  # plain INT8 of the search is one, too
        call("report", copied)
    assert {entry.form for entry in compared[2:]} == {"int8", "compressed"} and not (copied / "artifact").exists()
    assert tree(copied) == {name: content for name, content in written.items() if name.split("/")[0] != "artifact"}


def test_report_of_a_trial(call: Call, compressed: Path, tmp_path: Path) -> None:
    text = call("report", compressed / "compressed" / "trials" / "001", "-o", tmp_path / "out").mistake()
    assert "holds a compressed model: give the checkpoint of `muntin fit` that it was made from" in text
    assert not (tmp_path / "out" / "report.html").exists()


# ---- quantize ----


def test_quantize_an_onnx_file(call: Call, tmp_path: Path) -> None:
    graph = onnx.parser.parse_graph("agraph (float[B, 3, H, W] x) => (float[B, 4, P, Q] y) { y = Conv(x, w) }")
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]), tmp_path / "net.onnx")
    np.savez(tmp_path / "inputs.npz", x=np.random.default_rng(1).normal(size=(12, 3, 16, 16)).astype(np.float32))
    words = ["quantize", str(tmp_path / "net.onnx"), "--calibration", str(tmp_path / "inputs.npz")]
    answer = call(*words)
    assert answer.code == 0, answer.err
    assert "net-int8.onnx" in answer.out and "1 of 1 products and 100.0% of the multiply-adds in INT8" in " ".join(answer.out.split())
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(tmp_path / "net-int8.onnx").graph.node)
    document = call(*words, "--keep", "y", "-o", str(tmp_path / "floats.onnx"), "--json").document()
    assert (document["coverage"], document["products"][0]["reason"]) == (0, "named in keep")
    assert "0% of the multiply-adds are in integers" in document["notes"][0]
    assert "would replace what is read" in call(*words, "-o", words[1]).mistake()
    assert "none.npz cannot be read" in call(*words[:2], "--calibration", str(tmp_path / "none.npz")).mistake()
