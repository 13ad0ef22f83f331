"""Features of a model, pooled: their distance to the old model's is a part of the loss, and herding chooses pictures by them.

The features are the last map of each resolution before the classifier, found by one call of the model. Maps are pooled along rows and
along columns, over the whole map and over its quarters. Source: PLOP (Douillard et al., 2011.11390, section 3.1). Deviations: two scales,
no squares before pooling, distances relative to the old features' norm.

Axes: B images, C channels, H W map, F features.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from muntin.images.opening import UInt8
from muntin.models.eager import as_input
from muntin.training.loss import Loss

SCALES = (1, 2)
"""Parts of a map's side that are pooled alone."""


@dataclass(eq=False)
class FeatureTaps:
    """Keeps the outputs of the named modules of a model at its last call, from `attach` on."""

    model: nn.Module
    names: tuple[str, ...]
    maps: dict[str, Tensor] = field(default_factory=dict)

    def attach(self) -> FeatureTaps:
        """Begin to keep outputs."""
        for name in self.names:
            self.model.get_submodule(name).register_forward_hook(self._hook(name))
        return self

    def _hook(self, name: str):  # type: ignore[no-untyped-def]  # a hook's type is private to PyTorch
        def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
            self.maps[name] = output

        return keep

    def take(self) -> list[Tensor]:
        """The maps of the last call, in the order of the names; they are kept no longer."""
        maps, self.maps = self.maps, {}
        return [maps[name] for name in self.names]


def feature_names(model: nn.Module, images_BCHW: Tensor, classifier: Collection[str]) -> tuple[str, ...]:
    """The modules whose outputs are the last maps `(B, C, H, W)` of each resolution before the first module with a classifier's parameter.

    `images`: of the side that is trained with, square, so that maps are square and other outputs, such as tables of attention, are seldom.
    `classifier`: names of its parameters. Costs one call of the model in `eval` mode, on two images.
    """
    images_BCHW = images_BCHW[:1].repeat(2, 1, 1, 1)
    owners = {name.rpartition(".")[0] for name in classifier}
    shapes: dict[str, torch.Size] = {}
    ended = False

    def watch(name: str):  # type: ignore[no-untyped-def]
        def note(module: nn.Module, inputs: object, output: object) -> None:
            nonlocal ended
            ended = ended or name in owners
            square = isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] == output.shape[3] > 1
            if not ended and square and isinstance(output, Tensor) and len(output) == len(images_BCHW):
                shapes.pop(name, None)  # a module that is called twice counts at its last call
                shapes[name] = output.shape

        return note

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            model(as_input(model, images_BCHW))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    last = {shape[2:]: name for name, shape in shapes.items()}
    if len(last) > 1:
        last.pop(images_BCHW.shape[2:], None)  # at full size there is little more than the pixels
    return tuple(last.values())


def pooled(map_BCHW: Tensor) -> Tensor:
    """Means along columns and along rows of a map and of its quarters, `(B, F)`, float32."""
    parts = []
    for scale in SCALES:
        for band in map_BCHW.float().tensor_split(scale, dim=2):
            for part in band.tensor_split(scale, dim=3):
                if part.numel():
                    parts += [part.mean(3).flatten(1), part.mean(2).flatten(1)]
    return torch.cat(parts, 1)


def feature_distance(maps: Sequence[Tensor], expected: Sequence[Tensor]) -> Tensor:
    """Squared distance of pooled features over the squared norm of the expected ones, the mean over the maps, `(B,)`."""
    distances = []
    for own, due in zip(maps, expected, strict=True):
        own_BF, due_BF = pooled(own), pooled(due)
        distances.append((own_BF - due_BF).square().sum(1) / due_BF.square().sum(1).clamp_min(1e-12))
    return torch.stack(distances).mean(0)


@dataclass(frozen=True, kw_only=True)
class UpdateLoss(Loss):
    """The task's loss, plus `scores` times the distance to the teacher's scores, plus `features` times that of the pooled features.

    `taps`: of the model and of the teacher, attached. `distillation` is 1. A picture's features count by its pixels that are not ignored.
    """

    scores: float = 1.0
    features: float = 0.0
    taps: tuple[FeatureTaps, FeatureTaps] | None = None

    def sums(self, scores: Tensor, target: Tensor, teacher_scores: Tensor | None = None) -> Tensor:
        sums_S = super().sums(scores, target, teacher_scores)
        if teacher_scores is None:
            return sums_S
        added = self.scores * sums_S[-1]
        if self.taps is not None and self.features:
            own, teacher = (taps.take() for taps in self.taps)
            counted_B = self.learning.counted(target)
            added = added + self.features * (feature_distance(own, teacher) * counted_B).sum().double()
        return torch.cat([sums_S[:-1], added[None]])


def mean_features(taps: FeatureTaps, image_HWC: UInt8) -> NDArray[np.float32]:
    """The mean of each channel of the tapped maps for one picture, `(F,)`."""
    image_BCHW = torch.from_numpy(np.ascontiguousarray(image_HWC)).permute(2, 0, 1)[None]
    with torch.no_grad():
        taps.model(as_input(taps.model, image_BCHW))
    features: NDArray[np.float32] = torch.cat([one.float().mean((2, 3)).flatten() for one in taps.take()]).cpu().numpy()
    return features
