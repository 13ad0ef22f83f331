"""Findings name planted faults: a layer that fell back to float, a transposed layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.diagnosis import Finding, findings
from muntin.runtime.profiling.kernels import LAYOUT, PRODUCTS, Ceilings, Operand
from muntin.runtime.profiling.profile import Profile, profile

CEILINGS = Ceilings(gmacs={"f32": 100.0, "bf16": 200.0, "i8": 400.0}, copy_gb_s=10.0, threads=1, others=0.0)


def of_kind(result: Profile, kind: str) -> list[Finding]:
    return [finding for finding in findings(result) if finding.kind == kind]


@pytest.fixture(scope="module")
def small(convolutions: Any) -> Profile:
    return profile(convolutions.path, SessionOptions(precision="f32", threads=1), shape=(1, 48, 48), rounds=3, ceilings=CEILINGS)


# ---- planted faults ----


@pytest.mark.usefixtures("dot_products")
def test_integer_layer_in_float(write_layers: Callable[..., Any], layer_maker: Callable[..., Any], tmp_path: Path) -> None:
    layers = [
        layer_maker("stem", 0, 3, 32, 3, scale=0.9),
        layer_maker("body", 1, 32, 32, 3, scale=1.0),
        layer_maker("head", 2, 32, 4, 1, scale=1.0),
    ]
    layers[1] = replace(layers[1], quantized=False)
    written = write_layers(tmp_path / "a", layers)
    result = profile(written.path, SessionOptions(precision="f32", threads=1), shape=(1, 64, 64), rounds=3, ceilings=CEILINGS)
    (finding,) = of_kind(result, "fallback")
    assert finding.words.startswith("1 layer recorded with 8-bit activations ran in float: body in f32 (")
    assert "; on integer kernels about " in finding.words
    (body,) = (kernel for kernel in result.kernels if kernel.name == "body")
    assert finding.saves_ms == pytest.approx(body.ms * (1 - 100 / 400))
    assert not any("body" in other.words for kind in ("ceiling", "float") for other in of_kind(result, kind))


def test_layout_change_between_layers(write_graph: Callable[..., Any], tmp_path: Path) -> None:
    """Two convolutions; channels are moved last and back between them."""
    rng = np.random.default_rng(0)
    weights = {"w1": rng.normal(size=(32, 3, 3, 3)).astype(np.float32), "w2": rng.normal(size=(4, 32, 3, 3)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], name="first", pads=[1] * 4),
        helper.make_node("Transpose", ["a"], ["b"], name="there", perm=[0, 2, 3, 1]),
        helper.make_node("Relu", ["b"], ["c"], name="relu"),
        helper.make_node("Transpose", ["c"], ["d"], name="back", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["d", "w2"], ["scores"], name="second", pads=[1] * 4),
    ]
    path = write_graph(tmp_path / "a", nodes, weights, channels=3, outputs=4).path
    result = profile(path, SessionOptions(precision="f32", threads=1), shape=(1, 128, 128), rounds=3, ceilings=CEILINGS)
    executed = {kernel.name for kernel in result.kernels if kernel.group == LAYOUT and kernel.ms > 0}
    assert {"there", "back"} <= executed, "the engine removed them: this test plants nothing"
    (finding,) = of_kind(result, "layout")
    assert "layout changes" in finding.words
    assert "Transpose between first and second (" in finding.words
    planted = sum(kernel.ms for kernel in result.kernels if kernel.name in {"there", "back"})
    assert planted <= (finding.saves_ms or 0.0) + 1e-6


# ---- each rule ----


@pytest.mark.usefixtures("dot_products")
def test_layers_as_recorded(small: Profile) -> None:
    assert of_kind(small, "fallback") == []
    assert of_kind(small, "float") == []


def test_order_of_findings(small: Profile) -> None:
    body = next(kernel for kernel in small.kernels if kernel.name == "body")
    unknown = replace(small, kernels=(replace(body, precision="f64"), *(kernel for kernel in small.kernels if kernel is not body)))
    *known, last = [finding.saves_ms for finding in findings(replace(unknown, between_ms=small.profiled_ms, others=0.0))]
    assert last is None
    assert known and known == sorted(known, key=lambda ms: -(ms or 0.0))


def test_kernel_far_from_its_ceiling(small: Profile) -> None:
    body = next(kernel for kernel in small.kernels if kernel.name == "body")
    value = Operand(shape=(1, 32, 48, 48), type="f32", bytes=4, layout="acdb")
    slow = replace(body, precision="i8", ms=10.0, macs=400_000_000, inputs=(value, *body.inputs[1:]), outputs=(value,))
    (finding,) = of_kind(replace(small, profiled_ms=12.0, kernels=(slow,)), "ceiling")
    assert finding.words.startswith(
        "body reaches 10% of the INT8 ceiling: 10 ms where 1.0 would do (few channels: 32 in, 32 out; it writes "
    )
    assert finding.saves_ms == pytest.approx(9.0, rel=1e-3)
    assert of_kind(replace(small, profiled_ms=12.0, kernels=(replace(slow, ms=1.5),)), "ceiling") == []


def test_equal_layers_of_repeated_blocks(small: Profile) -> None:
    body = next(kernel for kernel in small.kernels if kernel.name == "body")
    blocks = tuple(replace(body, name=f"blocks.{i}.mlp", layer=None, precision="i8", ms=10.0, macs=400_000_000) for i in range(3))
    (finding,) = of_kind(replace(small, profiled_ms=40.0, kernels=blocks), "ceiling")
    assert finding.words.startswith("blocks.*.mlp (3 alike) reach 10% of the INT8 ceiling: 30 ms where 3.0 would do")


def test_products_in_float(small: Profile) -> None:
    body = next(kernel for kernel in small.kernels if kernel.name == "body")
    floating = replace(body, layer=None, precision="f32", ms=10.0, macs=400_000_000, group=PRODUCTS)
    (finding,) = of_kind(replace(small, profiled_ms=20.0, kernels=(floating,)), "float")
    assert finding.words == (
        "50% of the time (10 of 20 ms) goes into 1 product in FP32, not quantised in the artefact: body (10 ms); "
        "in INT8 about 2.5 ms, in BF16 about 5.0, at a cost in accuracy to be measured"
    )
    assert finding.saves_ms == pytest.approx(7.5)


def test_writing_of_the_scores(small: Profile) -> None:
    head = next(kernel for kernel in small.kernels if kernel.name == "head")
    last = Operand(shape=(1, 5, 48, 48), type="f32", bytes=4, source="head")
    writing = replace(head, name="scores", kind="Reorder", compute=False, layer=None, macs=0, group=LAYOUT, inputs=(last,), ms=5.0)
    kernels = tuple(kernel for kernel in small.kernels if kernel.name != "scores")
    result = replace(small, profiled_ms=10.0, kernels=(*kernels, writing))
    (finding,) = of_kind(result, "output")
    assert "is writing the scores, 0.046 MB of float32 (1, 5, 48, 48), after the last layer: Reorder scores (5.0 ms)" in finding.words
    assert "labels of one byte would be 0.0023 MB" in finding.words
    assert all((other.saves_ms or 0.0) < 5 for other in of_kind(result, "layout"))


def test_output_with_a_missing_layer(small: Profile) -> None:
    """The head is not recognised: what follows the last layer that is may hold it."""
    lost = [replace(kernel, compute=False, layer=None, macs=0) if kernel.name == "head" else kernel for kernel in small.kernels]
    last = Operand(shape=(1, 5, 48, 48), type="f32", bytes=4, source="head")
    writing = replace(lost[-1], name="writing", kind="Reorder", compute=False, layer=None, macs=0, group=LAYOUT, inputs=(last,), ms=5.0)
    result = replace(small, profiled_ms=10.0, kernels=(*lost, writing))
    assert of_kind(result, "output") == []
    assert any((finding.saves_ms or 0.0) >= 5 for finding in of_kind(result, "layout"))


def test_kernels_after_an_unrecorded_product(small: Profile) -> None:
    head = next(kernel for kernel in small.kernels if kernel.name == "head")
    further = replace(head, name="further", compute=False, layer=None, inputs=(replace(head.outputs[0], source="head"),))
    writing = replace(
        further, name="writing", kind="Reorder", macs=0, group=LAYOUT, inputs=(replace(head.outputs[0], source="further"),), ms=5.0
    )
    kernels = tuple(kernel for kernel in small.kernels if kernel.name != "scores")
    result = replace(small, profiled_ms=10.0, kernels=(*kernels, further, writing))
    assert of_kind(result, "output") == []
    assert "between further and the scores" in of_kind(result, "layout")[0].words


def test_layer_with_a_unique_name(small: Profile) -> None:
    body = next(kernel for kernel in small.kernels if kernel.name == "body")
    one, other = (replace(body, name=name, layer=name, precision="f32", ms=10.0, macs=400_000_000) for name in ("d.0", "e.1"))
    (finding,) = of_kind(replace(small, profiled_ms=20.0, kernels=(one, other)), "float")
    assert "goes into 2 products in FP32, not quantised in the artefact: d.0 (10 ms), e.1 (10 ms);" in finding.words
    tiny = replace(body, precision="i8", ms=0.0002, macs=10, inputs=body.inputs[:1], outputs=body.outputs)
    assert of_kind(replace(small, profiled_ms=0.0004, kernels=(tiny,)), "ceiling") == []
    passes = tuple(replace(one, name=f"pass {i}", compute=False, layer=None, macs=0, group=LAYOUT, ms=0.002) for i in range(5))
    (finding,) = of_kind(replace(small, profiled_ms=0.02, kernels=passes), "layout")
    assert finding.words.startswith("50% of the time (0.01 of 0.02 ms) is layout changes: Convolution between ")
    assert finding.words.endswith(" (0.002 ms), and 2 more")


def test_largest_saving(small: Profile) -> None:
    body = next(kernel for kernel in small.kernels if kernel.name == "body")
    passes = tuple(replace(body, name=f"pass {i}", compute=False, layer=None, macs=0, group=LAYOUT, ms=1.0) for i in range(3))
    (finding,) = of_kind(replace(small, profiled_ms=2.5, kernels=passes), "layout")  # medians need not sum up
    assert finding.saves_ms == 2.5


def test_time_between_kernels(small: Profile) -> None:
    overhead = replace(small, profiled_ms=10.0, between_ms=4.0, others=0.0)
    (finding,) = of_kind(overhead, "between")
    assert finding.words.startswith("40% of the time (4.0 of 10 ms) passes between the ")
    assert finding.saves_ms == 4.0
    assert of_kind(replace(overhead, between_ms=0.1), "between") == []
    assert of_kind(replace(overhead, others=1.0), "between") == []  # then it is others' time
