"""Models of timm, torchvision and segmentation_models_pytorch by name, and of the user's own functions. Nothing is downloaded."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

from torch import nn

from muntin.deployment.sizes.requested import Size
from muntin.deployment.sources.answers import refuse_free_form
from muntin.deployment.sources.source_model import DEFAULT_SIZE, Request, SourceModel
from muntin.errors import DependencyError, RecipeError, install
from muntin.models.foreign import IMAGENET_MEAN, IMAGENET_STD, call_factory, for_channels, timm_model

ASSUMED_SIZE = f"the size of the pictures, {DEFAULT_SIZE[0]} x {DEFAULT_SIZE[1]}, is an assumption: --size sets another"


def open_timm(name: str, request: Request) -> SourceModel:
    """Create a classifier of timm, with the normalisation, size and class names of its configuration."""
    arguments: dict[str, Any] = {"num_classes": request.classes, "in_chans": request.channels}
    model: Any = timm_model(name, **arguments)
    from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_model_data_config

    if not model.num_classes:
        refuse_free_form(f"timm:{name}", "has no last layer for classes, which --classes adds")
    config = resolve_model_data_config(model)
    own_channels, *own_size = config["input_size"]
    channels, size = request.channels or own_channels, request.size or (own_size[0], own_size[1])
    if size != tuple(own_size) and model.pretrained_cfg.get("fixed_input_size"):
        model = timm_model(name, img_size=size, **arguments)
    subset = infer_imagenet_subset(model) if request.classes is None else None
    names = ImageNetInfo(subset).label_descriptions() if subset else ()
    return SourceModel(
        model=model, channels=channels, size=size, mean=for_channels(config["mean"], channels), std=for_channels(config["std"], channels),
        class_names=tuple(names), notes=(f"the names of the classes are those of {subset}",) if subset else (),
    )  # fmt: skip


def open_torchvision(name: str, request: Request) -> SourceModel:
    """Create a classifier or segmenter of torchvision, with the normalisation, size and class names of its published weights."""
    try:
        from torchvision import models
    except ImportError as error:
        raise DependencyError(f"'torchvision:{name}' needs the package torchvision: {install('train')}") from error
    classifiers, segmenters = models.list_models(module=models), models.list_models(module=models.segmentation)
    if name not in (*classifiers, *segmenters):
        others = "is for another task" if name in models.list_models() else "is no model of torchvision"
        raise RecipeError(
            f"'torchvision:{name}' {others}: give a classifier ({', '.join(classifiers[:3])}, ...) or {', '.join(segmenters)}"
        )
    if request.channels not in (None, 3):
        raise RecipeError(f"'torchvision:{name}' takes 3 channels, not {request.channels}: choose a model of timm")
    published = models.get_model_weights(name).DEFAULT  # facts only: get_state_dict would download
    preset = published.transforms()
    side = preset.crop_size[0] if name in classifiers else preset.resize_size[0]
    size = request.size or (side, side)
    model = models.get_model(name, weights=None, **_torchvision_arguments(name, request, size, segmenter=name in segmenters))
    notes = [] if request.classes is not None else [f"the names of the classes are those of torchvision's weights {published.name}"]
    if getattr(model, "transform_input", False):
        notes.append("transform_input=True, as torchvision's own weights require")
    return SourceModel(
        model=model, channels=3, size=size, mean=tuple(preset.mean), std=tuple(preset.std), unused=("aux_classifier.",),
        class_names=() if request.classes is not None else tuple(published.meta["categories"]), notes=tuple(notes),
    )  # fmt: skip


def _torchvision_arguments(name: str, request: Request, size: Size, *, segmenter: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {} if request.classes is None else {"num_classes": request.classes}
    if segmenter:
        arguments["weights_backbone"] = None
    elif name.startswith("vit_"):
        arguments["image_size"] = size[0]
    elif name == "maxvit_t":
        arguments["input_size"] = size
    elif name in ("googlenet", "inception_v3"):  # their published weights were trained with another normalisation
        arguments |= {"init_weights": False, "transform_input": request.weights is not None}
    return arguments


def open_smp(name: str, request: Request) -> SourceModel:
    """Create a segmenter of segmentation_models_pytorch: `CLASS` or `CLASS:ENCODER`."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        package = "pip install segmentation-models-pytorch"
        raise DependencyError(f"'smp:{name}' needs the package segmentation_models_pytorch: {package}") from error
    class_name, _, encoder = name.partition(":")
    kinds = [key for key, kind in vars(smp).items() if inspect.isclass(kind) and issubclass(kind, smp.base.SegmentationModel)]
    if class_name not in kinds:
        raise RecipeError(f"'smp:{name}': segmentation_models_pytorch has no model '{class_name}'; it has {', '.join(kinds)}")
    encoders = smp.encoders.get_encoder_names()
    if encoder and encoder not in encoders and not encoder.startswith("tu-"):
        close = difflib.get_close_matches(encoder, encoders, 5) or encoders[:5]
        raise RecipeError(f"'smp:{name}': no encoder '{encoder}'; it has {', '.join(close)}, ..., and those of timm, as tu-NAME")
    arguments: dict[str, Any] = {"encoder_name": encoder} if encoder else {}
    channels = request.channels or 3
    try:
        model: nn.Module = getattr(smp, class_name)(encoder_weights=None, in_channels=channels, classes=request.classes or 1, **arguments)
    except (KeyError, ValueError, RuntimeError) as error:
        raise RecipeError(f"'smp:{name}': {' '.join(str(error).split())[:300]}") from error
    assumed = "mean and standard deviation are those of ImageNet, an assumption: --mean and --std set others"
    notes = [assumed] if not request.normalised else []
    return SourceModel(
        model=model, channels=channels, size=request.size or DEFAULT_SIZE, mean=for_channels(IMAGENET_MEAN, channels),
        std=for_channels(IMAGENET_STD, channels), notes=(*notes, *([] if request.size else [ASSUMED_SIZE])),
    )  # fmt: skip


def open_factory(name: str, request: Request) -> SourceModel:
    """Call the user's function `package.module:factory`, which takes no arguments. Its model takes raw pixels, and is used as it is."""
    model = call_factory(name, {}, advice="write a function that can be called without arguments")
    return SourceModel(
        model=model, channels=request.channels or 3, size=request.size or DEFAULT_SIZE, notes=() if request.size else (ASSUMED_SIZE,)
    )
