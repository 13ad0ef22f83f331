"""Encoder: maps of timm's networks, their normalisation, sizes, padding, weights by timm's names."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.errors import RecipeError
from muntin.models import HybridNet, create_model
from muntin.models.encoder import Encoder, EndPaddedConv2d, encoder_tensors

TINY = "timm:test_efficientnet"
OPTIONS = {"dims": (32,), "depths": (1,), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16}


def pixels(*shape: int) -> Tensor:
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(0)) * 255).round()


def hybrid(**arguments: Any) -> HybridNet:
    model = create_model("hybrid-xs", **{"encoder": TINY, "options": OPTIONS, "classes": 5, **arguments})
    assert isinstance(model, HybridNet)
    return model.eval()


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "tf_efficientnet_lite0"])
def test_maps_of_timm(name: str) -> None:
    """On sides that all strides divide, TensorFlow's padding included."""
    encoder, reference = Encoder(f"timm:{name}", 3).eval(), timm.create_model(name, features_only=True).eval()
    reference.load_state_dict(encoder.features.state_dict())
    x, (mean, std) = pixels(2, 3, 64, 96), (torch.tensor(reference.default_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        for ours, theirs in zip(encoder(x), reference((x / 255 - mean) / std), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sides", [(8, 12), (7, 9)])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_end_padding(kernel: int, sides: tuple[int, int]) -> None:
    conv = nn.Conv2d(2, 4, kernel, 2)
    x, span = torch.randn(1, 2, *sides), max(0, kernel - 2)
    before = span // 2
    expected = F.conv2d(F.pad(x, (before, 9, before, 9)), conv.weight, conv.bias, 2)[..., : -(-sides[0] // 2), : -(-sides[1] // 2)]
    torch.testing.assert_close(EndPaddedConv2d(conv)(x), expected)


@pytest.mark.parametrize(("task", "scale"), [("segment", 1), ("classify", 1), ("restore", 2)])
@pytest.mark.parametrize("encoder", ["test_resnet", "tf_efficientnet_lite0", "convnext_atto"])
def test_hybrids_at_every_size(encoder: str, task: Any, scale: int) -> None:
    model = hybrid(encoder=f"timm:{encoder}", task=task, scale=scale)
    with torch.inference_mode():
        for height, width in ((1, 1), (2, 33), (37, 50)):
            answer = model(pixels(2, 3, height, width))
            outputs = (5,) if task == "classify" else (3 if task == "restore" else 5, scale * height, scale * width)
            assert answer.shape == (2, *outputs) and answer.isfinite().all()


def test_attention_on_the_coarsest_maps() -> None:
    model = hybrid(options={**OPTIONS, "dims": (32, 48), "depths": (1, 2), "finest": 8})
    assert model.encoder.strides == (2, 4, 8, 16, 32)
    assert [stage.reduce.conv.in_channels for stage in model.stages] == list(model.encoder.channels[-2:])  # type: ignore[union-attr]
    assert [lateral.conv.in_channels for lateral in model.decoder.lateral] == [48, 32, model.encoder.channels[2]]  # type: ignore[union-attr]
    assert not hasattr(model, "stem")


def test_gradients_of_all_parts() -> None:
    model = hybrid().train()
    model(pixels(2, 3, 64, 64)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels(channels: int) -> None:
    """A grey picture, repeated, gives the first layer's sums of one of three channels."""
    three, other = Encoder("timm:test_resnet", 3).eval(), Encoder("timm:test_resnet", channels).eval()
    tensors, others, notes = encoder_tensors(other, three.features.state_dict())
    assert not others and len(notes) == 1 and f"over {channels}" in notes[0]
    other.features.load_state_dict(tensors)
    name = notes[0].partition(":")[0]
    wide, narrow = three.features.state_dict()[name], other.features.state_dict()[name]
    torch.testing.assert_close(wide.sum(1), narrow.sum(1))


@pytest.mark.parametrize("name", ["convnext_atto", "test_efficientnet"])
@pytest.mark.parametrize("prefix", ["", "encoder.model."])
def test_names_of_a_classifier(name: str, prefix: str) -> None:
    encoder, classifier = Encoder(f"timm:{name}", 3), timm.create_model(name)
    tensors, others, notes = encoder_tensors(encoder, {prefix + key: tensor for key, tensor in classifier.state_dict().items()})
    assert tensors.keys() == encoder.features.state_dict().keys() and not notes
    assert others and not any(".blocks." in key for key in others)
    encoder.features.load_state_dict(tensors)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"encoder": "resnet18"}, "encoder 'resnet18' names no package: give timm:NAME"),
        ({"encoder": "timm:no_such_network"}, "timm does not know a model"),
        ({"encoder": "timm:test_vit", "task": "segment"}, "stride [48]: take an encoder that has stride 2, 4 or 8"),
        ({"encoder": "timm:vit_tiny_patch16_224"}, "it does not take pictures of any size"),
        ({"encoder": "timm:convnext_atto", "options": {"dims": (32,) * 5, "depths": (1,) * 5, "head_dim": 16}}, "strides 4, 8, 16, 32"),
        ({"options": {"stem": (8, 8)}}, "options stem are of the convolutions that an encoder replaces"),
        ({"options": {"encoder": TINY}}, "give it beside the model's name"),
    ],
)
def test_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        hybrid(**arguments)


def test_encoder_of_a_foreign_model() -> None:
    with pytest.raises(RecipeError, match="has its own: leave it out"):
        create_model("timm:test_resnet", task="classify", encoder=TINY)
