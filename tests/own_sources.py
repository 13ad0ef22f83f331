"""Sources of folders and shards with the keys of a recipe's section `data`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from muntin.data import FolderSource, ShardSource
from muntin.images import IGNORED
from muntin.tasks.classes import RGB, ClassSpec
from muntin.tasks.folders import FolderPair, PictureListing
from muntin.tasks.reading import ReadingSettings


def _read(classes: Sequence[ClassSpec], ignore: int | RGB | None, channels: int, skip: Sequence[Path], root: Path | None) -> dict[str, Any]:
    return {"reading": ReadingSettings(channels=channels, classes=classes, ignore=ignore), "listing": PictureListing(skip=skip, root=root)}


def folder_source(
    base: FolderPair,
    *,
    classes: Sequence[ClassSpec] = (),
    ignore: int | RGB | None = IGNORED,
    channels: int = 3,
    skip: Sequence[Path] = (),
    root: Path | None = None,
    **options: Any,
) -> FolderSource:
    """A source of masks if `base` has some, otherwise of class folders."""
    task = "classify" if base.masks is None else "segment"
    return FolderSource(task, base=base, **_read(classes, ignore, channels, skip, root), **options)


def shard_source(
    base: Path,
    *,
    classes: Sequence[ClassSpec] = (),
    ignore: int | RGB | None = IGNORED,
    channels: int = 3,
    skip: Sequence[Path] = (),
    root: Path | None = None,
    **options: Any,
) -> ShardSource:
    """A source of shards."""
    return ShardSource(base=base, **_read(classes, ignore, channels, skip, root), **options)
