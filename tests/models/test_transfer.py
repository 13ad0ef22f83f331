"""Pipelined batches: order, separate answers, bounded number in flight. On a GPU with real copies."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from muntin.artifact import ClassInfo, Signature
from muntin.errors import DataError
from muntin.models import TorchSession, create_model
from muntin.models.transfer import BUFFERS, pipelined

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))]


def batches(count: int, read: list[int]) -> Iterator[NDArray[np.uint8]]:
    for index in range(count):
        read.append(index)
        yield np.full((1 + index % 3, 4, 5, 3), index, np.uint8)


def double(images_BHWC: Tensor) -> Tensor:
    return images_BHWC.float() * 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_order_of_answers(device: str, count: int) -> None:
    answers = list(pipelined(batches(count, []), double, torch.device(device)))
    assert len(answers) == count
    for index, answer in enumerate(answers):
        np.testing.assert_array_equal(answer, np.full((1 + index % 3, 4, 5, 3), 2 * index, np.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_batches_in_flight(device: str) -> None:
    read: list[int] = []
    answers = pipelined(batches(20, read), double, torch.device(device))
    for done in range(1, 6):
        next(answers)
        assert len(read) == done + BUFFERS - 1


def test_session_map() -> None:
    signature = Signature(task="segment", channels=3, classes=(ClassInfo(name="a", color=(0, 0, 0)), ClassInfo(name="b", color=(9, 9, 9))))
    session = TorchSession(create_model("hybrid-xs"), signature)
    images = [np.random.default_rng(seed).integers(0, 256, (1, 32, 32 + seed, 3), dtype=np.uint8) for seed in range(3)]
    for one, other in zip(session.map(images), map(session, images), strict=True):
        np.testing.assert_array_equal(one, other)
    answers = session.map([images[0], images[0][0]])
    with pytest.raises(DataError, match="shape"):
        list(answers)
