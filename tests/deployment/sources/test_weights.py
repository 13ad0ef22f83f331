from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from muntin import open_model
from muntin.deployment.sources.weights import load_file
from muntin.errors import RecipeError


def network(classes: int = 3, width: int = 4) -> nn.Module:
    layers = {"conv": nn.Conv2d(3, width, 3), "norm": nn.BatchNorm2d(width), "pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    return nn.Sequential(OrderedDict(layers | {"head": nn.Linear(width, classes)}))


@pytest.mark.parametrize("entry", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module.", "model."])
def test_load_what_training_programs_save(entry: str, prefix: str, tmp_path: Path) -> None:
    trained, model = network(), network()
    state = {f"{prefix}{key}": tensor for key, tensor in trained.state_dict().items()}
    torch.save({entry: state, "epoch": 3} if entry else state, tmp_path / "weights.pth")
    loaded = load_file(model, tmp_path / "weights.pth")
    assert (loaded.tensors, loaded.left_out) == (9, ())
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in trained.state_dict().items())


def test_open_with_a_safetensors_file(tmp_path: Path) -> None:
    trained = open_model("torchvision:lraspp_mobilenet_v3_large", size=32, classes=2)
    state = {key: tensor.clone() for key, tensor in trained.model.get_submodule("model").state_dict().items()}
    save_file(state | {"aux_classifier.0.weight": torch.zeros(2)}, tmp_path / "weights.safetensors")
    opened = open_model("torchvision:lraspp_mobilenet_v3_large", tmp_path / "weights.safetensors", size=32, classes=2)
    pixels = torch.randint(0, 256, (1, 3, 32, 32)).float()
    with torch.no_grad():
        assert torch.equal(opened.model(pixels), trained.model(pixels))
    assert opened.weights is not None
    assert (opened.weights.tensors, opened.weights.left_out) == (len(state), ("aux_classifier.0.weight",))
    assert f"all {len(state)} tensors of the model are from it" in opened.notes[0]


class Untrusted:
    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return Path.touch, (Path("run"),)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head.bias": None}, "1 of the model's 9 tensors are missing (head.bias)"),
        ({"extra": torch.zeros(1)}, "1 of its 10 are not in the model (extra)"),
        ({"conv.bias": None, "bias": torch.zeros(4)}, "missing (conv.bias), and 1 of its 9 are not in the model (bias)"),
        (
            {"head.weight": torch.zeros(5, 4), "head.bias": torch.zeros(5)},
            "head.weight is (5, 4) and in the model (3, 4), head.bias is (5,) and in the model (3,): if the model has 5 classes, give "
            "--classes FILE with 5 names, or --classes 5",
        ),
        ({"conv.weight": torch.zeros(4, 1, 3, 3)}, "conv.weight is (4, 1, 3, 3) and in the model (4, 3, 3, 3): give the weights of this"),
        ({"head.bias": torch.full((3,), torch.nan)}, "head.bias holds NaN or infinity in 3 of its 3 values"),
        ({"module.head.bias": torch.zeros(3)}, "one name with and without a prefix"),
        ({"head.bias": 3}, "not a tensor for each name"),
        ({"head.bias": Untrusted()}, "holds Python objects, which would run code"),
    ],
)
def test_files_that_do_not_fit(change: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state: dict[str, Any] = network().state_dict() | change
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "weights.pt")
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        load_file(model, tmp_path / "weights.pt")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_damaged_files(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"no tensors")
    with pytest.raises(RecipeError, match=name):
        load_file(network(), tmp_path / name)


def test_without_counters_of_batch_norms(tmp_path: Path) -> None:
    state: dict[str, Tensor] = {key: value for key, value in network().state_dict().items() if "num_batches" not in key}
    torch.save(state, tmp_path / "old.pt")
    assert load_file(network(), tmp_path / "old.pt").tensors == len(state)
