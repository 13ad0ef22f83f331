"""The plan of exact tiles in an export: made from the graph, and kept if tiles compute what one call does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import open_artifact
from muntin.artifact.tile_plan import TilePass, TilePlan
from muntin.graph.tiling.levels import NoPlanError
from muntin.graph.tiling.plan import make_plan
from muntin.runtime.engines.registry import open_image_session
from muntin.runtime.exact_tiles.tiles import NO_PLAN, ExactTiles
from muntin.runtime.options import SessionOptions

MOST_SIDE = 2048
"""Side of a picture on which a plan is tried, at most, pixels; of another shape, as many pixels."""
HALO_SHARE = 3
"""A tile that is tried is at least a third of what is read around it where that fits: smaller ones are many, and each reads as much."""
CLOSE, CLOSE_INTEGERS = 1e-3, 0.05
"""Allowed root mean square difference between tiles and one call, in standard deviations of the scores."""


def plan_of(content: dict[str, Any]) -> TilePlan | None:
    """Return the plan of an artefact's content; without one, note the reason in its measured figures."""
    if content["signature"].answer.one:
        return None
    try:
        return make_plan(content["model"], content["signature"])
    except NoPlanError as error:
        content["measured"][NO_PLAN] = str(error)
    except Exception as error:  # noqa: BLE001 - a plan is an addition: a graph of an unforeseen kind must not cost the export
        content["measured"][NO_PLAN] = f"the graph is of an unforeseen kind ({type(error).__name__}: {error})"
    return None


def plan_fault(draft: Path, plan: TilePlan, picture_HWC: NDArray[np.uint8]) -> str | None:
    """Compare tiles with one call in ONNX Runtime on a small picture. Returns what is wrong, or None.

    `picture_HWC`: a real picture, which is repeated up to the size at which a tile is less than the picture.
    """
    artifact = open_artifact(draft)
    sizes = artifact.picture.sizes
    tile = max(_tried_tile(walk) for walk in plan.passes)
    side = max(2 * (-(-tile // walk.step) * walk.step) + sum(walk.halo) + walk.step // 2 + 1 for walk in plan.passes)
    height, width = sizes.at_least(side + 4, side)
    if height * width > MOST_SIDE**2:
        return f"a tile and its surroundings take more than {MOST_SIDE**2:,} pixels"
    repeats = (-(-height // picture_HWC.shape[0]), -(-width // picture_HWC.shape[1]), 1)
    picture = np.tile(picture_HWC, repeats)[:height, :width]
    options = SessionOptions(engine="onnxruntime", precision="f32", threads=None, shapes=())
    try:
        whole = open_image_session(draft, options)(picture[None])[0]
        tiled = np.empty_like(whole)
        scale = artifact.picture.scale
        for (top, left, bottom, right), scores in ExactTiles(artifact, options, tile=tile).blocks(
            lambda top, left, bottom, right: picture[top:bottom, left:right], height, width
        ):
            tiled[:, scale * top : scale * bottom, scale * left : scale * right] = scores
    except Exception as error:  # noqa: BLE001 - as above
        return f"tiles cannot be computed: {str(error).partition(': ')[2] or error}"
    rms = float(np.sqrt(np.mean((tiled - whole) ** 2)) / max(float(whole.std()), 1e-12))
    allowed = CLOSE_INTEGERS if artifact.manifest.integers else CLOSE
    return None if rms <= allowed else f"tiles differ from one call by {rms:.2g} standard deviations (allowed: {allowed:g})"


def _tried_tile(walk: TilePass) -> int:
    """The side of the tiles on which a pass is tried, pixels: as many as `HALO_SHARE` says, fewer where the picture would be too large."""
    halo = sum(walk.halo)
    return max(walk.step, min(halo // HALO_SHARE, (MOST_SIDE - halo) // 2 - 2 * walk.step))
