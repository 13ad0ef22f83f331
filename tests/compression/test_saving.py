from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from model_helpers import answer, pixels
from muntin import create_model, load_compressed, low_rank, prepare_qat, quantize, save
from muntin.errors import ArtifactError, CheckpointError, MuntinError

X = torch.randn(16, 12)


class Tied(nn.Module):
    """Two Linears with one weight, a buffer that is not saved, and a counter."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first, self.one, self.other, self.last = (
            nn.Linear(12, width),
            *(nn.Linear(width, width) for _ in range(2)),
            nn.Linear(width, 3),
        )
        self.other.weight = self.one.weight
        self.register_buffer("shift", torch.ones(1), persistent=False)
        self.register_buffer("calls", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.relu(self.other(self.one(torch.relu(self.first(x + self.shift.to(x.dtype)))))))
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_types_and_shared_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Tied().to(dtype).eval()
    low_rank(model, [X], parameters=0.9, multiple=2)
    again = load_compressed(save(model, tmp_path / "m"), Tied())
    assert torch.equal(answer(again, X.to(dtype)), answer(model, X.to(dtype)))
    assert {parameter.dtype for parameter in again.parameters()} == {dtype}
    assert again.get_parameter("one.weight").data_ptr() == again.get_parameter("other.weight").data_ptr()
    assert (tmp_path / "m" / "model.safetensors").stat().st_size < 1.2 * sum(p.nbytes for p in model.parameters()) + 4000


@pytest.mark.parametrize("gate", [False, True])
def test_hybrid_network(gate: bool, tmp_path: Path) -> None:
    options = {"depths": (1,), "dims": (32,), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16, "gate": gate}
    models = [create_model("hybrid-xs", classes=3, options=options).eval() for _ in range(2)]
    x = pixels(1, 3, 32, 32)
    low_rank(models[0], [x], parameters=0.8, multiple=4)
    prepare_qat(models[0], [x], bits=4, keep=("head",))
    assert torch.equal(answer(load_compressed(save(models[0], tmp_path / "m"), models[1]), x), answer(models[0], x))


def test_other_models_and_damage(tmp_path: Path) -> None:
    model = Tied().eval()
    quantize(model, [X], bits=6)
    folder = save(model, tmp_path / "m")
    with pytest.raises(MuntinError, match="'first' is no Linear, Conv2d or product of the model"):
        load_compressed(folder, nn.Sequential(nn.Linear(12, 3)))
    wider = save(nn.Linear(4, 3), tmp_path / "wider")
    with pytest.raises(MuntinError, match="saved of Linear, and this is Linear: the tensors differ"):
        load_compressed(wider, nn.Linear(5, 3))
    with pytest.raises(CheckpointError, match=r"give a folder that muntin\.save wrote"):
        load_compressed(tmp_path / "none", Tied())
    record = json.loads((folder / "compression.json").read_text())
    (folder / "compression.json").write_text(json.dumps(record | {"format": 2}))
    with pytest.raises(CheckpointError, match="of a newer version"):
        load_compressed(folder, Tied())
    (folder / "compression.json").write_text(json.dumps(record))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="is not the file that was saved"):
        load_compressed(folder, Tied())
    assert save(model, folder) == folder
    (folder / "mine.txt").write_text("kept")
    with pytest.raises(ArtifactError, match=r"mine\.txt"):
        save(model, folder)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_norms_folded_before_or_after_factoring(order: tuple[int, int], tmp_path: Path) -> None:
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=torch.Generator().manual_seed(0)).float()
    model = create_model("hybrid-xxs", classes=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    passes = (lambda: quantize(model, [images]), lambda: low_rank(model, [images], parameters=0.6))
    for number in order:
        passes[number]()
    again = load_compressed(save(model, tmp_path / "m"), create_model("hybrid-xxs", classes=3))
    assert torch.equal(answer(again, images), answer(model, images))
