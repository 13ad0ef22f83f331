from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muntin.data.source import HeldSamples, SampleCache
from muntin.tasks.samples import Sample


def sample(side: int, name: str = "a") -> Sample:
    return Sample(name=name, image=np.zeros((side, side + 1, 3), np.uint8), target=np.zeros((side, side + 1), np.uint8))


def test_samples_as_a_sequence() -> None:
    samples = HeldSamples([sample(side, str(side)) for side in range(1, 6)])
    assert [entry.name for entry in samples] == ["1", "2", "3", "4", "5"]
    assert samples[-1].name == "5"
    assert [entry.name for entry in samples[1:4:2]] == ["2", "4"]
    assert list(samples[1:4:2].sizes()) == [(2, 3), (4, 5)]
    assert samples[1:][1:][0].name == "3"
    with pytest.raises(IndexError):
        samples[5]


def test_labels_of_a_classification_sample() -> None:
    assert sample(2).labels.shape == (2, 3)
    with pytest.raises(TypeError):
        _ = Sample(name="a", image=np.zeros((1, 1, 3), np.uint8), target=1).labels


def test_cache_of_recently_used_samples() -> None:
    decoded: list[int] = []

    def get(side: int) -> Sample:
        def decode() -> Sample:
            decoded.append(side)
            return sample(side)

        return cache.get(side, decode)

    cache = SampleCache(sample(3).bytes + sample(4).bytes)
    for side in (3, 4, 3, 4, 3):
        get(side)
    assert decoded == [3, 4]
    get(2)  # drops 4, the least recently used
    get(3)
    assert decoded == [3, 4, 2]
    get(4)
    assert decoded == [3, 4, 2, 4]
    get(9)  # larger than the cache: not kept, and nothing is dropped
    get(4)
    assert decoded == [3, 4, 2, 4, 9]


@given(limit=st.integers(0, 2000), order=st.lists(st.integers(1, 12), max_size=40))
def test_cache_within_its_limit(limit: int, order: Sequence[int]) -> None:
    cache = SampleCache(limit)
    for side in order:
        assert cache.get(side, lambda side=side: sample(side)).image.shape[0] == side  # type: ignore[misc]
        assert cache.bytes <= limit
