"""The record of a run's tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from muntin.compression.equivalent.flow import called_once, record_flow


class Net(nn.Module):
    """`twice` runs twice, `tied` shares a weight, `inner` is read by a layer and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.twice, self.tied, self.other = (nn.Linear(4, 4) for _ in range(4))
        self.other.weight = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        out: Tensor = self.other(self.tied(self.twice(input=self.twice(y)) + y))
        return out


def test_uses_and_calls() -> None:
    model, x = Net(), torch.randn(2, 4)
    layers = dict(model.named_children())
    flow = record_flow(model, layers, (x,))
    assert flow.calls == {"inner": 1, "twice": 2, "tied": 1, "other": 1}
    assert [use.layer or use.function for use in flow.uses[flow.outputs["inner"]]] == ["twice", torch.ops.aten.add.Tensor]
    assert [use.layer for use in flow.uses[flow.outputs["tied"]]] == ["other"]
    assert called_once(model, layers, flow) == {"inner"}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
