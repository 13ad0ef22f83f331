"""Named HybridNets. `muntin models` measures them."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "hybrid-xxs": {"stem": (8, 16, 32), "pairs": (0, 0), "dims": (128,), "depths": (2,), "decoder": 32, "finest": 8, "latents": 8},
    "hybrid-xs": {"stem": (16, 24, 48), "pairs": (0, 1), "dims": (128, 128), "depths": (2, 2), "decoder": 48, "latents": 16},
    "hybrid-s": {},
    "hybrid-m": {"stem": (24, 48, 96), "pairs": (1, 2), "dims": (384, 384), "depths": (6, 4), "decoder": 96},
    "dense-s": {"attention": "dense"},
}
"""Fields of `ModelConfig` in which each preset differs from the defaults; `dense-s` is `hybrid-s` with SDPA over all tokens."""
