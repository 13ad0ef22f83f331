from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from model_helpers import answer, count, pixels
from muntin import load_compressed, low_rank, prepare_qat, prune, quantize, save
from muntin.compression.channels.pruning import USED
from muntin.compression.channels.split_attention import split_attentions
from muntin.models.eager import call, tensors_of

DIM, DEPTH = 48, 2


class Attention(nn.Module):
    """Four heads of twelve channels; two heads of keys and values if they are `shared`. `mixing` adds up the heads' scores."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.heads, self.kv_heads = kind, 4, 2 if kind == "shared" else 4
        self.queries, self.keys = nn.Linear(DIM, DIM), nn.Linear(DIM, 24 * self.kv_heads)
        self.norm, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        queries, keys = self.queries(normed), self.keys(normed)
        if self.kind == "interleaved":  # the key and the value of a head side by side
            k, v = keys.unflatten(-1, (self.kv_heads, 2, 12)).transpose(1, 2).unbind(3)
        else:
            k, v = keys.unflatten(-1, (2, self.kv_heads, 12)).transpose(1, 3).unbind(2)
        q = queries.unflatten(-1, (self.heads, 12)).transpose(1, 2)
        if self.kind == "shared":
            k, v = k.repeat_interleave(self.heads // self.kv_heads, 1), v.repeat_interleave(self.heads // self.kv_heads, 1)
        scores = q @ k.transpose(-1, -2) / 12**0.5
        scores = scores + scores.mean(1, keepdim=True) if self.kind == "mixing" else scores
        out: Tensor = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return out


class Blocks(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, DIM, 8, stride=8)
        self.blocks, self.head = nn.Sequential(*(Attention(kind) for _ in range(DEPTH))), nn.Linear(DIM, 5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(self.patches(x).flatten(2).transpose(1, 2)).mean(1))
        return out


def timm_model() -> nn.Module:
    return timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=DIM, depth=DEPTH, num_heads=4, num_classes=5)


def torchvision_model() -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.VisionTransformer(32, 8, DEPTH, 4, DIM, 96, num_classes=5)
    nn.init.normal_(model.heads[-1].weight)  # type: ignore[index]
    return model


def transformers_model() -> nn.Module:
    import transformers

    config = transformers.ViTConfig(hidden_size=DIM, num_hidden_layers=DEPTH, num_attention_heads=4, intermediate_size=96, image_size=32,
                                    patch_size=8)  # fmt: skip
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], str, str, int]] = {
    "timm": (timm_model, "*.attn", "proj", 4),
    "torchvision": (torchvision_model, "*.self_attention", "out_proj", 4),
    "transformers": (transformers_model, "*.attention", "o_proj", 4),
    "interleaved": (lambda: Blocks("interleaved"), "blocks.*", "out", 4),
    "shared": (lambda: Blocks("shared"), "blocks.*", "out", 2),
}
"""By kind: the model, the names of its attentions, that of their projections, and the heads that can leave."""


@pytest.mark.parametrize("kind", MODELS)
def test_heads_that_nothing_reads(kind: str, tmp_path: Path) -> None:
    """The heads that leave are those that the projection does not read, so that the answer stays; then other passes."""
    if kind in ("torchvision", "transformers"):
        pytest.importorskip(kind)
    build, only, projection, heads = MODELS[kind]
    torch.manual_seed(0)
    model, x = build().eval(), pixels(4, 3, 32, 32)
    with torch.no_grad():
        for index, layer in enumerate(reading(model, projection)):
            layer.weight.unflatten(1, (heads, -1))[:, [index, heads - 1] if heads > 2 else [index]] = 0
    before, parameters = scores(model, x), count(model)
    cut = [change for change in prune(model, [x], ratio=0.5, only=(only,)) if not change.kept]
    assert len(cut) >= DEPTH and {change.done for change in cut} == {f"{heads // 2} of {heads} heads"}
    torch.testing.assert_close(scores(model, x), before, rtol=1e-4, atol=1e-4)
    assert [layer.weight.shape for layer in reading(model, projection)] == [(DIM, DIM // 2)] * DEPTH and count(model) < parameters
    again = load_compressed(save(model, tmp_path / "model"), build())
    assert torch.equal(scores(again, x), scores(model, x))
    for loaded in (model, again):
        assert all(change.kept for change in prune(loaded, [x], ratio=0.5, only=(only,)))
    assert any(not change.kept for change in low_rank(again, [x], parameters=0.9, multiple=4))
    trained = copy.deepcopy(again)
    assert any(not change.kept for change in prepare_qat(trained, [x])) and any(not change.kept for change in quantize(again, [x]))
    assert scores(again, x).shape == scores(trained, x).shape == before.shape


def reading(model: nn.Module, projection: str) -> list[nn.Linear]:
    return [layer for name, layer in model.named_modules() if name.endswith(f".{projection}") and isinstance(layer, nn.Linear)]


@torch.no_grad()
def scores(model: nn.Module, x: Tensor) -> Tensor:
    return tensors_of(call(model, x))[0]


def test_heads_that_mix() -> None:
    model, x = Blocks("mixing").eval(), pixels(2, 3, 32, 32)
    before = answer(model, x)
    changes = {change.layer: change for change in prune(model, [x], ratio=0.5)}
    assert changes["blocks.0.queries"].kept and changes["blocks.0.out"].reason == USED and torch.equal(answer(model, x), before)


def test_encoder_of_pytorch() -> None:
    """Attention heads of nn.TransformerEncoder leave; a whole attention stays as it was."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(DIM, 4, 2 * DIM, batch_first=True)
    model, x = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False).eval(), torch.randn(3, 7, DIM)
    batch = {"src": x, "src_key_padding_mask": torch.arange(7).expand(3, 7) > 4}
    kept = prune(model, [batch], ratio=0.02)
    assert all(change.kept for change in kept) and type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert "the share in multiples" in next(change.reason for change in kept if change.layer == "layers.0.self_attn")
    changes = prune(model, [batch], ratio=0.5)
    assert {change.done for change in changes if change.layer.endswith("self_attn.query")} == {"2 of 4 heads"}
    assert model.train()(**batch).shape == x.shape and model.eval()(**batch).isfinite().all()


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 8, "vdim": 12, "batch_first": True}])
def test_split_attention(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    whole = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 4, **options).eval()})
    split = copy.deepcopy(whole)
    split_attentions(split)
    shapes = [(5, 2, 16), (6, 2, options.get("kdim", 16)), (6, 2, options.get("vdim", 16))]
    query, key, value = (torch.randn(*shape) for shape in shapes)
    if options.get("batch_first"):
        query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
    masks = {"attn_mask": torch.randn(5, 6), "key_padding_mask": torch.tensor([[0.0] * 6, [0.0] * 4 + [float("-inf")] * 2])}
    for arguments in (
        {},
        {"need_weights": False},
        {**masks, "average_attn_weights": False},
        {"attn_mask": torch.randn(8, 5, 6) > 1, "need_weights": False},
    ):
        expected, answered = (model["attention"](query, key, value, **arguments) for model in (whole, split))
        torch.testing.assert_close(answered[0], expected[0])
        torch.testing.assert_close(answered[1], expected[1])
    alone = (query[0], key[0], value[0]) if options.get("batch_first") else (query[:, 0], key[:, 0], value[:, 0])
    torch.testing.assert_close(split["attention"](*alone), whole["attention"](*alone))


def test_language_model_with_shared_keys() -> None:
    """torch-pruning follows repeated keys without end: it is stopped, and the MLPs are pruned."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2)  # fmt: skip
    model = transformers.LlamaModel(config).eval()
    changes = prune(model, {"input_ids": torch.randint(0, 50, (2, 6))}, ratio=0.5)
    cut = {change.layer for change in changes if not change.kept}
    assert {"layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"} <= cut
    assert any("share their keys" in change.reason for change in changes) and model.layers[0].mlp.down_proj.in_features == 32
