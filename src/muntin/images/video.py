"""Videos read and written frame by frame, by PyAV (FFmpeg), the extra `video`.

Frames come upright, as the display matrix of their stream says, with the timestamps of the file. A video is written beside its place and
renamed at its end. Sound is not read. PyAV is under the BSD licence; its wheels contain FFmpeg and codecs under licences of their own
(docs/predict.md).

Axis letters: H, W rows and columns, C channels.
"""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from muntin.errors import DataError, DependencyError, install
from muntin.images.opening import MAX_PIXELS, UInt8, check_pixels, reason

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".mts", ".mpg", ".mpeg")
_OPTIONS = {"format_whitelist": "mov,matroska,avi,mpegts,mpeg,mpegvideo", "protocol_whitelist": "file"}
"""Options of FFmpeg for reading. It knows a format by the content: a playlist named .mp4 would make it open other files and addresses."""
_FORMATS = {1: "gray", 3: "rgb24"}
"""Channels of a frame -> FFmpeg's name of the pixel format that it is read and written in."""
_PICTURE_CODECS: tuple[tuple[str, dict[str, str]], ...] = (("libx264", {"crf": "18", "preset": "fast"}), ("libopenh264", {}))
"""Encoders of H.264 with their options; the first one that FFmpeg was built with is taken."""
_BITS_A_PIXEL = 0.25
"""Bit rate of encoders that have no constant quality, for each pixel and frame."""
_END_TOLERANCE = 1
"""Frames that a header may promise beyond those that are there: some muxers count one too many."""


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """Size of the upright frames, and how many there are: 0 where the file does not say. `rate`: frames a second."""

    height: int
    width: int
    frames: int
    rate: Fraction


@dataclass(frozen=True, kw_only=True)
class VideoFrame:
    """One upright frame (H, W, C) uint8, and its time as `pts * time_base` seconds."""

    pixels: UInt8
    pts: int
    time_base: Fraction


def is_video(path: Path) -> bool:
    """Returns True for a file name that ends like a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def video_info(path: Path, *, max_pixels: int = MAX_PIXELS) -> VideoInfo:
    """Read a video's header and its first frame. Raises DataError, and DependencyError without PyAV."""
    with _opened(path) as (container, stream):
        frame = next(_decoded(path, container, stream, max_pixels), None)
        if frame is None:
            raise DataError(f"{path} has no frames: replace it or remove it")
        height, width = _upright(np.empty((frame.height, frame.width, 0), np.uint8), frame).shape[:2]
        return VideoInfo(height=height, width=width, frames=_promised(container, stream), rate=_rate(stream))


def read_frames(path: Path, channels: int = 3, *, max_pixels: int = MAX_PIXELS) -> Generator[VideoFrame, None, None]:
    """Yield the frames of a video's first video stream: `channels` 3 as RGB, 1 as grey.

    Raises DataError for a damaged or cut off file, after the frames before the damage, for a frame of another size than the first, and for
    other channels.
    """
    if channels not in _FORMATS:
        raise DataError(f"{path}: the frames of a video have 1 or 3 channels, and the model takes {channels}: store them as .npy arrays")
    with _opened(path) as (container, stream):
        time_base, first, count, last = stream.time_base or 1 / _rate(stream), None, 0, None
        step = max(1, round(1 / (_rate(stream) * time_base)))
        for frame in _decoded(path, container, stream, max_pixels):
            pixels = _upright(_pixels(frame, channels), frame)
            first = pixels.shape if first is None else first
            if pixels.shape != first:
                raise DataError(f"{path}: frame {count} is {_size(pixels.shape)} and the first one {_size(first)}: cut the video there")
            pts = frame.pts if frame.pts is not None else (0 if last is None else last + step)
            if last is not None and pts <= last:  # a stream may repeat a time, which no file may be written with
                pts = last + 1
            yield VideoFrame(pixels=pixels, pts=pts, time_base=time_base)
            count, last = count + 1, pts
        promised = _promised(container, stream)
        if count + _END_TOLERANCE < promised:
            raise DataError(f"{path} ends after {count} of {promised} frames: it is cut off; the frames until there are computed")


class VideoWriter:
    """Writes frames to a video file, which gets its name when the block ends without an error (`written_video`)."""

    def __init__(self, container: Any, *, rate: Fraction, lossless: bool) -> None:
        self._container, self._rate, self._lossless = container, rate, lossless
        self._stream: Any = None

    def write(self, pixels: npt.NDArray[Any], pts: int, time_base: Fraction) -> None:
        """Write one frame: (H, W, 3) uint8, grey (H, W, 1), or labels (H, W) uint8 or uint16.

        A video for viewers has even sides: an odd one gets its last row or column twice.
        """
        import av

        if not self._lossless:
            rows, columns = (side % 2 for side in pixels.shape[:2])
            pixels = np.pad(pixels, ((0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else pixels
        if self._stream is None:
            self._stream = self._opened_stream(pixels, time_base)
        plane = pixels[:, :, 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
        form = "rgb24" if plane.ndim == 3 else "gray16le" if plane.dtype == np.uint16 else "gray"
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(plane), format=form)
        if not self._lossless:  # sRGB's primaries, as players assume for such sizes when nothing is said
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
        frame.pts, frame.time_base = pts, time_base
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write what the encoder holds back. Without frames there is nothing to finish."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))

    @property
    def empty(self) -> bool:
        """True before the first frame."""
        return self._stream is None

    def _opened_stream(self, pixels: npt.NDArray[Any], time_base: Fraction) -> Any:
        if self._lossless:
            codec, options = "ffv1", {"level": "3", "slicecrc": "1"}
        else:
            codec, options = _picture_codec()
        stream = self._container.add_stream(codec, rate=self._rate, options=options)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = ("gray16le" if pixels.dtype == np.uint16 else "gray") if self._lossless else "yuv420p"
        stream.codec_context.time_base = time_base
        if not self._lossless:
            context = stream.codec_context
            context.color_primaries = context.color_trc = context.colorspace = 1  # BT.709
            context.color_range = 1
            if "crf" not in options:
                stream.bit_rate = int(_BITS_A_PIXEL * pixels.shape[0] * pixels.shape[1] * self._rate)
        return stream


@contextmanager
def written_video(path: Path, *, rate: Fraction, lossless: bool = False) -> Iterator[VideoWriter]:
    """A writer of a video: H.264 or, where FFmpeg lacks its encoder, MPEG-4, for viewers; `lossless`: FFV1 of grey values.

    The file appears under its name when the block ends, with all frames that were written. After an error, or without a frame, nothing is
    left behind. Raises DataError where it cannot be written.
    """
    av = _pyav()
    part = path.with_name(f".{secrets.token_hex(8)}{path.suffix}")
    try:
        container = av.open(str(part), mode="w")
        try:
            writer = VideoWriter(container, rate=rate, lossless=lossless)
            yield writer
            writer.finish()
        finally:
            container.close()
        if not writer.empty:
            part.replace(path)
    except av.FFmpegError as error:
        raise DataError(f"cannot write {path}: {reason(error)}; make room or choose another place") from error
    finally:
        part.unlink(missing_ok=True)


def _pyav() -> Any:
    """The module `av`. Raises DependencyError without it."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise DependencyError(f"videos need the package av: {install('video')}") from error
    av.logging.set_level(None)  # its errors are raised
    return av


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """A video file and its first video stream. Damage found here or in the block is a DataError."""
    av = _pyav()
    try:
        with av.open(f"file:{path}", options=_OPTIONS) as container:
            if not container.streams.video:
                raise DataError(f"{path} has no video stream: name a video, or a picture")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: check the path") from error
    except av.FFmpegError as error:
        raise DataError(f"{path} is damaged, cut off or no video ({reason(error)}): the frames before the damage are computed") from error


def _decoded(path: Path, container: Any, stream: Any, max_pixels: int) -> Iterator[Any]:
    """Yield the decoded frames. Raises DataError at the first damaged one: an engine would see what the decoder has made up."""
    for packet in container.demux(stream):
        damaged = packet.is_corrupt
        for frame in stream.decode(None if damaged else packet):  # None: the frames that the decoder holds back
            check_pixels(path, (frame.width, frame.height), max_pixels)
            if frame.is_corrupt:
                raise DataError(f"{path} is damaged at {frame.time or 0:.2f} s: the frames before that are computed")
            yield frame
        if damaged:
            seconds = 0 if packet.pts is None else float(packet.pts * packet.time_base)
            raise DataError(f"{path} is damaged at {seconds:.2f} s: the frames before that are computed")


def _pixels(frame: Any, channels: int) -> UInt8:
    """The pixels (H, W, C) of a frame, in full range, from the colours that the stream names; if none, BT.709 for high definition."""
    unnamed = frame.colorspace in (0, 2)
    source = ("ITU709" if frame.height >= 720 else "ITU601") if unnamed and frame.format.name.startswith("yuv") else None
    pixels: UInt8 = frame.to_ndarray(format=_FORMATS[channels], src_colorspace=source)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _upright(pixels_HWC: UInt8, frame: Any) -> UInt8:
    """Turn and mirror a frame as the display matrix of its stream says; angles between quarter turns are left."""
    matrix = _display_matrix(frame)
    if matrix is None:
        return pixels_HWC
    a, b, c, d = (int(np.sign(value)) for value in matrix)
    if a == d == 0:  # x' = c y, y' = b x: rows and columns change places
        turned = pixels_HWC.transpose(1, 0, 2)
        a, d = c, b
    elif b == c == 0:
        turned = pixels_HWC
    else:
        return pixels_HWC
    return np.ascontiguousarray(turned[:: d or 1, :: a or 1])


def _display_matrix(frame: Any) -> tuple[int, int, int, int] | None:
    """The numbers (a, b, c, d) of a display matrix that maps (x, y) to (a x + c y, b x + d y), or None."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            values = np.frombuffer(bytes(data), np.int32)
            return int(values[0]), int(values[1]), int(values[3]), int(values[4])
    return None


def _rate(stream: Any) -> Fraction:
    """Frames a second; 25 where nothing is known."""
    return Fraction(stream.average_rate or stream.guessed_rate or 25)


def _promised(container: Any, stream: Any) -> int:
    """Number of frames by the file's header; 0 where it does not say."""
    if stream.frames:
        return int(stream.frames)
    seconds = _seconds(stream.metadata.get("DURATION", ""))  # Matroska
    if seconds is None and stream.duration and stream.time_base:
        seconds = float(stream.duration * stream.time_base)
    if seconds is None and container.duration and len(container.streams) == 1:
        seconds = container.duration / 1e6
    return 0 if seconds is None or not stream.average_rate else int(seconds * stream.average_rate)


def _seconds(clock: str) -> float | None:
    """Seconds of "hours:minutes:seconds", or None."""
    parts = clock.split(":")
    try:
        return sum(float(part) * 60**power for power, part in enumerate(reversed(parts))) if len(parts) == 3 else None
    except ValueError:
        return None


def _picture_codec() -> tuple[str, dict[str, str]]:
    import av

    return next((name, dict(options)) for name, options in _PICTURE_CODECS if name in av.codecs_available)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
