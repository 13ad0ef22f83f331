"""Denoising (Gaussian noise of 25 grey levels) and double size, on photographs that are split by image, the same ones for all seeds.

Photographs: those in scikit-image's wheel, and those of the Debian package budgie-backgrounds (CC0) where MORE holds them
(`apt-get install budgie-backgrounds`, or unpack it there). The large ones are reduced to 1920 pixels, which removes most JPEG artifacts.

Models, trained for the same minutes with the same recipe (no rate is tuned): hybrids whose decoder ends at half of the sides, or at a
quarter with a channel for each value of 4 x 4 pixels (structures chosen on the validation split); small NAFNets (Chen et al., 2204.04676,
sections 3 and 4; deviations: one block a level, three levels, and for a larger output the last layer shuffles to it and the residual is
the input enlarged bilinearly); for double size the ESRGAN (Zhang et al., 1802.08797) of npm's package @upscalerjs/esrgan-slim (MIT), a
layers model of TensorFlow.js with its weights, as it comes and fine-tuned. It is unpacked by

    mkdir -p runs/esrgan-slim && cd runs/esrgan-slim && npm pack @upscalerjs/esrgan-slim && tar xzf *.tgz

All are scored on whole test images and timed at 512 x 512. Also: the input, or its bicubic enlargement; of scikit-image non-local means,
wavelets (BayesShrink) and total variation (strength chosen on the validation split), which are given the noise's level; BM3D (Dabov et
al., 2007), if the package bm3d is installed, whose licence allows non-commercial use. Their times are of one call on all cores.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from documents import Row
from muntin.data import Source, open_source
from muntin.images import IMAGE_SUFFIXES, write_image
from muntin.images.opening import UInt8
from muntin.tasks.restore.degradation import enlarged
from muntin.tasks.restore.scores import mean_scores, picture_scores, psnr
from muntin.training import parse_recipe
from segmentation_peers.deployment import image_of
from task_tables.recognition import measure_models

MORE = Path("/usr/share/backgrounds/budgie")
"""Where the package budgie-backgrounds puts its photographs."""
PHOTOGRAPHS = {
    "train": "rocket.jpg motorcycle_left.png motorcycle_right.png retina.jpg ihc.png hubble_deep_field.jpg camera.png brick.png grass.png "
             "gravel.png",
    "validation": "chelsea.png",
    "test": "astronaut.png coffee.png",
}  # fmt: skip
"""Files in scikit-image's wheel by their split."""
DRAWN = ("abstract-spiral", "valley-midnight", "waves-midnight", "saturnian-profile")
"""Images of budgie-backgrounds that are not photographs of scenes."""
LONGEST, TESTED = 1920, 1024
"""Longest side of an image, and side of the middle of a large one that is tested, pixels."""
LEVELS = 3
DIVISOR = 1 << LEVELS
"""Sides are multiples of it (`model.size_divisor`)."""
PACKAGE = Path("runs/esrgan-slim/package")
"""The unpacked ESRGAN, from the working directory."""
SIGMA = 25
SETTINGS: dict[str, Row] = {
    f"noise {SIGMA}": {"degrade": {"noise": SIGMA}, "crop": 128},
    "double size": {"degrade": {"scale": 2}, "crop": 64},
}
HALF = {"stem": [48, 48, 64], "pairs": [1, 1], "decoder": 48, "dims": [128], "depths": [1], "finest": 2}
QUARTER = {"stem": [24, 64, 64], "pairs": [2, 1], "decoder": 64, "dims": [128], "depths": [2]}
MODELS: dict[str, Row] = {
    "hybrid-xs, to half": {"name": "hybrid-xs", "options": HALF},
    "hybrid-xs, to a quarter": {"name": "hybrid-xs", "options": QUARTER},
    **{f"nafnet-{width}": {"name": f"{__name__}:nafnet_{width}", "size_divisor": DIVISOR} for width in (16, 32)},
}
ESRGAN: Row = {"name": f"{__name__}:esrgan_slim"}
STILL = {"steps": 1, "learning_rate": 1e-12, "minutes": None}
"""Training that leaves weights of usual size as they are."""
SIDE, CALLS = 512, 3
"""Side of the timed image, pixels; timed calls of a method that is not trained."""
ADMITTED_DB = 0.1
"""Largest loss of PSNR with which a form is deployed."""
ALSO = {"PSNR float": "float", "PSNR int8": "int8"}
STRENGTHS = (0.05, 0.1, 0.15, 0.2)
"""Weights of total variation that are tried."""
Denoiser = Callable[[UInt8], UInt8]


def restore(seed: int, minutes: float, folder: Path) -> list[Row]:
    photographs = (folder / "photographs").resolve()
    write_photographs(photographs)
    rows: list[Row] = []
    for data, setting in SETTINGS.items():
        others = {split: {"images": str(photographs / split)} for split in ("validation", "test")}
        augmentation = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
        place = {"source": "folders", "images": str(photographs / "train"), **others, **setting, "augmentation": augmentation}
        base = parse_recipe({"task": "restore", "data": place}, where="restoration")
        models: dict[str, tuple[Row, tuple[Row, ...]]] = {name: (model, ({},)) for name, model in MODELS.items()}
        enlarges = "scale" in setting["degrade"]
        if enlarges and PACKAGE.is_dir():
            models |= {"esrgan-slim, trained on": (ESRGAN, ({},)), "esrgan-slim": (ESRGAN, (STILL,))}
        elif enlarges:
            rows.append({"data": data, "model": "esrgan-slim", "cannot": f"no {PACKAGE}: see task_tables/restoration.py"})
        given: Row = {"seed": seed, "minutes": minutes, "folder": folder, "sides": (SIDE,), "loss": ADMITTED_DB, "also": ALSO}
        rows += measure_models(data, base, Path.cwd(), models, **given)
        source = open_source(base.data, task=base.task, root=Path.cwd())
        scale = setting["degrade"].get("scale", 1)
        methods: dict[str, Denoiser] = {"bicubic": partial(enlarged, scale=scale)} if enlarges else denoisers(source)
        rows += [{"data": data, "model": name, **_method(method, source)} for name, method in methods.items()]
    return rows


def write_photographs(folder: Path) -> None:
    """Write the photographs as PNG into `train`, `validation` and `test`."""
    import skimage

    place = Path(skimage.__file__).parent / "data"
    chosen = {split: [place / name for name in names.split()] for split, names in PHOTOGRAPHS.items()}
    others = sorted(path for path in MORE.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.stem not in DRAWN)
    for number, path in enumerate(others):
        chosen[("test", "train", "train", "validation", "train", "train", "train")[number % 7]].append(path)
    for split, paths in chosen.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for path in paths:
            target = folder / split / f"{path.stem}.png"
            if not target.is_file():
                with Image.open(path) as file:
                    image = file.convert("RGB")
                image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
                pixels = np.asarray(image)
                if split != "train":
                    top, left = (max(0, length - TESTED) // 2 for length in pixels.shape[:2])
                    pixels = pixels[top : top + TESTED, left : left + TESTED]
                write_image(target, np.ascontiguousarray(pixels))


# Methods that are not trained


def _method(method: Denoiser, source: Source) -> Row:
    samples = source.split("test")
    try:
        scores = mean_scores([picture_scores(method(sample.image), sample) for sample in samples])
    except ImportError as error:  # scikit-image imports PyWavelets when it needs it
        return {"cannot": str(error).partition("\n")[0]}
    image, times = image_of(source, SIDE), []
    for _ in range(CALLS):
        started = time.perf_counter()
        method(image)
        times.append(1e3 * (time.perf_counter() - started))
    quality = {"PSNR": scores.psnr, "SSIM": scores.ssim}
    return {"quality": quality, "ms": {str(SIDE): statistics.median(times)}, "mb": 0.0, "parameters": 0, "deployed": "float"}


def denoisers(source: Source) -> dict[str, Denoiser]:
    """Denoisers by name, which are given the noise's level, and the input itself."""
    from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, denoise_wavelet

    def floats(function: Callable[..., Any], **options: Any) -> Denoiser:
        return lambda image: np.rint(255 * np.clip(function(image.astype(np.float32) / 255, **options), 0, 1)).astype(np.uint8)

    sigma, sample = SIGMA / 255, source.split("validation")[0]
    variation = {weight: floats(denoise_tv_chambolle, weight=weight, channel_axis=-1) for weight in STRENGTHS}
    best = max(variation, key=lambda weight: psnr(variation[weight](sample.image), sample.clean))
    patches = {"fast_mode": True, "patch_size": 5, "patch_distance": 6}
    shrinkage = {"convert2ycbcr": True, "method": "BayesShrink", "rescale_sigma": True}
    found: dict[str, Denoiser] = {
        "input": lambda image: image,
        "non-local means": floats(denoise_nl_means, h=0.8 * sigma, sigma=sigma, channel_axis=-1, **patches),
        "wavelets": floats(denoise_wavelet, sigma=sigma, channel_axis=-1, **shrinkage),
        f"total variation, weight {best:g}": variation[best],
    }
    if find_spec("bm3d") is not None:
        import bm3d

        found["bm3d"] = floats(lambda image: bm3d.bm3d_rgb(image, sigma))
    return found


# Networks


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-6)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.norm(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


class GatedBlock(nn.Module):
    """Depthwise convolution, product of halves, channel attention; then an MLP with a product of halves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(channels), ChannelNorm(channels)
        self.expand = nn.Conv2d(channels, 2 * channels, 1)
        self.depthwise = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1, groups=2 * channels)
        self.attention = nn.Conv2d(channels, channels, 1)
        self.project = nn.Conv2d(channels, channels, 1)
        self.widen = nn.Conv2d(channels, 2 * channels, 1)
        self.narrow = nn.Conv2d(channels, channels, 1)
        self.beta, self.gamma = (nn.Parameter(torch.zeros(1, channels, 1, 1)) for _ in range(2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        first, second = self.depthwise(self.expand(self.norm1(x_BCHW))).chunk(2, 1)
        gated = first * second
        gated = gated * self.attention(gated.mean((2, 3), keepdim=True))
        x_BCHW = x_BCHW + self.beta * self.project(gated)
        first, second = self.widen(self.norm2(x_BCHW)).chunk(2, 1)
        return x_BCHW + self.gamma * self.narrow(first * second)


class NAFNet(nn.Module):
    """Raw pixels `(B, C, H, W)`, sides divisible by `DIVISOR`, to an image of `scale` times the sides."""

    def __init__(self, width: int, *, channels: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        widths = [width << level for level in range(LEVELS)]
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.encoders = nn.ModuleList(GatedBlock(c) for c in widths)
        self.downs = nn.ModuleList(nn.Conv2d(c, 2 * c, 2, stride=2) for c in widths)
        self.middle = GatedBlock(2 * widths[-1])
        self.ups = nn.ModuleList(nn.Sequential(nn.Conv2d(2 * c, 4 * c, 1, bias=False), nn.PixelShuffle(2)) for c in widths[::-1])
        self.decoders = nn.ModuleList(GatedBlock(c) for c in widths[::-1])
        self.last = nn.Conv2d(width, channels * scale**2, 3, padding=1)
        self.shuffle: nn.Module = nn.PixelShuffle(scale) if scale > 1 else nn.Identity()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        x_BCHW = self.first(image_BCHW / 64 - 127.5 / 64)
        skips = []
        for encoder, down in zip(self.encoders, self.downs, strict=True):
            x_BCHW = encoder(x_BCHW)
            skips.append(x_BCHW)
            x_BCHW = down(x_BCHW)
        x_BCHW = self.middle(x_BCHW)
        for up, decoder, skip in zip(self.ups, self.decoders, skips[::-1], strict=True):
            x_BCHW = decoder(up(x_BCHW) + skip)
        residual = 64 * self.shuffle(self.last(x_BCHW))
        given = image_BCHW if self.scale == 1 else F.interpolate(image_BCHW, scale_factor=float(self.scale), mode="bilinear")
        return given + residual


def _nafnet(width: int, *, task: str, classes: int, channels: int, scale: int = 1) -> nn.Module:
    return NAFNet(width, channels=channels, scale=scale)


nafnet_16, nafnet_32 = partial(_nafnet, 16), partial(_nafnet, 32)
OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "Activation": F.relu,
    "Concatenate": lambda *maps_BCHW: torch.cat(maps_BCHW, 1),
    "Add": torch.add,
    "UpSampling2D": lambda x_BCHW: F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"),
}
"""Keras layers without weights."""


class KerasGraph(nn.Module):
    """Raw pixels `(B, 3, H, W)` to an image of twice the sides, layer by layer as the file lists them."""

    def __init__(self, layers: list[dict[str, Any]], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.steps = [(layer["class_name"], layer["name"], [node[0] for node in (layer["inbound_nodes"] or [[]])[0]]) for layer in layers]
        self.convolutions = nn.ModuleDict()
        for name in (name for kind, name, _ in self.steps if kind == "Conv2D"):
            kernel = weights[f"{name}/kernel"].permute(3, 2, 0, 1)
            convolution = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], padding="same")
            convolution.load_state_dict({"weight": kernel, "bias": weights[f"{name}/bias"]})
            self.convolutions[name] = convolution

    def forward(self, image_BCHW: Tensor) -> Tensor:
        outputs: dict[str, Tensor] = {}
        for kind, name, sources in self.steps:
            inputs = [outputs[source] for source in sources]
            if kind == "InputLayer":
                outputs[name] = image_BCHW
            elif kind == "Conv2D":
                outputs[name] = self.convolutions[name](*inputs)
            elif kind in OPERATIONS:
                outputs[name] = OPERATIONS[kind](*inputs)
            else:
                raise ValueError(f"layer {name} is {kind}: {PACKAGE} is of another version")
        return outputs[self.steps[-1][1]]


def esrgan_slim(*, task: str, classes: int, channels: int, scale: int = 1) -> nn.Module:
    """Create the model with the weights of `PACKAGE`."""
    folder = PACKAGE / "models" / "x2"
    content = json.loads((folder / "model.json").read_text())
    (group,) = content["weightsManifest"]
    values = np.concatenate([np.fromfile(folder / path, dtype="<f4") for path in group["paths"]])
    weights, start = {}, 0
    for entry in group["weights"]:
        end = start + int(np.prod(entry["shape"]))
        weights[entry["name"]] = torch.from_numpy(values[start:end].reshape(entry["shape"]).copy())
        start = end
    return KerasGraph(content["modelTopology"]["model_config"]["config"]["layers"], weights)
