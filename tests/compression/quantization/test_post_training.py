"""The pass `quantize` on muntin's and foreign networks. Axes: B images, C channels, H W map."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_helpers import answer, by_layer, names, pixels, settled
from muntin import create_model
from muntin.compression import QuantizedConv2d, QuantizedLinear, quantize
from muntin.compression.quantization.fake_quantization import sqnr_db
from muntin.errors import MuntinError
from muntin.layers import Perceptron

SMALL = {"depths": (1, 1), "dims": (32, 32), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16}


class Built(nn.Module):
    """Named layers, and the function that runs them."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def perceptron(**more: nn.Module) -> Built:
    """Three Linears over the channels of raw pixels."""

    def run(m: Any, x: Tensor) -> Any:
        hidden: Tensor = m.second(torch.relu(m.first((x / 64 - 2).permute(0, 2, 3, 1))))
        return m.third(torch.relu(hidden)).permute(0, 3, 1, 2)

    return Built(run, first=nn.Linear(3, 16), second=nn.Linear(16, 16), third=nn.Linear(16, 4), **more)


def encoder() -> Built:
    """Patches, two encoder layers of PyTorch with their fused path, a classifier."""

    def run(m: Any, x: Tensor) -> Any:
        tokens = m.encoder(m.patch(x / 64 - 2).flatten(2).transpose(1, 2))
        return m.head(tokens.mean(1))

    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Built(run, patch=nn.Conv2d(3, 32, 8, 8), encoder=blocks, head=nn.Linear(32, 5))


def test_hybrid_changes_and_answer() -> None:
    model, x = create_model("hybrid-xs", options=SMALL), pixels(4, 3, 64, 64)
    settled(model, x)
    layers, before = names(model, nn.Linear, nn.Conv2d), answer(model, x)
    changes = quantize(model, [x], bits=6)
    by_name = by_layer(changes, "quantize")
    assert sorted(by_name) == sorted(layers)
    assert {change.pass_ for change in changes} == {"fold", "quantize", "reconstruct"}
    integers = [name for name, change in by_name.items() if change.done == "W6A8"]
    assert sorted(names(model, QuantizedLinear, QuantizedConv2d)) == sorted(integers)
    assert len(integers) >= 0.8 * len(by_name)
    assert all(change.reason for name, change in by_name.items() if name not in integers)
    assert all(by_name[name].sqnr_db is not None for name in integers)
    assert sqnr_db(before, answer(model, x)) > 20


@pytest.mark.parametrize(
    ("name", "task"),
    [("torchvision:lraspp_mobilenet_v3_large", "segment"), ("timm:mobilenetv3_small_050", "classify"), ("timm:test_convnext", "classify")],
)
def test_foreign_networks(name: str, task: str) -> None:
    model, x = create_model(name, task=task, classes=4), pixels(4, 3, 64, 64)  # type: ignore[arg-type]
    settled(model, x)
    layers, before = names(model, nn.Linear, nn.Conv2d), answer(model, x)
    changes = by_layer(quantize(model, [x], bits=6), "quantize")
    assert sorted(changes) == sorted(layers)
    depthwise = [module for module in model.modules() if isinstance(module, QuantizedConv2d) and module.groups > 1]
    assert depthwise
    assert sqnr_db(before, answer(model, x)) > 10


def test_encoder_layer_fused_path() -> None:
    model, x = encoder(), pixels(2, 3, 64, 64)
    before = answer(model, x)
    changes = by_layer(quantize(model, [x], bits=6), "quantize")
    quantised = [name for name, change in changes.items() if change.done == "W6A8"]
    assert quantised == ["patch", *(f"encoder.layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2)), "head"]
    for i in (0, 1):  # PyTorch hands this layer's weight to a function
        assert changes[f"encoder.layers.{i}.self_attn.out_proj"].reason == "no calibration image reached it"
    assert sqnr_db(before, answer(model, x)) > 20


def test_weight_outside_half_precision() -> None:
    model = perceptron()
    with torch.no_grad():
        model.get_parameter("second.weight").mul_(1e-7)
        model.get_parameter("third.weight")[0, 0] = 1e5
    before = copy.deepcopy(model.state_dict())
    quantize(model, [pixels(1, 3, 16, 16)], keep=("second", "third"))
    assert torch.equal(model.get_parameter("second.weight"), before["second.weight"])
    assert torch.equal(model.get_parameter("third.weight"), before["third.weight"])


def test_unknown_keep_with_closed_channels() -> None:
    model = nn.Sequential(Perceptron(8, 64, gate=True)).train()
    with torch.no_grad():
        model[0].gate.logit[:40] = -100.0
    before = {key: value.shape for key, value in model.state_dict().items()}
    with pytest.raises(MuntinError, match="keep names no layer: nosuch"):
        quantize(model, [pixels(1, 4, 4, 8)], keep=("nosuch",))
    assert model.training and {key: value.shape for key, value in model.state_dict().items()} == before


def test_empty_first_batch() -> None:
    class Asks(nn.Module):
        """Computes otherwise where its layer is no convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x)
            return out * 3 if isinstance(self.conv, nn.Conv2d) else out

    for batches in ([pixels(2, 3, 16, 16)], [torch.zeros(0, 3, 16, 16), pixels(2, 3, 16, 16)]):
        (change,) = quantize(Asks().eval(), batches)
        assert change.kept and "tests the kind" in change.reason


@pytest.mark.parametrize("bits", [8, 6])
def test_layer_reached_by_some_batches(bits: int) -> None:
    def run(m: Any, x: Tensor) -> Any:
        return m.large(x / 255) if x.shape[2] > 20 else m.small(x / 255)

    model = Built(run, small=nn.Conv2d(3, 4, 1), large=nn.Conv2d(3, 4, 1))
    changes = by_layer(quantize(model, [pixels(1, 3, 16, 16), pixels(1, 3, 32, 32)], bits=bits), "quantize")
    assert [change.done for change in changes.values()] == [f"W{bits}A8"] * 2


def test_call_by_keyword() -> None:
    model = Built(lambda m, x: m.conv(input=x / 255), conv=nn.Conv2d(3, 4, 3))
    x = pixels(1, 3, 16, 16)
    before = answer(model, x)
    quantize(model, [x], bits=7)
    assert isinstance(model.conv, QuantizedConv2d)
    assert sqnr_db(before, answer(model, x)) > 30


def test_second_application() -> None:
    model, x = perceptron(), pixels(1, 3, 16, 16)
    quantize(model, [x], keep=("second",))
    before = copy.deepcopy(model.state_dict())
    changes = by_layer(quantize(model, [x]), "quantize")
    assert changes["second"].done == "W8A8" and {changes[name].reason for name in ("first", "third")} == {"already W8A8"}
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items() if key.startswith("first."))


def test_model_in_training_mode() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.9), nn.BatchNorm2d(4)), pixels(1, 3, 16, 16)
    settled(model, x)
    before = answer(model, x)
    quantize(model.train(), [x], bits=6)
    assert not any(module.training for module in model.modules())
    assert sqnr_db(before, answer(model, x)) > 20
