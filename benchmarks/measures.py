"""What several benchmarks measure in the same way: scores of models, and latencies in turns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

import muntin
from muntin.models import TorchSession
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.training import Checkpoint
from muntin.training.checkpoint import source_of
from muntin.training.evaluation import tile_of


def score(checkpoint: Checkpoint, model: Any, split: Any = "test") -> float:
    """The score of a module or a session on a split of the data that the checkpoint was trained on."""
    source = source_of(checkpoint)
    session = TorchSession(model, checkpoint.recipe.signature(source.classes)) if isinstance(model, nn.Module) else model
    return float(muntin.evaluate(session, source.split(split), tile=tile_of(checkpoint.recipe.data.crop)).score)


def ms_in_turns(calls: Mapping[str, Any], images: Any, rounds: int) -> dict[str, float]:
    """Median milliseconds of each call, all in turns."""
    return {name: latency.median_ms for name, latency in interleaved_latency(dict(calls), images, rounds=rounds).items()}


def noise(side: int, channels: int = 3) -> NDArray[np.uint8]:
    """An image of noise (1, H, W, C)."""
    return np.random.default_rng(0).integers(0, 256, (1, side, side, channels), dtype=np.uint8)
