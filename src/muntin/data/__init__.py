"""Images and masks in, batches out; the demonstration data set.

Names that need torch, such as `Crops`, are imported on first use: `muntin init` and reading a recipe work without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from muntin.data.augmentation import Augmentation
from muntin.data.config import DataConfig, open_source
from muntin.data.earth import EarthSource
from muntin.data.folders import FolderSource
from muntin.data.recipe_wizard import write_recipe
from muntin.data.shards import ShardSource, write_shards
from muntin.data.source import Samples, Source
from muntin.tasks.classes import ClassSpec
from muntin.tasks.folders import FolderPair
from muntin.tasks.samples import Sample

if TYPE_CHECKING:
    from muntin.data.batch_feed import BatchFeed, ImageBatch, prefetch
    from muntin.data.batches import Crops, calibration_batches

__all__ = [
    "Augmentation",
    "BatchFeed",
    "ClassSpec",
    "Crops",
    "DataConfig",
    "EarthSource",
    "FolderPair",
    "FolderSource",
    "ImageBatch",
    "Sample",
    "Samples",
    "ShardSource",
    "Source",
    "calibration_batches",
    "open_source",
    "prefetch",
    "write_recipe",
    "write_shards",
]

_TORCH_NAMES = {
    **dict.fromkeys(("Crops", "calibration_batches"), "muntin.data.batches"),
    **dict.fromkeys(("BatchFeed", "ImageBatch", "prefetch"), "muntin.data.batch_feed"),
}


def __getattr__(name: str) -> object:
    if name in _TORCH_NAMES:
        return getattr(importlib.import_module(_TORCH_NAMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
