"""Runs of several processes: resuming with another number of them, lack of memory, a killed process."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muntin.compression import load_model
from muntin.training.checkpoint import checkpoints_in, read_checkpoint
from muntin.training.distributed.stored_tensors import AVERAGE, MODEL, OPTIMIZER
from rank_processes import BATCH, fit_recipe, run_ranks

TRAINING = {"steps": 6, "batch_size": BATCH, "precision": "fp32", "validate_every": 6, "checkpoint_every": 3}


@pytest.fixture
def plain(tmp_path: Path, write_tiny: Callable[..., Any]) -> Path:
    """The recipe of a model without group norms."""
    return Path(write_tiny(tmp_path / "data", model={"name": "rank_processes:plain", "options": {}}, training=TRAINING).recipe)


def assert_close(path: Path, other: Path) -> None:
    one, two = read_checkpoint(path), read_checkpoint(other)
    assert one.state.step == two.state.step == 6
    for group in (MODEL, AVERAGE, OPTIMIZER):
        expected = two.tensors[group]
        assert one.tensors[group].keys() == expected.keys()
        for name, tensor in one.tensors[group].items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=f"{group}: {name}")


def test_resume_with_other_numbers_of_processes(tmp_path: Path, plain: Path) -> None:
    fit_recipe(plain, tmp_path / "alone", [], False)
    answers = run_ranks(3, fit_recipe, plain, tmp_path / "three", ["training.sharding=zero3"], False)
    assert len({answer["score"] for answer in answers}) == 1  # each has seen some pictures
    assert_close(tmp_path / "three", tmp_path / "alone")
    newest = checkpoints_in(tmp_path / "three" / "checkpoints")[-1]
    assert load_model(read_checkpoint(newest))(torch.zeros(1, 3, 8, 8)).shape == (1, 3, 8, 8)

    part = next((newest / "optimizer").iterdir())
    part.write_bytes(part.read_bytes()[:-9])  # the newest is damaged: the run goes on from step 3
    for count, sharding in ((1, "zero3"), (2, "zero2")):
        folder = tmp_path / f"resumed-{count}"
        shutil.copytree(tmp_path / "three", folder)
        arguments = plain, folder, [f"training.sharding={sharding}"], True
        first = fit_recipe(*arguments) if count == 1 else run_ranks(count, fit_recipe, *arguments)[0]
        assert any("corrupted" in note and "goes on from step-00000003" in note for note in first["notes"])
        assert (folder / "checkpoints" / "step-00000006.damaged").is_dir()
        assert_close(folder, tmp_path / "alone")


def test_lack_of_memory_in_one_process(tmp_path: Path, plain: Path) -> None:
    """Without sharding all try again with smaller parts; sharded processes end, and begin smaller when they are started again."""
    fit_recipe(plain, tmp_path / "alone", [], False)
    model = "model.name=rank_processes:short"
    (first, _) = run_ranks(2, fit_recipe, plain, tmp_path / "none", [model], False)
    assert any("out of memory at step 5 with micro-batches of 6" in note for note in first["notes"])
    assert_close(tmp_path / "none", tmp_path / "alone")
    with pytest.raises(RuntimeError, match=r"lost the others|they go on with micro-batches of 3"):
        run_ranks(2, fit_recipe, plain, tmp_path / "zero3", [model, "training.sharding=zero3"], False)
    run_ranks(2, fit_recipe, plain, tmp_path / "zero3", [model, "training.sharding=zero3"], True)
    assert_close(tmp_path / "zero3", tmp_path / "alone")
    memory = read_checkpoint(tmp_path / "zero3").state.memory
    assert memory is not None and memory.micro_batch == 3


def test_killed_process(tmp_path: Path, plain: Path) -> None:
    """The other ends with a message; started again, as torchrun does, both go on from the newest checkpoint."""
    words = plain, tmp_path / "run", ["model.name=rank_processes:killed", "training.sharding=zero3"], False
    with pytest.raises(RuntimeError, match="lost the others"):
        run_ranks(2, fit_recipe, *words, RUN=str(tmp_path / "run"))
    assert [path.name for path in checkpoints_in(tmp_path / "run" / "checkpoints")] == ["step-00000003"]
    (first, _) = run_ranks(2, fit_recipe, *words, TORCHELASTIC_RESTART_COUNT="1")
    assert first["step"] == 6
    fit_recipe(plain, tmp_path / "alone", [], False)
    assert_close(tmp_path / "run", tmp_path / "alone")


@pytest.mark.soak
def test_killed_process_of_torchrun(tmp_path: Path, plain: Path) -> None:
    """The others end with a message, and torchrun starts all again, from the newest checkpoint."""
    run, steps = tmp_path / "run", 200
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    words += ["--monitor-interval", "3", "-m", "muntin"]  # otherwise torchrun may end the others before they notice
    changes = [f"training.steps={steps}", f"training.validate_every={steps}", "training.checkpoint_every=20", "training.sharding=zero3"]
    words += ["fit", str(plain), "--output", str(run), *(word for change in changes for word in ("--set", change))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        while not checkpoints_in(run / "checkpoints") and job.poll() is None:
            time.sleep(0.05)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        last = max(int(child) for child in children if b"muntin" in Path(f"/proc/{child}/cmdline").read_bytes())
        os.kill(last, signal.SIGKILL)
        output, _ = job.communicate()
    assert job.returncode == 0, output
    assert "lost the others" in output
    assert read_checkpoint(run).state.step == steps
