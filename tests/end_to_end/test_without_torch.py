"""Installed without extras in an environment of its own: everything that a server or an engineer at a small machine needs works there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tritonclient.http
from torch import nn

import muntin
from muntin.images import write_image

ROOT = Path(muntin.__file__).parents[2]
INSTALL = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("muntin is installed, not checked out: there is nothing to install from")
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds muntin and what it depends on, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    subprocess.run([str(interpreter), *INSTALL, str(wheel)], check=True)
    return interpreter


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small quantised network, exported here, where there is torch."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)]
    example = torch.randint(0, 256, (2, 3, 64, 64)).float()
    return muntin.export(nn.Sequential(*layers), example, tmp_path_factory.mktemp("artifact") / "a", calibration=[example]).path


def run(python: Path, *words: object) -> Any:
    """A command's JSON document in the environment."""
    done = subprocess.run([str(python), "-m", "muntin", *map(str, words), "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Error" not in done.stderr, done.stderr  # there may be lines of progress
    return json.loads(done.stdout)


@pytest.mark.slow
def test_runtime_without_torch(python: Path, artifact: Path, tmp_path: Path) -> None:
    missing = subprocess.run([str(python), "-c", "import torch"], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError" in missing.stderr
    write_image(tmp_path / "image.png", np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))

    assert run(python, "verify", artifact)["passed"]
    (predicted,) = run(python, "predict", artifact, tmp_path / "image.png", "-o", tmp_path / "out", "--tile", 64)["results"]
    assert Path(predicted["mask"]).is_file()
    rows = run(python, "bench", artifact, artifact, "--rounds", 2)["rows"]
    assert [row["shape"] for row in rows] == [[1, 64, 64]] * 2
    profile = run(python, "profile", artifact, "--rounds", 2, "-o", tmp_path / "profile")
    assert profile["kernels"] and (tmp_path / "profile" / "profile.html").is_file()
    assert (Path(run(python, "triton", artifact, tmp_path / "models")["model"]) / "1" / "model.py").is_file()
    doctor = run(python, "doctor", "--quick")  # the profile has measured the ceilings
    assert {engine["name"] for engine in doctor["engines"] if engine["version"]} >= {"openvino", "onnxruntime"}

    asked = subprocess.run([str(python), "-m", "muntin", "fit", "recipe.yaml"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert asked.returncode == 1
    assert re.search(r"pip install (-e )?\S+\[train\]", asked.stderr) and len(asked.stderr.splitlines()) == 1


@pytest.mark.slow
def test_server_without_torch(python: Path, wheel: Path, artifact: Path, tmp_path: Path) -> None:
    subprocess.run([str(python), *INSTALL, f"{wheel}[serve]"], check=True)
    assert subprocess.run([str(python), "-c", "import torch"], capture_output=True, check=False).returncode
    images = np.random.default_rng(0).integers(0, 256, (1, 70, 90, 3), dtype=np.uint8)
    due = muntin.load(artifact).labels(images)
    command = [str(python), "-m", "muntin", "serve", str(artifact), "--http-port", "0", "--no-grpc", "--threads", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            lines = ""
            while not lines.endswith("}\n"):
                line = server.stdout.readline()
                assert line
                lines += line
            with tritonclient.http.InferenceServerClient(json.loads(lines)["http"].removeprefix("http://")) as client:
                (model,) = client.get_model_repository_index()
                image = tritonclient.http.InferInput("images", images.shape, "UINT8")
                image.set_data_from_numpy(images)
                wanted = [tritonclient.http.InferRequestedOutput("labels")]
                answer = client.infer(model["name"], [image], outputs=wanted).as_numpy("labels")
            assert np.mean(answer == due) > 0.99
        finally:
            server.terminate()
    assert server.returncode == 0
