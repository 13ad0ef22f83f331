from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from muntin import open_model
from muntin.deployment.sources.opening import OpenedModel
from muntin.errors import MuntinError


def random_pixels(opened: OpenedModel, seed: int = 0) -> torch.Tensor:
    shape = (2, opened.channels, *opened.size)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).float()


@torch.no_grad()
def test_timm_answers_as_with_its_own_transforms() -> None:
    opened = open_model("timm:lcnet_035", size=64)
    pixels = random_pixels(opened)
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    own = opened.model.get_submodule("model")
    torch.testing.assert_close(opened.model(pixels), own((pixels / 255 - mean) / std), rtol=1e-4, atol=1e-4)
    assert (opened.size, opened.channels, opened.signature.task, opened.signature.side) == ((64, 64), 3, "classify", 64)
    assert (opened.classes[0], opened.classes[134], len(set(opened.classes))) == ("tench, Tinca tinca", "crane (134)", 1000)
    assert opened.weights is None
    assert "random" in opened.notes[0]


def test_timm_with_other_classes_channels_and_statistics() -> None:
    opened = open_model("timm:lcnet_035", classes=["cat", "dog"], channels=4, size=(32, 64), mean=[0.5] * 4, std=[0.25])
    assert opened.model(random_pixels(opened)).shape == (2, 2)
    assert (opened.classes, opened.channels, opened.size, opened.signature.side) == (("cat", "dog"), 4, (32, 64), None)


def test_timm_size_of_a_transformer() -> None:
    opened = open_model("timm:vit_tiny_patch16_224", size=64, classes=3)
    assert opened.model(random_pixels(opened)).shape == (2, 3)
    assert opened.classes == ("class-0", "class-1", "class-2")


@torch.no_grad()
def test_torchvision_segmenter() -> None:
    opened = open_model("torchvision:lraspp_mobilenet_v3_large", size=(64, 96))
    assert opened.model(random_pixels(opened)).shape == (2, 21, 64, 96)
    assert (opened.signature.task, opened.classes[1]) == ("segment", "aeroplane")
    assert any("'out'" in note for note in opened.notes)


def test_torchvision_classifier_of_other_sizes() -> None:
    opened = open_model("torchvision:shufflenet_v2_x0_5")
    assert (opened.size, len(opened.classes)) == ((224, 224), 1000)
    opened = open_model("torchvision:vit_b_32", size=64, classes=2)
    assert opened.model(random_pixels(opened)).shape == (2, 2)


@torch.no_grad()
def test_smp_with_one_score_and_an_encoder_of_timm() -> None:
    pytest.importorskip("segmentation_models_pytorch")  # of the extra `dev`
    opened = open_model("smp:FPN:tu-lcnet_035", size=64, channels=2)
    scores = opened.model(random_pixels(opened))
    assert scores.shape == (2, 2, 64, 64)
    assert torch.equal(scores[:, 0], -scores[:, 1])
    assert any("ImageNet" in note for note in opened.notes)
    given = open_model("smp:Unet:resnet18", size=64, classes=3, mean=[0, 0, 0], std=[1, 1, 1])
    assert given.model(random_pixels(given)).shape == (2, 3, 64, 64)
    assert not any("ImageNet" in note for note in given.notes)
    for source, message in (("smp:Net", "has no model 'Net'; it has Unet"), ("smp:Unet:resnet19", "no encoder 'resnet19'; it has resnet1")):
        with pytest.raises(MuntinError, match=message):
            open_model(source)


FACTORIES = """
import torch
from torch import nn

def plain():
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def small_map():
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=4))

def tokens():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(2))

def with_argument(classes):
    return None

def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_factories.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("factories")
@torch.no_grad()
def test_factory_in_the_current_folder() -> None:
    opened = open_model("own_factories:plain", size=32, classes=["a", "b", "c", "d"])
    pixels = random_pixels(opened)
    assert isinstance(opened.model, torch.nn.Sequential)  # as the factory made it: raw pixels in
    normalised = open_model("own_factories:plain", size=32, mean=[0.5], std=[0.5])
    normalised.model.get_submodule("model").load_state_dict(opened.model.state_dict())
    torch.testing.assert_close(normalised.model(pixels), opened.model(pixels / 127.5 - 1), rtol=1e-4, atol=1e-4)
    segmenter = open_model("own_factories:small_map", size=32)
    assert segmenter.model(pixels).shape == (2, 4, 32, 32)
    assert any("resized from 8 x 8" in note for note in segmenter.notes)


@pytest.mark.usefixtures("factories")
@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("lcnet_035", {}, "no source of a model: give timm:NAME"),
        ("timm:hf-hub:timm/lcnet_035", {}, "no model is downloaded"),
        ("timm:lcnet_35", {}, "close: lcnet_035"),
        ("timm:vit_small_patch14_dinov2", {}, "has no last layer for classes"),
        ("timm:lcnet_035", {"classes": 3, "mean": [123.0], "std": [58.0]}, "of pixels from 0 to 1"),
        ("timm:lcnet_035", {"mean": [0.5]}, "give both"),
        ("timm:lcnet_035", {"size": 32, "mean": [0.5] * 2, "std": [0.5] * 2, "channels": 3}, "one for each channel"),
        ("timm:lcnet_035", {"classes": 0}, "classes 0: give a number from 1 to 65535"),
        ("timm:lcnet_035", {"size": 32, "classes": ["a", "a"]}, "'a' is used twice"),
        ("torchvision:r3d_18", {}, "is for another task"),
        ("torchvision:resnet", {}, "is no model of torchvision"),
        ("torchvision:resnet18", {"channels": 4}, "takes 3 channels, not 4"),
        ("own_factories:absent", {}, "has no attribute 'absent'"),
        ("own_factories:with_argument", {}, "can be called without arguments"),
        ("own_factories:tokens", {"size": 8}, "returns a tensor of shape (1, 4, 36)"),
        ("own_factories:grey", {"size": 8}, "fails on a picture of 8 x 8 with 3 channels"),
        ("own_factories:plain", {"size": 8, "classes": ["a", "b"]}, "2 names of classes, and 'own_factories:plain' has 4"),
        ("own_factories:plain", {"weights": "none.pt"}, "weights none.pt: there is no such file"),
    ],
)
def test_sources_that_cannot_be_opened(source: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(MuntinError, match=re.escape(message)) as caught:
        open_model(source, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
