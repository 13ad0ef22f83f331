"""Conditions on image sizes in a model's code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.conv(x) * 2 if x.shape[2] > x.shape[3] else m.conv(x),
        lambda m, x: m.conv(x) * 2 if x.shape[2] * x.shape[3] > 40_000 else m.conv(x),
        lambda m, x: m.conv(x) * 2 if x.shape[2] == x.shape[3] else m.conv(x),
        lambda m, x: m.conv(x) if x.shape[2] % 32 or x.shape[3] % 32 else m.conv(x) * 2,
    ],
)
def test_size_conditions(run: Callable[..., Any], build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    model = build(run, conv=nn.Conv2d(3, 4, 3, padding=1))
    message = refused(model, pixels(1, 3, 64, 64), tmp_path)
    assert (
        re.search("was traced where .*, and computes otherwise elsewhere, as for 1 x", message) or "computes otherwise where the" in message
    )
    assert "torch.where" in message


def test_size_condition_of_a_quantised_model(build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    model = build(lambda m, x: m.conv(x) * 3 if x.shape[2] > x.shape[3] else m.conv(x), conv=nn.Conv2d(3, 16, 3, padding=1))
    example = pixels(1, 3, 64, 64)
    assert "was traced where height <= width (" in refused(model, example, tmp_path, calibration=[example])


def test_size_condition_on_the_example(build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    model = build(lambda m, x: m.conv(x) * 2 if x.shape[3] % 50 == 0 else m.conv(x), conv=nn.Conv2d(3, 4, 3, padding=1))
    assert "elsewhere, as for 1 x 65 x 600 pixels" in refused(model, pixels(1, 3, 40, 50), tmp_path)


def test_size_through_int(build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    def run(m: Any, x: Tensor) -> Any:
        low = F.interpolate(m.low(x), (int(x.shape[2] * 0.5), x.shape[3] // 2), mode="bilinear")
        return m.conv(x) + 0.1 * F.interpolate(low, x.shape[2:], mode="bilinear")

    model = build(run, conv=nn.Conv2d(3, 16, 3, padding=1), low=nn.Conv2d(3, 16, 3, padding=1))
    example = pixels(1, 3, 64, 64)
    message = refused(model, example, tmp_path, calibration=[example])
    assert "Eq(TruncToInt(0.5*ToFloat(height)), " in message and "with // instead of int()" in message
