"""Sizes that models take: found, given, and used by everything that opens the artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

import muntin
from muntin.artifact import Sizes
from muntin.deployment import infer_signature
from muntin.deployment.sizes.probe import Probe
from muntin.deployment.sizes.requested import parse_sizes
from muntin.errors import DataError, ExportError


class Positions(nn.Module):
    """A transformer with a learned position for each patch of one size."""

    def __init__(self, side: int = 32, patch: int = 8, classes: int = 5) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, patch, patch)
        self.positions = nn.Parameter(torch.randn(1, 32, side // patch, side // patch) / 10)
        self.norm, self.project = nn.LayerNorm(32), nn.Linear(32, 96)
        self.mix, self.head = nn.Linear(32, 32), nn.Linear(32, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        tokens_BNC = (self.embed(x_BCHW / 255) + self.positions).flatten(2).transpose(1, 2)
        query, key, value = self.project(self.norm(tokens_BNC)).chunk(3, -1)
        tokens_BNC = tokens_BNC + self.mix(torch.softmax(query @ key.transpose(1, 2) / 6, -1) @ value)
        scores: Tensor = self.head(tokens_BNC.mean(1))
        return scores


class Skips(nn.Module):
    """An encoder and a decoder with skips: sides must be multiples of 2 to the power of `levels`."""

    def __init__(self, levels: int = 5) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv2d(16 if level else 3, 16, 3, 2, 1) for level in range(levels))
        self.up = nn.ModuleList(nn.ConvTranspose2d(16, 16, 2, 2) for _ in range(levels))
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        maps = [x_BCHW / 255]
        for layer in self.down:
            maps.append(layer(maps[-1]).relu())
        x = maps.pop()
        for layer, skip in zip(self.up, reversed(maps), strict=True):
            x = layer(x)
            x = x + skip if skip.shape[1] == x.shape[1] else x
        scores: Tensor = self.head(x)
        return scores


def padded(image: np.ndarray, height: int, width: int) -> np.ndarray:
    return np.pad(image, ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)), mode="edge")


@pytest.mark.parametrize("calibrated", [False, True])
def test_model_of_one_size(calibrated: bool, pixels: Any, pictures: Any, tmp_path: Path) -> None:
    model, example = Positions().eval(), pixels(2, 3, 32, 32)
    artifact = muntin.export(model, example, tmp_path / "a", calibration=[example] if calibrated else None, sizes="widest")
    manifest = artifact.manifest
    assert manifest.signature.sizes == Sizes.only(32, 32)
    assert "takes 32 x 32 only: the model fails on pixels of shape (1, 3, 21, 29): " in str(manifest.measured["notes"])
    assert [images.shape for images, _ in artifact.golden_images()] == [(1, 32, 32, 3)]
    dims = onnx.load_model_from_string(artifact.model_bytes()).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims] == [0, 32, 32, 3]
    assert muntin.verify(artifact.path, layers=calibrated).passed
    images = pictures(3, 32, 32, 3)
    answers = []
    for options in ({}, {"dynamic": True}, {"engine": "onnxruntime"}):
        session = muntin.load(artifact.path, precision="f32", **options)  # type: ignore[arg-type]
        answers.append(session(images))
        with pytest.raises(DataError, match="images of 33 x 40 pixels: the model takes 32 x 32: resize or pad them to 32 x 32, or"):
            session(pictures(1, 33, 40, 3))
        with pytest.raises(DataError, match="the model takes 32 x 32"):
            session.warm_up([(1, 48, 48)])
        picture = pictures(1, 90, 60, 3)[0]  # the middle square is resized
        np.testing.assert_array_equal(muntin.predict(session, picture), muntin.predict(session, picture[15:75]))
    if not calibrated:
        plain = onnx.load(muntin.write_standalone(artifact, tmp_path / "plain.onnx"))
        axes = plain.graph.input[0].type.tensor_type.shape.dim
        assert [axis.dim_param or axis.dim_value for axis in axes] == ["batch", 32, 32, 3]
        metadata = {entry.key: entry.value for entry in plain.metadata_props}
        assert Sizes.model_validate_json(metadata["sizes"]) == manifest.signature.sizes
        with torch.inference_mode():
            expected = model(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
        for answer in answers:
            np.testing.assert_allclose(answer, expected, atol=1e-3 * expected.std())


def test_multiples(pixels: Any, pictures: Any, tmp_path: Path) -> None:
    model, example = Skips().eval(), pixels(1, 3, 64, 96)
    artifact = muntin.export(model, example, tmp_path / "a", calibration=[example], sizes="widest")
    sizes = artifact.manifest.signature.sizes
    assert sizes == Sizes.both(multiple=32, min=32)
    assert "takes height and width multiples of 32 only: the model " in str(artifact.manifest.measured["notes"])
    assert {images.shape[1:3] for images, _ in artifact.golden_images()} == {(64, 64), (32, 64)}
    for dynamic in (False, True):
        session = muntin.load(artifact.path, dynamic=dynamic)
        picture = pictures(1, 70, 50, 3)[0]
        whole = session(padded(picture, 96, 64)[None])[0]
        np.testing.assert_array_equal(muntin.predict(session, picture, output="scores"), whole[:, :70, :50])
        with pytest.raises(DataError, match="tile=50: the model takes height and width multiples of 32: give 32, or leave tile out"):
            muntin.predict(session, picture, tile=50)
        assert muntin.predict(session, pictures(1, 200, 100, 3)[0], tile=64).shape == (200, 100)


def test_smallest_side(pixels: Any, pictures: Any, tmp_path: Path) -> None:
    """The last map vanishes below 32 pixels, as in a ConvNeXt."""
    strides = [nn.Conv2d(8, 8, 2, 2) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), *strides, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    artifact = muntin.export(model, pixels(1, 3, 64, 64), tmp_path / "a", sizes="widest")
    assert artifact.manifest.signature.sizes.text == "height and width from 32"
    session, images = muntin.load(artifact.path, precision="f32"), pictures(1, 33, 71, 3)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
    np.testing.assert_allclose(session(images), expected, atol=0.01 * expected.std())
    assert muntin.predict(session, pictures(1, 20, 50, 3)[0]).shape == (4,)


def test_pooling_to_several_values(build: type[nn.Module], pixels: Any, pictures: Any, tmp_path: Path) -> None:
    """No graph of it works for every size, one of one size does. The reason is that of the attempt before."""
    model = build(
        lambda m, x: m.head(F.adaptive_avg_pool2d(m.conv(x / 255), (3, 2)).flatten(1)), conv=nn.Conv2d(3, 8, 3, 2, 1), head=nn.Linear(48, 4)
    ).eval()
    artifact = muntin.export(model, pixels(1, 3, 50, 60), tmp_path / "a", sizes="widest")
    assert artifact.manifest.signature.sizes == Sizes.only(50, 60)
    assert "takes 50 x 60 only: adaptive pooling to 3 x 2 has no form" in str(artifact.manifest.measured["notes"])
    images = pictures(2, 50, 60, 3)
    with torch.inference_mode():
        expected = model(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()
    np.testing.assert_allclose(muntin.load(artifact.path, precision="f32")(images), expected, atol=1e-3 * expected.std())


def test_condition_that_multiples_meet(build: type[nn.Module], pixels: Any, tmp_path: Path) -> None:
    model = build(
        lambda m, x: m.conv(x) if x.shape[2] % 32 or x.shape[3] % 32 else m.conv(x) * 2, conv=nn.Conv2d(3, 4, 3, padding=1)
    ).eval()
    assert muntin.export(model, pixels(1, 3, 64, 96), tmp_path / "a").manifest.signature.sizes.text == "height and width multiples of 32"


def test_given_sizes(pixels: Any, tmp_path: Path, tiny: Any, refused: Any) -> None:
    bounded = muntin.export(tiny(), pixels(1, 3, 48, 64), tmp_path / "a", sizes={"multiple": 16, "min": 32, "max": 128}, shape=(2, 40, 500))
    assert bounded.manifest.signature.sizes == Sizes.both(multiple=16, min=32, max=128)
    assert bounded.manifest.shape == (2, 48, 128)
    assert "compiled for 48 x 128, the nearest size to 40 x 500 that it takes" in str(bounded.manifest.measured["notes"])
    picture = np.random.default_rng(0).integers(0, 256, (20, 300, 3)).astype(np.uint8)  # extended, and in tiles of 128
    assert muntin.predict(muntin.load(bounded.path), picture).shape == (20, 300)
    fixed = muntin.export(tiny(), pixels(1, 3, 40, 56), tmp_path / "b", sizes="fixed")
    assert fixed.manifest.signature.sizes == Sizes.only(40, 56)
    signature = infer_signature(tiny(), pixels(1, 3, 40, 56)).model_copy(update={"sizes": Sizes.both(multiple=8)})
    assert muntin.export(tiny(), pixels(1, 3, 40, 56), tmp_path / "c", signature=signature).manifest.signature == signature
    empty = tmp_path / "empty"
    empty.mkdir()
    message = refused(Skips().eval(), pixels(1, 3, 64, 64), empty, sizes={"multiple": 8})
    assert "fails on pixels of shape (1, 3, " in message and message.endswith("pads and cuts to multiples of a number")
    text = refused(tiny(), pixels(1, 3, 40, 56), empty, sizes={"multiple": 32})
    assert text == "the example of 40 x 56 is not of the sizes, height and width multiples of 32: give one of 64 x 64"


@pytest.mark.parametrize("sizes", ["all", {"multiple": 0}, {"step": 32}, {"min": 64, "max": 32}, {"min": "small"}, 224])
def test_wrong_sizes(sizes: Any, pixels: Any, tmp_path: Path, tiny: Any, refused: Any) -> None:
    assert f"sizes={sizes!r}: " in refused(tiny(), pixels(1, 3, 64, 64), tmp_path, sizes=sizes)


def test_sizes_as_text() -> None:
    assert [parse_sizes(text) for text in ("widest", "any", "fixed")] == ["widest", "any", "fixed"]
    assert parse_sizes("multiple=32,max=640") == {"multiple": 32, "max": 640}
    for text in ("", "224", "multiple=", "multiple=-1", "side=3", "min=64;max=128"):
        with pytest.raises(ExportError, match="give any, fixed, widest, or multiple=32,min=64,max=1024"):
            parse_sizes(text)


def test_each_size_is_computed_once(build: type[nn.Module], pixels: Any) -> None:
    sizes: list[tuple[int, ...]] = []

    def run(m: Any, x: Tensor) -> Tensor:
        sizes.append(tuple(x.shape[2:]))
        if x.shape[2] % 16 or x.shape[3] % 16 or min(x.shape[2:]) < 48:
            raise RuntimeError("multiples of 16 from 48")
        return m.conv(x)  # type: ignore[no-any-return]

    model, example = build(run, conv=nn.Conv2d(3, 2, 1)).eval(), pixels(1, 3, 96, 96)
    probe = Probe(model, example, infer_signature(model, example))
    sizes.clear()
    assert probe.widest()[0] == Sizes.both(multiple=16, min=48)
    assert len(sizes) == len(set(sizes)) < 40
