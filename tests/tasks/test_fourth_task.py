"""A task that the package does not have, a number for each picture, by a folder and a few lines elsewhere."""

from __future__ import annotations

import difflib
import http.client
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import muntin
from muntin.images import write_image
from server_process import server_process

SOURCE, PARTS = Path(muntin.__file__).parent, Path(__file__).parent / "count"
MOST_LINES = 7
FACTS = '"count": Answer(form="row", has_classes=False, argmax=False, outputs=("scores",), most_classes=0, usual_crop=32, values=1, '
LINES = {
    "artifact/answers.py": [
        ('"restore"]\n', '"restore", "count"]\n'),
        ("ANSWERS: dict[Task, Answer] = {\n", f'\\g<0>    {FACTS}score=ScoreFormat(name="error", each="error", share=False)),\n'),
    ],
    "tasks/answers.py": [
        ("from muntin.tasks.base import", "from muntin.tasks.count.answer import NumberAnswering\n\\g<0>"),
        ("Answering] = {", '\\g<0>"count": NumberAnswering(), '),
    ],
    "tasks/learning.py": [
        ("from muntin.tasks.base_learning import", "from muntin.tasks.count.learning import NumberLearning\n\\g<0>"),
        ("Learning] = {", '\\g<0>"count": NumberLearning(), '),
    ],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with the task."""
    folder = tmp_path_factory.mktemp("source")
    package = folder / "muntin"
    shutil.copytree(SOURCE, package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PARTS, package / "tasks" / "count")
    (package / "tasks" / "count" / "__init__.py").write_text("")
    changed = 0
    for name, pairs in LINES.items():
        before = text = (SOURCE / name).read_text()
        for old, new in pairs:
            assert text.count(old) == 1, f"{name}: {old!r}"
            text = text.replace(old, new.replace("\\g<0>", old))
        (package / name).write_text(text)
        changed += sum(line.startswith("+ ") for line in difflib.ndiff(before.splitlines(), text.splitlines()))
    assert changed <= MOST_LINES
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Grey pictures; the number is a tenth of the level."""
    (tmp_path / "pictures").mkdir()
    for number in range(24):
        level = 20 + 9 * number
        write_image(tmp_path / "pictures" / f"{level / 10:.1f}-{number}.png", np.full((40, 48, 3), level, np.uint8))
    recipe = {
        "name": "numbers",
        "task": "count",
        "data": {"source": "folders", "images": "pictures", "validation": 0.2, "test": 0.2, "crop": 32},
        "model": {"name": "hybrid-xxs", "options": {"dims": [32], "depths": [1], "head_dim": 16, "window": 4, "latents": 4}},
        "training": {"steps": 40, "batch_size": 4, "validate_every": 40, "learning_rate": 0.004, "precision": "fp32"},
        "quantization": {"calibration_images": 8},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.slow
def test_a_fourth_task_from_training_to_serving(source: Path, pictures: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(source)}

    def run(*words: object) -> Any:
        command = [sys.executable, "-m", "muntin", *map(str, words), "--json"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, cwd=pictures)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    fitted = run("fit", "recipe.yaml", "-o", "run")
    assert fitted["validation"][-1]["score"] < 0
    run("export", "run", "-o", "artifact")
    assert run("verify", "artifact")["passed"]
    evaluated = run("evaluate", "run", "--artifact", "artifact")
    picture = sorted((pictures / "pictures").iterdir())[0]
    (result,) = run("predict", "artifact", picture)["results"]
    assert np.isfinite(result["number"]) and np.isfinite(evaluated["error"])
    with server_process(Path("artifact"), "--no-grpc", env=environment, cwd=pictures) as (_, addresses):
        connection = http.client.HTTPConnection(addresses["http"].removeprefix("http://"), timeout=30)
        connection.request("POST", "/predict", picture.read_bytes())
        assert json.load(connection.getresponse())["number"] == pytest.approx(result["number"], abs=0.05)
        connection.close()
