"""Costs that follow from shapes, against those of the networks themselves."""

from __future__ import annotations

import pytest
import torch

from model_helpers import count
from muntin.deployment import image_macs
from muntin.models import HybridNet, ModelConfig
from muntin.searching.cost import artifact_bytes, layer_macs, memory_bytes, parameters_of
from muntin.searching.space import Architecture, Space
from small_space import base_of, drawn


def test_counts_of_networks(space: Space, base: ModelConfig) -> None:
    for one in drawn(space, base, 4):
        network = HybridNet(one.config)
        assert parameters_of(one.config) == count(network)
        convolutions = ModelConfig.model_validate({**one.config.model_dump(), "attention": "local", "window": 1})
        whole = image_macs(HybridNet(convolutions), torch.zeros(1, 3, 64, 64))  # in windows of one token products are small
        assert layer_macs(convolutions) * 64 * 64 == pytest.approx(whole, rel=0.1)


def test_bytes() -> None:
    one = Architecture(config=base_of("segment"))
    assert artifact_bytes(one) == parameters_of(one.config)
    assert layer_macs(one.config, 0.5) == layer_macs(one.config) / 4


@pytest.mark.parametrize("task", ["segment", "classify", "restore"])
def test_memory_grows_with_the_picture(task: str) -> None:
    one = Architecture(config=base_of(task))
    small, large = memory_bytes(one, 64), memory_bytes(one, 128)
    weights = parameters_of(one.config)
    assert large - weights == pytest.approx(4 * (small - weights), rel=0.05)
