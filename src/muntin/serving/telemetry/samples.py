"""A bounded sample of the pictures that a server answered, as files in a folder, for `muntin drift`.

A request only puts a reference to its pixels into a bounded queue; a thread encodes and writes. Names are made here: nothing of a request
reaches the file system but its pixels, encoded again, without metadata. Each file is whole or absent.

    20261130T120000Z-0123456789abcdef.png    .npy for channels that a PNG has not
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from muntin.artifact.atomic_files import write_files
from muntin.errors import DataError
from muntin.images.writing import encode_image

QUEUE = 4
"""Pictures that wait to be written; further ones are not kept. Each holds its request's body in memory."""
MAX_SAMPLE_PIXELS = 1 << 24
"""Largest picture that is kept, pixels."""
SCAN_S = 60.0
"""Interval at which the folder is read again and old files are removed, seconds."""
CLOSE_S = 2.0
"""Seconds for which closing waits for waiting pictures."""
_NAME = re.compile(r"\d{8}T\d{6}Z-[0-9a-f]{16}\.(?:png|npy)")
_REMAINS = re.compile(r"\.[0-9a-f]{16}\.tmp")
"""Names of files that a killed process did not finish (`atomic_files.hidden_sibling`)."""
_MEGABYTE = 1 << 20
_DAY_S = 86_400.0
_log = logging.getLogger("muntin.serving")

Kept = tuple[float, int, Path]
"""Time of writing (seconds), bytes and path of a file."""


class SampleSettings(BaseModel):
    """Share of pictures to keep, and limits. Both limits hold for the folder, also over files of earlier servers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    folder: Path
    share: Annotated[float, Field(ge=0, le=1, description="of the answered pictures")] = 0.01
    megabytes: Annotated[float, Field(gt=0, description="MiB of all files; the oldest are removed")] = 500.0
    days: Annotated[float, Field(gt=0, le=3650, description="age at which files are removed")] = 7.0


class SampleKeeper:
    """Keep a share of the pictures offered to it. `clock`: seconds since 1970. `chance`: random numbers from 0 to 1.

    `kept`: files written; `dropped`: pictures of the share that were not kept, by reason. Raises DataError where the folder cannot be made.
    """

    def __init__(
        self, settings: SampleSettings, *, clock: Callable[[], float] = time.time, chance: Callable[[], float] = random.random
    ) -> None:
        self._settings, self._clock, self._chance = settings, clock, chance
        try:
            settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"--keep-samples {settings.folder}: {error.strerror or error}: name a folder that can be written") from error
        self.kept = 0
        self.dropped: Counter[str] = Counter({"busy": 0, "large": 0, "unwritten": 0})
        self._files: list[Kept] = []
        """Files of the folder, the oldest first, as of the last scan and what was written since."""
        self._scanned = -float("inf")
        self._failing = False
        self._queue: Queue[NDArray[np.uint8] | None] = Queue(QUEUE)
        self._thread = threading.Thread(target=self._run, name="muntin-samples", daemon=True)
        self._thread.start()

    @property
    def bytes(self) -> int:
        """Size of all kept files."""
        return sum(size for _, size, _ in tuple(self._files))

    def offer(self, images_BHWC: NDArray[np.uint8]) -> None:
        """Keep each picture of a batch by chance. Never waits and never raises; the pixels must not change afterwards."""
        for image_HWC in images_BHWC:
            if self._chance() >= self._settings.share:
                continue
            if image_HWC.shape[0] * image_HWC.shape[1] > MAX_SAMPLE_PIXELS:
                self.dropped["large"] += 1
                continue
            try:
                self._queue.put_nowait(image_HWC)
            except Full:
                self.dropped["busy"] += 1

    def close(self) -> None:
        """Return when the waiting pictures are written, or after `CLOSE_S`."""
        with suppress(Full):
            self._queue.put(None, timeout=CLOSE_S)
            self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while True:
            with suppress(OSError):  # the folder is away: writing says so
                self._scan()
            try:
                image = self._queue.get(timeout=SCAN_S)
            except Empty:
                continue
            if image is None:
                return
            self._keep(image)
            del image  # else its memory is held until the next one

    def _keep(self, image_HWC: NDArray[np.uint8]) -> None:
        try:
            self._write(image_HWC)
            self.kept += 1
            self._failing = False
        except (OSError, MemoryError, DataError) as error:
            self.dropped["unwritten"] += 1
            if not self._failing:
                _log.warning("a sample cannot be kept (%s): samples are lost until it can be", error)
            self._failing = True

    def _write(self, image_HWC: NDArray[np.uint8]) -> None:
        suffix = ".png" if image_HWC.shape[2] in (1, 3, 4) else ".npy"
        content, limit = encode_image(Path(f"sample{suffix}"), image_HWC), int(self._settings.megabytes * _MEGABYTE)
        if len(content) > limit:
            raise OSError(errno.EFBIG, f"{len(content):,} bytes, and all samples together may have {limit:,}")
        self._remove(room=limit - len(content))
        now = self._clock()
        path = self._settings.folder / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(now))}-{secrets.token_hex(8)}{suffix}"
        write_files(path.parent, {path.name: content})
        self._files.append((now, len(content), path))

    def _scan(self) -> None:
        """Read the folder if the last scan is `SCAN_S` old, and remove files that are too old or too many, and unfinished ones."""
        now = self._clock()
        if now - self._scanned < SCAN_S:
            return
        self._scanned = now
        files = []
        with os.scandir(self._settings.folder) as entries:
            for entry in entries:
                ours = _NAME.fullmatch(entry.name) is not None
                if not (ours or _REMAINS.fullmatch(entry.name)) or not entry.is_file(follow_symlinks=False):
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if ours:
                        files.append((status.st_mtime, status.st_size, Path(entry.path)))
                    elif now - status.st_mtime > SCAN_S:
                        Path(entry.path).unlink(missing_ok=True)
        self._files = sorted(files)
        self._remove(room=int(self._settings.megabytes * _MEGABYTE))

    def _remove(self, *, room: int) -> None:
        """Remove the oldest files until all fit into `room` bytes, and those that are too old."""
        oldest, held = self._clock() - self._settings.days * _DAY_S, self.bytes
        while self._files and (held > room or self._files[0][0] < oldest):
            self._files[0][2].unlink(missing_ok=True)
            held -= self._files.pop(0)[1]
