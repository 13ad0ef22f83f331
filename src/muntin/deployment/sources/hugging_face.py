"""Models of transformers in a local folder: `config.json`, `preprocessor_config.json`, `model.safetensors`. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from muntin.deployment.sizes.requested import Size
from muntin.deployment.sources.answers import refuse_free_form
from muntin.deployment.sources.packages import ASSUMED_SIZE
from muntin.deployment.sources.source_model import DEFAULT_SIZE, ChannelStatistics, LoadedWeights, Request, SourceModel
from muntin.deployment.sources.weights import read_tensors
from muntin.errors import DependencyError, RecipeError
from muntin.models.foreign import for_channels
from muntin.text import list_some

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def open_hugging_face(name: str, request: Request) -> SourceModel:
    """Open a model for pictures of transformers in a folder; see `load_hugging_face`."""
    folder = Path(name).expanduser()
    kind = _model_class(name, folder)
    if (main := getattr(kind, "main_input_name", "pixel_values")) != "pixel_values":
        refuse_free_form(f"hf:{name}", f"takes {main}, not pictures")
    model, weights, notes = load_hugging_face(name, request)
    config = model.config
    labels = getattr(config, "id2label", None) or {}
    if request.classes not in (None, len(labels)):
        raise RecipeError(f"{request.classes} classes: the model in {folder} has {len(labels)}; give as many names, or none")
    channels = int(getattr(config, "num_channels", 3))
    if request.channels not in (None, channels):
        raise RecipeError(f"{request.channels} channels: the model in {folder} takes {channels} (num_channels in its {CONFIG})")
    processor = _processor(folder)
    mean, std = _statistics(folder, processor, channels, given=request.normalised)
    size = request.size or _size(processor, config)
    notes += [] if size else [ASSUMED_SIZE]
    return SourceModel(
        model=model, channels=channels, size=size or DEFAULT_SIZE, mean=mean, std=std, bgr=bool(processor.get("do_flip_channel_order")),
        class_names=tuple(str(label) for _, label in sorted((int(key), label) for key, label in labels.items())), weights=weights,
        notes=tuple(notes),
    )  # fmt: skip


def load_hugging_face(name: str, request: Request) -> tuple[Any, LoadedWeights | None, list[str]]:
    """Return a model of transformers in a folder, by the class that `architectures` in its config.json names; what was loaded; and notes.

    Loads model.safetensors (or its parts), if the folder has it and the user gave no file. Code in the folder is not run.
    """
    folder = Path(name).expanduser()
    kind = _model_class(name, folder)
    import transformers

    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise RecipeError(f"{folder / CONFIG}: {' '.join(str(error).split())[:300]}") from error
        if hasattr(config, "use_pretrained_backbone"):
            config.use_pretrained_backbone = False  # otherwise the backbone is downloaded
        return _build(kind, config, folder, request)


def _model_class(name: str, folder: Path) -> Any:
    """Return the class of transformers that a folder's configuration names."""
    content = _read_json(folder / CONFIG)
    if "pretrained_cfg" in content and "architecture" in content:
        file = f" --weights {folder / WEIGHTS}" if (folder / WEIGHTS).is_file() else ""
        raise RecipeError(f"{folder} holds a model of timm: give timm:{content['architecture']}{file}")
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(f"'hf:{name}' needs the package transformers: pip install transformers") from error
    architectures = content.get("architectures") or ["none"]
    kind = getattr(transformers, str(architectures[0]), None)
    if kind is None:
        raise RecipeError(
            f"{folder / CONFIG}: transformers {transformers.__version__} has no class '{architectures[0]}' (`architectures`), and "
            "code in the folder is not run: name a class of transformers, or give a function of yours, as package.module:factory"
        )
    return kind


def _build(kind: Any, config: Any, folder: Path, request: Request) -> tuple[Any, LoadedWeights | None, list[str]]:
    """Return the model, what was loaded into it from the user's file or the folder, and notes.

    transformers loads both, because its files may name the tensors otherwise than its models do.
    """
    options: dict[str, Any] = {"config": config, "local_files_only": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        if request.weights is not None:
            file = request.weights
            model, info = kind.from_pretrained(None, state_dict=read_tensors(file), **options)
        elif any((folder / name).is_file() for name in (WEIGHTS, f"{WEIGHTS}.index.json")):
            file = folder / WEIGHTS
            model, info = kind.from_pretrained(folder, use_safetensors=True, **options)
        else:
            others = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
            return kind(config), None, [f"{others[0]} was not read: give it by --weights"] if others else []
    except (OSError, ValueError, RuntimeError) as error:
        raise RecipeError(f"{folder}: {' '.join(str(error).split())[:300]}") from error
    total = len(model.state_dict())
    if missing := sorted(info["missing_keys"]):
        raise RecipeError(
            f"weights {file}: {len(missing)} of the {total} tensors of {kind.__name__} are missing ({list_some(missing, 3)}): give weights "
            f"that were saved of this class, or name theirs under `architectures` in {folder / CONFIG}"
        )
    if wrong := sorted(f"{key} is {tuple(stored)} and in the model {tuple(own)}" for key, stored, own in info["mismatched_keys"]):
        raise RecipeError(f"weights {file}: {list_some(wrong, 3)}: give the {CONFIG} that was saved with the weights")
    return model, LoadedWeights(path=file, tensors=total, left_out=tuple(sorted(info["unexpected_keys"]))), []


def _processor(folder: Path) -> dict[str, Any]:
    """The facts about the pictures that the model takes; empty if the folder has none."""
    file = next((folder / name for name in _PROCESSORS if (folder / name).is_file()), None)
    content = {} if file is None else _read_json(file)
    nested = content.get("image_processor")
    return nested if isinstance(nested, dict) else content


def _statistics(folder: Path, processor: dict[str, Any], channels: int, *, given: bool) -> tuple[ChannelStatistics, ChannelStatistics]:
    """Mean and standard deviation of pixels from 0 to 1, by what the processor multiplies them with before it normalises them."""
    if not processor and not given:
        raise RecipeError(f"{folder} has no {_PROCESSORS[0]}, so how the pixels are normalised is not known: give --mean and --std")
    normalised = bool(processor.get("do_normalize"))
    mean, std = (processor.get(key) if normalised else None for key in ("image_mean", "image_std"))
    scale = 255 * float(processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1)

    def scaled(values: Any, default: float) -> ChannelStatistics:
        listed = [default] if values is None else values if isinstance(values, list) else [values]
        return tuple(value / scale for value in for_channels(listed, channels))

    return scaled(mean, 0.0), scaled(std, 1.0)


def _size(processor: dict[str, Any], config: Any) -> Size | None:
    """Height and width of the pictures: what they are cut or resized to, or those of the model's configuration."""
    keys = ("crop_size", "size") if processor.get("do_center_crop") else ("size",)
    entry: Any
    for entry in (*(processor.get(key) for key in keys), getattr(config, "image_size", None)):
        if isinstance(entry, dict):
            height = entry.get("height", entry.get("shortest_edge"))
            entry = [height, entry.get("width", height)]
        sides = list(entry) if isinstance(entry, list | tuple) else [entry, entry]
        if len(sides) == 2 and all(isinstance(side, int) for side in sides):
            return int(sides[0]), int(sides[1])
    return None


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError | NotADirectoryError) else " ".join(str(error).split())
        raise RecipeError(f"{file}: {reason}; give the folder of a model of transformers, as save_pretrained writes it") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: holds no dictionary; give the folder of a model of transformers, as save_pretrained writes it")
    return content


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from printing progress bars and remarks."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
