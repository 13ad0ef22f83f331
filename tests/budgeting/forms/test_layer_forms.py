"""Forms of layers: their ranks, their costs beside those of real artefacts, and reasons for fewer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model_helpers import pixels
from muntin.budgeting.forms.layer_forms import BITS, KEPT, RANKS, FormLayers, form_cost, layer_forms, offered_ranks, ranks_of
from muntin.budgeting.forms.plans import Form
from muntin.compression import quantize
from muntin.compression.low_rank.factored_layers import factored_parameters
from muntin.compression.low_rank.factorization import Dense, factorize
from muntin.compression.quantization.fake_quantization import round_to_half
from muntin.compression.rewrite import replace
from muntin.deployment import export
from muntin.models.eager import eager_copy

LAYERS: list[Dense] = [nn.Linear(96, 160), nn.Conv2d(160, 96, 1), nn.Conv2d(64, 128, 3), nn.Conv2d(48, 48, 5)]


def network() -> nn.Sequential:
    features = [nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3, 1, 1, groups=32)]
    features += [nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU(), nn.Conv2d(64, 96, 1), nn.ReLU()]
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10)).eval()


@pytest.mark.parametrize("layer", LAYERS)
def test_offered_ranks_save_parameters(layer: Dense) -> None:
    ranks = offered_ranks(layer)
    assert 1 < len(ranks) <= RANKS and ranks == sorted(set(ranks), reverse=True)
    dense = sum(parameter.numel() for parameter in layer.parameters())
    for rank in ranks:
        assert all(one % 16 == 0 for one in ranks_of(layer, rank))
        factored = factorize(layer, ranks_of(layer, rank))
        cost = form_cost(layer, Form(rank, 8), 1.0)
        assert cost.parameters == sum(parameter.numel() for parameter in factored.parameters()) < dense
    more = ranks_of(layer, ranks[0] + 16)
    assert factored_parameters(layer, more) >= dense, "a greater rank would save parameters too"


def test_second_rank_is_in_proportion() -> None:
    assert ranks_of(nn.Conv2d(64, 128, 3), 64) == (32, 64)
    assert ranks_of(nn.Conv2d(8, 128, 3), 32) == (8, 32)
    with pytest.raises(ValueError, match=r"rank 129: .* takes 1 to 128"):
        ranks_of(nn.Conv2d(64, 128, 3), 129)


def test_forms_of_a_network() -> None:
    model, images = network(), pixels(4, 3, 24, 24)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = layer_forms(model, [images[:2], images[2:]])
    assert list(found.layers) == ["0", "3", "4", "6", "10"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    first, depthwise, conv = (found.layers[name] for name in ("0", "3", "4"))
    assert (first.shape, first.positions, first.calls) == ((3, 24, 24), 144, 1)
    assert set(depthwise.forms) == {Form(None, bits) for bits in BITS}
    assert depthwise.reasons == ("depthwise convolution: no factored form here",)
    ranks = [None, *offered_ranks(conv.layer)]
    assert set(conv.forms) == {Form(rank, bits) for rank in ranks for bits in BITS} and not conv.reasons
    assert conv.forms[Form(None, 8)].macs == conv.layer.weight.numel() * 144


class Unusual(nn.Module):
    """One layer that pads in its own way, one that the model never calls, one whose kind the model tests."""

    def __init__(self) -> None:
        super().__init__()
        self.padded = nn.Conv2d(3, 32, 3, padding=1, padding_mode="reflect")
        self.unused = nn.Linear(32, 32)
        self.tested = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        features = self.padded(x).mean((2, 3))
        out: Tensor = self.tested(features) if type(self.tested) is nn.Linear else features
        return out


def test_layers_with_fewer_forms_have_reasons() -> None:
    found = layer_forms(Unusual(), [pixels(4, 3, 8, 8)]).layers
    assert list(found) == ["padded.conv", "unused", "tested"]
    assert len(found["padded.conv"].forms) >= len(BITS)
    for name, reason in (("unused", "no calibration image reached it"), ("tested", "the model uses more of it")):
        assert list(found[name].forms) == [Form(None, KEPT)]
        assert any(text.startswith(reason) for text in found[name].reasons), found[name].reasons


def with_forms(layers: FormLayers, bits: int, *, factored: bool) -> tuple[nn.Module, int]:
    """The network with all layers in these bits and at their least ranks, and the predicted bytes of its layers."""
    model, stored = eager_copy(layers.model), 0
    for name, one in layers.layers.items():
        ranks = [form.rank for form in one.forms if form.rank is not None] if factored else []
        form = Form(min(ranks, default=None), bits)
        stored += one.forms[form].bytes
        if form.rank is not None:
            replace(model, name, factorize(one.layer, ranks_of(one.layer, form.rank)))
    return model, stored


@pytest.mark.slow
def test_bytes_beside_artefacts(tmp_path: Path) -> None:
    """Between two forms of the network, artefacts differ by the predicted bytes."""
    images = pixels(4, 3, 24, 24)
    layers = layer_forms(network(), [images])
    written, predicted = {}, {}
    for bits, factored in ((4, False), (8, False), (KEPT, False), (4, True)):
        model, predicted[bits, factored] = with_forms(layers, bits, factored=factored)
        if bits < KEPT:
            quantize(model, [images], bits=bits, min_sqnr_db=0.0)
        else:
            for module in model.modules():
                round_to_half(module)
        written[bits, factored] = export(model, images, tmp_path / f"{bits}-{factored}").bytes
    base = (8, False)
    for key in written.keys() - {base}:
        difference = written[base] - written[key]
        assert predicted[base] - predicted[key] == pytest.approx(difference, rel=0.1, abs=1000), key
