"""What every data set looks like to the rest of muntin: named splits of samples, decoded when they are asked for.

A sample is one picture with its truth. Splits are lazy sequences: their length and the pictures' sizes cost a header read at
most, a picture is decoded on access and kept in a cache that is bounded in bytes, so that random crops do not decode a file
anew each time as long as the data set fits the cache.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, overload

import numpy as np
import numpy.typing as npt

from muntin.artifact.classes import ClassInfo

UInt8 = npt.NDArray[np.uint8]
DataTask = Literal["segment", "classify"]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
MAX_CLASSES = 255  # labels are uint8 and 255 is `IGNORED`


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One picture, uint8 (H, W, C), and its truth: uint8 labels (H, W) with 255 = ignored, or for `classify` the class's number.

    The arrays may be read-only and shared with a cache: copy before writing.
    """

    name: str
    image: UInt8
    target: UInt8 | int

    @property
    def bytes(self) -> int:
        """What the sample holds in memory."""
        return self.image.nbytes + (0 if isinstance(self.target, int) else self.target.nbytes)

    @property
    def labels(self) -> UInt8:
        """The labels (H, W) of a segmentation sample."""
        if isinstance(self.target, int):
            raise TypeError("a classification sample has no labels (H, W) but one `target`")
        return self.target


class Samples(ABC, Sequence[Sample]):
    """A split: `len`, indexing and slices, and the sizes of all pictures without decoding them. Safe to read from several threads."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def load(self, index: int) -> Sample:
        """The sample at 0 <= index < len(self)."""

    @abstractmethod
    def sizes(self) -> Sequence[tuple[int, int]]:
        """(height, width) of every picture, in order."""

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.load(index % len(self))

    def select(self, indices: Sequence[int]) -> Samples:
        """Some of the samples, 0 <= index < len(self) each, in that order; nothing is decoded for it."""
        return _Selection(self, indices)


class Source(Protocol):
    """A data set: what is to be done with it, its classes, its pictures' channels, and its splits."""

    @property
    def task(self) -> DataTask: ...
    @property
    def classes(self) -> tuple[ClassInfo, ...]: ...
    @property
    def channels(self) -> int: ...
    @property
    def notes(self) -> tuple[str, ...]:
        """What was left aside, one line each, for the command line to print."""

    def split(self, name: SplitName) -> Samples: ...
    def check(self, progress: Progress | None = None) -> tuple[str, ...]:
        """Opens everything once and raises the first problem; returns what is odd but no error, one line each."""


Progress = Callable[[int, int], None]  # done, of how many


class HeldSamples(Samples):
    """Samples that are in memory already."""

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

    def sizes(self) -> Sequence[tuple[int, int]]:
        sizes = self._samples.sizes()
        return [sizes[index] for index in self._indices]


class SampleCache:
    """The least recently used samples go when `limit_bytes` is passed; a sample larger than the limit is never kept.

    Two threads that miss the same sample at once both make it: the lock is not held while a file is decoded.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._held = limit_bytes, 0
        self._lock = threading.Lock()
        self._samples: OrderedDict[Hashable, Sample] = OrderedDict()

    @property
    def bytes(self) -> int:
        """What the cache holds now."""
        return self._held

    def get(self, key: Hashable, make: Callable[[], Sample]) -> Sample:
        """The sample of a key, made if it is not there."""
        with self._lock:
            sample = self._samples.get(key)
            if sample is not None:
                self._samples.move_to_end(key)
                return sample
        sample = make()
        with self._lock:
            if key not in self._samples and sample.bytes <= self._limit:
                self._samples[key] = sample
                self._held += sample.bytes
                while self._held > self._limit:
                    self._held -= self._samples.popitem(last=False)[1].bytes
        return sample


def sizes_of(samples: Sequence[Sample]) -> Sequence[tuple[int, int]]:
    """(height, width) of every picture of a split or of a plain list of samples."""
    if isinstance(samples, Samples):
        return samples.sizes()
    return [(sample.image.shape[0], sample.image.shape[1]) for sample in samples]
