"""The reference of an artefact: statistics of its training pictures, and the effect sizes above which a batch counts as drifted.

The effect size of a batch is the Mahalanobis distance of its mean features from those of the reference, without the part that a batch of
this size has by chance:

    z     = (mean of the batch - mean of the reference) / standard deviation of the reference, by feature
    d^2   = z' C^-1 z - F / n            C: correlations of the features, shrunk; F: number of features; n: pictures in the batch
    d     = sqrt(max(0, d^2))            0 without drift, in standard deviations, and unlike a p-value not larger for a larger batch

The threshold of each n is the `QUANTILE` of the effect sizes of random batches of the reference itself, each compared with the pictures
that are not in it. This is Hotelling's T^2 with the chi-square law replaced by a measured one, as features are neither normal nor
independent. Beyond the largest calibrated n the threshold stays: a difference that is too small for it does not become an alarm in more
pictures.

Axis letters: N pictures of the reference, n of a batch, F features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from muntin.artifact import Artifact, Signature
from muntin.artifact.manifest import field_error
from muntin.artifact.store import with_optional_file
from muntin.errors import ArtifactError, DataError
from muntin.tasks.base import Floats, PictureFeature
from muntin.updating.drift.features import feature_list

FILE: Literal["drift.json"] = "drift.json"
FORMAT: Literal[1] = 1
BATCHES = (8, 16, 32, 64, 128, 256)
"""Sizes of batches that are calibrated, pictures."""
LEAST = BATCHES[0]
"""Least pictures of a batch."""
REFERENCE_PICTURES = 512
"""Pictures, or windows of pictures, of a reference."""
LEAST_REFERENCE = 64
"""Least pictures of a reference."""
QUANTILE = 0.99
"""Share of the reference's own batches that raise no alarm."""
ROUNDS = 1000
"""Random batches of each size."""
SHRINKAGE = 0.001
"""Part by which correlations of different features are made smaller: shares of classes add up to 1, so without it they have no inverse."""
_DIGITS = 6


class DriftReference(BaseModel):
    """The content of `drift.json`.

    `mean`, `deviation`: (F,). `correlation`: (F, F), shrunk. `batches`: calibrated sizes; `thresholds`: effect size of each; `changes`: of
    each, the largest change of a single feature, in standard deviations. `pictures`: N.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal[1] = FORMAT
    pictures: Annotated[int, Field(ge=LEAST_REFERENCE)]
    features: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[Annotated[float, Field(gt=0)], ...]
    correlation: tuple[tuple[float, ...], ...]
    batches: tuple[Annotated[int, Field(ge=1)], ...]
    thresholds: tuple[Annotated[float, Field(ge=0)], ...]
    changes: tuple[Annotated[float, Field(ge=0)], ...]

    @model_validator(mode="after")
    def _sizes_agree(self) -> Self:
        F, sizes = len(self.features), len(self.batches)
        lengths = {len(self.mean), len(self.deviation), len(self.correlation), *map(len, self.correlation)}
        if lengths != {F} or not sizes or {len(self.thresholds), len(self.changes)} != {sizes}:
            raise ValueError(f"{F} features and {sizes} sizes of batches, but lists of other lengths")
        if list(self.batches) != sorted(set(self.batches)):
            raise ValueError(f"sizes of batches {self.batches}: they must increase")
        return self

    def threshold(self, count: int) -> float:
        """Effect size above which a batch of `count` pictures is drift."""
        return _at(count, self.batches, self.thresholds)

    def largest_change(self, count: int) -> float:
        """Change of a single feature, in standard deviations, that a batch of `count` pictures has by chance."""
        return _at(count, self.batches, self.changes)


@dataclass(frozen=True)
class FeatureMoments:
    """Mean (F,), standard deviation (F,) and inverse correlations (F, F) of features."""

    mean: Floats
    deviation: Floats
    inverse: Floats

    @classmethod
    def of(cls, reference: DriftReference) -> Self:
        return cls(np.array(reference.mean), np.array(reference.deviation), np.linalg.inv(np.array(reference.correlation)))

    def changes(self, features_nF: Floats) -> Floats:
        """Return the change of each feature's mean (F,), in standard deviations."""
        changes: Floats = (features_nF.mean(0) - self.mean) / self.deviation
        return changes

    def effect(self, features_nF: Floats) -> float:
        """Return the effect size of a batch."""
        z = self.changes(features_nF)
        return math.sqrt(max(0.0, float(z @ self.inverse @ z) - len(z) / len(features_nF)))

    def distances(self, features_nF: Floats) -> Floats:
        """Return the distance of each picture (n,); its root mean square over the reference is about 1."""
        z_nF = (features_nF - self.mean) / self.deviation
        distances: Floats = np.sqrt(np.maximum(0, np.einsum("nf,fg,ng->n", z_nF, self.inverse, z_nF)) / z_nF.shape[1])
        return distances


def make_reference(features_NF: Floats, features: Sequence[PictureFeature], *, seed: int = 0) -> DriftReference:
    """Return the reference of pictures, described by `features`. Costs about three seconds for 512 pictures and 20 features.

    Batches of more than half of the pictures are not calibrated. Raises DataError for fewer than `LEAST_REFERENCE` pictures.
    """
    count = len(features_NF)
    if count < LEAST_REFERENCE:
        raise DataError(f"{count} pictures: a reference takes at least {LEAST_REFERENCE}, of which 256 and more give a sharper one")
    generator, least = np.random.default_rng(seed), np.array([feature.least for feature in features])
    batches = [size for size in BATCHES if size <= count // 2]
    quantiles = []
    for size in batches:
        effects, largest = [], []
        for _ in range(ROUNDS):
            order = generator.permutation(count)
            batch_nF = features_NF[order[:size]]
            moments, _ = _moments(features_NF[order[max(size, count // 4) :]], least)
            effects.append(moments.effect(batch_nF))
            largest.append(float(np.abs(moments.changes(batch_nF)).max()))
        quantiles.append((float(np.quantile(effects, QUANTILE)), float(np.quantile(largest, QUANTILE))))
    moments, correlation = _moments(features_NF, least)
    thresholds, changes = np.minimum.accumulate(np.array(quantiles), axis=0).T  # a larger batch has no more by chance
    return DriftReference(
        pictures=count, features=tuple(feature.name for feature in features), mean=_rounded(moments.mean),
        deviation=_rounded(moments.deviation), correlation=tuple(map(_rounded, correlation)), batches=tuple(batches),
        thresholds=_rounded(thresholds), changes=_rounded(changes),
    )  # fmt: skip


def write_reference(artifact: Artifact, reference: DriftReference) -> None:
    """Write a reference into an artefact, in place of an earlier one; the artefact's digest changes. Raises ArtifactError."""
    with_optional_file(artifact, FILE, reference.model_dump_json().encode() + b"\n")


def read_reference(artifact: Artifact, signature: Signature) -> DriftReference | None:
    """Return the reference of an artefact, or None. Raises ArtifactError for one that is damaged or of other features."""
    content = artifact.optional_file(FILE)
    if content is None:
        return None
    where = artifact.path / FILE
    try:
        reference = DriftReference.model_validate_json(content)
    except ValidationError as error:
        raise ArtifactError(f"{where}: {field_error(error)}: make it again by `muntin drift ARTIFACT --reference RUN`") from error
    if _kinds(reference.features) != _kinds(feature.name for feature in feature_list(signature)):
        raise ArtifactError(f"{where}: other features than this muntin measures: make it again by `muntin drift ARTIFACT --reference RUN`")
    return reference


def _kinds(features: Iterable[str]) -> list[str]:
    """Return the names of features without those of the classes, which `muntin relabel` may change."""
    return ["class" if name.startswith("class ") else name for name in features]


def _moments(features_NF: Floats, least_F: Floats) -> tuple[FeatureMoments, Floats]:
    """Return the moments, and the shrunk correlations (F, F). `least_F`: as of `PictureFeature`."""
    count, mean = len(features_NF), features_NF.mean(0)
    deviation = np.maximum(features_NF.std(0), least_F / math.sqrt(count))
    z_NF = (features_NF - mean) / deviation
    correlation = (1 - SHRINKAGE) * (z_NF.T @ z_NF) / count
    np.fill_diagonal(correlation, 1)  # also of features with the least deviation
    return FeatureMoments(mean, deviation, np.linalg.inv(correlation)), correlation


def _at(count: int, sizes: Sequence[int], values: Sequence[float]) -> float:
    """Interpolate between sizes; beyond the last one its value stays."""
    return float(np.interp(np.log(count), np.log(sizes), values))


def _rounded(values: Sequence[float] | Floats) -> tuple[float, ...]:
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values)
