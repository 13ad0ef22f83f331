from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file, save_model
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from muntin.errors import CheckpointError, RecipeError
from muntin.models import create_model
from muntin.training.checkpoint import read_checkpoint
from muntin.training.fitting import fit
from muntin.training.recipe import load_recipe
from muntin.training.weights import load_initial_weights, load_weights

NAME = "torchvision:shufflenet_v2_x0_5"


def model(seed: int, classes: int = 4) -> Any:
    torch.manual_seed(seed)
    return create_model(NAME, task="classify", classes=classes)


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in tensors.items()}


def alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    return [key for key in one if torch.equal(one[key], other[key])]


@pytest.mark.parametrize(
    ("divisor", "prefixes"),
    [(1, ["model.", "", "module.", "_orig_mod.module.", "module.model."]), (32, ["model.model.", "model.", "", "module."])],
)
def test_package_names(tmp_path: Path, divisor: int, prefixes: list[str]) -> None:
    own, path = model(0).state_dict(), tmp_path / "weights.safetensors"
    for prefix in prefixes:
        fresh = create_model(NAME, task="classify", classes=4, size_divisor=divisor)
        save_file({prefix + key.removeprefix("model."): tensor for key, tensor in apart(own).items()}, path)
        notes = load_initial_weights(fresh, path)
        assert all(torch.equal(tensor, fresh.state_dict()["model." * (divisor > 1) + key]) for key, tensor in own.items())
        assert notes == (f"weights.safetensors: {len(own)} of the model's {len(own)} tensors are from it",)


def test_module_versions(tmp_path: Path) -> None:
    """MNASNet does not load without module versions, which .safetensors files lack."""
    trained, fresh = (create_model("torchvision:mnasnet0_5", task="classify", classes=3) for _ in range(2))
    save_file(apart(trained.state_dict()), tmp_path / "weights.safetensors")
    load_initial_weights(fresh, tmp_path / "weights.safetensors")
    assert alike(trained.state_dict(), fresh.state_dict()) == list(trained.state_dict())


def test_other_classes_and_unknown_tensors(tmp_path: Path) -> None:
    trained, fresh = model(0, classes=10), model(1)
    before = apart(fresh.state_dict())
    path = tmp_path / "weights.safetensors"
    save_file(apart(trained.state_dict()) | {"auxiliary.weight": torch.ones(2)}, path)
    notes = load_initial_weights(fresh, path)
    kept = [
        key
        for key in before
        if key not in alike(fresh.state_dict(), trained.state_dict())
        if before[key].shape != trained.state_dict()[key].shape
    ]
    assert kept == ["model.fc.weight", "model.fc.bias"]
    assert all(torch.equal(before[key], fresh.state_dict()[key]) for key in kept)
    assert notes[0].startswith(f"weights.safetensors: {len(before) - 2} of the model's {len(before)} tensors")
    assert notes[1].endswith("initialised at random: model.fc.weight (10 for 4), model.fc.bias (10 for 4)")
    assert notes[2].endswith("not in the model, left out: auxiliary.weight")


class Tied(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, classes)
        self.again.weight = self.first.weight


def test_shared_weights(tmp_path: Path) -> None:
    """safetensors writes a shared weight once."""
    trained, fresh, path = Tied(3), Tied(3), tmp_path / "weights.safetensors"
    save_model(trained, str(path))
    with safe_open(path, framework="pt") as file:
        assert len(list(file.keys())) == 5
    assert load_initial_weights(fresh, path) == ("weights.safetensors: 6 of the model's 6 tensors are from it",)
    assert alike(trained.state_dict(), fresh.state_dict()) == list(trained.state_dict())
    save_file({"first.weight": torch.ones(6, 6)}, path)
    with pytest.raises(RecipeError, match=r"it lacks first\.bias, again\.bias, last\.weight and 1 more of"):
        load_initial_weights(fresh, path)


def test_wrong_tensors(tmp_path: Path) -> None:
    fresh, path = model(1), tmp_path / "weights.safetensors"
    before, trained = apart(fresh.state_dict()), apart(model(0).state_dict())
    save_file({key: tensor for key, tensor in trained.items() if "conv1" not in key}, path)
    with pytest.raises(RecipeError, match=r"it lacks model\.conv1\.0\.weight, .* of the recipe's model, and holds model\."):
        load_initial_weights(fresh, path)
    save_file(trained | {"model.conv1.0.weight": torch.ones(24, 3, 5, 5)}, path)
    with pytest.raises(RecipeError, match=r"model\.conv1\.0\.weight has the shape \(24, 3, 5, 5\), in the recipe's model \(24, 3, 3, 3\)"):
        load_initial_weights(fresh, path)
    save_file(trained | {"conv1.0.weight": trained["model.conv1.0.weight"].clone()}, path)
    with pytest.raises(RecipeError, match="one name with and without a prefix"):
        load_initial_weights(fresh, path)
    assert alike(before, fresh.state_dict()) == list(before)


class Masked(nn.Module):
    """A mask of -inf is sound, and NaN or infinity in weights are not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("mask", torch.full((3,), -torch.inf))


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    fresh, trained, path = Masked(), apart(Masked().state_dict()), tmp_path / "weights.safetensors"
    before = apart(fresh.state_dict())
    trained["layer.bias"][0] = torch.inf
    trained["layer.weight"][:, 1:] = torch.nan
    save_file(trained, path)
    unsound = r"weights\.safetensors: layer\.(bias|weight) holds NaN or infinity in (1 of its 2|6 of its 8) values "
    with pytest.raises(RecipeError, match=rf"model.weights .*{unsound}\(and so for 1 other tensor\): training cannot begin with them"):
        load_initial_weights(fresh, path)
    with pytest.raises(CheckpointError, match=rf"{unsound}\(and so for 1 other tensor\): use an older step of the run"):
        load_weights(fresh, trained, path)
    assert alike(before, fresh.state_dict()) == list(before)
    save_file(apart(Masked().state_dict()), path)
    load_initial_weights(fresh, path)


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"nowhere\.safetensors: there is no such file"):
        load_initial_weights(model(0), tmp_path / "nowhere.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(RecipeError, match=r"torn\.safetensors: .*header"):
        load_initial_weights(model(0), tmp_path / "torn.safetensors")


def test_pickle(tmp_path: Path) -> None:
    trained = model(0)
    torch.save(trained.state_dict(), tmp_path / "best.pth")
    with pytest.raises(RecipeError, match="reads no pickles") as error:
        load_initial_weights(model(1), tmp_path / "best.pth")
    command = shlex.split(str(error.value).partition("by: ")[2])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    fresh = model(1)
    load_initial_weights(fresh, tmp_path / "best.safetensors")
    assert alike(trained.state_dict(), fresh.state_dict()) == list(trained.state_dict())


def test_training_from_weights(tiny: Any, tmp_path: Path) -> None:
    steps = ["training.steps=2", "training.validate_every=100", "training.checkpoint_every=100"]
    first = read_checkpoint(fit(load_recipe(tiny.recipe, steps), root=tiny.root, directory=tmp_path / "first").checkpoint)
    weights = tiny.root / "mine.safetensors"
    save_file(apart(first.tensors["model.safetensors"]), weights)
    slow = [*steps, "seed=7", "training.learning_rate=1e-9", "model.weights=mine.safetensors"]
    result = fit(load_recipe(tiny.recipe, slow), root=tiny.root, directory=tmp_path / "second")
    second = read_checkpoint(result.checkpoint)
    assert any("mine.safetensors" in note for note in result.notes)
    for name, tensor in first.tensors["model.safetensors"].items():
        if tensor.is_floating_point() and "running" not in name:
            torch.testing.assert_close(second.tensors["model.safetensors"][name], tensor, rtol=1e-4, atol=1e-5)
    weights.unlink()  # a run that goes on has weights of its own
    fit(load_recipe(tiny.recipe, slow), root=tiny.root, directory=tmp_path / "second", resume=True)


class Positions(nn.Module):
    def __init__(self, places: int, *, embedding: bool) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.table = nn.Embedding(places, 3) if embedding else nn.Parameter(torch.zeros(places, 3))


@pytest.mark.parametrize("embedding", [False, True])
def test_table_of_other_positions(tmp_path: Path, embedding: bool) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(Positions(49, embedding=embedding).state_dict(), path)
    with pytest.raises(RecipeError, match=r"table\S* has the shape \(49, 3\), in the recipe's model \(25, 3\)"):
        load_initial_weights(Positions(25, embedding=embedding), path)


@pytest.mark.parametrize(
    "make", [lambda n: nn.Sequential(nn.Conv2d(4, n, 1), nn.BatchNorm2d(n)), lambda n: nn.Sequential(weight_norm(nn.Linear(4, n)))]
)
def test_norms_of_other_classes(tmp_path: Path, make: Callable[[int], nn.Module]) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(make(3).state_dict(), path)
    notes = load_initial_weights(make(2), path)
    assert any("of another number of classes, initialised at random" in note for note in notes)


ENCODED = {"name": "hybrid-xs", "classes": 4, "encoder": "timm:test_efficientnet"}


@pytest.mark.parametrize("prefix", ["", "module."])
def test_encoder_by_package_names(tmp_path: Path, prefix: str) -> None:
    """Of timm's classifier, the encoder's tensors are taken, and the notes say which are not."""
    stored, path = timm.create_model("test_efficientnet").state_dict(), tmp_path / "weights.safetensors"
    save_file({prefix + key: tensor for key, tensor in apart(stored).items()}, path)
    fresh: Any = create_model(**ENCODED)
    before = apart(fresh.state_dict())
    notes = load_initial_weights(fresh, path)
    own = fresh.encoder.features.state_dict()
    assert all(torch.equal(tensor, stored[key]) for key, tensor in own.items())
    others = [key for key in before if not key.startswith("encoder.")]
    assert alike(before, fresh.state_dict()) != list(before) and set(others) <= set(alike(before, fresh.state_dict()))
    assert f"{len(own)} of the encoder's {len(own)} tensors are from it; the model's other {len(others)} are" in notes[0]
    assert notes[1] == "weights.safetensors: not in the encoder, left out: bn2, classifier, conv_head"


def test_whole_hybrid_with_an_encoder(tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained, fresh = (create_model(**{**ENCODED, "classes": classes}) for classes in (4, 3))
    save_file(apart(trained.state_dict()), tmp_path / "weights.safetensors")
    notes = load_initial_weights(fresh, tmp_path / "weights.safetensors")
    assert "of another number of classes, initialised at random: head.conv.weight" in notes[1]
    kept = {key: tensor for key, tensor in trained.state_dict().items() if not key.startswith("head.")}
    assert alike(kept, fresh.state_dict()) == list(kept)


@pytest.mark.parametrize("network", ["test_resnet", "test_byobnet"])
def test_weights_of_another_encoder(tmp_path: Path, network: str) -> None:
    save_file(apart(timm.create_model(network).state_dict()), tmp_path / "weights.safetensors")
    with pytest.raises(RecipeError, match=r"it lacks .* of model.encoder timm:test_efficientnet"):
        load_initial_weights(create_model(**ENCODED), tmp_path / "weights.safetensors")
