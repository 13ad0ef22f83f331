"""HybridNet: shapes at every size, gradients, independence of images, initial restoration, linear cost."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from muntin.artifact.manifest import Task
from muntin.models import PRESETS, HybridNet, create_model

TASKS: list[tuple[Task, int]] = [("segment", 1), ("classify", 1), ("restore", 1), ("restore", 2)]
SIZES = [*itertools.product([1, 2, 3], [1, 33]), (31, 2), (33, 31), (64, 40)]
VARIANTS: list[dict[str, Any]] = [
    {"attention": "local"},
    {"attention": "global"},
    {"attention": "dense"},
    {"block": "serial"},
    {"gate": False},
    {"finest": 2},
    {"finest": 8},
    {"finest": 8, "dims": (128,), "depths": (2,), "pairs": (1, 0)},
    {"pairs": (0, 0), "dims": (128,), "depths": (1,)},
    {"dims": (128, 192, 128), "depths": (1, 2, 1), "window": 3, "latents": 7},
    {"stem": (8, 16), "pairs": (1,), "dims": (128,), "depths": (1,)},
    {"stem": (8, 16), "pairs": (0,), "dims": (128,), "depths": (1,), "finest": 8},
    {"stem": (8, 16), "pairs": (0,), "dims": (64, 128), "depths": (2, 1), "head_dim": 32, "finest": 8},
    {"stem": (8, 16), "pairs": (0,), "dims": (128,), "depths": (1,), "finest": 2, "fusion": "upernet"},
]


def image(*shape: int) -> Tensor:
    return torch.rand(*shape) * 255


def expected_shape(x_BCHW: Tensor, task: Task, classes: int, scale: int) -> tuple[int, ...]:
    batch, channels, height, width = x_BCHW.shape
    if task == "classify":
        return batch, classes
    return batch, channels if task == "restore" else classes, scale * height, scale * width


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("task", "scale", "channels"), [("segment", 1, 1), ("classify", 1, 4), ("restore", 1, 16), ("restore", 2, 4)])
def test_presets_at_every_size(name: str, task: Task, scale: int, channels: int) -> None:
    model = create_model(name, task=task, classes=5, channels=channels, scale=scale).eval()
    with torch.inference_mode():
        for size in SIZES:
            x_BCHW = image(2, channels, *size)
            scores = model(x_BCHW)
            assert scores.shape == expected_shape(x_BCHW, task, 5, scale), size
            assert scores.isfinite().all() and scores.dtype == torch.float32, size


@settings(deadline=None, max_examples=25)
@given(
    batch=st.integers(1, 2),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    task=st.sampled_from(TASKS),
    options=st.sampled_from([{}, *VARIANTS]),
)
def test_variants(batch: int, height: int, width: int, task: tuple[Task, int], options: dict[str, Any]) -> None:
    model = create_model("hybrid-xs", task=task[0], classes=4, scale=task[1], options=options).eval()
    x_BCHW = image(batch, 3, height, width)
    with torch.inference_mode():
        scores = model(x_BCHW)
    assert scores.shape == expected_shape(x_BCHW, task[0], 4, task[1]) and scores.isfinite().all()


def awake(model: nn.Module) -> nn.Module:
    """The head of a restoring network starts at zero, so other parameters have no gradient in the first step."""
    if isinstance(model, HybridNet) and model.config.task == "restore":
        nn.init.normal_(model.get_parameter("head.conv.weight"), std=0.1)
    return model


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(("task", "scale"), TASKS)
def test_preset_gradients(name: str, task: Task, scale: int) -> None:
    model = awake(create_model(name, task=task, classes=5, scale=scale)).train()
    model(image(2, 3, 64, 64)).square().mean().backward()
    for path, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), path
        # A bias whose every reader is normalised over the batch has no say: its gradient is 0 by arithmetic.
        assert path.endswith("bias") or (parameter.grad != 0).any(), path


@pytest.mark.parametrize("options", [{}, *VARIANTS])
def test_variant_gradients(options: dict[str, Any]) -> None:
    model = create_model("hybrid-xs", options=options).train()
    model(image(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and (path.endswith("bias") or (p.grad != 0).any()) for path, p in model.named_parameters())


@pytest.mark.parametrize("task", ["segment", "classify", "restore"])
@pytest.mark.parametrize("size", [(1, 1), (33, 31), (64, 40)])
def test_batch_independence(task: Task, size: tuple[int, int]) -> None:
    model = awake(create_model("hybrid-xs", task=task)).double().eval()
    x_BCHW = image(3, 3, *size).double()
    with torch.inference_mode():
        torch.testing.assert_close(model(x_BCHW), torch.cat([model(x[None]) for x in x_BCHW]), rtol=0, atol=1e-9)


def test_training_graph_without_breaks() -> None:
    """The whole model is one graph for torch.compile while it trains, on a map that windows do not divide, too."""
    torch.manual_seed(0)
    model = create_model("hybrid-xxs", task="segment", classes=4).train()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    x_BCHW = torch.randn(2, 3, 72, 40)
    torch.testing.assert_close(compiled(x_BCHW), model(x_BCHW))


def test_batch_of_16_against_two_of_8() -> None:
    model = create_model("hybrid-xs").double().train()
    x_BCHW, weight_BCHW = image(16, 3, 33, 40).double(), torch.randn(16, 2, 33, 40).double()
    gradients = []
    for size in (16, 8):
        model.zero_grad()
        for x, weight in zip(x_BCHW.split(size), weight_BCHW.split(size), strict=True):
            ((model(x) * weight).sum() / weight_BCHW.numel()).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    for once, twice in zip(*gradients, strict=True):
        torch.testing.assert_close(twice, once, rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("channels", [1, 3])
def test_initial_restoration(name: str, channels: int) -> None:
    x_BCHW = image(2, channels, 33, 31)
    with torch.inference_mode():
        torch.testing.assert_close(create_model(name, task="restore", channels=channels).eval()(x_BCHW), x_BCHW)
        twice = create_model(name, task="restore", channels=channels, scale=2).eval()(x_BCHW)
    torch.testing.assert_close(twice, F.interpolate(x_BCHW, scale_factor=2, mode="bilinear"))


def test_receptive_field() -> None:
    model = create_model("hybrid-xs").double().eval()
    x_BCHW = image(1, 3, 200, 200).double()
    changed = x_BCHW.clone()
    changed[..., 150:, 150:] = 0
    with torch.inference_mode():
        difference_HW = (model(changed) - model(x_BCHW)).abs().amax((0, 1))
    assert difference_HW[:8, :8].max() > 1e-9  # the latents carry it, over no window's border


def test_bfloat16_error() -> None:
    model = create_model("hybrid-xs").eval()
    x_BCHW = image(2, 3, 33, 40)  # 3 x 3 tokens in a window of 8: hidden logits take part
    with torch.inference_mode():
        reference = model(x_BCHW)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(x_BCHW)
    assert (scores - reference).std() < 0.05 * reference.std()


def macs(name: str, side: int) -> int:
    """Multiply-adds of one image, counted on the meta device."""
    with torch.device("meta"):
        model, x_BCHW = create_model(name).eval(), torch.zeros(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(x_BCHW)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("name", ["hybrid-xxs", "hybrid-s"])
def test_linear_cost(name: str) -> None:
    assert macs(name, 1024) / macs(name, 512) == pytest.approx(4, rel=0.01)


def test_dense_cost() -> None:
    assert macs("dense-s", 1024) / macs("dense-s", 512) > 5
