"""Export of models to artefacts: contents, files and refused inputs. Axes: B images, C channels, H W map."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import muntin
from muntin import create_model
from muntin.artifact import ClassInfo, Signature, open_artifact
from muntin.compression import Change, quantize
from muntin.deployment import infer_signature
from muntin.errors import ArtifactError, DataError, ExportError, MuntinError
from muntin.runtime.options import SessionOptions
from muntin.training.config import QuantizationConfig
from products import copy_of, product

HYBRID = {"depths": (1,), "dims": (128,)}  # one attention stage: half the time of an export


@pytest.fixture(scope="module")
def image() -> Path:
    """An artifact that all share."""
    return product("image") / "artifact"


def test_flipped_byte(image: Path, tmp_path: Path) -> None:
    path = copy_of(image, tmp_path)
    weights = path / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    for opened in (lambda: muntin.verify(path), lambda: muntin.load(path)):
        with pytest.raises(ArtifactError, match=r"weights\.safetensors: its content is not what"):
            opened()


def test_example_shape(tmp_path: Path) -> None:
    model, example = nn.Conv2d(3, 2, 3, padding=1), torch.randint(0, 256, (2, 3, 20, 24))
    assert muntin.export(model, example, tmp_path / "a").manifest.shape == (1, 20, 24)
    assert muntin.export(model, example, tmp_path / "b", shape=(4, 16, 8)).manifest.shape == (4, 16, 8)
    with pytest.raises(DataError, match=r"shape \(True, 3, 3\)"):
        muntin.export(model, example, tmp_path / "c", shape=(True, 3, 3))
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_classifying_hybrid(trained: Any, pixels: Any, pictures: Any, assert_standalone: Any, tmp_path: Path) -> None:
    example = pixels(2, 3, 64, 64)
    classifier = trained(create_model("hybrid-xs", task="classify", classes=7, options=HYBRID))
    artifact = muntin.export(classifier, example, tmp_path / "classify", calibration=[example])
    assert artifact.manifest.signature.task == "classify" and len(artifact.manifest.signature.classes) == 7
    assert muntin.load(artifact.path, threads=1)(pictures(3, 64, 64, 3)).shape == (3, 7)
    assert_standalone(artifact, tmp_path / "classify.onnx")


@pytest.mark.slow
def test_restoring_hybrid_in_integers(trained: Any, pixels: Any, pictures: Any, assert_standalone: Any, tmp_path: Path) -> None:
    example, signature = pixels(2, 3, 32, 48), Signature(task="restore", channels=3, scale=2)
    restorer = trained(create_model("hybrid-xs", task="restore", scale=2, options=HYBRID))
    with torch.no_grad():
        restorer.get_parameter("head.conv.weight").normal_(0, 0.01)  # training starts at zero
    artifact = muntin.export(restorer, example, tmp_path / "restore", calibration=[example], signature=signature, sizes="fixed")
    images = pictures(1, 32, 48, 3)
    scores = muntin.load(artifact.path, precision="f32", threads=1)(images)
    assert scores.shape == (1, 3, 64, 96)
    expected = muntin.TorchSession(restorer, artifact.manifest.signature)(images)
    assert np.abs(scores - expected).max() <= 0.1 * expected.std()
    assert muntin.verify(artifact.path, SessionOptions(threads=1)).passed
    assert_standalone(artifact, tmp_path / "restore.onnx")


def test_model_is_not_changed(pixels: Any, tmp_path: Path, tiny: Any) -> None:
    model, example = tiny().train(), pixels(1, 3, 32, 32)
    before, kept_example = copy.deepcopy(model.state_dict()), example.clone()
    muntin.export(model, example, tmp_path / "artifact", calibration=[example], sizes="fixed")
    assert model.training and isinstance(model[0], nn.Conv2d)  # type: ignore[index]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(example, kept_example)


def test_earlier_changes_in_the_manifest(pixels: Any, tmp_path: Path, tiny: Any) -> None:
    earlier = Change(layer="0", pass_="prune", done="kept", reason="all of it counts", sqnr_db=float("inf"))
    artifact = muntin.export(tiny(), pixels(1, 3, 32, 32), tmp_path / "artifact", changes=[earlier], measured={"miou": 0.5}, sizes="fixed")
    assert artifact.manifest.passes == ({"pass": "prune", "layer": "0", "done": "kept", "reason": "all of it counts", "sqnr_db": None},)
    assert artifact.manifest.measured["miou"] == 0.5
    assert open_artifact(tmp_path / "artifact").manifest == artifact.manifest


def test_single_layer(pixels: Any, pictures: Any, tmp_path: Path) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1)
    artifact = muntin.export(layer, pixels(1, 3, 32, 32), tmp_path / "artifact")
    images = pictures(1, 20, 31, 3)
    expected = muntin.TorchSession(layer, artifact.manifest.signature)(images)
    np.testing.assert_allclose(muntin.load(artifact.path, precision="f32")(images), expected, rtol=1e-4, atol=1e-3)


def test_unused_head(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    def run(m: Any, x: Tensor) -> Any:
        features = torch.relu(m.stem(x / 60 - 2))
        return {"out": m.head(features), "aux": m.auxiliary(features)}["out"]

    parts = {"stem": nn.Conv2d(3, 16, 3, padding=1), "auxiliary": nn.Conv2d(16, 4, 1), "head": nn.Conv2d(16, 4, 1)}
    example = pixels(1, 3, 32, 32)
    artifact = muntin.export(build(run, **parts), example, tmp_path / "artifact", calibration=[example], sizes="fixed")
    records = {record.name: record for record in artifact.manifest.layers}
    assert "auxiliary" not in records
    assert records["head"].activation_bits == 8 and not records["head"].note
    assert muntin.verify(artifact.path).passed


def test_replaced_artefact(pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    monkeypatch.chdir(tmp_path)
    first = muntin.export(tiny(), pixels(1, 3, 32, 32), "artifact", sizes="fixed")
    second = muntin.export(tiny(), pixels(1, 3, 32, 32), Path("artifact"), sizes="fixed")
    assert first.digest != second.digest == open_artifact("artifact").digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_directory_with_other_files(pixels: Any, tmp_path: Path, tiny: Any) -> None:
    occupied = tmp_path / "mine"
    occupied.mkdir()
    (occupied / "thesis.txt").write_text("years of work")
    beside = tmp_path / ".mine.draft"
    beside.mkdir()
    (beside / "notes.txt").write_text("more of it")
    with pytest.raises(ArtifactError, match=r"it is no artefact \(it holds thesis\.txt\) and is not replaced"):
        muntin.export(tiny(), pixels(1, 3, 32, 32), occupied)
    assert sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.txt")) == [".mine.draft/notes.txt", "mine/thesis.txt"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".mine.draft", "mine"]


def test_signature_of_a_restoring_hybrid(pixels: Any, tmp_path: Path) -> None:
    for scale in (1, 2):
        model = create_model("hybrid-xxs", task="restore", channels=3, scale=scale, options=HYBRID).eval()
        assert infer_signature(model, pixels(1, 3, 32, 32)) == Signature(task="restore", channels=3, scale=scale)


def test_unwritable_path(pixels: Any, tmp_path: Path, tiny: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file is a file: name a directory") as caught:
        muntin.export(tiny(), pixels(1, 3, 32, 32), tmp_path / "file" / "artifact")
    assert "\n" not in str(caught.value)


def test_untraceable_model(build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    model = build(lambda m, x: m.conv(x) if x.mean() > 5 else m.conv(x) * 2, conv=nn.Conv2d(3, 4, 1))
    assert "cannot be exported for every size" in refused(model, pixels(1, 3, 64, 64), tmp_path)


def test_compiled_model(pixels: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    compiled = torch.compile(model, backend="eager")
    compiled(pixels(1, 3, 48, 48).float())
    artifact = muntin.export(compiled, pixels(1, 3, 48, 48), tmp_path / "artifact", calibration=[pixels(2, 3, 48, 48)], sizes="fixed")
    assert [(layer.name, layer.activation_bits) for layer in artifact.manifest.layers] == [("0", 8), ("2", 8)]
    assert all(type(layer) in (nn.Conv2d, nn.ReLU) for layer in model)  # the caller's


def test_autocast_inside_a_model(build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.conv(x / 255).float()  # type: ignore[no-any-return]

    text = refused(build(forward, conv=nn.Conv2d(3, 4, 1)), pixels(1, 3, 48, 48), tmp_path, calibration=[pixels(2, 3, 48, 48)])
    assert "the model's forward computes in bfloat16 (torch.autocast, or .bfloat16()): leave that out of it" in text


def test_calibration_of_other_shapes(build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    model = build(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 1))
    text = refused(model, pixels(1, 3, 48, 48), tmp_path, calibration=[pixels(2, 3, 48, 48), pixels(2, 1, 48, 48)])
    assert text == "calibration batch of shape (2, 1, 48, 48): the example has 3 channels"
    large = build(lambda m, x: m.conv(x) if x.shape[2] <= 300 else m.conv(x[:, :2]), conv=nn.Conv2d(3, 4, 1))
    text = refused(large, pixels(1, 3, 48, 48), tmp_path, calibration=[pixels(2, 3, 400, 48)])
    assert "the model fails on pixels of shape (1, 3, 400, 48)" in text


def test_one_class(build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    for head in (lambda m, x: m.conv(x), lambda m, x: m.conv(x).mean((2, 3))):
        message = refused(build(head, conv=nn.Conv2d(3, 1, 1)), pixels(1, 3, 32, 32), tmp_path)
        assert "of one class every label is the same" in message


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (
            torch.linspace(0.1, 0.9, 3072).reshape(1, 3, 32, 32),
            "example from 0.1 to 0.9: give raw pixels, 0-255; multiply by 255; if .* mean=0 and std=1",
        ),
        (torch.linspace(-2, 2, 3072).reshape(1, 3, 32, 32), "example from -2 to 2: give raw pixels, 0-255; undo their normalisation"),
        (torch.full((1, 3, 32, 32), 65535.0), "example from 6.55e\\+04 to"),
        (np.zeros((1, 3, 32, 32), np.uint8), "example is of type ndarray: give a torch.Tensor"),
    ],
)
def test_pixel_range(example: Any, message: str, pixels: Any, tmp_path: Path, tiny: Any, refused: Any) -> None:
    assert re.search(message, refused(tiny(), example, tmp_path))
    if isinstance(example, Tensor):
        message = message.replace("example", "calibration batch")
        assert re.search(message, refused(tiny(), pixels(1, 3, 32, 32), tmp_path, calibration=[example]))


def test_normalisation_of_a_models_input(pixels: Any, tmp_path: Path, tiny: Any) -> None:
    """The artefact of raw pixels gives the scores of the user's own model on normalised ones."""
    model, example = tiny().train(), pixels(2, 3, 32, 32)
    mean, std, stages = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), list[str]()
    artifact = muntin.export(model, example, tmp_path / "artifact", mean=mean, std=std, progress=stages.append, sizes="fixed")
    assert stages[0] == "checking the model" and stages[-1] == "comparing the engines"
    mean_C11, std_C11 = (torch.tensor(values).reshape(3, 1, 1) for values in (mean, std))
    with torch.inference_mode():
        expected = model((example / 255 - mean_C11) / std_C11).numpy()
    scores = muntin.load(artifact.path, precision="f32", threads=1)(example.permute(0, 2, 3, 1).numpy().astype(np.uint8))
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-4)
    assert model.training and isinstance(model[0], nn.Conv2d)  # type: ignore[index]


def test_layers_of_a_normalised_model(pixels: Any, tmp_path: Path, tiny: Any) -> None:
    model, example = tiny(), pixels(2, 3, 32, 32)
    quantize(model, [example / 255])
    with pytest.raises(ExportError, match="give calibration"):  # the batches of `quantize` are no raw pixels
        muntin.export(model, example, tmp_path / "artifact", mean=0, std=1, sizes="fixed")
    artifact = muntin.export(model, example, tmp_path / "artifact", calibration=[example], mean=0, std=1, sizes="fixed")
    assert [record.name for record in artifact.manifest.layers if record.activation_bits == 8] == ["model.0", "model.2"]
    assert {entry["layer"] for entry in artifact.manifest.passes if entry["pass"] == "quantize"} == {"model.0", "model.2"}
    assert muntin.verify(artifact.path, SessionOptions(threads=1)).passed


def test_refused_normalisation(pixels: Any, tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(MuntinError, match="2 values of mean or std, and the images have 3 channels: give one value, or one for each"):
        muntin.export(tiny(), pixels(1, 3, 32, 32), tmp_path / "artifact", mean=(0.5, 0.5), std=0.5)
    with pytest.raises(ExportError, match="mean, std: of images, and the example is a dictionary of tensors"):
        muntin.export(tiny(), {"input": pixels(1, 3, 32, 32)}, tmp_path / "artifact", mean=0.5, std=0.5)
    assert not list(tmp_path.iterdir())


def test_calibration_types(pixels: Any, tmp_path: Path, tiny: Any, refused: Any) -> None:
    example = pixels(1, 3, 32, 32)
    assert "give a list of batches, [tensor]" in refused(tiny(), example, tmp_path, calibration=example)
    named = [{"input": example}]
    assert "calibration batch is of type dict" in refused(tiny(), example, tmp_path, calibration=named)


def test_calibration_from_a_loader_with_labels(pixels: Any, tmp_path: Path, tiny: Any) -> None:
    images, model = pixels(6, 3, 32, 32).to(torch.uint8), tiny()
    loader = DataLoader(TensorDataset(images, torch.arange(6)), batch_size=4)
    artifacts = [
        muntin.export(model, images[:1], tmp_path / name, calibration=calibration, sizes="fixed")
        for name, calibration in (("loader", loader), ("list", [images[:4], images[4:]]))
    ]
    one, other = (artifact.manifest.files for artifact in artifacts)
    assert one == other and any(record.activation_bits == 8 for record in artifacts[0].manifest.layers)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_model_that_cannot_be_copied(pixels: Any, tmp_path: Path, refused: Any) -> None:
    old = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 1)))
    old(torch.zeros(1, 3, 4, 4))
    assert "parametrizations" in refused(old, pixels(1, 3, 32, 32), tmp_path)


def test_model_in_16_bits(pixels: Any, pictures: Any, tmp_path: Path, tiny: Any) -> None:
    model = tiny().half()
    artifact = muntin.export(model, pixels(1, 3, 32, 32), tmp_path / "artifact")
    images = pictures(1, 33, 20, 3)
    with torch.inference_mode():
        expected = copy.deepcopy(model).float()(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
    assert np.abs(muntin.load(artifact.path, precision="f32", threads=1)(images) - expected).max() <= 1e-4 * expected.std()
    assert next(model.parameters()).dtype == torch.float16


def test_quantised_model(pixels: Any, tmp_path: Path) -> None:
    """Export calibrates with the batches of `quantize`, which copies have, and saved models do not."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 4, 1)).eval()

    model, example = build(), pixels(2, 3, 32, 32)
    quantize(model, [example], bits=4.5, keep=("4",), min_sqnr_db=0)
    artifact = muntin.export(copy.deepcopy(model), example, tmp_path / "a", sizes="fixed")
    *integers, kept = artifact.manifest.layers
    assert (kept.name, kept.activation_bits, kept.note) == ("4", None, "named in keep")
    assert all(record.activation_bits == 8 for record in integers)
    sizes = {"0": 432, "2": 2304}
    assert 4 < sum(record.weight_bits * sizes[record.name] for record in integers) / sum(sizes.values()) <= 4.5
    loaded = muntin.load_compressed(muntin.save(model, tmp_path / "saved"), build())
    with pytest.raises(ExportError, match="give calibration"):
        muntin.export(loaded, example, tmp_path / "b", sizes="fixed")
    again = muntin.export(loaded, example, tmp_path / "b", calibration=[example], sizes="fixed")
    assert again.model_bytes() == artifact.model_bytes()


def test_kept_layers(pixels: Any, tmp_path: Path, tiny: Any) -> None:
    model, example = tiny(), pixels(1, 3, 32, 32)
    name = next(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    artifact = muntin.export(
        model, example, tmp_path / "artifact", calibration=[example], quantization=QuantizationConfig(keep=(name,)), sizes="fixed"
    )
    assert [record.activation_bits for record in artifact.manifest.layers if record.name == name] == [None]


def test_wrong_number_of_channels(pixels: Any, tmp_path: Path, tiny: Any, refused: Any) -> None:
    assert "fails on pixels of shape (1, 4, 32, 32)" in refused(tiny(), pixels(1, 4, 32, 32), tmp_path)


def test_labels_of_many_classes(pixels: Any, pictures: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))
    with torch.no_grad():
        model[4].bias[999] = 10
    path = muntin.export(model, pixels(2, 3, 32, 40), tmp_path / "artifact", calibration=[pixels(2, 3, 32, 40)]).path
    for engine in ("openvino", "onnxruntime"):
        labels = muntin.load(path, engine=engine).labels(pictures(2, 32, 40, 3))
        assert (labels.dtype, labels.tolist()) == (np.uint16, [999, 999])
    assert muntin.verify(path).passed


def test_wrong_number_of_classes(pixels: Any, tmp_path: Path, tiny: Any, refused: Any) -> None:
    for count in (3, 5):
        signature = Signature(task="segment", channels=3, classes=tuple(ClassInfo(name=str(k), color=(k, k, k)) for k in range(count)))
        message = refused(tiny(), pixels(1, 3, 32, 32), tmp_path, signature=signature)
        assert f"answers (1, 4, 32, 32) to an example of (1, 3, 32, 32); for task 'segment' it must be (1, {count}, 32, 32)" in message


def test_named_classes(pixels: Any, tmp_path: Path, tiny: Any) -> None:
    names, example = ["sea", "field", "roof", "road"], pixels(1, 3, 32, 32)
    artifact = muntin.export(
        tiny(), example, tmp_path / "artifact", classes=[{"name": "sea", "color": (0, 0, 200)}, *names[1:]], sizes="fixed"
    )
    classes = artifact.manifest.signature.classes
    assert [entry.name for entry in classes] == names and classes[0].color == (0, 0, 200)
    assert len({entry.color for entry in classes}) == 4


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "b"], "2 classes are named, and the model gives 4 scores: name as many"),
        (["a", "b", "a", "c"], "the class name 'a' is used twice"),
    ],
)
def test_wrong_names_of_classes(classes: list[str], message: str, pixels: Any, tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(MuntinError, match=message):
        muntin.export(tiny(), pixels(1, 3, 32, 32), tmp_path / "artifact", classes=classes)
    with pytest.raises(ExportError, match="the signature has classes already"):
        signature = Signature(task="restore", channels=3)
        muntin.export(tiny(), pixels(1, 3, 32, 32), tmp_path / "artifact", classes=classes, signature=signature)
    assert not list(tmp_path.iterdir())


def test_answers_without_a_signature(build: type[nn.Module], pixels: Any, tmp_path: Path, refused: Any) -> None:
    volume = build(lambda m, x: m.conv(x)[:, None], conv=nn.Conv2d(3, 4, 1))
    assert "(B, K) or (B, K, H, W) is expected" in refused(volume, pixels(1, 3, 32, 32), tmp_path)
    many = build(lambda m, x: m.head(x.mean((2, 3))), head=nn.Linear(3, 65536))
    assert "gives 65536 classes" in refused(many, pixels(1, 3, 32, 32), tmp_path)
    wide = nn.Sequential(nn.Conv2d(17, 4, 1))
    assert "takes 17 channels" in refused(wide, pixels(1, 17, 32, 32), tmp_path)


@pytest.mark.parametrize("shape", [(3, 32, 32), (0, 3, 32, 32), (1, 3, 0, 32)])
def test_example_that_is_no_batch(shape: tuple[int, ...], tmp_path: Path, tiny: Any, refused: Any) -> None:
    assert "give raw pixels (B, C, H, W)" in refused(tiny(), torch.zeros(shape), tmp_path)


def test_infer_signature(build: type[nn.Module], pixels: Any, tiny: Any) -> None:
    segment = infer_signature(tiny(), pixels(2, 3, 32, 40))
    assert (segment.task, segment.channels, segment.outputs, segment.scale) == ("segment", 3, 4, 1)
    assert len({entry.color for entry in segment.classes}) == len({entry.name for entry in segment.classes}) == 4
    classify = infer_signature(build(lambda m, x: m.head(x.mean((2, 3))), head=nn.Linear(5, 6)), pixels(1, 5, 32, 40))
    assert (classify.task, classify.channels, classify.outputs) == ("classify", 5, 6)


def test_quantization_without_calibration(tmp_path: Path, pixels: Any, tiny: Any) -> None:
    with pytest.raises(ExportError, match="without calibration nothing is"):
        muntin.export(tiny().eval(), pixels(1, 3, 64, 64), tmp_path / "a", quantization=QuantizationConfig())
    assert list(tmp_path.iterdir()) == []


def test_example_without_a_batch_and_a_signature(tmp_path: Path) -> None:
    signature = Signature(task="segment", channels=3, classes=(ClassInfo(name="any", color=(0, 0, 0)),))
    for shape in ((3, 8, 8), (0, 3, 8, 8)):
        with pytest.raises(ExportError, match=r"give raw pixels \(B, C, H, W\)"):
            muntin.export(nn.Conv2d(3, 1, 1), torch.zeros(shape), tmp_path / "a", signature=signature)
    assert list(tmp_path.iterdir()) == []
