"""The costs of a model with factored layers: what it has now, and what it had with dense ones, from which budgets count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from muntin.compression.low_rank.factored_layers import FactoredConv2d, FactoredLayer, factored_layers, factored_macs, factored_parameters
from muntin.models.eager import ModelInputs, batch_rows, run
from muntin.training.config import LowRankConfig


@dataclass(frozen=True, kw_only=True)
class FactoredCosts:
    """The costs of a model in which earlier runs may have factored layers."""

    layers: int
    """Factored layers."""
    parameters: int
    """Parameters of the model."""
    dense_parameters: int
    """Parameters of the model with dense layers in the place of the factored ones."""
    macs: float
    """Multiply-adds of the factored layers for one row of inputs; 0 if they were not counted."""
    dense_macs: float
    """The same of dense layers in their place."""

    @classmethod
    def of(cls, model: nn.Module, batches: Sequence[ModelInputs], *, with_macs: bool) -> Self:
        """Count; the multiply-adds cost one run of the model, if there are factored layers."""
        layers = factored_layers(model)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        weights = {name: math.prod(layer.weight.shape) for name, layer in layers.items()}
        factored = sum(factored_parameters(layer, layer.ranks) for layer in layers.values())
        dense = sum(weights[name] + (0 if layer.bias is None else layer.bias.numel()) for name, layer in layers.items())
        positions = _positions(model, batches, layers) if layers and with_macs else {}
        return cls(
            layers=len(layers),
            parameters=parameters,
            dense_parameters=parameters - factored + dense,
            macs=math.fsum(factored_macs(layers[name], layers[name].ranks, count) for name, count in positions.items()),
            dense_macs=math.fsum(weights[name] * count for name, count in positions.items()),
        )

    def budget(self, config: LowRankConfig) -> int:
        """The allowed parameters of the model."""
        return int(config.parameters * self.dense_parameters)

    def fixed(self, free: Mapping[str, nn.Linear | nn.Conv2d]) -> int:
        """Parameters that no rank of the free layers changes."""
        return self.parameters - sum(parameter.numel() for layer in free.values() for parameter in layer.parameters())

    def reason(self, config: LowRankConfig) -> str | None:
        """Why a further run changes nothing: an earlier one has met the budget of parameters, and there is no other one."""
        if not self.layers or config.threshold is not None or config.macs is not None or self.parameters > self.budget(config):
            return None
        return f"{self.layers} layers are factored already: {self.parameters:,} parameters are within the budget of {self.budget(config):,}"


def _positions(model: nn.Module, batches: Sequence[ModelInputs], layers: Mapping[str, FactoredLayer]) -> dict[str, float]:
    """Rows of each layer's output (tokens, positions of a map) for one row of inputs."""
    counts = dict.fromkeys(layers, 0)

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            counts[name] += output.numel() // output.shape[-3 if isinstance(layer, FactoredConv2d) else -1]

        return count

    run(model, batches, [layer.register_forward_hook(hook(name)) for name, layer in layers.items()])
    rows = sum(map(batch_rows, batches))
    return {name: count / rows for name, count in counts.items()}
