"""The answers of each task."""

from __future__ import annotations

from muntin.artifact.answers import Task
from muntin.tasks.base import Answering
from muntin.tasks.classify.answer import ClassAnswering
from muntin.tasks.restore.answer import RestoredAnswering
from muntin.tasks.segment.answer import MaskAnswering

ANSWERING: dict[Task, Answering] = {"segment": MaskAnswering(), "classify": ClassAnswering(), "restore": RestoredAnswering()}
