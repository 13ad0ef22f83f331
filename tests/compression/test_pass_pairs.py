"""Passes on random networks: each alone, every pair in order, a second run, saving and loading; the page on passes; exports."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

import muntin
from model_helpers import answer, pixels
from muntin.compression import Change
from muntin.compression.sparsity.pattern import check_held, sparse_layers
from muntin.errors import MuntinError

PAGE = Path(__file__).parents[2] / "docs" / "passes.md"
BATCHES = [pixels(4, 3, 12, 12), pixels(2, 3, 12, 12)]
PASSES: dict[str, Callable[[nn.Module], list[Change]]] = {
    "prune": lambda model: muntin.prune(model, BATCHES, ratio=0.5, multiple=4),
    "low_rank": lambda model: muntin.low_rank(model, BATCHES, parameters=0.97, multiple=2),
    "quantize": lambda model: muntin.quantize(model, BATCHES),
    "quantize_w4": lambda model: muntin.quantize(model, BATCHES, bits=4),
    "prepare_qat": lambda model: muntin.prepare_qat(model, BATCHES, bits=4),
    "freeze": lambda model: muntin.freeze(model, BATCHES),
    "sparsify": lambda model: muntin.sparsify(model, BATCHES),
}
REFUSED = {
    *product(("prepare_qat",), ("prune", "low_rank", "quantize", "quantize_w4", "sparsify")),
    ("quantize_w4", "quantize"),
}  # fmt: skip
"""Pairs that are an error, which names the order."""


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.inner(x)
        return out


class Attention(nn.Module):
    """Attention over the positions of a map, with heads and a layer norm."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm, self.qkv, self.out = heads, nn.LayerNorm(dim), nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm(tokens)).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out: Tensor = self.out(mixed).transpose(1, 2).reshape(x.shape)
        return out


def block(kind: str, dim: int) -> nn.Module:
    if kind == "plain":
        return nn.Sequential(nn.Conv2d(dim, dim, 3, padding=1), nn.BatchNorm2d(dim), nn.SiLU())
    if kind == "depthwise":
        wide = 2 * dim
        return Residual(
            nn.Sequential(
                nn.Conv2d(dim, wide, 1), nn.BatchNorm2d(wide), nn.ReLU(), nn.Conv2d(wide, wide, 3, padding="same", groups=wide, bias=False),
                nn.ReLU(), nn.Conv2d(wide, dim, 1),
            )
        )  # fmt: skip
    if kind == "attention":
        return Residual(Attention(dim, 2))
    return Residual(nn.Sequential(nn.Conv2d(dim, 2 * dim, 3, padding=1), nn.PReLU(2 * dim), nn.Conv2d(2 * dim, dim, 3, padding=1)))


def network(kinds: tuple[str, ...], dim: int) -> nn.Module:
    head = [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * dim, 24), nn.Hardswish(), nn.Linear(24, 5)]
    model = nn.Sequential(nn.Conv2d(3, dim, 3, stride=2), nn.BatchNorm2d(dim), *(block(kind, dim) for kind in kinds), *head)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean, module.running_var = torch.rand(module.num_features), 0.5 + torch.rand(module.num_features)
    return model.eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


NETWORKS = st.tuples(
    st.lists(st.sampled_from(("plain", "depthwise", "attention", "residual")), min_size=1, max_size=3).map(tuple), st.sampled_from((8, 16))
)
ORDERS = [*((name,) for name in PASSES), *product(PASSES, PASSES)]


@pytest.mark.parametrize("number", range(len(ORDERS)), ids=["-".join(order) for order in ORDERS])
def test_order_saved_and_repeated(number: int, tmp_path: Path) -> None:
    """Every order on one of two networks in turn."""
    check_order(ORDERS[number], ((("depthwise", "attention"), 8), (("plain", "residual"), 16))[number % 2], tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("order", ORDERS, ids=["-".join(order) for order in ORDERS])
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made_of=NETWORKS)
def test_order_on_random_networks(order: tuple[str, ...], made_of: tuple[tuple[str, ...], int], tmp_path_factory: Any) -> None:
    check_order(order, made_of, tmp_path_factory.mktemp("saved"))


def check_order(order: tuple[str, ...], made_of: tuple[tuple[str, ...], int], path: Path) -> None:
    """Apply one pass or two, save and load the model, and apply the last one again, which changes nothing."""
    model, x = network(*made_of), BATCHES[0]
    PASSES[order[0]](model)
    if order in REFUSED:
        with pytest.raises(MuntinError, match=r"is in quantisation-aware training|bits already"):
            PASSES[order[1]](model)
        return
    if len(order) == 2:
        PASSES[order[1]](model)
    before, scores = state(model), answer(model, x)
    assert scores.shape == (4, 5) and scores.isfinite().all()
    folder = muntin.save(model, path / "model")
    again = muntin.load_compressed(folder, network(*made_of))
    assert torch.equal(answer(again, x), scores)
    if "sparsify" in order:
        check_held(model)
        assert "sparsify" not in order[-1:] or sparse_layers(model)
    assert sparse_layers(again).keys() == sparse_layers(model).keys()
    for loaded in (model, again):
        assert all(change.kept and change.reason for change in PASSES[order[-1]](loaded))
        assert same_state(state(loaded), before)


def test_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The examples of docs/passes.md run in order, and do what the page says."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    sizes = []
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(code, names)  # noqa: S102 - the page's own code
        sizes.append(sum(parameter.numel() for parameter in names["model"].parameters()))
        if "course" in names:
            assert names.pop("course").skipped == 0
    assert sizes[2] < 0.61 * sizes[0] and sizes[3] < sizes[2]
    assert "ranks " in capsys.readouterr().out
    x = names["batches"][0]
    assert torch.equal(answer(names["again"], x), answer(names["model"], x))
    assert names["session"].signature.task == "classify"


@pytest.mark.slow
@pytest.mark.parametrize("order", [("quantize", "low_rank", "prune"), ("prune", "sparsify", "quantize_w4")])
def test_export_after_passes(order: tuple[str, ...], tmp_path: Path) -> None:
    model = network(("plain", "depthwise", "attention"), 16)
    for name in order:
        PASSES[name](model)
    scores = answer(model, BATCHES[1])
    artifact = muntin.export(model, BATCHES[1], tmp_path / "artifact")
    assert muntin.verify(artifact.path).passed
    assert {"prune", "quantize"} <= {entry["pass"] for entry in artifact.manifest.passes}
    images = BATCHES[1].permute(0, 2, 3, 1).numpy().astype("uint8")
    assert abs(muntin.load(artifact.path)(images) - scores.numpy()).max() < 0.1 * float(scores.std())


def small_transformer() -> nn.Module:
    return timm.models.VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5)


def small_convolutional() -> nn.Module:
    return timm.models.ResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=5, channels=(16, 16, 16, 32), stem_width=16)


@pytest.mark.slow
@pytest.mark.parametrize("build", [small_transformer, small_convolutional])
def test_pruned_factored_and_deployed(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Prune, distil, factor, distil, quantise, export and verify; each step takes what the one before leaves."""
    torch.manual_seed(0)
    teacher, batches = build().eval(), [pixels(8, 3, 16, 16) / 64 for _ in range(4)]
    model = copy.deepcopy(teacher)
    sizes = [sum(parameter.numel() for parameter in model.parameters())]
    for compress in (
        lambda: muntin.prune(model, batches, parameters=0.7, multiple=4),
        lambda: muntin.low_rank(model, batches, parameters=0.8, multiple=4),
    ):
        assert any(not change.kept for change in compress())
        course = muntin.distil(model, teacher, batches, steps=4, learning_rate=3e-4, precision="fp32")
        assert (course.steps, course.skipped) == (4, 0)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes[0] > sizes[1] > sizes[2]
    muntin.quantize(model, batches)
    artifact = muntin.export(model, batches[0], tmp_path / "artifact")
    assert muntin.verify(artifact.path).passed
    assert {"prune", "low_rank", "quantize"} <= {entry["pass"] for entry in artifact.manifest.passes}


def test_copies_are_independent() -> None:
    model = network(("plain",), 16)
    other = copy.deepcopy(model)
    PASSES["low_rank"](model)
    assert any(not change.kept for change in PASSES["low_rank"](other))
