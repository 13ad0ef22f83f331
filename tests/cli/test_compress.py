"""`muntin compress`, and what the other commands make of its stages."""

from __future__ import annotations

import json
import os
import shlex
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
from muntin.compression import load_model
from muntin.compression.stages import compress_checkpoint
from muntin.deployment.counting import parameter_count
from muntin.deployment.run_artifacts import finished_stages, stage_notes
from muntin.graph.passes.storage import UNPACKED
from muntin.models.compression_record import STAGES
from muntin.runtime.verification.exactness import sums_saturate
from muntin.training import read_checkpoint
from muntin.training.recipe import override_recipe
from products import STAGES as STAGE_SETTINGS
from products import copy_of, product

Call = Callable[..., Any]
CHANGES = [word for setting in STAGE_SETTINGS for word in ("--set", setting)]
FOLDERS = ("1-low-rank", "2-w4a8", "3-mixed")
pytestmark = pytest.mark.usefixtures("loading_here", "fixed_sizes")


@pytest.fixture(scope="module")
def compressed() -> Path:
    """The run, compressed by stages. Not to be changed: copy first."""
    return product("staged") / "run"


@pytest.fixture
def copied(compressed: Path, tmp_path: Path) -> Path:
    return copy_of(compressed, tmp_path)


# ---- compress ----


def test_compress_output(call: Call, exported: Any, tmp_path: Path) -> None:
    answer = call("compress", exported.run, "-o", tmp_path / "out", *CHANGES)
    assert (answer.code, answer.err) == (0, "")
    assert all(line.endswith(" on the validation split") for line in answer.out.splitlines()[:3])
    assert [line.split()[:5] for line in answer.out.splitlines()[:3]] == [
        ["low-rank", "2", "of", "2", "steps"],
        ["w4a8", "3", "of", "3", "steps"],
        ["mixed", "2", "of", "2", "steps"],
    ]
    assert "of 3 layers are factored" in answer.out
    assert "layers W4A8" in answer.out
    stage = tmp_path / "out" / "3-mixed"
    assert answer.out.endswith(f"wrote     {stage / 'checkpoints' / 'step-00000002'}\nnext      `muntin export {stage}`\n")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(FOLDERS)
    assert not (exported.run / "compressed").exists()


def test_compress_json(call: Call, copied: Path) -> None:
    document = call("compress", copied, *CHANGES, "--resume", "--json").document()
    assert (Path(document["directory"]), document["interrupted"]) == (copied / "compressed", False)
    assert Path(document["checkpoint"]) == copied / "compressed" / "3-mixed" / "checkpoints" / "step-00000002"
    assert [(entry["stage"], entry["step"], entry["steps"]) for entry in document["stages"]] == [
        ("low-rank", 2, 2), ("w4a8", 3, 3), ("mixed", 2, 2),
    ]  # fmt: skip
    for entry, folder in zip(document["stages"], FOLDERS, strict=True):
        assert Path(entry["checkpoint"]).is_dir() and Path(entry["checkpoint"]).parts[-3] == folder
        assert entry["seconds"] > 0


def test_compress_into_an_existing_folder(call: Call, compressed: Path, tree: Callable[[Path], Any]) -> None:
    before = tree(compressed)
    assert "already holds stages; --resume goes on with them" in call("compress", compressed, *CHANGES).mistake()
    with folder_in_use(compressed / "compressed", "muntin compress"):
        text = call("compress", compressed, *CHANGES, "--resume").mistake()
    assert f"{compressed}/compressed is in use by muntin compress (process " in text
    text = call("compress", compressed, *CHANGES, "--set", "compression.average_bits=7", "--resume").mistake()
    assert "was made from another checkpoint or recipe" in text
    assert "was made from another checkpoint or recipe" in call("compress", compressed, "--resume").mistake()
    assert tree(compressed) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["--set", "training.steps=9"],
            "the model is trained already; what can be set is compression.KEY=VALUE, budget.KEY=VALUE, quantization.calibra",
        ),
        (["--set", "quantization.min_sqnr_db=9"], "'quantization.min_sqnr_db=9': the model is trained already"),
        (["--set", "quantization.calibration_images=0"], "quantization.calibration_images: Input should be greater than or equal to 1"),
        (["--set", "quantization.keep=[nosuch]"], "keep names no layer: nosuch; the model has"),
        (["--set", "seed=1"], "the model is trained already"),
        (["--set", "compression.averagebits=5"], "unknown key 'compression.averagebits'; did you mean 'average_bits'?"),
        (["--set", "compression.weight_bits=1"], "compression.weight_bits: Input should be greater than or equal to 2 (got 1)"),
        (["--set", "compression.low_rank.rank=4"], "unknown key 'compression.low_rank.rank'"),
        (["--set", "compression.average_bits"], "write section.key=value"),
        (["--set", "compression.low_rank.parameters=0.001"], "out of reach"),
        (["--set", "compression.keep=[nosuch]"], "keep names no layer: nosuch; the model has"),
        (["--until", "w8a8"], "--until 'w8a8': give one of low-rank, w4a8, mixed"),
        (["--until", "low-rank", "--set", "compression.low_rank=null"], "compression.low_rank is null"),
    ],
)
def test_compress_mistakes(call: Call, exported: Any, tmp_path: Path, words: list[str], says: str) -> None:
    assert says in call("compress", exported.run, "-o", tmp_path / "out", *words).mistake()
    assert not (tmp_path / "out").exists()


def test_compress_without_a_model(call: Call, compressed: Path, tmp_path: Path) -> None:
    assert "holds no checkpoint" in call("compress", tmp_path).mistake()
    stage = compressed / "compressed" / "2-w4a8"
    assert "is compressed already" in call("compress", stage, *CHANGES, "-o", tmp_path / "out").mistake()
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_a_checkpoint_and_a_resume_command(
    call: Call, compressed: Path, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SIGINT after the first stage's last step: the second is not begun."""

    def interrupted(*arguments: Any, **named: Any) -> Any:
        def report(stage: str, progress: Any) -> None:
            if stage == "low-rank" and progress.kind == "validation":
                os.kill(os.getpid(), signal.SIGINT)

        return compress_checkpoint(*arguments, **(named | {"report": report}))

    out = tmp_path / "a folder"
    with monkeypatch.context() as patch:
        patch.setattr("muntin.compression.stages.compress_checkpoint", interrupted)
        answer = call("compress", exported.run, "-o", out, *CHANGES)
    assert answer.code == 1
    assert "low-rank  2 of 2 steps" in answer.out and "w4a8" not in answer.out.replace(str(out), "")
    assert [path.name for path in out.iterdir()] == ["1-low-rank"]
    assert answer.err.count("\n") == 2 and "\nmuntin: interrupted; `muntin compress" in answer.err
    again = shlex.split(answer.err.split("`")[1])
    assert again[-1] == "--resume"
    document = call(*again[1:], "--json").document()
    assert [entry["step"] for entry in document["stages"]] == [2, 3, 2]
    for name in ("average.safetensors", "model.safetensors"):
        paths = [folder / "3-mixed" / "checkpoints" / "step-00000002" / name for folder in (out, compressed / "compressed")]
        assert paths[0].read_bytes() == paths[1].read_bytes()


def test_compress_until(call: Call, exported: Any, tmp_path: Path) -> None:
    words = ("compress", exported.run, "-o", tmp_path / "out", *CHANGES, "--json")
    first = call(*words, "--until", "low-rank").document()
    assert [entry["stage"] for entry in first["stages"]] == ["low-rank"] and not first["interrupted"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["1-low-rank"]
    second = call(*words, "--until", "w4a8", "--resume").document()
    assert second["stages"][0] == first["stages"][0] and Path(second["checkpoint"]).parts[-3] == "2-w4a8"
    described = call("compress", exported.run, "-o", tmp_path / "out", *CHANGES, "--until", "w4a8", "--resume")
    assert "bits " not in described.out and "layers are factored" in described.out


def test_compress_calibration_images(call: Call, exported: Any, tmp_path: Path) -> None:
    words = ("compress", exported.run, "-o", tmp_path / "out", *CHANGES, "--until", "low-rank", "--json")
    call(*words, "--set", "quantization.calibration_images=5").document()
    assert read_checkpoint(tmp_path / "out" / "1-low-rank").recipe.quantization.calibration_images == 5
    assert "was made from another checkpoint or recipe" in call(*words, "--resume").mistake()


def test_compress_notes_stages_without_steps(call: Call, exported: Any, tmp_path: Path) -> None:
    """The fit had 150 steps: a share of 0.002 is none of them, and a share of 0 asks for none."""
    shares = [word for key in ("recover", "mix") for word in ("--set", f"compression.{key}.share=0")]
    answer = call("compress", exported.run, "-o", tmp_path / "out", *CHANGES, "--set", "compression.quantize.share=0.002", *shares)
    assert "note      no training in w4a8: a share of the 150 steps of fit is less than a step: set training.steps" in answer.out
    document = call("compress", exported.run, "-o", tmp_path / "more", *CHANGES, *shares[:2], "--until", "low-rank", "--json").document()
    assert document["notes"] == []


def test_commands_after_an_interrupted_training(call: Call, exported: Any, tmp_path: Path) -> None:
    run, note = tmp_path / "run", "step 75 of 150: `muntin fit RECIPE --resume` goes on"
    shutil.copytree(exported.run / "checkpoints" / "step-00000075", run / "checkpoints" / "step-00000075")
    assert f"note      {note}\n" in call("evaluate", run).out
    assert note in call("export", run, "--json").document()["notes"]
    assert note in call("report", run, "--json").document()["notes"]
    assert note in call("compress", run, *CHANGES, "--until", "low-rank", "--json").document()["notes"]
    older = call("evaluate", exported.run / "checkpoints" / "step-00000075", "--json").document()
    assert older["notes"] == ["step 75 of 150: step-00000150 is there, too"]
    assert call("evaluate", exported.run, "--json").document()["notes"] == []


# ---- what the other commands make of it ----


def test_export_and_evaluate_a_stage(call: Call, copied: Path) -> None:
    stage = copied / "compressed" / "3-mixed"
    document = call("export", stage, "--json").document()
    artifact = open_artifact(stage / "artifact")
    assert Path(document["artifact"]) == stage / "artifact" and document["bytes"] == artifact.bytes
    changes = read_checkpoint(stage).changes
    eight = "W7A8" if sums_saturate() else "W8A8"
    assigned = {change.layer: change.done.replace("W8A8", eight) for change in changes if change.pass_ == "mix"}
    recorded = {record.name: f"W{record.weight_bits}A8" if record.activation_bits else "16 bits" for record in artifact.manifest.layers}
    assert recorded == assigned and "W4A8" in assigned.values()
    assert document["int8_layers"] == sum(done != "16 bits" for done in assigned.values())
    assert [entry["pass"] for entry in artifact.manifest.passes if entry["pass"] in ("low_rank", "qat", "mix")]
    taught, deployed = (call("evaluate", stage, *words, "--json").document() for words in ([], ["--artifact", stage / "artifact"]))
    assert taught["samples"] == deployed["samples"] == 2 and taught["counted"] == 2 * 47 * 48
    assert abs(taught["score"] - deployed["score"]) < 0.05
    verified = call("verify", stage / "artifact", "--json").document()
    assert verified["passed"] and sorted(entry["name"] for entry in verified["layers"]) == sorted(
        name for name, done in assigned.items() if done != "16 bits"
    )
    again = call("export", stage, "--json").document()  # from the same weights: taken as it is
    assert again["bytes"] == artifact.bytes and open_artifact(stage / "artifact").digest == artifact.digest


def test_export_the_low_rank_stage_in_int8(call: Call, copied: Path, tmp_path: Path) -> None:
    stage = copied / "compressed" / "1-low-rank"
    document = call("export", stage, "--json", "--set", "quantization.min_sqnr_db=0").document()
    records = open_artifact(stage / "artifact").manifest.layers
    assert any(record.name.endswith(".reduce") for record in records)
    assert document["int8_layers"] == len(records) and document["kept"] == {}
    assert call("verify", stage / "artifact", "--json").document()["passed"]
    floating = call("export", stage, "--float", "-o", tmp_path / "float", "--json").document()
    assert floating["int8_layers"] == 0 and set(floating["kept"].values()) == {"16 bits, as assigned"}


def test_export_in_float_of_a_quantised_stage(call: Call, compressed: Path, tmp_path: Path) -> None:
    assert "leave out --float" in call("export", compressed / "compressed" / "3-mixed", "--float", "-o", tmp_path / "a").mistake()
    assert not (tmp_path / "a").exists()


def test_evaluate_each_stage(call: Call, compressed: Path) -> None:
    scores = [call("evaluate", compressed / "compressed" / folder, "--json").document()["score"] for folder in FOLDERS]
    assert all(0 <= score <= 1 for score in scores)


def test_export_prints_the_replaced_artefact(call: Call, copied: Path) -> None:
    weights = read_checkpoint(copied).state.sha256["average.safetensors"]
    created = open_artifact(copied / "artifact").manifest.created
    words = ("export", copied / "compressed" / "3-mixed", "-o", copied / "artifact")
    assert f"replaced  what was there, plain INT8 of weights {weights[:8]}, exported {created}\n" in call(*words).out
    assert call(*words, "--json").document()["replaced"] is None  # its own: taken as it is
    floats = call("export", copied, "--float", "--json").document()
    assert floats["replaced"].startswith("mixed INT8 of weights ") and floats["int8_layers"] == 0


class ReachedError(Exception):
    """A command reaches what it is stopped at."""


def test_report_of_the_stages(call: Call, copied: Path, tree: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    before = tree(copied / "artifact")
    document = call("report", copied, "--json").document()
    assert tree(copied / "artifact") == before  # exported as plain INT8: only an export replaces it
    artifacts = {row["name"]: row for row in document["artifacts"]["rows"]}
    places = {"fp32": read_checkpoint(copied).path, "int8": copied / "artifact", "mixed": copied / "artifact-mixed"}
    assert {name: Path(row["path"]) for name, row in artifacts.items()} == places
    assert document["artifacts"]["described"] == "mixed" and document["artifacts"]["take"] in ("int8", "mixed")
    assert [row["name"] for row in document["latency"]["rows"]] == ["fp32", "int8", "deployed"]
    steps = {step["name"]: step for step in document["steps"]}
    assert list(steps) == ["fp32", "low-rank", "w4a8", "mixed", "deployed"]
    parameters = {stage: parameter_count(load_model(read_checkpoint(copied / "compressed" / FOLDERS[n]))) for n, stage in enumerate(STAGES)}
    assert steps["low-rank"]["params"] == parameters["low-rank"] < steps["fp32"]["params"]
    assert steps["fp32"]["weights"] > steps["low-rank"]["weights"] > steps["w4a8"]["weights"] < steps["mixed"]["weights"]
    assert steps["mixed"]["weights"] == pytest.approx(steps["deployed"]["weights"], rel=0.2) and steps["deployed"]["bytes"] > 2000
    assert steps["w4a8"]["bytes"] is steps["mixed"]["bytes"] is None  # computed only: no artefact of them lies anywhere
    assert steps["deployed"]["bytes"] == open_artifact(copied / "artifact-mixed").bytes == artifacts["mixed"]["bytes"]
    assert (
        steps["deployed"]["miou"] == artifacts["mixed"]["test"] == call("evaluate", copied / "artifact-mixed", "--json").document()["score"]
    )
    assert steps["w4a8"]["latency_ms"] is None and steps["deployed"]["latency_ms"] > 0
    floats = [layer for layer in document["layers"] if layer["weight_bits"] not in (4, 7, 8, 16)]
    assert all(layer["weight_bits"] == 32 and layer["parameters"] <= UNPACKED for layer in floats)  # a tiny key layer stays in float32
    looked = [change for change in read_checkpoint(copied / "compressed" / FOLDERS[0]).changes if change.pass_ == "low_rank"]
    assert {row["name"]: tuple(row["ranks"]) for row in document["ranks"]} == {change.layer: change.ranks for change in looked}
    assert all(bool(row["ranks"]) != bool(row["reason"]) for row in document["ranks"])
    assert {f"train {stage}" for stage in STAGES} <= document["seconds"].keys()
    assert document["agreement"] > 0.9
    page = (copied / "report.html").read_text()
    assert all(f">{name}<" in page for name in ("low-rank", "w4a8", "mixed", "int8", "Which artefact to take"))
    assert json.loads((copied / "report.json").read_text())["task"] == "segment"
    missing = call("compare", copied, "--rounds", "1", "--json").document()["missing"]
    stages = {stage: copied / "compressed" / folder for stage, folder in zip(STAGES, FOLDERS, strict=True)}
    assert missing == [{"name": stage, "command": f"muntin export {stages[stage]}"} for stage in ("low-rank", "w4a8")]
    compared: list[Any] = []

    def compare(checkpoint: Any, artifacts: Any, *arguments: Any, **options: Any) -> None:
        compared.extend(artifacts)
        raise ReachedError

    monkeypatch.setattr("muntin.deployment.comparison.compare_artifacts", compare)
    written = tree(copied)
    with pytest.raises(ReachedError):  # a second report begins to measure: nothing is exported twice
        call("report", copied)
    assert tree(copied) == written and {entry.name: entry.artifact.path for entry in compared} == {
        name: places[name] for name in ("int8", "mixed")
    }


def test_stages_of_an_unfinished_compression(copied: Path) -> None:
    """What a report says of them; it describes plain INT8 then."""
    shutil.rmtree(copied / "compressed" / "3-mixed")
    checkpoint = read_checkpoint(copied)
    (note,) = stage_notes(checkpoint)
    assert "are not done; `muntin compress RUN --resume` goes on with them" in note and not finished_stages(checkpoint)


def test_stages_after_an_interrupted_one(run: Path) -> None:
    def report(stage: str, progress: Any) -> None:
        if stage == "w4a8" and progress.kind == "validation":
            os.kill(os.getpid(), signal.SIGINT)  # the last stage ends after its first step

    checkpoint = read_checkpoint(run)
    config = override_recipe(checkpoint.recipe, STAGE_SETTINGS).compression
    assert compress_checkpoint(checkpoint, run / "compressed", config=config, report=report).interrupted
    assert not finished_stages(checkpoint) and "are not done" in stage_notes(checkpoint)[0]


def test_stop_request_after_the_last_stage(exported: Any, tmp_path: Path) -> None:
    def report(stage: str, progress: Any) -> None:
        if progress.kind == "validation":
            os.kill(os.getpid(), signal.SIGINT)

    checkpoint = read_checkpoint(exported.run)
    config = override_recipe(checkpoint.recipe, STAGE_SETTINGS).compression
    stopped = compress_checkpoint(checkpoint, tmp_path / "compressed", config=config, until="low-rank", report=report)
    assert (len(stopped.stages), stopped.interrupted, stopped.stop_requested) == (1, False, True)
    again = compress_checkpoint(checkpoint, tmp_path / "compressed", config=config, until="low-rank", resume=True)
    assert (again.interrupted, again.stop_requested, again.checkpoint) == (False, False, stopped.checkpoint)


def test_stages_of_another_checkpoint(compressed: Path) -> None:
    assert finished_stages(read_checkpoint(compressed))
    assert not finished_stages(read_checkpoint(compressed / "checkpoints" / "step-00000075"))


def test_report_of_a_stage(call: Call, compressed: Path, tmp_path: Path) -> None:
    text = call("report", compressed / "compressed" / "3-mixed", "-o", tmp_path / "out").mistake()
    assert "holds a compressed model: give the checkpoint of `muntin fit` that it was made from" in text
    assert not (tmp_path / "out" / "report.html").exists()


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


# ---- compress --max-drop ----


@pytest.fixture(scope="module")
def searched() -> Path:
    """The run with a search within a budget. Not to be changed: copy first."""
    return product("budgeted") / "run"


def test_budget_search_and_its_page(call: Call, searched: Path, tmp_path: Path) -> None:
    """The search is done, so that only what comes after it is left."""
    copied = copy_of(searched, tmp_path)
    words = ("compress", copied, "--max-drop", "1", "--confidence", "0.5", "--trials", "2", "--steps", "2")
    answer = call(*words)
    assert answer.code == 0
    lines = answer.out.splitlines()
    assert all(word in lines[1] for word in ("width", "mIoU", "at worst", "MB", "ms", "front"))
    assert [" ".join(line.split()[1:3]) for line in lines[3:7]] == ["FP32 │", "INT8 │", "trial 1", "trial 2"]
    assert any(line.startswith("chosen    ") for line in lines) and any(line.startswith("held out  mIoU ") for line in lines)
    page = copied / "budget" / "front.html"
    assert page.is_file() and lines[-1] == f"page      {page}"

    document = json.loads(call(*words, "--json").out)
    assert document["kept"] and document["outcome"] == "kept" and [row["trial"] for row in document["rows"]] == [None, 0, 1, 2]
    artifact = open_artifact(document["artifact"])
    assert artifact.bytes == document["rows"][1 + document["chosen"]]["bytes"] and artifact.manifest.signature.task == "segment"
    low, high = document["holdout"]["interval"]
    assert low <= document["holdout"]["drop"] <= high and document["holdout"]["samples"] >= 2

    again = json.loads(call("compress", copied, "--max-drop", "0", "--trials", "2", "--steps", "2", "--minutes", "0", "--json").out)
    assert [row["score"] for row in again["rows"]] == [row["score"] for row in document["rows"]]
    assert [row["kept"] for row in again["rows"]] == [row["drop"] <= 1e-9 for row in again["rows"]]
    assert "other settings (recipe " in call(*words, "--set", "compression.distillation=0").mistake()


def test_dry_run_of_a_budget_search(call: Call, searched: Path, tmp_path: Path) -> None:
    words = ("compress", searched, "--max-drop", "0.1", "--steps", "2", "--minutes", "3", "-o", tmp_path / "none", "--dry-run")
    answer = call(*words)
    lines = answer.out.splitlines()
    assert answer.code == 0 and lines[0].startswith("plan      ") and "the limit of 3 minutes covers all of it" in answer.out
    assert "candidates are judged on " in lines[-1] and not (tmp_path / "none").exists()
    plan = json.loads(call(*words, "--json").out)["plan"]
    assert plan["trials"] == 12 and plan["steps"] == 2 and plan["layers"] == 3 and plan["table_s"] > 0
    assert call("compress", searched, "--dry-run").code == 2


def test_budget_without_minutes(call: Call, searched: Path, tmp_path: Path) -> None:
    """A reference is there, as after a search that was ended early."""
    folder = tmp_path / "none"
    for name in ("reference", "tables"):
        shutil.copytree(searched / "budget" / name, folder / name)
    shutil.copyfile(searched / "budget" / "settings.json", folder / "settings.json")
    words = ("compress", searched, "--max-drop", "0.1", "--minutes", "0", "--trials", "2", "--steps", "2", "-o", folder)
    answer = call(*words, "--json")
    document = json.loads(answer.out)
    assert answer.code == 1 and document["outcome"] == "not tried" and not document["kept"]
    assert Path(document["artifact"]) == tmp_path / "none" / "reference" / "artifact"


def test_budget_options_that_do_not_fit(call: Call, searched: Path) -> None:
    assert call("compress", searched, "--minutes", "3").code == 2
    assert call("compress", searched, "--max-drop", "0.1", "--resume").code == 2
    assert "give one of size, latency" in call("compress", searched, "--max-drop", "0.1", "--objective", "speed").mistake()
    assert "confidence=1.0" in call("compress", searched, "--max-drop", "0.1", "--confidence", "1").mistake()
    assert call("compress", searched, "--confidence", "0.9").code == 2
    assert "what can be set is" in call("compress", searched, "--max-drop", "0.1", "--set", "seed=3").mistake()
