"""The pass that quantises, on muntin's networks and on others'. Axes: B images, C channels, H W map."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muntin import create_model
from muntin.compression import Change, QuantizedConv2d, QuantizedLinear, quantize
from muntin.compression.fake_quantization import sqnr_db
from muntin.errors import MuntinError
from muntin.layers import Perceptron
from muntin.training.config import QuantizationConfig

SMALL = {"depths": (1, 1), "dims": (32, 32), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16}


def pixels(*shape: int) -> Tensor:
    return torch.randint(0, 256, shape).float()


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        scores: Tensor = model.eval()(x)
    return scores


def layers(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def by_layer(changes: list[Change]) -> dict[str, Change]:
    quantised = [change for change in changes if change.pass_ == "quantize"]
    assert len({change.layer for change in quantised}) == len(quantised)  # exactly one each
    return {change.layer: change for change in quantised}


class Built(nn.Module):
    """Layers under names, and what is done with them."""

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
    """Patches, two of PyTorch's own encoder layers (whose fused path takes weights without calling layers), a classifier."""

    def run(m: Any, x: Tensor) -> Any:
        tokens = m.encoder(m.patch(x / 64 - 2).flatten(2).transpose(1, 2))
        return m.head(tokens.mean(1))

    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Built(run, patch=nn.Conv2d(3, 32, 8, 8), encoder=blocks, head=nn.Linear(32, 5))


def settled(model: nn.Module, x: Tensor) -> nn.Module:
    """A model whose batch norms have seen data."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    return model.eval()


def test_every_layer_of_a_hybrid_gets_one_change_and_the_answer_stays_close() -> None:
    model, x = create_model("hybrid-xs", options=SMALL), pixels(4, 3, 64, 64)
    settled(model, x)
    names, before = layers(model, nn.Linear, nn.Conv2d), answer(model, x)
    changes = quantize([x])(model)
    found = by_layer(changes)
    assert sorted(found) == sorted(names)
    assert {change.pass_ for change in changes} == {"fold", "quantize"}
    assert sorted(layers(model, QuantizedLinear, QuantizedConv2d)) == sorted(name for name, change in found.items() if not change.kept)
    assert sum(not change.kept for change in found.values()) >= 0.8 * len(found)
    assert all(change.reason for change in found.values() if change.kept)
    assert all(change.done == "W8A8" and change.sqnr_db is not None for change in found.values() if not change.kept)
    assert sqnr_db(before, answer(model, x)) > 20


@pytest.mark.parametrize(
    ("name", "task"),
    [("torchvision:lraspp_mobilenet_v3_large", "segment"), ("timm:mobilenetv3_small_050", "classify"), ("timm:test_convnext", "classify")],
)
def test_networks_of_others_with_depthwise_layers_too(name: str, task: str) -> None:
    model, x = create_model(name, task=task, classes=4), pixels(4, 3, 64, 64)  # type: ignore[arg-type]
    settled(model, x)
    names, before = layers(model, nn.Linear, nn.Conv2d), answer(model, x)
    found = by_layer(quantize([x])(model))
    assert sorted(found) == sorted(names)
    depthwise = [module for module in model.modules() if isinstance(module, QuantizedConv2d) and module.groups > 1]
    assert depthwise
    assert sqnr_db(before, answer(model, x)) > 10


def test_pytorchs_own_encoder_calls_its_integer_layers() -> None:
    model, x = encoder(), pixels(2, 3, 64, 64)
    before = answer(model, x)
    found = by_layer(quantize([x])(model))
    quantised = [name for name, change in found.items() if not change.kept]
    assert quantised == ["patch", *(f"encoder.layers.{i}.linear{k}" for i in (0, 1) for k in (1, 2)), "head"]
    for i in (0, 1):  # PyTorch hands this layer's weight to a function
        assert found[f"encoder.layers.{i}.self_attn.out_proj"].reason == "no calibration image reached it"
    assert sqnr_db(before, answer(model, x)) > 20


def test_a_layer_that_int8_would_ruin_stays_with_its_figure() -> None:
    model = perceptron()
    with torch.no_grad():  # feature 0 is large and does not count: the grid that covers it has no levels left for the others
        model.get_parameter("first.bias")[0] = 1000
        model.get_parameter("second.weight")[:, 0] = 0
    found = by_layer(quantize([pixels(1, 3, 16, 16)])(model))
    assert [name for name, change in found.items() if change.kept] == ["second"]
    assert found["second"].sqnr_db is not None and found["second"].sqnr_db < 15
    assert f"{found['second'].sqnr_db:.1f} dB" in found["second"].reason


def test_the_threshold_is_the_users() -> None:
    x = pixels(1, 3, 16, 16)
    assert all(change.kept for change in by_layer(quantize([x], QuantizationConfig(min_sqnr_db=60))(perceptron())).values())
    assert not any(change.kept for change in by_layer(quantize([x], QuantizationConfig(min_sqnr_db=0))(perceptron())).values())


def test_layers_named_in_keep_stay_in_half_precision() -> None:
    model = perceptron()
    found = by_layer(quantize([pixels(1, 3, 16, 16)], QuantizationConfig(keep=("second",)))(model))
    assert [(change.layer, change.reason) for change in found.values() if change.kept] == [("second", "named in keep")]
    weight = model.get_parameter("second.weight")
    assert torch.equal(weight, weight.half().float())


def test_a_kept_weight_that_half_precision_cannot_hold_stays_whole() -> None:
    model = perceptron()
    with torch.no_grad():
        model.get_parameter("second.weight").mul_(1e-7)
        model.get_parameter("third.weight")[0, 0] = 1e5
    before = copy.deepcopy(model.state_dict())
    quantize([pixels(1, 3, 16, 16)], QuantizationConfig(keep=("second", "third")))(model)
    assert torch.equal(model.get_parameter("second.weight"), before["second.weight"])
    assert torch.equal(model.get_parameter("third.weight"), before["third.weight"])


def test_an_unknown_name_in_keep_is_an_error_and_nothing_changes() -> None:
    model = create_model("hybrid-xs", options=SMALL).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MuntinError, match=r"keep names no layer: nosuch; the model has stem\.0\.conv"):
        quantize([pixels(1, 3, 32, 32)], QuantizationConfig(keep=("nosuch",)))(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_unknown_name_in_keep_leaves_closed_channels_and_the_mode_alone() -> None:
    model = nn.Sequential(Perceptron(8, 64, gate=True)).train()
    with torch.no_grad():
        model[0].gate.logit[:40] = -100.0
    before = {key: value.shape for key, value in model.state_dict().items()}
    with pytest.raises(MuntinError, match="keep names no layer: nosuch"):
        quantize([pixels(1, 4, 4, 8)], QuantizationConfig(keep=("nosuch",)))(model)
    assert model.training and {key: value.shape for key, value in model.state_dict().items()} == before


def test_an_empty_first_batch_hides_nothing() -> None:
    class Asks(nn.Module):
        """Computes otherwise where its layer is no convolution."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x)
            return out * 3 if isinstance(self.conv, nn.Conv2d) else out

    for batches in ([pixels(2, 3, 16, 16)], [torch.zeros(0, 3, 16, 16), pixels(2, 3, 16, 16)]):
        (change,) = quantize(batches)(Asks().eval())
        assert change.kept and "asks for the kind" in change.reason


def test_no_batch_is_an_error() -> None:
    nothings: list[Iterable[Tensor]] = [[], iter(())]
    for nothing in nothings:
        with pytest.raises(MuntinError, match="no batch came"):
            quantize(nothing)(perceptron())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_weight_is_named(bad: float) -> None:
    model = perceptron()
    with torch.no_grad():
        model.get_parameter("second.weight")[3, 2] = bad
    with pytest.raises(MuntinError, match=r"layer 'second': the weight holds NaN or infinity") as caught:
        quantize([pixels(1, 3, 16, 16)])(model)
    assert "\n" not in str(caught.value)
    assert isinstance(model.second, nn.Linear)


def test_a_broken_activation_is_named() -> None:
    model = perceptron()
    with torch.no_grad():
        model.get_parameter("first.bias")[0] = float("nan")
    with pytest.raises(MuntinError, match=r"NaN or infinity at the input of layer 'second'"):
        quantize([pixels(1, 3, 16, 16)])(model)


def test_a_layer_that_no_image_reaches_is_kept_and_said_so() -> None:
    model = perceptron(spare=nn.Conv2d(3, 3, 1))
    found = by_layer(quantize([pixels(1, 3, 16, 16)])(model))
    assert found["spare"].kept and found["spare"].reason == "no calibration image reached it"
    assert found["spare"].sqnr_db is None and isinstance(model.spare, nn.Conv2d)


def test_a_layer_that_only_some_images_reach_is_calibrated_on_those() -> None:
    def run(m: Any, x: Tensor) -> Any:
        return m.large(x / 255) if x.shape[2] > 20 else m.small(x / 255)

    model = Built(run, small=nn.Conv2d(3, 4, 1), large=nn.Conv2d(3, 4, 1))
    found = by_layer(quantize([pixels(1, 3, 16, 16), pixels(1, 3, 32, 32)])(model))
    assert [change.done for change in found.values()] == ["W8A8", "W8A8"]


def test_batches_without_images_count_for_nothing() -> None:
    assert all(change.kept for change in by_layer(quantize([torch.zeros(0, 3, 8, 8)])(perceptron())).values())


def test_one_pixel_calibrates() -> None:
    model = perceptron()
    found = by_layer(quantize([pixels(1, 3, 1, 1)])(model))
    assert len(found) == 3 and torch.isfinite(answer(model, pixels(2, 3, 9, 9))).all()


def test_constant_activations_of_zero_and_of_anything_else() -> None:
    model = perceptron()
    with torch.no_grad():
        model.get_parameter("first.bias").fill_(-1e4)  # ReLU gives zeros
        model.get_parameter("second.weight").zero_()  # and its bias alone reaches the third
    x = pixels(2, 3, 8, 8)
    before = answer(model, x)
    found = by_layer(quantize([x])(model))
    assert found["second"].done == "W8A8"
    torch.testing.assert_close(answer(model, x), before, rtol=0.02, atol=0.02 * float(before.abs().max()))


def test_bytes_and_generators_calibrate_as_floats_do() -> None:
    x = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    one, other = perceptron(), perceptron()
    other.load_state_dict(one.state_dict())
    quantize([x.float()])(one)
    quantize(batch for batch in (x,))(other)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in one.state_dict().items())


def test_more_batches_are_one_larger_batch() -> None:
    x = pixels(4, 3, 16, 16)
    one, other = perceptron(), perceptron()
    other.load_state_dict(one.state_dict())
    quantize([x])(one)
    quantize([x[:1], x[1:]])(other)
    for name in ("first", "second", "third"):
        scale = one.get_buffer(f"{name}.input.scale")
        torch.testing.assert_close(other.get_buffer(f"{name}.input.scale"), scale, rtol=1e-6, atol=0)


class Padding(nn.Conv2d):
    """Pads by itself, as TensorFlow does: its own `padding` does not say what it computes."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


class Verbose(nn.Linear):
    """Computes what a Linear does, in a `forward` of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_layers_with_arithmetic_of_their_own_are_kept() -> None:
    def run(m: Any, x: Tensor) -> Any:
        return m.last(torch.relu(m.reflected(m.same(m.padding(x / 255)))).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = Built(
        run,
        padding=Padding(3, 8, 2),
        same=nn.Conv2d(8, 8, 2, padding="same"),
        reflected=nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        last=Verbose(8, 4),
    )
    x = pixels(1, 3, 16, 16)
    before = answer(model, x)
    found = by_layer(quantize([x])(model))
    assert {name: change.reason for name, change in found.items() if change.kept} == {
        "padding": "it does not compute what its kind does: no integer form",
        "same": "padding 'same' has no integer form here",  # an odd number of pixels
        "reflected": "padding 'reflect' has no integer form here",
    }
    assert sqnr_db(before, answer(model, x)) > 30


def test_layers_that_are_called_by_keyword() -> None:
    model = Built(lambda m, x: m.conv(input=x / 255), conv=nn.Conv2d(3, 4, 3))
    x = pixels(1, 3, 16, 16)
    before = answer(model, x)
    quantize([x])(model)
    assert isinstance(model.conv, QuantizedConv2d)
    assert sqnr_db(before, answer(model, x)) > 30


def test_a_shared_layer_is_quantised_once_and_stays_shared() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), shared, nn.ReLU(), shared)
    found = by_layer(quantize([pixels(1, 3, 16, 16)])(model))
    assert list(found) == ["0", "1"]
    assert isinstance(model[1], QuantizedConv2d) and model[3] is model[1]


def test_the_grid_of_a_shared_layer_covers_all_of_its_inputs() -> None:
    def run(m: Any, x: Tensor) -> Any:
        small: Tensor = m.conv(x / 2550)
        return torch.cat([small, m.conv(x / 255)], 1)

    model = Built(run, conv=nn.Conv2d(3, 4, 1))
    quantize([pixels(1, 3, 16, 16)])(model)
    assert float(model.get_buffer("conv.input.scale")) == pytest.approx(1 / 255, rel=0.05)


def test_what_is_quantised_already_is_left_alone() -> None:
    model, x = perceptron(), pixels(1, 3, 16, 16)
    quantize([x], QuantizationConfig(keep=("second",)))(model)
    before = copy.deepcopy(model.state_dict())
    found = by_layer(quantize([x])(model))
    assert list(found) == ["second"] and found["second"].done == "W8A8"
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items() if key.startswith("first."))


def test_a_model_in_training_is_quantised_as_deployed() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.9), nn.BatchNorm2d(4)), pixels(1, 3, 16, 16)
    settled(model, x)
    before = answer(model, x)
    quantize([x])(model.train())
    assert not any(module.training for module in model.modules())
    assert sqnr_db(before, answer(model, x)) > 20
