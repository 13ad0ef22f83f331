from __future__ import annotations

import ast
import functools
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import muntin
from muntin.errors import install

SOURCE = Path(muntin.__file__).parent
TESTS = Path(__file__).parent
# Rooms in import order: a module imports only from its own room and from those before it. `learning`: what of `tasks` needs PyTorch.
ROOMS = (
    *("errors", "text", "progress", "section", "artifact", "images", "tasks", "runtime", "graph", "layers", "learning", "models", "data"),
    *("training", "compression", "deployment", "budgeting", "searching", "updating", "reporting", "serving", "cli"),
)
LEARNING = ("base_learning", "crops", "labels", "learning", "loss", "pictures", "scores")
"""Modules of `tasks` that need PyTorch, or what does."""
SERVING = ("protocol", "batching", "worker", "versions", "inference", "security", "telemetry", "http", "grpc", "triton")
"""Folders of `serving` in import order."""
LIGHT = ("errors", "text", "progress", "section", "artifact", "images", "tasks", "runtime", "graph", "reporting", "serving")
WITH_TORCH = {"torch", "torchvision", "torchmetrics", "onnxscript", "timm", "tensorboard"}
HEAVY = WITH_TORCH | {"numpy", "openvino", "onnxruntime", "onnx", "PIL", "pydantic", "yaml", "jinja2", "matplotlib", "rich", "typer"}
# Modules and calls that execute the data that they read, and calls that are safe with this value of an argument.
EXECUTING = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
EXECUTING_CALLS = {
    *("builtins.eval", "builtins.exec", "builtins.compile", "builtins.__import__", "importlib.__import__", "importlib.import_module"),
    *(f"yaml.{name}{all_}" for name in ("load", "full_load", "unsafe_load") for all_ in ("", "_all")),
}
SAFE_WITH = {
    "numpy.load": ("allow_pickle", False),
    "numpy.lib.format.read_array": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}
# Rooms that read artefacts and requests, and their calls that are allowed, with the reason.
EXPOSED = ("artifact", "images", "runtime", "serving")
EXCEPTIONS = {
    ("runtime/engines/registry.py", "importlib.import_module"): "an engine of ours, by a name in the source",
    ("runtime/profiling/cold_start.py", "importlib.import_module"): "a class of ours, named by the caller to its child process",
    ("runtime/host/quiet_imports.py", "importlib.import_module"): "the engines' libraries, by names that are written in the source",
}


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages that a new process has loaded after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports_of(path: Path) -> tuple[str, ...]:
    """Return every module that a file imports, also inside functions."""
    return tuple(_imports(path))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


def executing_calls(source: str) -> Iterator[str]:
    """Yield the full names of calls in a source that may execute their data, also under other imported names."""
    tree = ast.parse(source)
    names = {name.removeprefix("builtins."): name for name in EXECUTING_CALLS if name.startswith("builtins.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            name = names.get(first, first) + dot + rest
            if name.partition(".")[0] in EXECUTING or (name in EXECUTING_CALLS | SAFE_WITH.keys() and not is_safe(name, node)):
                yield name


def is_safe(name: str, call: ast.Call) -> bool:
    """Return True if the literal arguments of a call keep it from executing data."""
    if name == "importlib.import_module":
        return bool(call.args) and isinstance(call.args[0], ast.Constant)
    argument, value = SAFE_WITH.get(name, ("", None))
    values = (keyword.value for keyword in call.keywords if keyword.arg == argument)
    return any(isinstance(literal, ast.Constant) and literal.value is value for literal in values)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("create_model", ("name", "task", "classes", "channels", "scale")),
        ("fit", ("recipe",)),
        ("evaluate", ("session", "samples")),
        ("compress", ("model", "calibration", "evaluate", "budget", "finetune", "loss", "holdout")),
        ("Budget", ("max_drop", "objective")),
        ("low_rank", ("model", "calibration", "parameters", "macs", "only", "keep")),
        ("prune", ("model", "calibration", "ratio", "parameters", "macs", "only", "keep")),
        ("quantize", ("model", "calibration", "only", "keep")),
        ("prepare_qat", ("model", "calibration", "bits", "only", "keep")),
        ("sparsify", ("model", "calibration", "pattern", "scores", "only", "keep")),
        ("freeze", ("model", "calibration")),
        ("distil", ("student", "teacher", "inputs", "steps", "minutes", "loss", "seed")),
        ("save", ("model", "path")),
        ("load_compressed", ("path", "model")),
        ("export", ("model", "example", "path", "calibration")),
        ("quantize_onnx", ("model", "calibration")),
        ("open_model", ("source", "weights", "size", "channels", "classes", "mean", "std")),
        ("verify", ("path", "evaluate")),
        ("load", ("path", "engine", "precision", "threads")),
        ("predict", ("session", "image_HWC", "tile", "overlap", "exact", "output")),
        ("TorchSession", ("model", "signature")),
        ("serve", ("path",)),
    ],
)
def test_public_names_and_parameters(name: str, parameters: tuple[str, ...]) -> None:
    assert name in muntin.__all__
    assert name in dir(muntin)
    signature = inspect.signature(getattr(muntin, name)).parameters
    assert [p for p in signature if p in parameters] == list(parameters)


def test_public_names_load() -> None:
    for name in muntin.__all__:
        assert getattr(muntin, name) is not None
    assert muntin.layers.HybridAttention
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        muntin.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("serve", "granian", "serve"), ("fit", "torch", "train"), ("layers", "torch", "train")]
)
def test_missing_package_names_its_extra(name: str, package: str, extra: str) -> None:
    use = f"try:\n    muntin.{name}\nexcept Exception as error:\n    print(error)"
    code = f"import sys\nsys.modules['{package}'] = None\nimport muntin\n{use}"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == f"muntin.{name} needs the package {package}: {install(extra)}\n"


@pytest.mark.parametrize(
    ("record", "command"),
    [
        ('{"dir_info": {"editable": true}, "url": "file:///src/muntin"}', "pip install -e '/src/muntin[serve]'"),
        ('{"dir_info": {}, "url": "file:///my%20src/muntin"}', "pip install '/my src/muntin[serve]'"),
        ('{"archive_info": {}, "url": "file:///tmp/muntin-1-py3-none-any.whl"}', "pip install 'muntin[serve]'"),
        ('{"url": "https://example.org/muntin.git", "vcs_info": {}}', "pip install 'muntin[serve]'"),
        (None, "pip install 'muntin[serve]'"),
    ],
)
def test_install_command_of_an_extra(record: str | None, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata.PathDistribution, "read_text", lambda distribution, name: record)
    assert install("serve") == command


def test_import_is_light() -> None:
    assert not HEAVY & loaded_by("import muntin")


def test_light_rooms_without_torch() -> None:
    absent = f"sys.modules.update(dict.fromkeys({sorted(WITH_TORCH)}))"
    paths = [path.relative_to(SOURCE.parent).with_suffix("") for path in SOURCE.rglob("*.py")]
    modules = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    modules = [module for module in modules if "." in module and room_of(module.removeprefix("muntin.")) in LIGHT]
    assert len(modules) > 10
    names = ", ".join(modules)
    assert "openvino" in loaded_by(f"{absent}\nimport {names}\nfrom muntin import load, predict, verify")


def room_of(module: str) -> str:
    """Return the room of a module, which is named from `muntin` on: artifact.store."""
    room, *inner = module.split(".")
    return "learning" if room == "tasks" and inner and inner[-1] in LEARNING else room


def test_list_of_rooms() -> None:
    parts = [part for part in SOURCE.iterdir() if part.suffix == ".py" or (part / "__init__.py").exists()]
    assert {part.stem for part in parts if not part.stem.startswith("__")} == set(ROOMS) - {"learning"}


def test_import_order_of_rooms() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        if module in ("__init__", "__main__"):
            continue
        for name in imports_of(path):
            package, _, rest = name.partition(".")
            if package == "muntin" and rest and ROOMS.index(room_of(rest)) > ROOMS.index(room_of(module)):
                wrong.append(f"{path.relative_to(SOURCE)} imports {name}")
    assert not wrong


def test_import_order_of_serving() -> None:
    """The folders of `serving` import only from those before them; its own modules join them."""
    wrong = []
    for path in (SOURCE / "serving").glob("*/*.py"):
        for name in imports_of(path):
            folder = name.removeprefix("muntin.serving.").split(".")[0]
            if name.startswith("muntin.serving.") and folder in SERVING and SERVING.index(folder) > SERVING.index(path.parent.name):
                wrong.append(f"{path.relative_to(SOURCE)} imports {name}")
    assert not wrong
    folders = {path.name for path in (SOURCE / "serving").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(SERVING)


def test_no_imports_that_execute_data() -> None:
    assert not [(str(path), name) for path in SOURCE.rglob("*.py") for name in imports_of(path) if name.split(".")[0] in EXECUTING]


def test_no_calls_that_execute_data() -> None:
    calls = {
        (path.relative_to(SOURCE).as_posix(), call)
        for room in EXPOSED
        for path in (SOURCE / room).rglob("*.py")
        for call in executing_calls(path.read_text(encoding="utf-8"))
    }
    assert calls == set(EXCEPTIONS)


@pytest.mark.parametrize(
    ("source", "calls"),
    [
        ("eval(text); builtins.exec(text); print(compile(text, '', 'eval'))", ["builtins.eval", "builtins.exec", "builtins.compile"]),
        ("__import__(name); importlib.import_module(name)", ["builtins.__import__", "importlib.import_module"]),
        ("import numpy as np\nnp.load(path)\nnp.load(path, allow_pickle=True)\nnp.load(path, None, False)", ["numpy.load"] * 3),
        ("from torch import load as read\nread(path)\nread(path, weights_only=trusted)", ["torch.load"] * 2),
        ("import yaml as y\ndef f():\n    return y.load(a, y.SafeLoader), y.unsafe_load_all(a)", ["yaml.load", "yaml.unsafe_load_all"]),
        ("from pickle import loads\nloads(data); joblib.load(path); marshal.loads(data)", ["pickle.loads", "joblib.load", "marshal.loads"]),
        ("import numpy as np, torch\nnp.load(path, allow_pickle=False)\ntorch.load(path, weights_only=True)\ntorch.compile(model)", []),
        ("import re, yaml\nre.compile('a'); yaml.safe_load(text); json.loads(text); self.exec(text); onnx.load(path)", []),
        ("from importlib import import_module\nimport_module('resource')", []),
    ],
)
def test_executing_calls(source: str, calls: list[str]) -> None:
    assert sorted(executing_calls(source)) == sorted(calls)


def defined_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names of a module's classes and type aliases."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield node.name
        elif (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and re.fullmatch(r"_?[A-Z]\w*[a-z]\w*", node.targets[0].id)
        ):
            yield node.targets[0].id


def test_class_names_are_unique() -> None:
    places: dict[str, list[str]] = {}
    for path in SOURCE.rglob("*.py"):
        for name in defined_names(parsed(path)):
            places.setdefault(name, []).append(str(path.relative_to(SOURCE)))
    assert not {name: files for name, files in places.items() if len(files) > 1}


def test_size_of_folders_files_and_classes() -> None:
    for folder in [SOURCE, *(path.parent for path in SOURCE.rglob("__init__.py"))]:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 15, folder
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 450, path
        for node in ast.walk(parsed(path)):
            assert not isinstance(node, ast.ClassDef) or (node.end_lineno or 0) - node.lineno < 300, f"{path}: {node.name}"


def test_length_of_test_names() -> None:
    long = re.compile(r"^ *(?:async )?def (test_\w{56,})", re.MULTILINE)
    assert not [name for path in TESTS.rglob("test_*.py") for name in long.findall(path.read_text(encoding="utf-8"))]


def test_version_of_the_package() -> None:
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version("muntin") == project["version"]
