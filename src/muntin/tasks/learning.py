"""The training of each task."""

from __future__ import annotations

from muntin.artifact.answers import Task
from muntin.tasks.base_learning import Learning
from muntin.tasks.classify.learning import ClassLearning
from muntin.tasks.restore.learning import RestoredLearning
from muntin.tasks.segment.learning import MaskLearning

LEARNING: dict[Task, Learning] = {"segment": MaskLearning(), "classify": ClassLearning(), "restore": RestoredLearning()}
