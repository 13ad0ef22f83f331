"""Teachers of every kind: runs, artefacts, named models; and those that do not suit a recipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from muntin.artifact.classes import ClassInfo
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.errors import MuntinError, RecipeError
from muntin.images import write_image
from muntin.models import create_model
from muntin.training.checkpoint import read_checkpoint
from muntin.training.fitting import fit
from muntin.training.recipe import Recipe, load_recipe
from muntin.training.teachers.opening import SessionTeacher, open_teacher
from products import product

SMALL = {"stem": [8, 8, 16], "dims": [32], "depths": [1], "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "pairs": [1, 1]}
FACTORY = """
import torch
def make(*, task, classes, channels):
    return torch.nn.Conv2d(channels, classes, 1, stride=STRIDE)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Any]) -> Any:
    """A recipe, and beside it the shared run, as `run`, and its artefact in floats, as `artifact`."""
    made, trained = write_tiny(tmp_path_factory.mktemp("teachers") / "data"), product("trained")
    (made.root / "run").symlink_to(trained / "run")
    (made.root / "artifact").symlink_to(trained / "float")
    return made


def open_(tiny: Any, *overrides: str, names: tuple[str, ...] | None = None, **changes: Any) -> tuple[nn.Module, tuple[str, ...]]:
    recipe = load_recipe(tiny.recipe, overrides).model_copy(update=changes)
    names = tuple(entry["name"] for entry in tiny.content["data"]["classes"]) if names is None else names
    teacher, notes = open_teacher(recipe, [ClassInfo(name=name, color=(1, 2, 3)) for name in names], tiny.root)
    assert teacher is not None
    return teacher, notes


def test_run_and_artifact(tiny: Any) -> None:
    """The deployed teacher answers as the run's, but for rounding."""
    run, _ = open_(tiny, "teacher.model=run")
    deployed, notes = open_(tiny, "teacher.model=artifact")
    assert isinstance(deployed, SessionTeacher) and notes == ("teacher: artifact",)
    crop = torch.randint(0, 256, (1, 3, 32, 32)).float()
    with torch.no_grad():
        expected, answer = run(crop), deployed(crop)
    assert float((expected - answer).abs().max()) < 0.1 * float(expected.std())


def test_first_classes(tiny: Any) -> None:
    names = tuple(entry["name"] for entry in tiny.content["data"]["classes"])
    _, notes = open_(tiny, "teacher.model=run", names=(*names, "more"))
    assert notes[-1] == f"the teacher knows {len(names)} of the {len(names) + 1} classes: it says nothing about more"


@pytest.mark.parametrize(
    ("names", "words"),
    [(("a", "b"), r"has 3 classes \(.*\), and the recipe 2 \(a, b\)"), (("c", "b", "a", "d"), r"has 3 classes .* and the recipe 4")],
)
def test_other_classes(tiny: Any, names: tuple[str, ...], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        open_(tiny, "teacher.model=run", names=names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("teacher.model=nothing",), r"start at the recipe's folder\), and it is no model's name"),
        (("teacher.model=run", "teacher.weights=w.safetensors"), "teacher.weights: .* leave it out"),
        (("teacher.model=run", "teacher.classes=2"), "teacher.classes: .* leave it out"),
        (("teacher.model=run", "data.channels=1"), "with 3 channels, and the recipe has task segment with 1"),
        (("teacher.model=torchvision:lraspp_mobilenet_v3_large",), "random weights: name its .safetensors file by teacher.weights"),
        (("teacher.model=hybrid-xs",), "random weights"),
        (("teacher.model=hybrid-xs", "teacher.classes=4", "teacher.weights=w.safetensors"), "teacher.classes 4: the recipe has 3"),
        (("teacher.model=timm:resnet18", "teacher.weights=w.safetensors"), "is a classifier"),
        (("teacher.model=hybrid-xxs", "teacher.weights=w.safetensors"), "of another number of classes: .*5 for 3|.* for "),
    ],
)
def test_refused(tiny: Any, words: tuple[str, ...], message: str) -> None:
    if not (tiny.root / "w.safetensors").exists():
        save_file(create_model("hybrid-xxs", classes=5).state_dict(), tiny.root / "w.safetensors")
    with pytest.raises(MuntinError, match=message):
        open_(tiny, *words)


def test_named_with_weights(tiny: Any) -> None:
    torch.manual_seed(5)
    source = create_model("hybrid-xxs", classes=2)
    save_file(source.state_dict(), tiny.root / "two.safetensors")
    teacher, notes = open_(tiny, "teacher.model=hybrid-xxs", "teacher.weights=two.safetensors", "teacher.classes=2")
    assert all(torch.equal(tensor, teacher.state_dict()[key]) for key, tensor in source.state_dict().items())
    assert "knows 2 of the 3 classes" in notes[-1]


def test_networks_of_packages(tiny: Any) -> None:
    """A segmenter of torchvision for segment, a classifier of timm for classify."""
    segmenter = create_model("torchvision:lraspp_mobilenet_v3_large", classes=3)
    save_file(segmenter.state_dict(), tiny.root / "lraspp.safetensors")
    teacher, _ = open_(tiny, "teacher.model=torchvision:lraspp_mobilenet_v3_large", "teacher.weights=lraspp.safetensors")
    assert all(torch.equal(tensor, teacher.state_dict()[key]) for key, tensor in segmenter.state_dict().items())
    classifier = create_model("timm:test_resnet", task="classify", classes=3)
    save_file(classifier.state_dict(), tiny.root / "resnet.safetensors")
    words = ("task=classify", "data.masks=null", "teacher.model=timm:test_resnet", "teacher.weights=resnet.safetensors")
    teacher, _ = open_(tiny, *words)
    assert all(torch.equal(tensor, teacher.state_dict()[key]) for key, tensor in classifier.state_dict().items())


@pytest.mark.parametrize(("stride", "message"), [(1, ""), (2, "not \\(1, 3, 32, 32\\)")])
def test_factory(tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int, message: str) -> None:
    (tmp_path / f"teacher_of_{stride}.py").write_text(FACTORY.replace("STRIDE", str(stride)))
    monkeypatch.syspath_prepend(tmp_path)
    if message:
        with pytest.raises(RecipeError, match=message):
            open_(tiny, f"teacher.model=teacher_of_{stride}:make")
    else:
        assert "with the weights that it is made with" in open_(tiny, f"teacher.model=teacher_of_{stride}:make")[1][0]


def test_none(tiny: Any) -> None:
    assert open_teacher(Recipe(), (), tiny.root) == (None, ())


def test_teacher_of_restored_pictures(tmp_path: Path) -> None:
    """A run and its artefact teach a model that doubles the sides; classes are refused."""
    (tmp_path / "photos").mkdir()
    generator = np.random.default_rng(0)
    for number in range(8):
        write_image(tmp_path / f"photos/{number}.png", generator.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = {
        "task": "restore",
        "data": {"source": "folders", "images": "photos", "degrade": {"scale": 2}, "validation": 0.3, "test": 0.3, "crop": 32},
        "training": {"steps": 1, "batch_size": 2, "threads": 1},
        "model": {"name": "hybrid-xs", "options": SMALL},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    run = read_checkpoint(fit(tmp_path / "recipe.yaml", directory=tmp_path / "run").checkpoint)
    export_checkpoint(run, tmp_path / "artifact", integer=False, sizes="fixed")
    for teacher in ("run", "artifact"):
        taught = load_recipe(tmp_path / "recipe.yaml", [f"teacher.model={teacher}", f"name={teacher}"])
        result = fit(taught, root=tmp_path, directory=tmp_path / f"by-{teacher}")
        assert f"teacher: {teacher}" in result.notes and result.step == 1
    refused = load_recipe(tmp_path / "recipe.yaml", ["teacher.model=hybrid-xxs", "teacher.classes=2"])
    with pytest.raises(RecipeError, match="restore has no classes"):
        open_teacher(refused, (), tmp_path)
