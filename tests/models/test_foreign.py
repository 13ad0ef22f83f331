"""Foreign models: raw pixels in, scores out, errors of one line.

Axes: B images, C channels, H W map, K scores.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muntin.artifact.manifest import Task
from muntin.errors import MuntinError, RecipeError
from muntin.models import DividedSides, ForeignModel, create_model
from muntin.models.foreign import checked_statistics, takes_raw_pixels

FACTORIES = """
from torch import nn

SIZE = 3

def classifier(*, task, classes, channels):
    assert task == "classify"
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))

def enlarging(*, task, classes, channels, scale):
    return nn.Upsample(scale_factor=scale)

def positional(task, classes, channels):
    return nn.Conv2d(channels, classes, 1)

def stranger(*, task, classes):
    return nn.Identity()

def text(*, task, classes, channels):
    return "a model"

def broken(*, task, classes, channels):
    raise TypeError("from inside the user's own code")
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a user's module."""
    (tmp_path / "my_own_factories.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_own_factories"
    sys.modules.pop("my_own_factories", None)


class Recorder(nn.Module):
    """Keeps its input and returns scores of a quarter of the size."""

    def __init__(self, *, named: bool = False) -> None:
        super().__init__()
        self.named = named
        self.seen: Tensor | None = None

    def forward(self, x_BCHW: Tensor) -> Tensor | dict[str, Tensor]:
        self.seen = x_BCHW
        scores = x_BCHW[:, :2, ::4, ::4]
        return {"out": scores, "aux": scores} if self.named else scores


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_timm_classifier(channels: int) -> None:
    model = create_model("timm:mobilenetv3_small_050", task="classify", classes=7, channels=channels).eval()
    with torch.inference_mode():
        scores = model(torch.rand(2, channels, 33, 40) * 255)
    assert scores.shape == (2, 7) and scores.isfinite().all()


def test_torchvision_segmenter() -> None:
    model = create_model("torchvision:lraspp_mobilenet_v3_large", task="segment", classes=5).eval()
    with torch.inference_mode():
        for size in [(33, 40), (64, 64)]:
            scores = model(torch.rand(2, 3, *size) * 255)
            assert scores.shape == (2, 5, *size) and scores.isfinite().all()


def test_torchvision_classifier() -> None:
    model = create_model("torchvision:mobilenet_v3_small", task="classify", classes=5).eval()
    with torch.inference_mode():
        assert model(torch.rand(2, 3, 33, 40) * 255).shape == (2, 5)


def test_normalisation() -> None:
    inner = Recorder()
    model = ForeignModel(inner, mean=(0.5, 0.25, 0.1), std=(0.5, 0.25, 0.2), task="segment")
    x_BCHW = torch.rand(2, 3, 8, 8) * 255
    model(x_BCHW)
    mean, std = torch.tensor([0.5, 0.25, 0.1]).reshape(3, 1, 1), torch.tensor([0.5, 0.25, 0.2]).reshape(3, 1, 1)
    assert inner.seen is not None
    torch.testing.assert_close(inner.seen, (x_BCHW / 255 - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("size", [(8, 8), (5, 13)])
def test_resized_scores(named: bool, size: tuple[int, int]) -> None:
    model = ForeignModel(Recorder(named=named), mean=(0.5,) * 3, std=(0.5,) * 3, task="segment")
    assert model(torch.rand(2, 3, *size) * 255).shape == (2, 2, *size)


def test_auxiliary_answers() -> None:
    """Returns auxiliary answers in training, like GoogLeNet."""

    class Branching(nn.Linear):
        def forward(self, input: Tensor) -> Any:
            out = super().forward(input.mean((2, 3)))
            return (out, out + 1, None) if self.training else out

    model = ForeignModel(Branching(3, 4), mean=(0.5,) * 3, std=(0.5,) * 3, task="classify")
    x_BCHW = torch.rand(2, 3, 8, 8) * 255
    assert torch.equal(model.train()(x_BCHW), model.eval()(x_BCHW))


def test_state_names() -> None:
    model = ForeignModel(nn.Linear(2, 2), mean=(0.5,), std=(0.5,), task="classify")
    assert set(model.state_dict()) == {"model.weight", "model.bias"}


def test_own_factory(mine: str) -> None:
    model = create_model(f"{mine}:classifier", task="classify", classes=4, channels=2)
    assert model(torch.rand(3, 2, 5, 5)).shape == (3, 4)
    assert isinstance(create_model(f"{mine}:positional"), nn.Conv2d)


def test_factory_of_a_larger_picture(mine: str) -> None:
    model = create_model(f"{mine}:enlarging", task="restore", channels=2, scale=2, size_divisor=4)
    assert model(torch.rand(1, 2, 5, 7)).shape == (1, 2, 10, 14)
    with pytest.raises(RecipeError, match="takes task, classes, channels and scale"):
        create_model(f"{mine}:classifier", task="restore", scale=2)


def test_factory_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The import path of an installed command does not have the folder; a module that the factory imports is found too."""
    (tmp_path / "lies_here.py").write_text("def make(*, task, classes, channels):\n    import lies_beside\n    return lies_beside.model\n")
    (tmp_path / "lies_beside.py").write_text("from torch import nn\nmodel = nn.Conv2d(3, 2, 1)\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = list(sys.path)
    with pytest.raises(RecipeError, match="of a package that is installed or lies in the current folder"):
        create_model("lies_here:make")
    monkeypatch.chdir(tmp_path)
    assert isinstance(create_model("lies_here:make"), nn.Conv2d)
    assert sys.path == before


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("no_such_module_anywhere:f", "No module named 'no_such_module_anywhere'; write package.module:factory"),
        ("my_own_factories:absent", "has no attribute 'absent'; write package.module:factory"),
        ("my_own_factories:SIZE", "is not a callable object: write a function that takes task, classes and channels"),
        ("my_own_factories:stranger", "got an unexpected keyword argument 'channels': write a function that takes task, classes"),
        ("my_own_factories:text", "returned str, not a torch.nn.Module"),
        (":f", "not of the form package.module:factory"),
        (".relative:f", "not of the form package.module:factory"),
        ("my_own_factories:", "not of the form package.module:factory"),
    ],
)
def test_wrong_factory(mine: str, factory: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        create_model(factory)
    assert "\n" not in str(caught.value) and factory in str(caught.value)


def test_error_inside_a_factory(mine: str) -> None:
    with pytest.raises(TypeError, match="from inside the user's own code"):
        create_model(f"{mine}:broken")


@pytest.mark.parametrize(
    ("name", "task", "channels", "message"),
    [
        ("timm:mobilenetv3_smal_050", "classify", 3, "timm does not know a model 'mobilenetv3_smal_050'; close: mobilenetv3_"),
        ("timm:test_eficientnet", "classify", 3, "close: test_efficientnet, "),
        ("timm:nope", "classify", 3, "timm does not know a model 'nope'; close: none (timm.list_models())"),
        ("timm:resnet18", "segment", 3, "is a classifier, not for task 'segment': use task 'classify'"),
        ("timm:resnet18", "restore", 3, "is a classifier, not for task 'restore': use task 'classify'"),
        ("torchvision:resnet18", "segment", 3, "torchvision has no model 'resnet18' for task 'segment'; it has deeplabv3_"),
        ("torchvision:nope", "classify", 3, "torchvision has no model 'nope' for task 'classify'; it has "),
        ("torchvision:resnet18", "restore", 3, "classifies or segments, not for task 'restore': use a hybrid model"),
        ("torchvision:resnet18", "classify", 4, "takes 3 channels, not 4: choose a timm or a hybrid model"),
    ],
)
def test_unknown_foreign_models(name: str, task: Task, channels: int, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        create_model(name, task=task, channels=channels)
    assert "\n" not in str(caught.value)


# ---- models that refuse some sizes ----


class Halving(nn.Module):
    """Takes sides that 4 divides; returns maps or their mean."""

    def __init__(self, *, mean: bool = False) -> None:
        super().__init__()
        self.layer, self.mean = nn.Conv2d(3, 2, 4, stride=4), mean

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.shape[2] % 4 or x_BCHW.shape[3] % 4:
            raise RuntimeError("sides that 4 divides")
        scores_BKHW: Tensor = nn.functional.interpolate(self.layer(x_BCHW), scale_factor=4.0)
        return scores_BKHW.mean((2, 3)) if self.mean else scores_BKHW


@pytest.mark.parametrize("size", [(1, 1), (4, 8), (5, 8), (7, 13)])
def test_padding_and_cutting(size: tuple[int, int]) -> None:
    H, W = size
    x = torch.rand(2, 3, H, W) * 255
    rows, columns = (torch.arange(-(-side // 4) * 4).clamp(max=side - 1) for side in size)
    whole = x[:, :, rows][:, :, :, columns]
    for mean in (False, True):
        inside = Halving(mean=mean).eval()
        expected = inside(whole) if mean else inside(whole)[:, :, :H, :W]
        assert torch.equal(DividedSides(inside, 4)(x), expected)


@pytest.mark.parametrize("wrong", [{"classes": 0}, {"classes": -3}, {"classes": 65536}, {"task": "classification"}, {"channels": 0}])
@pytest.mark.parametrize("name", ["timm:resnet18", "torchvision:resnet18", "mine"])
def test_values_outside_the_signature(mine: str, name: str, wrong: dict[str, Any]) -> None:
    """timm would return features for 0 classes."""
    with pytest.raises(RecipeError, match=next(iter(wrong))):
        create_model(f"{mine}:positional" if name == "mine" else name, **({"task": "classify"} | wrong))


@pytest.mark.parametrize("wrong", [0, -32, 1.5])
def test_size_divisor_type(mine: str, wrong: Any) -> None:
    """A negative divisor would cut the picture."""
    with pytest.raises(RecipeError, match="size_divisor"):
        create_model(f"{mine}:positional", size_divisor=wrong)
    with pytest.raises(ValueError, match="size_divisor"):
        DividedSides(torch.nn.Identity(), wrong)


def test_size_divisor_of_hybrid_models(mine: str, tmp_path: Path) -> None:
    divided = create_model(f"{mine}:positional", classes=2, size_divisor=8)
    assert isinstance(divided, DividedSides) and divided.size_divisor == 8
    with pytest.raises(RecipeError, match="size_divisor=8 is for models that refuse some sizes; 'hybrid-xxs' takes all"):
        create_model("hybrid-xxs", size_divisor=8)


def test_raw_pixels_of_a_model() -> None:
    model = nn.Sequential(nn.BatchNorm2d(1).eval(), nn.Conv2d(1, 2, 1))  # in training, its norm is not
    assert takes_raw_pixels(model, None, mean=None, std=None) is model
    wrapped = takes_raw_pixels(model.double(), torch.zeros(1, 1, 2, 2), mean=0.5, std=[0.25])
    assert wrapped.training and model.training and not model[0].training
    torch.testing.assert_close(wrapped(torch.full((1, 1, 2, 2), 255.0).double()), model(torch.full((1, 1, 2, 2), 2.0).double()))
    with pytest.raises(MuntinError, match="mean and std are of images, and the inputs are none"):
        takes_raw_pixels(model, {"ids": torch.zeros(1, 2)}, mean=0.5, std=0.5)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((123.675, 116.28), (58.395, 57.12), r"mean 123\.675,116\.28 and .*give those of pixels from 0 to 1; divide"),
        ((0, 0, 0), (255, 255, 255), "std 255,255,255: give those of pixels from 0 to 1"),
        (0.5, 0, "std 0: give those of pixels from 0 to 1"),
        (0.5, None, "mean 0.5 and std none: give both"),
        ((0.5, 0.5), (0.5, 0.5, 0.5), "one value, or one for each channel"),
        (float("nan"), 1, "mean nan and std 1"),
    ],
)
def test_refused_statistics(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        checked_statistics(mean, std)
