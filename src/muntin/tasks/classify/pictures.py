"""Pictures of a classifier's answers for a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from muntin.artifact.classes import ClassInfo
from muntin.images import to_rgb, write_image
from muntin.runtime.session import Labels
from muntin.runtime.tiles import Predictor, predict
from muntin.tasks.samples import Sample
from muntin.text import plain


def write_class_examples(
    directory: Path,
    session: Predictor,
    samples: Sequence[Sample],
    labels: Sequence[Labels],
    classes: Sequence[ClassInfo],
    *,
    side: int,
    count: int = 12,
) -> list[dict[str, str]]:
    """Write copies of a classifier's wrong pictures, the largest loss first, of at most `side` pixels, to `directory/pictures`.

    Where none is wrong, those are written whose two highest scores are nearest to each other. `labels`: of each sample. Costs a prediction
    of the wrong pictures, or of the split.
    """

    def margin(index: int) -> float:
        scores_K = np.sort(predict(session, samples[index].image))
        return float(scores_K[-1] - scores_K[-2:][0])

    def gain(index: int) -> float:
        scores_K = predict(session, samples[index].image)
        return float(scores_K[int(np.asarray(samples[index].target))] - np.logaddexp.reduce(scores_K))

    numbers = [int(answer[0]) for answer in labels]
    wrong = [index for index, number in enumerate(numbers) if number != samples[index].target]
    chosen = sorted(wrong, key=gain) if wrong else sorted(range(len(samples)), key=margin)
    folder = directory / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for number, index in enumerate(chosen[:count], 1):
        sample = samples[index]
        image = Image.fromarray(to_rgb(sample.corner))
        image.thumbnail((side, side))
        write_image(folder / f"{number}-image.png", np.asarray(image))
        truth, answer = classes[int(np.asarray(sample.target))].name, classes[numbers[index]].name
        examples.append({"name": f"{plain(sample.name)}: true {truth}, predicted {answer}", "image": f"pictures/{number}-image.png"})
    return examples
