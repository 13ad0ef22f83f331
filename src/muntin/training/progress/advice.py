"""Advice on a run whose loss or score went wrong."""

from __future__ import annotations

from pathlib import Path

from muntin.training.checkpoint import checkpoints_in, step_name
from muntin.training.config import TrainingConfig


def after_collapse(text: str, config: TrainingConfig, *, result: str) -> str:
    """A note on a collapse that `text` describes. `result`: what the run's result is, '' while the run goes on."""
    gates = f" or training.gate_budget ({config.gate_budget:g}) too low" if config.gate_budget < 1 else ""
    return (
        f"{text}: the learning rate (now {config.learning_rate:g}) is probably too high{gates}; train anew with another one"
        f"{result and f'; {result}'}"
    )


def where_best(step: int, newest: Path, *, kept: bool) -> str:
    """Say where the weights of the best step are. `newest`: the last checkpoint. `kept`: the result has them."""
    if kept:
        return f"the result has the weights of step {step}, of the best score"
    path = next((path for path in checkpoints_in(newest.parent) if path.name == step_name(step)), None)
    return f"the checkpoint of step {step} is not kept" if path is None else f"{path} has the best score"


def lower_rate(config: TrainingConfig, *, of_candidate: bool, resumable: bool) -> str:
    """Advice after the loss has diverged. `of_candidate`: of compression. `resumable`: if there is a checkpoint."""
    rate, final = config.learning_rate, config.final_learning_rate
    if of_candidate:
        return f"lower learning_rate in compression (now {rate:g}) and compress anew, into another --output"
    lower = f"{rate / 4:.2g}"
    words = ["--set", f"training.learning_rate={lower}"]
    words += ["--set", f"training.final_learning_rate={lower}"] if final > float(lower) else []
    again = "go on from the last checkpoint, by --resume" if resumable else "train anew, by"
    return f"lower training.learning_rate (now {rate:g}) and {again} {' '.join(words)}"
