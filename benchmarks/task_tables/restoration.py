"""Denoising (Gaussian noise of 25 grey levels) and double size, on photographs that are split by image, the same ones for all seeds.

Photographs: those in scikit-image's wheel, and those of the Debian package budgie-backgrounds (CC0) where MORE holds them
(`apt-get install budgie-backgrounds`, or unpack it there). The large ones are reduced to 1920 pixels, which removes most JPEG artifacts.

Models, trained by `muntin fit` for the same minutes with the same recipe (no rate is tuned): hybrids whose decoder ends at half of the
sides, or at a quarter with a channel for each value of 4 x 4 pixels (structures chosen on the validation split), small NAFNets, and for
double size the ESRGAN of an npm package, as it comes and fine-tuned (`networks.py`). Of the forms in floats and in INT8 of `muntin export`
the faster one at 512 x 512 is deployed, INT8 only if it loses at most ADMITTED_DB of PSNR on the validation split. `PSNR float` is
PyTorch's, FP32. All are scored on whole test images, by tiles of 512 pixels.

Also: the input, or its bicubic enlargement; of scikit-image non-local means, wavelets (BayesShrink) and total variation (strength chosen
on the validation split), which are given the noise's level; BM3D (Dabov et al., 2007; Mäkinen et al., 2020), if the package bm3d is
installed, whose licence allows non-commercial use. Their times are of one call at 512 x 512 on all cores.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from documents import Row
from muntin.compression import load_model
from muntin.data.restoration.degradation import enlarged
from muntin.data.source import Samples
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.errors import MuntinError
from muntin.images import IMAGE_SUFFIXES, write_image
from muntin.images.opening import UInt8
from muntin.models import TorchSession
from muntin.runtime import load
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.training import Checkpoint, parse_recipe
from muntin.training.checkpoint import source_of
from muntin.training.restoration.evaluation import RestoredScores, evaluate_restored, mean_scores, picture_scores, psnr
from segmentation_peers.deployment import parameters_of
from segmentation_peers.training import ENDLESS, train
from task_tables.networks import DIVISOR, PACKAGE

REQUIRES = ("scikit-image",)
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
SIGMA = 25
SETTINGS: dict[str, dict[str, Any]] = {
    f"noise {SIGMA}": {"degrade": {"noise": SIGMA}, "crop": 128},
    "double size": {"degrade": {"scale": 2}, "crop": 64},
}
HALF = {"stem": [48, 48, 64], "pairs": [1, 1], "decoder": 48, "dims": [128], "depths": [1], "finest": 2}
QUARTER = {"stem": [24, 64, 64], "pairs": [2, 1], "decoder": 64, "dims": [128], "depths": [2]}
MODELS: dict[str, dict[str, Any]] = {
    "hybrid-xs, to half": {"name": "hybrid-xs", "options": HALF},
    "hybrid-xs, to a quarter": {"name": "hybrid-xs", "options": QUARTER},
    **{f"nafnet-{width}": {"name": f"task_tables.networks:nafnet_{width}", "size_divisor": DIVISOR} for width in (16, 32)},
}
ESRGAN = {"name": "task_tables.networks:esrgan_slim"}
STILL = {"steps": 1, "learning_rate": 1e-12}
"""Training that leaves weights of usual size as they are."""
SIDE = 512
"""Side of the timed image and of the tiles, pixels."""
ROUNDS, CALLS = 30, 3
"""Timed calls of a deployed model, and of another method."""
ADMITTED_DB = 0.1
STRENGTHS = (0.05, 0.1, 0.15, 0.2)
"""Weights of total variation that are tried."""

Denoiser = Callable[[UInt8], UInt8]


def measure(seed: int, minutes: float, folder: Path) -> list[Row]:
    photographs = folder / "photographs"
    write_photographs(photographs)
    rows: list[Row] = []
    for data, setting in SETTINGS.items():
        place, enlarges = folder / data.replace(" ", "-"), "scale" in setting["degrade"]
        models = {name: (model, {"minutes": minutes}) for name, model in MODELS.items()}
        if enlarges and PACKAGE.is_dir():
            models |= {"esrgan-slim, trained on": (ESRGAN, {"minutes": minutes}), "esrgan-slim": (ESRGAN, STILL)}
        trained = {
            name: _trained(name, model, training, setting, photographs, place / str(number), seed)
            for number, (name, (model, training)) in enumerate(models.items())
        }
        rows += _deployed(data, trained, place) + _others(data, next(iter(trained.values())))
        if enlarges and not PACKAGE.is_dir():
            rows.append({"data": data, "model": "esrgan-slim", "cannot": f"no {PACKAGE}: see task_tables/networks.py"})
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


def _trained(name: str, model: Row, training: Row, setting: Row, photographs: Path, run: Path, seed: int) -> Checkpoint:
    folders = {split: {"images": str((photographs / split).resolve())} for split in ("validation", "test")}
    images = str((photographs / "train").resolve())
    augmentation = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0}
    content = {
        "task": "restore", "seed": seed, "model": model,
        "data": {"source": "folders", "images": images, **folders, **setting, "augmentation": augmentation},
        "training": {"steps": ENDLESS, "validate_every": ENDLESS, "checkpoint_every": ENDLESS, **training},
    }  # fmt: skip
    return train(parse_recipe(content, where=name), run, Path.cwd())


def _deployed(data: str, trained: dict[str, Checkpoint], place: Path) -> list[Row]:
    """A row for each model, in the faster one of its admitted forms; all forms are timed in turns."""
    sessions, scores, paths = {}, {}, {}
    splits = {split: source_of(next(iter(trained.values()))).split(split) for split in ("validation", "test")}
    failed: dict[str, str] = {}
    for number, (name, checkpoint) in enumerate(trained.items()):
        for form in ("float", "int8"):
            try:
                artifact = export_checkpoint(checkpoint, place / f"{number}-{form}", integer=form == "int8")
            except MuntinError as error:
                failed[name] = str(error)
                continue
            paths[name, form], sessions[name, form] = artifact, load(artifact.path)
            scores[name, form] = {split: evaluate_restored(sessions[name, form], samples, tile=SIDE) for split, samples in splits.items()}
    timed = interleaved_latency({" | ".join(key): each for key, each in sessions.items()}, _middle(splits["test"])[None], rounds=ROUNDS)
    rows: list[Row] = []
    for name, checkpoint in trained.items():
        forms = [form for form in ("float", "int8") if (name, form) in sessions]
        if not forms:
            rows.append({"data": data, "model": name, "cannot": failed[name]})
            continue
        ms = {form: timed[f"{name} | {form}"].median_ms for form in forms}
        least = max(scores[name, form]["validation"].psnr for form in forms) - ADMITTED_DB
        form = min((form for form in forms if scores[name, form]["validation"].psnr >= least), key=ms.__getitem__)
        exact = evaluate_restored(TorchSession(load_model(checkpoint), checkpoint.signature), splits["test"], tile=SIDE)
        quality = {**_quality(scores[name, form]["test"]), "PSNR float": exact.psnr}
        if "int8" in forms:
            quality["PSNR int8"] = scores[name, "int8"]["test"].psnr
        rows.append({
            "data": data, "model": name, "quality": quality, "ms": {str(SIDE): ms[form]}, "mb": paths[name, form].bytes / 1e6,
            "parameters": parameters_of(checkpoint), "deployed": f"{form} {sessions[name, form].precision}", "steps": checkpoint.state.step,
        })  # fmt: skip
    for session in sessions.values():
        session.close()
    return rows


def _others(data: str, checkpoint: Checkpoint) -> list[Row]:
    """Rows of methods that are not trained."""
    source = source_of(checkpoint)
    test, scale = source.split("test"), checkpoint.signature.scale
    if scale > 1:
        return [_method(data, "bicubic", lambda image: enlarged(image, scale), test)]
    methods: dict[str, Denoiser] = {"input": lambda image: image, **denoisers(source.split("validation"))}
    return [_method(data, name, method, test) for name, method in methods.items()]


def _method(data: str, name: str, method: Denoiser, samples: Samples) -> Row:
    try:
        scores = mean_scores([picture_scores(method(sample.image), sample) for sample in samples])
    except ImportError as error:  # scikit-image imports PyWavelets when it needs it
        return {"data": data, "model": name, "cannot": str(error).partition("\n")[0]}
    image, times = _middle(samples), []
    for _ in range(CALLS):
        started = time.perf_counter()
        method(image)
        times.append(1e3 * (time.perf_counter() - started))
    ms = {str(SIDE): statistics.median(times)}
    return {"data": data, "model": name, "quality": _quality(scores), "ms": ms, "mb": 0.0, "parameters": 0, "deployed": "float"}


def denoisers(validation: Samples) -> dict[str, Denoiser]:
    """Denoisers by name, which are given the noise's level."""
    from skimage.restoration import denoise_nl_means, denoise_tv_chambolle, denoise_wavelet

    def floats(function: Callable[..., Any], **options: Any) -> Denoiser:
        return lambda image: np.rint(255 * np.clip(function(image.astype(np.float32) / 255, **options), 0, 1)).astype(np.uint8)

    sigma, sample = SIGMA / 255, validation[0]
    variation = {weight: floats(denoise_tv_chambolle, weight=weight, channel_axis=-1) for weight in STRENGTHS}
    best = max(variation, key=lambda weight: psnr(variation[weight](sample.image), sample.clean))
    patches = {"fast_mode": True, "patch_size": 5, "patch_distance": 6}
    shrinkage = {"convert2ycbcr": True, "method": "BayesShrink", "rescale_sigma": True}
    found: dict[str, Denoiser] = {
        "non-local means": floats(denoise_nl_means, h=0.8 * sigma, sigma=sigma, channel_axis=-1, **patches),
        "wavelets": floats(denoise_wavelet, sigma=sigma, channel_axis=-1, **shrinkage),
        f"total variation, weight {best:g}": variation[best],
    }
    if find_spec("bm3d") is not None:
        import bm3d

        found["bm3d"] = floats(lambda image: bm3d.bm3d_rgb(image, sigma))
    return found


def _quality(scores: RestoredScores) -> dict[str, float]:
    return {"PSNR": scores.psnr, **({} if scores.ssim is None else {"SSIM": scores.ssim})}


def _middle(samples: Samples) -> UInt8:
    """The middle of the first image, mirrored where it is smaller than `SIDE`."""
    image = np.asarray(samples[0].image[:, :])
    missing = [max(0, SIDE - length) for length in image.shape[:2]]
    image = np.pad(image, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="symmetric")
    top, left = ((length - SIDE) // 2 for length in image.shape[:2])
    return np.ascontiguousarray(image[top : top + SIDE, left : left + SIDE])
