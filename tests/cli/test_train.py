from __future__ import annotations

import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import muntin.training
from muntin.artifact.answers import ANSWERS
from muntin.cli import app
from muntin.cli.train import _supervised
from muntin.compression import load_model
from muntin.deployment.checkpoint_candidate import checkpoint_session
from muntin.images import write_image
from muntin.runtime.host import supervised_process
from muntin.runtime.host.supervised_process import ProcessEnd
from muntin.training import fit, read_checkpoint
from muntin.training.evaluation import tile_of

Call = Callable[..., Any]
MUNTIN = str(Path(sys.executable).with_name("muntin"))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


# ---- fit ----


def test_fit_output(call: Call, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = call("fit", tiny.recipe, "--set", "training.steps=2")
    assert (answer.code, answer.err) == (0, "")
    assert "trained   2 of 2 steps" in answer.out
    assert re.search(r"^input     \d+ % of the time spent waiting \(\d+ workers?\)$", answer.out, re.MULTILINE)
    assert "score " in answer.out and "weights   of step 2, the best of 1 validation" in answer.out
    assert "wrote     runs/tiny/checkpoints/step-00000002" in answer.out
    assert re.search(r"samples   \d+ train, \d+ validation, \d+ test\n", answer.out)
    assert answer.out.endswith("next      `muntin export runs/tiny`, or smaller: `muntin compress runs/tiny`\n")


def test_fit_of_a_folder(call: Call, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe and the survey are those of `init`; a second run takes the recipe as it is."""
    monkeypatch.chdir(tmp_path)
    tiny.recipe.unlink()
    surveyed = call("init", tiny.root).out
    recipe = tiny.recipe.read_text()
    tiny.recipe.unlink()
    advice = call("fit", tiny.root, "--dry-run").mistake()
    assert f"{tiny.root} has no recipe.yaml: write one first, by `muntin init {tiny.root}`" in advice and not tiny.recipe.exists()
    short = ["--minutes", 5, "--steps", 1, "--model", "hybrid-xs"]
    answer = call("fit", tiny.root, *short, "--set", "training.batch_size=2", "--set", "training.steps=9", "-o", "run")
    assert answer.code == 0 and tiny.recipe.read_text() == recipe
    assert answer.out.startswith(f"wrote     {tiny.recipe} (task: segment)\n{surveyed.partition(chr(10))[2]}trained   1 of 1 steps")
    used = read_checkpoint(Path("run")).recipe
    assert (used.training.minutes, used.training.steps, used.training.batch_size, used.model.name) == (5, 1, 2, "hybrid-xs")
    again = call("fit", tiny.root, "--steps", 1, "--set", "training.batch_size=2", "-o", "other")
    assert again.code == 0 and again.out.startswith(f"recipe    {tiny.recipe}, which exists already\ntrained   1 of 1 steps")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--minutes", "0"], "training.minutes: Input should be greater than 0 (got 0.0)"),
        (["--model", "hybrid-xl"], "unknown model 'hybrid-xl'"),
    ],
)
def test_fit_with_a_wrong_short_form(call: Call, tiny: Any, tmp_path: Path, words: list[str], says: str) -> None:
    assert says.lower() in call("fit", tiny.recipe, "-o", tmp_path / "run", *words).mistake().lower()


def test_fit_of_a_folder_by_several_processes(call: Call, tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    tiny.recipe.unlink()
    assert "several processes cannot write a recipe" in call("fit", tiny.root).mistake()
    assert not tiny.recipe.exists()


class DiedError(Exception):
    """The end of a process."""


def died(*arguments: Any) -> None:
    raise DiedError


def test_fit_prints_notes_once_and_early(call: Call, tiny: Any, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    write_image(tiny.root / "train" / "masks" / "lonely.png", np.zeros((48, 48), np.uint8))
    note = f"note      {tiny.root}/train/masks: 1 mask without an image, not used: lonely.png\n"
    answer = call("fit", tiny.recipe, "-o", tmp_path / "run", "--set", "training.steps=1")
    assert (answer.code, answer.err) == (0, note) and "note " not in answer.out
    document = call("fit", tiny.recipe, "-o", tmp_path / "document", "--set", "training.steps=1", "--json").document()
    assert f"note      {document['notes'][0]}\n" == note
    monkeypatch.setattr("muntin.training.loop.Training.run", died)
    with pytest.raises(DiedError):
        call("fit", tiny.recipe, "-o", tmp_path / "other")
    assert capsys.readouterr().err == note


def test_fit_json(call: Call, tiny: Any, tmp_path: Path) -> None:
    document = call("fit", tiny.recipe, "-o", tmp_path / "run", "--json").document()
    assert (document["step"], document["steps"], document["interrupted"]) == (6, 6, False)
    assert Path(document["checkpoint"]) == tmp_path / "run" / "checkpoints" / "step-00000006"
    assert [point["step"] for point in document["validation"]] == [3, 6]


def test_fit_resume(call: Call, exported: Any, run: Path, tree: Callable[[Path], Any]) -> None:
    before = tree(run)
    assert "--resume goes on with it" in call("fit", exported.recipe, "-o", run).mistake()
    words = ("fit", exported.recipe, "-o", run, "--resume", "--set", "seed=4")
    assert "another recipe (seed was 0, is 4)" in call(*words).mistake()
    assert tree(run) == before


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda root: cut(root / "train/images/train-1.png"), "train-1.png is damaged or cut off"),
        (lambda root: (root / "test/images/test-0.png").write_text("no picture"), "test-0.png is no image that muntin reads"),
        (lambda root: (root / "validation/masks/validation-0.png").write_bytes(b""), "is empty (0 bytes)"),
        (lambda root: write_image(root / "train/masks/train-0.png", np.zeros((48, 47), np.uint8)), "they must be of one size"),
        (lambda root: write_image(root / "train/masks/train-0.png", np.full((48, 48), 3, np.uint8)), "mask values 3, allowed are 0, 1, 2"),
        (lambda root: [path.unlink() for path in (root / "train/images").iterdir()], "train/images holds no images"),
        (lambda root: shutil.rmtree(root / "train/images"), "train/images does not exist"),
        (lambda root: (root / "train/masks/train-2.png").unlink(), "train-2.png has no mask"),
        (lambda root: (root / "recipe.yaml").write_text("training: [1"), "not YAML"),
        (lambda root: (root / "recipe.yaml").write_text("trainings: {}"), "unknown key 'trainings'; did you mean 'training'?"),
    ],
)
def test_fit_with_bad_data(call: Call, tiny: Any, tmp_path: Path, spoil: Callable[[Path], Any], says: str) -> None:
    spoil(tiny.root)
    assert says in call("fit", tiny.recipe, "-o", tmp_path / "run").mistake()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("training.step=3", "unknown key 'training.step'; did you mean 'steps'?"),
        ("training.steps=0", "greater than or equal to 1 (got 0)"),
        ("training.steps", "write section.key=value"),
        ("model.name=hybrid-xl", "unknown model 'hybrid-xl'"),
    ],
)
def test_fit_with_a_wrong_set(call: Call, tiny: Any, tmp_path: Path, change: str, says: str) -> None:
    assert says in call("fit", tiny.recipe, "-o", tmp_path / "run", "--set", change).mistake()
    assert not (tmp_path / "run").exists()


def test_fit_checks_the_output_first(call: Call, tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    cut(tiny.root / "train/images/train-1.png")
    assert "taken is a file: name a folder" in call("fit", tiny.recipe, "-o", tmp_path / "taken").mistake()


def test_ctrl_c_leaves_a_checkpoint_and_a_resume_command(call: Call, tiny: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """A real SIGINT, in the validation after the third of six steps."""

    def interrupted(*arguments: Any, **named: Any) -> Any:
        def report(progress: Any) -> None:
            named["progress"](progress)
            if (progress.kind, progress.step) == ("validation", 3):
                os.kill(os.getpid(), signal.SIGINT)

        return fit(*arguments, **(named | {"progress": report}))

    run = tmp_path / "a run"
    with monkeypatch.context() as patch:
        patch.setattr("muntin.training.fit", interrupted)
        stopped = call("fit", tiny.recipe, "--output", run, "--set", "training.steps=6")
    assert stopped.code == 1 and "trained   3 of 6 steps" in stopped.out and "next " not in stopped.out
    answer, last = [line for line in stopped.err.splitlines() if line.startswith("muntin: ")]
    assert answer.endswith(", with a checkpoint; Ctrl-C again ends at once")
    assert "interrupted after step 3 of 6; `muntin fit" in last and last.endswith("` goes on")
    checkpoint = read_checkpoint(run)
    assert checkpoint.state.step == 3
    load_model(checkpoint)
    again = shlex.split(last.split("`")[1])
    assert again[0] == "muntin" and call(*again[1:], "--json").document()["step"] == 6


def test_fit_to_a_full_disk(call: Call, full_disk: Call, tiny: Any, tmp_path: Path) -> None:
    def ctrl_c(progress: Any) -> None:
        if progress.kind == "validation":
            os.kill(os.getpid(), signal.SIGINT)

    run = tmp_path / "run"
    assert fit(tiny.recipe, directory=run, progress=ctrl_c).step == 3
    with full_disk(60_000):
        text = call("fit", tiny.recipe, "-o", run, "--resume").mistake()
    assert "step-00000006 cannot be written (File too large): make room" in text
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    assert read_checkpoint(run).state.step == 3
    assert call("fit", tiny.recipe, "-o", run, "--resume", "--json").document()["step"] == 6


def test_fit_without_a_compiler(call: Call, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = call("fit", tiny.recipe, "-o", tmp_path / "run", "--set", "training.compile=true").mistake()
    assert "needs a C++ compiler on CPUs" in text
    assert "leave `compile` false" in text
    assert not (tmp_path / "run").exists()


@pytest.fixture
def failing_compiler(tmp_path: Path) -> Path:
    """A folder with a compiler that compiles nothing."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "g++").write_text('#!/bin/sh\n[ "$1" = --version ] && echo "g++ 99" || { echo "error: no"; exit 1; }\n')
    (tmp_path / "bin" / "g++").chmod(0o755)
    return tmp_path / "bin"


def test_fit_with_a_failing_compiler(
    call: Call, exported: Any, failing_compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's default backend takes ten seconds to fail: this one fails at once."""

    def fail(*arguments: Any) -> None:
        raise RuntimeError("error: no")

    monkeypatch.setenv("PATH", f"{failing_compiler}:/bin:/usr/bin")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=fail))
    text = call("fit", exported.recipe, "-o", tmp_path / "run", "--set", "training.compile=true").mistake()
    assert "cannot compile this model" in text and "backend='fail'" in text
    assert "set compile: false" in text
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.soak
def test_fit_with_a_real_compiler_that_fails(call_process: Call, tiny: Any, failing_compiler: Path, tmp_path: Path) -> None:
    env = {
        "PATH": f"{failing_compiler}:/bin:/usr/bin",
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # in the process itself: a pool of others takes seconds to start
    }
    text = call_process("fit", tiny.recipe, "-o", tmp_path / "run", "--set", "training.compile=true", env=env).mistake()
    assert "cannot compile this model" in text


# ---- fit in a child process ----

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


@needs_linux
def test_fit_after_a_kill(call: Call, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt is a real one; a child that the kernel really kills is among the soak tests."""
    attempts: list[list[str]] = []

    def run_muntin(words: list[str]) -> ProcessEnd:
        attempts.append(words)
        if len(attempts) == 1:
            return ProcessEnd(code=-9, signal="SIGKILL", for_memory=True)
        ended = CliRunner().invoke(app, words)
        return ProcessEnd(code=ended.exit_code, signal=None, for_memory=False)

    monkeypatch.setattr(supervised_process, "run_muntin", run_muntin)
    answer = call("fit", tiny.recipe, "-o", tmp_path / "run", "--set", "training.memory=16GiB", "--set", "training.steps=2")
    assert answer.code == 0
    assert answer.err == "muntin: the kernel killed the training for lack of memory: it goes on from the newest checkpoint with less\n"
    assert [words[-2:] for words in attempts] == [["--attempt", "0"], ["--attempt", "1"]]
    assert read_checkpoint(tmp_path / "run").state.step == 2


@needs_linux
@pytest.mark.parametrize(
    ("name", "reason"), [("SIGKILL", ", and the kernel killed no process for lack of memory in this time"), ("SIGSEGV", "")]
)
def test_fit_after_a_signal(call: Call, tiny: Any, monkeypatch: pytest.MonkeyPatch, name: str, reason: str) -> None:
    monkeypatch.setattr(supervised_process, "run_muntin", lambda words: ProcessEnd(code=-9, signal=name, for_memory=False))
    text = call("fit", tiny.recipe, "--supervise").mistake()
    assert text == f"{name} ended the training{reason}: with a checkpoint, --resume goes on from the newest one"


@pytest.mark.parametrize(
    ("requested", "text", "changes", "environment", "expected"),
    [
        (None, "training: {memory: 6GiB}", (), {}, True),
        (None, "training: {steps: 6}", (), {}, False),
        (None, "training: {memory: 6GiB}", ("training.memory=null",), {}, False),
        (None, "seed: 1", ("training.memory=6GiB",), {}, True),
        (None, "training: [", (), {}, False),
        (True, "training: {steps: 6}", (), {}, True),
        (False, "training: {memory: 6GiB}", (), {}, False),
        (True, "training: {memory: 6GiB}", (), {"TORCHELASTIC_RUN_ID": "1"}, False),
    ],
)
@needs_linux
def test_choice_of_a_child_process(
    requested: bool | None, text: str, changes: tuple[str, ...], environment: dict[str, str], expected: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "recipe.yaml").write_text(text)
    assert _supervised(requested, tmp_path / "recipe.yaml", changes) is expected


@pytest.fixture
def memory_group() -> Iterator[Path]:
    """A control group of processes whose memory can be limited."""
    group = Path("/sys/fs/cgroup/memory") / f"muntin-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no memory control group can be made here: {error.strerror}")
    yield group
    group.rmdir()


@pytest.mark.soak
@needs_linux
def test_fit_after_a_kill_by_the_kernel(memory_group: Path, write_tiny: Call, tmp_path: Path) -> None:
    """A real lack of memory: the group's limit is some hundred MiB above what the process holds before its first step."""
    tiny = write_tiny(tmp_path / "data", data={"crop": 256})
    (memory_group / "memory.limit_in_bytes").write_text(str(800 << 20))
    words = [MUNTIN, "fit", str(tiny.recipe), "-o", str(tmp_path / "run"), "--supervise", "--json"]
    words += [word for change in ("steps=1", "batch_size=128", "precision=fp32") for word in ("--set", f"training.{change}")]
    group = shlex.quote(str(memory_group / "cgroup.procs"))
    done = subprocess.run(["sh", "-c", f'echo $$ > {group}; exec "$@"', "sh", *words], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "muntin: the kernel killed the training for lack of memory" in done.stderr
    document = json.loads(done.stdout)
    assert document["step"] == 1
    assert any(note.startswith("an earlier attempt was killed for lack of memory with micro-batches of ") for note in document["notes"])


@needs_linux
def test_show_crops(call: Call, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = call("fit", tiny.recipe, "--show-crops", "crops.png", "--set", "data.augment=strong", "--set", "training.batch_size=2")
    assert answer.code == 0 and "wrote     crops.png: 2 of the 2 crops of the first step (data.augment: strong)" in answer.out
    document = call("fit", tiny.recipe, "--show-crops", "again.png", "--json").document()
    assert document["file"] == "again.png" and document["augmentation"]["rotation"] == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".png") == ["again.png", "crops.png"]
    assert not (tmp_path / "runs").exists()
    assert "suffix must be one of" in call("fit", tiny.recipe, "--show-crops", "crops.txt").mistake()


def test_dry_run(call: Call, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: Callable[[Path], Any]) -> None:
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    answer = call("fit", tiny.recipe, "--dry-run")
    assert answer.code == 0 and "parameters and buffers" in answer.out and "checkpointing full" in answer.out
    document = call("fit", tiny.recipe, "--dry-run", "--json").document()
    assert document["fits"] and document["advice"] == "" and document["peak"] > document["held"] > 0
    over = call("fit", tiny.recipe, "--dry-run", "--set", "training.memory=64MiB")
    assert over.code == 1 and over.err.startswith("muntin: a step with micro-batches of ") and "training.memory is 64.0 MiB" in over.err
    assert tree(tmp_path) == before


# ---- evaluate ----


def test_evaluate_checkpoint(call: Call, exported: Any) -> None:
    document = call("evaluate", exported.run, "--json").document()
    assert document["split"] == "test"
    assert document["samples"] == 2
    assert document["counted"] == 2 * 47 * 48  # of each mask a row is ignored
    assert set(document["iou"]) == {"sea", "field", "roof"}
    present = [value for value in document["iou"].values() if value is not None]
    assert document["score"] == pytest.approx(sum(present) / len(present))
    text = call("evaluate", exported.run)
    assert (text.code, text.err) == (0, "")
    assert f"mIoU {document['score']:.4f} on test (2 samples), pytorch eager, f32\n  IoU of each class:\n  sea " in text.out


def test_evaluate_options(call: Call, exported: Any) -> None:
    older = exported.run / "checkpoints" / "step-00000075"
    assert call("evaluate", older, "--split", "train", "--json").document()["samples"] == 4
    assert call("evaluate", exported.run, "--tile", "20", "--json").document()["counted"] == 2 * 47 * 48
    assert "split 'tset': give one of train, validation, test" in call("evaluate", exported.run, "--split", "tset").mistake()


def test_evaluate_classifier_with_tiles(call: Call, exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = SimpleNamespace(signature=SimpleNamespace(task="classify", answer=ANSWERS["classify"]))
    monkeypatch.setattr("muntin.training.read_checkpoint", lambda path, trust_code: classifier)
    assert "--tile 20: the run's task is classify" in call("evaluate", exported.run, "--tile", "20").mistake()


def test_evaluate_checkpoint_with_engine(call: Call, exported: Any) -> None:
    assert "--engine openvino is an artefact's" in call("evaluate", exported.run, "--engine", "openvino").mistake()


def test_evaluate_artefact(call: Call, exported: Any) -> None:
    live, deployed = (call("evaluate", exported.run, *words, "--json").document() for words in ([], ["--artifact", exported.artifact]))
    assert deployed["engine"] == "openvino"
    assert deployed["counted"] == live["counted"]
    assert abs(deployed["score"] - live["score"]) < 0.05
    assert call("evaluate", exported.artifact, "--json").document() == deployed
    assert "on test (2 samples), openvino, INT8, float layers in " in call("evaluate", exported.artifact).out


def test_evaluate_artefact_outside_of_its_run(call: Call, exported: Any, tmp_path: Path) -> None:
    copied = shutil.copytree(exported.artifact, tmp_path / "deployed" / "artifact")
    text = call("evaluate", copied).mistake()
    assert f"outside of its run's folder, so its data are not known: `muntin evaluate RUN --artifact {copied}` scores it" in text


def test_evaluate_artefact_of_other_data(call: Call, exported: Any, tmp_path: Path, write_small: Callable[..., Path]) -> None:
    text = call("evaluate", exported.run, "--artifact", write_small(tmp_path / "other")).mistake()
    assert "is not for this run's data" in text


@pytest.mark.parametrize("name", ["model.safetensors", "average.safetensors", "optimizer.safetensors", "checkpoint.json"])
def test_corrupted_checkpoint(call: Call, exported: Any, tmp_path: Path, name: str) -> None:
    shutil.copytree(exported.run / "checkpoints", tmp_path / "run" / "checkpoints")
    file = tmp_path / "run" / "checkpoints" / "step-00000150" / name
    data = bytearray(file.read_bytes())
    place = data.index(b"0.01") if name == "checkpoint.json" else len(data) // 2
    data[place + 3] ^= 2  # of the learning rate, which stays a number
    file.write_bytes(data)
    for words in (("evaluate", tmp_path / "run"), ("export", tmp_path / "run"), ("report", tmp_path / "run")):
        text = call(*words).mistake()
        assert f"{name}: corrupted" in text
        assert "use an older step beside it" in text
    older = tmp_path / "run" / "checkpoints" / "step-00000075"
    assert call("evaluate", older, "--json").document()["samples"] == 2  # what the line advises works
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoints"]
    resumed = call("fit", exported.recipe, "-o", tmp_path / "run", "--resume", "--set", "training.steps=76")
    assert resumed.code == 0 and f"{name}: corrupted" in resumed.err
    assert "step-00000150.damaged, and the run goes on from step-00000075" in resumed.err


def test_newer_checkpoint(call: Call, exported: Any, tmp_path: Path) -> None:
    shutil.copytree(exported.run / "checkpoints" / "step-00000150", tmp_path / "newer")
    state = tmp_path / "newer" / "checkpoint.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 3}))
    assert "upgrade muntin" in call("evaluate", tmp_path / "newer").mistake()


def test_evaluate_changed_data(call: Call, tiny: Any, tmp_path: Path) -> None:
    call("fit", tiny.recipe, "-o", tmp_path / "run", "--set", "training.steps=1", "--json").document()
    Image.new("L", (10, 10)).save(tiny.root / "test" / "masks" / "test-1.png")
    assert "they must be of one size" in call("evaluate", tmp_path / "run").mistake()
    shutil.rmtree(tiny.root)
    assert f"trained on data in {tiny.root}, which does not exist any more" in call("evaluate", tmp_path / "run").mistake()


def write_pets(root: Path, small: Any) -> Path:
    """Pictures in a folder a class, which the recipe does not name, and the recipe."""
    for label, name in enumerate(("cat", "dog")):
        (root / "pets" / name).mkdir(parents=True)
        for number in range(8):
            picture = np.random.default_rng(number).integers(0, 100, (40, 40, 3)) + 100 * label
            write_image(root / "pets" / name / f"{number}.png", picture.astype(np.uint8))
    content = {
        "task": "classify",
        "data": {"source": "folders", "images": "pets", "validation": 0.3, "test": 0.3, "seed": 1, "crop": 32},
        "model": small,
        "training": {"steps": 2, "batch_size": 4, "precision": "fp32", "threads": 1},
    }
    (root / "recipe.yaml").write_text(json.dumps(content))  # JSON is YAML
    return root / "recipe.yaml"


def test_evaluate_renamed_class_folders(call: Call, tiny: Any, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", write_pets(tmp_path, tiny.content["model"])
    call("fit", recipe, "-o", run, "--json").document()
    (tmp_path / "pets" / "dog").rename(tmp_path / "pets" / "ape")
    for words in (["evaluate", run], ["export", run], ["compress", run], ["report", run], ["fit", recipe, "-o", run, "--resume"]):
        assert call(*words).mistake() == (
            f"{run}/checkpoints/step-00000002 was trained on the classes cat, dog, and its data now have ape, cat: "
            "restore the names of their folders, or train again"
        )
    assert not (run / "artifact").exists()
    assert checkpoint_session(read_checkpoint(run)).signature.classes == read_checkpoint(run).state.classes  # without the data


ONE_SIZE = """
import torch
from torch import nn

class Positions(nn.Module):
    def __init__(self, channels, classes):
        super().__init__()
        self.embed, self.head = nn.Conv2d(channels, 32, 8, 8), nn.Linear(32, classes)
        self.positions = nn.Parameter(torch.zeros(32, 4, 4))

    def forward(self, x):
        return self.head((self.embed(x / 255) + self.positions).relu().mean((2, 3)))

def make(*, task, classes, channels):
    return Positions(channels, classes)
"""


@pytest.mark.usefixtures("loading_here")
def test_classifier_of_one_size(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained, evaluated and exported at the size of its crops; pictures of other sizes are resized."""
    (tmp_path / "one_size.py").write_text(ONE_SIZE)
    monkeypatch.syspath_prepend(tmp_path)
    run, recipe = tmp_path / "run", write_pets(tmp_path, {"name": "one_size:make", "options": {}})
    assert not [note for note in call("fit", recipe, "-o", run, "--json").document()["notes"] if "export" in note]
    assert "sizes     32 x 32\n" in call("export", run).out
    scores = [call("evaluate", path, "--json").document()["score"] for path in (run, run / "artifact")]
    assert all(0 <= score <= 1 for score in scores)  # of five pictures, by a model of two steps: how many are right says nothing
    write_image(tmp_path / "cat.png", np.full((50, 70, 3), 90, np.uint8))
    assert call("predict", run / "artifact", tmp_path / "cat.png", "--json").document()["results"][0]["class"] in ("cat", "dog")
    document = call("compare", run, "--rounds", "1", "--json").document()
    assert (document["artifacts"]["height"], document["artifacts"]["size_reason"]) == (32, "the size of the export")
    assert "size: nearest to 40x50 that it takes" in call("bench", run / "artifact", "--size", "40x50", "--rounds", "1").out
    text = call("export", run, "-o", tmp_path / "other", "--sizes", "any").mistake()
    assert "the model fails on pixels of shape (1, 3, " in text and "leave out sizes" in text


def test_evaluate_tile_and_engine(call: Call, exported: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[Any] = []
    evaluate = muntin.training.evaluate

    def watch(*given: Any, **options: Any) -> Any:
        tiles.append(options["tile"])
        return evaluate(*given, **options)

    monkeypatch.setattr(muntin.training, "evaluate", watch)
    for words in (["--tile", "20"], []):
        assert call("evaluate", exported.run, *words).code == 0
    assert tiles == [20, tile_of(read_checkpoint(exported.run).recipe.data.crop)]
    words = ("--artifact", exported.artifact, "--engine", "onnxruntime", "--json")
    assert call("evaluate", exported.run, *words).document()["engine"] == "onnxruntime"
