"""The compared models. The peers are factories that a recipe names (`model: {name: "segmentation_peers.models:linknet_resnet18"}`)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the usual name

from muntin.models.foreign import IMAGENET_MEAN, IMAGENET_STD, DividedSides, ForeignModel

STRIDE = 32
"""Pixels: the peers' encoders take sides that are multiples of it."""
Way = Literal["compressed", "post-training", "nncf"]
Scheme = Literal["int8", "int8-attention", "int8-tensor", "int8-attention-tensor"]
"""NNCF's default; its scheme for transformers; each with one scale for a whole activation, where NNCF would give channels their own."""
SIZES = ("xxs", "xs", "s", "m")
PEERS: dict[str, tuple[str, str, tuple[Scheme, ...]]] = {
    "linknet_resnet18": ("linknet", "resnet18", ("int8",)),
    "pan_mobilenet_v2": ("pan", "mobilenet_v2", ("int8",)),
    "unet_resnet18": ("unet", "resnet18", ("int8",)),
    "fpn_efficientvit_b0": ("fpn", "tu-efficientvit_b0", ("int8", "int8-attention")),
    "fpn_mobilenetv4_conv_small": ("fpn", "tu-mobilenetv4_conv_small", ("int8",)),
    # NNCF takes the tokens between its linear layers and depthwise convolutions for channels: such a model fits one image size only.
    "segformer_mit_b0": ("segformer", "mit_b0", ("int8-tensor", "int8-attention-tensor")),
    "deeplabv3plus_efficientnet_b0": ("deeplabv3plus", "efficientnet-b0", ("int8",)),
}
"""By factory: architecture and encoder of segmentation_models_pytorch, and the schemes of NNCF that are tried."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model of the comparison. `model`: its name in a recipe. `way`: how it is made small (see `deployment`)."""

    name: str
    model: str
    way: Way
    schemes: tuple[Scheme, ...] = ()

    @property
    def hybrid(self) -> bool:
        return self.way != "nncf"


def _peer(architecture: str, encoder: str, *, task: str, classes: int, channels: int) -> nn.Module:
    """A randomly initialised model of segmentation_models_pytorch that takes raw pixels 0-255 of any size."""
    import segmentation_models_pytorch as smp

    if task != "segment":
        raise ValueError(f"task '{task}': {architecture} segments")
    model = smp.create_model(architecture, encoder_name=encoder, encoder_weights=None, in_channels=channels, classes=classes)
    # The statistics of photographs; for other numbers of channels their means.
    mean, std = ((v if channels == 3 else (sum(v) / 3,) * channels) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return DividedSides(ForeignModel(model, mean=mean, std=std, task="segment"), STRIDE)


for _name, (_architecture, _encoder, _) in PEERS.items():
    globals()[_name] = partial(_peer, _architecture, _encoder)


class _Enlarged(nn.Module):
    """Scores of a fraction of the image's size, enlarged to it bilinearly."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image_BCHW: Tensor) -> Tensor:
        return F.interpolate(self.model(image_BCHW), image_BCHW.shape[2:], mode="bilinear")


def yolo26n_sem(*, task: str, classes: int, channels: int) -> nn.Module:
    """Ultralytics' YOLO26n-sem from its YAML, randomly initialised, without the head that only its own training uses. Needs the package
    ultralytics (AGPL-3.0), which a user installs beside the benchmark; muntin does not depend on it."""
    from ultralytics.nn.tasks import SemanticSegmentationModel

    if task != "segment":
        raise ValueError(f"task '{task}': YOLO26n-sem segments")
    model = SemanticSegmentationModel("yolo26n-sem.yaml", ch=channels, nc=classes, verbose=False)
    model.model[-1].aux_head = None
    none, one = (0.0,) * channels, (1.0,) * channels  # pixels 0 to 1, as in its own training
    return DividedSides(ForeignModel(_Enlarged(model), mean=none, std=one, task="segment"), STRIDE)


_ENTRIES = [
    *(Entry(name=f"hybrid-{size}", model=f"hybrid-{size}", way="compressed") for size in SIZES),
    *(Entry(name=f"hybrid-{size}-ptq", model=f"hybrid-{size}", way="post-training") for size in SIZES),
    *(
        Entry(name=factory.replace("_", "-"), model=f"{__name__}:{factory}", way="nncf", schemes=schemes)
        for factory, schemes in {**{name: peer[2] for name, peer in PEERS.items()}, "yolo26n_sem": ("int8",)}.items()
    ),
]
ENTRIES = {entry.name: entry for entry in _ENTRIES}
