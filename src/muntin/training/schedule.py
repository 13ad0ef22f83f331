"""How far a run of training is, in steps or in time, and the learning rate there.

A run has two limits, `training.steps` and, where it is given, `training.minutes`; what is nearer to its end drives the schedule. So a run
of "as many steps as fit into half an hour" warms up, falls and ends like one of a fixed number of steps.
"""

from __future__ import annotations

import math

from muntin.training.config import TrainingConfig


def share_done(config: TrainingConfig, step: float, seconds: float) -> float:
    """Of the run, 0 to 1, after `step` steps that took `seconds`."""
    in_steps = step / config.steps if config.steps else 1.0
    if config.minutes is None:
        return min(1.0, in_steps)
    return min(1.0, max(in_steps, seconds / (60 * config.minutes) if config.minutes else 1.0))


def steps_expected(config: TrainingConfig, step: int, seconds: float) -> int:
    """Of the whole run, as far as its pace so far tells."""
    return max(step, min(config.steps, round(step / max(share_done(config, step, seconds), 1e-9)))) if step else config.steps


def learning_rate(done: float, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to the final one, where `done` of the run is behind."""
    if done < config.warmup:
        return config.learning_rate * done / config.warmup
    falling = 0.5 * (1 + math.cos(math.pi * (done - config.warmup) / (1 - config.warmup)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * falling
