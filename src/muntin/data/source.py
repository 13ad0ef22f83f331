"""The interface of a data set: named splits of samples, decoded on access.

A sample is one picture with its target. A split is a lazy sequence: its length and the pictures' sizes cost at most a read of the file
headers. Decoded pictures stay in a cache that is bounded in bytes.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, overload

from muntin.artifact.answers import Task
from muntin.artifact.classes import ClassInfo
from muntin.tasks.folders import SplitName
from muntin.tasks.samples import Sample

SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
CheckProgress = Callable[[int, int], None]  # files checked, files in all


class Samples(ABC, Sequence[Sample]):
    """A split: length, indexing, slices, and the sizes of all pictures without decoding them. Several threads may read it at once."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> Sample:
        """Decode the sample at 0 <= index < len(self)."""

    @abstractmethod
    def sizes(self) -> Sequence[tuple[int, int]]:
        """(height, width) of each picture, in order."""

    def names(self) -> Sequence[str]:
        """The name of each picture, in order. Decodes all of them, unless the subclass knows better."""
        return [self.load(index).name for index in range(len(self))]

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} samples")
        return self.load(index % len(self))

    def select(self, indices: Sequence[int]) -> Samples:
        """The samples at the given indices, 0 <= index < len(self), in that order. Decodes nothing."""
        return _Selection(self, indices)


class Source(Protocol):
    """A data set: its task, classes, number of channels, and splits."""

    @property
    def task(self) -> Task: ...
    @property
    def classes(self) -> tuple[ClassInfo, ...]: ...
    @property
    def channels(self) -> int: ...
    @property
    def notes(self) -> tuple[str, ...]:
        """Files and folders that are not used, and classes that a split lacks, one line each; the CLI prints them."""

    def split(self, name: SplitName) -> Samples: ...
    def check(self, progress: CheckProgress | None = None) -> tuple[str, ...]:
        """Open every file once. Returns warnings, one line each; raises DataError for the first problem."""


class HeldSamples(Samples):
    """Samples that are already in memory."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = tuple(samples)

    def __len__(self) -> int:
        return len(self._samples)

    def load(self, index: int) -> Sample:
        return self._samples[index]

    def sizes(self) -> Sequence[tuple[int, int]]:
        return [(sample.image.shape[0], sample.image.shape[1]) for sample in self._samples]


class _Selection(Samples):
    def __init__(self, samples: Samples, indices: Sequence[int]) -> None:
        self._samples, self._indices = samples, indices

    def __len__(self) -> int:
        return len(self._indices)

    def load(self, index: int) -> Sample:
        return self._samples.load(self._indices[index])

    def names(self) -> Sequence[str]:
        names = self._samples.names()
        return [names[index] for index in self._indices]

    def sizes(self) -> Sequence[tuple[int, int]]:
        sizes = self._samples.sizes()
        return [sizes[index] for index in self._indices]


class SampleCache:
    """Keeps the most recently used samples, at most `limit_bytes` in all. Thread-safe; two threads may decode the same sample."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._lock = threading.Lock()
        self._samples: OrderedDict[Hashable, Sample] = OrderedDict()

    @property
    def bytes(self) -> int:
        """Size of the samples in the cache, bytes."""
        return self._bytes

    def get(self, key: Hashable, decode: Callable[[], Sample]) -> Sample:
        """The cached sample of `key`; if there is none, the result of `decode`, which is then cached."""
        with self._lock:
            sample = self._samples.get(key)
            if sample is not None:
                self._samples.move_to_end(key)
                return sample
        sample = decode()
        with self._lock:
            if key not in self._samples and sample.bytes <= self._limit:
                self._samples[key] = sample
                self._bytes += sample.bytes
                while self._bytes > self._limit:
                    self._bytes -= self._samples.popitem(last=False)[1].bytes
        return sample
