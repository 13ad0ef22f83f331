"""What a step makes of the gradients: Muon for the matrices, AdamW for the rest.

    weights of linear layers and convolutions     Muon     every direction that the gradient has is gone along by as much
    vectors, norms, kernels in groups, tables     AdamW    every number is moved by about as much

What has at most one axis longer than 1 is a vector.

Adam moves single numbers, and so mostly along the few directions that a gradient is long in; a matrix learns the others slowly.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from muntin.training.config import TrainingConfig

MOMENTUM = 0.95
LENGTH = 0.2
"""Root of the mean square of a matrix's update, in learning rates: about what AdamW's is, so that one rate serves both."""
_POLYNOMIALS = (8.0934, -23.6205, 17.4462), (3.6366, -2.7220, 0.5365), (2.6614, -1.9772, 0.4526)
"""a, b, c of a·x + b·x³ + c·x⁵, one after the other: each is the nearest to 1 where the one before leads to, from 0.01 to 1."""


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, PyTorch's AdamW for `others` and `vectors`, which are not decayed. Learning rates are set by group.

    The update of a matrix is its momentum with all singular values brought to about 1, times `LENGTH` and the root of its longer side; a
    convolution's kernel `(O, I, h, w)` is a matrix `(O, I·h·w)`. Weights are decayed as by AdamW. A matrix has one state, the momentum,
    where AdamW has two. Cost of a step: 6·m²·n + 3·m³ multiply-adds for a matrix of m x n, m <= n; those of one shape go together.
    `dtype`: what is computed in there; in 16 bits the singular values scatter a little more. `torch.optim.Muon` takes matrices only, one
    by one, in BF16, which many CPUs do not compute in.

    Source: Jordan et al., Muon (kellerjordan.github.io/posts/muon, 2024), convolutions and AdamW for the rest included; the length and
    the decay are Liu et al.'s (2502.16982, section 2.2); polynomials of a step each are Amsel et al.'s idea (2505.16932, section 3.2).
    Deviations: three of them (0.73 to 1.27 for singular values from a hundredth of the norm on) in place of five times the same one, three
    fifths of the cost for the same loss (docs/log.md); the first and the last layer are matrices like any other, and so are the three
    projections of PyTorch's own attention together.
    """

    def __init__(
        self,
        matrices: list[nn.Parameter],
        others: list[nn.Parameter],
        vectors: list[nn.Parameter],
        *,
        config: TrainingConfig,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": matrices, "weight_decay": config.weight_decay, "matrices": True},
            {"params": others, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": config.learning_rate, "matrices": False})
        self._dtype = dtype
        rest = [group for group in self.param_groups if not group["matrices"]]
        fused = all(parameter.is_floating_point() for group in rest for parameter in group["params"])  # not complex
        self._adamw = torch.optim.AdamW(rest, fused=fused) if rest else None  # it has the very same groups
        if self._adamw is not None:
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["matrices"]:
                self._update(group["params"], group["lr"], group["weight_decay"])
        if self._adamw is not None:
            self._adamw.step()
        return loss

    def load_state_dict(self, state_dict: Any) -> None:
        """Not to be had: raises TypeError. A checkpoint's state is loaded parameter by parameter (`load_optimizer`)."""
        raise TypeError("Muon's state is loaded by muntin.training.checkpoint.load_optimizer")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not to be had once it is made: raises TypeError."""
        if hasattr(self, "_adamw"):
            raise TypeError("Muon's groups are made with it: make another one of all parameters (make_optimizer)")
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """Not to be had: raises TypeError, since a copy would train nothing."""
        raise TypeError("Muon is not copied or pickled: make another one (make_optimizer) and load its state (load_optimizer)")

    def suits(self) -> bool:
        """Whether the state that was loaded is of this optimiser: matrices have their momentum, and nothing else has one."""
        found = [(group["matrices"], set(self.state[p])) for group in self.param_groups for p in group["params"] if self.state[p]]
        return all(state == {"momentum"} if matrix else "momentum" not in state for matrix, state in found)

    def _update(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        alike: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].mul_(MOMENTUM).add_(parameter.grad)
            ahead = parameter.grad.add(momentum, alpha=MOMENTUM).flatten(1)  # Nesterov's
            alike[ahead.shape[0], ahead.shape[1]].append((parameter, ahead))
        for (rows, columns), entries in alike.items():
            updates = orthogonalised(torch.stack([ahead for _, ahead in entries]), self._dtype)
            length = rate * LENGTH * math.sqrt(max(rows, columns))
            for (parameter, _), update in zip(entries, updates, strict=True):
                parameter.mul_(1 - rate * decay).sub_(update.view(parameter.shape), alpha=length)


def orthogonalised(x_NRC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """N matrices with their own singular vectors and all singular values near 1; what is below a hundredth of the norm stays below 1."""
    wide = x_NRC.shape[1] <= x_NRC.shape[2]
    x = (x_NRC if wide else x_NRC.mT).float()
    x = (x / x.norm(dim=(1, 2), keepdim=True).mul(1.01).clamp(min=1e-12)).to(dtype)  # beyond 1 the first polynomial is steep
    for a, b, c in _POLYNOMIALS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(x_NRC.dtype)


def make_optimizer(model: nn.Module, config: TrainingConfig, dtype: torch.dtype = torch.float32) -> Muon:
    """Muon for the weights of linear layers and of convolutions without groups (quantised and factored ones too), AdamW for the rest."""
    matrices, others, vectors = [], [], []
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        # a norm's weight scales, over however many axes; so does one of (1, C, 1, 1), in norms and layer scales of one's own
        if sum(side > 1 for side in parameter.shape) < 2 or isinstance(owners[owner], nn.LayerNorm | nn.RMSNorm):
            vectors.append(parameter)
        elif last.endswith("weight") and parameter.is_floating_point() and not _is_table(owners[owner]):
            matrices.append(parameter)
        else:
            others.append(parameter)
    return Muon(matrices, others, vectors, config=config, dtype=dtype)


def _is_table(owner: nn.Module) -> bool:
    """Whether the rows of a layer's weight have nothing to do with each other: an embedding's, or a convolution's of several groups."""
    return isinstance(owner, nn.Embedding | nn.EmbeddingBag) or getattr(owner, "groups", 1) > 1
