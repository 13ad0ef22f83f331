"""Artefacts against the PyTorch models that they come from, and what export refuses. Axes: B images, C channels, H W map."""

from __future__ import annotations

import copy
import importlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

import muntin
from muntin import create_model
from muntin.artifact import ClassInfo, Signature, open_artifact
from muntin.artifact.golden import GOLDEN_SIDE
from muntin.compression import Change, freeze, load_model, prepare_qat, quantize
from muntin.deployment import infer_signature
from muntin.deployment.export import FLOAT_LIMITS, LIMITS, golden_pairs
from muntin.deployment.model_contract import check_copy
from muntin.errors import ArtifactError, DataError, ExportError, MuntinError
from muntin.layers import LocalAttention
from muntin.models import DividedSides
from muntin.runtime import describe_hardware, load
from muntin.runtime.options import SessionOptions
from muntin.runtime.verification.artifact import replay
from muntin.training import read_checkpoint
from muntin.training.checkpoint import calibration_of, source_of
from muntin.training.config import QuantizationConfig
from muntin.training.recipe import load_recipe

export = importlib.import_module("muntin.deployment.export")  # the room has a function of that name
INTEGER_CPU = {"avx512_vnni", "avx_vnni", "amx_int8"}
HYBRID = {"depths": (1,), "dims": (128,)}  # one attention stage: half the time of an export
ODD_SIZES = ((1, 64, 64), (3, 65, 33), (1, 1, 37), (1, 1, 1))


# Every model here takes x / 60 - 2 and not x / 64 - 2: bytes are few values, and on the grid of the latter 64 and 192 lie half-way
# between two steps, where the last bit of a float decides.
def perceptron(build: type[nn.Module]) -> nn.Module:
    """Linears on tokens, rank 3, one without a bias, around a residual."""

    def run(m: Any, x: Tensor) -> Any:
        t_BNC = m.patch(x / 60 - 2).flatten(2).transpose(1, 2)
        t_BNC = t_BNC + m.reduce(torch.relu(m.expand(t_BNC)))
        return m.head(t_BNC.mean(1))

    parts = {"patch": nn.Conv2d(3, 32, 4, 4), "expand": nn.Linear(32, 64), "reduce": nn.Linear(64, 32, bias=False)}
    return build(run, **parts, head=nn.Linear(32, 10))


def convolutions(build: type[nn.Module]) -> nn.Module:
    """Groups, a stride, a dilation, depthwise, with and without a bias, a residual, and a skip from full resolution."""

    def run(m: Any, x: Tensor) -> Any:
        full = torch.relu(m.stem(x / 60 - 2))
        y = torch.relu(m.strided(full))
        y = y + m.depthwise(torch.relu(m.grouped(y)))
        y = F.interpolate(m.point(torch.relu(y)), full.shape[2:], mode="nearest")
        return m.head(torch.relu(y + full))

    return build(
        run,
        stem=nn.Conv2d(3, 32, 3, padding=1),
        strided=nn.Conv2d(32, 32, 3, stride=2, padding=1, bias=False),
        grouped=nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=2),
        depthwise=nn.Conv2d(32, 32, 5, padding=2, groups=32, bias=False),
        point=nn.Conv2d(32, 32, 1),
        head=nn.Conv2d(32, 6, 1),
    )


def normed(build: type[nn.Module]) -> nn.Module:
    """Batch norms of PyTorch, one behind a sum where it cannot fold, and activations that are no ReLU."""

    def run(m: Any, x: Tensor) -> Any:
        y = F.silu(m.norm(m.stem(x / 60 - 2)))
        return m.head(F.hardswish(m.sum_norm(y + m.body(y))))

    parts = {"stem": nn.Conv2d(3, 32, 3, padding=1, bias=False), "norm": nn.BatchNorm2d(32), "body": nn.Conv2d(32, 32, 3, padding=1)}
    return build(run, **parts, sum_norm=nn.BatchNorm2d(32), head=nn.Conv2d(32, 4, 1))


def raw_bytes(build: type[nn.Module]) -> nn.Module:
    """Nothing between the image's bytes and the first layer: its grid has the scale that engines would drop."""
    return build(lambda m, x: m.head(torch.relu(m.stem(x))), stem=nn.Conv2d(3, 32, 3, padding=1), head=nn.Conv2d(32, 4, 1))


SMALL: dict[str, Callable[[type[nn.Module]], nn.Module]] = {
    "perceptron": perceptron,
    "convolutions": convolutions,
    "normed": normed,
    "raw bytes": raw_bytes,
}


@pytest.fixture(scope="module", params=SMALL)
def small(request: pytest.FixtureRequest, build: type[nn.Module], trained: Any, export_model: Any, pixels: Any) -> Any:
    """A small model and its INT8 artefact, every layer quantised; calibrated on raw bytes from 0 to 255."""
    torch.manual_seed(5)
    example = pixels(2, 3, 64, 64)
    example[0, 0, 0, :2] = torch.tensor([0.0, 255.0])
    return export_model(trained(SMALL[request.param](build)), quantized=True, example=example)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_the_runtime_computes_the_fake_quantised_model(small: Any, engine: str, pictures: Any) -> None:
    session = muntin.load(small.artifact.path, engine=engine, precision="f32", threads=1)
    for shape in ((1, 64, 64, 3), (2, 41, 60, 3)):
        images = pictures(*shape)
        expected = small.expected(images)
        step = (expected.max() - expected.min()) / 255  # of an 8-bit grid over the scores
        error = np.abs(session(images) - expected)
        assert error.max() <= step
        assert error.mean() <= step / 20


@pytest.mark.skipif(INTEGER_CPU.isdisjoint(describe_hardware()["features"]), reason="this CPU has no 8-bit dot products (VNNI, AMX)")
def test_every_quantised_layer_runs_on_integers(small: Any) -> None:
    records = small.artifact.manifest.layers
    assert records and all(record.weight_bits == record.activation_bits == 8 for record in records)
    for precision in ("f32", "recorded"):
        executed = {
            layer.name: layer.precision for layer in muntin.load(small.artifact.path, precision=precision).layers() if layer.compute
        }
        assert executed == {record.name: "i8" for record in records}


def test_layers_that_stay_are_float_and_found_by_name(build: type[nn.Module], export_model: Any, pictures: Any) -> None:
    exported = export_model(perceptron(build).eval(), quantized=True, keep=("expand", "head"))
    executed = {layer.name: layer.precision for layer in muntin.load(exported.artifact.path, precision="f32").layers() if layer.compute}
    assert executed.keys() == {"patch", "expand", "reduce", "head"}
    assert executed["expand"] == executed["head"] == "f32"
    records = {record.name: record for record in exported.artifact.manifest.layers}
    assert (records["expand"].weight_bits, records["expand"].activation_bits, records["expand"].note) == (16, None, "named in keep")
    assert any(record.shape in ((32, 64), (64, 32)) and record.packing == "f16" for record in exported.artifact.manifest.tensors.values())


# --- hybrids -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ODD_SIZES)
def test_an_int8_hybrid_of_any_size_is_its_simulation(hybrid_int8: Any, size: tuple[int, int, int], pictures: Any) -> None:
    images = pictures(*size, 3)
    expected = hybrid_int8.expected(images)
    scores = muntin.load(hybrid_int8.artifact.path, precision="f32", threads=1)(images)
    assert scores.shape == (size[0], 5, *size[1:])
    error = np.abs(scores - expected) / expected.std()
    assert error.max() <= LIMITS["f32"].max_error
    assert error.mean() <= 0.01  # a value at the edge of a grid's step may fall to the other side; a wrong graph is wrong everywhere
    assert (scores.argmax(1) == expected.argmax(1)).mean() >= LIMITS["f32"].label_agreement


def test_an_int8_hybrid_verifies_in_both_engines(hybrid_int8: Any) -> None:
    for engine in ("openvino", "onnxruntime"):
        result = muntin.verify(hybrid_int8.artifact.path, SessionOptions(engine=engine, threads=1))
        assert result.passed, result.problems
    assert len({golden.shape for golden in result.golden}) == 2  # a size that was baked in would show


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(("form", "most"), [("int8", 0.05), ("float", 1e-4)])
def test_an_image_gets_the_same_answer_alone_and_in_a_batch(
    request: pytest.FixtureRequest, form: str, most: float, engine: str, pictures: Any
) -> None:
    """But for the last bits of floats, by which a value may fall to the other side of a grid's step."""
    session = muntin.load(request.getfixturevalue(f"hybrid_{form}").artifact.path, engine=engine, precision="f32", threads=1)
    images = pictures(4, 70, 50, 3)
    together, alone = session(images), np.concatenate([session(image[None]) for image in images])
    assert np.abs(together - alone).max() <= most * together.std()
    assert np.abs(together - alone).mean() <= most / 50 * together.std()
    assert not np.allclose(together[0], together[1], atol=together.std() / 10)  # they are several images


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"stem": (8, 16), "pairs": (0,), "dims": (64, 128), "depths": (1, 1), "head_dim": 32},
        {"dims": (128, 128), "depths": (1, 1), "finest": 4},
    ],
)
def test_int8_hybrids_of_several_stages_are_their_simulations_at_every_size(
    options: dict[str, Any], export_model: Any, trained: Any, pictures: Any
) -> None:
    torch.manual_seed(0)
    exported = export_model(trained(create_model("hybrid-xxs", classes=5, options=options)), quantized=True)
    session = muntin.load(exported.artifact.path, precision="f32", threads=1)
    for size in ODD_SIZES:
        images = pictures(*size, 3)
        expected = exported.expected(images)
        error = np.abs(session(images) - expected) / max(expected.std(), 1e-6)
        assert error.max() <= LIMITS["f32"].max_error and error.mean() <= 0.01, size


@pytest.mark.slow
def test_accuracy_in_8_bits_holds_at_64_times_the_area_of_what_it_was_calibrated_on(tmp_path: Path) -> None:
    changes = [
        "data.crop=64",
        "model.name=hybrid-xxs",
        "training.steps=120",
        "training.validate_every=120",
        "training.checkpoint_every=120",
    ]
    recipe = load_recipe(Path(muntin.__file__).parent / "recipes" / "demo.yaml", [*changes, "training.threads=1"])
    muntin.fit(recipe, directory=tmp_path / "run", root=tmp_path)
    checkpoint = read_checkpoint(tmp_path / "run")
    source = source_of(checkpoint)
    calibration, model = calibration_of(checkpoint, source), load_model(checkpoint)
    assert all(batch.shape[2:] == (64, 64) for batch in calibration)
    done = prepare_qat(calibration, bits=8)(model) + freeze(calibration)(model)  # products of attention over all tokens, too
    signature = recipe.signature(source.classes)
    artifact = muntin.export(model, calibration[0], tmp_path / "artifact", signature=signature, changes=done)
    test = source.split("test")
    floats, integers = (
        muntin.evaluate(session, test, tile=512).score
        for session in (muntin.TorchSession(load_model(checkpoint), signature), muntin.load(artifact.path, precision="f32", threads=1))
    )
    assert floats > 0.3
    assert integers == pytest.approx(floats, abs=0.01)


def test_one_flipped_byte_is_found(hybrid_int8: Any, tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    shutil.copytree(hybrid_int8.artifact.path, path)
    weights = path / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    for opened in (lambda: muntin.verify(path), lambda: muntin.load(path)):
        with pytest.raises(ArtifactError, match=r"weights\.safetensors: its content is not what"):
            opened()


def test_the_manifest_tells_each_layer_and_each_pass(hybrid_int8: Any) -> None:
    manifest = hybrid_int8.artifact.manifest
    named = {name for name, module in hybrid_int8.model.named_modules() if type(module).__name__.startswith("Quantized")}
    assert {record.name for record in manifest.layers if record.activation_bits == 8} == named
    assert {entry["pass"] for entry in manifest.passes} == {"slim", "fold", "quantize"}
    assert manifest.measured["hardware"] and manifest.precision in ("bf16", "f32")
    by_name = {record.name: record for record in manifest.layers}
    stem = by_name["stem.0.conv"]
    assert (stem.kind, stem.parameters, stem.macs) == ("Conv2d", 8 * 3 * 9 + 8, 32 * 32 * 8 * 3 * 9)
    head = by_name["stages.0.blocks.0.mlp.expand"]
    hidden = hybrid_int8.model.get_submodule("stages.0.blocks.0.mlp.expand").weight.numel() // 128
    assert hidden < 256 and hidden % 16 == 0  # some of the 256 are closed
    assert (head.kind, head.parameters, head.macs) == ("Linear", 128 * hidden + hidden, 64 * 128 * hidden)  # 4 x 4 tokens padded to 8 x 8


def test_weights_are_stored_once_and_as_integers(hybrid_int8: Any) -> None:
    manifest, model = hybrid_int8.artifact.manifest, hybrid_int8.model
    weights = sum(module.weight.numel() for module in model.modules() if type(module).__name__.startswith("Quantized"))
    stored = [record for record in manifest.tensors.values() if record.packing == "int" and record.bits == 8]
    assert sum(int(np.prod(record.shape)) for record in stored) == weights
    assert (hybrid_int8.artifact.path / "weights.safetensors").stat().st_size < 1.15 * weights


@pytest.mark.slow
@pytest.mark.parametrize("size", ODD_SIZES)
def test_a_float_hybrid_of_any_size_is_the_pytorch_model(hybrid_float: Any, size: tuple[int, int, int], pictures: Any) -> None:
    images = pictures(*size, 3)
    expected = hybrid_float.expected(images)
    for engine in ("openvino", "onnxruntime"):
        scores = muntin.load(hybrid_float.artifact.path, engine=engine, precision="f32", threads=1)(images)
        assert np.abs(scores - expected).max() <= 1e-4 * expected.std()
    assert hybrid_float.artifact.manifest.golden_tolerance == {"openvino": FLOAT_LIMITS, "onnxruntime": FLOAT_LIMITS}
    assert {entry["pass"] for entry in hybrid_float.artifact.manifest.passes} == {"slim", "fold"}  # no norm and no gate is computed there


@pytest.mark.parametrize("attention", ["global", "dense"])
def test_a_session_of_dynamic_sizes_computes_the_same(attention: str, export_model: Any, trained: Any, pictures: Any) -> None:
    """But for values that lie half-way between two levels."""
    torch.manual_seed(0)
    options = {"attention": attention, "depths": (1,)}
    artifact = export_model(trained(create_model("hybrid-xxs", classes=5, options=options)), quantized=True).artifact
    images = pictures(2, 70, 50, 3)
    scores = muntin.load(artifact.path, precision="f32", threads=1)(images)
    found = muntin.load(artifact.path, precision="f32", threads=1, dynamic=True)(images)
    assert np.abs(found - scores).max() <= 0.05 * scores.std()
    assert np.abs(found - scores).mean() <= 0.005 * scores.std()


def test_an_artefact_names_the_shape_that_it_is_opened_for(tmp_path: Path) -> None:
    model, example = nn.Conv2d(3, 2, 3, padding=1), torch.randint(0, 256, (2, 3, 20, 24))
    assert muntin.export(model, example, tmp_path / "a").manifest.example == (1, 20, 24)
    assert muntin.export(model, example, tmp_path / "b", shape=(4, 16, 8)).manifest.example == (4, 16, 8)
    with pytest.raises(DataError, match=r"shape \(True, 3, 3\)"):
        muntin.export(model, example, tmp_path / "c", shape=(True, 3, 3))
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_the_artefact_of_hybrid_s_is_at_most_a_third_and_a_half_of_fp32(
    trained: Any, export_model: Any, pixels: Any, tmp_path: Path
) -> None:
    model = trained(create_model("hybrid-s", classes=6, options={"depths": (2, 1)}))
    fp32 = len(save_tensors(model.state_dict()))
    exported = export_model(model, quantized=True, example=pixels(2, 3, 96, 96))
    assert exported.artifact.bytes <= fp32 / 3.5
    assert muntin.verify(exported.artifact.path).passed


@pytest.mark.slow
def test_classify_and_restore(trained: Any, pixels: Any, pictures: Any, tmp_path: Path) -> None:
    example = pixels(2, 3, 64, 64)
    classifier = trained(create_model("hybrid-xs", task="classify", classes=7, options=HYBRID))
    artifact = muntin.export(classifier, example, tmp_path / "classify", calibration=[example])
    assert artifact.manifest.signature.task == "classify" and len(artifact.manifest.signature.classes) == 7
    assert muntin.load(artifact.path, threads=1)(pictures(3, 50, 41, 3)).shape == (3, 7)

    restorer = trained(create_model("hybrid-xs", task="restore", scale=2, options=HYBRID))
    with torch.no_grad():
        restorer.get_parameter("head.conv.weight").normal_(0, 0.01)  # training starts at zero
    artifact = muntin.export(
        restorer, example, tmp_path / "restore", calibration=[example], signature=Signature(task="restore", channels=3, scale=2)
    )
    images = pictures(1, 33, 50, 3)
    scores = muntin.load(artifact.path, precision="f32", threads=1)(images)
    assert scores.shape == (1, 3, 66, 100)
    quantised = copy.deepcopy(restorer)
    quantize([example])(quantised)
    expected = muntin.TorchSession(quantised, artifact.manifest.signature)(images)
    assert np.abs(scores - expected).max() <= 0.1 * expected.std()
    assert muntin.verify(artifact.path, SessionOptions(threads=1)).passed


# --- others' models ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_classifier_of_timm(trained: Any, pixels: Any, tmp_path: Path) -> None:
    model, example = create_model("timm:test_byobnet", task="classify", classes=5), pixels(4, 3, 64, 64)
    trained(model)
    before = copy.deepcopy(model.state_dict())
    artifact = muntin.export(model, example, tmp_path / "artifact", calibration=[example])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert sum(record.activation_bits == 8 for record in artifact.manifest.layers) >= 20
    result = muntin.verify(artifact.path, SessionOptions(threads=1))
    assert result.passed and not result.fallbacks, result.problems


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_segmenter_of_torchvision(trained: Any, pixels: Any, pictures: Any, tmp_path: Path) -> None:
    model, example = create_model("torchvision:lraspp_mobilenet_v3_large", classes=5), pixels(2, 3, 96, 96)
    trained(model)
    artifact = muntin.export(model, example, tmp_path / "artifact", calibration=[example])
    result = muntin.verify(artifact.path, SessionOptions(threads=1))
    assert result.passed and not result.fallbacks, result.problems
    assert muntin.load(artifact.path, threads=1)(pictures(1, 70, 51, 3)).shape == (1, 5, 70, 51)


# --- the caller's things -------------------------------------------------------------------------------------------------------


def tiny() -> nn.Module:
    """Exports in a second."""
    return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 4, 1))


def test_the_callers_model_stays_as_it_is(pixels: Any, tmp_path: Path) -> None:
    model, example = tiny().train(), pixels(1, 3, 32, 32)
    before, kept_example = copy.deepcopy(model.state_dict()), example.clone()
    muntin.export(model, example, tmp_path / "artifact", calibration=[example])
    assert model.training and isinstance(model[0], nn.Conv2d)  # type: ignore[index]
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(example, kept_example)


def test_what_came_before_is_kept_in_the_manifest(pixels: Any, tmp_path: Path) -> None:
    earlier = Change(layer="0", pass_="prune", done="kept", reason="all of it counts", sqnr_db=float("inf"))
    artifact = muntin.export(tiny(), pixels(1, 3, 32, 32), tmp_path / "artifact", changes=[earlier], measured={"miou": 0.5})
    assert artifact.manifest.passes == ({"pass": "prune", "layer": "0", "done": "kept", "reason": "all of it counts", "sqnr_db": None},)
    assert artifact.manifest.measured["miou"] == 0.5
    assert open_artifact(tmp_path / "artifact").manifest == artifact.manifest


def test_one_layer_alone_is_a_model_too(pixels: Any, pictures: Any, tmp_path: Path) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1)
    artifact = muntin.export(layer, pixels(1, 3, 32, 32), tmp_path / "artifact")
    images = pictures(1, 20, 31, 3)
    expected = muntin.TorchSession(layer, artifact.manifest.signature)(images)
    np.testing.assert_allclose(muntin.load(artifact.path, precision="f32")(images), expected, rtol=1e-4, atol=1e-3)


def test_a_head_that_the_answer_does_not_use_is_not_deployed(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    def run(m: Any, x: Tensor) -> Any:
        features = torch.relu(m.stem(x / 60 - 2))
        return {"out": m.head(features), "aux": m.auxiliary(features)}["out"]

    parts = {"stem": nn.Conv2d(3, 16, 3, padding=1), "auxiliary": nn.Conv2d(16, 4, 1), "head": nn.Conv2d(16, 4, 1)}
    example = pixels(1, 3, 32, 32)
    artifact = muntin.export(build(run, **parts), example, tmp_path / "artifact", calibration=[example])
    records = {record.name: record for record in artifact.manifest.layers}
    assert records["auxiliary"].activation_bits is None and "not deployed" in records["auxiliary"].note
    assert records["head"].activation_bits == 8 and not records["head"].note
    assert muntin.verify(artifact.path).passed


# --- where it is written -------------------------------------------------------------------------------------------------------


def test_an_artefact_is_replaced_and_nothing_lies_beside_it(pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = muntin.export(tiny(), pixels(1, 3, 32, 32), "artifact")
    second = muntin.export(tiny(), pixels(1, 3, 32, 32), Path("artifact"))
    assert first.digest != second.digest == open_artifact("artifact").digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]


def test_a_directory_with_other_things_is_left_alone(pixels: Any, tmp_path: Path) -> None:
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


@pytest.mark.parametrize("kind", ["norm", "mean"])
def test_a_model_that_mixes_the_images_of_a_batch_is_refused(kind: str, build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    def run(m: Any, x: Tensor) -> Any:
        y = m.stem(x / 60 - 2)
        return m.head(torch.relu(m.norm(y) if kind == "norm" else y - y.mean(0, keepdim=True)))

    parts = {"stem": nn.Conv2d(3, 16, 3, padding=1), "norm": nn.BatchNorm2d(16, track_running_stats=False), "head": nn.Conv2d(16, 4, 1)}
    message = refused(build(run, **parts), pixels(1, 3, 48, 40), tmp_path)
    assert "answers an image otherwise beside another one, by " in message


def test_a_hybrid_that_restores_says_so_itself(pixels: Any, tmp_path: Path) -> None:
    for scale in (1, 2):
        model = create_model("hybrid-xxs", task="restore", channels=3, scale=scale, options=HYBRID).eval()
        assert infer_signature(model, pixels(1, 3, 32, 32)) == Signature(task="restore", channels=3, scale=scale)


def test_a_failed_export_leaves_the_artefact_that_was_there(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    before = muntin.export(tiny(), pixels(1, 3, 32, 32), tmp_path / "artifact")

    def random(m: Any, x: Tensor) -> Any:
        return m.conv(x) + 100 * torch.rand_like(m.conv(x))

    with pytest.raises(
        ExportError, match=r"what was traced does not compute what PyTorch does: f32 gives a largest error of .*; nothing was written"
    ) as caught:
        muntin.export(build(random, conv=nn.Conv2d(3, 4, 1)), pixels(1, 3, 32, 32), tmp_path / "artifact")
    assert "\n" not in str(caught.value)
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifact"]
    assert open_artifact(tmp_path / "artifact").digest == before.digest


def test_a_place_that_cannot_be_written_is_one_line(pixels: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="file is a file: name a directory") as caught:
        muntin.export(tiny(), pixels(1, 3, 32, 32), tmp_path / "file" / "artifact")
    assert "\n" not in str(caught.value)


# --- what is refused -----------------------------------------------------------------------------------------------------------


def refused(model: nn.Module, example: Tensor, path: Path, **arguments: Any) -> str:
    with pytest.raises(MuntinError) as caught:
        muntin.export(model, example, path / "artifact", **arguments)
    assert isinstance(caught.value, ExportError), caught.value
    assert "\n" not in str(caught.value)
    assert not list(path.iterdir())
    return str(caught.value)


def test_a_model_that_cannot_be_traced(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    model = build(lambda m, x: m.conv(x) if x.mean() > 5 else m.conv(x) * 2, conv=nn.Conv2d(3, 4, 1))
    assert "cannot be exported for every size" in refused(model, pixels(1, 3, 64, 64), tmp_path)


def test_a_model_that_was_compiled_is_exported_as_it_was_written(pixels: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    compiled = torch.compile(model, backend="eager")
    compiled(pixels(1, 3, 48, 48).float())
    artifact = muntin.export(compiled, pixels(1, 3, 48, 48), tmp_path / "artifact", calibration=[pixels(2, 3, 48, 48)])
    assert [(layer.name, layer.activation_bits) for layer in artifact.manifest.layers] == [("0", 8), ("2", 8)]
    assert all(type(layer) in (nn.Conv2d, nn.ReLU) for layer in model)  # the caller's


@pytest.mark.parametrize("calibrated", [False, True])
def test_autocast_inside_a_model_is_told(build: type[nn.Module], pixels: Any, tmp_path: Path, calibrated: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.conv(x / 255).float()  # type: ignore[no-any-return]

    arguments = {"calibration": [pixels(2, 3, 48, 48)]} if calibrated else {}
    text = refused(build(forward, conv=nn.Conv2d(3, 4, 1)), pixels(1, 3, 48, 48), tmp_path, **arguments)
    assert "the model's forward computes in bfloat16 (torch.autocast, or .bfloat16()): leave that out of it" in text


def test_what_is_no_model_of_one_tensor_is_told(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    keyed = build(lambda m, x: x["image"], conv=nn.Conv2d(3, 4, 1))
    named = build(lambda m, x: {"a": x}["b"], conv=nn.Conv2d(3, 4, 1))
    for model, kind in ((Two(), "TypeError"), (keyed, "IndexError"), (named, "KeyError")):
        text = refused(model, pixels(1, 3, 48, 48), tmp_path)
        assert f"fails on pixels of shape (1, 3, 48, 48) ({kind}: " in text
        assert "it is called with one tensor, raw pixels (B, C, H, W), and nothing else: wrap it" in text
    assert "is of type OrderedDict: give a torch.nn.Module" in refused(Two().state_dict(), pixels(1, 3, 48, 48), tmp_path)  # type: ignore[arg-type]


def test_calibration_that_the_model_does_not_take_is_told(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    model = build(lambda m, x: m.conv(x), conv=nn.Conv2d(3, 4, 1))
    text = refused(model, pixels(1, 3, 48, 48), tmp_path, calibration=[pixels(2, 3, 48, 48), pixels(2, 1, 48, 48)])
    assert text == "calibration batch of shape (2, 1, 48, 48): the example has 3 channels"
    large = build(lambda m, x: m.conv(x) if x.shape[2] <= 300 else m.conv(x[:, :2]), conv=nn.Conv2d(3, 4, 1))
    text = refused(large, pixels(1, 3, 48, 48), tmp_path, calibration=[pixels(2, 3, 400, 48)])
    assert "the model fails on pixels of shape (1, 3, 400, 48)" in text


def test_a_model_of_one_size_is_told_so_before_any_work(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    model = build(lambda m, x: m.conv(x) + m.conv.weight.new_zeros(1, 4, 48, 48), conv=nn.Conv2d(3, 4, 1))
    assert "fails on pixels of shape (1, 3, 31, 43), and an artefact takes every size" in refused(model, pixels(1, 3, 48, 48), tmp_path)


class Quarters(nn.Module):
    """Refuses sides that 4 does not divide, as encoders and decoders with skips do."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 5, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if x_BCHW.shape[2] % 4 or x_BCHW.shape[3] % 4:
            raise RuntimeError("sides that 4 divides")
        return F.interpolate(self.up(self.down(x_BCHW / 255).relu()), scale_factor=4.0, mode="bilinear")


def test_a_model_of_some_sizes_that_pads_is_exported_for_all(pixels: Any, pictures: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DividedSides(Quarters().eval(), 4).eval()
    assert "muntin.models.DividedSides pads and cuts" in refused(model.model, pixels(1, 3, 48, 48), tmp_path)
    artifact = muntin.export(model, pixels(1, 3, 48, 48), tmp_path / "artifact")
    session = muntin.load(artifact.path, precision="f32", threads=1)
    for size in (*ODD_SIZES, (1, 48, 64)):
        images = pictures(*size, 3)
        with torch.inference_mode():
            wanted = model(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
        assert np.abs(session(images) - wanted).max() <= 1e-4 * wanted.std()


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.conv(x) * 2 if x.shape[2] > x.shape[3] else m.conv(x),
        lambda m, x: m.conv(x) * 2 if x.shape[2] * x.shape[3] > 40_000 else m.conv(x),
        lambda m, x: m.conv(x) * 2 if x.shape[2] == x.shape[3] else m.conv(x),
        lambda m, x: m.conv(x) if x.shape[2] % 32 or x.shape[3] % 32 else m.conv(x) * 2,
    ],
)
def test_a_model_that_asks_for_its_size(run: Callable[..., Any], build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    model = build(run, conv=nn.Conv2d(3, 4, 3, padding=1))
    message = refused(model, pixels(1, 3, 64, 64), tmp_path)
    assert (
        re.search("was traced where .*, and computes otherwise elsewhere, as for 1 x", message) or "computes otherwise where the" in message
    )
    assert "torch.where" in message


def test_a_branch_is_found_among_integers(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    model = build(lambda m, x: m.conv(x) * 3 if x.shape[2] > x.shape[3] else m.conv(x), conv=nn.Conv2d(3, 16, 3, padding=1))
    example = pixels(1, 3, 64, 64)
    assert "was traced where height <= width (" in refused(model, example, tmp_path, calibration=[example])


def test_a_branch_for_the_examples_own_size_is_found(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    model = build(lambda m, x: m.conv(x) * 2 if x.shape[3] % 50 == 0 else m.conv(x), conv=nn.Conv2d(3, 4, 3, padding=1))
    assert "elsewhere, as for 1 x 65 x 600 pixels" in refused(model, pixels(1, 3, 40, 50), tmp_path)


def test_a_size_that_went_through_int_is_found_among_integers(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    def run(m: Any, x: Tensor) -> Any:
        low = F.interpolate(m.low(x), (int(x.shape[2] * 0.5), x.shape[3] // 2), mode="bilinear")
        return m.conv(x) + 0.1 * F.interpolate(low, x.shape[2:], mode="bilinear")

    model = build(run, conv=nn.Conv2d(3, 16, 3, padding=1), low=nn.Conv2d(3, 16, 3, padding=1))
    example = pixels(1, 3, 64, 64)
    message = refused(model, example, tmp_path, calibration=[example])
    assert "Eq(TruncToInt(0.5*ToFloat(height)), " in message and "with // instead of int()" in message


def test_an_answer_of_another_size_on_odd_sides(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    model = build(lambda m, x: F.interpolate(m.down(x), scale_factor=2), down=nn.Conv2d(3, 4, 2, 2))
    message = refused(model, pixels(1, 3, 64, 64), tmp_path)
    assert "answers (1, 4, 30, 42) to 1 x 31 x 43 pixels, where (1, 4, 31, 43) is due" in message and "DividedSides" in message


class PadsOddSides(nn.Conv2d):
    """What it does to odd sides its padding does not say."""

    def forward(self, input: Tensor) -> Tensor:
        H, W = input.shape[-2:]
        return super().forward(F.pad(input, (0, W % 2, 0, H % 2), value=1.0))


def test_what_layers_do_beside_their_weights_is_deployed_too(build: type[nn.Module], pixels: Any, pictures: Any, tmp_path: Path) -> None:
    """A hook, and a subclass that pads some sizes only."""

    def run(m: Any, x: Tensor) -> Any:
        return m.head(F.interpolate(torch.relu(m.down(torch.relu(m.stem(x / 60 - 2)))), x.shape[2:]))

    model = build(run, stem=nn.Conv2d(3, 32, 3, padding=1), down=PadsOddSides(32, 32, 2, 2), head=nn.Conv2d(32, 4, 1)).eval()
    model.stem.register_forward_hook(lambda layer, inputs, output: output * torch.linspace(-2, 2, 32).reshape(1, -1, 1, 1))
    artifact = muntin.export(model, pixels(1, 3, 64, 64), tmp_path / "a", calibration=[pixels(2, 3, 64, 64)])
    assert [layer.activation_bits for layer in artifact.manifest.layers] == [8, None, 8]
    for size in ((64, 64), (41, 57)):
        images = pictures(1, *size, 3)
        with torch.inference_mode():
            due = model(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
        error = muntin.load(artifact.path, precision="f32", threads=1)(images) - due
        assert np.sqrt(np.square(error).mean()) < 0.05 * due.std()


def test_what_quantising_spoils_at_some_sizes_is_refused(
    build: type[nn.Module], pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the convolution is asked nothing and taken for a usual one."""
    monkeypatch.setattr("muntin.compression.quantization.preparation.computes_as_usual", lambda layer, x: True)
    model = build(
        lambda m, x: m.head(F.interpolate(m.down(torch.relu(m.stem(x / 60 - 2))), x.shape[2:])),
        stem=nn.Conv2d(3, 32, 3, padding=1),
        down=PadsOddSides(32, 32, 2, 2, padding=1),
        head=nn.Conv2d(32, 4, 1),
    )
    model.down.forward = lambda x: F.conv2d(x, model.down.weight, model.down.bias, 2, 1) * (1 - 2 * (x.shape[2] % 2))
    message = refused(model, example := pixels(1, 3, 64, 64), tmp_path, calibration=[example])
    assert re.search(r"in integers the model answers otherwise, by .* on an image of 31 x 43 .*: name it in quantization.keep", message)


def test_what_integers_cost_at_sizes_that_calibration_did_not_see_is_noted(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    """Absolute positions: those of a larger image lie outside the grid of 8 bits."""

    def run(m: Any, x: Tensor) -> Any:
        places = (torch.arange(x.shape[2])[:, None] + torch.arange(x.shape[3])[None]) / 64
        return m.head(torch.relu(m.stem(torch.cat([x / 60 - 2, places.expand(len(x), 1, -1, -1)], 1))))

    model = build(run, stem=nn.Conv2d(4, 16, 3, padding=1), head=nn.Conv2d(16, 4, 1))
    example = pixels(1, 3, 64, 64)
    notes = {}
    for name, calibration in (("small", [example]), ("both", [example, pixels(1, 3, 256, 256)]), ("floats", None)):
        notes[name] = muntin.export(model, example, tmp_path / name, calibration=calibration).manifest.measured["notes"]
    (note,) = notes["small"]
    assert re.match(r"integers move the answer to an image of 256 x 256 by 0\.\d+ standard deviations in the mean", note)
    assert notes["both"] == notes["floats"] == []


def test_a_session_of_dynamic_sizes_that_is_off_is_refused(
    build: type[nn.Module], pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What OpenVINO makes of quantised products without a bias, read twice, where none is given to them."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.stem(x / 60 - 2)
        x = x + m.layer(torch.relu(m.norm(x)))
        return F.interpolate(m.head(x + m.norm(x)), scale_factor=2)

    parts = {"stem": nn.Conv2d(3, 16, 3, 2, 1, bias=False), "norm": nn.GroupNorm(4, 16), "layer": nn.Conv2d(16, 16, 3, 1, 1, bias=False)}
    model = DividedSides(build(run, **parts, head=nn.Conv2d(16, 4, 1)), 2).eval()
    example = pixels(1, 3, 64, 64)
    muntin.export(model, example, tmp_path / "right", calibration=[example])
    shutil.rmtree(tmp_path / "right")
    monkeypatch.setattr("muntin.runtime.engines.openvino.session.with_biases", lambda model: model)
    assert "does not compute what PyTorch does: where sizes are free" in refused(model, example, tmp_path, calibration=[example])


def test_a_class_alone(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    for head in (lambda m, x: m.conv(x), lambda m, x: m.conv(x).mean((2, 3))):
        message = refused(build(head, conv=nn.Conv2d(3, 1, 1)), pixels(1, 3, 32, 32), tmp_path)
        assert "of one class every label is the same" in message


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.linspace(0.1, 0.9, 3072).reshape(1, 3, 32, 32), "example from 0.1 to 0.9: give raw pixels, 0-255"),
        (torch.linspace(-2, 2, 3072).reshape(1, 3, 32, 32), "example from -2 to 2: give raw pixels, 0-255"),
        (torch.full((1, 3, 32, 32), 65535.0), "example from 6.55e\\+04 to"),
        (np.zeros((1, 3, 32, 32), np.uint8), "example is of type ndarray: give a torch.Tensor"),
    ],
)
def test_what_are_no_raw_pixels(example: Any, message: str, pixels: Any, tmp_path: Path) -> None:
    assert re.search(message, refused(tiny(), example, tmp_path))
    if isinstance(example, Tensor):
        message = message.replace("example", "calibration batch")
        assert re.search(message, refused(tiny(), pixels(1, 3, 32, 32), tmp_path, calibration=[example]))


def test_calibration_that_is_no_list_of_batches(pixels: Any, tmp_path: Path) -> None:
    example = pixels(1, 3, 32, 32)
    assert "give a list of batches, [tensor]" in refused(tiny(), example, tmp_path, calibration=example)
    pairs = [(example, torch.zeros(1))]
    assert "calibration batch is of type tuple" in refused(tiny(), example, tmp_path, calibration=pairs)


class Context(nn.Module):
    """A gate by the mean of an earlier map, which a function of its own keeps in a dictionary: a copy's map goes into the original's."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.stem, self.gate, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)
        self.kept: dict[str, Tensor] = {}
        self.gain = gain
        self.stem.register_forward_hook(lambda layer, inputs, output: self.kept.update(context=output.mean((2, 3), keepdim=True)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x / 255)
        return self.out(y.relu()) + self.gain * self.gate(self.kept["context"])


@pytest.mark.parametrize(("used", "message"), [(False, "a copy of the model fails where"), (True, "a copy of the model answers otherwise")])
def test_a_copy_that_is_another_model_is_refused(used: bool, message: str, pixels: Any, tmp_path: Path) -> None:
    model = Context(gain=10).train()
    if used:
        with torch.no_grad():
            model(torch.full((1, 3, 32, 32), 255.0))
    told = refused(model, pixels(1, 3, 48, 48), tmp_path)
    assert message in told
    assert "let it reach them through the module that it is given" in told
    assert model.training and model.stem.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_that_answers_in_32_is_no_other_than_its_copy(dtype: torch.dtype, pixels: Any) -> None:
    class Ends(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, super().forward(x).float())

    torch.manual_seed(0)
    parts = [part for _ in range(12) for part in (nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())]
    check_copy(Ends(nn.Conv2d(3, 8, 1), *parts, nn.Conv2d(8, 4, 1)).eval().to(dtype), pixels(1, 3, 48, 48))


def test_answers_that_are_not_finite_blame_no_hook(pixels: Any) -> None:
    class Masked(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).index_fill(1, torch.tensor(0), -torch.inf)

    check_copy(Masked(3, 4, 1).eval(), pixels(1, 3, 48, 48))


def test_an_adapter_that_merges_itself_in_eval_mode_is_left_alone(pixels: Any) -> None:
    class Merges(nn.Conv2d):
        merged = False

        def train(self, mode: bool = True) -> Any:
            if not mode and not self.merged:
                self.merged = True
                self.weight.data += 1
            return super().train(mode)

    model = nn.Sequential(Merges(3, 4, 1), nn.Dropout())
    before = model[0].weight.detach().clone()
    check_copy(model, pixels(1, 3, 48, 48))
    assert model.training and model[1].training and not model[0].merged
    assert torch.equal(model[0].weight, before)


def test_a_buffer_that_drifts_is_named(pixels: Any, tmp_path: Path) -> None:
    class Drifts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.mul_(0.9).add_(x.mean() / 10)
            return self.conv(x) + self.seen

    assert "changes its buffer 'seen' with each image" in refused(Drifts(), pixels(1, 3, 48, 48), tmp_path)


def test_padding_that_wraps_around_is_told(pixels: Any, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Conv2d(8, 4, 1))
    assert "join rows and columns by torch.cat instead" in refused(model, pixels(1, 3, 48, 48), tmp_path)


def test_a_model_that_asks_what_kind_a_layer_is_keeps_its_answer_in_integers(pixels: Any, tmp_path: Path) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 1)
            self.layers = nn.ModuleList([nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1)])

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem((x - 127) / 60).relu()
            for layer in self.layers:
                x = x + layer(x) if isinstance(layer, nn.Conv2d) else layer(x)
            return cast(Tensor, self.last(x))

    torch.manual_seed(0)
    model, images = Asks().eval(), pixels(2, 3, 48, 48)
    artifact = muntin.export(model, images, tmp_path / "a", calibration=[images])
    with torch.no_grad():
        due = model(images.float()).numpy()
    found = load(artifact.path, precision="f32")(images.permute(0, 2, 3, 1).to(torch.uint8).numpy())
    assert np.sqrt(np.square(found - due).mean()) < 0.05 * due.std()
    assert {record.name for record in artifact.manifest.layers if record.activation_bits} == {"stem", "last"}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_model_that_cannot_be_copied(pixels: Any, tmp_path: Path) -> None:
    old = nn.Sequential(torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 1)))
    old(torch.zeros(1, 3, 4, 4))
    assert "parametrizations" in refused(old, pixels(1, 3, 32, 32), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_of_another_float_type_is_exported(dtype: torch.dtype, pixels: Any, pictures: Any, tmp_path: Path) -> None:
    model = tiny().to(dtype)
    artifact = muntin.export(model, pixels(1, 3, 32, 32), tmp_path / "artifact")
    images = pictures(1, 33, 20, 3)
    with torch.inference_mode():
        expected = copy.deepcopy(model).float()(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
    assert np.abs(muntin.load(artifact.path, precision="f32", threads=1)(images) - expected).max() <= 1e-4 * expected.std()
    assert next(model.parameters()).dtype == dtype


# --- what is joined ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "joined",
    [
        lambda m, y, x: torch.cat([y, x], 1),
        lambda m, y, x: torch.cat([y.relu(), m.side(x)], 1) * 1.7 + 0.3,
        lambda m, y, x: m.norm(torch.cat([y, x * 0.5], 1)),
    ],
)
def test_maps_with_a_sign_that_are_joined_are_computed_as_in_pytorch(
    joined: Callable[..., Tensor], build: type[nn.Module], pixels: Any, pictures: Any, tmp_path: Path
) -> None:
    def run(m: Any, x: Tensor) -> Any:
        x = (x / 255 - 0.45) / 0.225
        return m.head(joined(m, m.body(m.stem(x).relu()), x))

    torch.manual_seed(1)
    parts = {"stem": nn.Conv2d(3, 8, 3, padding=1), "body": nn.Conv2d(8, 8, 3, padding=1), "side": nn.Conv2d(3, 3, 1)}
    norm = nn.BatchNorm2d(11)
    nn.init.normal_(norm.bias)
    nn.init.uniform_(norm.running_mean, -1, 1)
    model = build(run, **parts, norm=norm, head=nn.Conv2d(11, 4, 1)).eval()
    example = pixels(2, 3, 64, 64)
    integers = copy.deepcopy(model)
    quantize([example])(integers)
    artifact = muntin.export(model, example, tmp_path / "artifact", calibration=[example])
    assert all(record.activation_bits == 8 for record in artifact.manifest.layers if record.name in ("stem", "body", "head"))
    images = pictures(1, 48, 40, 3)
    with torch.inference_mode():
        expected = integers(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
    for engine in ("openvino", "onnxruntime"):
        scores = muntin.load(artifact.path, engine=engine, precision="f32", threads=1)(images)
        assert np.abs(scores - expected).max() <= 0.05 * expected.std()


def test_a_figure_that_is_no_plain_value_is_named_and_no_engine_is_blamed(pixels: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"measured\.miou.*record plain values") as error:
        muntin.export(tiny(), pixels(1, 3, 32, 32), tmp_path / "artifact", measured={"miou": np.float32(0.7)})
    assert "engine" not in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_quantised_layers_that_an_engine_runs_in_floats_are_refused(pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "find_fallbacks", lambda layers, executed: (["a"], ["a runs in f32"]))
    example = pixels(1, 3, 32, 32)
    message = refused(tiny(), example, tmp_path, calibration=[example])
    assert "1 of the quantised layers not on integers: a runs in f32: name it in quantization.keep" in message


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino in 16 bits"])
def test_an_engine_that_is_off_alone_is_left_out_and_noted(
    pixels: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str
) -> None:
    find = export.deviations
    sixteen = muntin.load(muntin.export(tiny(), pixels(1, 3, 32, 32), tmp_path / "before").path).precision

    def off(session: Any, pairs: Any, limits: Any) -> list[str]:
        is_off = session.engine.startswith("onnxruntime") if engine == "onnxruntime" else session.precision == "bf16"
        return ["it is far off"] if is_off else find(session, pairs, limits)

    monkeypatch.setattr(export, "deviations", off)
    manifest = muntin.export(tiny(), pixels(1, 3, 32, 32), tmp_path / "artifact").manifest
    notes = manifest.measured["notes"]
    if engine == "onnxruntime":
        assert set(manifest.golden_tolerance) == {"openvino"}
        assert any(note.startswith("onnxruntime") and note.endswith("is not checked against: in it, it is far off") for note in notes)
    elif sixteen == "bf16":
        assert manifest.precision == "f32"
        assert "recorded in f32, for it is far off" in notes
    else:
        assert manifest.precision == "bf16" and notes == []  # which is what is recorded where it cannot be tried


def test_layers_that_are_kept_in_floats_by_name(pixels: Any, tmp_path: Path) -> None:
    model, example = tiny(), pixels(1, 3, 32, 32)
    name = next(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))
    artifact = muntin.export(model, example, tmp_path / "artifact", calibration=[example], quantization=QuantizationConfig(keep=(name,)))
    assert [record.activation_bits for record in artifact.manifest.layers if record.name == name] == [None]


def test_channels_that_the_model_does_not_take(pixels: Any, tmp_path: Path) -> None:
    assert "fails on pixels of shape (1, 4, 32, 32)" in refused(tiny(), pixels(1, 4, 32, 32), tmp_path)


def test_a_class_more_or_less_than_the_model_has(pixels: Any, tmp_path: Path) -> None:
    for count in (3, 5):
        signature = Signature(task="segment", channels=3, classes=tuple(ClassInfo(name=str(k), color=(k, k, k)) for k in range(count)))
        message = refused(tiny(), pixels(1, 3, 32, 32), tmp_path, signature=signature)
        assert f"answers (1, 4, 32, 32) to an example of (1, 3, 32, 32); for task 'segment' it must be (1, {count}, 32, 32)" in message


def test_answers_that_no_signature_describes(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    volume = build(lambda m, x: m.conv(x)[:, None], conv=nn.Conv2d(3, 4, 1))
    assert "(B, K) or (B, K, H, W) is expected" in refused(volume, pixels(1, 3, 32, 32), tmp_path)
    many = build(lambda m, x: m.head(x.mean((2, 3))), head=nn.Linear(3, 300))
    assert "gives 300 classes" in refused(many, pixels(1, 3, 32, 32), tmp_path)
    wide = nn.Sequential(nn.Conv2d(17, 4, 1))
    assert "takes 17 channels" in refused(wide, pixels(1, 17, 32, 32), tmp_path)


@pytest.mark.parametrize("shape", [(3, 32, 32), (0, 3, 32, 32), (1, 3, 0, 32)])
def test_an_example_that_is_no_batch_of_pictures(shape: tuple[int, ...], tmp_path: Path) -> None:
    assert "give raw pixels (B, C, H, W)" in refused(tiny(), torch.zeros(shape), tmp_path)


def test_signatures_from_answers(build: type[nn.Module], pixels: Any) -> None:
    segment = infer_signature(tiny(), pixels(2, 3, 32, 40))
    assert (segment.task, segment.channels, segment.outputs, segment.scale) == ("segment", 3, 4, 1)
    assert len({entry.color for entry in segment.classes}) == len({entry.name for entry in segment.classes}) == 4
    classify = infer_signature(build(lambda m, x: m.head(x.mean((2, 3))), head=nn.Linear(5, 6)), pixels(1, 5, 32, 40))
    assert (classify.task, classify.channels, classify.outputs) == ("classify", 5, 6)


@pytest.mark.parametrize(("height", "width"), [(200, 64), (40, 300), (7, 9), (1, 1)])
def test_golden_pairs_are_the_models_own_answers_at_two_sizes(height: int, width: int, pixels: Any) -> None:
    model, example = tiny().eval(), pixels(2, 3, height, width)
    pairs = golden_pairs(model, example)
    assert len(pairs) == 2 and all(max(images.shape[1:3]) <= GOLDEN_SIDE for images, _ in pairs)
    assert height * width == 1 or pairs[0][0].shape != pairs[1][0].shape
    for images, scores in pairs:
        rows, columns = images.shape[1:3]
        windows = np.lib.stride_tricks.sliding_window_view(example[0].numpy(), (rows, columns), (1, 2))
        assert (windows == images[0].transpose(2, 0, 1)[:, None, None]).all((0, 3, 4)).any()
        session = muntin.TorchSession(model, infer_signature(model, example))
        assert replay(session, images, scores, FLOAT_LIMITS["f32"], classes=True).max_error < 1e-6  # type: ignore[arg-type]


def test_golden_images_are_cut_where_most_goes_on(pixels: Any) -> None:
    example = torch.full((1, 3, 200, 300), 7.0)
    example[:, :, 140:, 200:] = pixels(1, 3, 60, 100)
    assert all(len(np.unique(images)) > 200 for images, _ in golden_pairs(tiny().eval(), example))


def test_how_to_quantise_is_refused_where_nothing_is_quantised(tmp_path: Path, pixels: Any) -> None:
    with pytest.raises(ExportError, match="without calibration nothing is"):
        muntin.export(tiny().eval(), pixels(1, 3, 64, 64), tmp_path / "a", quantization=QuantizationConfig())
    assert list(tmp_path.iterdir()) == []


def test_an_example_without_a_batch_is_refused_with_a_signature_too(tmp_path: Path) -> None:
    signature = Signature(task="segment", channels=3, classes=(ClassInfo(name="any", color=(0, 0, 0)),))
    for shape in ((3, 8, 8), (0, 3, 8, 8)):
        with pytest.raises(ExportError, match=r"give raw pixels \(B, C, H, W\)"):
            muntin.export(nn.Conv2d(3, 1, 1), torch.zeros(shape), tmp_path / "a", signature=signature)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(
    "avx512_bf16" not in describe_hardware()["features"], reason="16 bits are computed elsewhere in FP32, or by other kernels"
)
@pytest.mark.parametrize(("height", "width"), [(5, 5), (3, 8), (8, 8), (16, 5), (1, 1)])
def test_a_map_in_a_single_padded_window_is_computed_rightly_in_16_bits(
    height: int, width: int, build: type[nn.Module], pixels: Any, pictures: Any, tmp_path: Path
) -> None:
    """OpenVINO's kernel for it leaves out the mask that hides the padding: 0.8 standard deviations, where rounding makes 0.003."""

    def run(m: Any, x: Tensor) -> Any:
        y_BHWC = m.attention(m.stem(x / 60 - 2).permute(0, 2, 3, 1))
        return m.head(y_BHWC.permute(0, 3, 1, 2))

    parts = {"stem": nn.Conv2d(3, 128, 1), "attention": LocalAttention(128, heads=2, window=8), "head": nn.Conv2d(128, 4, 1)}
    muntin.export(build(run, **parts), pixels(1, 3, 48, 40), tmp_path / "artifact")
    images = pictures(1, height, width, 3)
    exact, half = (muntin.load(tmp_path / "artifact", precision=name, shapes=())(images) for name in ("f32", "bf16"))
    assert np.sqrt(((half - exact) ** 2).mean()) < 0.02 * exact.std()
    both = np.concatenate([images, 255 - images])
    together = muntin.load(tmp_path / "artifact", precision="bf16", shapes=())(both)
    np.testing.assert_allclose(together[:1], half, atol=0.05 * float(exact.std()))
