"""Numbers that describe one picture to a deployed model: statistics of its pixels, and of the model's answer.

    pixels    mean and standard deviation of each channel, colourfulness, detail at 1, 2, 4 and 8 pixels
    segment   share of each class, borders between classes
    classify  1 for the predicted class and 0 for the others
    restore   strength of the correction

Both kinds are needed: the pixels change with the sensor, the answers with the content (Rabanser et al., "Failing Loudly", NeurIPS 2019).
The model's confidence is left out: it is higher on the pictures that the model was trained on than on any others, which is no drift.

Axis letters: H, W rows and columns, C channels, K classes, N pictures, F features.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.images import middle_square
from muntin.images.sources import PictureSource
from muntin.runtime.tiles import Predictor, allowed_tile, predict
from muntin.tasks.answers import ANSWERING
from muntin.tasks.base import Floats, PictureFeature

WINDOW = 256
"""Largest side of the part of a picture that is described, pixels."""
LEVELS = 4
"""Number of scales at which detail is measured; each is twice as coarse as the one before."""
_GREY_STEP = 1 / 255
_COLORS = {1: ("grey",), 2: ("grey", "alpha"), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}


def feature_list(signature: Signature) -> tuple[PictureFeature, ...]:
    """Return the features of a model's pictures, in the order of `describe`."""
    channels = _COLORS.get(signature.channels) or tuple(f"channel {number}" for number in range(1, signature.channels + 1))
    features = [PictureFeature(name=f"brightness of {name}", more="brighter", less="darker", unit="grey") for name in channels]
    features += [PictureFeature(name=f"contrast of {name}", more="stronger", less="weaker", unit="grey") for name in channels]
    if signature.channels >= 3:
        features.append(PictureFeature(name="colourfulness", more="more colourful", less="less colourful", unit="grey"))
    features += [
        PictureFeature(name=f"detail at {1 << level} px", more="sharper or noisier", less="more blurred", unit="power")
        for level in range(LEVELS)
    ]
    return (*features, *ANSWERING[signature.task].feature_list(signature))


def describe(session: Predictor, picture: PictureSource, corner: tuple[float, float] = (0.5, 0.5)) -> Floats:
    """Return the features (F,) of a picture. Costs one call of the session, of a window or of a classifier's picture.

    `corner`: place of the described window, 0 to 1 of the rows and columns in which it may begin; a classifier has its own, the middle.
    """
    pixels_HWC = window(picture, session.signature, corner)
    return np.concatenate([pixel_features(pixels_HWC), answer_features(session, pixels_HWC)])


def window(picture: PictureSource, signature: Signature, corner: tuple[float, float] = (0.5, 0.5)) -> NDArray[np.uint8]:
    """Return the part of a picture (H, W, C) that is described: a window; of a classifier of one size, what the model sees."""
    if signature.side is not None:
        return middle_square(picture, signature.side)
    height, width = picture.shape[:2]
    if signature.answer.one:
        return np.ascontiguousarray(picture[0:height, 0:width])
    top, left = (round(place * max(0, length - WINDOW)) for place, length in zip(corner, (height, width), strict=True))
    return np.ascontiguousarray(picture[top : top + WINDOW, left : left + WINDOW])


def pixel_features(pixels_HWC: NDArray[np.uint8]) -> Floats:
    """Return the statistics of pixels: grey levels in units of the full range, detail as the logarithm (base 10) of its power."""
    image = pixels_HWC.astype(np.float32) / 255
    values = [*image.mean((0, 1)), *image.std((0, 1))]
    if image.shape[2] >= 3:
        color = image[:, :, :3] if image.shape[2] <= 4 else image
        values.append((color.max(2) - color.min(2)).mean())
    grey = image[:, :, : 3 if image.shape[2] in (3, 4) else 1 if image.shape[2] == 2 else image.shape[2]].mean(2)
    for _ in range(LEVELS):
        values.append(np.log10(_detail(grey) + _GREY_STEP**2 / 12))  # the power of rounding: flat areas are all alike
        grey = _halved(grey)
    return np.array(values, np.float64)


def answer_features(session: Predictor, pixels_HWC: NDArray[np.uint8]) -> Floats:
    """Return the statistics of a model's answer."""
    signature = session.signature
    scores = predict(session, pixels_HWC, tile=allowed_tile(signature, WINDOW), output="scores")
    return ANSWERING[signature.task].features(scores, pixels_HWC, signature)


def _detail(grey_HW: NDArray[np.float32]) -> float:
    """Return the mean square of differences between neighbouring pixels; 0 for a single pixel."""
    squares = [np.square(np.diff(grey_HW, axis=axis)) for axis in (0, 1)]
    return float(np.mean([part.mean() for part in squares if part.size] or [0.0]))


def _halved(grey_HW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return means of 2 x 2 pixels; an odd last row or column is left out, and a side of one pixel stays."""
    height, width = (max(1, side // 2) for side in grey_HW.shape)
    part = grey_HW[: 2 * height, : 2 * width]
    halved: NDArray[np.float32] = part.reshape(height, part.shape[0] // height, width, part.shape[1] // width).mean((1, 3))
    return halved
