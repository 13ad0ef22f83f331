"""Embeddings as integers: their accuracy, what stays in floats, a second run, saving, and the exported table."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

import muntin
from model_helpers import by_layer
from muntin.compression import QuantizedEmbedding
from muntin.errors import MuntinError

TOKENS, LONGEST, DIM = 3000, 40, 64


class Bert(nn.Module):
    """Token ids and a mask to one vector a row: three tables, a layer norm, attention by Linears, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(TOKENS, DIM, padding_idx=0)
        self.positions, self.kinds = nn.Embedding(LONGEST, DIM), nn.Embedding(2, DIM)
        self.norm, self.qkv, self.out = nn.LayerNorm(DIM), nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 128), nn.GELU(), nn.Linear(128, DIM))
        with torch.no_grad():
            self.words.weight[:, 3] *= 8  # a column far larger than the others, as in trained tables

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids) + self.positions(torch.arange(ids.shape[1])) + self.kinds(torch.zeros_like(ids))
        x = self.norm(x)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None].bool()).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        x = x + self.mlp(x)
        return (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def text(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, TOKENS, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    ids[0, -3:], mask[0, -3:] = 0, 0
    return {"ids": ids, "mask": mask}


BATCHES = [text(8, 16, seed) for seed in range(3)]


def answer(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**inputs)
    return out


def bert() -> nn.Module:
    torch.manual_seed(0)
    return Bert().eval()


@pytest.mark.parametrize(("bits", "least_db", "cosine"), [(3, 11, 0.95), (4, 16, 0.98), (8, 35, 0.999)])
def test_bits(bits: int, least_db: float, cosine: float) -> None:
    model, quantized = bert(), bert()
    changes = by_layer(muntin.quantize(quantized, BATCHES, embedding_bits=bits, min_sqnr_db=10), "quantize")
    assert [changes[name].done for name in ("words", "positions", "kinds")] == [f"W{bits}", "W8", "W8"]  # small tables keep 8 bits
    measured = changes["words"].sqnr_db
    assert measured is not None and measured > least_db
    words = quantized.get_submodule("words")
    assert isinstance(words, QuantizedEmbedding) and words.padding_idx == 0 and words.weight[0].abs().max() == 0
    assert len(words.integers.unique()) == (2**bits if bits < 8 else 255)
    assert torch.equal(words.scale, words.scale.half().float())
    similarity = torch.cosine_similarity(answer(quantized, BATCHES[0]), answer(model, BATCHES[0]))
    assert similarity.min() > cosine


def test_second_run_and_saving(tmp_path: Path) -> None:
    model = bert().to(torch.bfloat16)
    muntin.quantize(model, BATCHES, embedding_bits=4)
    before = answer(model, BATCHES[0])
    assert before.dtype == torch.bfloat16
    again = muntin.quantize(model, BATCHES, embedding_bits=4)
    assert all(change.kept for change in again) and by_layer(again, "quantize")["words"].reason == "already W4"
    assert torch.equal(answer(model, BATCHES[0]), before)
    loaded = muntin.load_compressed(muntin.save(model, tmp_path / "saved"), bert())
    assert torch.equal(answer(loaded, BATCHES[0]), before)
    with pytest.raises(MuntinError, match="embeddings: 'words' is no Embedding of the model"):
        other = bert()
        other.words = nn.Linear(1, 1)
        muntin.load_compressed(tmp_path / "saved", other)


class Rows(nn.Module):
    """Tables that have no integer form, each for another reason, and one that has."""

    def __init__(self) -> None:
        super().__init__()
        self.tied, self.free, self.named = (nn.Embedding(50, DIM) for _ in range(3))
        self.bound = nn.Embedding(50, DIM, max_norm=1.0)
        self.read = nn.Embedding(50, DIM)
        self.bag = nn.EmbeddingBag(50, DIM)
        self.scaled = Scaled(50, DIM)
        self.head = nn.Linear(DIM, 50, bias=False)
        self.head.weight = self.tied.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tied(ids) + self.free(ids) + self.named(ids) + self.bound(ids) + self.read(ids) + self.scaled(ids) + self.bag(ids)[:, None]
        scores: Tensor = self.head(x) + F.linear(x, self.read.weight)
        return scores


class Scaled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 8


def test_reasons() -> None:
    torch.manual_seed(0)
    model = Rows().eval()
    batch = {"ids": torch.randint(0, 50, (4, 5))}
    only = ("tied", "free", "bound", "read", "bag", "scaled", "named")
    changes = by_layer(muntin.quantize(model, [batch], only=only, keep=("named",), embedding_bits=4), "quantize")
    reasons = {
        "tied": "its weight is also that of head", "bound": "max_norm=1 changes its rows when they are read",
        "read": "reads an embedding's weight", "bag": "EmbeddingBag: no integer form", "scaled": "no integer form",
        "named": "named in keep",
        "head": "not named in only",
    }  # fmt: skip
    for name, reason in reasons.items():
        assert changes[name].kept and reason in changes[name].reason, changes[name]
    assert [name for name, layer in model.named_modules() if isinstance(layer, QuantizedEmbedding)] == ["free"]


def test_wrong_bits_and_values() -> None:
    model = bert()
    for bits in (1, 16, 4.0, True, {"words": 9}):
        with pytest.raises(MuntinError, match="give a whole number from 2 to 8, or None"):
            muntin.quantize(model, BATCHES, embedding_bits=bits)  # type: ignore[arg-type]
    with pytest.raises(MuntinError, match="embedding_bits: verbs: no embedding of the model; it has words, "):
        muntin.quantize(model, BATCHES, embedding_bits={"verbs": 4})
    named = by_layer(muntin.quantize(copy.deepcopy(model), BATCHES, embedding_bits={"words": 5}), "quantize")
    assert named["words"].done == "W5" and named["positions"].reason == "not named in embedding_bits"
    with pytest.raises(MuntinError, match="only names no layer: words"):
        muntin.quantize(model, BATCHES, only=("words",))
    noisy = by_layer(muntin.quantize(copy.deepcopy(model), BATCHES, embedding_bits=2), "quantize")["words"]
    assert noisy.kept and "2 bits leave" in noisy.reason
    with torch.no_grad():
        model.get_parameter("words.weight")[1] = float("nan")
    with pytest.raises(MuntinError, match="'words': the weight holds NaN"):
        muntin.quantize(model, BATCHES, embedding_bits=4)
    assert isinstance(model.get_submodule("mlp.0"), nn.Linear)


def test_training_and_artifact(tmp_path: Path) -> None:
    model, teacher = bert(), bert()
    muntin.quantize(model, BATCHES, only=("words", "positions", "kinds"), embedding_bits=4)
    muntin.low_rank(model, BATCHES, parameters=0.9, multiple=8)
    muntin.prepare_qat(model, BATCHES, bits=4)
    with pytest.raises(MuntinError, match="in quantisation-aware training"):
        muntin.export(model, text(2, 9, 5), tmp_path / "a")
    muntin.distil(model, teacher, BATCHES, steps=3, loss="features")
    muntin.freeze(model, BATCHES)
    axes = {"ids": ("batch", "tokens"), "mask": ("batch", "tokens")}
    artifact = muntin.export(model, text(2, 9, 5), tmp_path / "a", axes=axes)
    assert muntin.verify(artifact.path).passed
    layers = {record.name: record for record in artifact.manifest.layers}
    assert {record.weight_bits for record in artifact.manifest.layers if record.activation_bits} == {4} and "out.reduce" in layers
    tables = {name: record for name, record in artifact.manifest.tensors.items() if record.shape[:1] == (TOKENS,)}
    assert sorted((record.bits, record.shape) for record in tables.values()) == [(4, (TOKENS, DIM)), (16, (TOKENS, DIM // 32))]
    assert [entry["done"] for entry in artifact.manifest.passes if entry["layer"] == "words"] == ["W4"]
    assert sum(file.stat().st_size for file in artifact.path.iterdir()) < sum(p.nbytes for p in teacher.parameters()) / 4
    for engine in ("openvino", "onnxruntime"):
        session = muntin.load(artifact.path, engine=engine)  # type: ignore[arg-type]
        for rows, length in ((1, 5), (4, 33)):
            inputs = text(rows, length, 9)
            due = answer(model, inputs).numpy()
            output = session({name: tensor.numpy() for name, tensor in inputs.items()})["output"]
            assert np.abs(output - due).max() < 0.05 * due.std()
