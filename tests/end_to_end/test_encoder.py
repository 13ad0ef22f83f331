"""A hybrid with an encoder of timm: fit from a file of weights, compress, export, load, agreement."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file

import muntin
from muntin.budgeting.run_budget import compress_run
from muntin.compression import load_model
from muntin.data import open_source
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.images import read_image
from muntin.models import create_model
from muntin.training.checkpoint import Checkpoint, read_checkpoint
from muntin.training.distributed.stored_tensors import AVERAGE
from muntin.training.fitting import fit
from muntin.training.recipe import load_recipe
from muntin.training.weights import load_initial_weights

DOCS = Path(__file__).parents[2] / "docs"
DEMO = Path(muntin.__file__).parent / "recipes" / "demo.yaml"
NETWORK = "test_efficientnet"
OPTIONS = {"dims": [32], "depths": [1], "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "finest": 8}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Any]) -> Any:
    root = tmp_path_factory.mktemp("encoder")
    data = root / "data"
    made = write_tiny(data, compression={"steps": 4, "trials": 1, "widths": [1], "max_drop": 1})
    torch.manual_seed(3)
    save_file(timm.create_model(NETWORK).state_dict(), data / "network.safetensors")
    model = {"name": "hybrid-xxs", "encoder": f"timm:{NETWORK}", "options": OPTIONS, "weights": "network.safetensors"}
    recipe = load_recipe(made.recipe).model_dump(mode="json") | {"model": model}
    recipe["training"] |= {"steps": 60, "validate_every": 30, "checkpoint_every": 30, "precision": "fp32"}
    made.recipe.write_text(yaml.safe_dump(recipe))
    return made


@pytest.fixture(scope="module")
def trained(tiny: Any) -> Checkpoint:
    result = fit(tiny.recipe, directory=tiny.root / "run")
    assert any("tensors are from it; the model's other" in note for note in result.notes)
    return read_checkpoint(result.checkpoint)


def agreement(path: Path, model: torch.nn.Module, root: Path) -> float:
    """Share of equal labels, of an artefact of 32 x 32 pixels and a module."""
    picture = np.ascontiguousarray(read_image(next((root / "test" / "images").iterdir()))[8:40, 8:40])
    labels = muntin.predict(muntin.load(path), picture)
    pixels = torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        return float((model(pixels).argmax(1)[0].numpy() == labels).mean())


def test_checkpoint(trained: Checkpoint) -> None:
    model = load_model(trained)
    assert model.config.encoder == f"timm:{NETWORK}"  # type: ignore[union-attr]
    stored = trained.tensors[AVERAGE]
    assert all(torch.equal(tensor, stored[key]) for key, tensor in model.state_dict().items())


def test_int8(tiny: Any, trained: Checkpoint) -> None:
    artifact = export_checkpoint(trained, tiny.root / "artifact", sizes="fixed")
    assert artifact.manifest.measured["integer_coverage"] > 0.9
    assert agreement(artifact.path, load_model(trained), tiny.root) > 0.9
    assert muntin.verify(artifact.path).passed


def test_compressed(tiny: Any, trained: Checkpoint) -> None:
    result = compress_run(trained, folder=tiny.root / "compressed", progress=False)
    kept = read_checkpoint(result.trials[1].folder)
    assert any(name.startswith("encoder.features.") for name in kept.state.compression.qat or {})  # type: ignore[union-attr]
    assert agreement(result.trials[1].artifact, load_model(kept), tiny.root) > 0.9


def test_weights_of_imagenet(tmp_path: Path) -> None:
    """The weights that docs/models.md takes from a package fit timm's network: its activations are those of its training."""
    code = re.search(r"```python\n(.*?)```", (DOCS / "models.md").read_text(encoding="utf-8"), re.DOTALL)
    assert code is not None
    with chdir(tmp_path):
        exec(code[1], {})  # noqa: S102 - it is ours
    model = create_model("hybrid-xs", classes=6, encoder="timm:tf_efficientnet_lite0").eval()
    notes = load_initial_weights(model, tmp_path / "efficientnet-lite0.safetensors")
    assert "of the encoder's" in notes[0] and "not in the encoder, left out: bn2, classifier, conv_head" in notes[1]
    ratios: list[float] = []

    def compare(layer: torch.nn.BatchNorm2d, inputs: tuple[torch.Tensor, ...], _: object) -> None:
        assert layer.running_var is not None
        ratios.append(float((inputs[0].var((0, 2, 3)) / layer.running_var).median()))

    for layer in model.encoder.features.modules():  # type: ignore[union-attr]
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_hook(compare)
    picture = open_source(load_recipe(DEMO).data, task=load_recipe(DEMO).task, root=DEMO.parent).split("train")[1].image[:512, :512]
    with torch.no_grad():
        model(torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float())
    assert len(ratios) > 40 and min(ratios) > 0.2 and max(ratios) < 2  # .002 and 13 with random weights; 33 if an order were wrong
