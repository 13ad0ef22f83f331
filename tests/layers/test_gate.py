"""ChannelGate: values, closing, gradient, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muntin.layers import ChannelGate

LOGIT = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False) | st.floats(-2, 2, width=32, allow_subnormal=False)


def gate_of(*logits: float) -> ChannelGate:
    gate = ChannelGate(len(logits))
    with torch.no_grad():
        gate.logit.copy_(torch.tensor(logits))
    return gate


@settings(deadline=None)
@given(logits=st.lists(LOGIT, min_size=1, max_size=8))
def test_gate_openness_of_any_logit(logits: list[float]) -> None:
    gate = gate_of(*logits)
    openness_C = gate.openness()
    assert torch.equal(openness_C, torch.tensor(logits).clamp(0, 1))
    assert torch.equal(gate.open_channels(), openness_C > 0)


def test_gate_at_the_start() -> None:
    gate = ChannelGate(5)
    x = torch.randn(2, 3, 5)
    assert torch.equal(gate(x), x) and gate.open_channels().all()


def test_gate_with_a_closed_channel() -> None:
    gate = gate_of(-0.3, 0.25, 7.0)
    x = torch.randn(4, 3)
    torch.testing.assert_close(gate(x), x * torch.tensor([0, 0.25, 1]))
    changed = x.clone()
    changed[:, 0] = 1e6
    assert torch.equal(gate(changed), gate(x))


def test_gate_close_channels() -> None:
    gate = gate_of(-1.0, 0.05, 0.5, 1.0, 3.0)
    gate.close(torch.tensor([False, True, False, True, False]))
    assert gate.logit.tolist() == [-1.0, 0.0, 0.5, 0.0, 3.0]
    assert gate.open_channels().tolist() == [False, False, True, False, True]
    assert gate.logit.requires_grad


def test_gate_on_maps() -> None:
    gate = ChannelGate(3, axis=-3)
    with torch.no_grad():
        gate.logit.copy_(torch.tensor([0.5, -1, 1]))
    x = torch.randn(2, 3, 4, 5)
    torch.testing.assert_close(gate(x), x * torch.tensor([0.5, 0, 1]).reshape(1, 3, 1, 1), rtol=0, atol=0)


def test_gate_that_opens_again() -> None:
    gate = gate_of(-0.2, 1.0)
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.1)
    x = torch.ones(1, 2)
    for _ in range(20):
        optimizer.zero_grad()
        (gate(x) - torch.tensor([0.8, 0.0])).square().sum().backward()
        optimizer.step()
    openness_C = gate.openness().detach()
    assert openness_C[0] > 0.5 and openness_C[1] < 0.2


def test_gate_output_type() -> None:
    assert gate_of(0.5)(torch.ones(2, 1, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gate_without_channels() -> None:
    with pytest.raises(ValueError, match="dim=0: a gate needs at least 1 channel"):
        ChannelGate(0)


def test_gate_with_an_axis_from_the_start() -> None:
    with pytest.raises(ValueError, match="axis=1: count it from the end"):
        ChannelGate(4, axis=1)
