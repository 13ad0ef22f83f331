"""A small space of networks, and the fields that it does not name."""

from __future__ import annotations

import random

from muntin.models import ModelConfig
from muntin.searching.space import Architecture, Space, UnbuildableError

CHOICES = {
    "stem": [[4, 8, 8], [8, 8, 16], [8, 16]],
    "pairs": [[1, 0], [1, 1], [1]],
    "stages": [1, 2],
    "dims.0": [32, 64],
    "dims.1": [32, 48],
    "depths.0": [1, 2],
    "attention": ["hybrid", "local", "global", "dense"],
    "block": ["parallel", "serial"],
    "latents": [2, 4],
    "window": [2, 4],
    "mlp_ratio": [1, 2],
    "gate": [True, False],
    "latent_share": [0.5, 0.75],
    "fusion": ["progressive", "one-step", "upernet"],
    "finest": [2, 4, 8],
}
"""Every kind of choice of a network. A stem of two stages needs one pair, so some combinations make no network."""


def base_of(task: str) -> ModelConfig:
    """The fields that the small space does not name."""
    fields = {"stem": (8, 8, 16), "pairs": (1, 1), "dims": (32, 32), "depths": (1, 1), "head_dim": 16, "window": 4, "latents": 4}
    return ModelConfig.model_validate({**fields, "task": task, "classes": 3, "decoder": 16})


def drawn(space: Space, base: ModelConfig, count: int) -> list[Architecture]:
    """Some random networks of a space."""
    generator, found = random.Random(0), dict[str, Architecture]()  # noqa: S311 - no secret
    while len(found) < count:
        try:
            one = space.architecture({name: generator.choice(values) for name, values in space.choices.items()}, base)
        except UnbuildableError:
            continue
        found[one.key] = one
    return list(found.values())
