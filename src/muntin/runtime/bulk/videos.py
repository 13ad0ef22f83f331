"""Videos, frame by frame: an overlay and a lossless video of the masks, or the restored frames.

Three steps overlap: one thread reads frames, `streams` + 1 threads compute, and the calling thread encodes in order. Memory: `streams` + 5
frames with their answers, whatever the length of the video.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muntin.artifact import Signature
from muntin.errors import DataError
from muntin.images.video import VideoFrame, read_frames, video_info, written_video
from muntin.runtime.pipeline import ordered, prefetched
from muntin.runtime.session import Session
from muntin.runtime.short_memory import RETRYING, Parts, compute_in_parts
from muntin.runtime.tiles import predict, size_note
from muntin.tasks.answers import ANSWERING
from muntin.tasks.base import Result

Answers = dict[str, NDArray[Any]]
"""Arrays to write for a frame, by kind of result."""


def video_files(target: Path, signature: Signature) -> dict[str, Path]:
    """Return the file of each result of a video. None has the name of a video that may lie beside them."""
    return {kind: target.with_name(f"{target.name}.{ending}") for kind, ending in ANSWERING[signature.task].videos.items()}


def predict_video(
    session: Session,
    source: Path,
    target: Path,
    *,
    tiles: Parts,
    max_pixels: int,
    painted: bool,
    arguments: Callable[[Parts], dict[str, Any]],
    advance: Callable[[float], None],
) -> tuple[Result, str, Parts]:
    """Compute the frames of a video and write the videos of `video_files`, with the timestamps of the source.

    `painted`: with an overlay. `arguments`: of `predict` for tiles. `advance` is called with the number of
    frames that are done. Returns the result, the damage that
    ended the video early ("" for none), and the tiles that were used last. Raises DataError where not a single frame can be read.
    """
    signature = session.signature
    info = video_info(source, max_pixels=max_pixels)
    files, classes = video_files(target, signature), signature.classes
    if not painted:
        files.pop("overlay", None)
    current, changing, damage = [tiles], Lock(), [""]
    pixels_of_class = np.zeros(max(1, len(classes)), np.int64)

    def read() -> Iterator[VideoFrame]:
        with closing(read_frames(source, signature.channels, max_pixels=max_pixels)) as frames:
            try:
                yield from frames
            except DataError as error:
                damage[0] = str(error)

    def compute(frame: VideoFrame) -> tuple[VideoFrame, Answers, NDArray[Any]]:
        def answer_in(tiles: Parts) -> NDArray[Any]:
            answer: NDArray[Any] = predict(session, frame.pixels, **arguments(tiles))
            return answer

        answer, used = compute_in_parts(
            answer_in, current[0], lambda tiles: tiles.smaller(signature, max(info.height, info.width)), RETRYING
        )
        if used != current[0]:
            with changing:
                current[0] = min(current[0], used, key=lambda tiles: tiles.tile or 0)
        counts = np.array([(answer == k).sum() for k in range(len(classes))] or [0])
        return frame, ANSWERING[signature.task].frame(frame.pixels, answer, signature, painted=painted), counts

    count = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        writers = {kind: stack.enter_context(written_video(file, rate=info.rate, lossless=kind == "mask")) for kind, file in files.items()}
        frames = stack.enter_context(closing(prefetched(read())))
        workers = session.streams + 1
        for frame, answers, counts in stack.enter_context(closing(ordered(compute, frames, workers=workers, window=workers + 1))):
            for kind, writer in writers.items():
                writer.write(answers[kind], frame.pts, frame.time_base)
            pixels_of_class += counts
            count += 1
            advance(count)
        if not count:
            raise DataError(damage[0] or f"{source} has no frames: replace it or remove it")
    result: Result = {"source": str(source), **{kind: str(file) for kind, file in files.items()}, "frames": count}
    if signature.answer.argmax:
        total = int(pixels_of_class.sum())
        result["shares"] = {entry.name: int(pixels_of_class[k]) / total for k, entry in enumerate(classes)}
    if note := size_note((info.height, info.width), signature, tiles.tile):
        result["notes"] = [f"{source}: {note}"]
    return result, damage[0], current[0]
