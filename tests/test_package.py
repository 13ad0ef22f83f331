from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import muntin

SOURCE = Path(muntin.__file__).parent
# From the foundations up: a module may import from its own room and from those before it.
ROOMS = (
    *("errors", "text", "artifact", "runtime", "layers", "models", "data", "training", "compression", "deployment"),
    *("reporting", "serving", "cli"),
)
LIGHT = ("errors", "text", "artifact", "runtime", "reporting", "serving")
WITH_TORCH = {"torch", "torchvision", "torchmetrics", "onnxscript", "timm", "tensorboard"}
HEAVY = WITH_TORCH | {"numpy", "openvino", "onnxruntime", "onnx", "PIL", "pydantic", "yaml", "jinja2", "matplotlib", "rich", "typer"}


def loaded_by(statement: str) -> set[str]:
    """The top-level packages that a fresh process holds after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("create_model", ("name", "task", "classes", "channels", "scale")),
        ("fit", ("recipe",)),
        ("evaluate", ("session", "samples")),
        ("quantize", ("calibration",)),
        ("export", ("model", "example", "path", "calibration")),
        ("verify", ("path", "evaluate")),
        ("load", ("path", "engine", "precision", "threads")),
        ("predict", ("session", "image_HWC", "tile", "overlap", "exact", "output")),
        ("TorchSession", ("model", "signature")),
    ],
)
def test_the_public_names_are_there_with_their_parameters(name: str, parameters: tuple[str, ...]) -> None:
    assert name in muntin.__all__
    assert name in dir(muntin)
    found = inspect.signature(getattr(muntin, name)).parameters
    assert [p for p in found if p in parameters] == list(parameters)


def test_every_public_name_loads_and_no_other() -> None:
    for name in muntin.__all__:
        assert getattr(muntin, name) is not None
    assert muntin.layers.HybridAttention
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        muntin.nothing  # noqa: B018


def test_importing_muntin_loads_nothing_heavy() -> None:
    assert not HEAVY & loaded_by("import muntin")


def test_the_light_rooms_do_without_torch() -> None:
    """Torch is made unimportable, not only unimported."""
    absent = f"sys.modules.update(dict.fromkeys({sorted(WITH_TORCH)}))"
    rooms = [room for room in LIGHT if (SOURCE / room).exists() or (SOURCE / f"{room}.py").exists()]
    modules = [
        str(path.relative_to(SOURCE.parent).with_suffix("")).replace("/", ".") for room in rooms for path in (SOURCE / room).glob("*.py")
    ]
    assert len(modules) > 10
    names = ", ".join(module.removesuffix(".__init__") for module in modules)
    assert "openvino" in loaded_by(f"{absent}\nimport {names}\nfrom muntin import load, predict, verify")


def test_the_rooms_are_those_that_there_are() -> None:
    parts = [part for part in SOURCE.iterdir() if part.suffix == ".py" or (part / "__init__.py").exists()]
    assert {part.stem for part in parts if not part.stem.startswith("__")} == set(ROOMS)


def test_no_room_imports_from_one_above_it() -> None:
    wrong = []
    for path in SOURCE.rglob("*.py"):
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if room in ("__init__", "__main__"):
            continue
        for name in imports_of(path):
            package, _, rest = name.partition(".")
            if package == "muntin" and rest and ROOMS.index(rest.split(".")[0]) > ROOMS.index(room):
                wrong.append(f"{path.relative_to(SOURCE)} imports {name}")
    assert not wrong


def test_nothing_that_executes_data_is_imported() -> None:
    forbidden = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal"}
    assert not [(str(path), name) for path in SOURCE.rglob("*.py") for name in imports_of(path) if name.split(".")[0] in forbidden]


def test_the_version_is_told_once() -> None:
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text())["project"]
    assert importlib.metadata.version("muntin") == project["version"]
