"""Training: recipes, the loop, checkpoints, evaluation."""

from muntin.tasks.scores import TaskScores
from muntin.training.checkpoint import Checkpoint, find_checkpoint, read_checkpoint
from muntin.training.config import ModelChoice, QuantizationConfig, TrainingConfig
from muntin.training.evaluation import evaluate
from muntin.training.fitting import FitResult, fit
from muntin.training.progress.report import FitProgress
from muntin.training.recipe import Recipe, load_recipe, parse_recipe

__all__ = [
    "Checkpoint",
    "FitProgress",
    "FitResult",
    "ModelChoice",
    "QuantizationConfig",
    "Recipe",
    "TaskScores",
    "TrainingConfig",
    "evaluate",
    "find_checkpoint",
    "fit",
    "load_recipe",
    "parse_recipe",
    "read_checkpoint",
]
