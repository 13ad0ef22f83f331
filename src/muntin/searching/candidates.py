"""Scores of architectures with the shared weights: slices -> statistics of the norms -> deployed form -> the validation split.

Costs a forward pass over `NORM_IMAGES` crops and one over the validation split; with ranks or bits their passes of compression, too.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

from torch import Tensor

from muntin.compression import low_rank, quantize
from muntin.data import Source, calibration_batches
from muntin.errors import MuntinError
from muntin.layers.norm import GROUP
from muntin.models import HybridNet, TorchSession
from muntin.searching.space import Architecture, UnbuildableError
from muntin.searching.supernet import Supernet
from muntin.searching.supernet_training import resized
from muntin.training.evaluation import evaluate, tile_of
from muntin.training.norm_recalibration import renew_statistics
from muntin.training.precision import TrainingPrecision
from muntin.training.recipe import Recipe

NORM_IMAGES = 64
"""Training crops from which the statistics of a candidate's norms are taken."""


class CandidateScorer:
    """Scores architectures on the validation split. Bits and ranks that an architecture names are applied to it before."""

    def __init__(self, supernet: Supernet, recipe: Recipe, source: Source, precision: TrainingPrecision) -> None:
        self.supernet, self.recipe, self.precision = supernet.eval(), recipe, precision
        self.validation, self.classes = source.split("validation"), tuple(source.classes)
        group = min(GROUP, recipe.training.norm_group or GROUP)
        batches = calibration_batches(
            source.split("train"), task=recipe.task, crop=recipe.data.crop, count=NORM_IMAGES, batch_size=group, seed=recipe.seed
        )  # fmt: skip
        self.batches: list[Tensor] = list(batches)

    def network(self, architecture: Architecture) -> HybridNet:
        """The network of an architecture with its slices, norms recalibrated, ranks and bits as it is deployed.

        Raises `UnbuildableError` if its layers are too small for its share of ranks.
        """
        network = self.supernet.extract(architecture.config)
        batches = [resized(images.float(), architecture.resolution).round() for images in self.batches]
        renew_statistics(network, batches, self.precision)
        if architecture.rank_share < 1:
            try:
                low_rank(network, batches, parameters=architecture.rank_share)
            except MuntinError as error:
                raise UnbuildableError(f"rank_share {architecture.rank_share:g}: {error}") from error
        if architecture.bits is not None:
            quantize(network, batches, bits=architecture.bits)
        return network.eval()

    def score(self, architecture: Architecture) -> float:
        """Mean IoU, accuracy or PSNR on the validation split."""
        recipe = recipe_of(self.recipe, architecture)
        session = TorchSession(self.network(architecture), recipe.signature(self.classes), dtype=self.precision.dtype)
        return evaluate(session, self.validation, tile=tile_of(recipe.data.crop), similarity=False).score


def recipe_of(recipe: Recipe, architecture: Architecture) -> Recipe:
    """A recipe with the crop of an architecture's resolution."""
    if architecture.resolution == 1:
        return recipe
    crop = max(8, round(architecture.resolution * recipe.data.crop))
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"crop": crop})})
