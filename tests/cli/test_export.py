from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from muntin.artifact import open_artifact
from muntin.artifact.classes import RENAMED
from muntin.deployment import checkpoint_export
from muntin.errors import DataError
from muntin.images import read_image, read_mask, write_image
from muntin.runtime import load, predict
from muntin.training import read_checkpoint
from products import copy_of
from tensor_models import text_inputs, two_heads

Call = Callable[..., Any]
FullDisk = Callable[[int], AbstractContextManager[None]]
Tree = Callable[[Path], dict[str, bytes]]


@pytest.fixture
def copied(exported: Any, tmp_path: Path) -> Path:
    return copy_of(exported.artifact, tmp_path)


def test_export_reuses_an_artefact_of_the_same_weights(call: Call, exported: Any, tree: Tree) -> None:
    before = tree(exported.run)
    document = call("export", exported.run, "--json").document()
    assert tree(exported.run) == before
    assert (document["written"], document["replaced"]) == (False, None)
    artifact = open_artifact(exported.artifact)
    assert Path(document["artifact"]) == exported.artifact
    assert document["bytes"] == artifact.bytes == sum(file.stat().st_size for file in exported.artifact.iterdir())
    assert document["int8_layers"] + len(document["kept"]) == 3
    assert document["int8_layers"] >= 2
    assert document["precision"] in ("f32", "bf16", "f16")
    text = call("export", exported.run)
    assert (text.code, text.err) == (0, "")
    assert text.out.startswith(f"exists already {exported.artifact}: ")
    assert f"{document['int8_layers']} of 3 layers in INT8" in text.out


def test_export_again_after_a_new_revision(call: Call, exported: Any, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = read_checkpoint(exported.run)
    assert checkpoint_export.exported(trained, copied) == open_artifact(copied)
    assert checkpoint_export.exported(trained, copied, integer=False) is None
    monkeypatch.setattr(checkpoint_export, "REVISION", checkpoint_export.REVISION + 1)
    assert checkpoint_export.exported(trained, copied) is None
    assert (checkpoint_export.other_artifact(trained, copied) or "").startswith("plain INT8 of these weights, exported ")

    def opened(checkpoint: Any) -> None:
        raise DataError("the data were opened")  # the export itself takes a second

    monkeypatch.setattr(checkpoint_export, "source_of", opened)
    assert call("export", exported.run, "-o", copied).mistake() == "the data were opened"


FILES = ("model.onnx", "weights.safetensors", "golden.safetensors")


def test_relabel_of_a_run(call: Call, exported: Any, run: Path, tmp_path: Path, tree: Tree) -> None:
    """The artefact follows, the data are still read, and no weight changes."""
    artifact, names = run / "artifact", tmp_path / "names.yaml"
    names.write_text("- {name: See, color: [1, 2, 3]}\n- Feld\n- Dach\n")
    before = tree(run)
    text = call("relabel", run, "--classes", names)
    assert "class     0: sea -> See, color [1, 2, 3]\n" in text.out and f"`muntin export {run}`" in text.out
    assert {name: data for name, data in tree(run).items() if name != RENAMED} == before
    assert call("export", run, "--json").document()["written"]
    classes = open_artifact(artifact).manifest.signature.classes
    assert [entry.name for entry in classes] == ["See", "Feld", "Dach"]
    assert [entry.color for entry in classes] == [(1, 2, 3), (0, 160, 0), (200, 60, 0)]
    assert all((artifact / file).read_bytes() == before[f"artifact/{file}"] for file in FILES)
    assert not call("export", run, "--json").document()["written"]
    scores = [call("evaluate", run, "--json", *words).document()["score"] for words in ([], ["--artifact", exported.artifact])]
    assert call("evaluate", artifact, "--json").document()["score"] == scores[1]  # by the old and by the new names
    names.write_text("A\nB\nC\n")
    assert call("export", run, "--classes", names.rename(tmp_path / "names.txt")).code == 0
    assert [entry.name for entry in open_artifact(artifact).manifest.signature.classes] == ["A", "B", "C"]


def test_relabel_of_an_artefact(call: Call, copied: Path, tmp_path: Path) -> None:
    before, names = {file: (copied / file).read_bytes() for file in FILES}, tmp_path / "names.json"
    digest = open_artifact(copied).digest
    names.write_text('{"See": null, "Feld": [4, 5, 6], "Dach": null}')
    document = call("relabel", copied, "--classes", names, "--json").document()
    artifact = open_artifact(copied)
    assert [entry.model_dump(mode="json") for entry in artifact.manifest.signature.classes] == document["classes"]
    assert document["classes"][1] == {"name": "Feld", "color": [4, 5, 6]}
    assert {file: (copied / file).read_bytes() for file in FILES} == before and artifact.digest != digest
    names.write_text('["a", "b"]')
    assert "2 classes are named, and the model has 3" in call("relabel", copied, "--classes", names).mistake()
    assert open_artifact(copied).digest == artifact.digest
    assert "`muntin relabel" in call("export", copied, "--classes", names).mistake()


def test_relabel_on_a_full_disk(call: Call, copied: Path, tmp_path: Path, tree: Tree, full_disk: FullDisk) -> None:
    before, names = tree(copied), tmp_path / "names.txt"
    names.write_text("a\nb\nc\n")
    with full_disk(2000):
        assert "make room" in call("relabel", copied, "--classes", names).mistake()
    assert tree(copied) == before


def test_export_in_float(call: Call, exported: Any, tmp_path: Path) -> None:
    document = call("export", exported.run, "--float", "--sizes", "fixed", "-o", tmp_path / "float", "--json").document()
    assert (document["written"], document["int8_layers"]) == (True, 0)
    image = read_image(exported.image)
    integer, floating = (predict(load(path, precision="f32"), image) for path in (exported.artifact, tmp_path / "float"))
    assert (integer == floating).mean() > 0.9
    weights = [(path / "weights.safetensors").stat().st_size for path in (exported.artifact, tmp_path / "float")]
    assert weights[0] < weights[1]


def test_export_sizes(call: Call, exported: Any, tmp_path: Path) -> None:
    words, target = ("export", exported.run, "-o"), tmp_path / "a"
    document = call(*words, target, "--sizes", "multiple=8,min=16", "--json").document()
    sides = {"min": 16, "max": None, "multiple": 8}
    assert (document["written"], document["sizes"]) == (True, {"height": sides, "width": sides})
    text = call(*words, target).out
    assert text.startswith("exists already") and "sizes     height and width multiples of 8 from 16\n" in text
    trained = read_checkpoint(exported.run)
    assert checkpoint_export.exported(trained, target, sizes="multiple=8,min=16") is not None
    assert checkpoint_export.exported(trained, target, sizes="widest") is None
    assert "give any, fixed, widest, or multiple=32,min=64,max=1024" in call(*words, target, "--sizes", "224").mistake()
    write_image(tmp_path / "small.png", np.zeros((13, 21, 3), np.uint8))
    predict_words = ("predict", target, tmp_path / "small.png", "-o", tmp_path / "out")
    result = call(*predict_words, "--json").document()["results"][0]
    assert read_mask(result["mask"]).shape == (13, 21)
    assert "13 x 21 pixels are extended to 16 x 24 by repeating the last row and column" in result["notes"][0]
    assert "tile=20: the model takes height and width multiples of 8 from 16: give 16, or" in call(*predict_words, "--tile", "20").mistake()
    words = ("evaluate", exported.run, "--artifact", target)
    assert call(*words, "--json").document()["score"] == pytest.approx(call("evaluate", exported.artifact, "--json").document()["score"])
    assert "tile=20: the model takes" in call(*words, "--tile", "20").mistake()


@pytest.mark.usefixtures("fixed_sizes")
def test_export_keeps_named_layers_in_floats(call: Call, exported: Any, tmp_path: Path) -> None:
    name = next(layer.name for layer in open_artifact(exported.artifact).manifest.layers if layer.activation_bits == 8)
    document = call("export", exported.run, "--set", f"quantization.keep=['{name}']", "-o", tmp_path / "kept", "--json").document()
    assert document["kept"][name] == "named in keep"
    assert "only quantization.KEY=VALUE" in call("export", exported.run, "--set", "training.steps=3").mistake()
    assert "give one of them" in call("export", exported.run, "--float", "--set", "quantization.min_sqnr_db=3").mistake()


def test_standalone(call: Call, exported: Any, tmp_path: Path, tree: Tree) -> None:
    before = tree(exported.run)
    first, second = tmp_path / "a.onnx", tmp_path / "b.onnx"
    assert call("export", exported.run, "--standalone", first, "--json").document()["standalone"] == str(first)
    answer = call("export", exported.artifact, "--standalone", second)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out == f"wrote     {second}: {second.stat().st_size / 1e6:.2f} MB, plain ONNX\n"
    assert first.read_bytes() == second.read_bytes()
    assert tree(exported.run) == before
    image = read_image(exported.image)
    (scores,) = onnxruntime.InferenceSession(first).run(None, {"images": image[None]})
    np.testing.assert_array_equal(scores.argmax(1)[0], predict(load(exported.artifact, engine="onnxruntime"), image))
    assert "is an artefact already: give it --standalone" in call("export", exported.artifact).mistake()
    assert "is an artefact already" in call("export", exported.artifact, "--standalone", first, "--float").mistake()


def test_export_help_shows_a_list(call: Call) -> None:
    assert "quantization.keep=[head.conv]" in " ".join(call("export", "--help").out.split())


def test_export_checks_the_target_before_the_data(call: Call, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muntin.deployment.checkpoint_export.source_of", lambda checkpoint: pytest.fail("the data were opened"))
    (tmp_path / "file").touch()
    assert "file is a file" in call("export", exported.run, "-o", tmp_path / "file" / "artifact").mistake()


@pytest.mark.usefixtures("fixed_sizes")
def test_export_to_a_full_disk(call: Call, exported: Any, tmp_path: Path, full_disk: FullDisk, tree: Tree) -> None:
    before = tree(exported.run)
    with full_disk(5_000):
        text = call("export", exported.run, "-o", tmp_path / "artifact").mistake()
    assert "cannot be written (File too large): make room" in text
    assert list(tmp_path.iterdir()) == []
    assert tree(exported.run) == before


SMALL = """
from torch import nn

class Small(nn.Sequential):
    def forward(self, x):
        return super().forward(x / 128 - 1)

def make():
    return Small(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
"""


def test_export_of_a_model(call: Call, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small_of_cli.py").write_text(SMALL)
    (tmp_path / "names.txt").write_text("a\nb\nc\n")
    monkeypatch.chdir(tmp_path)
    words = ("export", "small_of_cli:make", "--size", 24, "--classes", "names.txt", "-o", "artifact", "--sizes", "fixed")
    assert "--calibration FOLDER" in call(*words).mistake()
    document = call(*words, "--calibration", exported.image.parent, "--standalone", "small.onnx", "--json").document()
    assert (document["artifact"], document["int8_layers"], document["replaced"]) == ("artifact", 2, None)
    assert document["notes"][0].startswith("the weights are those with which the function")
    assert Path("small.onnx").is_file()
    session = load("artifact")
    assert [entry.name for entry in session.signature.classes] == ["a", "b", "c"]
    again = call(*words, "--float")
    assert (again.code, again.err) == (0, "")
    assert "\nreplaced  what was there, small_of_cli:make, exported " in again.out
    assert "\nnote      the weights are those" in again.out
    assert "--size, --mean: for a model" in call("export", exported.run, "--size", 24, "--mean", "0.5").mistake()


@pytest.fixture
def text_model(tmp_path: Path) -> tuple[Path, Path]:
    """An ONNX file with two inputs and two outputs, and its calibration inputs."""
    onnx.save(two_heads(), tmp_path / "text.onnx")
    np.savez(tmp_path / "inputs.npz", allow_pickle=False, **text_inputs(20, 9))
    return tmp_path / "text.onnx", tmp_path / "inputs.npz"


def test_onnx_file_of_any_model(call: Call, text_model: tuple[Path, Path], tmp_path: Path) -> None:
    file, inputs = text_model
    text = call("export", file, "--calibration", inputs, "--batch", 5, "--standalone", tmp_path / "plain.onnx")
    folder = tmp_path / "text-artifact"
    assert (text.code, text.err) == (0, "")
    assert text.out.startswith(f"wrote     {folder}: 0.0")
    assert "2 of 2 layers in INT8" in text.out
    for line in ("input     ids: int64 (batch, tokens)\n", "output    label: int64 (batch)\n", "integers  embedding: 0.0"):
        assert line in text.out
    assert onnx.load(tmp_path / "plain.onnx").graph.output[1].name == "label"
    document = call("verify", folder, "--json").document()
    assert document["passed"]
    assert [output["name"] for output in document["golden"]] == ["embedding", "label"] * 2
    assert sorted(document["integer_layers"]) == ["embedding", "hidden"]
    assert "golden    label (3,): 100.00% of its values are equal" in call("verify", folder).out
    floats = call("export", file, "--calibration", inputs, "--float", "-o", tmp_path / "floats", "--json").document()
    assert (floats["int8_layers"], floats["rounding"], floats["kept"]) == (0, {}, {})
    assert floats["signature"]["batch"] == "batch"
    kept = call("export", file, "--calibration", inputs, "--keep", "hidden", "--json").document()
    assert (kept["int8_layers"], kept["kept"]) == (1, {"hidden": "named in keep"})


def test_options_of_an_onnx_file(call: Call, text_model: tuple[Path, Path], exported: Any) -> None:
    file, inputs = text_model
    assert "without inputs: give --calibration inputs.npz" in call("export", file).mistake()
    assert "--sizes and --mean are for other models" in call("export", file, "--sizes", "any", "--mean", "0.5").mistake()
    assert "it takes --keep or --float" in call("export", file, "--calibration", inputs, "--float", "--keep", "hidden").mistake()
    for words in (("--keep", "a"), ("--batch", "4")):
        assert "--keep and --batch are for ONNX files" in call("export", exported.run, *words).mistake()
    assert "--calibration: for a model" in call("export", exported.run, "--calibration", inputs).mistake()


def test_training_of_a_graph_is_refused(call: Call, text_model: tuple[Path, Path], exported: Any) -> None:
    for command in ("fit", "compress"):
        for path in (text_model[0], exported.artifact):
            assert "training needs gradients, which its graph does not have" in call(command, path).mistake()
