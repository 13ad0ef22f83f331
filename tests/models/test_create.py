"""create_model: names, options, errors of one line."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from muntin.errors import RecipeError
from muntin.models import PRESETS, HybridNet, create_model


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("hybrid-ss", {}, "unknown model 'hybrid-ss': did you mean 'hybrid-s'? known: hybrid-xxs, hybrid-xs, "),
        ("resnet", {}, "unknown model 'resnet': known: hybrid-xxs, hybrid-xs, "),
        ("hybrid-s", {"options": {"windows": 8}}, "unknown option 'windows': did you mean 'window'? known: "),
        ("hybrid-s", {"options": {"classes": 3}}, "'classes' is not an option: give it beside the model's name"),
        ("hybrid-s", {"options": {"task": "restore"}}, "'task' is not an option"),
        ("hybrid-s", {"options": {"head_dim": 48}}, "dim 256 must be a multiple of head_dim 48 and at least 96"),
        ("hybrid-s", {"options": {"window": 0}}, "model 'hybrid-s', window: Input should be greater than or equal to 1"),
        ("hybrid-s", {"options": {"dims": (128,)}}, "dims names 1 attention stages and depths 2: give as many of each"),
        ("hybrid-s", {"classes": 0}, "model 'hybrid-s', classes: Input should be greater than or equal to 1"),
        ("hybrid-s", {"channels": 17}, "model 'hybrid-s', channels: Input should be less than or equal to 16"),
        ("hybrid-s", {"scale": 2}, "scale=2 is for task 'restore'; 'segment' answers at the input's size"),
        ("hybrid-s", {"task": "detect"}, "model 'hybrid-s', task: Input should be 'segment', 'classify' or 'restore'"),
        ("timm:resnet18", {"task": "classify", "options": {"window": 8}}, "options window are for hybrid models"),
        ("timm:resnet18", {"task": "classify", "scale": 2}, "scale=2 is for hybrid models and factories; 'timm:resnet18' answers at"),
    ],
)
def test_mistakes(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)) as caught:
        create_model(name, **arguments)
    assert "\n" not in str(caught.value)


def test_options() -> None:
    model = create_model("hybrid-xs", options={"window": 5, "attention": "local"})
    assert isinstance(model, HybridNet)
    assert (model.config.window, model.config.attention) == (5, "local")
    assert model.config.decoder == PRESETS["hybrid-xs"]["decoder"]


def test_seed() -> None:
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(create_model("hybrid-xs").state_dict())
    first, again, other = states
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)
