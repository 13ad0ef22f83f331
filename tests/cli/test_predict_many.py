"""`muntin predict` of many files: resumed, killed, short of memory, in several streams, on Ray; and of videos."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muntin.images import read_image, read_mask, write_image
from muntin.runtime import load, predict
from muntin.runtime.bulk import items
from muntin.runtime.bulk.journal import JOURNAL

Call = Callable[..., Any]
Write = Callable[..., Path]
Tree = Callable[[Path], dict[str, bytes]]


def write_photos(folder: Path, count: int, *, height: int = 30, width: int = 40) -> None:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        write_image(folder / f"{number:02}.png", pixels)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures that are computed from now on."""
    names: list[str] = []
    compute = items.predict_picture

    def noting(session: Any, source: Path, *arguments: Any, **options: Any) -> Any:
        names.append(source.name)
        return compute(session, source, *arguments, **options)

    monkeypatch.setattr(items, "predict_picture", noting)
    return names


@pytest.mark.parametrize("streams", [1, 3])
def test_results_in_order(call: Call, tmp_path: Path, write_small: Write, streams: int) -> None:
    artifact = write_small(tmp_path / "artifact")
    write_photos(tmp_path / "photos", 23)
    words = ("predict", artifact, tmp_path / "photos", "-o", tmp_path / "out", "--streams", streams, "--threads", 3, "--precision", "f32")
    results = call(*words, "--json").document()["results"]
    assert [Path(result["source"]).name for result in results] == [f"{number:02}.png" for number in range(23)]
    session = load(artifact, precision="f32")
    for result in results:
        assert np.array_equal(read_mask(result["mask"]), predict(session, read_image(result["source"])))


def test_resume_computes_what_is_missing(call: Call, tmp_path: Path, write_small: Write, tree: Tree, computed: list[str]) -> None:
    artifact, photos, out = write_small(tmp_path / "artifact"), tmp_path / "photos", tmp_path / "out"
    write_photos(photos, 5)
    whole = (photos / "03.png").read_bytes()
    (photos / "03.png").write_bytes(whole[:60])
    words = ("predict", artifact, photos, "-o", out, "--json")
    answer = call(*words, "--resume")  # with nothing to resume
    assert answer.code == 1 and sorted(computed) == ["00.png", "01.png", "02.png", "03.png", "04.png"]
    before, first = tree(out), json.loads(answer.out)["results"]
    (photos / "03.png").write_bytes(whole)
    write_image(photos / "01.png", np.zeros((8, 9, 3), np.uint8))
    (out / "04.overlay.jpg").unlink()
    computed.clear()
    results = call(*words, "--resume").document()["results"]
    assert sorted(computed) == ["01.png", "03.png", "04.png"]
    assert [Path(result["source"]).name for result in results] == [f"{number:02}.png" for number in range(5)]
    assert [result.pop("kept", False) for result in results] == [True, False, True, False, False]
    assert results[0] == first[0] and results[2] == first[2] and results[4] == first[3]
    after = tree(out)
    assert {name for name in before if before[name] != after[name]} == {"01.mask.png", "01.overlay.jpg", JOURNAL}
    computed.clear()
    assert "(kept)" in call("predict", artifact, photos, "-o", out, "--resume").out and not computed
    for options in (["--tile", "16"], []):  # others, and then without --resume
        computed.clear()
        assert call(*words, *options, *(["--resume"] if options else [])).code == 0 and len(computed) == 5
    other = write_small(tmp_path / "other", names=("a", "b", "c"))
    computed.clear()
    assert call("predict", other, photos, "-o", out, "--resume").code == 0 and len(computed) == 5


def test_resume_after_a_kill(call: Call, tmp_path: Path, write_small: Write, tree: Tree, computed: list[str]) -> None:
    artifact, out = write_small(tmp_path / "artifact"), tmp_path / "out"
    write_photos(tmp_path / "photos", 12)
    words = ["predict", artifact, tmp_path / "photos", "-o", out, "--precision", "f32"]
    slow = (
        "import time\nfrom muntin.runtime.bulk import items\ncompute = items.predict_picture\n"
        "items.predict_picture = lambda *given, **named: (time.sleep(0.1), compute(*given, **named))[1]\n"
        "from muntin.cli import main\nmain()"
    )
    with subprocess.Popen([sys.executable, "-c", slow, *map(str, words)]) as process:
        deadline = time.monotonic() + 60
        while not (out / JOURNAL).exists() or (out / JOURNAL).read_bytes().count(b"\n") < 2:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    recorded = (out / JOURNAL).read_bytes().count(b"\n")
    assert call(*words, "--resume").code == 0
    assert 12 - recorded <= len(computed) < 12
    assert call(*words[:4], tmp_path / "again", *words[5:]).code == 0
    resumed, again = ({name: data for name, data in tree(folder).items() if name[0] != "."} for folder in (out, tmp_path / "again"))
    assert resumed == again and len(again) == 24


def test_refused_places_and_resumes(call: Call, tmp_path: Path, write_small: Write) -> None:
    artifact = write_small(tmp_path / "classify", task="classify")
    write_photos(tmp_path / "photos", 2)
    words = ("predict", artifact, tmp_path / "photos")
    assert "leave out --resume, --no-overlay" in call(*words, "--resume", "--no-overlay").mistake()
    assert "--on slurm: give ray, or ray:ADDRESS" in call(*words, "--on", "slurm").mistake()
    one = (*words[:2], tmp_path / "photos" / "00.png", "--truth", "mask.png", "--resume")
    assert "--resume goes with several images" in call(*one).mistake()


def test_smaller_tiles_where_memory_is_short(call: Call, tmp_path: Path, write_small: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = write_small(tmp_path / "artifact")
    write_photos(tmp_path / "photos", 1, height=100, width=130)
    compute, (photo,) = items.predict_picture, (tmp_path / "photos").iterdir()

    def limited(*given: Any, **options: Any) -> Any:
        if given[5]["tile"] > 64:
            raise MemoryError
        return compute(*given, **options)

    monkeypatch.setattr(items, "predict_picture", limited)
    words = ("predict", artifact, tmp_path / "photos", "-o", tmp_path / "out", "--tile", 128, "--precision", "f32")
    (result,) = call(*words, "--json").document()["results"]
    (note,) = result["notes"]
    assert f"{photo}: not enough memory for tiles of 128 pixels" in note and "computed in tiles of 64," in note
    assert np.array_equal(read_mask(result["mask"]), predict(load(artifact, precision="f32"), read_image(photo)))


LIMITED = """
import resource
from muntin.runtime.bulk import files
compute = files.ItemComputer.__call__
def limited(*given):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1750 << 20),) * 2)
    return compute(*given)
files.ItemComputer.__call__ = limited
"""


@pytest.mark.soak
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not count pages for us")
def test_smaller_tiles_where_memory_is_really_short(call_process: Call, tmp_path: Path, write_small: Write) -> None:
    """In one tile the scores of 28 classes alone take 1.8 GiB, in tiles of half the side less than a third of the bound: close to it
    OpenVINO crashes."""
    artifact, photo = write_small(tmp_path / "artifact", names=tuple(map(str, range(28)))), tmp_path / "x.png"
    small = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    write_image(photo, small.repeat(64, 0).repeat(64, 1))
    words = ("predict", artifact, photo, "-o", tmp_path / "out", "--tile", 4096, "--precision", "f32", "--threads", 1)
    answer = call_process(*words, "--json", before=LIMITED)
    assert answer.code == 0, answer.err  # lines of progress may be in it
    (result,) = json.loads(answer.out)["results"]
    (note,) = result["notes"]
    tile = int(note.split("computed in tiles of ")[1].split(",")[0])
    assert tile < 4096 and f"{photo}: not enough memory for tiles of 4096 pixels" in note
    scores = small.astype(int).cumsum(2) * (6, 3, 2)  # of the first classes; the others have less
    is_best = scores == scores.max(2, keepdims=True)
    differs = read_mask(result["mask"]) != is_best.argmax(2).repeat(64, 0).repeat(64, 1)
    assert not differs[(is_best.sum(2) == 1).repeat(64, 0).repeat(64, 1)].any()


def write_film(path: Path, frames: int = 7, *, height: int = 48, width: int = 64) -> None:
    from fractions import Fraction

    from muntin.images.video import written_video

    with written_video(path, rate=Fraction(10)) as writer:
        for number in range(frames):
            pixels = np.full((height, width, 3), 20, np.uint8)
            pixels[:, : width // 2] = (200, 5 * number, 10)
            writer.write(pixels, number, Fraction(1, 10))


def test_predict_video(call: Call, tmp_path: Path, write_small: Write) -> None:
    pytest.importorskip("av", reason="the extra `video` is not installed")
    from muntin.images.video import read_frames

    artifact = write_small(tmp_path / "artifact")
    write_photos(tmp_path / "photos", 2)
    write_film(tmp_path / "film.mp4")
    words = ("predict", artifact, tmp_path / "photos", tmp_path / "film.mp4", "-o", tmp_path / "out", "--precision", "f32")
    results = call(*words, "--json").document()["results"]
    film = results[-1]
    assert film["frames"] == 7 and sum(film["shares"].values()) == pytest.approx(1)
    assert sorted(path.name for path in (tmp_path / "out").glob("film*")) == ["film.mask.mkv", "film.overlay.mp4"]
    source, masks, shown = (list(read_frames(Path(path))) for path in (film["source"], film["mask"], film["overlay"]))
    session = load(artifact, precision="f32")
    assert len(source) == len(masks) == len(shown) == 7
    for frame, mask, overlay in zip(source, masks, shown, strict=True):
        assert np.array_equal(mask.pixels[:, :, 0], predict(session, frame.pixels))
        times = {float(one.pts * one.time_base) for one in (frame, overlay)}
        assert len(times) == 1 and float(mask.pts * mask.time_base) == pytest.approx(times.pop(), abs=0.001)  # Matroska has milliseconds
        assert overlay.pixels.shape == frame.pixels.shape
    again = call(*words, "--resume", "--json").document()["results"]
    assert [result.pop("kept") for result in again] == [True] * 3 and again == results
    masks = call(*words[:-4], "-o", tmp_path / "masks", "--no-overlay", "--json").document()["results"]
    assert sorted(path.name for path in (tmp_path / "masks").glob("[!.]*")) == ["00.mask.png", "01.mask.png", "film.mask.mkv"]
    assert [set(result) for result in masks] == [set(result) - {"overlay"} for result in results]
    restored = write_small(tmp_path / "restore", task="restore", names=("r", "g", "b"))
    (result,) = call("predict", restored, tmp_path / "film.mp4", "-o", tmp_path / "out", "--json").document()["results"]
    assert Path(result["image"]).name == "film.restored.mp4" and result["frames"] == 7
    classifier = write_small(tmp_path / "classify", task="classify")
    truth = call("predict", artifact, tmp_path / "film.mp4", "-o", tmp_path / "truth", "--truth", results[0]["mask"])
    assert "--truth is the mask of a picture, and this is a video" in truth.mistake()
    assert "a classifier has no answer for a video" in call("predict", classifier, tmp_path / "film.mp4").mistake()


def test_predict_damaged_video(call: Call, tmp_path: Path, write_small: Write) -> None:
    pytest.importorskip("av", reason="the extra `video` is not installed")
    from muntin.images.video import read_frames

    artifact, film = write_small(tmp_path / "artifact"), tmp_path / "film.mkv"
    write_film(film, 40)
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    answer = call("predict", artifact, film, "-o", tmp_path / "out", "--json", "--resume")
    assert "film.mkv" in answer.mistake()
    document = json.loads(answer.out)
    (result,), (failure,) = document["results"], document["failures"]
    assert failure["error"] == answer.mistake()
    assert 0 < result["frames"] < 40 and len(list(read_frames(Path(result["overlay"])))) == result["frames"]
    (tmp_path / "none.mp4").write_bytes(b"no video")
    assert "none.mp4 is damaged" in call("predict", artifact, tmp_path / "none.mp4", "-o", tmp_path / "none").mistake()
    assert not list((tmp_path / "none").rglob("*"))


def test_predict_on_ray(call: Call, tmp_path: Path, write_small: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    artifact = write_small(tmp_path / "artifact")
    write_photos(tmp_path / "photos", 6)
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    words = ("predict", artifact, tmp_path / "photos", "--threads", 1, "--precision", "f32", "-o")
    answer = call(*words, tmp_path / "ray", "--on", "ray", "--json")
    assert "bad.png is no image" in answer.mistake()
    here = call(*words, tmp_path / "here", "--json")
    assert [Path(result["mask"]).name for result in json.loads(answer.out)["results"]] == [f"{number:02}.mask.png" for number in range(6)]
    for file in (tmp_path / "here").glob("*.png"):
        assert (tmp_path / "ray" / file.name).read_bytes() == file.read_bytes()
    assert json.loads(here.out)["failures"] == json.loads(answer.out)["failures"]
