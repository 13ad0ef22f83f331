"""Running a model over calibration images."""

from __future__ import annotations

import torch
from torch import nn

from muntin.models.eager import as_input


def test_input_type_and_device() -> None:
    batch = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert as_input(nn.Conv2d(3, 3, 1).double(), batch).dtype == torch.float64
    assert as_input(nn.BatchNorm2d(3, affine=False).double(), batch).dtype == torch.float64
    assert as_input(nn.Identity(), batch).dtype == torch.float32
