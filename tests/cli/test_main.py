from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.cli import COMMANDS, SYNONYMS
from muntin.cli.start import WAITING
from muntin.errors import install

Call = Callable[..., Any]


def test_help_of_all_commands(call: Call) -> None:
    answer = call("--help")
    assert (answer.code, answer.err) == (0, "")
    for name in ("demo", "init", "fit", "evaluate", "export", "verify", "predict", "report", "models"):
        assert name in COMMANDS
        assert name in answer.out


def test_version_option(call: Call) -> None:
    answer = call("--version")
    assert (answer.code, answer.out, answer.err) == (0, f"muntin {importlib.metadata.version('muntin')}\n", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_json_of_each_command(call: Call, name: str) -> None:
    answer = call(name, "--help")
    assert (answer.code, answer.err) == (0, "")
    assert "--json" in answer.out


@pytest.mark.parametrize(
    "words",
    [
        ["nothing"],
        ["verify"],
        ["verify", "a", "b"],
        ["verify", "a", "--nothing"],
        ["verify", "a", "--threads", "0"],
        ["verify", "a", "--threads", "many"],
        ["predict", "a"],
        ["predict", "a", "b", "--tile", "0"],
        ["predict", "a", "b", "--overlap", "-1"],
        ["models", "--size", "0"],
        ["fit"],
        ["evaluate", "a", "--tile", "x"],
    ],
)
def test_wrong_usage(call: Call, words: list[str]) -> None:
    answer = call(*words)
    assert (answer.code, answer.out) == (2, "")
    assert "--help" in answer.err
    assert "Traceback" not in answer.err


@pytest.mark.parametrize(("name", "command"), SYNONYMS.items())
def test_synonyms_of_commands(call: Call, name: str, command: str) -> None:
    assert command in COMMANDS and name not in COMMANDS
    answer = call(name, "recipe.yaml")
    assert (answer.code, answer.out) == (2, "")
    assert f"there is no command '{name}': did you mean `muntin {command}`?" in answer.err


def test_no_command(call: Call) -> None:
    answer = call()
    assert answer.code == 2
    assert "predict" in answer.out + answer.err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fit", "none.yaml"], "`muntin init DIR`"),
        (["evaluate", "none"], "does not exist"),
        (["export", "none"], "does not exist"),
        (["report", "none"], "does not exist"),
        (["verify", "none"], "no such artefact"),
        (["predict", "none", "none.png"], "no such artefact"),
        (["init", "none"], "does not exist"),
    ],
)
def test_missing_paths(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in call(*words).mistake()
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c(call: Call, monkeypatch: pytest.MonkeyPatch, exported: Any) -> None:
    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("muntin.runtime.verify", interrupted)
    assert call("verify", exported.artifact).mistake() == "interrupted"


def test_out_of_memory(call: Call, monkeypatch: pytest.MonkeyPatch, exported: Any, tmp_path: Path) -> None:
    def too_large(*arguments: Any, **options: Any) -> None:
        np.empty(1 << 60, np.uint8)

    monkeypatch.setattr("muntin.runtime.verify", too_large)
    text = call("verify", exported.artifact).mistake()
    assert text.startswith("not enough memory (Unable to allocate 1.00 EiB for an array")
    assert "): choose a smaller --tile, --size or --batch" in text
    monkeypatch.setattr("muntin.runtime.bulk.items.predict_picture", too_large)
    answer = call("predict", exported.artifact, exported.image, "-o", tmp_path / "out", "--json")
    assert answer.mistake().startswith(f"{exported.image}: not enough memory (Unable")
    assert [failure["source"] for failure in json.loads(answer.out)["failures"]] == [str(exported.image)]


def test_out_of_memory_in_pytorch(call: Call, monkeypatch: pytest.MonkeyPatch, exported: Any) -> None:
    import torch

    monkeypatch.setattr("muntin.runtime.verify", lambda *arguments, **options: torch.empty(1 << 60, dtype=torch.uint8))
    text = call("verify", exported.artifact).mistake()
    assert text.startswith("not enough memory (") and "you tried to allocate 1152921504606846976 bytes" in text
    assert text.endswith("a smaller training.batch_size or data.crop to train, or a machine with more")
    monkeypatch.setattr("muntin.runtime.verify", lambda *arguments, **options: torch.zeros(2) + torch.zeros(3))
    with pytest.raises(RuntimeError, match="The size of tensor a"):
        call("verify", exported.artifact)


def test_os_error(call: Call, exported: Any) -> None:
    name = f"{'x' * 300}.png"
    text = f"{name}: File name too long; check the path, its permissions and the free space"
    assert call("predict", exported.artifact, name).mistake() == text


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape", "ascii:strict"])
def test_output_of_names_outside_its_encoding(call_process: Call, exported: Any, tmp_path: Path, encoding: str) -> None:
    image = tmp_path / os.fsdecode(b"\xff\xc3\xbc.png")
    shutil.copy(exported.image, image)
    words = ("predict", exported.artifact, image, "-o", tmp_path / "out")
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "1"}
    if encoding == "ascii:strict":  # JSON is ASCII anywhere
        (result,) = call_process(*words, "--json", env=environment).document()["results"]
        assert Path(result["source"]) == image
    told = call_process(*words, env=environment, errors="surrogateescape")
    assert (told.code, told.err) == (0, "")
    shown = {"utf-8:strict": "\\udcffü.png", "utf-8:surrogateescape": "\udcffü.png", "ascii:strict": "\\udcff\\xfc.png"}[encoding]
    assert f"{tmp_path}/{shown} -> " in told.out


def test_closed_pipe() -> None:
    """`muntin ... --json | head -1`: more than a pipe holds is written to nobody."""
    code = "from muntin.cli.console import print_json\nfrom muntin.cli import app, main\n"
    code += "app.command('long')(lambda: print_json(['x' * 70] * 10_000))\nmain()"
    with subprocess.Popen([sys.executable, "-c", code, "long"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_program_and_module(tmp_path: Path) -> None:
    for program in ([str(Path(sys.executable).with_name("muntin"))], [sys.executable, "-m", "muntin"]):
        done = subprocess.run([*program, "verify", str(tmp_path), "--json"], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"muntin: {tmp_path}: it holds no manifest.json: name a directory that muntin exported\n"


# ---- without torch ----

BLOCKED = ("torch", "torchvision", "torchmetrics", "onnxscript", "timm", "tensorboard")
WITHOUT_TORCH = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_verify_and_predict_without_torch(call_process: Call, exported: Any, tmp_path: Path) -> None:
    verified = call_process("verify", exported.artifact, "--json", before=WITHOUT_TORCH).document()
    assert verified["passed"]
    predicted = call_process("predict", exported.artifact, exported.image, "-o", tmp_path, "--json", before=WITHOUT_TORCH).document()
    assert Path(predicted["results"][0]["mask"]).is_file()


def test_init_without_torch(call_process: Call, tmp_path: Path, write_tiny: Callable[..., Any]) -> None:
    write_tiny(tmp_path / "data").recipe.unlink()
    assert Path(call_process("init", tmp_path / "data", "--json", before=WITHOUT_TORCH).document()["recipe"]).is_file()


@pytest.mark.parametrize(
    "words",
    [["fit", "recipe.yaml"], ["models"], ["evaluate", "run"], ["compress", "run"], ["export", "run"], ["report", "run"], ["demo"]],
)
def test_commands_that_need_torch(words: list[str], tmp_path: Path) -> None:
    """The first import of PyTorch ends each of them; those that compute have set by then how its threads wait."""
    at_end = "import atexit, os\natexit.register(lambda: print('GOMP_SPINCOUNT' in os.environ))"
    code = f"{WITHOUT_TORCH}\n{at_end}\nfrom muntin.cli import main\nmain()"
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stdout) == (1, f"{words != ['models']}\n")
    assert done.stderr == f"muntin: this command needs the package torch: {install('train')}\n"
    assert list(tmp_path.iterdir()) == []


def test_imports_of_the_command_line() -> None:
    code = "import json, sys, muntin.cli\nprint(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    heavy = {*BLOCKED, "numpy", "openvino", "onnxruntime", "onnx", "PIL", "pydantic", "yaml", "jinja2", "matplotlib", "safetensors"}
    assert not heavy & set(loaded)
