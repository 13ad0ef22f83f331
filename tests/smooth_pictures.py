"""Smooth pictures in place of photographs: reduction and noise have known effects on them."""

from __future__ import annotations

import numpy as np

from muntin.images.opening import UInt8


def smooth_picture(height: int, width: int, seed: int = 0) -> UInt8:
    """Waves of a random direction and length, all channels different."""
    generator = np.random.default_rng(seed)
    row, column = np.mgrid[:height, :width]
    waves = [np.sin(row * generator.uniform(0.02, 0.1) + column * generator.uniform(0.02, 0.1) + phase) for phase in range(3)]
    return np.rint(127 + 100 * np.stack(waves, axis=2)).astype(np.uint8)
