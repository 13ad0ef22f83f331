"""Pictures, masks and arrays in and out of files, and painted labels. Runs without torch.

Axis letters: H, W rows and columns, C channels. Arrays are uint8 unless a docstring says otherwise.
"""

from __future__ import annotations

from muntin.images.decoding import decode_image, image_size, pixel_count, read_image, read_mask
from muntin.images.opening import IMAGE_SUFFIXES, MAX_CHANNELS, MAX_PIXELS, TooManyPixelsError
from muntin.images.painting import IGNORED, RIGHT, WRONG, colorize, difference, middle_part, middle_square, overlay, to_rgb
from muntin.images.sinks import ArraySink, PictureSink, open_sink
from muntin.images.sources import PictureSource, open_source
from muntin.images.writing import encode_png, write_image, write_whole

__all__ = [
    "IGNORED",
    "IMAGE_SUFFIXES",
    "MAX_CHANNELS",
    "MAX_PIXELS",
    "RIGHT",
    "WRONG",
    "ArraySink",
    "PictureSink",
    "PictureSource",
    "TooManyPixelsError",
    "colorize",
    "decode_image",
    "difference",
    "encode_png",
    "image_size",
    "middle_part",
    "middle_square",
    "open_sink",
    "open_source",
    "overlay",
    "pixel_count",
    "read_image",
    "read_mask",
    "to_rgb",
    "write_image",
    "write_whole",
]
