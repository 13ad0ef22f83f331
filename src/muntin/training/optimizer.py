"""The optimisers, and their state in checkpoints. The default is Muon for matrices and AdamW for the rest; AdamW is PyTorch's, Lion timm's,
Schedule-Free its authors' package.

    weights of linear layers and convolutions             Muon
    vectors, norms, kernels of grouped convolutions, tables   AdamW

A tensor with at most one axis longer than 1 is a vector. Muon moves a matrix along all of its singular directions by the same amount.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor, nn

from muntin.tasks.base_learning import at_least_float32
from muntin.training.config import TrainingConfig
from muntin.training.distributed.matrices import MatrixExchange
from muntin.training.distributed.ranks import is_sharded, local
from muntin.training.distributed.stored_tensors import OPTIMIZER, StoredTensors

MOMENTUM = 0.95
LENGTH = 0.2
"""Root mean square of a matrix's update, in learning rates: about that of AdamW, so that one rate serves both."""
_POLYNOMIALS = (8.0934, -23.6205, 17.4462), (3.6366, -2.7220, 0.5365), (2.6614, -1.9772, 0.4526)
"""Coefficients a, b, c of a·x + b·x³ + c·x⁵, applied in order: each is the closest to 1 on the range of the one before, from 0.01 to 1."""
_SCALER = ("scale", "_growth_tracker")
_GROUP_STATE = ("k", "weight_sum", "lr_max")
"""Counters that Schedule-Free keeps for a group of parameters."""


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, PyTorch's AdamW for `others` and for `vectors`, which are not decayed. Learning rates are set by group.

    The update of a matrix is its momentum with all singular values brought to about 1, times `LENGTH` and the root of its longer side. A
    convolution's kernel `(O, I, h, w)` is a matrix `(O, I·h·w)`. Weight decay is AdamW's. A matrix has one state tensor, the momentum.
    Cost of a step: 6·m²·n + 3·m³ multiply-adds for a matrix of m x n, m <= n; matrices of one shape are batched. `dtype`: of this
    computation; None: that of the matrices, at least FP32. `exchange`: of sharded matrices. `torch.optim.Muon` takes matrices only, one by
    one, in BF16, which many CPUs lack.

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
        dtype: torch.dtype | None = None,
        exchange: MatrixExchange | None = None,
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if is_sharded(p) == sharded], **options}
            for parameters, options in (
                (matrices, {"weight_decay": config.weight_decay, "matrices": True}),
                (others, {"weight_decay": config.weight_decay}),
                (vectors, {"weight_decay": 0.0}),
            )
            for sharded in (False, True)  # AdamW takes no group of both
        ]
        super().__init__([group for group in groups if group["params"]], {"lr": config.learning_rate, "matrices": False})
        self._dtype, self._exchange = dtype, exchange
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
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
        aheads = [self._ahead(parameter) for parameter in parameters]
        if parameters and is_sharded(parameters[0]):
            assert self._exchange is not None
            updates = self._exchange(aheads, [len(parameter) for parameter in parameters], self._directions)
        else:
            updates = self._directions(aheads)
        for parameter, update in zip(parameters, updates, strict=True):
            length = rate * LENGTH * math.sqrt(max(len(parameter), parameter.shape[1:].numel()))
            part = local(parameter)
            part.mul_(1 - rate * decay).sub_(update.view(part.shape), alpha=length)

    def _ahead(self, parameter: nn.Parameter) -> Tensor:
        """Update the momentum, and return Nesterov's momentum as a matrix, or this process's rows of it."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = local(parameter.grad)
        momentum = local(state["momentum"]).mul_(MOMENTUM).add_(gradient)
        return gradient.add(momentum, alpha=MOMENTUM).flatten(1)

    def _directions(self, matrices: list[Tensor]) -> list[Tensor]:
        """The matrices with equal singular values; those of one shape are computed together."""
        by_shape: dict[torch.Size, list[int]] = defaultdict(list)
        for number, matrix in enumerate(matrices):
            by_shape[matrix.shape].append(number)
        directions: dict[int, Tensor] = {}
        for numbers in by_shape.values():
            directions |= zip(numbers, orthogonalised(torch.stack([matrices[n] for n in numbers]), self._dtype), strict=True)
        return [directions[number] for number in range(len(matrices))]


def orthogonalised(x_NRC: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """N matrices with their singular vectors and all singular values near 1; values below a hundredth of the norm stay below 1.

    `dtype`: of the products; None: that of the matrices, at least FP32.
    """
    wide = x_NRC.shape[1] <= x_NRC.shape[2]
    x = at_least_float32(x_NRC if wide else x_NRC.mT)
    x = (x / x.norm(dim=(1, 2), keepdim=True).mul(1.01).clamp(min=1e-12)).to(dtype or x.dtype)  # the first polynomial is steep above 1
    for a, b, c in _POLYNOMIALS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(x_NRC.dtype)


def make_optimizer(
    model: nn.Module, config: TrainingConfig, dtype: torch.dtype | None = None, exchange: MatrixExchange | None = None
) -> torch.optim.Optimizer:
    """The optimiser of a recipe. `dtype`: of Muon's products, as of `Muon`. `exchange`: for sharded matrices.

    Muon takes the weights of linear layers and of convolutions without groups (quantised and factored ones too), AdamW the rest. The other
    optimisers take all. None decays vectors.
    """
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
    if config.optimizer == "muon":
        return Muon(matrices, others, vectors, config=config, dtype=dtype, exchange=exchange)
    decays = ((config.weight_decay, [*matrices, *others]), (0.0, vectors))
    groups: list[dict[str, Any]] = [{"params": parameters, "weight_decay": decay} for decay, parameters in decays if parameters]
    if config.optimizer == "adamw":
        fused = all(parameter.is_floating_point() for _, parameters in decays for parameter in parameters)
        return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused)
    if config.optimizer == "schedule-free":
        averaging = AdamWScheduleFree(groups, lr=config.learning_rate)
        averaging.train()
        return cast(torch.optim.Optimizer, averaging)
    from timm.optim import Lion  # importing timm takes seconds

    return cast(torch.optim.Optimizer, Lion(groups, lr=config.learning_rate))


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """During the block, the parameters are the averages that Schedule-Free evaluates; those of other optimisers stay."""
    if not isinstance(optimizer, AdamWScheduleFree):
        yield
        return
    optimizer.eval()
    try:
        yield
    finally:
        optimizer.train()


def _is_table(owner: nn.Module) -> bool:
    """Return True if the rows of the layer's weight are independent: an embedding, or a grouped convolution."""
    return isinstance(owner, nn.Embedding | nn.EmbeddingBag) or getattr(owner, "groups", 1) > 1


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> dict[str, Tensor]:
    """The optimiser's state by parameter name, and the loss scale if one is used (FP16)."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors: dict[str, Tensor] = {}
    if scaler.is_enabled():
        tensors |= {f"scaler.{key}": torch.tensor(scaler.state_dict()[key]) for key in _SCALER}
    for number, group in enumerate(optimizer.param_groups):
        tensors |= {f"group.{number}.{key}": torch.tensor(group[key], dtype=torch.float64) for key in _GROUP_STATE if key in group}
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
        if key == "group":
            number, _, field = parameter.partition(".")
            group = optimizer.param_groups[int(number)]
            group[field] = type(group[field])(value.item())
        elif key == "scaler":
            scaler.load_state_dict(scaler.state_dict() | {parameter: value.item()})
        else:
            like = parameters[parameter]
            state = value.to(like.device)
            optimizer.state[like][key] = state.clone() if value.ndim == 0 else torch.empty_like(like).copy_(state)


def read_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, stored: StoredTensors, owns: Callable[[Any], bool]
) -> None:
    """Restore the state of the parameters that this process `owns`, of sharded ones its rows. Raises `CheckpointError`."""
    parameters, targets = dict(model.named_parameters()), dict[str, Tensor]()
    for name, size in stored.sizes(OPTIMIZER).items():
        key, _, of = name.partition(".")
        if key == "scaler":
            targets[name] = torch.zeros(size)
        elif of in parameters and owns(like := parameters[of]):
            targets[name] = torch.zeros((), device=like.device) if key == "step" else torch.zeros_like(like)
            optimizer.state[like][key] = targets[name]
    stored.read_into(OPTIMIZER, targets)
    scale = {name.removeprefix("scaler."): value.item() for name, value in targets.items() if name.startswith("scaler.")}
    if scale and scaler.is_enabled():
        scaler.load_state_dict(scaler.state_dict() | scale | {"_growth_tracker": int(scale["_growth_tracker"])})
