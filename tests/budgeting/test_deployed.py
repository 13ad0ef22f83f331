"""A model and its artefact are called alike. Axes: B rows, T tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model_helpers import one_line
from muntin.budgeting.deployed import Deployed, Interface, deploy, interface_of
from muntin.errors import MuntinError


class Tokens(nn.Module):
    """Token ids and a mask to a dictionary of two answers."""

    def __init__(self, answer: str = "names") -> None:
        super().__init__()
        self.table, self.out, self.answer = nn.Embedding(20, 16), nn.Linear(16, 3), answer

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        x = self.table(ids) * mask.unsqueeze(-1)
        pooled = x.sum(1) / mask.sum(1, keepdim=True)
        return {"logits": self.out(pooled), "pooled": pooled} if self.answer == "names" else (self.out(pooled), pooled)


def tokens(rows: int, count: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"ids": torch.randint(0, 20, (rows, count), generator=generator), "mask": torch.ones(rows, count)}


def test_images(digits: Any, tmp_path: Path) -> None:
    interface = interface_of(digits.model, digits.calibration)
    assert interface.signature is not None and interface.signature.task == "classify"
    deploy(digits.model, interface, digits.calibration[0], tmp_path / "a")
    with Deployed(tmp_path / "a", interface, precision="f32") as deployed:
        images = digits.validation[0][:50]
        with torch.no_grad():
            expected = digits.model(images)
        torch.testing.assert_close(deployed(images), expected, atol=1e-3, rtol=1e-3)
        assert deployed.eval().to("cpu")(images.to(torch.uint8)).shape == (50, 10)
        assert digits.evaluate(deployed) == pytest.approx(digits.evaluate(digits.model), abs=0.005)
        assert deployed.bytes == sum(file.stat().st_size for file in (tmp_path / "a").iterdir())
        assert deployed.latency_ms(digits.calibration[0]) > 0
        with pytest.raises(MuntinError) as error:
            deployed(images[0])
    assert "a tensor of raw pixels (B, C, H, W)" in one_line(error)


def test_named_tensors_of_any_length(tmp_path: Path) -> None:
    model, batches = Tokens().eval(), [tokens(4, 5), tokens(4, 7)]
    interface = interface_of(model, batches)
    assert interface.signature is None and interface.axes == {"ids": ("batch", "size_0"), "mask": ("batch", "size_0")}
    deploy(model, interface, batches[0], tmp_path / "a")
    with Deployed(tmp_path / "a", interface, precision="f32") as deployed, torch.no_grad():
        for batch in (tokens(4, 5), tokens(3, 9, seed=1)):
            expected, answer = model(**batch), deployed(**batch)
            torch.testing.assert_close(answer["pooled"], expected["pooled"], atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(deployed(*batch.values()).logits, expected["logits"], atol=1e-4, rtol=1e-3)
        with pytest.raises(AttributeError):
            _ = answer.scores
        assert deployed.latency_ms(batches[0]) > 0
        with pytest.raises(MuntinError, match="mask is missing"):
            deployed(batches[0]["ids"])


def test_tuple_of_inputs_and_answers(tmp_path: Path) -> None:
    model, batches = Tokens("tuple").eval(), [tuple(tokens(4, 5).values())]
    interface = interface_of(model, batches)
    assert interface.names == ("ids", "mask") and interface.answer == "tuple"
    deploy(model, interface, batches[0], tmp_path / "a")
    with Deployed(tmp_path / "a", interface) as deployed:
        scores, pooled = deployed(*batches[0])
    assert scores.shape == (4, 3) and pooled.shape == (4, 16)


def test_tensor_that_is_no_picture(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    rows = torch.randn(8, 6)
    interface = interface_of(model, [rows])
    assert interface == Interface(signature=None, names=("input",), axes={"input": ("batch", None)}, answer="tensor")
    deploy(model, interface, rows.double(), tmp_path / "a")
    with Deployed(tmp_path / "a", interface, precision="f32") as deployed, torch.no_grad():
        torch.testing.assert_close(deployed(rows.double()), model(rows), atol=1e-4, rtol=1e-3)


def test_normalised_pictures_are_named_tensors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    assert interface_of(model, [torch.randn(2, 3, 8, 8)]).names == ("input",)


@pytest.mark.parametrize(
    ("batch", "words"),
    [({"ids": torch.zeros(1, 2).long(), "mask": 1.0}, "'mask' is a float"), ((torch.zeros(1, 2).long(),) * 3, "names 2")],
)
def test_batches_that_no_artefact_takes(batch: Any, words: str) -> None:
    class Scaled(Tokens):
        def forward(self, ids: Tensor, mask: float) -> Any:  # type: ignore[override]
            return self.out(self.table(ids).mean(1)) * mask

    with pytest.raises(MuntinError, match=words):
        interface_of(Scaled().eval(), [batch])
