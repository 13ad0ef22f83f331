"""The models of `tests/products.py`, as a user's own code: a segmentation of three convolutions, and a text encoder with named tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Small(nn.Sequential):
    """Layers that read pixels 0-255."""

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = super().forward(x / 128 - 1)
        return scores


def make(*, task: str, classes: int, channels: int, first: int = 8, second: int = 16) -> nn.Module:
    """Three convolutions: PyTorch traces them ten times as fast as a hybrid."""
    one, two = nn.Conv2d(channels, first, 3, padding=1), nn.Conv2d(first, second, 3, padding=1)
    return Small(one, nn.BatchNorm2d(first), nn.ReLU(), two, nn.BatchNorm2d(second), nn.ReLU(), nn.Conv2d(second, classes, 1))


def make_wide(*, task: str, classes: int, channels: int) -> nn.Module:
    """The same with channels enough for four bits."""
    return make(task=task, classes=classes, channels=channels, first=32, second=32)


class Coarse(Small):
    """Layers with a fourth of the sides inside."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(super().forward(x), x.shape[2:], mode="bilinear")


def make_coarse(*, task: str, classes: int, channels: int) -> nn.Module:
    """Three convolutions for large images, with channels enough for four bits and low rank."""
    first, second = nn.Conv2d(channels, 32, 4, stride=4), nn.Conv2d(32, 32, 3, padding=1)
    return Coarse(first, nn.BatchNorm2d(32), nn.ReLU(), second, nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, classes, 1))


class Encoder(nn.Module):
    """Token ids and a mask to an embedding of each row and the number of the best class."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, dropout=0.0)
        self.classes = nn.Linear(32, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.layer(self.table(ids), src_key_padding_mask=mask == 0)
        kept = mask[..., None].to(x.dtype)
        embedding = (x * kept).sum(1) / kept.sum(1)
        return {"embedding": embedding, "label": self.classes(embedding).argmax(1)}


def make_encoder() -> Encoder:
    """Return the encoder of the product `tensors`, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder().eval()


def tokens(batch: int, length: int, seed: int = 0) -> dict[str, Tensor]:
    """Return inputs of the encoder; the last token of each row is masked."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[:, length - 1] = 0
    return {"ids": torch.randint(0, 50, (batch, length), generator=draw), "mask": mask}


def make_image_model() -> nn.Module:
    """Return the network of the product `image`, always with the same weights: pixels to four classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1)]
        return Small(*layers).eval()


def smooth_pixels(batch: int, side: int = 64, seed: int = 0) -> Tensor:
    """Return smooth images, `(B, 3, H, W)`, 0-255: noise has nothing that a network could look at."""
    coarse = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.interpolate(coarse, (side, side), mode="bilinear") * 255).round()
