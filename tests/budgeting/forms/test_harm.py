"""The predicted harm of forms, beside real factored and integer layers and what they do to a model's answer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from model_helpers import pixels
from muntin import export
from muntin.budgeting.forms.harm import (
    PROBED,
    cut_factors,
    form_errors,
    input_rows,
    kept_by_reconstruction,
    measure_harm,
    scores_of,
    weight_response,
)
from muntin.budgeting.forms.layer_forms import KEPT, FormLayers, embedding_forms, halves, layer_forms, ranks_of
from muntin.budgeting.forms.plans import Form
from muntin.compression import quantize
from muntin.compression.low_rank.factorization import Dense, factorize, square_root
from muntin.compression.quantization.fake_quantization import dequantize_weight, quantize_weight
from muntin.compression.quantization.qat import QATConv2d, QATLinear, freeze, prepare_qat
from muntin.compression.quantization.quantized_layers import quantized_form
from muntin.compression.quantization.reconstruction import reconstruct
from muntin.compression.quantization.rounding import add_rows, round_layer
from muntin.compression.rewrite import named, replace
from muntin.graph.grids import ByteGrid
from muntin.models.eager import eager_copy

CASES: list[tuple[Dense, tuple[int, ...]]] = [
    (nn.Linear(96, 64), (6, 5, 96)),
    (nn.Conv2d(96, 64, 1, stride=2), (6, 96, 8, 8)),
    (nn.Conv2d(48, 64, 3, padding=1), (6, 48, 8, 8)),
    (nn.Conv2d(32, 32, 5, stride=2, padding=2), (6, 32, 8, 8)),
]


class Features(nn.Module):
    """One layer whose input is correlated, as inside a network."""

    def __init__(self, layer: Dense) -> None:
        super().__init__()
        self.mix = nn.Linear(layer.weight.shape[1], layer.weight.shape[1])
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        axis = 1 if x.ndim == 4 else -1
        mixed = torch.relu(self.mix(x.movedim(axis, -1))).movedim(-1, axis)
        out: Tensor = self.layer(mixed).flatten(1).cumsum(1)
        return out


@pytest.mark.parametrize(("layer", "shape"), CASES)
def test_cut_factors_equal_lower_ranks(layer: Dense, shape: Sequence[int]) -> None:
    largest, rank = (32, 16) if not isinstance(layer, nn.Conv2d) or layer.kernel_size != (3, 3) else (48, 16)
    moment = torch.cov(torch.randn(layer.weight.shape[1], 400, dtype=torch.float64)).mul(2)
    root = square_root(moment)
    cut = cut_factors(factorize(layer, ranks_of(layer, largest), root), ranks_of(layer, rank))
    parts = [part for part in factorize(layer, ranks_of(layer, rank), root).children() if isinstance(part, nn.Linear | nn.Conv2d)]
    product = [torch.einsum("prhw,rizv->pihzwv", later, sooner) for sooner, later in ((cut[0], cut[1]),)]
    wanted = [part.weight.reshape(*part.weight.shape[:2], *(part.weight.shape[2:] or (1, 1))) for part in parts]
    assert torch.allclose(product[0], torch.einsum("prhw,rizv->pihzwv", wanted[1], wanted[0]), atol=1e-5)
    assert [one.shape for one in cut] == [one.shape for one in wanted]


@pytest.mark.parametrize(("layer", "shape"), CASES)
def test_errors_equal_those_of_real_layers(layer: Dense, shape: tuple[int, ...]) -> None:
    """Of factors to rounding; of integers about, whose rounding error is scaled."""
    images = torch.randn(shape)
    found = layer_forms(Features(layer).eval(), [images])
    one = found.layers["layer"]
    x: list[Tensor] = []
    found.model.layer.register_forward_pre_hook(lambda _, inputs: x.append(inputs[0]))
    with torch.no_grad():
        found.model(images)
    rows = input_rows(one.layer, x[0], 10_000)
    errors = form_errors(one, rows, rows)
    assert one.moment is not None and one.grid is not None and any(form.rank is not None for form in errors)
    for form, error in errors.items():
        if form.rank is None and form.bits == 8:
            real: nn.Module = quantized_form(one.layer, one.grid)
            bounds = (0.3, 1.1)
        elif form.rank is not None and form.bits == KEPT:
            real, bounds = factorize(one.layer, ranks_of(one.layer, form.rank), square_root(one.moment.shrunk())), (0.999, 1.001)
        else:
            continue
        with torch.no_grad():
            difference = real(x[0]) - one.layer(x[0])
            if form.bits < KEPT:
                axes = [axis for axis in range(difference.ndim) if axis != (1 if difference.ndim == 4 else difference.ndim - 1)]
                difference -= difference.mean(axes, keepdim=True)
        ratio = error / float(difference.square().mean())
        assert bounds[0] < ratio < bounds[1], form


def test_fewer_bits_and_lower_ranks_harm_more() -> None:
    found = layer_forms(network(), [pictures(8), pictures(8)])
    for name, harms in measure_harm(found):
        assert harms[Form(None, KEPT)] == 0 and all(harm >= 0 for harm in harms.values())
        dense = [harms[Form(None, bits)] for bits in (8, 6, 5, 4, 3)]
        assert all(more > 0.95 * fewer for fewer, more in itertools.pairwise(dense)), name  # at 8 bits the input's error may be the larger
        ranks = [harms[form] for form in harms if form.rank is not None and form.bits == KEPT]
        assert ranks == sorted(ranks), name


class Tokens(nn.Module):
    """A network whose answer hardly depends on its first token, which has the largest values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(32, 64), nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.first(x).relu()
        return self.out(tokens[:, 1:].mean(1) + 1e-4 * tokens[:, 0])


@pytest.mark.parametrize(("model", "layer"), [(Tokens(), "first"), (nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)), "2")])
def test_harm_of_an_input_is_measured_in_the_answer(model: nn.Module, layer: str) -> None:
    """The input of the second network's layer is hardly ever negative, so its grid has a zero point."""
    model, x = model.eval(), torch.randn(32, 6, 32)
    x[:, 0] *= 20
    found = layer_forms(model, [x[:16], x[16:]])
    predicted = dict(measure_harm(found))[layer][Form(None, 8)]
    with torch.no_grad():
        exact = model(x[16:])
        narrow = copy.deepcopy(model)
        prepare_qat(narrow, [x[:16], x[16:]], bits=8, only=(layer,))
        freeze(narrow)
        noise = float((narrow(x[16:]) - exact).square().mean() / exact.var(correction=0))
    assert predicted == pytest.approx(noise, rel=0.5)


def test_harm_and_bytes_of_an_embedding(tmp_path: Path) -> None:
    """The harm of a table's bits is the change of the answer, and its bytes are those of artefacts."""
    model = nn.Sequential(nn.Embedding(2000, 64), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    batch = {"input": torch.randint(0, 2000, (64, 5))}
    found = layer_forms(model, [batch, batch])
    harms, costs = dict(measure_harm(found))["0"], embedding_forms(found.embeddings["0"])
    written = {}
    with torch.no_grad():
        exact = model(batch["input"][:PROBED])
        for bits in (4, 8):
            narrow = copy.deepcopy(model)
            quantize(narrow, [batch], only=("0",), embedding_bits=bits)
            noise = float((narrow(batch["input"][:PROBED]) - exact).square().mean() / exact.var(correction=0))
            assert harms[Form(None, bits)] == pytest.approx(noise, rel=0.01)
            written[bits] = export(narrow, batch, tmp_path / str(bits)).bytes
    assert harms[Form(None, KEPT)] == 0 and harms[Form(None, 4)] > 10 * harms[Form(None, 8)] > 0
    assert costs[Form(None, 8)].bytes - costs[Form(None, 4)].bytes == pytest.approx(written[8] - written[4], rel=0.05)


def test_reconstruction_keeps_the_predicted_share() -> None:
    """Real rounding column by column, beside nearest rounding, on correlated inputs: what the share predicts."""
    mixing = torch.randn(48, 48) + 0.3 * torch.ones(48, 48)
    x = torch.randn(4000, 48) @ mixing
    layer = nn.Linear(48, 64, bias=False)
    grid = ByteGrid(scale=float(x.abs().max()) / 127, unsigned=False)
    for bits in (3, 4):
        trained = QATLinear(layer, grid, bits)
        moments = add_rows(None, trained, x, x)
        share = round_layer(trained, moments)
        predicted = float(kept_by_reconstruction(x[None, ::2], x[None, 1::2])[0])
        assert predicted == pytest.approx(share, rel=0.35)


def test_few_rows_do_not_make_low_ranks_free() -> None:
    """Behind a pooling, 16 images span 16 directions: rank 16 fits those, and not the others."""
    layer = nn.Linear(128, 128)
    found = layer_forms(nn.Sequential(nn.Linear(128, 128), nn.ReLU(), layer, nn.ReLU(), nn.Linear(128, 128)).eval(), [torch.randn(16, 128)])
    one = found.layers["2"]
    x = F.relu(found.model[0](torch.randn(500, 128))).detach()
    form = Form(16, KEPT)
    assert one.moment is not None
    real = factorize(one.layer, (16,), square_root(one.moment.shrunk()))
    error = float((real(x) - one.layer(x)).detach().square().mean())
    fitted, judged = (F.relu(found.model[0](half[0])).detach()[None] for half in (found.fitted, found.judged))
    assert form_errors(one, fitted, judged)[form] == pytest.approx(error, rel=0.4)


def test_halves() -> None:
    one, other, third = torch.zeros(2, 3), torch.ones(2, 3), torch.ones(2, 3)
    assert halves([one, other, third]) == ([one, third], [other])
    first, second = halves([{"x": torch.arange(5), "side": 3}])
    assert torch.equal(first[0]["x"], torch.tensor([0, 1, 2])) and torch.equal(second[0]["x"], torch.tensor([3, 4]))
    assert first[0]["side"] == 3
    single = torch.zeros(1, 3)
    assert halves([single]) == ([single], [single])


def test_layers_that_the_answer_ignores() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.ignored = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x) + self.ignored(x).detach()
            return out

    harms = dict(measure_harm(layer_forms(Detached(), [torch.randn(8, 32)])))
    assert harms["ignored"] == {Form(None, KEPT): 0.0} and len(harms["used"]) > 1


def network() -> nn.Sequential:
    """A small network with random weights and a classifier behind a pooling."""
    torch.manual_seed(3)
    features = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 48, 3, 1, 1), nn.ReLU(), nn.Conv2d(48, 48, 3, 1, 1, groups=48)]
    features += [nn.ReLU(), nn.Conv2d(48, 96, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 64), nn.ReLU()]
    model = nn.Sequential(*features, nn.Linear(64, 10))
    model[0].weight.data /= 64  # of raw pixels
    return model.eval()


def pictures(count: int) -> Tensor:
    """Smooth colours that differ between images."""
    return F.interpolate(pixels(count, 3, 4, 4), size=24, mode="bilinear")


def changed(layers: FormLayers, name: str, form: Form, images: list[Tensor]) -> nn.Module:
    model, one = eager_copy(layers.model), layers.layers[name]
    if form.rank is not None:
        assert one.moment is not None
        replace(model, name, factorize(one.layer, ranks_of(one.layer, form.rank), square_root(one.moment.shrunk())))
    if form.bits < KEPT:
        prepare_qat(model, images, bits={name: form.bits}, only=(name,))
        reconstruct(model, dict(named(model, QATConv2d, QATLinear)), images)
        freeze(model)
    return model.eval()


def test_harm_orders_changes_as_the_answer_does() -> None:
    images, others = [pictures(16), pictures(16)], pictures(64)
    layers = layer_forms(network(), images)
    harms = dict(measure_harm(layers))
    generator = torch.Generator().manual_seed(1)
    predicted, measured = [], []
    with torch.no_grad():
        exact = layers.model(others)
        for name, one in layers.layers.items():
            forms = [form for form in one.forms if form.bits in (3, 5, 8) or form.rank is not None]
            for index in torch.randperm(len(forms), generator=generator)[:4].tolist():
                predicted.append(harms[name][forms[index]])
                answer = changed(layers, name, forms[index], images)(others)
                measured.append(float((answer - exact).square().mean() / exact.var()))
    assert len(predicted) >= 20
    assert spearmanr(predicted, measured).statistic > 0.8


def test_response_is_the_noise_of_a_rounded_layer() -> None:
    layers = layer_forms(network(), [pictures(16), pictures(16)])
    (batch,), one = layers.judged, layers.layers["6"]
    response = weight_response(layers.model, batch, scores_of(layers.model, batch), one.layer)
    model, weight = eager_copy(layers.model), one.layer.weight.detach()
    inputs: list[Tensor] = []
    model[6].register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        exact = model(batch)
        q, scale = quantize_weight(weight, 0, 5)
        change = dequantize_weight(q, scale, 0) - weight
        error = F.conv2d(inputs[0], change)
        mean = error.mean((0, 2, 3))
        model[6].weight += change
        model[6].bias -= mean
        noise = float((model(batch) - exact).square().mean() / exact.var(correction=0))
    assert response == pytest.approx(noise / float((error - mean[:, None, None]).square().mean()), rel=1e-3)
