"""The commands under `benchmarks/`: each module can be imported, each declares a benchmark, and three measure for real."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = sorted(".".join(path.relative_to(FOLDER).with_suffix("").parts) for path in FOLDER.rglob("*.py") if path.stem != "__init__")
COMMANDS = [name for name in MODULES if "." not in name and "\nBENCHMARK = " in (FOLDER / f"{name}.py").read_text(encoding="utf-8")]
OTHERS = {"litserve", "ray", "nncf"}
"""Packages of other servers' and quantisers' environments."""


@pytest.mark.parametrize("name", MODULES)
def test_import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in OTHERS and "ray[serve]" not in str(error):
            raise
        pytest.skip(str(error))


@pytest.mark.parametrize("name", COMMANDS)
def test_declaration(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(name)
    assert module.BENCHMARK.name == name
    with pytest.raises(SystemExit) as ended:
        module.BENCHMARK.parse(["--help"], module.__doc__)
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert f"python benchmarks/{name}.py" in printed
    assert "--output" in printed and "--json" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (["flops.py"], 30),
        (["losses.py", "--rounds", "1", "--side", "32"], 1),
        (["operators.py", "--tokens", "256", "--rounds", "1"], 4),
    ],
)
def test_command(words: list[str], rows: int, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, FOLDER / words[0], *words[1:], "--json", "--output", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["rows"]) >= rows
    assert document["machine"]["cpu"] and document["versions"]["python"] and document["created"] and document["n"]
