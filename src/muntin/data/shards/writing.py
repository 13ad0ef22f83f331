"""Write the splits of a data set as shards."""

from __future__ import annotations

import io
import json
import secrets
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from muntin.artifact.atomic_files import sync_directory
from muntin.data.items import ItemSamples
from muntin.data.shards.source import CLASSES_NAME, PICTURES
from muntin.data.source import SPLITS, Samples, Source
from muntin.errors import DataError
from muntin.images import encode_png
from muntin.images.opening import reason
from muntin.images.packed import PackedFile
from muntin.images.rasters import Raster


def write_shards(source: Source, directory: Path | str, *, shard_mib: int = 256) -> dict[str, list[Path]]:
    """Write the splits of a source to `directory` as `train-000000.tar`, `validation-000000.tar`, ..., and `classes.json`.

    Pictures in files keep their bytes; others, and `.npy` arrays, become PNG. Masks become PNG of class numbers; 255 is ignored. A shard
    ends after `shard_mib` MiB. The directory is written whole or not at all, and must not exist, or be empty. Returns the shards of each
    split. Raises DataError: a picture that cannot be read, one of 2 or more than 4 channels that is in no file, a raster that is read by
    window, a directory with files.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target} exists and is not empty: name another folder for the shards")
    folder = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        names = {name: _write_split(folder, name, source.split(name), shard_mib << 20) for name in SPLITS}
        classes = [entry.model_dump(mode="json", include={"name", "color"}) for entry in source.classes]
        (folder / CLASSES_NAME).write_text(json.dumps(classes, indent=1) + "\n", encoding="utf-8")
        sync_directory(folder)
        folder.replace(target)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {reason(error)}; make room or choose another place") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return {name: [target / shard for shard in shards] for name, shards in names.items()}


def _write_split(folder: Path, split: str, samples: Samples, limit: int) -> list[str]:
    """Write the shards of a split, with keys that webdataset can read: without dots, each once."""
    shards: list[str] = []
    archive: tarfile.TarFile | None = None
    keys: set[str] = set()
    try:
        for index in range(len(samples)):
            if archive is None or archive.offset >= limit:
                if archive is not None:
                    archive.close()
                shards.append(f"{split}-{len(shards):06d}.tar")
                archive = tarfile.open(folder / shards[-1], "x", format=tarfile.PAX_FORMAT)  # noqa: SIM115 - closed below
            plain_key = samples[index].name.encode(errors="surrogateescape").decode(errors="replace").replace(".", "_")
            key = plain_key if plain_key not in keys else f"{plain_key}_{index}"
            keys.add(key)
            for extension, content in _parts(samples, index):
                entry = tarfile.TarInfo(f"{key}.{extension}")
                entry.size, entry.mode = len(content), 0o644
                archive.addfile(entry, io.BytesIO(content))
    finally:
        if archive is not None:
            archive.close()
    return shards


def _parts(samples: Samples, index: int) -> Iterator[tuple[str, bytes]]:
    """The entries of a sample: end of the name, and content."""
    sample = samples[index]
    if isinstance(sample.image, Raster) or isinstance(sample.target, Raster):
        raise DataError(f"{sample.name} is a raster that is read by window, which a shard cannot hold: train on it in its folder")
    file = samples.items[index].image if isinstance(samples, ItemSamples) else None
    if file is not None and file.suffix.lower().removeprefix(".") in PICTURES:
        yield file.suffix.lower().removeprefix("."), file.read() if isinstance(file, PackedFile) else file.read_bytes()
    elif sample.image.shape[2] in (1, 3, 4):
        yield "png", encode_png(sample.image)
    else:
        raise DataError(f"{sample.name} has {sample.image.shape[2]} channels, and a picture in a shard has 1, 3 or 4: keep it in a folder")
    if isinstance(sample.target, int):
        yield "cls", str(sample.target).encode()
    else:
        yield "mask.png", encode_png(sample.target)
