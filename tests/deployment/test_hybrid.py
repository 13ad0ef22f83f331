"""Exported hybrids of all sizes, in floats and in integers: each engine computes the PyTorch model, whole and in exact tiles.

The most expensive exports of this room: what needs one is tested here. Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import muntin
from muntin import create_model
from muntin.compression import remove_closed_channels
from muntin.errors import DataError
from muntin.graph.artifacts.engine_check import FLOAT_LIMITS
from muntin.graph.artifacts.engine_check import INTEGER_LIMITS as LIMITS
from muntin.layers import ChannelGate
from muntin.runtime.engines.openvino.workarounds import computes_with_sizes
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.options import SessionOptions

pytestmark = pytest.mark.slow
ODD_SIZES = ((1, 64, 64), (3, 65, 33), (1, 1, 37), (1, 1, 1))
TILED = ((203, 331, 64), (64, 300, 100), (1, 1, 1), (5, 700, 128))
"""Heights, widths and tiles."""
TWO_STAGES: dict[str, Any] = {
    "stem": (8, 16), "pairs": (0,), "dims": (32, 32), "depths": (1, 1), "head_dim": 16, "window": 4, "latents": 4, "decoder": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def floats(export_model: Any, trained: Any, lively: Any) -> Any:
    torch.manual_seed(0)
    return export_model(trained(lively(create_model("hybrid-xs", classes=5, options=TWO_STAGES))), quantized=False, sizes="any")


@pytest.fixture(scope="module")
def integers(export_model: Any, trained: Any) -> Any:
    """Of one stage in a width that integer kernels are for."""
    torch.manual_seed(0)
    return export_model(trained(create_model("hybrid-xxs", classes=5, options={"depths": (1,)})), quantized=True, sizes="any")


@pytest.fixture
def exported(request: pytest.FixtureRequest) -> Any:
    """The fixture that a parameter names."""
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("size", ODD_SIZES)
def test_floats_at_any_size(floats: Any, size: tuple[int, int, int], pictures: Any) -> None:
    images = pictures(*size, 3)
    expected = floats.expected(images)
    for engine in ("openvino", "onnxruntime"):
        scores = muntin.load(floats.artifact.path, engine=engine, precision="f32", threads=1)(images)
        assert np.abs(scores - expected).max() <= 1e-4 * expected.std()


def test_manifest_of_floats(floats: Any) -> None:
    manifest = floats.artifact.manifest
    assert manifest.golden_tolerance == {"openvino": FLOAT_LIMITS, "onnxruntime": FLOAT_LIMITS}
    assert {entry["pass"] for entry in manifest.passes} == {"slim", "fold"}  # no norm and no gate is computed there
    assert any(isinstance(layer, ChannelGate) for layer in floats.model.modules())  # the caller's model stays as it is
    assert not any("rounding to integers" in note for note in manifest.measured["notes"])


@pytest.mark.parametrize("size", ODD_SIZES)
def test_integers_at_any_size(integers: Any, size: tuple[int, int, int], pictures: Any) -> None:
    images = pictures(*size, 3)
    expected = integers.expected(images)
    scores = muntin.load(integers.artifact.path, precision="f32", threads=1)(images)
    assert scores.shape == (size[0], 5, *size[1:])
    error = np.abs(scores - expected) / expected.std()
    assert error.max() <= LIMITS["f32"].max_error
    assert error.mean() <= 0.01  # a value at the edge of a grid's step may fall to the other side; a wrong graph is wrong everywhere
    assert (scores.argmax(1) == expected.argmax(1)).mean() >= LIMITS["f32"].label_agreement


def test_verified_integers_in_both_engines(integers: Any) -> None:
    for engine in ("openvino", "onnxruntime"):
        result = muntin.verify(integers.artifact.path, SessionOptions(engine=engine, threads=1))
        assert result.passed, result.problems
    assert len({golden.shape for golden in result.golden}) == 2  # a size that was baked in would show


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize(("exported", "most"), [("integers", 0.05), ("floats", 1e-4)], indirect=["exported"])
def test_batch_independence(exported: Any, most: float, engine: str, pictures: Any) -> None:
    """But for the last bits of floats, by which a value may fall to the other side of a grid's step."""
    session = muntin.load(exported.artifact.path, engine=engine, precision="f32", threads=1)
    images = pictures(4, 70, 50, 3)
    together, alone = session(images), np.concatenate([session(image[None]) for image in images])
    assert np.abs(together - alone).max() <= most * together.std()
    assert np.abs(together - alone).mean() <= most / 50 * together.std()
    assert not np.allclose(together[0], together[1], atol=together.std() / 10)  # they are several images


def cut(model: nn.Module) -> nn.Module:
    """A copy without its closed channels."""
    model = copy.deepcopy(model)
    remove_closed_channels(model)
    return model


@pytest.mark.usefixtures("dot_products")
def test_manifest_layers_and_passes(integers: Any) -> None:
    manifest = integers.artifact.manifest
    assert all(record.activation_bits == 8 for record in manifest.layers)
    assert {entry["pass"] for entry in manifest.passes} == {"slim", "fold", "quantize"}
    assert manifest.measured["hardware"] and manifest.precision in ("bf16", "f32")
    by_name = {record.name: record for record in manifest.layers}
    stem = by_name["stem.0.conv"]
    assert (stem.kind, stem.parameters, stem.macs) == ("Conv2d", 8 * 3 * 9 + 8, 32 * 32 * 8 * 3 * 9)
    head = by_name["stages.0.blocks.0.mlp.expand"]
    hidden = cut(integers.model).get_submodule("stages.0.blocks.0.mlp.expand").out_features
    assert hidden < 256 and hidden % 16 == 0  # some of the 256 are closed
    assert (head.kind, head.parameters, head.macs) == ("Linear", 128 * hidden + hidden, 64 * 128 * hidden)  # 4 x 4 tokens padded to 8 x 8


@pytest.mark.usefixtures("dot_products")
def test_stored_weights(integers: Any) -> None:
    manifest, layers = integers.artifact.manifest, cut(integers.model).modules()
    weights = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear | nn.Conv2d))
    stored = [record for record in manifest.tensors.values() if record.packing == "int" and record.bits == 8]
    assert sum(int(np.prod(record.shape)) for record in stored) == weights
    assert (integers.artifact.path / "weights.safetensors").stat().st_size < 1.15 * weights


def test_floats_compute_nothing_with_sizes(floats: Any) -> None:
    """They run in 16 bits at dynamic sizes."""
    assert not computes_with_sizes(openvino.Core().read_model(model=floats.artifact.model_bytes(), weights=b""))


def test_standalone_of_a_segmenter(integers: Any, assert_standalone: Callable[..., None], tmp_path: Path) -> None:
    assert_standalone(integers.artifact, tmp_path / "plain.onnx")


@pytest.mark.parametrize(("height", "width", "tile"), TILED)
@pytest.mark.parametrize("exported", ["floats", "integers"], indirect=True)
def test_exact_tiles(exported: Any, height: int, width: int, tile: int, assert_exact_tiles: Callable[..., None]) -> None:
    assert_exact_tiles(exported.artifact, height, width, tile)


@pytest.fixture(scope="module")
def session(floats: Any) -> Any:
    return muntin.load(floats.artifact.path, precision="f32", shapes=(), cache=False)


def test_exact_tiles_in_openvino(session: Any, pictures: Any) -> None:
    picture = pictures(1, 150, 170, 3)[0]
    steps: list[tuple[int, int]] = []
    tiled = muntin.predict(session, picture, output="scores", exact=True, tile=64, progress=lambda *done: steps.append(done))
    whole = muntin.predict(session, picture, output="scores")
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=1e-5 * whole.std())
    assert steps == [(number + 1, steps[-1][1]) for number in range(len(steps))]
    assert len(steps) == steps[-1][1] > 1


def test_wrong_arguments_of_tiles(session: Any, pictures: Any) -> None:
    picture = pictures(1, 64, 64, 3)[0]
    with pytest.raises(DataError, match="exact tiles share no pixels"):
        muntin.predict(session, picture, exact=True, overlap=4)
    with pytest.raises(DataError, match="give a whole number of pixels from 1"):
        muntin.predict(session, picture, exact=True, tile=0)


@pytest.mark.soak
def test_integers_of_several_stages(export_model: Any, trained: Any, pictures: Any) -> None:
    torch.manual_seed(0)
    options = {"stem": (8, 16), "pairs": (0,), "dims": (64, 128), "depths": (1, 1), "head_dim": 32}
    exported = export_model(trained(create_model("hybrid-xxs", classes=5, options=options)), quantized=True, sizes="any")
    session = muntin.load(exported.artifact.path, precision="f32", threads=1)
    for size in ODD_SIZES:
        images = pictures(*size, 3)
        expected = exported.expected(images)
        error = np.abs(session(images) - expected) / max(expected.std(), 1e-6)
        assert error.max() <= LIMITS["f32"].max_error and error.mean() <= 0.01, size
