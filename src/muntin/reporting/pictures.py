"""Pictures for the page: small copies as data URIs inside it, with links to the full pictures beside it."""

from __future__ import annotations

import base64
import io
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muntin.errors import DataError
from muntin.images import to_rgb

# Longest sides in pixels, tried in order, and limits in characters: a page stays below 3 MB even where all pictures are noise.
OVERLAY_EDGES = (1600, 1200, 800, 480)
OVERLAY_LIMIT = 1_000_000
EXAMPLE_EDGES = (512, 384, 256, 160, 96, 60)
EXAMPLES_LIMIT = 1_400_000
# A picture of at most this many colours is a drawing; a picture of greys alone, which may be a photograph, of at most this many greys.
_FLAT_COLORS, _FLAT_GREYS = 256, 32


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A small copy of a picture (a data URI, its size in pixels) and the link to the full one (relative, percent-encoded)."""

    uri: str
    width: int
    height: int
    href: str


def preview(directory: Path, name: str, *, edges: Sequence[int], limit: int) -> Preview:
    """Return a copy of `directory/name` with the first of `edges` (longest side, pixels) whose data URI has at most `limit` characters.

    Where none fits, the last of `edges` is used. The copy is never larger than the picture. Drawings of few colours (masks) become PNG and
    keep their exact colours; photographs become JPEG. Costs one decode of the full picture. Raises DataError if it cannot be read.
    """
    image = _open(directory, name, longest=edges[0])
    flat = _is_flat(image)
    for edge in edges:
        small = image.copy()
        small.thumbnail((edge, edge), Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS)
        uri = _data_uri(small, flat)
        if len(uri) <= limit:
            break
    return Preview(uri=uri, width=small.width, height=small.height, href=quote(name))


def thumbnail(pixels_HWC: NDArray[np.uint8], edge: int = 256) -> str:
    """Return a small copy of a picture of any number of channels as a data URI, with at most `edge` pixels a side."""
    image = Image.fromarray(np.ascontiguousarray(to_rgb(pixels_HWC)))
    flat = _is_flat(image)
    image.thumbnail((edge, edge), Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS)
    return _data_uri(image, flat)


def _open(directory: Path, name: str, *, longest: int) -> Image.Image:
    try:
        # A satellite scene has more pixels than Pillow's warning allows, and this file is the run's own.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(directory / name) as image:
                image.draft("RGB", (2 * longest, 2 * longest))  # JPEG decodes at a fraction of its size
                return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"the report's picture {name!r} is not in {directory}: write it there first, or leave it out") from None
    except Image.DecompressionBombError:
        raise DataError(
            f"the report's picture {name!r} has more pixels than Pillow opens ({2 * (Image.MAX_IMAGE_PIXELS or 0):,}): write a smaller copy"
        ) from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"the report's picture {name!r} in {directory} cannot be read ({reason}): write it again as PNG or JPEG") from None


def _is_flat(image: Image.Image) -> bool:
    colors = image.getcolors(_FLAT_COLORS)
    return colors is not None and (len(colors) <= _FLAT_GREYS or any(len(set(rgb)) > 1 for _, rgb in colors if isinstance(rgb, tuple)))


def _data_uri(image: Image.Image, flat: bool) -> str:
    buffer = io.BytesIO()
    if flat:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=84, optimize=True, progressive=True)
    kind = "png" if flat else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
