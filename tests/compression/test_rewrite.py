"""Finding and replacing layers, shared ones included."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from muntin.compression.rewrite import is_kept, named, replace


class Shared(nn.Module):
    """One layer under two names, in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.alias = self.first
        self.inner = nn.Sequential(nn.ReLU(), self.first, nn.Conv2d(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[1](self.alias(self.first(x)))  # type: ignore[no-any-return]


def test_named_order() -> None:
    assert [name for name, _ in named(Shared(), nn.Linear)] == ["first"]
    assert [name for name, _ in named(Shared(), nn.Linear, nn.Conv2d)] == ["first", "inner.2"]
    assert [name for name, _ in named(nn.Linear(2, 2), nn.Linear)] == [""]
    assert list(named(Shared(), nn.Embedding)) == []


def test_replace_shared_layer() -> None:
    model = Shared()
    other = nn.Linear(4, 4)
    replace(model, "inner.1", other)
    assert model.first is other and model.alias is other and model.inner[1] is other
    x = torch.randn(2, 4)
    assert torch.equal(model(x), other(other(other(x))))


class Held(nn.Module):
    """Layers that are also in plain lists, tuples and dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.path: list[nn.Module] = [self.first, self.other, self.first]
        self.nested: dict[str, Any] = {"both": (self.other, [self.first]), "one": self.first, "none": {"size": 4}}
        self.rest = (self.other, 4)


def test_replace_in_plain_containers() -> None:
    model, new = Held(), nn.Linear(4, 4)
    path, nested, rest = model.path, model.nested, model.rest
    inner = nested["both"][1]
    replace(model, "first", new)
    assert model.first is new and model.path is path and path == [new, model.other, new]
    assert model.nested is nested and nested == {"both": (model.other, [new]), "one": new, "none": {"size": 4}}
    assert nested["both"][1] is inner and model.rest is rest


class Versioned(NamedTuple):
    number: int
    layer: nn.Module


def test_replace_in_named_tuples_and_cycles() -> None:
    model, new = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    endless: list[Any] = [model[0]]
    endless.append(endless)
    model.endless, model.version = endless, Versioned(1, model[0])  # type: ignore[assignment]
    replace(model, "0", new)
    assert model.endless is endless and endless[0] is new
    assert model.version == Versioned(1, new)


def test_replace_keeps_the_mode() -> None:
    model = Shared().eval()
    replace(model, "first", nn.Sequential(nn.Dropout(), nn.Linear(4, 4)))
    assert not any(module.training for module in model.modules())


def test_replace_one_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    kept = model[0]
    replace(model, "1", nn.Identity())
    assert model[0] is kept and isinstance(model[1], nn.Identity)


def test_is_kept_entries() -> None:
    for entry in ("a.b", "a", "a.b.reduce"):
        assert is_kept("a.b", (entry,)) and not is_kept("ab.b", (entry,))
    assert not is_kept("a.b", ("a.b.nosuch",)) and not is_kept("", ("a", "reduce"))


def test_replace_keeps_hooks() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    seen: list[str] = []
    model[0].register_forward_hook(lambda layer, inputs, output: output + 1)
    model[0].register_forward_pre_hook(lambda layer, inputs, by_name: seen.append(type(layer).__name__), with_kwargs=True)
    x = torch.randn(2, 4)
    expected = model(x)
    replace(model, "0", nn.Sequential(model[0].__class__(4, 4)))
    with torch.no_grad():
        model[0][0].weight.zero_()
        model[0][0].bias.zero_()
    assert torch.equal(model(x), torch.ones(2, 4)) and expected.shape == (2, 4)
    assert seen == ["Linear", "Sequential"]
