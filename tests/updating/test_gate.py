"""Conditions at their bounds."""

from __future__ import annotations

from muntin.updating.comparison import Estimate
from muntin.updating.gate import check_at_least, check_at_most


def test_values_at_their_bounds() -> None:
    drop = Estimate(18 / 20 - 17 / 20, 18 / 20 - 17 / 20, 18 / 20 - 17 / 20)  # 0.050000000000000044
    for certain in (False, True):
        assert check_at_most("loss", drop, 0.05, certain).passed and not check_at_most("loss", drop, 0.0499, certain).passed
        gain = Estimate(*(-value for value in drop))
        assert check_at_least("gain", gain, -0.05, certain).passed and not check_at_least("gain", gain, -0.0499, certain).passed
