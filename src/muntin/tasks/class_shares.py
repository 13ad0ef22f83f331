"""Shares of classes as features and figures, for tasks whose answers are classes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.tasks.base import Floats, PictureFeature

MAX_CLASSES = 64
"""Number of classes whose shares are features; those of further classes are added up in one."""


def share_features(signature: Signature, *, least: float) -> list[PictureFeature]:
    """Return a feature for the share of each class. `least`: as of `PictureFeature`."""
    names = [f"class {entry.name}" for entry in signature.classes]
    if len(names) > MAX_CLASSES:
        names[MAX_CLASSES - 1 :] = [f"{len(names) - MAX_CLASSES + 1} further classes"]
    return [PictureFeature(name=name, more="more frequent", less="rarer", unit="share", least=least) for name in names]


def class_shares(labels: NDArray[np.intp], classes: int) -> Floats:
    """Return the values of `share_features`."""
    shares = np.bincount(labels.ravel(), minlength=classes) / labels.size
    return np.append(shares[: MAX_CLASSES - 1], shares[MAX_CLASSES - 1 :].sum()) if classes > MAX_CLASSES else shares


def probabilities(scores_K: NDArray[np.float32]) -> NDArray[Any]:
    """Return the softmax of scores."""
    weights = np.exp(scores_K - scores_K.max())
    shares: NDArray[Any] = weights / weights.sum()
    return shares
