"""Pictures of any size in tiles, with the answer of one untiled call, global attention included.

The manifest's plan says in which passes; parts of the graph run in any engine. Memory is that of a tile; maps of the whole picture lie in
a temporary file. Nothing here knows what a network computes.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from muntin.artifact import Artifact, Manifest, TensorSignature
from muntin.artifact.tile_plan import TilePass, TilePlan
from muntin.errors import ArtifactError, DataError
from muntin.runtime.engines.registry import open_session
from muntin.runtime.exact_tiles.grid import tiles
from muntin.runtime.exact_tiles.maps import PixelBox, StoredMap, map_bytes
from muntin.runtime.exact_tiles.parts import IMAGES, SCORES, GraphParts
from muntin.runtime.inputs import Named
from muntin.runtime.options import SessionOptions
from muntin.runtime.session import Session

NO_PLAN = "no_exact_tiles"
"""Key of a manifest's measured figures: why an artefact has no plan."""
SIDE = 1024
"""Default side of a tile, pixels."""
WindowReader = Callable[[int, int, int, int], NDArray[np.uint8]]
"""Reads (h, w, C) of a picture from the sides of a `PixelBox`."""


@dataclass(frozen=True, repr=False)
class _PartArtifact(Artifact):
    """A part of a model as an artefact in memory."""

    model: bytes = b""

    def model_bytes(self) -> bytes:
        return self.model


def exact_tiles(session: object, tile: int | None) -> ExactTiles:
    """The exact tiles of an opened session. Raises DataError for one without an artefact, ArtifactError for one without a plan."""
    opened = session.opened if isinstance(session, Session) else None
    if opened is None or not isinstance(opened[0], Artifact):
        raise DataError("exact=True needs a session of an artefact, as muntin.load opens it: leave it out for blended tiles")
    return ExactTiles(opened[0], opened[1], tile=tile or SIDE)


class ExactTiles:
    """The passes of an artefact over one picture. `scratch`: folder of the temporary files, by default the system's.

    Raises ArtifactError for an artefact without a plan.
    """

    def __init__(self, artifact: Artifact, options: SessionOptions, *, tile: int = SIDE, scratch: Path | None = None) -> None:
        if artifact.manifest.tile_plan is None:
            raise ArtifactError(f"{artifact.path} has no plan for exact tiles: {no_plan_reason(artifact)}")
        self.plan: TilePlan = artifact.manifest.tile_plan
        self.tile, self.scratch = tile, scratch
        self._artifact = artifact
        self._signature = artifact.picture
        self._options = replace(options, shapes=None, dims=(), dynamic=False, cache=False, streams=1)
        self._parts = GraphParts(onnx.load_from_string(artifact.model_bytes()), self.plan)
        self._tensors = {tensor.name: tensor for tensor in self.plan.maps}
        self._values = {value.name: value for value in self.plan.values}

    def blocks(
        self, read: WindowReader, height: int, width: int, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[PixelBox, Any]]:
        """Scores (K, scale*h, scale*w) float32 of boxes of the picture, rows first. `read`: gives a window of it.

        Raises DataError where the disk has no room for the maps, ArtifactError from the engine.
        """
        self._check_disk(height, width)
        done, total = 0, sum(sum(1 for _ in tiles(height, width, self.tile, walk)) for walk in self.plan.passes)
        maps: dict[str, StoredMap] = {}
        values: Named = {}
        try:
            for number, walk in enumerate(self.plan.passes):
                for name in walk.gives_maps:
                    if name != SCORES:
                        maps[name] = StoredMap(self._tensors[name], height, width, self.scratch)
                merged = _Merged({name: self._values[name].merge for name in walk.gives_values})
                for own, box, answer in self._walk(walk, read, maps, values, height, width):
                    for name in walk.gives_maps:
                        if name == SCORES:
                            yield own, self._cropped(answer[name], box, own)
                        else:
                            maps[name].write(box, answer[name], own)
                    for name in walk.gives_values:
                        merged.add(name, answer[name], self._cells(name, own))
                    done += 1
                    if progress is not None:
                        progress(done, total)
                values |= merged.values()
                read_later = {name for later in self.plan.passes[number + 1 :] for name in later.maps}
                for name in maps.keys() - read_later:
                    maps.pop(name).close()
        finally:
            for stored in maps.values():
                stored.close()

    def _walk(
        self, walk: TilePass, read: WindowReader, maps: Mapping[str, StoredMap], values: Named, height: int, width: int
    ) -> Iterator[tuple[PixelBox, PixelBox, Named]]:
        """The answers of a pass: own box, read box, tensors of the read box."""
        sessions: dict[tuple[int, int], Session] = {}
        constants = {name: values[name] for name in walk.values}
        for own, box in tiles(height, width, self.tile, walk):
            size = (box[2] - box[0], box[3] - box[1])
            if size not in sessions:
                sessions[size] = self._session(walk, constants, size, (height, width))
            inputs = {name: read(*box)[None] if name == IMAGES else maps[name].read(box) for name in walk.maps}
            yield own, box, sessions[size]({**inputs, **constants})

    def _session(self, walk: TilePass, values: Named, size: tuple[int, int], whole: tuple[int, int]) -> Session:
        """A pass's part of the graph in the engine, for read boxes of one size."""
        maps = {name: (np.dtype(self._tensors[name].dtype), self._tensors[name].shape(*size)) for name in walk.maps}
        inputs = {**maps, **{name: (value.dtype, value.shape) for name, value in values.items()}}
        outputs: dict[str, tuple[str, tuple[int, ...]]] = {
            name: (self._tensors[name].dtype, self._tensors[name].shape(*size)) for name in walk.gives_maps
        }
        outputs |= {name: ("float32", self._values[name].shape) for name in walk.gives_values}
        channels = self._signature.channels
        model = self._parts.cut(inputs, list(outputs), size, whole, channels).SerializeToString()
        infos = {
            key: [{"name": name, "dtype": str(kind), "shape": shape} for name, (kind, shape) in tensors.items()]
            for key, tensors in (("inputs", inputs), ("outputs", outputs))
        }
        signature = TensorSignature.model_validate(infos)
        manifest = self._artifact.manifest
        part = Manifest(
            muntin=manifest.muntin, created=manifest.created, signature=signature, precision=manifest.precision,
            sha256=sha256(model).hexdigest(),
        )  # fmt: skip
        return open_session(_PartArtifact(self._artifact.path, part, model), self._options)

    def _cropped(self, scores_1Khw: NDArray[np.float32], box: PixelBox, own: PixelBox) -> NDArray[np.float32]:
        scale = self._signature.scale
        top, left = (scale * (own[axis] - box[axis]) for axis in (0, 1))
        height, width = scale * (own[2] - own[0]), scale * (own[3] - own[1])
        return scores_1Khw[0, :, top : top + height, left : left + width]

    def _cells(self, name: str, own: PixelBox) -> int:
        stride = self._values[name].stride
        return -(-(own[2] - own[0]) // stride) * -(-(own[3] - own[1]) // stride)

    def disk_bytes(self, height: int, width: int) -> int:
        """The most bytes that the maps of a picture take at a time."""
        most, held = 0, {}
        for number, walk in enumerate(self.plan.passes):
            for name in walk.gives_maps:
                if name != SCORES:
                    tensor = self._tensors[name]
                    held[name] = map_bytes(tensor.shape(height, width), np.dtype(tensor.dtype))
            most = max(most, sum(held.values()))
            later = {name for other in self.plan.passes[number + 1 :] for name in other.maps}
            held = {name: size for name, size in held.items() if name in later}
        return most

    def _check_disk(self, height: int, width: int) -> None:
        needed, folder = self.disk_bytes(height, width), self.scratch or Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DataError(
                f"exact tiles of {height} x {width} pixels take {needed / 2**30:.1f} GiB of temporary files, and {folder} has "
                f"{free / 2**30:.1f} GiB: make room, or name another folder by TMPDIR"
            )


class _Merged:
    """The sums, means and maxima over the tiles of a pass."""

    def __init__(self, merges: Mapping[str, str]) -> None:
        self._merges = merges
        self._sums: dict[str, NDArray[np.float64]] = {}
        self._cells = dict.fromkeys(merges, 0)

    def add(self, name: str, part: NDArray[Any], cells: int) -> None:
        """Take in the value of a tile with some cells."""
        merge, value = self._merges[name], np.array(part, np.float64)
        if merge == "mean":
            value *= cells
        self._cells[name] += cells
        if name not in self._sums:
            self._sums[name] = value
        elif merge == "max":
            np.maximum(self._sums[name], value, out=self._sums[name])
        else:
            self._sums[name] += value

    def values(self) -> Named:
        """The values over all tiles."""
        means = {name for name, merge in self._merges.items() if merge == "mean"}
        return {name: (total / self._cells[name] if name in means else total).astype(np.float32) for name, total in self._sums.items()}


def no_plan_reason(artifact: Artifact) -> str:
    """Return the reason for which the export of an artefact made no plan, or the advice to export again."""
    return str(artifact.manifest.measured.get(NO_PLAN, "export it again with this version"))
