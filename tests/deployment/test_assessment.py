"""The side that a run is timed at: what its model finds the memory for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from muntin.artifact import ClassInfo, Signature
from muntin.deployment.assessment import affordable_side
from muntin.models import TorchSession

CLASSES = tuple(ClassInfo(name=name, color=(9, 9, 9)) for name in "ab")
IMAGE = np.zeros((50, 70, 3), np.uint8)


class Greedy(nn.Module):
    """Wants 2^60 bytes for more than `most` pixels a side, which no machine gives."""

    def __init__(self, most: int, error: Exception | None = None) -> None:
        super().__init__()
        self.most, self.error = most, error
        self.sides: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sides.append(x.shape[-1])
        if x.shape[-1] > self.most:
            if self.error is not None:
                raise self.error
            torch.empty(1 << 60, dtype=torch.uint8)
        return x[:, :2]


def session(model: nn.Module) -> TorchSession:
    return TorchSession(model, Signature(task="segment", channels=3, classes=CLASSES))


@pytest.mark.parametrize(
    ("most", "side", "sides"),
    [(64, 64, [64]), (63, 32, [64, 32]), (16, 24, [64, 32])],  # at the crop, which training took, nothing is tried
)
def test_the_side_is_halved_down_to_the_crop_where_memory_is_out(most: int, side: int, sides: list[int]) -> None:
    model = Greedy(most)
    assert affordable_side(session(model), IMAGE, 64, least=24) == side
    assert model.sides == sides


def test_another_error_is_no_want_of_memory() -> None:
    with pytest.raises(RuntimeError, match="sizes"):
        affordable_side(session(Greedy(16, RuntimeError("sizes of tensors must match"))), IMAGE, 64, least=24)
