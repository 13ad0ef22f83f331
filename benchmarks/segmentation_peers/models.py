"""The models that are compared. The peers are factories for recipes (`model: {name: "segmentation_peers.models:linknet_resnet18"}`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from muntin.models.foreign import IMAGENET_MEAN, IMAGENET_STD, DividedSides, ForeignModel

STRIDE = 32
"""Pixels: the peers' encoders take sides that are multiples of it."""
Way = Literal["stages", "post-training", "nncf"]
Scheme = Literal["int8", "int8-attention", "int8-tensor", "int8-attention-tensor"]
"""NNCF's defaults; its scheme for transformers; each with one scale for all of an activation, where NNCF would give channels their own."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model of the comparison. `model`: its name in a recipe. `way`: how it is made small (see `segmentation_peers.deployment`).

    `schemes`: of NNCF, each of which is tried with a peer.
    """

    name: str
    model: str
    way: Way
    schemes: tuple[Scheme, ...] = ()

    @property
    def hybrid(self) -> bool:
        return self.way != "nncf"


def _peer(architecture: str, encoder: str, *, task: str, classes: int, channels: int) -> nn.Module:
    """A model of segmentation_models_pytorch, randomly initialised, that takes raw pixels 0-255 of any size."""
    import segmentation_models_pytorch as smp

    if task != "segment":
        raise ValueError(f"task '{task}': {architecture} segments")
    model = smp.create_model(architecture, encoder_name=encoder, encoder_weights=None, in_channels=channels, classes=classes)
    # Photographs' statistics; of other numbers of channels, their means.
    mean, std = ((v if channels == 3 else (sum(v) / 3,) * channels) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return DividedSides(ForeignModel(model, mean=mean, std=std, task="segment"), STRIDE)


class _Enlarged(nn.Module):
    """A network whose answer is a fraction of the picture's size, enlarged to it, bilinearly."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return F.interpolate(self.model(image_BCHW), image_BCHW.shape[2:], mode="bilinear")


def yolo26n_sem(*, task: str, classes: int, channels: int) -> nn.Module:
    """Ultralytics' YOLO26n-sem from its YAML, randomly initialised, without the head that only its own training uses.

    Needs the package ultralytics (AGPL-3.0): a user installs it beside the benchmark, muntin does not depend on it.
    """
    from ultralytics.nn.tasks import SemanticSegmentationModel

    if task != "segment":
        raise ValueError(f"task '{task}': YOLO26n-sem segments")
    model = SemanticSegmentationModel("yolo26n-sem.yaml", ch=channels, nc=classes, verbose=False)
    model.model[-1].aux_head = None
    none, one = (0.0,) * channels, (1.0,) * channels  # pixels 0 to 1, as in its own training
    return DividedSides(ForeignModel(_Enlarged(model), mean=none, std=one, task="segment"), STRIDE)


linknet_resnet18 = partial(_peer, "linknet", "resnet18")
pan_mobilenet_v2 = partial(_peer, "pan", "mobilenet_v2")
unet_resnet18 = partial(_peer, "unet", "resnet18")
fpn_efficientvit_b0 = partial(_peer, "fpn", "tu-efficientvit_b0")
fpn_mobilenetv4_conv_small = partial(_peer, "fpn", "tu-mobilenetv4_conv_small")
segformer_mit_b0 = partial(_peer, "segformer", "mit_b0")
deeplabv3plus_efficientnet_b0 = partial(_peer, "deeplabv3plus", "efficientnet-b0")


def _entry(factory: str, *schemes: Scheme) -> Entry:
    return Entry(name=factory.replace("_", "-"), model=f"{__name__}:{factory}", way="nncf", schemes=schemes or ("int8",))


ENTRIES = {
    entry.name: entry
    for entry in (
        Entry(name="hybrid-xxs", model="hybrid-xxs", way="stages"),
        Entry(name="hybrid-xs", model="hybrid-xs", way="stages"),
        Entry(name="hybrid-s", model="hybrid-s", way="stages"),
        Entry(name="hybrid-m", model="hybrid-m", way="stages"),
        Entry(name="hybrid-xxs-ptq", model="hybrid-xxs", way="post-training"),
        Entry(name="hybrid-xs-ptq", model="hybrid-xs", way="post-training"),
        Entry(name="hybrid-s-ptq", model="hybrid-s", way="post-training"),
        Entry(name="hybrid-m-ptq", model="hybrid-m", way="post-training"),
        _entry("linknet_resnet18"),
        _entry("pan_mobilenet_v2"),
        _entry("unet_resnet18"),
        _entry("fpn_efficientvit_b0", "int8", "int8-attention"),
        _entry("fpn_mobilenetv4_conv_small"),
        # NNCF takes the tokens between its linear layers and depthwise convolutions for channels: such a model fits one image size only.
        _entry("segformer_mit_b0", "int8-tensor", "int8-attention-tensor"),
        _entry("deeplabv3plus_efficientnet_b0"),
        _entry("yolo26n_sem"),
    )
}
