"""Pictures for the page: small copies inside it as data URIs, the full ones linked beside it."""

from __future__ import annotations

import base64
import io
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from muntin.errors import DataError

# The last edge of each keeps even pure noise within the limit: a page stays below 3 MB whatever the pictures.
OVERLAY_EDGES = (1600, 1200, 800, 480)
OVERLAY_LIMIT = 1_000_000
EXAMPLE_EDGES = (512, 384, 256, 160, 96, 60)
EXAMPLES_LIMIT = 1_400_000
_FLAT_COLORS, _FLAT_GREYS = 256, 32


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A small copy of a picture (a data URI, its size in pixels) and the link to the full one (relative, percent-encoded)."""

    uri: str
    width: int
    height: int
    href: str


def preview(directory: Path, name: str, *, edges: Sequence[int], limit: int) -> Preview:
    """A copy of `directory/name` no longer on a side than the first of `edges` (pixels) whose data URI has at most `limit` characters.

    Where none fits, the last of `edges` is used. Never enlarges. Drawings of few colours (masks) become PNG and keep their exact colours;
    photographs become JPEG. Costs one decode of the full picture. Raises DataError if it is missing or cannot be read.
    """
    image, flat = _open(directory, name, longest=edges[0])
    for edge in edges:
        small = image.copy()
        small.thumbnail((edge, edge), Image.Resampling.NEAREST if flat else Image.Resampling.LANCZOS)
        uri = _data_uri(small, flat)
        if len(uri) <= limit:
            break
    return Preview(uri=uri, width=small.width, height=small.height, href=quote(name))


def _open(directory: Path, name: str, *, longest: int) -> tuple[Image.Image, bool]:
    try:
        # A whole satellite scene is larger than what Pillow warns of, and this one the run wrote itself.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(directory / name) as image:
                image.draft("RGB", (2 * longest, 2 * longest))  # JPEG decodes at a fraction of its size
                rgb = image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"the report's picture {name!r} is not in {directory}: write it there first, or leave it out") from None
    except Image.DecompressionBombError:
        raise DataError(
            f"the report's picture {name!r} has more pixels than Pillow opens ({2 * (Image.MAX_IMAGE_PIXELS or 0):,}): write a smaller copy"
        ) from None
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        reason = str(error).split("\n")[0]
        raise DataError(f"the report's picture {name!r} in {directory} cannot be read ({reason}): write it again as PNG or JPEG") from None
    return rgb, _is_flat(rgb)


def _is_flat(image: Image.Image) -> bool:
    # A drawing of classes has few colours. So has a grey photograph (256 at most), but those are all grey.
    found = image.getcolors(_FLAT_COLORS)
    return found is not None and (len(found) <= _FLAT_GREYS or any(len(set(rgb)) > 1 for _, rgb in found if isinstance(rgb, tuple)))


def _data_uri(image: Image.Image, flat: bool) -> str:
    buffer = io.BytesIO()
    if flat:
        image.save(buffer, format="PNG", optimize=True)
    else:
        image.save(buffer, format="JPEG", quality=84, optimize=True, progressive=True)
    kind = "png" if flat else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
