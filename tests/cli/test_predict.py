from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from muntin.artifact import Signature, open_artifact
from muntin.artifact.classes import ClassInfo
from muntin.cli.predict import _print_results
from muntin.images import colorize, overlay, read_image, read_mask, write_image
from muntin.runtime import ENGINES, load, predict
from muntin.runtime.bulk import items
from muntin.runtime.bulk.pictures import predict_picture
from muntin.runtime.options import SessionOptions
from muntin.training import read_checkpoint
from muntin.training.evaluation import tile_of

Call = Callable[..., Any]
Write = Callable[..., Path]
FullDisk = Callable[[int], AbstractContextManager[None]]
Tree = Callable[[Path], dict[str, bytes]]


def test_predict_mask_overlay_and_difference(call: Call, exported: Any, tmp_path: Path) -> None:
    words = ("predict", exported.artifact, exported.image, "--truth", exported.mask, "-o", tmp_path / "out", "--json")
    (result,) = call(*words).document()["results"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["test-0.difference.png", "test-0.mask.png", "test-0.overlay.jpg"]
    mask, truth = read_mask(result["mask"]), read_mask(exported.mask)
    assert (mask == predict(load(exported.artifact), read_image(exported.image))).mean() > 0.99
    counted = truth != 255
    assert result["agreement"] == pytest.approx((mask == truth)[counted].mean())
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert result["shares"]["sea"] == pytest.approx((mask == 0).mean())
    shown = read_image(result["overlay"])
    assert shown.shape[1] == 160 and shown.shape[0] > 48 + 12  # a legend lies below
    assert (
        np.abs(shown[:48, :48].astype(int) - overlay(read_image(exported.image), mask, load(exported.artifact).signature.classes)).mean()
        < 20
    )
    assert len(np.unique(read_image(result["difference"])[~counted], axis=0)) == 1


def test_predict_mask_numbers_and_colours(call: Call, exported: Any, tmp_path: Path) -> None:
    (result,) = call("predict", exported.artifact, exported.image, "-o", tmp_path / "out", "--json").document()["results"]
    classes = load(exported.artifact).signature.classes
    labels = predict(load(exported.artifact), read_image(exported.image))
    with Image.open(result["mask"]) as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.array(picture), labels)
    assert len(np.unique(labels)) > 1
    assert np.array_equal(read_mask(result["mask"]), labels)
    assert np.array_equal(read_mask(result["mask"], colors=True), colorize(labels, classes))  # as a recipe of colours reads it
    words = ("predict", exported.artifact, exported.image, "--truth", result["mask"], "-o", tmp_path / "again", "--json")
    (again,) = call(*words).document()["results"]
    assert again["agreement"] == 1


def test_truth_in_class_colours(call: Call, exported: Any, tmp_path: Path) -> None:
    truth = read_mask(exported.mask)
    truth[truth == 255] = 2
    colors = np.array([entry.color for entry in open_artifact(exported.artifact).manifest.signature.classes], np.uint8)
    words = ("predict", exported.artifact, exported.image, "-o", tmp_path / "out", "--truth")
    write_image(tmp_path / "numbers.png", truth)
    write_image(tmp_path / "colours.png", colors[truth])
    numbers, painted = (call(*words, tmp_path / name, "--json").document()["results"][0] for name in ("numbers.png", "colours.png"))
    assert numbers.pop("truth") == {str(value): ("sea", "field", "roof")[value] for value in np.unique(truth)}
    assert numbers == painted and 0 < painted["agreement"] <= 1
    told = "the truth's numbers were taken for class numbers, not for a recipe's `value`s: 0 is sea, 1 is field"
    assert told in call(*words, tmp_path / "numbers.png").out
    write_image(tmp_path / "other.png", np.concatenate([colors[truth][:-1], np.full((1, truth.shape[1], 3), 1, np.uint8)]))
    text = call(*words, tmp_path / "other.png").mistake()
    assert f"no class of the artefact has its [1, 1, 1] (sea {colors[0].tolist()}, field" in text
    assert "give it in these colours, or as class numbers, 0 to 2" in text


def test_predict_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = (ClassInfo(name="sea", color=(0, 0, 0)), ClassInfo(name="land", color=(255, 255, 255)))

    class Two:
        """A session of two channels."""

        signature = Signature(task="segment", channels=2, classes=classes)

        def __call__(self, images: Any) -> Any:
            return images.transpose(0, 3, 1, 2).astype(np.float32)

        def labels(self, images: Any) -> Any:
            return images.argmax(-1).astype(np.uint8)

    np.save(tmp_path / "two.npy", np.random.default_rng(0).integers(0, 255, (24, 20, 2), dtype=np.uint8))
    session: Any = Two()
    tiles = {"tile": 64, "overlap": None}
    result = predict_picture(session, tmp_path / "two.npy", tmp_path / "out" / "two", None, 10_000, tiles)
    assert result["notes"] == [f"{tmp_path}/two.npy: 2 channels cannot be shown: no overlay"] and "overlay" not in result
    assert capsys.readouterr().err == ""
    _print_results([result], "segment")
    assert capsys.readouterr().err == f"{result['notes'][0]}\n"


@pytest.mark.parametrize(("agreement", "shown"), [(0.99996, "99.99 %"), (0.5, "50.00 %"), (1.0, "100 %")])
def test_predict_agreement_below_one(capsys: pytest.CaptureFixture[str], agreement: float, shown: str) -> None:
    _print_results([{"source": "a.png", "mask": "a.mask.png", "agreement": agreement}], "segment")
    assert f"({shown} of the pixels that count agree with the truth)" in capsys.readouterr().out


def test_predict_in_tiles_like_the_library(call: Call, exported: Any, tmp_path: Path) -> None:
    words = ("predict", exported.artifact, exported.image, "-o", tmp_path, "--tile", "20", "--overlap", "7", "--json")
    (result,) = call(*words).document()["results"]
    expected = predict(load(exported.artifact), read_image(exported.image), tile=20, overlap=7)
    assert np.array_equal(read_mask(result["mask"]), expected)


def test_predict_tile_of_the_score(call: Call, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[int | None] = []
    monkeypatch.setattr(items, "compute_in_parts", lambda compute, tiled, *_: (tiles.append(tiled.tile), (compute(tiled), tiled))[1])
    assert call("predict", exported.artifact, exported.image, "-o", tmp_path / "out").code == 0
    assert tiles == [tile_of(read_checkpoint(exported.run).recipe.data.crop)]


def test_predict_folder(call: Call, exported: Any, tmp_path: Path) -> None:
    answer = call("predict", exported.artifact, exported.image.parent, "-o", tmp_path / "out")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.count(" -> ") == 2
    assert len(list((tmp_path / "out").glob("*.mask.png"))) == 2


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every (B, H, W) that OpenVINO compiles for from now on; None: free sizes."""
    from muntin.runtime.engines.openvino.session import OpenVinoSession

    made: list[Any] = []
    compile_one = OpenVinoSession._compile

    def noting(session: OpenVinoSession, form: Any) -> Any:
        made.append(None if form.dims is None else tuple(size for _, size in form.dims))
        return compile_one(session, form)

    monkeypatch.setattr(OpenVinoSession, "_compile", noting)
    return made


@pytest.mark.parametrize(
    ("sizes", "tile", "wanted"),
    [
        ([(30, 41), (31, 40), (32, 40), (30, 41)], 512, [None]),
        ([(30, 41), (30, 41)], 512, [(1, 30, 41)]),
        ([(150, 140), (12, 140)], 16, [(1, 16, 16), None]),  # 156 tiles, and 12
    ],
)
def test_predict_compiles_common_sizes(
    call: Call, exported: Any, tmp_path: Path, compiled: list[Any], sizes: list[tuple[int, int]], tile: int, wanted: list[Any]
) -> None:
    (tmp_path / "photos").mkdir()
    for number, (height, width) in enumerate(sizes):
        write_image(
            tmp_path / "photos" / f"{number}.png", np.random.default_rng(number).integers(0, 256, (height, width, 3)).astype(np.uint8)
        )
    words = ("predict", exported.artifact, tmp_path / "photos", "-o", tmp_path / "out", "--tile", tile, "--precision", "f32", "--json")
    results = call(*words).document()["results"]
    assert compiled == wanted
    session = load(exported.artifact, precision="f32", shapes=())  # each size compiled
    for result in results:
        assert (read_mask(result["mask"]) == predict(session, read_image(result["source"]), tile=tile)).mean() > 0.999


def test_predict_compiles_the_side_of_a_classifier(call: Call, tmp_path: Path, write_small: Write, compiled: list[Any]) -> None:
    artifact = write_small(tmp_path / "classify", task="classify", side=6)
    for number in range(3):
        write_image(tmp_path / f"{number}.png", np.full((7 + number, 9, 3), 200, np.uint8))
    assert len(call("predict", artifact, *(tmp_path / f"{n}.png" for n in range(3)), "--json").document()["results"]) == 3
    assert compiled == [(1, 6, 6)]


@pytest.mark.parametrize("task", ["segment", "classify"])
def test_predict_with_one_bad_image(call: Call, tmp_path: Path, write_small: Write, task: str) -> None:
    artifact, photos = write_small(tmp_path / "artifact", task=task), tmp_path / "photos"
    (photos / "folder.png").mkdir(parents=True)
    for name in ("a.png", "c.png", "._a.jpg"):  # macOS leaves the last beside a.jpg
        write_image(photos / name, np.full((5, 4, 3), 200, np.uint8))
    (photos / "b.png").write_bytes((photos / "a.png").read_bytes()[:50])
    (photos / "._a.jpg").write_bytes(b"no image")
    words = ("predict", artifact, photos, *(["-o", tmp_path / "out"] if task == "segment" else []))
    answer = call(*words, "--json")
    text = answer.mistake()
    assert f"{photos / 'b.png'} is damaged or cut off" in text
    document = json.loads(answer.out)
    assert [Path(result["source"]).name for result in document["results"]] == ["a.png", "c.png"]
    assert document["failures"] == [{"source": str(photos / "b.png"), "error": text}]
    answer = call(*words)
    assert answer.mistake() == text
    assert answer.out.count(" -> ") == 2


def test_predict_images_and_folders(call: Call, tmp_path: Path, write_small: Write) -> None:
    artifact, photos = write_small(tmp_path / "segment"), tmp_path / "photos"
    for name in ("a", "b", "more/c", "other/a"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        write_image(photos / f"{name}.png", np.full((5, 4, 3), 200, np.uint8))
    words = ("predict", artifact, photos / "b.png", photos / "a.png", photos / "more", "-o", tmp_path / "out")
    results = call(*words, "--json").document()["results"]
    assert [Path(result["source"]).name for result in results] == ["b.png", "a.png", "c.png"]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.mask.png")) == ["a.mask.png", "b.mask.png", "c.mask.png"]
    twice = call(*words, photos / ".." / "photos" / "a.png", photos, "--json").document()["results"]
    assert [Path(result["source"]).name for result in twice] == ["b.png", "a.png", "c.png", "a.png"]  # that of `other`
    (photos / "linked.png").symlink_to(photos / "a.png")  # as stores of data link what is the same twice
    (photos / "more" / "loop").symlink_to(photos)
    for _ in range(2):  # the results in the folder are no images
        assert len(call("predict", artifact, photos, "-o", photos / "out", "--json").document()["results"]) == 5
    (photos / "more" / "loop").unlink()
    for inside in (photos, photos / "more"):
        assert "is the folder of the images" in call("predict", artifact, photos, "-o", inside).mistake()
    assert "is the folder of the images" in call(*words[:5], "-o", photos / "more").mistake()
    assert "--truth goes with one image, and these are 3" in call(*words, "--truth", photos / "a.png").mistake()


def test_predict_leaves_masks_out(call: Call, tmp_path: Path, write_small: Write) -> None:
    artifact, data = write_small(tmp_path / "segment"), tmp_path / "data"
    for name in ("images/a", "masks/a"):
        (data / name).parent.mkdir(parents=True)
        write_image(data / f"{name}.png", np.full((5, 4, 3), 1, np.uint8))
    words, note = ("predict", artifact, data, "-o", tmp_path / "out"), f"{data}: read images/; left out masks/"
    document = call(*words, "--json").document()
    assert [result["source"] for result in document["results"]] == [str(data / "images" / "a.png")] and document["notes"] == [note]
    assert f"note      {note}\n" in call(*words).err


def test_predict_images_of_one_name(call: Call, tmp_path: Path, write_small: Write) -> None:
    artifact = write_small(tmp_path / "artifact")
    expected = {
        "x/a.png": "x/a", "y/a.png": "y/a", "x/b.png": "x/b", "x/b.bmp": "b.bmp", "x/b.png.bmp": "b.png.bmp", "x/c.png": "c",
        "x/deep/z/d.png": "x/deep/z/d", "y/deep/z/d.png": "y/deep/z/d", "y/deep/z/d.bmp": "d.bmp", "z.v2.png": "z.v2",
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for name in expected:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (6, 4, 3), dtype=np.uint8)).save(tmp_path / name)
    words = ("predict", artifact, *(tmp_path / name for name in expected), "-o", tmp_path / "out", "--precision", "f32")
    results = call(*words, "--json").document()["results"]
    names = {Path(result["source"]).relative_to(tmp_path).as_posix(): Path(result["mask"]) for result in results}
    assert {source: mask.relative_to(tmp_path / "out").as_posix() for source, mask in names.items()} == {
        source: f"{name}.mask.png" for source, name in expected.items()
    }
    session = load(artifact, precision="f32")
    for source, mask in names.items():
        assert np.array_equal(read_mask(mask), predict(session, read_image(tmp_path / source)))
    assert len(list((tmp_path / "out").rglob("*.*g"))) == 2 * len(expected)
    text = call("predict", artifact, tmp_path / "x", tmp_path / "y" / "a.png", "-o", tmp_path).mistake()
    assert f"{tmp_path / 'x'}, where results would be written, is the folder of the images" in text
    (tmp_path / "in_the_way").mkdir()
    (tmp_path / "in_the_way" / "x").touch()
    assert "x is a file: name a folder" in call(*words[:-4], "-o", tmp_path / "in_the_way").mistake()


def test_predict_restored_image(call: Call, tmp_path: Path, write_small: Write) -> None:
    artifact = write_small(tmp_path / "restore", task="restore", names=("r", "g", "b"))
    (tmp_path / "photos").mkdir()
    write_image(tmp_path / "photos" / "x.png", np.full((5, 4, 3), 200, np.uint8))
    before = (tmp_path / "photos" / "x.png").read_bytes()
    (result,) = call("predict", artifact, tmp_path / "photos" / "x.png", "-o", tmp_path / "photos", "--json").document()["results"]
    assert Path(result["image"]) == tmp_path / "photos" / "x.restored.png"
    assert read_image(result["image"]).shape == (5, 4, 3)
    assert (tmp_path / "photos" / "x.png").read_bytes() == before


def test_predict_restored_array(call: Call, tmp_path: Path, write_small: Write) -> None:
    artifact = write_small(tmp_path / "restore", task="restore", names=tuple("abcde"))
    image = np.full((6, 4, 5), 255, np.uint8)
    np.save(tmp_path / "x.npy", image)
    (result,) = call("predict", artifact, tmp_path / "x.npy", "-o", tmp_path / "out", "--json").document()["results"]
    assert Path(result["image"]) == tmp_path / "out" / "x.restored.npy"
    assert np.array_equal(np.load(result["image"]), np.ones((6, 4, 5), np.uint8))


def test_predict_with_a_scale(call: Call, tmp_path: Path, write_small: Write) -> None:
    artifact = write_small(tmp_path / "segment", scale=2)
    image = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)
    labels = predict(load(artifact), image)
    for name, picture in (("x.png", image), ("truth.png", labels), ("small.png", labels[::2, ::2])):
        write_image(tmp_path / name, picture)
    words = ("predict", artifact, tmp_path / "x.png", "-o", tmp_path / "out", "--json", "--truth")
    (result,) = call(*words, tmp_path / "truth.png").document()["results"]
    assert labels.shape == (12, 8) and len(np.unique(labels)) == 2
    assert np.array_equal(read_mask(result["mask"]), labels) and result["agreement"] == 1
    assert read_image(result["difference"]).shape == (12, 8, 3) and read_image(result["overlay"]).shape[0] > 12
    assert "the mask is 4x6 and the answer 8x12" in call(*words, tmp_path / "small.png").mistake()


def test_predict_never_replaces_its_inputs(call: Call, tmp_path: Path, write_small: Write, tree: Tree) -> None:
    artifact, photos = write_small(tmp_path / "segment"), tmp_path / "photos"
    photos.mkdir()
    write_image(photos / "x.png", np.full((5, 4, 3), 200, np.uint8))
    write_image(photos / "x.mask.png", np.ones((5, 4), np.uint8))
    before = tree(photos)
    words = ("predict", artifact, photos / "x.png", "--truth", photos / "x.mask.png")
    assert "x.mask.png, a result of" in (text := call(*words, "-o", photos).mistake())
    assert "give another folder by --output" in text
    assert "is the folder of the images" in call("predict", artifact, photos, "-o", photos / ".." / "photos").mistake()
    assert tree(photos) == before
    assert call(*words, "-o", tmp_path / "out").code == 0
    assert tree(photos) == before


def test_predict_class(call: Call, tmp_path: Path, write_small: Write) -> None:
    artifact = write_small(tmp_path / "classify", task="classify", names=("red", "any"))
    write_image(tmp_path / "x.png", np.full((5, 4, 3), (200, 0, 0), np.uint8))
    (result,) = call("predict", artifact, tmp_path / "x.png", "--json").document()["results"]
    assert result["class"] == "red"
    assert result["probability"] == pytest.approx(1 / (1 + np.exp(-100 / 255)), rel=1e-4)
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "x.png", tmp_path / "more")  # nothing is written that could lie where another's result does
    again = call("predict", artifact, tmp_path / "x.png", tmp_path / "more", "--json").document()["results"]
    assert [entry["source"] for entry in again] == [str(tmp_path / "x.png"), str(tmp_path / "more" / "x.png")]
    told = f"{tmp_path / 'x.png'} -> red (probability {result['probability']:.3f})\n"
    assert call("predict", artifact, tmp_path / "x.png").out == told


@pytest.mark.parametrize(
    ("task", "options", "says"),
    [
        ("classify", ["--tile", "512"], "--tile: the artefact's task is classify"),
        ("classify", ["--overlap", "0"], "leave out --overlap"),
        ("classify", ["--tile", "8", "-o", "out"], "leave out --output, --tile"),
        ("classify", ["--truth", "mask.png"], "leave out --truth"),
        ("restore", ["--truth", "mask.png"], "--truth: the artefact's task is restore"),
    ],
)
def test_predict_options_of_another_task(call: Call, tmp_path: Path, write_small: Write, task: str, options: list[str], says: str) -> None:
    artifact = write_small(tmp_path / "artifact", task=task, names=("a", "b", "c"))
    write_image(tmp_path / "x.png", np.full((5, 4, 3), 200, np.uint8))
    assert says in call("predict", artifact, tmp_path / "x.png", *options).mistake()


def spoiled(tmp_path: Path, exported: Any, kind: str) -> list[Any]:
    """An image, and what goes with it, that something is wrong with."""
    image = tmp_path / "image.png"
    shutil.copy(exported.image, image)
    if kind == "truncated":
        image.write_bytes(image.read_bytes()[:-40])
    elif kind == "no image":
        image.write_text("hello")
    elif kind == "deep":
        from PIL import Image

        Image.fromarray(np.zeros((4, 4), np.uint16)).save(image)
    elif kind == "missing":
        image.unlink()
    elif kind == "empty folder":
        (tmp_path / "empty").mkdir()
        image = tmp_path / "empty"
    truths = {
        "other size": np.zeros((48, 47), np.uint8),
        "other value": np.full((48, 48), 3, np.uint8),
        "colours": np.zeros((48, 48, 3), np.uint8) + np.arange(3, dtype=np.uint8),
    }
    words: list[Any] = [image]
    if kind in truths:
        (tmp_path / "truth").mkdir()
        write_image(tmp_path / "truth" / "mask.png", truths[kind])
        words += ["--truth", tmp_path / "truth" / "mask.png"]
    if kind == "truth of a folder":
        words = [exported.image.parent, "--truth", exported.mask]
    return words + (["--tile", "16", "--overlap", "16"] if kind == "overlap" else [])


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("truncated", "image.png is damaged or cut off"),
        ("no image", "image.png is no image that muntin reads"),
        ("deep", "more than 8 bits"),
        ("missing", "image.png does not exist"),
        ("empty folder", "empty holds no image"),
        ("other size", "the mask is 47x48 and the answer 48x48"),
        ("other value", "the mask holds the value 3; allowed are 0 to 2, and 255"),
        ("colours", "the mask is a colour picture"),
        ("truth of a folder", "--truth goes with one image"),
        ("overlap", "a whole number of pixels from 0 to 15"),
    ],
)
def test_predict_mistakes(call: Call, exported: Any, tmp_path: Path, kind: str, says: str) -> None:
    words = spoiled(tmp_path, exported, kind)
    assert says in call("predict", exported.artifact, *words, "-o", tmp_path / "out").mistake()
    assert not (tmp_path / "out").exists()


def test_predict_max_pixels(call: Call, exported: Any, tmp_path: Path) -> None:
    words = ("predict", exported.artifact, exported.image, "--truth", exported.mask, "-o", tmp_path / "out", "--max-pixels")
    text = call(*words, 48 * 48 - 1).mistake()
    assert (
        text
        == f"{exported.image} has 48×48 pixels, more than the limit of 2,303: cut it into smaller pictures, or allow more by --max-pixels"
    )
    assert call(*words, 48 * 48, "--json").document()["results"]


def test_predict_npy_file(call: Call, exported: Any, tmp_path: Path) -> None:
    image = read_image(exported.image)
    np.save(tmp_path / "plain.npy", image)
    np.save(tmp_path / "fortran.npy", np.asfortranarray(image))
    images = (exported.image, tmp_path / "plain.npy", tmp_path / "fortran.npy")
    for tile in (16, 512):
        words = ("predict", exported.artifact, *images, "-o", tmp_path / "out", "--tile", tile, "--json")
        masks = [read_mask(result["mask"]) for result in call(*words).document()["results"]]
        assert all(np.array_equal(mask, masks[0]) for mask in masks)


def test_predict_checks_the_output_first(call: Call, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.runtime.bulk.pictures.predict", lambda *arguments, **options: pytest.fail("it was computed"))
    (tmp_path / "file.png").write_text("in the way")
    words = ("predict", exported.artifact, exported.image, "-o")
    text = call(*words, tmp_path / "file.png").mistake()
    assert text == f"--output {tmp_path / 'file.png'}: {tmp_path / 'file.png'} is a file: name a folder"
    assert f"{tmp_path / 'file.png'} is a file" in call(*words, tmp_path / "file.png" / "deep" / "er").mistake()
    monkeypatch.setattr("os.access", lambda path, mode, **options: not mode & os.W_OK)  # root may write everywhere
    assert f"nothing may be written in {tmp_path}: change its permissions" in call(*words, tmp_path / "new").mistake()
    assert not (tmp_path / "new").exists()


def test_predict_to_a_full_disk(call: Call, exported: Any, tmp_path: Path, full_disk: FullDisk) -> None:
    with full_disk(60):
        text = call("predict", exported.artifact, exported.image, "-o", tmp_path / "out").mistake()
    assert "File too large; make room" in text
    assert list((tmp_path / "out").iterdir()) == []


def test_session_options_reach_the_engine(call: Call, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, str, int | None]] = []
    engine = ENGINES["onnxruntime"]

    def record(artifact: Any, options: SessionOptions) -> Any:
        opened.append((options.engine, options.precision, options.threads))
        return engine(artifact, options)

    monkeypatch.setitem(ENGINES, "onnxruntime", record)
    words = ("--engine", "onnxruntime", "--precision", "f32", "--threads", "1")
    assert call("verify", exported.artifact, *words).code == 0
    assert call("predict", exported.artifact, exported.image, "-o", tmp_path / "out", *words).code == 0
    assert opened == [("onnxruntime", "f32", 1)] * 2


def test_predict_overlap(call: Call, exported: Any, tmp_path: Path) -> None:
    picture = np.random.default_rng(5).integers(0, 256, (90, 111, 3), dtype=np.uint8)
    write_image(tmp_path / "noise.png", picture)
    words = ("predict", exported.artifact, tmp_path / "noise.png", "--tile", "20", "--overlap", "15", "-o", tmp_path / "out", "--json")
    (result,) = call(*words).document()["results"]
    session = load(exported.artifact)
    expected, usual = (predict(session, picture, tile=20, overlap=overlap) for overlap in (15, None))
    assert (expected != usual).any(), "another overlap gives the same: this test plants nothing"
    assert np.array_equal(read_mask(result["mask"]), expected)


@pytest.fixture
def scene(tmp_path: Path) -> Callable[..., Path]:
    """`scene(dtype, scaled_by)`: a GeoTIFF of 120 x 150 pixels with a corner without data, and its pixels from 1 to 255 times a factor."""
    rasterio = pytest.importorskip("rasterio")

    def write(dtype: str = "uint8", factor: int = 1) -> Path:
        image = np.random.default_rng(3).integers(1, 256, (120, 150, 3)).astype(dtype) * np.array(factor, dtype)
        image[:40, :50] = 0
        place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 500_000, 0, -10, 5_000_000), "nodata": 0}
        size = {"height": 120, "width": 150, "count": 3, "dtype": dtype}
        with rasterio.open(tmp_path / "scene.tif", "w", driver="GTiff", **size, **place) as dataset:
            dataset.write(image.transpose(2, 0, 1))
        return tmp_path / "scene.tif"

    return write


def test_predict_geotiff(call: Call, exported: Any, tmp_path: Path, scene: Callable[..., Path]) -> None:
    import rasterio

    path = scene()
    image = read_image(path)
    truth = np.zeros((120, 150), np.uint8)
    write_image(tmp_path / "truth.png", truth)
    words = ("predict", exported.artifact, path, "-o", tmp_path / "out", "--tile", "40", "--truth", tmp_path / "truth.png", "--json")
    (result,) = call(*words).document()["results"]
    names = ["scene.difference.png", "scene.mask.tif", "scene.overlay.jpg"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    session = load(exported.artifact)
    expected = predict(session, image, tile=40)
    expected[:40, :50] = 255
    with rasterio.open(result["mask"]) as mask, rasterio.open(path) as dataset:
        assert (mask.crs, mask.transform, mask.nodata, mask.dtypes) == (dataset.crs, dataset.transform, 255, ("uint8",))
        np.testing.assert_array_equal(mask.read(1), expected)
        assert mask.colormap(1)[1][:3] == session.signature.classes[1].color
    assert result["agreement"] == np.mean(expected == 0)
    assert result["shares"]["sea"] == pytest.approx(np.mean(expected[expected != 255] == 0))
    shown = read_image(result["overlay"])
    assert shown[:32, :48].max() < 8  # not painted; JPEG has blocks of 16


def test_predict_geotiff_of_16_bits(call: Call, tmp_path: Path, write_small: Write, scene: Callable[..., Path]) -> None:
    import rasterio

    path, artifact = scene("uint16", 40), write_small(tmp_path / "restore", task="restore", names=("r", "g", "b"))
    words = ("predict", artifact, path, "-o", tmp_path / "out")
    text = call(*words).mistake()
    assert "scene.tif holds uint16, and models take 8 bits a channel: give the values that become 0 and 255 (`--range LOW HIGH`" in text
    (result,) = call(*words, "--range", "0", "10200", "--json").document()["results"]
    assert Path(result["image"]) == tmp_path / "out" / "scene.restored.tif"
    with rasterio.open(result["image"]) as restored, rasterio.open(path) as dataset:
        assert restored.dtypes == ("uint16",) * 3 and restored.nodata == 0 and restored.transform == dataset.transform
        pixels, before = restored.read(), dataset.read()
        np.testing.assert_array_equal((pixels == 0).all(0), (before == 0).all(0))
        scores = load(artifact)((before // 40).astype(np.uint8).transpose(1, 2, 0)[None])[0]  # 0 to 1: of a model that does not restore
        expected = np.maximum(np.rint(scores * 40), 1)[:, before[0] > 0]
        assert np.abs(pixels[:, before[0] > 0] - expected).max() <= 1
    assert "a range from 5.0 to 5.0" in call(*words, "--range", "5", "5").mistake()


def test_predict_large_geotiff_without_overlay(
    call: Call, exported: Any, tmp_path: Path, scene: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muntin.tasks.segment.answer.WINDOWED_PIXELS", 1000)
    words = ("predict", exported.artifact, scene(), "-o", tmp_path / "out", "--max-pixels", "1000", "--json")
    (result,) = call(*words).document()["results"]
    assert "overlay" not in result and "150×120 pixels are too many for an overlay" in result["notes"][0]


def test_predict_geotiff_to_a_full_disk(call: Call, exported: Any, tmp_path: Path, scene: Callable[..., Path], full_disk: FullDisk) -> None:
    path = scene()
    with full_disk(600):
        text = call("predict", exported.artifact, path, "-o", tmp_path / "out").mistake()
    assert "scene.mask.tif: " in text and "make room" in text
    assert list((tmp_path / "out").iterdir()) == []
