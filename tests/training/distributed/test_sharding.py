"""Shardings of a model: the same training as in one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from torch import nn

from muntin.errors import RecipeError
from muntin.training.config import TrainingConfig
from muntin.training.distributed.ranks import Ranks
from muntin.training.distributed.sharding import rows_each
from muntin.training.recipe import parse_recipe
from muntin.training.weights import new_model
from rank_processes import Plain, curves, run_ranks

STEPS = 8
RUNS: dict[str, dict[str, Any]] = {
    "none": {"steps": STEPS},
    "zero1": {"steps": STEPS, "sharding": "zero1"},
    "zero2": {"steps": STEPS, "sharding": "zero2", "micro_batch": 3, "checkpointing": "full"},
    "zero3": {"steps": STEPS, "sharding": "zero3", "checkpointing": "selective"},
    "quantized": {"steps": 3, "sharding": "zero3", "quantized": True},
    "hybrid zero2": {"steps": 3, "sharding": "zero2", "norm_group": 3, "hybrid": True},
    "hybrid zero3": {"steps": 3, "sharding": "zero3", "norm_group": 3, "hybrid": True, "checkpointing": "full"},
}


def test_curves_of_two_processes() -> None:
    """Those of one process. Quantised: up to values that a last bit rounds to another step of a grid."""
    plain, quantized, hybrid = curves({"steps": STEPS}, {"steps": 3, "quantized": True}, {"steps": 3, "norm_group": 3, "hybrid": True})
    for answers in run_ranks(2, curves, *RUNS.values()):
        for name, (losses, weights, held) in zip(RUNS, answers, strict=True):
            alone, tolerance = {"quantized": (quantized, 1e-3), "hybrid": (hybrid, 1e-5)}.get(name.split()[0], (plain, 1e-5))
            np.testing.assert_allclose(losses, alone[0], rtol=0, atol=tolerance, err_msg=name)
            assert weights.keys() == alone[1].keys()
            for key, value in weights.items():
                if "running_" in key:  # averages over time of what each process has seen
                    continue
                # of a hybrid, some parameters have gradients of rounding errors alone, which AdamW divides by their size
                np.testing.assert_allclose(
                    value, alone[1][key], rtol=0, atol=1e-3 if alone is hybrid else tolerance, err_msg=f"{name}: {key}"
                )
            assert held == alone[2] if name == "none" else held < 0.65 * alone[2]


class _Several(Ranks):
    def __init__(self, count: int) -> None:
        self.count = count


@pytest.mark.parametrize(
    ("make", "batch", "message"),
    [
        (Plain, 10, "batch_size 10 cannot be divided by 4 processes: give a multiple of 4"),
        (lambda: nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), 8, "batch norms take the whole batch"),
        (None, 24, "batch_size 24 cannot be divided by 4 processes, 8 for its norms in each: give a multiple of 32"),
    ],
)
def test_batch_that_cannot_be_divided(make: Any, batch: int, message: str) -> None:
    recipe = parse_recipe({"name": "one", "model": {"name": "hybrid-xxs"}}, where="test")
    model = new_model(recipe, ()) if make is None else make()
    with pytest.raises(RecipeError, match=message):
        rows_each(model, batch, _Several(4))
    assert rows_each(model, batch, Ranks()) == batch


@pytest.mark.parametrize("options", [{"gate_budget": 0.5}, {"precision": "fp16"}, {"compile": True}])
def test_options_without_sharding(options: dict[str, Any]) -> None:
    for sharding in ("zero2", "zero3"):
        with pytest.raises(ValueError, match=f"sharding {sharding} with {next(iter(options))} .*: take sharding zero1 or none"):
            TrainingConfig.model_validate({"sharding": sharding} | options)
    assert TrainingConfig.model_validate({"sharding": "zero1"} | options).sharding == "zero1"
