from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import muntin
from muntin.compression.equivalent.plain_convolutions import PaddedConv2d, plain_convolutions


class StaticPadding(nn.Conv2d):
    def __init__(self, *sizes: int, pads: tuple[int, ...], **options: int) -> None:
        super().__init__(*sizes, **options)  # type: ignore[arg-type]
        self.static_padding = nn.ZeroPad2d(pads)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Twice(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        StaticPadding(3, 8, 3, pads=(0, 1, 0, 1), stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        timm.layers.Conv2dSame(8, 8, 3, stride=2, groups=8),
        timm.layers.StdConv2d(8, 16, 3, padding=1),
        StaticPadding(16, 16, 3, pads=(1, 1, 1, 1)),
        Twice(16, 16, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    ).eval()


@pytest.fixture
def image() -> Tensor:
    return torch.randint(0, 256, (2, 3, 33, 30), generator=torch.Generator().manual_seed(1)).float()


def test_paddings_and_computed_weights_are_written_out(image: Tensor) -> None:
    model = network()
    expected = model(image)
    changes = plain_convolutions(model, image[:1])
    assert [change.layer for change in changes] == ["0", "3", "4", "5"]
    assert [type(model[place]) for place in (0, 3, 4, 5, 6)] == [PaddedConv2d, PaddedConv2d, nn.Conv2d, nn.Conv2d, Twice]
    assert isinstance(model[5], nn.Conv2d) and model[5].padding == (1, 1)
    torch.testing.assert_close(model(image), expected)
    odd = image[..., :31, :29]
    torch.testing.assert_close(model(odd), network()(odd))
    assert plain_convolutions(model, image[:1]) == []


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_paddings_by_word_and_mode(image: Tensor) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, (3, 5), padding="same", dilation=(2, 1)),
        nn.Conv2d(4, 4, 2, padding="same"),
        nn.Conv2d(4, 4, 3, 2, padding="valid"),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),
        nn.Conv2d(4, 4, 3, padding=1),
    )
    expected = model(image)
    changes = plain_convolutions(model, image[:1])
    torch.testing.assert_close(model(image), expected)
    pads = [getattr(layer, "pad", None) for layer in model]
    kinds = [type(None), nn.ZeroPad2d, type(None), nn.ReflectionPad2d, nn.CircularPad2d, nn.ReplicationPad2d, type(None)]
    assert [type(pad) for pad in pads] == kinds and len(changes) == 6
    assert model[0].padding == (2, 2) and model[2].padding == (0, 0)
    assert plain_convolutions(model, image[:1]) == []


def test_passes_reach_padded_layers(image: Tensor, tmp_path: Path) -> None:
    model = network()
    muntin.low_rank(model, [image], parameters=0.8, multiple=2, keep=("0",))
    changes = muntin.quantize(model, [image], min_sqnr_db=0)
    done = {change.layer: change.done for change in changes if change.pass_ == "quantize"}
    assert done["0.conv"] == done["3.conv"] == "W8A8"
    assert done["6"] == "kept"
    again = muntin.load_compressed(muntin.save(model, tmp_path / "saved"), network())
    assert torch.equal(again(image), model(image))
    assert all(change.kept for change in muntin.quantize(model, [image], min_sqnr_db=0))


def test_patterns_name_the_layer_around(image: Tensor) -> None:
    model = network()
    changes = muntin.quantize(model, [image], min_sqnr_db=0, only=("0", "9"))
    assert {change.layer for change in changes if change.done == "W8A8"} == {"0.conv", "9"}


def test_padded_integers_are_exported(image: Tensor, tmp_path: Path) -> None:
    model = network()[:6].append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten())  # type: ignore[union-attr]
    quantized = copy.deepcopy(model)
    muntin.quantize(quantized, [image], min_sqnr_db=0)
    artifact = muntin.export(quantized, image, tmp_path / "artifact")
    assert artifact.manifest.measured["integer_coverage"] == 1
