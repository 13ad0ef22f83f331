"""The choice among a run's artefacts, and the numbers that it rests on. Whole comparisons: tests/cli/test_compare.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from muntin.deployment.artifact_comparison import choose, equal_labels, middle_window, torch_threads


def row(name: str, validation: float, ms: float, size: int, test: float = 0.5) -> dict[str, Any]:
    return {"name": name, "validation": validation, "median_ms": ms, "bytes": size, "test": test}


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([row("slow", 0.7, 9, 1), row("fast", 0.7, 5, 9)], "fast"),
        ([row("best", 0.5, 9, 9), row("within", 0.49, 5, 9), row("below", 0.489, 1, 1)], "within"),
        ([row("best", 0.7, 9, 1), row("fast", 0.68, 1, 1)], "best"),
        ([row("fastest", 0.7, 100, 9), row("as fast", 0.7, 110, 5), row("smaller", 0.7, 111, 1)], "as fast"),
        ([row("validated", 0.7, 5, 5, test=0.1), row("tested", 0.6, 1, 1, test=0.9)], "validated"),
    ],
    ids=["the fastest", "at the margin", "none within the margin", "equal latency", "the test score does not count"],
)
def test_choice(rows: list[dict[str, Any]], name: str) -> None:
    assert choose(rows, 0.01)["name"] == choose(rows[::-1], 0.01)["name"] == name


def test_equal_labels_without_ignored_pixels() -> None:
    target = np.array([[0, 1], [1, 255]], np.uint8)
    samples: Any = [SimpleNamespace(target=target, labels=target)] * 2
    one = [np.array([[0, 0], [1, 0]], np.uint8)] * 2
    other = [np.array([[0, 0], [1, 1]], np.uint8), np.array([[1, 1], [1, 0]], np.uint8)]
    assert equal_labels(samples, one, other, "segment") == 4 / 6
    classified: Any = [SimpleNamespace(target=3)] * 2
    assert equal_labels(classified, [np.array([3])] * 2, [np.array([3]), np.array([1])], "classify") == 0.5


@pytest.mark.parametrize(("shape", "corner"), [((8, 8, 1), (2, 2)), ((3, 8, 1), (0, 2))])
def test_middle_window(shape: tuple[int, int, int], corner: tuple[int, int]) -> None:
    image = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    window = middle_window(image, 4)
    assert window.shape == (4, 4, 1)
    assert window[0, 0] == image[corner]


def test_torch_threads() -> None:
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
