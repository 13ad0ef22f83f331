"""The `data:` section of a recipe, validated when it is read, and the data set that it names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_serializer, model_validator

from muntin.artifact.answers import Task
from muntin.data.augmentation import Augmentation, Preset, Probability, fill_in
from muntin.data.earth import EarthSource, EarthVariant
from muntin.data.folders import FolderSource
from muntin.data.shards.source import ShardSource
from muntin.data.source import Source
from muntin.images import IGNORED, MAX_CHANNELS
from muntin.section import Section
from muntin.tasks.classes import ClassSpec, MaskValue
from muntin.tasks.folders import FolderPair, PictureListing
from muntin.tasks.reading import ReadingSettings
from muntin.tasks.restore.degradation import MAX_SCALE, Degradation
from muntin.tasks.restore.folders import scale_of_pairs

SplitShare = Annotated[float, Field(gt=0, lt=1)]


_FOLDER_FIELDS = ("images", "masks", "degrade", "targets", "scale", "validation", "test", "classes", "ignore", "seed", "skip", "cache_mib")
SourceName = Literal["earth", "earth:climate", "earth:shore", "folders", "shards"]


class DataConfig(Section):
    """The pictures, their splits, and the training crops. The keys from `images` to `cache_mib` are for your own pictures only."""

    source: SourceName = Field(default="earth", description="the demonstration data, or your own pictures in `folders` or `shards` (.tar)")
    images: Path | None = Field(
        default=None,
        description="folder of images, subfolders too; for `classify` it holds a folder for each class; shards: folder of .tar files, or "
        "train-*.tar",
    )
    masks: Path | None = Field(
        default=None,
        description="folders: folder of masks; a mask has the stem of its image, and lies in a subfolder of the same name; unset for "
        "`classify`",
    )
    degrade: Degradation | None = Field(default=None, description="`restore`: how inputs are made from the clean photographs in `images`")
    targets: Path | None = Field(
        default=None, description="`restore` without `degrade`: folder of clean pictures, of the stems of the degraded ones in `images`"
    )
    scale: int | None = Field(
        default=None, ge=1, le=MAX_SCALE, description="`targets`: their sides over those of `images`; unset: as of the first pair"
    )
    validation: SplitShare | FolderPair = Field(default=0.15, description="share of the pictures in `images`, 0-1, or own folders")
    test: SplitShare | FolderPair = Field(default=0.15, description="like `validation`, for the test split")
    classes: tuple[ClassSpec, ...] = Field(
        default=(),
        max_length=65535,
        description="the classes in order; for `classify` names of folders, by default all; shards: by default those of classes.json",
    )
    ignore: MaskValue | None = Field(default=IGNORED, description="mask value, or [red, green, blue], of no class; null: none")
    channels: int = Field(
        default=3, ge=1, le=MAX_CHANNELS, description="channels of the pictures, 1-16; above 4 in .npy and large TIFFs only"
    )
    seed: int = Field(default=0, ge=0, description="seed of the random division into splits")
    skip: tuple[Path, ...] = Field(default=(), description="images to leave out, such as damaged ones, with their paths; or SHARD.tar/NAME")
    cache_mib: int = Field(default=1024, ge=0, description="memory for decoded pictures, MiB")
    workers: int | None = Field(
        default=None, ge=1, le=64, description="threads that make batches; any number makes the same ones; unset: by cores and device"
    )
    crop: int = Field(default=256, ge=8, le=4096, description="side of the square training crops, pixels")
    rare: Probability = Field(default=0.0, description="share of crops centred on a pixel of a class drawn uniformly; segmentation only")
    augment: Preset = Field(
        default="light",
        description="random changes to training crops: none; light: flips, zoom, a little colour; standard: rotation, more zoom and "
        "colour, too; strong: more of all, mosaic (segment), mixup and cutmix (classify); `muntin fit --show-crops FILE.png` shows them",
    )
    augmentation: Augmentation = Field(default=Augmentation(), description="single values in place of those of `augment`")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, values: Any) -> Any:
        return fill_in(values)

    @field_serializer("augmentation")
    def _own_values(self, augmentation: Augmentation) -> dict[str, Any]:
        return augmentation.changes(self.augment)  # so that another preset in a written recipe has its values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source in ("folders", "shards"):
            self._check_own()
            return self
        # Compared by value, not by whether it was set: a recipe written with all its defaults can be read again.
        changed = [name for name in _FOLDER_FIELDS if getattr(self, name) != type(self).model_fields[name].default]
        if changed:
            raise ValueError(f"`{changed[0]}` belongs to `source: folders` or `shards`; {self.source} has its own: remove it")
        if self.channels != 3:
            raise ValueError(f"channels {self.channels}: the pictures of {self.source} have 3: set `channels: 3`")
        return self

    def _check_own(self) -> None:
        if self.images is None:
            raise ValueError(
                f"`source: {self.source}` needs `images`: name a folder of {'pictures' if self.source == 'folders' else 'shards'}"
            )
        pairs = [split for split in (self.validation, self.test) if isinstance(split, FolderPair)]
        if self.source == "shards" and (self.masks is not None or any(pair.masks is not None for pair in pairs)):
            raise ValueError("a shard holds its masks itself, as NAME.mask.png beside NAME.jpg: remove `masks`")
        if self.masks is not None and len(self.classes) < 2:
            raise ValueError("masks need at least two `classes`, each with a name and a value")
        if self.restores:
            self._check_restore()
        shares = [share for share in (self.validation, self.test) if isinstance(share, float)]
        if sum(shares) >= 1:
            raise ValueError(
                f"the shares of validation and test add up to {sum(shares):g}: make them less than 1, so that pictures to train on are left"
            )

    def given(self, keys: Sequence[str]) -> list[str]:
        """Those of some keys that are not null."""
        return [key for key in keys if getattr(self, key) is not None]

    @property
    def restores(self) -> bool:
        """True for the data of `restore`."""
        return self.degrade is not None or self.targets is not None

    @property
    def output_scale(self) -> int:
        """Size of the clean pictures over that of the inputs; 1 for other tasks."""
        return (self.scale or 1) if self.degrade is None else self.degrade.scale

    def _check_restore(self) -> None:
        if self.source != "folders":
            raise ValueError(f"restore reads pictures from folders: write `source: folders`, not {self.source}")
        if self.degrade is not None and (self.targets is not None or self.scale is not None):
            key = "scale" if self.targets is None else "targets"
            raise ValueError(f"`degrade` makes the inputs from the clean pictures in `images`: remove `{key}`, or `degrade`")
        if self.masks is not None or self.classes:
            raise ValueError(f"restore has no {'classes' if self.masks is None else 'masks'}: remove them")
        if self.degrade is not None and self.degrade.jpeg is not None and self.channels not in (1, 3):
            raise ValueError(f"degrade.jpeg with channels {self.channels}: JPEG has 1 or 3: set it to null")


def with_scale(config: DataConfig, *, root: Path) -> DataConfig:
    """The same section with `scale` as of the first pair of `targets`, if it is unset. Reads two headers. Raises DataError."""
    if config.targets is None or config.scale is not None or config.images is None:
        return config
    pair = FolderPair(images=config.images, targets=config.targets).under(root)
    return config.model_copy(update={"scale": scale_of_pairs(pair)})


def open_source(config: DataConfig, *, task: Task, root: Path) -> Source:
    """Open the data set of a recipe. Relative folders start at `root`, the recipe's folder. Raises DataError or DependencyError."""
    if config.source not in ("folders", "shards"):
        return EarthSource(cast(EarthVariant, config.source.partition(":")[2] or "cover"))
    images = Path() if config.images is None else config.images
    base = FolderPair(images=images, masks=config.masks, targets=config.targets).under(root)
    validation, test = (share.under(root) if isinstance(share, FolderPair) else share for share in (config.validation, config.test))
    reading = ReadingSettings(
        channels=config.channels, classes=config.classes, ignore=config.ignore, degrade=config.degrade, scale=config.output_scale
    )
    options: dict[str, Any] = {
        "reading": reading, "seed": config.seed, "cache_bytes": config.cache_mib << 20,
        "listing": PictureListing(skip=[root / path for path in config.skip], root=root),
    }  # fmt: skip
    if config.source == "folders":
        return FolderSource(task, base=base, validation=validation, test=test, **options)
    places = [share.images if isinstance(share, FolderPair) else share for share in (validation, test)]
    return ShardSource(base=base.images, validation=places[0], test=places[1], **options)
