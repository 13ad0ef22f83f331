from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from muntin.tasks.restore.degradation import Degradation, enlarged, generator_of, reduced
from smooth_pictures import smooth_picture


def test_noise_has_its_standard_deviation() -> None:
    clean = np.full((200, 200, 3), 128, np.uint8)
    error = Degradation(noise=25)(clean, generator_of("a")).astype(float) - 128
    assert error.std() == pytest.approx(25, rel=0.02)
    assert abs(error.mean()) < 0.3


def test_noise_in_a_range() -> None:
    clean = np.full((64, 64, 1), 128, np.uint8)
    levels = [float(Degradation(noise=(5, 40))(clean, generator_of(str(name))).std()) for name in range(30)]
    assert 4 < min(levels) < 12
    assert 32 < max(levels) < 42


def test_degradation_is_decided_by_the_name() -> None:
    clean, degrade = smooth_picture(20, 30), Degradation(noise=(5, 50), scale=2)
    one, same, other = (degrade(clean, generator_of(name)) for name in ("a", "a", "b"))
    np.testing.assert_array_equal(one, same)
    assert (one != other).mean() > 0.5
    assert one.shape == (10, 15, 3)


def test_reduction_is_pillows_bicubic() -> None:
    clean = smooth_picture(24, 36)
    expected = np.asarray(Image.fromarray(clean).resize((12, 8), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(reduced(clean, 3), expected)
    assert np.abs(enlarged(reduced(clean, 3), 3).astype(int) - clean).mean() < 3
    assert reduced(np.zeros((8, 8, 5), np.uint8), 2).shape == (4, 4, 5)


def test_compression_is_pillows_jpeg() -> None:
    clean = smooth_picture(24, 36)
    buffer = io.BytesIO()
    Image.fromarray(clean).save(buffer, "JPEG", quality=30)
    np.testing.assert_array_equal(Degradation(jpeg=30)(clean, generator_of("a")), np.asarray(Image.open(buffer)))
    assert Degradation(jpeg=(10, 20))(clean[:, :, :1], generator_of("a")).shape == (24, 36, 1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({}, "changes nothing"), ({"noise": (50, 5)}, "swap"), ({"noise": 300}, "255"), ({"scale": 5}, "4"), ({"jpeg": (90, 40)}, "swap")],
)
def test_refused_degradations(fields: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Degradation.model_validate(fields)
