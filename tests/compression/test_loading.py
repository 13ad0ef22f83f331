"""Checkpoints of compressed models become models again, without a run of the model."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from model_helpers import answer, one_line, pixels
from muntin.compression import load_model, low_rank, prepare_qat
from muntin.compression.low_rank.factored_layers import FactoredConv2d
from muntin.compression.quantization.qat import qat_operations
from muntin.compression.structure import structure_fields
from muntin.errors import DataError
from muntin.models.compression_record import CompressionRecord
from muntin.training import Checkpoint, fit, read_checkpoint
from muntin.training.checkpoint import calibration_of, source_of
from muntin.training.distributed.stored_tensors import AVERAGE
from muntin.training.fitting import broken_off


@pytest.fixture
def train_foreign(tmp_path: Path, write_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Checkpoint]:
    """`train_foreign(code, **model)` trains the model of the code's `make` for three steps."""

    def run(code: str, **model: Any) -> Checkpoint:
        (tmp_path / "foreign_model.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "foreign_model", raising=False)
        tiny = write_tiny(tmp_path / "data", model={"name": "foreign_model:make", "options": {}, **model}, training={"steps": 3})
        return read_checkpoint(fit(tiny.recipe, directory=tmp_path / "run").checkpoint)

    return run


def compressed(checkpoint: Checkpoint, folder: Path, *, ranks: bool = True, keep: tuple[str, ...] = ()) -> Checkpoint:
    """The checkpoint of a candidate in training, as `muntin compress` keeps it."""
    model, calibration = load_model(checkpoint), calibration_of(checkpoint, source_of(checkpoint))
    if ranks:
        low_rank(model, calibration, parameters=0.8, multiple=2)
    prepare_qat(model, calibration, bits=4, keep=keep)
    record = CompressionRecord(steps=1, origin="0", **structure_fields(model))
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / AVERAGE)
    tensors = type(checkpoint.tensors)(folder)
    return replace(checkpoint, tensors=tensors, state=checkpoint.state.model_copy(update={"compression": record}))


USED_TWICE = """
from torch import nn

class UsedTwice(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, classes, 1)

    def forward(self, x):
        x = self.stem(x / 64 - 2)
        return self.head((self.body(self.norm(x).relu()) + x).relu())

def make(*, task, classes, channels):
    return UsedTwice(classes, channels)
"""


def test_kept_batch_norm(tmp_path: Path, train_foreign: Callable[..., Checkpoint]) -> None:
    last = compressed(train_foreign(USED_TWICE), tmp_path / "candidate", ranks=False)
    (kept,) = [change for change in last.changes if change.pass_ == "fold"]
    assert kept.kept and "changes the model's answer" in kept.reason
    model = load_model(last)
    assert isinstance(model.get_submodule("norm"), nn.BatchNorm2d)
    assert all(torch.equal(value, last.tensors[AVERAGE][name]) for name, value in model.state_dict().items())


STANDARDISED = """
from torch import nn

class Standardised(nn.Sequential):
    def forward(self, x):
        return super().forward((x - x.mean((1, 2, 3), keepdim=True)) / (x.std((1, 2, 3), keepdim=True) + 1e-6))

def make(*, task, classes, channels):
    first = nn.Conv2d(channels, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()
    return Standardised(*first, nn.Conv2d(8, 8, 3, padding="same"), nn.ReLU(inplace=True), nn.BatchNorm2d(8), nn.Conv2d(8, classes, 1))
"""


def test_folding_without_running_the_model(
    tmp_path: Path, train_foreign: Callable[..., Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = train_foreign(STANDARDISED)
    last = compressed(origin, tmp_path / "last")
    assert [(change.layer, change.kept) for change in last.changes if change.pass_ == "fold"] == [("1", False)]
    kept = compressed(origin, tmp_path / "kept", ranks=False, keep=tuple("036"))
    with monkeypatch.context() as patch:
        patch.setattr(type(load_model(origin)), "forward", lambda model, x: nn.Sequential.forward(model, x) * float("nan"))
        model, unquantised = load_model(last), load_model(kept)
    assert [name for name, layer in unquantised.named_modules() if type(layer) is nn.Conv2d] == list("036")
    assert isinstance(model.get_submodule("3"), FactoredConv2d)  # whose padding was a word
    assert isinstance(model.get_submodule("5"), nn.BatchNorm2d) and not isinstance(model.get_submodule("1"), nn.BatchNorm2d)
    assert all(torch.equal(value, last.tensors[AVERAGE][name]) for name, value in model.state_dict().items())


THROUGH_A_LIST = """
from torch import nn

class Through(nn.Sequential):
    def __init__(self, *layers):
        super().__init__(*layers)
        self.path = list(layers)

    def forward(self, x):
        x = x / 128 - 1
        for layer in self.path:
            x = layer(x)
        return x

def make(*, task, classes, channels):
    first = nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    return Through(*first, nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, classes, 1))
"""


def test_model_with_a_plain_list(tmp_path: Path, train_foreign: Callable[..., Checkpoint]) -> None:
    model = load_model(compressed(train_foreign(THROUGH_A_LIST), tmp_path / "candidate"))
    assert isinstance(model.get_submodule("3"), FactoredConv2d) and qat_operations(model)
    x = pixels(1, 3, 16, 16)
    assert torch.equal(answer(model, x), answer(nn.Sequential(*model.children()), x / 128 - 1))


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory, write_tiny: Callable[..., Any]) -> Checkpoint:
    root = tmp_path_factory.mktemp("origin")
    return read_checkpoint(fit(write_tiny(root / "data").recipe, directory=root / "run").checkpoint)


def at(checkpoint: Checkpoint, **state: Any) -> Checkpoint:
    return replace(checkpoint, state=checkpoint.state.model_copy(update=state))


def test_training_that_was_broken_off(origin: Checkpoint, tmp_path: Path) -> None:
    steps = origin.state.step
    assert broken_off(origin) == ()
    assert broken_off(at(origin, step=steps - 1)) == (f"step {steps - 1} of {steps}: `muntin fit RECIPE --resume` goes on",)
    assert broken_off(at(compressed(origin, tmp_path / "candidate"), step=1)) == ()


def test_missing_data_folder(origin: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"trained on data in .*/gone, .*: `muntin fit RECIPE --resume`") as error:
        source_of(at(origin, root=str(tmp_path / "gone")))
    one_line(error)
    with pytest.raises(DataError, match="does not exist") as error:  # the folder is there, and what it held is not
        source_of(at(origin, root=str(tmp_path)))
    assert "--resume" not in one_line(error)
