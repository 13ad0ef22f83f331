"""The forms in which a network is compared: each pass of muntin alone, other tools' ways to do the same, and the passes together.

    FP32 module -> passes, with distillation on inputs without labels where a form is trained -> module that muntin.export takes

A form that narrows layers is quantised to INT8 in the end, so that its time compares with INT8's. Axes: O output and I input channels of a
layer, R rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import muntin
from foreign_networks.subjects import Batch, Subject

MULTIPLE = 8
"""Widths and ranks are multiples of it."""
AVERAGE = 4.4
"""Average bits of a weight where widths are mixed."""
RATE = 3e-4
"""Learning rate of distillation, for every form."""
CLASSIFIERS = ("head", "fc", "_fc", "classifier")
"""Last parts of the names of classifiers, which torch-pruning leaves."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a form may use: inputs without labels (`batches`: for distillation), and how long it may train."""

    subject: Subject
    batches: Sequence[Batch]
    calibration: Sequence[Batch]
    steps: int
    seed: int

    def distil(self, student: nn.Module, teacher: nn.Module, parts: int = 1) -> nn.Module:
        """Train for one of several equal parts of the steps."""
        steps = self.steps // parts
        muntin.distil(student, teacher, self.batches, steps=steps, loss=self.subject.distance, learning_rate=RATE, seed=self.seed)
        return student


Form = Callable[[nn.Module, Material], nn.Module]
"""From a module, which it may change, to the compressed one."""


def parameters_of(model: nn.Module) -> int:
    """Number of values of weights, in whatever form: parameters, and integer weights in buffers."""
    integers = (buffer for buffer in model.buffers() if buffer.dtype in (torch.int8, torch.uint8) and buffer.ndim > 1)
    return sum(parameter.numel() for parameter in model.parameters()) + sum(buffer.numel() for buffer in integers)


def embeddings(model: nn.Module) -> dict[str, Any]:
    """Options of quantize for a model with embeddings."""
    return {"embedding_bits": 4} if any(isinstance(layer, nn.Embedding) for layer in model.modules()) else {}


def quantised(model: nn.Module, material: Material, *, bits: float = 8, **options: Any) -> nn.Module:
    """muntin.quantize; `options`: of it. Fewer than 8 bits: embeddings of 4."""
    muntin.quantize(model, material.calibration, bits=bits, **({} if bits == 8 else embeddings(model)), **options)
    return model


def _low_rank(model: nn.Module, material: Material) -> nn.Module:
    subject = material.subject
    muntin.low_rank(model, material.calibration, parameters=subject.parameters, multiple=MULTIPLE, keep=subject.keep)
    return model


def _pruned(model: nn.Module, material: Material) -> nn.Module:
    muntin.prune(model, material.calibration, macs=material.subject.macs, multiple=MULTIPLE, keep=material.subject.keep)
    return model


def _prune(model: nn.Module, material: Material) -> nn.Module:
    teacher = copy.deepcopy(model)
    return quantised(material.distil(_pruned(model, material), teacher), material)


def _together(model: nn.Module, material: Material) -> nn.Module:
    """Channels, ranks, distillation, mixed bits."""
    teacher = copy.deepcopy(model)
    return quantised(material.distil(_low_rank(_pruned(model, material), material), teacher), material, bits=AVERAGE)


def _torch_pruning(model: nn.Module, material: Material) -> nn.Module:
    """Pruned by torch-pruning to the share of the multiply-adds, as its examples for timm do it.

    Global, isomorphic pruning at the least ratio that meets the share; importance by Taylor, of the gradients of the cross-entropy with the
    network's own classes as labels.
    """
    images = [batch for batch in material.calibration if isinstance(batch, Tensor)]
    whole = _macs(model, images[0])
    low, high, small = 0.0, 0.95, None
    for _ in range(10):
        middle = (low + high) / 2
        attempt = _pruned_by(model, images, middle)
        if _macs(attempt, images[0]) <= material.subject.macs * whole:
            high, small = middle, attempt
        else:
            low = middle
    if small is None:
        raise SystemExit(f"torch-pruning does not leave {material.subject.macs} of the multiply-adds at any ratio")
    return quantised(material.distil(small.eval(), model), material)


def _macs(model: nn.Module, batch: Tensor) -> float:
    import torch_pruning

    count, _ = torch_pruning.utils.count_ops_and_params(copy.deepcopy(model), batch[:1])
    return float(count)


def _pruned_by(model: nn.Module, images: Sequence[Tensor], ratio: float) -> nn.Module:
    import timm
    import torch_pruning

    small = copy.deepcopy(model).eval().requires_grad_(True)
    attentions = [part for part in small.modules() if isinstance(part, timm.layers.Attention)]
    ignored = [layer for name, layer in small.named_modules() if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in CLASSIFIERS]
    pruner = torch_pruning.pruner.BasePruner(
        small, images[0][:1], importance=torch_pruning.importance.GroupTaylorImportance(), global_pruning=True, isomorphic=True,
        pruning_ratio=ratio, max_pruning_ratio=0.9, ignored_layers=ignored, num_heads={part.qkv: part.num_heads for part in attentions},
        prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=ratio, round_to=8,
    )  # fmt: skip
    for batch in images:
        scores = small(batch)
        nn.functional.cross_entropy(scores, scores.detach().argmax(1)).backward()
    pruner.step()
    for part in attentions:
        part.num_heads = pruner.num_heads[part.qkv]
        part.head_dim = part.qkv.out_features // (3 * part.num_heads)
        part.attn_dim = part.num_heads * part.head_dim
    small.zero_grad()
    return small


def _svd_by_energy(model: nn.Module, material: Material) -> nn.Module:
    """Linears and convolutions as products by a plain SVD of the weight, each with the same share of its σ², in INT8.

    The share is the largest that leaves the share of the parameters. A layer whose product would be no smaller stays, and those in `keep`.
    """
    most, keep = material.subject.parameters * sum(parameter.numel() for parameter in model.parameters()), material.subject.keep
    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        fits = sum(parameter.numel() for parameter in _factored(model, middle, keep).parameters()) <= most
        low, high = (middle, high) if fits else (low, middle)
    return quantised(_factored(model, low, keep).eval(), material)


def _factored(model: nn.Module, energy: float, keep: Sequence[str]) -> nn.Module:
    small = copy.deepcopy(model)
    for name, layer in list(small.named_modules()):
        if name not in keep and (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1)):
            weight = layer.weight.detach().flatten(1)
            left, sigma, right = torch.linalg.svd(weight, full_matrices=False)
            share = sigma.square().cumsum(0) / sigma.square().sum()
            rank = int((share < energy).sum()) + 1
            if rank * sum(weight.shape) < math.prod(weight.shape):
                root = sigma[:rank].sqrt()
                small.set_submodule(name, _product(layer, left[:, :rank] * root, root[:, None] * right[:rank]))
    return small


def _product(layer: nn.Linear | nn.Conv2d, left_OR: Tensor, right_RI: Tensor) -> nn.Sequential:
    rank, bias = len(right_RI), layer.bias is not None
    if isinstance(layer, nn.Linear):
        both: Any = nn.Linear(layer.in_features, rank, bias=False), nn.Linear(rank, layer.out_features, bias=bias)
    else:
        shape: Any = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "bias": False}
        both = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, **shape), nn.Conv2d(rank, layer.out_channels, 1, bias=bias)
    with torch.no_grad():
        for part, weight in zip(both, (right_RI, left_OR), strict=True):
            part.weight.copy_(weight.reshape(part.weight.shape))
        if bias:
            both[1].bias.copy_(layer.bias)
    return nn.Sequential(*both)


NEAREST = {"rounding": "nearest", "equalize": False, "correct_bias": False, "min_sqnr_db": 0}
"""Scales of least squared error for each output channel, nearest rounding, and nothing else."""
FORMS: dict[str, Form | None] = {
    "float": None,  # as it is
    "int8": quantised,
    "w4a8 nearest": partial(quantised, bits=4, **NEAREST),
    "w4a8": partial(quantised, bits=4),
    "w4.4a8": partial(quantised, bits=AVERAGE),
    "w5.9a8": partial(quantised, bits=5.9),
    "low rank": lambda model, material: quantised(_low_rank(model, material), material),
    "svd by energy": _svd_by_energy,
    "prune": _prune,
    "torch-pruning": _torch_pruning,
    "together": _together,
}
