"""Installed without extras in an environment of its own: everything that a server or an engineer at a small machine needs works there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http
from packaging.requirements import Requirement

import muntin
from muntin.images import write_image
from products import product
from server_process import server_process

ROOT = Path(muntin.__file__).parents[2]
TESTS = Path(__file__).parents[1]
BRIEF = f"import sys; sys.path.append({str(TESTS)!r}); from brief_ceilings import brief; brief(); from muntin.cli import main; main()"
"""The command line, with measurements that no test judges shortened."""


def required(name: str, extra: str = "") -> dict[str, Distribution]:
    """What pip installs for a distribution and one of its extras, by name."""
    found: dict[str, Distribution] = {}
    todo = [(name, extra)]
    while todo:
        name, extra = todo.pop()
        done = f"{name}[{extra}]"
        if done in found:
            continue
        found[done] = distribution(name)
        for line in found[done].requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": extra}):
                todo += [(wanted.name, each) for each in ("", *wanted.extras)]
    return {one.name: one for one in found.values()}


def install(site: Path, distributions: Mapping[str, Distribution]) -> None:
    """Link distributions of this environment into another one: pip would take half a minute to download and unpack them."""
    for one in distributions.values():
        here = Path(str(one.locate_file("")))
        for name in {path.parts[0] for path in one.files or () if path.parts[0] not in ("..", "__pycache__")}:
            if not (site / name).exists():
                (site / name).symlink_to(here / name)


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a new environment that holds muntin's wheel and what it depends on, and nothing else."""
    if not (ROOT / "pyproject.toml").is_file():
        pytest.skip("muntin is installed, not checked out: there is nothing to install from")
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    install(site, {name: one for name, one in required("muntin").items() if name != "muntin"})
    return folder / "venv" / "bin" / "python"


@pytest.fixture(scope="module")
def artifact() -> Path:
    """A small quantised network, exported where there is torch."""
    return product("image") / "artifact"


def run(python: Path, *words: object) -> Any:
    """A command's JSON document in the environment."""
    done = subprocess.run([str(python), "-c", BRIEF, *map(str, words), "--json"], capture_output=True, text=True, check=False)
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
    doctor = run(python, "doctor", "--quick")
    assert {engine["name"] for engine in doctor["engines"] if engine["version"]} >= {"openvino", "onnxruntime"}

    asked = subprocess.run([str(python), "-m", "muntin", "fit", "recipe.yaml"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert asked.returncode == 1
    assert re.search(r"pip install (-e )?\S+\[train\]", asked.stderr) and len(asked.stderr.splitlines()) == 1


@pytest.mark.slow
def test_server_without_torch(python: Path, artifact: Path) -> None:
    (site,) = (python.parents[1] / "lib").glob("python*/site-packages")
    install(site, {name: one for name, one in required("muntin", "serve").items() if name != "muntin"})
    assert subprocess.run([str(python), "-c", "import torch"], capture_output=True, check=False).returncode
    images = np.random.default_rng(0).integers(0, 256, (1, 70, 90, 3), dtype=np.uint8)
    due = muntin.load(artifact).labels(images)
    with (
        server_process(artifact, "--no-grpc", python=python) as (server, addresses),
        tritonclient.http.InferenceServerClient(addresses["http"].removeprefix("http://")) as client,
    ):
        (model,) = client.get_model_repository_index()
        image = tritonclient.http.InferInput("images", images.shape, "UINT8")
        image.set_data_from_numpy(images)
        wanted = [tritonclient.http.InferRequestedOutput("labels")]
        answer = client.infer(model["name"], [image], outputs=wanted).as_numpy("labels")
        assert np.mean(answer == due) > 0.99
    assert server.returncode == 0
