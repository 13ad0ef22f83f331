"""The check of single layers: it passes on sound artefacts of every kind of layer, and it fails, at the right layer, where it must.

Axes: B images, C channels, H W map.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

import muntin
from muntin.artifact import Artifact
from muntin.compression import freeze, prepare_qat, set_bits
from muntin.layers import Product, SoftmaxProduct
from muntin.runtime.options import SessionOptions
from muntin.runtime.verification import artifact as verification
from muntin.runtime.verification import layerwise
from muntin.runtime.verification.layerwise import TOLERANCE, LayerCheck, verify_layers

Taps = dict[str, NDArray[Any]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Everything(nn.Module):
    """Convolutions with a stride, groups, a dilation, depthwise, with and without a bias; Linears; attention among a map's positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        width = 32
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.grouped = nn.Conv2d(width, width, 3, padding=2, dilation=2, groups=4)
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width, bias=False)
        self.project = nn.Linear(width, 3 * width)
        self.scores, self.values = Product(), SoftmaxProduct()
        self.out = nn.Linear(width, width)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        stem = torch.relu(self.stem(x / 60 - 2))
        y = self.depthwise(torch.relu(self.grouped(stem)))[..., : stem.shape[2], : stem.shape[3]] + stem
        t_BNC = y.flatten(2).transpose(1, 2)
        q, k, v = self.project(t_BNC).chunk(3, -1)
        t_BNC = t_BNC + self.out(self.values(self.scores(q / 6, k.transpose(1, 2)), v))
        y = self.head(torch.relu(t_BNC.transpose(1, 2).reshape(y.shape)))
        return F.interpolate(y, x.shape[2:], mode="nearest")


PRODUCTS = ("stem", "grouped", "depthwise", "project", "scores", "values", "out", "head")


def smooth(batch: int, height: int, width: int, seed: int) -> Tensor:
    coarse = torch.rand(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (height, width), mode="bilinear") * 255).round()


def export(model: nn.Module, path: Path, *, bits: int, widths: dict[str, int]) -> tuple[Artifact, nn.Module]:
    """A model in integers of so many bits, and its artefact."""
    example = smooth(2, 40, 56, seed=0)
    model.eval()
    changes = prepare_qat(model, [example], bits=bits)
    set_bits(model, widths)
    changes += freeze(model, [example])
    return muntin.export(model, example, path, changes=changes, sizes="fixed"), model  # one size: a third of the time


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, nn.Module]:
    """Random layers of 4 bits; of 2, 3 and 8 beside them."""
    widths = {"grouped": 8, "out": 2, "stem": 8, "project": 3}
    return export(Everything(), tmp_path_factory.mktemp("everything") / "artifact", bits=4, widths=widths)


def golden(artifact: Artifact) -> list[NDArray[np.uint8]]:
    return [images for images, _ in artifact.golden_images()]


# ---- sound artefacts ----


@pytest.mark.usefixtures("dot_products")
def test_layers_of_a_sound_artefact(everything: tuple[Artifact, nn.Module]) -> None:
    artifact, _ = everything
    checks = verify_layers(artifact, golden(artifact))
    assert sorted(check.name for check in checks) == sorted(PRODUCTS)
    assert all(check.passed and check.error <= TOLERANCE for check in checks), checks


def test_export_equals_the_frozen_model(everything: tuple[Artifact, nn.Module]) -> None:
    artifact, model = everything
    session = muntin.load(artifact.path, precision="f32", threads=1)
    for seed in (0, 5):
        x = smooth(2, 40, 56, seed)
        with torch.inference_mode():
            expected = model(x).numpy()
        scores = session(np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy().astype(np.uint8)))
        error = np.abs(scores - expected) / expected.std()
        # a value at the border of two levels may fall to either side, and moves what reads it; a wrong grid is wrong everywhere
        assert error.mean() < 0.02 and error.max() < 0.5


def test_convolutions_of_unsigned_inputs_and_other_sizes(convolutions: Any, images_of: Callable[..., NDArray[np.uint8]]) -> None:
    images = [images_of(3), images_of(3, batch=1, height=31, width=8, seed=9)]
    checks = verify_layers(convolutions.artifact, images)
    assert [check.name for check in checks] == ["stem", "body", "depthwise", "head"]
    assert all(check.passed for check in checks), checks


def test_threads_of_layer_checks(convolutions: Any) -> None:
    checks = verify_layers(convolutions.artifact, golden(convolutions.artifact), threads=1)
    assert [check.name for check in checks if check.passed] == ["stem", "body", "depthwise", "head"]
    model = onnx.load_model_from_string(convolutions.artifact.model_bytes())
    alone = layerwise._alone(model, layerwise._quantised_layers(model), 1)
    assert alone.get_session_options().intra_op_num_threads == 1


def test_float_model(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    layer = layer_maker("pixel", 5, 4, 6, 1, scale=0.9, relu=False)
    written = write_layers(tmp_path / "a", [type(layer)(**(vars(layer) | {"quantized": False}))])
    assert verify_layers(written.artifact, golden(written.artifact)) == ()
    assert muntin.verify(written.path, SessionOptions(precision="f32"), layers=True, allow_fallbacks=True).checks == ()


# ---- faults ----


def test_recorded_layer_without_a_check(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    """A product of what was moved about after rounding, which is left out of the check."""
    layers = [layer_maker("pixel", 5, 4, 6, 1, scale=0.9, relu=False)]
    model = onnx.load_model_from_string(write_layers(tmp_path / "good", layers).artifact.model_bytes())
    place, node = next((i, node) for i, node in enumerate(model.graph.node) if node.op_type == "Conv")
    model.graph.node.insert(place, onnx.helper.make_node("Transpose", [node.input[0]], ["moved"], perm=[0, 1, 2, 3]))
    model.graph.node[place + 1].input[0] = "moved"
    written = write_layers(tmp_path / "moved", layers, model=model)
    result = muntin.verify(written.path, SessionOptions(precision="f32"), layers=True, allow_fallbacks=True)
    assert result.checks == ()
    assert result.problems == (
        "layer pixel, recorded with 8-bit activations, multiplies nothing quantised in the graph, so it is not checked: export again",
    )
    assert muntin.verify(written.path, SessionOptions(precision="f32"), allow_fallbacks=True).passed


@pytest.fixture
def engine_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[onnx.ModelProto], None]], None]:
    """`engine_of(alter)`: the engine runs a model that `alter` changed; what it is compared with stays."""
    run = layerwise._run_tapped

    def change(alter: Callable[[onnx.ModelProto], None]) -> None:
        def altered(model: onnx.ModelProto, layers: Any, images: NDArray[np.uint8], threads: int) -> Taps:
            other = copy.deepcopy(model)
            alter(other)
            return run(other, layers, images, threads)

        monkeypatch.setattr(layerwise, "_run_tapped", altered)

    return change


def changed(model: onnx.ModelProto, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """Put other values into an initializer."""
    (initializer,) = (entry for entry in model.graph.initializer if entry.name == name)
    value = numpy_helper.to_array(initializer)
    initializer.CopyFrom(numpy_helper.from_array(change(value).astype(value.dtype), name))


def failed(checks: tuple[LayerCheck, ...]) -> list[str]:
    return [check.name for check in checks if not check.passed]


@pytest.mark.parametrize("name", ["stem", "body", "depthwise", "head"])
def test_wrong_weights_are_found_in_their_layer_only(convolutions: Any, engine_of: Callable[..., None], name: str) -> None:
    engine_of(lambda model: changed(model, f"{name}.weight", lambda q: np.where(np.arange(len(q)) == 1, -q.T, q.T).T))
    assert failed(verify_layers(convolutions.artifact, golden(convolutions.artifact))) == [name]


@pytest.mark.parametrize(
    ("value", "change"),
    [
        ("scale", lambda scale: scale * 1.3),
        ("zero", lambda zero: zero + 254),  # all but the lowest two levels are cut off
        ("weight_scale", lambda scale: scale * 1.05),
        ("bias", lambda bias: bias + 0.5),
    ],
)
def test_wrong_grids_and_biases(convolutions: Any, engine_of: Callable[..., None], value: str, change: Any) -> None:
    engine_of(lambda model: changed(model, f"body.{value}", change))
    assert failed(verify_layers(convolutions.artifact, golden(convolutions.artifact))) == ["body"]


@pytest.mark.usefixtures("dot_products")
@pytest.mark.parametrize("name", ["grouped", "project", "scores", "values"])
def test_output_more_than_a_step_away(everything: tuple[Artifact, nn.Module], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    artifact, _ = everything
    run = layerwise._run_tapped
    alone = {layer.name: layer for layer in layerwise._quantised_layers(onnx.load_model_from_string(artifact.model_bytes()))}
    layer = alone[name]

    def moved(share: float) -> list[str]:
        """Failed layers if one value is moved by `share` of the largest change by a step of each operand."""

        def altered(model: onnx.ModelProto, layers: Any, images: NDArray[np.uint8], threads: int) -> Taps:
            taps = run(model, layers, images, threads)
            step = 0.0
            for scale, other in zip(layer.scales, reversed(layer.inputs), strict=False):
                step += scale * float(np.abs(taps[other]).max())
            if len(layer.inputs) == 1:  # the other operand is a weight
                step = layer.scales[0] * largest_weight(model, layer)
            output = taps[layer.output].copy()
            output.flat[output.size // 2] += share * (1.5 * step + 1e-3 * np.abs(output).max())
            return taps | {layer.output: output}

        monkeypatch.setattr(layerwise, "_run_tapped", altered)
        return failed(verify_layers(artifact, golden(artifact)[:1]))

    assert moved(2) == [name]
    assert moved(0) == []


def largest_weight(model: onnx.ModelProto, layer: Any) -> float:
    values = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    (node,) = (node for node in layer.nodes if node.op_type == "DequantizeLinear" and node.input[0] in values)
    scale = values[node.input[1]].astype(np.float64)
    return float(np.abs(values[node.input[0]]).max() * scale.max())


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_infinite_error_of_infinite_scores(convolutions: Any, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    run = layerwise._run_tapped
    monkeypatch.setattr(layerwise, "_run_tapped", lambda *a: {k: v * value if k == "depthwise.out" else v for k, v in run(*a).items()})
    checks = {check.name: check for check in verify_layers(convolutions.artifact, golden(convolutions.artifact))}
    assert checks["depthwise"].error == float("inf") and not checks["depthwise"].passed


# ---- as a part of verification ----


def test_verify_with_layers(convolutions: Any) -> None:
    assert muntin.verify(convolutions.path).checks == ()
    result = muntin.verify(convolutions.path, layers=True)
    assert result.passed and [check.name for check in result.checks] == ["stem", "body", "depthwise", "head"]


def test_failed_layer_check(convolutions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = {"stem": 0.3, "body": 2.5, "depthwise": 0.0, "head": 1.0}
    checks = tuple(LayerCheck(name=name, error=error) for name, error in errors.items())
    given: list[int] = []
    monkeypatch.setattr(verification, "verify_layers", lambda artifact, images, *, threads: (given.append(threads), checks)[1])
    result = muntin.verify(convolutions.path, SessionOptions(threads=1), layers=True)
    assert not result.passed and result.checks == checks and given == [1]
    (problem,) = result.problems
    assert problem.startswith("layer body: OpenVINO's result is 2.5 quantisation steps from the result of its integers (allowed: 1)")
    assert "\n" not in problem
