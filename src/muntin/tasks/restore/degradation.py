"""The degradation of a clean photograph: reduction, noise, JPEG, in this order.

Axes: H, W rows and columns, C channels; lower case h, w are those of the reduced picture.
"""

from __future__ import annotations

import hashlib
import io
from typing import Annotated, Self

import numpy as np
from PIL import Image
from pydantic import Field, model_validator

from muntin.images.opening import UInt8
from muntin.section import Section

MAX_SCALE = 4
"""Largest reduction, that of `ModelConfig.scale`."""
NoiseLevel = Annotated[float, Field(ge=0, le=255)]
Quality = Annotated[int, Field(ge=1, le=100)]


class Degradation(Section):
    """How the inputs of `restore` are made from clean photographs: anew for each training crop, by the picture's name elsewhere."""

    noise: NoiseLevel | tuple[NoiseLevel, NoiseLevel] = Field(
        default=0.0, description="standard deviation of Gaussian noise, grey levels of 255; or a range such as [5, 50]"
    )
    scale: int = Field(default=1, ge=1, le=MAX_SCALE, description="the input's sides are 1/scale of the photograph's: bicubic, antialiased")
    jpeg: Quality | tuple[Quality, Quality] | None = Field(
        default=None, description="quality of a JPEG compression, 1-100, or a range; null: none; pictures of 1 or 3 channels only"
    )

    @model_validator(mode="after")
    def _useful(self) -> Self:
        for key, value in (("noise", self.noise), ("jpeg", self.jpeg)):
            if isinstance(value, tuple) and value[0] > value[1]:
                raise ValueError(f"{key} {list(value)}: the smaller number comes first: swap them")
        if self.scale == 1 and self.jpeg is None and not np.any(self.noise):
            raise ValueError("degrade changes nothing: give noise above 0, a scale above 1, or jpeg")
        return self

    def __call__(self, clean_HWC: UInt8, generator: np.random.Generator) -> UInt8:
        """Return the degraded picture (h, w, C), uint8. H and W are multiples of `scale`."""
        image_hwC = reduced(clean_HWC, self.scale)
        sigma = generator.uniform(*self.noise) if isinstance(self.noise, tuple) else self.noise
        if sigma:
            noise_hwC = generator.standard_normal(image_hwC.shape, dtype=np.float32)
            noise_hwC *= sigma
            noise_hwC += image_hwC
            image_hwC = np.rint(noise_hwC, out=noise_hwC).clip(0, 255).astype(np.uint8)
        if self.jpeg is None:
            return image_hwC
        quality = int(generator.integers(self.jpeg[0], self.jpeg[1] + 1)) if isinstance(self.jpeg, tuple) else self.jpeg
        return _compressed(image_hwC, quality)


def generator_of(name: str) -> np.random.Generator:
    """The random numbers of a picture outside training: the same for a name in every run."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode(errors="surrogateescape")).digest()[:8], "big"))


def reduced(image_HWC: UInt8, scale: int) -> UInt8:
    """A picture with 1/scale of the sides by bicubic interpolation with antialiasing (Pillow's)."""
    return image_HWC if scale == 1 else _resized(image_HWC, image_HWC.shape[0] // scale, image_HWC.shape[1] // scale)


def enlarged(image_HWC: UInt8, scale: int) -> UInt8:
    """A picture with `scale` times the sides by bicubic interpolation (Pillow's): the usual baseline of super-resolution."""
    return image_HWC if scale == 1 else _resized(image_HWC, image_HWC.shape[0] * scale, image_HWC.shape[1] * scale)


def _resized(image_HWC: UInt8, height: int, width: int) -> UInt8:
    channels = [Image.fromarray(np.ascontiguousarray(image_HWC[:, :, c])) for c in range(image_HWC.shape[2])]
    return np.stack([np.asarray(channel.resize((width, height), Image.Resampling.BICUBIC)) for channel in channels], axis=2)


def _compressed(image_HWC: UInt8, quality: int) -> UInt8:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC).save(buffer, "JPEG", quality=quality)
    with Image.open(buffer) as image:
        return np.asarray(image).reshape(image_HWC.shape)
