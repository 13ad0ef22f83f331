"""Tiles: cut and blended, a session that sees each pixel alone gives what it gives in one piece."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from muntin.artifact import ClassInfo, Sides, Signature, Sizes
from muntin.errors import ArtifactError, DataError
from muntin.images.sources import ScaledSource
from muntin.runtime import blending, load, predict
from muntin.runtime.blending import best_class, tile_origins, tile_weights
from muntin.runtime.tiles import allowed_tile, size_note

ANY = Sizes()


def classes(count: int) -> tuple[ClassInfo, ...]:
    return tuple(ClassInfo(name=str(k), color=(k, k, k)) for k in range(count))


class PixelSession:
    """Scores from each pixel's own values, repeated `scale` times along both axes; remembers the sizes that it was called with."""

    def __init__(self, task: str = "segment", channels: int = 2, count: int = 4, scale: int = 1, sizes: Sizes = ANY) -> None:
        classed = classes(count) if task != "restore" else ()
        self.signature = Signature(task=task, channels=channels, scale=scale, classes=classed, sizes=sizes)  # type: ignore[arg-type]
        self.mixing = np.random.default_rng(0).normal(size=(self.signature.outputs, channels)).astype(np.float32)
        self.sizes: list[tuple[int, ...]] = []

    def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert self.signature.sizes.takes(*images_BHWC.shape[1:3])
        self.sizes.append(images_BHWC.shape[1:3])
        values = images_BHWC.astype(np.float32)
        scores = values.transpose(0, 3, 1, 2) if self.signature.task == "restore" else np.einsum("bhwc,kc->bkhw", values, self.mixing)
        if self.signature.task == "classify":
            return scores.mean(axis=(2, 3))
        return scores.repeat(self.signature.scale, axis=2).repeat(self.signature.scale, axis=3)


class PositionSession(PixelSession):
    """Sees the tile's border: its scores depend on where a pixel lies in the tile, so blending has something to blend."""

    def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
        scores = super().__call__(images_BHWC)
        return scores + np.arange(scores.shape[3], dtype=np.float32) * np.arange(4, dtype=np.float32)[:, None, None]


def picture(height: int, width: int, channels: int = 2) -> NDArray[np.uint8]:
    return np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, channels)).astype(np.uint8)


class MappingSession(PixelSession):
    """Computes ahead, like an engine; its answers may be changed in place."""

    def map(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
        pending: deque[NDArray[np.float32]] = deque()
        for batch in batches:
            pending.append(self(batch))
            if len(pending) > 2:
                yield pending.popleft()
        yield from pending


sides, tiles = st.integers(1, 70), st.integers(1, 80)


@given(height=sides, width=sides, tile=tiles, data=st.data(), scale=st.integers(1, 3), kind=st.sampled_from([PixelSession, MappingSession]))
def test_cut_and_blend_is_the_identity(
    height: int, width: int, tile: int, data: st.DataObject, scale: int, kind: type[PixelSession]
) -> None:
    overlap = data.draw(st.none() | st.integers(0, tile - 1))
    session, image = kind(scale=scale), picture(height, width)
    whole = session(image[None])[0]
    blended = predict(session, image, tile=tile, overlap=overlap, output="scores")
    assert (blended.shape, blended.dtype) == ((4, scale * height, scale * width), np.float32)
    np.testing.assert_allclose(blended, whole, rtol=1e-5, atol=1e-3)
    assert len(set(session.sizes[1:])) == 1  # tiles of one size: an engine compiles once
    assert session.sizes[1] == (min(tile, height), min(tile, width))


@given(height=sides, width=sides, tile=tiles, data=st.data())
def test_blending_by_weights(height: int, width: int, tile: int, data: st.DataObject) -> None:
    """The sum of all tiles' scores times their weights, added up over the whole picture."""
    overlap = data.draw(st.integers(0, tile - 1))
    session, image = PositionSession(), picture(height, width)
    rows, columns = (tile_origins(size, min(tile, size), overlap) for size in (height, width))
    weights = [tile_weights(origins, min(tile, size), overlap, 1) for origins, size in ((rows, height), (columns, width))]
    expected = np.zeros((4, height, width))
    for top, down in zip(rows, weights[0], strict=True):
        for left, across in zip(columns, weights[1], strict=True):
            part = np.s_[top : top + len(down), left : left + len(across)]
            expected[:, *part] += session(image[part][None])[0] * np.outer(down, across)
    scores = predict(session, image, tile=tile, overlap=overlap, output="scores")
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-3)


@given(height=sides, width=sides, tile=tiles, data=st.data())
def test_labels_are_the_argmax(height: int, width: int, tile: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, tile - 1))
    session, image = PositionSession(), picture(height, width)
    labels = predict(session, image, tile=tile, overlap=overlap)
    scores = predict(session, image, tile=tile, overlap=overlap, output="scores")
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, scores.argmax(axis=0))


@given(size=st.integers(1, 200), tile=st.integers(1, 80), data=st.data(), scale=st.integers(1, 3))
def test_weights_are_a_partition_of_one(size: int, tile: int, data: st.DataObject, scale: int) -> None:
    overlap, tile = data.draw(st.integers(0, tile - 1)), min(tile, size)
    origins = tile_origins(size, tile, overlap)
    assert origins[0] == 0
    assert origins[-1] + tile == size
    assert all(0 < after - before <= tile - min(overlap, tile - 1) for before, after in itertools.pairwise(origins))
    weights = tile_weights(origins, tile, overlap, scale)
    assert (weights > 0).all()
    total = np.zeros(size * scale)
    for origin, row in zip(origins, weights, strict=True):
        total[origin * scale : (origin + tile) * scale] += row
    np.testing.assert_allclose(total, 1)


@pytest.mark.parametrize("rest", [1, 2, 6, 20])
def test_last_tile_moved_far_inward(rest: int) -> None:
    """The one before it ends beside the picture's end, with zeros in place of what follows."""

    class Blurred(PixelSession):
        def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
            scores = super().__call__(images_BHWC)
            padded = np.pad(scores, ((0, 0), (0, 0), (2, 2), (2, 2)))
            return np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(2, 3)).mean(axis=(4, 5))

    def error(size: int) -> float:
        image = picture(size, 40)
        whole = Blurred()(image[None])[0]
        return float(np.abs(predict(Blurred(), image, tile=32, output="scores") - whole).max())

    assert error(32 + rest) < 1.5 * error(32 + 24)


@pytest.mark.parametrize("kind", [np.uint8, np.int64])
def test_numpy_integers_as_arguments(kind: type) -> None:
    session, image = PixelSession(scale=4), picture(200, 150)
    expected = predict(session, image, tile=97, overlap=64, output="scores")
    np.testing.assert_array_equal(predict(session, image, tile=kind(97), overlap=kind(64), output="scores"), expected)


def test_blending_of_different_tiles() -> None:
    class Steps(PixelSession):
        def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
            super().__call__(images_BHWC)
            B, H, W, _ = images_BHWC.shape
            return np.full((B, 4, H, W), len(self.sizes), np.float32)

    scores = predict(Steps(), picture(8, 28), tile=16, overlap=4, output="scores")[0, 4]
    assert (scores[:12] == 1).all()
    assert (scores[16:] == 2).all()
    assert (np.diff(scores[11:17]) > 0).all()
    np.testing.assert_allclose(scores[12:16] + scores[12:16][::-1], 3, rtol=1e-6)


def test_real_sessions_in_tiles(per_pixel: Any) -> None:
    image = picture(37, 53, 4)
    session = load(per_pixel.path, precision="f32")
    whole = predict(session, image, output="scores")
    np.testing.assert_allclose(predict(session, image, tile=16, output="scores"), whole, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(whole, per_pixel.reference(image[None])[0], atol=1e-3)


def test_tiles_equal_the_whole_far_from_borders(convolutions: Any) -> None:
    image = picture(20, 90, 3)
    session = load(convolutions.path, precision="f32")
    whole, tiled = predict(session, image, output="scores"), predict(session, image, tile=40, overlap=20, output="scores")
    np.testing.assert_allclose(tiled[:, :, :20], whole[:, :, :20], atol=0.2 * whole.std())
    seams = predict(session, image, tile=40, overlap=0, output="scores")
    assert np.abs(tiled - whole).max() < np.abs(seams - whole).max() / 2


def test_calls_of_tiles() -> None:
    session = PixelSession()
    predict(session, picture(20, 30), tile=64)
    assert session.sizes == [(20, 30)]
    predict(session, picture(20, 100), tile=64, overlap=0)
    assert session.sizes[1:] == [(20, 64), (20, 64)]
    image, session = picture(20, 90), PositionSession()
    default, quarter, none = (predict(session, image, tile=20, overlap=overlap, output="scores") for overlap in (None, 5, 0))
    np.testing.assert_array_equal(default, quarter)
    assert (default != none).any()


@st.composite
def allowed_sizes(draw: st.DrawFn) -> Sizes:
    low, steps, multiple = draw(st.integers(1, 20)), draw(st.none() | st.integers(0, 3)), draw(st.integers(1, 8))
    return Sizes.both(min=low, max=None if steps is None else (-(-low // multiple) + steps) * multiple, multiple=multiple)


@given(height=sides, width=sides, sizes=allowed_sizes(), tile=st.none() | st.integers(1, 48), scale=st.integers(1, 2))
def test_pictures_of_every_size(height: int, width: int, sizes: Sizes, tile: int | None, scale: int) -> None:
    """Extended and tiled, a session that sees each pixel alone gives what it gives for every size."""
    session, image = PixelSession(scale=scale, sizes=sizes), picture(height, width)
    tile = None if tile is None else allowed_tile(session.signature, tile)
    scores = predict(session, image, tile=tile, output="scores")
    np.testing.assert_allclose(scores, PixelSession(scale=scale)(image[None])[0], rtol=1e-5, atol=1e-3)
    assert len(set(session.sizes)) == 1
    (rows, columns) = session.sizes[0]
    changed = rows > height or columns > width or (tile is None and (rows < height or columns < width))
    assert bool(size_note((height, width), session.signature, tile)) == changed


@pytest.mark.parametrize(
    ("task", "sizes", "size", "calls", "note"),
    [
        ("segment", ANY, (30, 20), [(30, 20)], ""),
        (
            "segment", Sizes.both(multiple=8, min=16), (30, 10), [(32, 16)],
            "30 x 10 pixels are extended to 32 x 16 by repeating the last row and column, and the answer is cut, as the model takes height "
            "and width multiples of 8 from 16",
        ),
        (
            "restore", Sizes.only(16, 32), (24, 30), [(16, 32)] * 2,
            "24 x 30 pixels are computed in tiles of 16 x 32 and extended to 24 x 32 by repeating the last row and column",
        ),
        ("classify", ANY, (30, 20), [(30, 20)], ""),
        (
            "classify", Sizes.only(16, 16), (30, 20), [(16, 16)],
            "of 30 x 20 pixels, the middle is resized to 16 x 16, as the model takes 16 x 16",
        ),
        ("classify", Sizes.both(multiple=16, max=64), (200, 20), [(64, 32)], "of 200 x 20 pixels, the middle is resized to 64 x 32"),
    ],
)  # fmt: skip
def test_calls_for_restricted_sizes(task: str, sizes: Sizes, size: tuple[int, int], calls: list[tuple[int, int]], note: str) -> None:
    session = PixelSession(task, sizes=sizes)
    predict(session, picture(*size))
    assert session.sizes == calls
    assert size_note(size, session.signature).startswith(note) and bool(note) == bool(size_note(size, session.signature))


def test_tiles_of_other_sizes() -> None:
    for sizes, tile, advice in (
        (Sizes.both(multiple=32, min=64), 100, "give 96, or leave tile out"),
        (Sizes.both(multiple=32, min=64), 40, "give 64, or leave tile out"),
        (Sizes(height=Sides(min=48, max=48), width=Sides(min=64)), 48, ": leave tile out"),
    ):
        with pytest.raises(DataError, match=f"tile={tile}: the model takes {sizes.text}.*{advice}$"):
            predict(PixelSession(sizes=sizes), picture(200, 200), tile=tile)


def test_whole_picture_in_one_call() -> None:
    session, image = PixelSession(), picture(33, 21)
    np.testing.assert_array_equal(predict(session, image), session(image[None])[0].argmax(axis=0))
    assert session.sizes == [(33, 21), (33, 21)]


def test_restored_pictures_are_pictures() -> None:
    session, image = PixelSession("restore", channels=3, scale=2), picture(19, 23, 3)
    restored = predict(session, image, tile=8)
    assert restored.dtype == np.uint8
    np.testing.assert_array_equal(restored, image.repeat(2, axis=0).repeat(2, axis=1))

    class Wild(PixelSession):
        def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
            return (super().__call__(images_BHWC) - 128) * 4

    np.testing.assert_array_equal(predict(Wild("restore", channels=3), image), np.clip((image.astype(int) - 128) * 4, 0, 255))


def test_classes_of_a_picture() -> None:
    session, image = PixelSession("classify"), picture(9, 9)
    assert predict(session, image).shape == (4,)
    np.testing.assert_array_equal(predict(session, image), session(image[None])[0])


def test_progress_counts_every_tile() -> None:
    seen: list[tuple[int, int]] = []
    predict(PixelSession(), picture(20, 30), tile=10, overlap=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 6) for done in range(1, 7)]


def test_memory_of_tiled_labels() -> None:
    """Part of a band of tiles, not the scores of the whole picture: 6 classes x 1376 x 2700 float32 would be 89 MB."""

    class Cheap(PixelSession):
        def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
            B, H, W, _ = images_BHWC.shape
            return np.zeros((B, 6, H, W), np.float32)

    session, image = Cheap(count=6), np.zeros((1376, 2700, 2), np.uint8)
    tracemalloc.start()
    try:
        labels = predict(session, image, tile=128)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    band, call = 6 * 128 * 2700 * 4, 6 * 128 * 128 * 4
    assert peak - labels.nbytes < band / 2 + 4 * call


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("segment", {"tile": 0}, "tile=0"),
        ("segment", {"tile": 8.0}, "tile=8.0"),
        ("segment", {"tile": True}, "tile=True"),
        ("segment", {"tile": 8, "overlap": 8}, "from 0 to 7"),
        ("segment", {"tile": 8, "overlap": -1}, "from 0 to 7"),
        ("segment", {"overlap": 4}, "without tile"),
        ("segment", {"output": "image"}, "labels, scores"),
        ("segment", {"output": "mask"}, "labels, scores"),
        ("segment", {"exact": True}, "needs a session of an artefact"),
        ("classify", {"tile": 8}, "leave tile out"),
        ("classify", {"output": "labels"}, "give one of scores"),
        ("restore", {"output": "labels"}, "image, scores"),
    ],
)
def test_wrong_arguments(task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        predict(PixelSession(task), picture(12, 12), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"shape \(4, 4\)"),
        (np.zeros((4, 4, 3), np.uint8), r"\(1, 4, 4, 3\).*2\)"),
        (np.zeros((4, 4, 2), np.float32), "float32"),
        (np.zeros((0, 4, 2), np.uint8), "side of 0"),
        ("cat.npy", "cat.npy does not exist"),
        ([[0, 0]], "type list"),
    ],
)
def test_wrong_images(image: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        predict(PixelSession(), image)


@pytest.mark.parametrize(("count", "dtype"), [(1, np.uint8), (4, np.uint8), (300, np.uint16)])
def test_best_class(count: int, dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blending, "_CHUNK", 50)
    scores = np.random.default_rng(0).integers(0, 4 if count == 4 else 1000, (count, 23, 17)).astype(np.float32)  # with equal ones
    labels = np.full((23, 20), 99, dtype)
    best_class(scores, labels[:, 1:18])
    np.testing.assert_array_equal(labels[:, 1:18], scores.argmax(axis=0))
    assert (labels[:, [0, 18, 19]] == 99).all()


class RecordingSink:
    """Remembers what it receives; fails at a row."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.kind: tuple[Any, ...] = ()
        self.bands: list[tuple[int, NDArray[Any]]] = []

    def begin(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.kind = (shape, dtype)

    def write(self, top: int, band: NDArray[Any], empty_HW: Any = None) -> None:
        if self.fails_at is not None and top >= self.fails_at:
            raise DataError("the disk is full")
        assert empty_HW is None
        self.bands.append((top, band.copy()))
        band[...] = 0  # it is the sink's


@given(height=sides, width=sides, tile=st.none() | tiles, output=st.sampled_from(["labels", "scores"]), scale=st.integers(1, 2))
def test_bands_into_a_sink(height: int, width: int, tile: int | None, output: Any, scale: int) -> None:
    session, image, sink = MappingSession(scale=scale), picture(height, width), RecordingSink()
    assert predict(session, image, tile=tile, output=output, into=sink) is None
    expected = predict(session, image, tile=tile, output=output)
    expected = expected.transpose(1, 2, 0) if output == "scores" else expected
    assert sink.kind == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(np.concatenate([band for _, band in sink.bands]), expected)
    assert [top for top, _ in sink.bands] == [0, *itertools.accumulate(len(band) for _, band in sink.bands)][:-1]


def test_sink_that_fails() -> None:
    session, sink = PixelSession(), RecordingSink(fails_at=20)
    with pytest.raises(DataError, match="the disk is full"):
        predict(session, picture(200, 10), tile=10, overlap=0, into=sink)
    assert [top for top, _ in sink.bands] == [0, 10] and len(session.sizes) < 8
    with pytest.raises(DataError, match="leave `into` out"):
        predict(PixelSession("classify"), picture(8, 8), into=sink)


def test_restored_values_of_a_range() -> None:
    values = picture(19, 23, 3).astype(np.uint16) * 40 + 100
    source = ScaledSource(values, 100, 100 + 40 * 255)
    restored = predict(PixelSession("restore", channels=3), source, tile=8)
    assert restored.dtype == np.uint16
    np.testing.assert_array_equal(restored, values)


def test_session_that_contradicts_its_signature() -> None:
    class Narrow(PixelSession):
        def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
            return super().__call__(images_BHWC)[:, :3]

    with pytest.raises(ArtifactError, match=r"\(1, 3, 5, 5\).*\(1, 4, 5, 5\)"):
        predict(Narrow(), picture(5, 5))


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_from_a_file_and_from_pillow(channels: int, tmp_path: Path) -> None:
    """A file whose EXIF says that it lies on its side."""
    image = Image.fromarray(picture(6, 9, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.png", exif=exif)
    session = PixelSession(channels=channels)
    upright = np.asarray(image.convert("L" if channels == 1 else "RGB").transpose(Image.Transpose.ROTATE_270)).reshape(9, 6, channels)
    expected = predict(session, upright)
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.open(tmp_path / "a.png"), Image.fromarray(upright.squeeze())):
        np.testing.assert_array_equal(predict(session, source), expected)
    with pytest.raises(DataError, match="the image has more than 8 bits a channel"):
        predict(session, Image.fromarray(np.zeros((4, 4), np.uint16)))
