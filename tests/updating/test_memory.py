"""Which pictures are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from muntin.data.items import ItemSamples
from muntin.data.source import HeldSamples, SampleCache
from muntin.tasks.classify.folders import ClassReader
from muntin.tasks.reading import ReadingSettings
from muntin.tasks.samples import Item, Sample
from muntin.updating.memory import balanced_choice, balanced_labels, class_shares, herding, remember_windows, windows_of


def picture(height: int, width: int, label: int, name: str = "a") -> Sample:
    labels = np.full((height, width), 255, np.uint8)
    labels[: height // 2] = label
    return Sample(name=name, image=np.full((height, width, 3), label, np.uint8), target=labels)


def test_windows_cover_each_pixel_once() -> None:
    seen = np.zeros((70, 33), int)
    for window in windows_of(HeldSamples([picture(70, 33, 0)]), 32):
        assert window.height <= 32 and window.width <= 32
        seen[window.top : window.top + window.height, window.left : window.left + window.width] += 1
    assert (seen == 1).all()
    assert len(windows_of(HeldSamples([picture(70, 33, 0)]), None)) == 1


def test_shares_of_pixels_and_pictures() -> None:
    assert class_shares(picture(4, 4, 1).labels[:, :], 3).tolist() == [0, 0.5, 0]
    assert class_shares(2, 3).tolist() == [0, 0, 1]


def test_rare_classes_are_kept() -> None:
    samples = HeldSamples([*(picture(8, 8, 0, f"{n}") for n in range(50)), picture(8, 8, 1), picture(8, 8, 2)])
    chosen = remember_windows(samples, count=20, classes=3, side=16, seed=0)
    labels = [int(window.cut(samples)[0][0, 0, 0]) for window in chosen]
    assert len(chosen) == 20 and {1, 2} <= set(labels)
    assert chosen == remember_windows(samples, count=20, classes=3, side=16, seed=0)


def test_balance() -> None:
    shares = np.eye(3)[[0] * 30 + [1] * 10 + [2] * 3]
    chosen = balanced_choice(shares, 12)
    assert np.bincount(shares[chosen].argmax(1)).tolist() == [5, 4, 3]
    assert len(balanced_choice(shares, 100)) == 43
    assert balanced_choice(np.zeros((4, 2)), 3) == []


def test_balance_of_shares() -> None:
    """A row counts for a class from a share of 0.01 on, or for the largest share if no row has as much."""
    shares = np.array([[0.995, 0.005], [0.5, 0.5], [0.98, 0.02], [1.0, 0.0]])
    assert balanced_choice(shares[:, 1:], 4) == [1, 2]
    assert balanced_choice(np.array([[0.004], [0.005]]), 4) == [1]


def test_balance_of_labels() -> None:
    labels = np.array([0] * 30 + [1] * 10 + [300] * 3)
    assert np.bincount(labels[balanced_labels(labels, 12)])[[0, 1, 300]].tolist() == [5, 4, 3]
    assert balanced_labels(labels, 3) == [0, 30, 40] and len(balanced_labels(labels, 100)) == 43
    features = np.random.default_rng(0).normal(size=(43, 4)).astype(np.float32)
    first = [start + int(herding(features[start:end], 1)[0]) for start, end in ((0, 30), (30, 40), (40, 43))]
    assert balanced_labels(labels, 3, features) == first
    pictures = [Sample(name=f"{n}", image=np.full((4, 4, 3), 9 * n, np.uint8), target=int(n > 1)) for n in range(9)]
    chosen = remember_windows(
        HeldSamples(pictures), count=3, classes=2, side=None, seed=0, features=lambda image: np.append(image[0, 0], 50).astype(np.float32)
    )
    assert [pictures[window.index].target for window in chosen] in ([0, 0, 1], [0, 1, 1])


def test_every_class_of_pictures_is_kept_without_decoding(tmp_path: Path) -> None:
    items = [Item(key=f"{number}", image=tmp_path / f"{number}.png", target=number // 600) for number in range(1201)]

    class Unread(ItemSamples):
        def sizes(self) -> list[tuple[int, int]]:
            return [(8, 8)] * len(self)

    samples = Unread("train", items, ClassReader(ReadingSettings()), SampleCache(0))  # the files do not exist
    chosen = remember_windows(samples, count=5, classes=3, side=None, seed=0)
    assert np.bincount([items[window.index].target for window in chosen]).tolist() == [2, 2, 1]


def test_herding_is_closer_to_the_mean_than_chance() -> None:
    generator = np.random.default_rng(0)
    features = generator.normal(size=(200, 8)).astype(np.float32) + 1
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    order = herding(features, 10)

    def distance(rows: np.ndarray) -> float:  # type: ignore[type-arg]
        return float(np.linalg.norm(unit[rows].mean(0) - unit.mean(0)))

    chance = [distance(generator.choice(200, 10, replace=False)) for _ in range(50)]
    assert len(set(order.tolist())) == 10 and distance(order) < min(chance)
