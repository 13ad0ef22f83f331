"""`open_model`: a model of another package, or of the user, with muntin's interface.

Axes: B images, C channels, H W map, K scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from muntin.artifact import Signature
from muntin.deployment.sizes.requested import Size
from muntin.deployment.sources.answers import AnswerLayout, read_answer, wrap
from muntin.deployment.sources.hugging_face import open_hugging_face
from muntin.deployment.sources.packages import open_factory, open_smp, open_timm, open_torchvision
from muntin.deployment.sources.pictures import calibration_pictures
from muntin.deployment.sources.source_model import ChannelStatistics, LoadedWeights, Request, SourceModel
from muntin.deployment.sources.weights import load_file
from muntin.errors import DataError, RecipeError
from muntin.models.foreign import Statistic, checked_statistics
from muntin.tasks.classes import Classes, ClassSpec, class_infos, specs_of

OPENERS: dict[str, Callable[[str, Request], SourceModel]] = {
    "timm": open_timm,
    "torchvision": open_torchvision,
    "smp": open_smp,
    "hf": open_hugging_face,
}
KINDS = "timm:NAME, torchvision:NAME, smp:CLASS:ENCODER, hf:FOLDER, package.module:function"


@dataclass(frozen=True, kw_only=True)
class OpenedModel:
    """A model that takes raw pixels 0-255 (B, channels, H, W) and returns scores (B, K) or (B, K, H, W).

    `size`: height and width that the model was made for, pixels. `signature`: task, channels and classes, for `muntin.export`. `weights`:
    what was loaded; None if they are random, or the function's. `notes`: what was assumed, changed or left out, one line each.
    """

    source: str
    model: nn.Module
    size: Size
    signature: Signature
    weights: LoadedWeights | None
    notes: tuple[str, ...]

    @property
    def channels(self) -> int:
        return self.signature.channels

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return tuple(entry.name for entry in self.signature.classes)

    def pictures(self, folder: Path | str, largest_count: int = 64) -> list[Tensor]:
        """Read batches of at most so many pictures in a folder, for `muntin.export`: see `calibration_pictures`."""
        size, task = self.size, self.signature.task
        return calibration_pictures(Path(folder), channels=self.channels, size=size, task=task, largest_count=largest_count)


def open_model(
    source: str,
    weights: Path | str | None = None,
    *,
    size: int | Size | None = None,
    channels: int | None = None,
    classes: int | Classes | None = None,
    mean: Statistic | None = None,
    std: Statistic | None = None,
) -> OpenedModel:
    """Open a model for `muntin.export`. Nothing is downloaded. Costs one call of the model.

    `source`: `timm:NAME`, `torchvision:NAME`, `smp:CLASS:ENCODER`, `hf:FOLDER`, or `package.module:function`, which is imported and called.
    `weights`: a .safetensors file, or what `torch.save` wrote of a state_dict; every tensor of the model must be in it. Without it the
    weights are random, or those in the folder of `hf`. `size`: side, or height and width, of the pictures. `classes`: names, also with
    colours as in `muntin.export`, or how many. `mean`, `std`: of each channel, of pixels from 0 to 1. What is not given is the package's
    own.
    Raises `RecipeError` for what cannot be opened, `DependencyError` for a missing package, `ExportError` for a model of another kind.
    """
    kind, colon, name = source.partition(":")
    if not colon or not name:
        raise RecipeError(f"'{source}' is no source of a model: give {KINDS}")
    statistics = checked_statistics(mean, std)
    file = None if weights is None else Path(weights)
    if file is not None and not file.is_file():
        raise RecipeError(f"weights {file}: there is no such file")
    named = None if classes is None or isinstance(classes, int) else specs_of(classes)
    request = Request(
        classes=_checked_number("classes", classes if isinstance(classes, int) else None if named is None else len(named), 65535),
        channels=_checked_number("channels", channels or _count(statistics), 16),
        size=_checked_size(size), normalised=statistics is not None, weights=file,
    )  # fmt: skip
    opener = OPENERS.get(kind)
    opened = open_factory(source, request) if opener is None else opener(name, request)
    if file is not None and opened.weights is None:
        opened = replace(opened, weights=load_file(opened.model, file, unused=opened.unused))
    if statistics is not None:
        if _count(statistics) not in (None, opened.channels):
            raise RecipeError(
                f"{_count(statistics)} values of mean or std, and '{source}' takes {opened.channels} channels: give one value, or one for "
                "each channel"
            )
        mean_C, std_C = (values if len(values) > 1 else values * opened.channels for values in statistics)
        opened = replace(opened, mean=mean_C, std=std_C)
    answer = read_answer(source, _answer(source, opened))
    model = wrap(opened, answer).eval()
    return OpenedModel(
        source=source, model=model, size=opened.size, signature=_signature(source, opened, answer, named), weights=opened.weights,
        notes=(*weight_notes(opened.weights, random=opener is not None), *_picture_notes(opened, answer), *opened.notes),
    )  # fmt: skip


def _answer(source: str, opened: SourceModel) -> object:
    """Return the model's answer to one grey picture."""
    low = 0.0 if opened.mean else 127.0  # about what the model sees of it
    try:
        with torch.no_grad():
            answer: object = opened.model.eval()(torch.full((1, opened.channels, *opened.size), low))
    except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RecipeError(
            f"'{source}' fails on a picture of {opened.size[0]} x {opened.size[1]} with {opened.channels} channels: {reason}; --size and "
            "--channels set others"
        ) from error
    return answer


def _signature(source: str, opened: SourceModel, answer: AnswerLayout, named: Sequence[ClassSpec] | None) -> Signature:
    """Return task and classes. Raises `RecipeError` for another number of names than the model has classes."""
    count = max(2, answer.outputs)  # of one score, two classes are made
    if named is not None and len(named) != count:
        raise RecipeError(f"{len(named)} names of classes, and '{source}' has {count} classes: give as many")
    if named is None:
        own = _distinct(opened.class_names)
        names = own if len(own) == count else tuple(f"class-{number}" for number in range(count))
        named = [ClassSpec(name=name) for name in names]
    height, width = opened.size
    try:
        classes = class_infos(named, answer.task)
        side = height if answer.size is None and height == width else None
        return Signature(task=answer.task, channels=opened.channels, classes=classes, side=side)
    except ValidationError as error:
        raise RecipeError(f"classes of '{source}': {error.errors(include_url=False)[0]['msg']}") from error
    except DataError as error:
        raise RecipeError(f"classes of '{source}': {error}") from error


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names with the number of the class after those that several classes have: ImageNet has two kinds of crane."""
    counts = Counter(names)
    return tuple(name if counts[name] == 1 else f"{name} ({number})" for number, name in enumerate(names))


def weight_notes(weights: LoadedWeights | None, *, random: bool) -> list[str]:
    if weights is None:
        advice = "the weights are random: give a file of weights for answers that mean something"
        return [advice if random else "the weights are those with which the function returns the model"]
    notes = [f"{weights.path.name}: all {weights.tensors} tensors of the model are from it"]
    if weights.left_out:
        notes.append(
            f"{weights.path.name}: {len(weights.left_out)} tensors are not in the model and were left out ({weights.left_out[0]}, ...)"
        )
    return notes


def _picture_notes(opened: SourceModel, answer: AnswerLayout) -> list[str]:
    height, width = opened.size
    normalised = "are not normalised: the model takes 0 to 255"
    if opened.mean:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (opened.mean, opened.std))
        normalised = f"are divided by 255 and normalised with mean {mean} and standard deviation {std}"
    notes = [f"pictures of {height} x {width}; pixels {normalised}"]
    notes += ["the model takes the channels in reverse order, blue first"] if opened.bgr else []
    notes += [] if answer.entry is None else [f"the scores are '{answer.entry}' of what the model returns"]
    if answer.size not in (None, opened.size):
        rows, columns = answer.size or (0, 0)
        notes.append(f"the scores are resized from {rows} x {columns} to the size of the picture")
    return notes + (["of the model's one score two classes are made: negative and positive"] if answer.outputs == 1 else [])


def _count(statistics: tuple[ChannelStatistics, ChannelStatistics] | None) -> int | None:
    """Return how many channels a mean and standard deviation are for; None if they are for any number."""
    count = 1 if statistics is None else max(map(len, statistics))
    return count if count > 1 else None


def _checked_number(key: str, value: int | None, largest: int) -> int | None:
    if value is not None and not 1 <= value <= largest:
        raise RecipeError(f"{key} {value}: give a number from 1 to {largest}")
    return value


def _checked_size(size: int | Size | None) -> Size | None:
    sides = (size, size) if isinstance(size, int) else size
    if sides is not None and (len(sides) != 2 or not all(1 <= side <= 1 << 14 for side in sides)):
        raise RecipeError(f"size {size}: give a side, or height and width, from 1 to {1 << 14} pixels")
    return None if sides is None else (sides[0], sides[1])
