"""`muntin profile`: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muntin.artifact import open_artifact
from muntin.cli.profile import parse_size
from muntin.errors import DataError
from tensor_models import write_tensors

Call = Callable[..., Any]
Write = Callable[..., Path]
QUICK = ("--size", "24x40", "--rounds", "2", "--threads", "1", "--precision", "f32")


def test_profile_output_and_page(call: Call, exported: Any, tmp_path: Path) -> None:
    """An exported model: multiply-adds as executed are those recorded at the example's size, scaled by the area."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "mine.txt").touch()
    answer = call("profile", exported.artifact, *QUICK, "--batch", "2", "-o", folder)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith("whole     ")
    assert "ms for 2 x 24 x 40 in openvino, INT8, float layers in f32, 1 thread (median of 2 calls)" in answer.out
    assert "--size measures another" not in answer.out
    assert "by kind" in answer.out
    assert "kernels" in answer.out
    assert "win " in answer.out
    assert f"wrote     {folder / 'profile.html'}" in answer.out
    assert {file.name for file in folder.iterdir()} == {"mine.txt", "profile.html", "profile.json", "roofline.svg"}
    document = json.loads((folder / "profile.json").read_text())
    assert document["shape"] == [2, 24, 40]
    recorded = {layer.name: layer.macs for layer in open_artifact(exported.artifact).manifest.layers}
    executed: dict[str, int] = {}
    for kernel in document["kernels"]:
        if kernel["layer"] is not None:
            executed[kernel["layer"]] = executed.get(kernel["layer"], 0) + kernel["macs"]
    assert executed.keys() == recorded.keys()
    ratios = {executed[name] / macs for name, macs in recorded.items() if macs}
    assert len(ratios) == 1  # all layers of this model keep the image's size


def test_profile_of_the_current_folder(
    call: Call, tmp_path: Path, write_small: Write, monkeypatch: pytest.MonkeyPatch, tree: Callable[[Path], dict[str, bytes]]
) -> None:
    path = write_small(tmp_path / "artefact")
    before = tree(path)
    monkeypatch.chdir(path)
    document = call("profile", ".", "--size", "16", "--rounds", "1", "--threads", "1", "--json").document()
    output = tmp_path / "artefact-profile"
    assert document["files"] == sorted(str(file) for file in output.iterdir())
    assert tree(path) == before
    text = call("profile", path, "--rounds", "1", "-o", path / "profile").mistake()
    assert "that is in the artefact, which holds its own files only" in text
    assert tree(path) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--size", "0"), "--size 0: give rows x columns in pixels"),
        (("--size", "24x"), "--size 24x: give rows x columns"),
        (("--size", "-3"), "--size -3: give rows x columns"),
        (("--precision", "int8"), 'precision="int8": give one of recorded'),
        (("--size", "999999"), "their scores alone take 2.3e+04 GB"),
    ],
)
def test_profile_mistakes(call: Call, tmp_path: Path, write_small: Write, words: tuple[str, ...], said: str) -> None:
    path = write_small(tmp_path / "artefact")
    assert said in call("profile", path, *words).mistake()
    assert not (tmp_path / "artefact-profile").exists()


def test_profile_of_a_folder_without_artefact(call: Call, tmp_path: Path) -> None:
    assert "no such artefact directory" in call("profile", tmp_path / "none").mistake()


def test_sizes() -> None:
    assert parse_size("512") == (512, 512)
    assert parse_size("24x40") == (24, 40)
    for size in ("", "x", "1x2x3", "1.5", "0x5", "12345678"):
        with pytest.raises(DataError, match="one number for a square"):
            parse_size(size)


def test_profile_of_a_run(call: Call, exported: Any, run: Path, tmp_path: Path) -> None:
    words = ("profile", exported.run, "--size", "24", "--rounds", "2", "-o", tmp_path / "out")
    answer = call(*words)
    assert (answer.code, answer.err) == (0, "")
    assert "ms for 1 x 24 x 24 in pytorch eager, f32" in answer.out
    assert "the longest" in answer.out and "Conv2d" in answer.out
    assert call("profile", exported.run, "--rounds", "1", "-o", tmp_path / "out").out.splitlines()[1] == (
        "size      the size of the export; --size measures another"
    )
    document = call(*words, "--json").document()
    kinds = [layer["kind"] for layer in document["layers"]]
    assert kinds.count("Conv2d") == 3
    events = json.loads((tmp_path / "out" / "trace.json").read_text())["traceEvents"]
    assert {f"muntin:{layer['name']}" for layer in document["layers"]} <= {event.get("name") for event in events}
    assert "--precision" in call(*words, "--precision", "f32").mistake()
    inside = call("profile", run, "--size", "24", "--rounds", "1", "-o", run / "profile")
    assert (inside.code, (run / "profile" / "trace.json").is_file()) == (0, True)
    assert "holds its own files only" in call("profile", run / "artifact", "-o", run / "artifact" / "profile").mistake()


def test_profile_of_named_tensors(call: Call, exported: Any, tmp_path: Path) -> None:
    artifact = write_tensors(tmp_path / "text")
    words = ("--rounds", "1", "--threads", "1")
    answer = call("profile", artifact.path, "--batch", "2", "--dims", "tokens=12", *words)
    assert (answer.code, answer.err) == (0, "")
    assert "ms for batch 2, tokens 12 in openvino" in answer.out
    for path, options, problem in (
        (artifact.path, ("--size", "8"), "takes named tensors: give --dims (batch, tokens)"),
        (exported.artifact, ("--dims", "tokens=8"), "takes images: give --size"),
        (exported.run, ("--dims", "tokens=8"), "is a run, whose model takes images"),
    ):
        assert problem in call("profile", path, *options, "--rounds", "1").mistake()
