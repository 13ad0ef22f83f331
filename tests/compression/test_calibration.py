"""Calibration batches: lists, loaders of inputs with labels, and streams without an end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from muntin.compression import distil, freeze, low_rank, prepare_qat, quantize
from muntin.compression.calibration import LARGEST_CALIBRATION, calibration_list
from muntin.errors import MuntinError

IMAGES, LABELS = torch.randint(0, 256, (6, 3, 8, 8), dtype=torch.uint8), torch.arange(6)


class Takes(nn.Module):
    """A model whose `forward` is a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def test_labels_by_the_parameters_of_forward() -> None:
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    images = calibration_list(loader, Takes(lambda x: x))
    assert [batch.shape[0] for batch in images if isinstance(batch, Tensor)] == [4, 2]
    pairs = calibration_list(loader, Takes(lambda x, y: x))
    assert all(isinstance(batch, tuple) and torch.equal(batch[1], LABELS[:4]) for batch in pairs[:1])
    assert all(len(batch) == 2 for batch in calibration_list(loader, Takes(lambda *inputs: inputs)))
    (ids,) = calibration_list([(LABELS[None], LABELS)], Takes(lambda ids: ids))
    assert isinstance(ids, tuple) and len(ids) == 1  # a tensor alone would be cast to floats
    with pytest.raises(
        MuntinError, match=r"holds 2 elements, and the model's forward requires 1 and may take mask: give .*\[x for x, _ in loader\]"
    ):
        calibration_list(loader, Takes(lambda x, mask=None: x))


def test_endless_loader_and_long_list() -> None:
    batches = calibration_list((IMAGES for _ in itertools.count()), nn.Identity())
    assert len(batches) == -(-LARGEST_CALIBRATION // len(IMAGES))
    assert len(calibration_list([IMAGES] * 100, nn.Identity())) == 100


def test_passes_on_a_loader_with_labels() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 6))
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(192, 6))
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=3)
    assert low_rank(model, loader, parameters=0.9, multiple=4)
    assert prepare_qat(model, loader)
    assert distil(model, teacher, loader, steps=2).steps == 2
    freeze(model, loader)
    assert all(change.kept for change in quantize(model, loader, bits=4))
