"""The ONNX graph: its face, its names, its integers, and models that have none. Axes: B images, C channels, H W map."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.artifact import ClassInfo, Signature, Sizes
from muntin.compression import freeze, prepare_qat
from muntin.deployment.capture.model_contract import answer_to
from muntin.deployment.capture.onnx_export import COMPUTE, PixelInput, _traced_example, canonical_names, to_onnx
from muntin.deployment.capture.trained_grids import take_grids
from muntin.deployment.export import export
from muntin.errors import ExportError
from muntin.graph.quantize import with_grids
from muntin.runtime import load


def signature(classes: int, task: Any = "segment", channels: int = 3) -> Signature:
    return Signature(task=task, channels=channels, classes=tuple(ClassInfo(name=f"{k}", color=(k, k, k)) for k in range(classes)))


def run(proto: onnx.ModelProto, images_BHWC: np.ndarray) -> Any:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images_BHWC})[0]


def torch_answer(model: nn.Module, images_BHWC: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        scores: Tensor = PixelInput(model)(torch.from_numpy(images_BHWC))
    return np.asarray(scores)


def products(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    names = [node.name for node in proto.graph.node]
    assert len(set(names)) == len(names)
    return {node.name: node for node in proto.graph.node if node.op_type in COMPUTE}


@pytest.fixture(scope="module")
def awkward(build: type[nn.Module]) -> nn.Module:
    """Names that clash with the graph's own, a layer used twice, and one under two names."""

    def run(m: Any, x: Tensor) -> Any:
        x = m.model(torch.relu(m.scores(x / 64 - 2)))
        x = m.alias(torch.relu(m.model(torch.relu(x))))
        x = m.linear(x.permute(0, 2, 3, 1))
        return m.images(m.add(torch.relu(x)).permute(0, 3, 1, 2))

    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3, padding=1)
    parts = {"scores": nn.Conv2d(3, 8, 3, padding=1), "model": conv, "alias": conv, "linear": nn.Linear(8, 8)}
    return build(run, **parts, add=nn.Linear(8, 8, bias=False), images=nn.Conv2d(8, 4, 1)).eval()


def test_node_names_of_layers(awkward: nn.Module, pixels: Callable[..., Tensor], pictures: Callable[..., np.ndarray]) -> None:
    proto = to_onnx(awkward, pixels(1, 3, 32, 32), signature(4))
    onnx.checker.check_model(proto, full_check=True)  # every value has one name
    assert list(products(proto)) == ["scores", "model", "model/2", "model/3", "linear", "add", "images"]
    images = pictures(2, 21, 34, 3)
    np.testing.assert_allclose(run(proto, images), torch_answer(awkward, images), rtol=1e-4, atol=1e-5)


def test_graph_inputs_and_outputs(awkward: nn.Module, pixels: Callable[..., Tensor]) -> None:
    proto = to_onnx(awkward, pixels(1, 3, 32, 32), signature(4))
    (images,), (scores,) = proto.graph.input, proto.graph.output
    assert (images.name, images.type.tensor_type.elem_type) == ("images", onnx.TensorProto.UINT8)
    dims = images.type.tensor_type.shape.dim
    assert [bool(dim.dim_param) for dim in dims] == [True, True, True, False] and dims[3].dim_value == 3
    assert (scores.name, scores.type.tensor_type.elem_type) == ("scores", onnx.TensorProto.FLOAT)
    assert [entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")] == [20]
    assert not proto.functions


def test_nodes_of_quantised_layers(build: type[nn.Module], pixels: Callable[..., Tensor]) -> None:
    def run(m: Any, x: Tensor) -> Any:
        return m.linear(torch.relu(m.conv(x / 255)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = build(run, conv=nn.Conv2d(3, 8, 3, groups=1), linear=nn.Linear(8, 4))
    prepare_qat(model, [pixels(1, 3, 32, 32)], bits=8)
    freeze(model)
    model.run = lambda m, x: F.pad(run(m, x), (1, 1, 1, 1))  # type: ignore[assignment]  # back to the size of the input
    grids = take_grids(model)
    captured = to_onnx(model, pixels(1, 3, 32, 32), signature(4))
    example = {"images": np.zeros((1, 32, 32, 3), np.uint8)}
    proto = with_grids(captured, grids, {}, example=example, half=True).quantized().model
    made = {output: node for node in proto.graph.node for output in node.output}
    weights = {item.name: item for item in proto.graph.initializer}
    for name, (_, shape) in {"conv": (0, (8, 3, 3, 3)), "linear": (1, (8, 4))}.items():
        activation, weight = (made[value] for value in products(proto)[name].input[:2])
        assert activation.op_type == weight.op_type == "DequantizeLinear"
        assert made[activation.input[0]].op_type == "QuantizeLinear"
        assert activation.input[1:] == made[activation.input[0]].input[1:]  # one grid for both
        stored = weights[weight.input[0]]
        assert stored.data_type == onnx.TensorProto.INT8 and tuple(stored.dims) == shape
    assert Counter(node.op_type for node in proto.graph.node)["QuantizeLinear"] == 2


def test_float32_scores_of_half_precision(
    build: type[nn.Module], pixels: Callable[..., Tensor], pictures: Callable[..., np.ndarray]
) -> None:
    model = build(lambda m, x: m.conv(x / 255).half(), conv=nn.Conv2d(3, 2, 1)).eval()
    proto = to_onnx(model, pixels(1, 3, 32, 32), signature(2))
    assert run(proto, pictures(1, 8, 9, 3)).dtype == np.float32


def test_canonical_names(awkward: nn.Module) -> None:
    names = canonical_names(awkward)
    assert names["alias"] == names["model"] == "model" and names[""] == "" and names["add"] == "add"


def cases() -> dict[str, tuple[Callable[[Any, Tensor], Any], str]]:
    def wants_64(m: Any, x: Tensor) -> Any:
        if x.shape[2] != 64:
            raise ValueError("only 64 rows")
        return m.conv(x)

    def depends_on_data(m: Any, x: Tensor) -> Any:
        return m.conv(x) if x.mean() > 5 else m.conv(x) * 2

    def has_no_operator(m: Any, x: Tensor) -> Any:
        y = m.conv(x)
        return y + torch.linalg.svdvals(y[:, :, :4, :4]).sum()

    def fails_on_types(m: Any, x: Tensor) -> Any:
        return m.conv(x) + None if x.shape[2] > 100 else m.conv(x)

    return {
        "size": (wants_64, r"cannot be exported for every size: only 64 rows"),
        "data": (depends_on_data, r"cannot be exported for every size: .*data-dependent"),
        "pixels": (lambda m, x: m.conv(x / 255 if x.max() > 1 else x), r"data-dependent.*choose with torch.where"),
        "linspace": (lambda m, x: m.conv(x) * torch.linspace(-1, 1, x.shape[3]), r"taken for a number: compute positions by torch.arange"),
        "round": (
            lambda m, x: F.interpolate(m.conv(F.interpolate(x, (round(x.shape[2] / 2), x.shape[3] // 2))), x.shape[2:]),
            r"compute sizes from sizes with //",
        ),
        "operator": (has_no_operator, r"cannot be exported for every size: .*svd"),
        "type": (fails_on_types, r"cannot be exported for every size: unsupported operand"),
        "adaptive": (lambda m, x: F.interpolate(F.adaptive_avg_pool2d(m.conv(x), (7, 3)), x.shape[2:]), r"adaptive pooling to 7 x 3"),
        "row": (lambda m, x: m.conv(x) + F.adaptive_avg_pool1d(m.conv(x).flatten(2), 4).mean(), r"adaptive pooling to 4 has no form"),
        "max": (lambda m, x: F.interpolate(F.adaptive_max_pool2d(m.conv(x), 4), x.shape[2:]), r"adaptive pooling to 4 x 4"),
        "large": (
            lambda m, x: m.conv(x if x.shape[2] < 300 else -x),
            r"where height < 300 \(.*test_onnx_export.py:\d+ in <lambda>\), and computes",
        ),
        "small": (
            lambda m, x: m.conv(x if x.shape[3] > 90 else -x),
            r"where width > 90 .*, and computes otherwise elsewhere, as for 1 x 65 x 65",
        ),
        "dictionary": (lambda m, x: {"out": m.conv(x)}, r"the model answers dict .*: wrap it"),
        "labels": (lambda m, x: m.conv(x).argmax(1, keepdim=True), r"the model answers torch.int64 .*: wrap it"),
        "nan": (lambda m, x: m.conv(x) * float("nan"), r"answers NaN or infinity"),
        "smaller": (lambda m, x: m.conv(x)[:, :, ::2, ::2], r"answers \(1, 4, 32, 32\) .* it must be \(1, 4, 64, 64\)"),
        "classes": (lambda m, x: m.conv(x)[:, :3], r"answers \(1, 3, 64, 64\) .* it must be \(1, 4, 64, 64\)"),
    }


POOLS = {
    "mean of overlapping windows": nn.AvgPool2d(3, (2, 1), (1, 1), ceil_mode=True, count_include_pad=False),
    "maximum of overlapping windows": nn.MaxPool2d(3, 2, 1, ceil_mode=True),
    "a window that PyTorch drops": nn.AvgPool2d(1, 2, ceil_mode=True),
}


def answers_as_its_model_at_every_size(model: nn.Module, pixels: Callable[..., Tensor], path: Path) -> None:
    export(model, pixels(1, 3, 64, 64), path, sizes="any")
    sessions = [load(path, precision="f32", shapes=(), cache=False, dynamic=dynamic) for dynamic in (False, True)]
    sessions.append(load(path, engine="onnxruntime", shapes=()))
    for height, width in ((1, 1), (2, 9), (5, 64), (64, 3), (33, 31)):
        images = pixels(1, 3, height, width)
        with torch.inference_mode():
            expected = model.eval()(images.float()).numpy()
        for session in sessions:
            scores = session(np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy().astype(np.uint8)))
            np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4 * expected.std())


def test_out_of_memory_message() -> None:
    class Hungry(nn.Module):
        def forward(self, pixels_BCHW: Tensor) -> Tensor:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 68719476736 bytes")

    with pytest.raises(ExportError, match=r"^no memory for the model's answer to pixels of shape \(1, 3, 8, 8\): Default"):
        answer_to(Hungry(), torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize("kind", POOLS)
def test_pooling_with_ceil_mode(kind: str, pixels: Callable[..., Tensor], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), POOLS[kind], POOLS[kind], nn.Conv2d(8, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    answers_as_its_model_at_every_size(model, pixels, tmp_path / "a")


class SamePadding(nn.Conv2d):
    """As TensorFlow pads: so much that the map is ceil(size / stride) large, with Python's idiom for it."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = ((-(-size // 2) - 1) * 2 + 3 - size for size in x_BCHW.shape[2:])
        return super().forward(F.pad(x_BCHW, (width // 2, width - width // 2, height // 2, height - height // 2)))


def test_floor_division_of_sizes(pixels: Callable[..., Tensor], tmp_path: Path) -> None:
    convolutions = [SamePadding(channels, 8, 3, 2) for channels in (3, 8, 8)]
    model = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    answers_as_its_model_at_every_size(model, pixels, tmp_path / "a")


class Padded(nn.Module):
    """Pads to whole strides if it needs to and cuts the answer, as many decoders do; or brings it to the size, where it is another."""

    def __init__(self, stride: int, resize: bool) -> None:
        super().__init__()
        self.stride, self.resize = stride, resize
        self.down, self.up = nn.Conv2d(3, 8, stride, stride, stride // 2 if resize else 0), nn.ConvTranspose2d(8, 4, stride, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[2:]
        if (height % self.stride or width % self.stride) and not self.resize:
            x_BCHW = F.pad(x_BCHW, (0, -width % self.stride, 0, -height % self.stride))
        scores: Tensor = self.up(F.relu(self.down(x_BCHW / 255)))
        if scores.shape[2:] != (height, width) and self.resize:
            scores = F.interpolate(scores, (height, width), mode="bilinear")
        return scores[:, :, :height, :width]


@pytest.mark.parametrize(("stride", "resize"), [(2, True), (2, False), (8, False)])
def test_padding_of_odd_sides(stride: int, resize: bool, pixels: Callable[..., Tensor], pictures: Callable[..., np.ndarray]) -> None:
    model = Padded(stride, resize).eval()
    proto = to_onnx(model, pixels(1, 3, 64, 64), signature(4))
    for height, width in ((33, 47), (64, 64), (50, 40), (48, 31)):
        images = pictures(1, height, width, 3)
        np.testing.assert_allclose(run(proto, images), torch_answer(model, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", cases())
def test_model_without_a_graph(case: str, build: type[nn.Module], pixels: Callable[..., Tensor], capfd: pytest.CaptureFixture[str]) -> None:
    forward, message = cases()[case]
    level = logging.getLogger("torch").level
    with pytest.raises(ExportError, match=message) as caught:
        to_onnx(build(forward, conv=nn.Conv2d(3, 4, 3, padding=1)), pixels(1, 3, 64, 64), signature(4))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("torch").level == level


def test_adaptive_pooling_to_one_value(build: type[nn.Module], pixels: Callable[..., Tensor], pictures: Callable[..., np.ndarray]) -> None:
    model = build(
        lambda m, x: m.head(m.pool(m.conv(x / 255)).flatten(1)), conv=nn.Conv2d(3, 8, 3), pool=nn.AdaptiveAvgPool2d(1), head=nn.Linear(8, 5)
    )
    proto = to_onnx(model, pixels(1, 3, 64, 64), signature(5, "classify"))
    for shape in ((1, 64, 64, 3), (2, 33, 70, 3), (1, 3, 5, 3)):
        images = pictures(*shape)
        np.testing.assert_allclose(run(proto, images), torch_answer(model, images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64)])
def test_example_of_another_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ExportError, match=r"give raw pixels \(B, 3, H, W\)"):
        to_onnx(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.zeros(shape), signature(4))


def test_model_in_training_mode(build: type[nn.Module], pixels: Callable[..., Tensor], pictures: Callable[..., np.ndarray]) -> None:
    model = build(
        lambda m, x: m.drop(m.norm(m.conv(x / 255))), conv=nn.Conv2d(3, 4, 1), norm=nn.BatchNorm2d(4), drop=nn.Dropout(0.5)
    ).train()
    proto = to_onnx(model, pixels(2, 3, 32, 32), signature(4))
    images = pictures(1, 9, 8, 3)
    np.testing.assert_allclose(run(proto, images), torch_answer(model.eval(), images), rtol=1e-4, atol=1e-5)


def test_random_state_is_kept() -> None:
    before = torch.get_rng_state()
    _traced_example(torch.zeros(1, 3, 8, 8), Sizes())
    assert torch.equal(torch.get_rng_state(), before)
