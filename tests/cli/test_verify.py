from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muntin.artifact import FORMAT, open_artifact

Call = Callable[..., Any]
Write = Callable[..., Path]
FILES = ("manifest.json", "model.onnx", "weights.safetensors", "golden.safetensors")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def copied(exported: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.artifact, tmp_path / "artifact"))


def test_verify_output(call: Call, exported: Any) -> None:
    document = call("verify", exported.artifact, "--json").document()
    assert document["passed"]
    assert (document["engine"], document["problems"]) == ("openvino", [])
    assert set(document["files"]) == set(FILES)
    assert len(document["golden"]) == 2
    assert all(pair["passed"] for pair in document["golden"])
    recorded = [layer.name for layer in open_artifact(exported.artifact).manifest.layers if layer.activation_bits == 8]
    ran = [name.split("/")[0] for name in document["integer_layers"]]
    assert recorded
    assert set(recorded) <= set(ran)
    text = call("verify", exported.artifact)
    assert (text.code, text.err) == (0, "")
    assert "files     4 digests agree" in text.out
    assert f"integers  {len(document['integer_layers'])} layers" in text.out


def test_verify_options(call: Call, exported: Any) -> None:
    document = call("verify", exported.artifact, "--engine", "onnxruntime", "--threads", "1", "--json").document()
    assert document["layers"] == []
    (note,) = document["notes"]
    assert note == "the layers were not checked one by one, which is done in openvino only: leave out --engine for it"
    assert f"note      {note}\n" in call("verify", exported.artifact, "--engine", "onnxruntime").out
    assert call("verify", exported.artifact, "--json").document()["notes"] == []
    assert document["engine"].startswith("onnxruntime")
    document = call("verify", exported.artifact, "--precision", "f32", "--json").document()
    assert document["precision"] == "f32"
    assert 'engine="tensorrt": give one of openvino, onnxruntime' in call("verify", exported.artifact, "--engine", "tensorrt").mistake()
    assert "give one of recorded, f32" in call("verify", exported.artifact, "--precision", "int8").mistake()


@pytest.mark.parametrize("name", FILES)
def test_verify_with_a_flipped_byte(call: Call, exported: Any, copied: Path, tmp_path: Path, name: str) -> None:
    flip(copied / name)
    commands = [
        ("verify", copied),
        ("predict", copied, exported.image, "-o", tmp_path / "out"),
        ("evaluate", exported.run, "--artifact", copied),
    ]
    for words in commands:
        text = call(*words).mistake()
        assert name in text
        assert "copy or export the artefact again" in text
    assert not (tmp_path / "out").exists()


def test_artefact_of_a_newer_format(call: Call, exported: Any, copied: Path, tmp_path: Path) -> None:
    manifest = copied / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": FORMAT + 1, "unheard": "of"}))
    commands = [
        ("verify", copied),
        ("predict", copied, exported.image, "-o", tmp_path / "out"),
        ("evaluate", exported.run, "--artifact", copied),
    ]
    for words in commands:
        assert f"artefact format {FORMAT + 1} is newer than this muntin reads ({FORMAT}): upgrade muntin" in call(*words).mistake()


@pytest.mark.parametrize("name", FILES)
def test_artefact_with_a_missing_file(call: Call, copied: Path, name: str) -> None:
    (copied / name).unlink()
    assert name in call("verify", copied).mistake()


@pytest.mark.parametrize(("changes", "finite"), [({"golden": 1.0}, True), ({"nan": True}, False)])
def test_verify_with_a_wrong_golden_answer(call: Call, tmp_path: Path, write_small: Write, changes: dict[str, Any], finite: bool) -> None:
    path = write_small(tmp_path / "wrong", **changes)
    answer = call("verify", path, "--json")
    assert "golden pair 0" in answer.mistake()
    document = json.loads(answer.out)
    assert not document["passed"]
    assert (document["golden"][0]["max_error"] is not None) == finite
    assert "golden pair 0" in call("verify", path).mistake()
