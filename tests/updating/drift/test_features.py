"""Features of pictures, against numbers worked out by hand, and their order and words."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from muntin.artifact import ClassInfo, Signature
from muntin.tasks.class_shares import MAX_CLASSES
from muntin.updating.drift.features import WINDOW, describe, feature_list, pixel_features, window


def signature(task: str, *, channels: int = 3, classes: int = 3, side: int | None = None) -> Signature:
    named = () if task == "restore" else tuple(ClassInfo(name=f"c{k}", color=(k % 256, 0, 0)) for k in range(classes))
    return Signature(task=task, channels=channels, classes=named, side=side)


class Channels:
    """Scores are the pixels' channels; of a classifier their means."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
        scores = images_BHWC.transpose(0, 3, 1, 2).astype(np.float32)
        if self.signature.task == "classify":
            scores = scores.mean((2, 3))
            extra = len(self.signature.classes) - scores.shape[1]
            return np.pad(scores, ((0, 0), (0, extra)), constant_values=-1) if extra > 0 else scores
        return scores


@pytest.mark.parametrize("task", ["segment", "classify", "restore"])
@pytest.mark.parametrize("size", [(40, 30), (1, 1), (300, 500)])
def test_one_number_a_feature(task: str, size: tuple[int, int]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    session = Channels(signature(task))
    features = describe(session, picture)
    names = [feature.name for feature in feature_list(session.signature)]
    assert features.shape == (len(names),) and np.isfinite(features).all() and len(set(names)) == len(names)


def test_values_of_a_drawn_picture() -> None:
    picture = np.zeros((8, 8, 3), np.uint8)
    picture[:, :, 0], picture[:, 4:, 1] = 100, 200
    names = [feature.name for feature in feature_list(signature("segment"))]
    values = dict(zip(names, describe(Channels(signature("segment")), picture), strict=True))
    assert values["brightness of red"] == pytest.approx(100 / 255) and values["contrast of red"] == pytest.approx(0, abs=1e-6)
    assert values["contrast of green"] == pytest.approx(100 / 255)
    assert values["colourfulness"] == pytest.approx((100 + 200) / 2 / 255)
    assert (values["class c0"], values["class c1"], values["class c2"]) == (0.5, 0.5, 0)
    assert values["borders between classes"] == pytest.approx(8 / 56 / 2)


def test_detail_of_blur_and_noise() -> None:
    generator = np.random.default_rng(1)
    sharp = generator.integers(0, 256, (64, 64, 1)).astype(np.uint8)
    blurred = ((sharp[:-1].astype(int) + sharp[1:]) // 2).astype(np.uint8)
    noisy = np.clip(np.full((64, 64, 1), 128) + generator.normal(0, 3, (64, 64, 1)), 0, 255).astype(np.uint8)
    flat = np.full((64, 64, 1), 128, np.uint8)
    at_1, at_8 = (slice(2, 3), slice(5, 6))
    assert pixel_features(blurred)[at_1] < pixel_features(sharp)[at_1] - 0.1
    assert pixel_features(noisy)[at_1] > pixel_features(flat)[at_1] + 1
    assert pixel_features(noisy)[at_8] < pixel_features(noisy)[at_1]


def test_many_classes_and_channels() -> None:
    session = Channels(signature("classify", channels=5, classes=MAX_CLASSES + 10))
    picture = np.zeros((6, 6, 5), np.uint8)
    picture[:, :, 4] = 9
    features = feature_list(session.signature)
    values = dict(zip((feature.name for feature in features), describe(session, picture), strict=True))
    assert len(features) == 5 + 5 + 1 + 4 + MAX_CLASSES
    assert values["class c4"] == 1 and values["11 further classes"] == 0 and values["brightness of channel 5"] == pytest.approx(9 / 255)


def test_window_of_a_large_picture() -> None:
    rows = np.arange(1000)[:, None, None] % 251
    picture = np.broadcast_to(rows, (1000, 300, 3)).astype(np.uint8)
    top, middle = window(picture, signature("segment"), (0, 0)), window(picture, signature("segment"))
    assert top.shape == middle.shape == (WINDOW, WINDOW, 3) and top[0, 0, 0] == 0 and middle[0, 0, 0] == 372 % 251
    assert window(picture, signature("classify", side=20)).shape == (20, 20, 3)


def test_text_with_units() -> None:
    by_name = {feature.name: feature for feature in feature_list(signature("segment"))}
    assert by_name["class c1"].text(0.0213) == "2.1 %" and by_name["class c1"].text(0.934) == "93 %"
    assert by_name["brightness of red"].text(0.5) == "128" and by_name["detail at 1 px"].text(-4) == "2.55"
