"""Pictures of restored pictures for a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from muntin.images import to_rgb, write_image
from muntin.images.opening import UInt8
from muntin.tasks.restore.degradation import enlarged
from muntin.tasks.restore.scores import psnr
from muntin.tasks.samples import Sample
from muntin.text import plain


def write_restored_examples(
    directory: Path, samples: Sequence[Sample], restored: Sequence[UInt8], *, side: int, count: int = 5
) -> list[dict[str, str]]:
    """Write input (enlarged bicubically), restored and clean picture, and four times the error, to `directory/pictures`.

    Of each of the first pictures the window of `side` pixels with the most varied clean pixels. `restored`: whole, of each sample.
    """
    folder = directory / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for index in range(min(count, len(samples))):
        sample = samples[index]
        clean, scale = sample.clean, sample.clean.shape[0] // sample.image.shape[0]
        places = [(top, left) for top in range(0, max(1, clean.shape[0] - side + 1), side)
                  for left in range(0, max(1, clean.shape[1] - side + 1), side)]  # fmt: skip
        top, left = max(places, key=lambda place: float(clean[place[0] : place[0] + side, place[1] : place[1] + side].std()))
        window = np.s_[top : top + side, left : left + side]
        before, after, truth = (picture[window] for picture in (enlarged(sample.image[:, :], scale), restored[index], clean))
        error = np.abs(after.astype(np.int16) - truth)
        views = {"image": before, "prediction": after, "truth": truth, "difference": np.minimum(255, 4 * error).astype(np.uint8)}
        place = f"{plain(sample.name)}, rows {top}-{top + truth.shape[0]}, columns {left}-{left + truth.shape[1]}"
        example = {"name": f"{place}: PSNR {psnr(before, truth):.2f} dB before, {psnr(after, truth):.2f} dB after"}
        for kind, view in views.items():
            write_image(folder / f"{index + 1}-{kind}.png", np.ascontiguousarray(to_rgb(view)))
            example[kind] = f"pictures/{index + 1}-{kind}.png"
        examples.append(example)
    return examples
