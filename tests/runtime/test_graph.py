"""Tracing an engine's kernels back to the graph's nodes."""

from __future__ import annotations

from muntin.runtime.graph import ComputeNodes

NODES = ComputeNodes(names=frozenset({"conv1", "block/qkv", "head"}), outputs={"scores": "head"})


def test_names_that_engines_make() -> None:
    for reported, node in [
        (["conv1/WithoutBiases", "Multiply_12", "conv1", "block/qkv/quantize"], "conv1"),
        (["block/qkv/DequantizationMultiply"], "block/qkv"),
        (["conv1_token_0"], "conv1"),
        (["fused head"], "head"),
        (["scores_original", "scores"], "head"),
    ]:
        assert NODES.find(reported, derived=True) == node


def test_a_fused_quantiser_is_not_its_layer() -> None:
    assert NODES.find(["conv1", "block/qkv/quantize"], derived=True) == "conv1"
    assert NODES.find(["add", "block/qkv/quantize"], derived=False) is None


def test_strangers() -> None:
    assert NODES.find(["conv10", "other/conv1", ""], derived=True) is None
    assert NODES.find([], derived=True) is None
