"""How long a call of each deployed model takes, all of them in one process, in turns."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from muntin.data import EarthSource, Source
from muntin.runtime.profiling.timing import interleaved_latency
from segmentation_peers.deployment import Variant

Name = tuple[str, str]
"""A model's name and its variant's."""


def measure_latency(variants: Mapping[Name, Variant], image_HWC: NDArray[np.uint8], *, threads: int, rounds: int) -> dict[Name, float]:
    """Median ms of each variant on one image, in a new process: none has what training left in this one.

    In each round every model is called, one after the other, so that a machine that drifts drifts for all of them.
    """
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as process:
        return process.submit(_measured, dict(variants), image_HWC, threads, rounds).result()


def _measured(variants: dict[Name, Variant], image_HWC: NDArray[np.uint8], threads: int, rounds: int) -> dict[Name, float]:
    sessions = {" ".join(name): variant.open(threads) for name, variant in variants.items()}
    found = interleaved_latency(sessions, image_HWC[None], rounds=rounds)
    return {name: found[" ".join(name)].median_ms for name in variants}


def image_of(source: Source, side: int) -> NDArray[np.uint8]:
    """The middle of the photograph, or of the first picture to validate on, `side` x `side`; it is repeated where it is smaller."""
    image_HWC = source.picture()[0] if isinstance(source, EarthSource) else source.split("validation")[0].image
    missing = [max(0, side - length) for length in image_HWC.shape[:2]]
    if any(missing):
        image_HWC = np.pad(image_HWC, ((0, missing[0]), (0, missing[1]), (0, 0)), mode="wrap")
    top, left = ((length - side) // 2 for length in image_HWC.shape[:2])
    return np.ascontiguousarray(image_HWC[top : top + side, left : left + side])
