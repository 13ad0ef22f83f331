"""ModelConfig: frozen, closed, consistent."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from muntin.models import ModelConfig


def test_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig().classes = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": 0}, "greater than or equal to 1"),
        ({"classes": 256}, "less than or equal to 255"),
        ({"channels": 17}, "less than or equal to 16"),
        ({"scale": 5, "task": "restore"}, "less than or equal to 4"),
        ({"scale": 2}, "scale=2 is for task 'restore'; 'segment' answers at the input's size"),
        ({"task": "detect"}, "'segment', 'classify' or 'restore'"),
        ({"dims": (128,)}, "dims names 1 attention stages and depths 2: give as many of each"),
        ({"dims": (128, 100)}, "dim 100 must be a multiple of head_dim 64 and at least 128"),
        ({"dims": (128, 64)}, "dim 64 must be a multiple of head_dim 64 and at least 128"),
        ({"mlp_ratio": 0.001}, "mlp_ratio=0.001 leaves nothing of dim 256: give at least 0.00390625"),
        ({"dims": (), "depths": ()}, "at least 1 item"),
        ({"stem": (8, 16)}, "pairs has 2 entries for a stem of 2 stages: give one for each stage from stride 4 on, 1"),
        ({"stem": (8,), "pairs": ()}, "at least 2 items"),
        ({"finest": 16}, "4 or 8"),
        ({"depths": (1, 0)}, "greater than or equal to 1"),
        ({"mlp_ratio": 0}, "greater than 0"),
        ({"windows": 8}, "Extra inputs are not permitted"),
    ],
)
def test_impossible_values(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**fields)


def test_one_head() -> None:
    assert ModelConfig(attention="local", dims=(64,), depths=(1,)).dims == (64,)


def test_outputs() -> None:
    assert ModelConfig(classes=7).outputs == 7
    assert ModelConfig(task="restore", classes=7, channels=4, scale=2).outputs == 4
