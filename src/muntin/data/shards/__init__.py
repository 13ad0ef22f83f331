"""Shards: tar files of pictures with their masks or classes, in the layout of webdataset; indexed once, read by offset."""

from __future__ import annotations

from muntin.data.shards.source import ShardSource
from muntin.data.shards.writing import write_shards

__all__ = ["ShardSource", "write_shards"]
