"""The optimiser: Muon for matrices, AdamW for the rest, and its state in checkpoints.

    weights of linear layers and convolutions             Muon
    vectors, norms, kernels of grouped convolutions, tables   AdamW

A tensor with at most one axis longer than 1 is a vector. Muon moves a matrix along all of its singular directions by the same amount.
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
"""Root mean square of a matrix's update, in learning rates: about that of AdamW, so that one rate serves both."""
_POLYNOMIALS = (8.0934, -23.6205, 17.4462), (3.6366, -2.7220, 0.5365), (2.6614, -1.9772, 0.4526)
"""Coefficients a, b, c of a·x + b·x³ + c·x⁵, applied in order: each is the closest to 1 on the range of the one before, from 0.01 to 1."""
_SCALER = ("scale", "_growth_tracker")


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, PyTorch's AdamW for `others` and for `vectors`, which are not decayed. Learning rates are set by group.

    The update of a matrix is its momentum with all singular values brought to about 1, times `LENGTH` and the root of its longer side. A
    convolution's kernel `(O, I, h, w)` is a matrix `(O, I·h·w)`. Weight decay is AdamW's. A matrix has one state tensor, the momentum.
    Cost of a step: 6·m²·n + 3·m³ multiply-adds for a matrix of m x n, m <= n; matrices of one shape are batched. `dtype`: of this
    computation. `torch.optim.Muon` takes matrices only, one by one, in BF16, which many CPUs lack.

    Source: Jordan et al., Muon (kellerjordan.github.io/posts/muon, 2024); length and decay: Liu et al. (2502.16982, section 2.2); one
    polynomial for each step: Amsel et al. (2505.16932, section 3.2). Deviations: three different polynomials instead of five equal ones
    (docs/log.md); the first and the last layer are matrices; the three projections of PyTorch's attention are one matrix.
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
        fused = all(parameter.is_floating_point() for group in rest for parameter in group["params"])  # complex ones are not fused
        self._adamw = torch.optim.AdamW(rest, fused=fused) if rest else None  # shares the group objects
        if self._adamw is not None:
            self._adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Load state and groups, as `load_state_dict` does, which makes new group objects."""
        super().__setstate__(state)
        if self.__dict__.get("_adamw") is not None:
            assert self._adamw is not None
            self._adamw.param_groups = [group for group in self.param_groups if not group["matrices"]]
            self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. Parameters without a gradient are unchanged."""
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

    def _update(self, parameters: list[nn.Parameter], rate: float, decay: float) -> None:
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for parameter in parameters:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].mul_(MOMENTUM).add_(parameter.grad)
            ahead = parameter.grad.add(momentum, alpha=MOMENTUM).flatten(1)  # Nesterov's momentum
            by_shape[ahead.shape[0], ahead.shape[1]].append((parameter, ahead))
        for (rows, columns), entries in by_shape.items():
            updates = orthogonalised(torch.stack([ahead for _, ahead in entries]), self._dtype)
            length = rate * LENGTH * math.sqrt(max(rows, columns))
            for (parameter, _), update in zip(entries, updates, strict=True):
                parameter.mul_(1 - rate * decay).sub_(update.view(parameter.shape), alpha=length)


def orthogonalised(x_NRC: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """N matrices with their singular vectors and all singular values near 1; values below a hundredth of the norm stay below 1."""
    wide = x_NRC.shape[1] <= x_NRC.shape[2]
    x = (x_NRC if wide else x_NRC.mT).float()
    x = (x / x.norm(dim=(1, 2), keepdim=True).mul(1.01).clamp(min=1e-12)).to(dtype)  # the first polynomial is steep above 1
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
        # a norm's weight is a vector of any shape, and so is a scale of shape (1, C, 1, 1)
        if sum(side > 1 for side in parameter.shape) < 2 or isinstance(owners[owner], nn.LayerNorm | nn.RMSNorm):
            vectors.append(parameter)
        elif last.endswith("weight") and parameter.is_floating_point() and not _is_table(owners[owner]):
            matrices.append(parameter)
        else:
            others.append(parameter)
    return Muon(matrices, others, vectors, config=config, dtype=dtype)


def _is_table(owner: nn.Module) -> bool:
    """Return True if the rows of the layer's weight are independent: an embedding, or a grouped convolution."""
    return isinstance(owner, nn.Embedding | nn.EmbeddingBag) or getattr(owner, "groups", 1) > 1


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, and the loss scale if one is used (FP16)."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    if scaler.is_enabled():
        tensors |= {f"scaler.{key}": torch.tensor(scaler.state_dict()[key]) for key in _SCALER}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}.{names[id(parameter)]}"] = torch.as_tensor(value)
    return tensors


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, tensors: dict[str, Tensor]) -> None:
    """Restore the state that `optimizer_tensors` returned."""
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        key, _, parameter = name.partition(".")
        if key == "rng":
            continue  # of older checkpoints; random numbers are seeded at each step
        if key == "scaler":
            scaler.load_state_dict(scaler.state_dict() | {parameter: value.item()})
        else:
            like = parameters[parameter]
            state = value.to(like.device)
            optimizer.state[like][key] = state.clone() if value.ndim == 0 else torch.empty_like(like).copy_(state)
