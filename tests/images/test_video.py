from __future__ import annotations

import struct
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.errors import DataError, DependencyError
from muntin.images.video import VideoFrame, is_video, read_frames, video_info, written_video

av = pytest.importorskip("av", reason="the extra `video` is not installed")
CORNERS = np.array([[(250, 20, 20), (20, 250, 20)], [(20, 20, 250), (240, 240, 240)]], np.uint8)
"""A red, a green, a blue and a white corner."""


def corners(height: int = 64, width: int = 96) -> Any:
    return CORNERS.repeat(height // 2, 0).repeat(width // 2, 1)


def write(path: Path, count: int = 5, *, pts: Any = None, base: Fraction = Fraction(1, 25), pixels: Any = None) -> Path:
    with written_video(path, rate=Fraction(25)) as writer:
        for number in range(count):
            writer.write(corners() if pixels is None else pixels, pts[number] if pts else number, base)
    return path


def with_matrix(path: Path, matrix: tuple[int, int, int, int]) -> Path:
    """The same video with another display matrix (a, b, c, d) in its track header."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0: flags, times, number, duration, layer and volume come first
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("ending", ["mp4", "mkv", "mov"])
def test_written_frames_are_read(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"film.{ending}")
    info = video_info(path)
    assert (info.height, info.width, info.frames, info.rate) == (64, 96, 5, 25)
    frames = list(read_frames(path))
    assert [float(frame.pts * frame.time_base) for frame in frames] == pytest.approx([0, 0.04, 0.08, 0.12, 0.16], abs=0.0006)
    for frame in frames:
        middles = frame.pixels[16::32, 24::48]
        assert np.abs(middles.astype(int) - CORNERS).max() <= 6  # BT.709 there and back
    assert [path.name for path in tmp_path.iterdir()] == [path.name]
    grey = next(read_frames(path, 1)).pixels
    assert grey.shape == (64, 96, 1) and grey[48, 72, 0] > 200
    with pytest.raises(DataError, match="have 1 or 3 channels, and the model takes 4"):
        next(read_frames(path, 4))


@pytest.mark.parametrize(("height", "matrix"), [(718, "ITU601"), (720, "ITU709")])
def test_colours_that_no_stream_names(tmp_path: Path, height: int, matrix: str) -> None:
    """BT.709 from 720 lines on, BT.601 below."""
    with av.open(str(tmp_path / "film.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, height, "yuv420p"
        planes = np.full((height * 3 // 2, 32), 90, np.uint8)
        planes[height:] = 200
        frame = av.VideoFrame.from_ndarray(planes, format="yuv420p")
        container.mux([*stream.encode(frame), *stream.encode()])
    (read,) = read_frames(tmp_path / "film.mkv")
    np.testing.assert_array_equal(read.pixels, frame.to_ndarray(format="rgb24", src_colorspace=matrix))


def test_uneven_times(tmp_path: Path) -> None:
    times = [90_000, 93_000, 99_000, 120_000, 121_500]
    frames = list(read_frames(write(tmp_path / "film.mp4", pts=times, base=Fraction(1, 90_000))))
    assert [round(frame.pts * frame.time_base * 90_000) for frame in frames] == times


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), lambda corner: corner),
        ((0, 1, -1, 0), lambda corner: np.rot90(corner, -1)),  # of a telephone held upright: a quarter turn clockwise
        ((0, -1, 1, 0), lambda corner: np.rot90(corner, 1)),
        ((-1, 0, 0, -1), lambda corner: np.rot90(corner, 2)),
        ((-1, 0, 0, 1), lambda corner: corner[:, ::-1]),
        ((1, 0, 0, -1), lambda corner: corner[::-1]),
        ((0, 1, 1, 0), lambda corner: corner.transpose(1, 0, 2)),
    ],
)
def test_display_matrix(tmp_path: Path, matrix: tuple[int, int, int, int], expected: Any) -> None:
    path = with_matrix(write(tmp_path / "film.mp4", 2), matrix)
    upright = expected(corners())
    info, frame = video_info(path), next(read_frames(path))
    assert (info.height, info.width) == frame.pixels.shape[:2] == upright.shape[:2]
    height, width = (side // 4 for side in upright.shape[:2])
    middles = [[image[row * height, column * width] for row in (1, 3) for column in (1, 3)] for image in (frame.pixels, upright)]
    assert np.abs(np.array(middles[0], int) - np.array(middles[1], int)).max() <= 6


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_lossless_labels(tmp_path: Path, dtype: Any) -> None:
    labels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (3, 33, 47)).astype(dtype)
    with written_video(tmp_path / "mask.mkv", rate=Fraction(30), lossless=True) as writer:
        for number, mask in enumerate(labels):
            writer.write(mask, number, Fraction(1, 30))
    with av.open(str(tmp_path / "mask.mkv")) as container:
        assert np.array_equal([frame.to_ndarray() for frame in container.decode(video=0)], labels)


def test_odd_sides(tmp_path: Path) -> None:
    pixels = np.zeros((33, 47, 3), np.uint8)
    pixels[-1], pixels[:, -1] = 255, 255
    (frame,) = read_frames(write(tmp_path / "film.mp4", 1, pixels=pixels))
    assert frame.pixels.shape == (34, 48, 3)
    assert frame.pixels[-2:].mean() > 230 and frame.pixels[:, -2:].mean() > 230


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_frames_before_the_damage(tmp_path: Path, ending: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    path = tmp_path / f"film.{ending}"
    with written_video(path, rate=Fraction(25)) as writer:
        for number in range(30):
            writer.write(np.roll(noise, number, 1), number, Fraction(1, 25))
    if ending == "mp4":  # its index comes last: put it first, as for the web
        with av.open(str(path)) as source, av.open(str(tmp_path / "web.mp4"), "w", options={"movflags": "faststart"}) as copy:
            stream = copy.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    copy.mux(packet)
        path = tmp_path / "web.mp4"
    whole = list(read_frames(path))
    assert len(whole) == 30
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    frames: list[VideoFrame] = []
    with pytest.raises(DataError, match=r"damaged|cut off"):
        for frame in read_frames(path):
            frames.append(frame)
    assert 5 < len(frames) < 25
    for frame, original in zip(frames[:-2], whole, strict=False):  # a packet that is cut inside is not marked: two frames may show it
        assert np.array_equal(frame.pixels, original.pixels)


@pytest.mark.parametrize(
    ("content", "says"), [(b"", "damaged, cut off or no video"), (b"hello" * 99, "no video"), (None, "does not exist")]
)
def test_files_without_a_video(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "film.mp4"
    if content is not None:
        path.write_bytes(content)
    for read in (video_info, lambda path: next(read_frames(path))):
        with pytest.raises(DataError, match=says):
            read(path)


def test_playlist_opens_no_other_file(tmp_path: Path) -> None:
    """FFmpeg knows a format by its content: a list of names would be read as the files that it names."""
    write(tmp_path / "real.mkv")
    (tmp_path / "clip.mp4").write_text("ffconcat version 1.0\nfile real.mkv\n")
    with pytest.raises(DataError, match=r"no video .*Invalid argument"):
        video_info(tmp_path / "clip.mp4")


@pytest.mark.parametrize(
    ("ending", "codec"), [("avi", "mpeg4"), ("ts", "mpeg2video"), ("mpg", "mpeg2video"), ("m4v", "mpeg4"), ("webm", "vp8")]
)
def test_other_formats(tmp_path: Path, ending: str, codec: str) -> None:
    path = tmp_path / f"film.{ending}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, width=96, height=64)
        for picture in [corners()] * 30:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode(None))
    assert len(list(read_frames(path))) == 30


def test_limits_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "film.mp4", 1)
    with pytest.raises(DataError, match="more than the limit of 100"):
        video_info(path, max_pixels=100)
    assert [is_video(Path(name)) for name in ("a.MP4", "a.mkv", "a.png", "mp4")] == [True, True, False, False]
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DependencyError, match=r"videos need the package av: pip install .*video"):
        video_info(path)


def test_nothing_left_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), written_video(tmp_path / "film.mp4", rate=Fraction(25)) as writer:
        writer.write(corners(), 0, Fraction(1, 25))
        raise ZeroDivisionError
    with written_video(tmp_path / "empty.mp4", rate=Fraction(25)):
        pass
    assert not list(tmp_path.iterdir())
    with (
        pytest.raises(DataError, match=r"cannot write .*nowhere"),
        written_video(tmp_path / "nowhere" / "a.mp4", rate=Fraction(25)) as writer,
    ):
        writer.write(corners(), 0, Fraction(1, 25))
