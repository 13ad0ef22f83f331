"""The code blocks of docs/tutorials/ run in order, as a reader would run them.

```bash blocks run in a shell. ```python blocks, each with names of its own, and blocks of plain `muntin` commands run in this process:
each start of PyTorch takes seconds. A page that starts a server is one script, whose jobs outlive their block. Pages that go on in the
folder of another one run there. A block that cannot run here is not left out silently: the line before it begins with `*Not run by the
tests:` and gives the reason to the reader, too.
"""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import warnings
from collections.abc import Mapping
from contextlib import chdir, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from muntin.cli import app

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "docs" / "tutorials"
BLOCK = re.compile(r"(?P<before>[^\n]*)\n\n```(?P<language>[^\n]*)\n(?P<code>.*?\n)```", re.DOTALL)
SHOWN = ("text", "yaml", "json")
"""Languages of blocks that show something and are not run."""
PAGES = 5
"""Pages, of which one is run by `make test`, each day another one, and all by `make soak`."""
pytestmark = pytest.mark.timeout(1800)  # a page of many commands beside other work
MODEL = "--set model.name=product_model:make_wide --set model.options={}"
TRIAL = "--trials 1 --max-drop 1"  # such a network has little to give
STOP = "trap 'kill $(jobs -p) 2>/dev/null || true; wait' EXIT"
COMMANDS = re.compile(r"(muntin [^|&;<>$`*~\\\n]+\n)+")
"""Commands that need no shell."""


def in_turn(number: int) -> pytest.MarkDecorator:
    """Mark a page's test as slow on its day, and as a soak test on the others."""
    return pytest.mark.slow if datetime.now(UTC).toordinal() % PAGES == number else pytest.mark.soak


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return language and code of a page's blocks; if a job runs in the background, one of bash, with Python as commands."""
    parts = []
    for number, block in enumerate(BLOCK.finditer(page.read_text(encoding="utf-8")), start=1):
        language, code = block["language"], block["code"]
        assert language in ("bash", "python", *SHOWN), f"{page.name}, block {number}: name its language, not '{language}'"
        if language in SHOWN or re.match(r"\*Not run by the tests: .+", block["before"]):
            continue
        parts.append((language, code))
    if not any(language == "bash" and re.search("[^&]&$", code, re.MULTILINE) for language, code in parts):
        return parts
    codes = (code if language == "bash" else f"python - <<'END_OF_BLOCK'\n{code}END_OF_BLOCK\n" for language, code in parts)
    return [("bash", "".join(codes))]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(page: str, folder: Path, changes: Mapping[str, str] | None = None) -> str:
    """Run a page in a folder and return what it printed; port 8000 of the page is another one here, and `changes` are replaced."""
    programs = folder.parent / f"{folder.name}-programs"
    programs.mkdir(exist_ok=True)
    for name, command in (("muntin", f'"{sys.executable}" -m muntin'), ("python", f'"{sys.executable}"')):
        (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (programs / name).chmod(0o755)
    paths = os.pathsep.join(filter(None, (str(ROOT / "src"), ".", os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": paths}
    changes, printed = {**(changes or {}), "8000": str(free_port())}, ""
    for language, code in blocks(TUTORIALS / page):
        for words, others in changes.items():
            code = code.replace(words, others)
        printed += run_block(language, code, folder, environment)
    return printed


def run_python(code: str, folder: Path) -> str:
    """Run a block of Python and return what it printed. Modules of the folder are imported anew by the next block."""
    printed, before = io.StringIO(), set(sys.modules)
    with chdir(folder), pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("default")
        patch.syspath_prepend(folder)
        exec(compile(code, "block", "exec"), {"__name__": "__main__"})  # noqa: S102 - the page's own code
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(folder)):
            del sys.modules[name]
    return printed.getvalue()


def run_block(language: str, code: str, folder: Path, environment: dict[str, str]) -> str:
    """Run a block and return what it printed."""
    if language == "python":
        return run_python(code, folder)
    if COMMANDS.fullmatch(code) is None:
        words = ["bash", "-c", f"set -euo pipefail\n{STOP}\n{code}"]
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        return done.stdout
    printed = ""
    for line in code.splitlines():
        with chdir(folder):
            result = CliRunner().invoke(app, shlex.split(line, comments=True)[1:], catch_exceptions=False)
        assert result.exit_code == 0, f"{line}\n{result.output[-4000:]}"
        printed += result.stdout
    return printed


@pytest.fixture(scope="module")
def own_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which own-data.md has run, and in which two other pages go on; with three convolutions, which export in seconds."""
    folder = tmp_path_factory.mktemp("own-data")
    small = {"--set data.crop=96": f"--set data.crop=96 {MODEL}", "--trials 1": TRIAL}
    run("own-data.md", folder, small)
    return folder


@in_turn(0)
def test_own_data(own_data: Path) -> None:
    assert {path.name for path in (own_data / "predictions").iterdir()} == {"40_0.mask.png", "40_0.overlay.jpg"}
    small = own_data / "runs/photos/compressed/trials/001/artifact"
    classes = json.loads((small / "manifest.json").read_text())["signature"]["classes"]
    assert [entry["name"] for entry in classes] == ["ocean", "moist land", "steppe", "desert", "tundra", "ice"]
    floats = next((own_data / "runs/photos/checkpoints").glob("*/average.safetensors")).stat().st_size
    assert (own_data / "runs/photos/artifact/weights.safetensors").stat().st_size < floats / 3.5  # INT8
    assert (small / "weights.safetensors").stat().st_size < floats / 4


@in_turn(1)
def test_serve_and_swap(own_data: Path) -> None:
    printed = run("serve-and-swap.md", own_data)
    assert re.findall(r"(?i)x-model-version: (\d)", printed) == ["2", "1"]
    assert '"name":"ocean","share":' in printed


@in_turn(2)
def test_geotiff(own_data: Path) -> None:
    pytest.importorskip("rasterio", reason="the extra raster is not installed")
    assert re.search(r"ocean +[\d,]{9,} km²", run("geotiff.md", own_data))
    assert (own_data / "exact" / "scene.mask.tif").exists()


@in_turn(3)
def test_foreign_model(tmp_path: Path) -> None:
    printed = run("foreign-model.md", tmp_path)
    floats, integers = (float(text) for text in re.findall(r"(?:PyTorch|INT8) ([\d.]+)", printed))
    error = 0.5 / 512**0.5  # of the share of 512 images that are right, at most
    assert floats > 0.5 + 3 * error and integers > floats - 3 * error  # better than chance, and INT8 keeps it


@in_turn(4)
def test_notebook(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel", reason="the extra dev is not installed")
    nbformat = pytest.importorskip("nbformat", reason="the extra dev is not installed")
    code = "import nbclient, nbformat as n, sys; page = n.read(sys.argv[1], 4); nbclient.execute(page); n.write(page, 'done.ipynb')"
    page = TUTORIALS / "notebook.ipynb"
    paths = os.pathsep.join(filter(None, (str(ROOT / "src"), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-c", code, page], cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outputs = [output for cell in nbformat.read(tmp_path / "done.ipynb", 4).cells for output in cell.get("outputs", ())]
    scores = re.search(r"([\d.]+) in FP32, ([\d.]+) deployed", "".join(output.get("text", "") for output in outputs))
    assert scores
    error = 0.5 / 120**0.5  # of the share of 120 pictures that are right, at most
    floats, deployed = map(float, scores.groups())
    assert floats > 1 / 3 + 3 * error and deployed > floats - 0.02 - 3 * error  # better than chance, and within the page's budget
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_every_tutorial_has_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert not [page.name for page in TUTORIALS.iterdir() if f'"{page.name}"' not in source]


def test_script_of_a_page(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Do\n\n```bash\necho a\n```\n\n*Not run by the tests: needs a GPU.*\n\n```bash\nfalse\n```\n\nThen\n\n```python\nprint('b')\n```\n"
    )
    assert "".join(run_block(*block, tmp_path, dict(os.environ)) for block in blocks(page)) == "a\nb\n"
    page.write_text(f"{page.read_text()}\n```bash\ntrue &\n```\n")
    assert len(blocks(page)) == 1
