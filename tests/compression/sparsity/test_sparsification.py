from __future__ import annotations

import copy
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

import muntin
from model_helpers import answer, by_layer, pixels
from muntin.artifact import open_artifact, sparsity_of
from muntin.artifact.manifest import render_manifest
from muntin.compression import QuantizedConv2d, QuantizedLinear
from muntin.compression.sparsity.pattern import check_held, parse_pattern, sparse_layers, taps_first
from muntin.errors import MuntinError
from muntin.layers import ChannelGate

SCORES = ["magnitude", "activations", "reconstruction"]
BATCHES = [pixels(8, 3, 12, 12) for _ in range(4)]


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 5),
    ).eval()  # fmt: skip


def error(model: nn.Module, exact: Tensor) -> float:
    return float((answer(model, BATCHES[0]) - exact).square().mean() / exact.var())


@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_pattern_holds_exactly(scores: Any, pattern: str) -> None:
    model = network()
    changes = by_layer(muntin.sparsify(model, BATCHES, pattern=pattern, scores=scores), "sparsify")
    whole = parse_pattern(pattern)
    reasons = {name: change.reason for name, change in changes.items() if change.kept}
    assert reasons.pop("0") == f"3 inputs are no multiple of {whole.group}"
    assert reasons.pop("5") == "depthwise convolution: no sparse form here"
    assert reasons == ({} if whole.kept else {"12": "5 outputs are no multiple of 4"})
    done = {name: change.done for name, change in changes.items() if not change.kept}
    for name, text in done.items():
        assert text.startswith(f"{pattern} by {scores}")
        weight_OTI = taps_first(model.get_submodule(name).weight)
        groups = weight_OTI.unflatten(-1, (-1, whole.group))
        if whole.kept:
            assert bool(((groups != 0).sum(-1) == whole.kept).all())
        else:
            assert float((weight_OTI == 0).float().mean()) == 0.5
    assert list(sparse_layers(model)) == list(done)
    state = copy.deepcopy(model.state_dict())
    again = muntin.sparsify(model, BATCHES, pattern=pattern, scores=scores)
    assert all(change.kept and change.reason for change in again)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_scores_in_order_of_their_errors() -> None:
    """Inputs of unequal size and correlated: activations help, and reconstruction helps more."""
    torch.manual_seed(1)
    model = network()
    exact = answer(model, BATCHES[0])
    errors = []
    for scores in SCORES:
        sparse = copy.deepcopy(model)
        muntin.sparsify(sparse, BATCHES, scores=scores)  # type: ignore[arg-type]
        errors.append(error(sparse, exact))
    assert errors[2] < 0.5 * errors[0] and errors[2] < 0.5 * errors[1]


def test_activations_are_weighed() -> None:
    """An input channel that hardly varies loses its weights first (Wanda), at every tap."""
    layer = nn.Conv2d(4, 8, 3)
    model, x = nn.Sequential(layer), torch.randn(4, 4, 8, 8) * torch.tensor([10.0, 0.01, 10, 0.01])[:, None, None]
    muntin.sparsify(model, [x], scores="activations")
    assert not layer.weight[:, [1, 3]].any() and bool((layer.weight[:, [0, 2]] != 0).all())


def test_only_and_keep() -> None:
    model = network()
    changes = by_layer(muntin.sparsify(model, BATCHES, only=("6", "1*"), keep=("12",)), "sparsify")
    assert [name for name, change in changes.items() if not change.kept] == ["6", "10"]
    assert changes["12"].reason == "named in keep" and changes["3"].reason == "not named in only"
    with pytest.raises(MuntinError, match="only names no layer: x"):
        muntin.sparsify(model, BATCHES, only=("x",))


def test_other_arguments_are_refused() -> None:
    with pytest.raises(MuntinError, match="scores='wanda': give 'magnitude'"):
        muntin.sparsify(network(), BATCHES, scores="wanda")  # type: ignore[arg-type]
    model = network()
    muntin.prepare_qat(model, BATCHES)
    with pytest.raises(MuntinError, match="in quantisation-aware training"):
        muntin.sparsify(model, BATCHES)


class Shared(nn.Module):
    """Two Linears with one weight, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.spare, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.other(torch.relu(self.one(x)))))
        return out


def test_shared_and_unused_layers() -> None:
    changes = by_layer(muntin.sparsify(Shared().eval(), [torch.randn(64, 8)]), "sparsify")
    assert {name: change.reason for name, change in changes.items() if change.kept} == {
        "one": "its weight is shared by one and other", "other": "its weight is shared by one and other",
        "spare": "no calibration image reached it",
    }  # fmt: skip


def test_attention_keeps_its_projection() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    changes = by_layer(muntin.sparsify(model, [torch.randn(4, 10, 16)]), "sparsify")
    assert {name for name, change in changes.items() if not change.kept} == {"linear1", "linear2"}
    assert changes["self_attn"].reason == "MultiheadAttention: no sparse form here"


@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("first", ["sparsify", "quantize"])
def test_zeros_of_integers(bits: int, first: str) -> None:
    model = network()
    exact = answer(model, BATCHES[0])
    steps = [lambda: muntin.sparsify(model, BATCHES), lambda: muntin.quantize(model, BATCHES, bits=bits, min_sqnr_db=0)]
    for step in steps if first == "sparsify" else reversed(steps):
        step()
    check_held(model)
    for name in ("3", "6", "10", "12"):
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedConv2d | QuantizedLinear) and layer.bits == bits
        counts = (taps_first(layer.weight).unflatten(-1, (-1, 4)) != 0).sum(-1)
        assert int(counts.max()) == 2
    assert error(model, exact) < 0.5


def test_reconstruction_of_integers_sees_the_zeros() -> None:
    """Rounding to 3 bits makes up for the error of weights that may change, and leaves the zeros."""
    model = network()
    muntin.sparsify(model, BATCHES)
    exact = answer(model, BATCHES[0])
    near, column = copy.deepcopy(model), copy.deepcopy(model)
    muntin.quantize(near, BATCHES, bits=3, rounding="nearest", min_sqnr_db=0)
    muntin.quantize(column, BATCHES, bits=3, min_sqnr_db=0)
    check_held(column)
    assert error(column, exact) < error(near, exact)


def test_factors_get_the_pattern() -> None:
    model = network()
    muntin.sparsify(model, BATCHES)
    changes = muntin.low_rank(model, BATCHES, parameters=0.8, multiple=4)
    factored = [change.layer for change in changes if change.pass_ == "low_rank" and not change.kept]
    assert factored
    names = sparse_layers(model)
    assert {f"{factored[0]}.reduce", f"{factored[0]}.expand"} <= names.keys() and factored[0] not in names
    check_held(model)


def test_pruned_layers_keep_the_pattern() -> None:
    model = network()
    muntin.sparsify(model, BATCHES)
    changes = muntin.prune(model, BATCHES, ratio=0.25, multiple=4)
    assert any(change.pass_ == "prune" and not change.kept for change in changes)
    check_held(model)
    assert {"3", "10"} <= sparse_layers(model).keys()


def test_layers_that_do_not_fit_become_dense() -> None:
    model = network()
    muntin.sparsify(model, BATCHES, pattern="8:16")
    changes = muntin.prune(model, BATCHES, ratio=0.25, multiple=4)
    reasons = [change.reason for change in changes if change.pass_ == "sparsify" and change.kept]
    assert "12 inputs are no multiple of 16" in reasons
    check_held(model)
    assert "3" not in sparse_layers(model)


STEPS: dict[str, Any] = {
    "sparsify": lambda model: muntin.sparsify(model, BATCHES),
    "low_rank": lambda model: muntin.low_rank(model, BATCHES, parameters=0.9, multiple=4),
    "prune": lambda model: muntin.prune(model, BATCHES, ratio=0.25, multiple=4),
    "quantize": lambda model: muntin.quantize(model, BATCHES, bits=4, min_sqnr_db=0),
}
ORDERS = list(permutations(STEPS))[::4]
"""Those of two passes: `test_pass_pairs.py`."""


@pytest.mark.parametrize("order", ORDERS, ids=["-".join(order) for order in ORDERS])
def test_any_order(order: tuple[str, ...], tmp_path: Path) -> None:
    model = network()
    for name in order:
        STEPS[name](model)
    check_held(model)
    assert sparse_layers(model)
    before = copy.deepcopy(model.state_dict())
    assert all(change.kept for change in STEPS["sparsify"](model))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    again = muntin.load_compressed(muntin.save(model, tmp_path / "m"), network())
    assert torch.equal(answer(again, BATCHES[0]), answer(model, BATCHES[0]))
    assert sparse_layers(again).keys() == sparse_layers(model).keys()


class WithText(nn.Module):
    """Token ids in, a vector out."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(50, 64), nn.Linear(64, 128), nn.Linear(128, 16)

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.last(F.gelu(self.first(self.table(ids)))).mean(1)
        return out


def test_artifact_is_verified(tmp_path: Path) -> None:
    sparse = network()
    muntin.sparsify(sparse, BATCHES, pattern="2:4")
    muntin.quantize(sparse, BATCHES, bits=4, min_sqnr_db=0)
    artifact = muntin.export(sparse, BATCHES[0], tmp_path / "a")
    layers = {layer.name: layer.sparsity for layer in artifact.manifest.layers}
    assert layers["3"] == layers["6"] == "2:4" and layers["0"] == layers["5"] == ""
    result = muntin.verify(artifact.path)
    assert result.passed and result.sparsity["3"] == "2:4"
    standalone = onnx.load(muntin.write_standalone(artifact.path, tmp_path / "plain.onnx"))
    assert sparsity_of(standalone) == {name: pattern for name, pattern in layers.items() if pattern}
    session, scores = muntin.load(artifact.path), answer(sparse, BATCHES[0])
    images = BATCHES[0].permute(0, 2, 3, 1).numpy().astype(np.uint8)
    assert np.abs(session(images) - scores.numpy()).max() < 0.1 * float(scores.std())
    assert open_artifact(artifact.path).model_bytes() == artifact.model_bytes()


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_artifact_of_named_inputs(bits: int | None, tmp_path: Path) -> None:
    texts = [{"ids": torch.randint(0, 50, (16, 8))} for _ in range(2)]
    model = WithText().eval()
    muntin.sparsify(model, texts)
    if bits is not None:
        muntin.quantize(model, texts, bits=bits, min_sqnr_db=0)
    artifact = muntin.export(model, texts[0], tmp_path / "a")
    assert {"2:4"} == {layer.sparsity for layer in artifact.manifest.layers if layer.parameters}
    result = muntin.verify(artifact.path)
    assert result.passed and set(result.sparsity.values()) == {"2:4"}


def test_pattern_that_the_weights_do_not_have(tmp_path: Path) -> None:
    """A manifest with a wrong claim, whose digest was renewed."""
    model, texts = WithText().eval(), {"ids": torch.randint(0, 50, (16, 8))}
    muntin.sparsify(model, [texts], scores="magnitude")
    artifact = muntin.export(model, texts, tmp_path / "a")
    name = artifact.manifest.layers[0].name
    layers = tuple(layer.model_copy(update={"sparsity": "1:4"}) if layer.name == name else layer for layer in artifact.manifest.layers)
    _, content = render_manifest(artifact.manifest.model_copy(update={"layers": layers}))
    (artifact.path / "manifest.json").write_bytes(content)
    result = muntin.verify(artifact.path)
    assert result.problems == (f"layer {name}, recorded with zeros in the pattern 1:4, has 2:4: export again",)


def test_network_with_closed_channels(tmp_path: Path) -> None:
    options = {"depths": (1,), "dims": (32,), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "gate": True}
    build = partial(muntin.create_model, "hybrid-xs", classes=3, options=options)
    model, images = build().eval(), [pixels(2, 3, 32, 32)]
    with torch.no_grad():
        for gate in (part for part in model.modules() if isinstance(part, ChannelGate)):
            gate.logit[::3] = -30
    muntin.sparsify(model, images, scores="activations")
    muntin.quantize(model, images, min_sqnr_db=0)
    check_held(model)
    assert len(sparse_layers(model)) > 10
    again = muntin.load_compressed(muntin.save(model, tmp_path / "m"), build())
    assert torch.equal(answer(again, images[0]), answer(model, images[0]))
