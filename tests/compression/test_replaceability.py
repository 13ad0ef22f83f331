"""Layers that a model uses for more than their weights are kept by every pass; others are not."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.compression import Change, prepare_qat, quantize
from muntin.compression.low_rank.factorization import low_rank
from muntin.compression.quantization.quantized_layers import QuantizedConv2d
from muntin.compression.replaceability import NOTICED, irreplaceable, same
from muntin.models import create_model


class Asks(nn.Module):
    """Tests the kind of its layers, and adds the input to a convolution's output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layers = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1)])
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem((x - 127) / 60))
        for layer in self.layers:
            x = x + layer(x) if isinstance(layer, nn.Conv2d) else layer(x)
        return self.last(x)


class Patched(nn.Module):
    """A Linear with an adapter, and a convolution with a replaced padding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mixed, self.round, self.last = (nn.Conv2d(*args) for args in ((3, 16, 3), (16, 16, 1), (16, 16, 3), (16, 4, 1)))
        self.line = nn.Linear(16, 16)
        self.line.adapter = nn.Linear(16, 16)
        self.line.forward = types.MethodType(lambda line, x: F.linear(x, line.weight, line.bias) + line.adapter(x), self.line)  # type: ignore[method-assign]

        def wrapped(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight, bias)

        self.round._conv_forward = types.MethodType(wrapped, self.round)  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixed(F.relu(self.stem((x - 127) / 60)))
        x = self.line(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.last(self.round(F.relu(x)))


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        self.last_gain = gain
        return super().forward(x) * gain


class Called(nn.Module):
    """Calls its layer with more than the input."""

    def __init__(self, *, by_name: bool) -> None:
        super().__init__()
        self.stem, self.last, self.by_name = Scaled(3, 8, 3), nn.Conv2d(8, 4, 1), by_name

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.stem(x / 255, gain=0.5) if self.by_name else self.stem(x / 255, 0.5))


MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "asks": (Asks, {"layers.0", "layers.2"}),
    "patched": (Patched, {"round"}),
    "by name": (lambda: Called(by_name=True), {"stem"}),
    "by place": (lambda: Called(by_name=False), {"stem"}),
}
PASSES: dict[str, Callable[[nn.Module, list[Tensor]], list[Change]]] = {
    "quantize": quantize,
    "qat": lambda model, images: prepare_qat(model, images, bits=8),
    "low rank": lambda model, images: low_rank(model, images, parameters=1.0),
}


def images() -> Tensor:
    return torch.randint(0, 256, (2, 3, 24, 20), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("pass_", list(PASSES))
@pytest.mark.parametrize("name", list(MODELS))
def test_layers_that_are_more_than_their_kind(name: str, pass_: str) -> None:
    torch.manual_seed(0)
    make, fixed = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        before = model(images())
        changes = PASSES[pass_](model, [images()])
        after = model(images())
    reasons = {change.layer: change.reason for change in changes if change.done == "kept"}
    if "line" in reasons:
        assert reasons.pop("line") == "it holds modules of its own"
    expected = fixed if pass_ != "low rank" else {layer for layer in fixed if name not in ("by name", "by place")}
    assert {layer for layer, reason in reasons.items() if reason == NOTICED} == expected
    assert (after - before).std() < (0.05 if pass_ != "low rank" else 0.5) * before.std()


def test_ordinary_model() -> None:
    model = create_model("hybrid-xxs").eval()
    layers: dict[str, nn.Module] = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    weights = {name: layer.weight for name, layer in layers.items()}
    assert irreplaceable(model, layers, images()[:1]) == {}
    assert all(model.get_submodule(name) is layer and layer.weight is weights[name] for name, layer in layers.items())


def test_replaced_forward() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)).eval()
    doubled = types.MethodType(lambda conv, x: 2 * F.conv2d(x, conv.weight, conv.bias), model[0])
    model[0].forward = doubled  # type: ignore[method-assign]
    assert irreplaceable(model, {"0": model[0], "1": model[1]}, images()[:1]) == {"0": NOTICED}


@pytest.mark.parametrize("when", ["before", "within"])
def test_model_restored_after_an_interruption(when: str) -> None:
    class Interrupted(Asks):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x) if when == "within" else x
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return out

    model = Interrupted().eval()
    layers: dict[str, nn.Module] = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    kept = {name: (type(layer), dict(vars(layer))) for name, layer in layers.items()}
    with pytest.raises(KeyboardInterrupt):
        irreplaceable(model, layers, images()[:1])
    assert {name: (type(layer), dict(vars(layer))) for name, layer in layers.items()} == kept


def test_reused_output_tensor() -> None:
    class Written(Asks):
        def __init__(self) -> None:
            super().__init__()
            self.out = torch.zeros(1, 4, 24, 20)

        def forward(self, x: Tensor) -> Tensor:
            return self.out.copy_(super().forward(x))

    model = Written().eval()
    assert set(irreplaceable(model, dict(model.named_children()) | {"layers.0": model.layers[0]}, images()[:1])) >= {"layers.0"}


def test_many_small_changes() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(32))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x / 255 + 0.01 * layer(x / 255) * (1 + 0.01 * isinstance(layer, nn.Conv2d))
                x = 255 * x
            return x

    torch.manual_seed(0)
    model = Many().eval()
    layers: dict[str, nn.Module] = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)}
    with torch.no_grad():
        before = model(images()[:1])
        for name in layers.keys() - irreplaceable(model, layers, images()[:1]).keys():
            object.__setattr__(
                layers[name],
                "__class__",
                type("Other", (nn.Module,), {"forward": lambda conv, x: nn.Conv2d._conv_forward(conv, x, conv.weight, conv.bias)}),
            )
        assert same(before, model(images()[:1]))


def test_random_answers() -> None:
    class Drawn(Asks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.rand(())

    model = Drawn().eval()
    assert irreplaceable(model, {"stem": model.stem}, images()[:1]) == {}


def test_packed_answers_and_plain_lists() -> None:
    class Packed(Asks):
        def __init__(self) -> None:
            super().__init__()
            self.order = [self.stem, self.last]

        def forward(self, x: Tensor) -> Any:
            first, last = self.order
            return {"scores": last(F.relu(first(x / 255))), "sizes": [x.shape[2]]}

    model = Packed().eval()
    changes = quantize(model, [images()], bits=6)
    assert [change.done for change in changes if change.layer in ("stem", "last") and change.pass_ == "quantize"] == ["W6A8", "W6A8"]
    assert all(isinstance(layer, QuantizedConv2d) for layer in model.order)


def test_same_with_an_offset() -> None:
    values = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert same(values + 1000, values + 1000 + 1e-4)
    assert not same(values + 290, values.flip(3) + 290)
    assert not same(values, values[..., :4])
    assert same(values / 0, values / 0)
    assert same(values[:, :1, :1, :1], values[:, :1, :1, :1] * (1 + 5e-4))
