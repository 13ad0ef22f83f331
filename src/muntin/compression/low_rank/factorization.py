"""The low-rank pass: layers become products of smaller ones, with ranks chosen together under one budget of parameters.

    model -> run calibration images (moments of inputs; sensitivity of the answer) -> spectra -> allocate ranks -> factor, replace

Weights are seldom of low rank, but activations are: a weight is whitened by a square root L of its input's second moment
before it is decomposed, so the dropped part is the one that calibration images use least. Ranks go to the layers where a parameter helps
the answer most, and a layer may stay dense.

A layer with few rows of calibration (one an image, behind a pooling) has a moment of low rank regardless of its need. It is decomposed by a
moment that is shrunk by the number of rows (`Moment.shrunk`). Ranks are chosen by the unshrunk moments (docs/log.md).

Sources: SVD-LLM (Wang et al., 2403.07378, section 3) for the whitened decomposition of a matrix; Tucker-2 (Kim et al., 1511.06530,
section 3) for kernels of 2 to 4; Jaderberg et al. (1405.3866, section 2) for larger ones. Deviations: convolutions are whitened over
channels, as if the taps of a kernel saw uncorrelated pixels; ranks come from one allocation; weights are not updated after the truncation.

Axes: O output and I input channels, H W the taps of a kernel, R and P ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from muntin.compression.activation_moments import Moment, answer_sensitivity, input_moments
from muntin.compression.calibration import calibration_list, check_weights
from muntin.compression.equivalent.plain_convolutions import plain_convolutions
from muntin.compression.history import checked, remember
from muntin.compression.low_rank.costs import FactoredCosts
from muntin.compression.low_rank.factored_layers import (
    FactoredConv2d,
    FactoredLayer,
    FactoredLinear,
    factored_layers,
    factored_macs,
    factored_parameters,
    full_ranks,
    shell,
)
from muntin.compression.low_rank.rank_choices import Choice, Values, choices, chosen_ranks, ladder, largest_threshold, rank_at
from muntin.compression.quantization.dequantization import quantized_layers, through_floats
from muntin.compression.quantization.qat import check_frozen
from muntin.compression.replaceability import irreplaceable
from muntin.compression.rewrite import (
    EVERY,
    WHOLE_MODEL,
    call_every_layer,
    check_kept,
    computed_weight,
    left_out,
    named,
    other_padding,
    out_of_reach,
    parameter_users,
    replace,
)
from muntin.compression.sparsity.sparsification import sparse_again
from muntin.errors import MuntinError
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, check_eager, first_row
from muntin.training.config import LowRankConfig

DAMPING = 1e-2
"""Added to the diagonal of a moment, relative to its mean, so that inputs absent from calibration keep a little weight."""
FEW_ROWS = 4
"""Calibration rows a channel below which a change is noted as uncertain."""
_BLIND = "the answer does not depend on it, or not smoothly (no_grad, detach, argmax): the harm of factoring cannot be estimated"

Dense = nn.Linear | nn.Conv2d


def low_rank(
    model: nn.Module,
    calibration: Iterable[ModelInputs],
    *,
    parameters: float = 0.35,
    macs: float | None = None,
    criterion: Literal["activation", "energy", "cumulative"] = "activation",
    threshold: float | None = None,
    multiple: int = 16,
    only: Sequence[str] = EVERY,
    keep: Sequence[str] = (),
) -> list[Change]:
    """Replace Linear and Conv2d by factored layers, in place; see the head of this file.

    `calibration`: batches of training inputs: a tensor `(B, C, H, W)` of raw pixels, of any integer or float type, several inputs as a
    tuple or dictionary, or a DataLoader, as in `quantize`. A layer with fewer than `FEW_ROWS` rows (tokens, positions of its map) a channel
    gets a note. Criteria: `activation` minimises the estimated harm to the answer, noise over signal, under `parameters` and `macs`, shares
    of the parameters of the model and of the multiply-adds of its factorable layers; `energy` and `cumulative` give every layer the least
    rank whose share of Σσ², of Σσ, of its weight reaches one `threshold`, given or the largest that meets the budget. `multiple`: of which
    ranks are multiples. `only`, `keep`: names or patterns of the layers to factor, and to leave dense.

    Budgets count from the model without factored layers, so a second run with the same budget changes nothing. Quantised layers that are
    factored keep their bits (`dequantization.through_floats`), and factors of sparse ones get their pattern.

    Costs a forward pass, three of one image, for `activation` a second one with a backward pass, and a decomposition of each layer,
    O(I²·O) for a matrix, in float64 on the CPU. Weights keep their type and device; the model is left in `eval` mode. `energy` and
    `cumulative` need training afterwards. Raises `MuntinError` if there is no calibration batch, for NaN or infinity, if `keep` names no
    layer, or if the budget is out of reach.
    """
    config = checked(
        LowRankConfig, parameters=parameters, macs=macs, criterion=criterion, threshold=threshold, multiple=multiple, keep=tuple(keep)
    )
    check_eager(model)
    check_frozen(model)
    batches = calibration_list(calibration, model)

    def run() -> list[Change]:
        return _low_rank(model, batches, config, only, keep)

    return sparse_again(model, batches, lambda: through_floats(model, batches, run) if quantized_layers(model) else run())


def _low_rank(
    model: nn.Module, batches: Sequence[ModelInputs], config: LowRankConfig, only: Sequence[str], keep: Sequence[str]
) -> list[Change]:
    """The pass on a model of float layers."""
    layers: dict[str, Dense] = dict(named(model, nn.Linear, nn.Conv2d))
    left_out({**layers, **factored_layers(model)}, only, keep)
    check_weights(layers, done="factored")  # raises before the model is changed
    paddings = plain_convolutions(model.eval(), first_row(batches[0]))
    layers = dict(named(model, nn.Linear, nn.Conv2d))
    unnamed = left_out({**layers, **factored_layers(model)}, only, keep)  # layers inside padded ones
    call_every_layer(model)
    reasons = reasons_to_stay_dense(model, layers, unnamed)
    factored = FactoredCosts.of(model, batches, with_macs=config.macs is not None)
    if (within := factored.reason(config)) is not None:
        reasons |= {name: within for name in layers if name not in reasons}
    reasons |= irreplaceable(model, {name: layer for name, layer in layers.items() if name not in reasons}, first_row(batches[0]))
    free = {name: layer for name, layer in layers.items() if name not in reasons}
    moments = input_moments(model, batches, free)
    reasons |= {name: reason for name in free if (reason := _unused(moments.get(name))) is not None}
    free = {name: layer for name, layer in free.items() if name not in reasons}
    picked: dict[str, Choice] = {}
    if free and config.criterion == "activation":
        sensitivity = answer_sensitivity(model, batches, free)
        reasons |= {name: _BLIND for name in free if not sensitivity[name]}
        free = {name: layer for name, layer in free.items() if name not in reasons}
        picked = _pick_by_answer(free, moments, sensitivity, config, factored)
    elif free:
        picked = _pick_by_threshold(free, config, factored)
    for name, layer in free.items():
        choice = picked[name]
        if choice.ranks and choice.parameters < _dense_parameters(layer):
            root = square_root(moments[name].shrunk()) if config.criterion == "activation" else None
            replace(model, name, factorize(layer, choice.ranks, root))
        else:
            reasons[name] = _why_dense(layer, choice.ranks, config)
    changes = [_change(name, layer, reasons.get(name), picked, _uncertain(moments.get(name), config)) for name, layer in layers.items()]
    return remember(model, paddings + changes + out_of_reach(model, "low_rank", "factored form"))


def factor(model: nn.Module, calibration: Iterable[ModelInputs], ranks: Mapping[str, Sequence[int]]) -> list[Change]:
    """Replace the Linears and Conv2ds that `ranks` names by factored layers of these ranks, in place.

    `ranks`: by dotted name, one for each mode of `full_ranks`, from 1 to it. `calibration`: as in `low_rank`; weights are whitened by its
    inputs. A layer that no other form can replace is kept, with the reason. Costs a forward pass, three of one row, and the decomposition
    of each layer. Raises `MuntinError` for an unknown layer and for ranks that do not fit, before a layer is factored.
    """
    check_eager(model)
    check_frozen(model)
    batches = calibration_list(calibration, model)

    def run() -> list[Change]:
        return _factor(model, batches, ranks)

    return sparse_again(model, batches, lambda: through_floats(model, batches, run) if quantized_layers(model) else run())


def _factor(model: nn.Module, batches: Sequence[ModelInputs], ranks: Mapping[str, Sequence[int]]) -> list[Change]:
    paddings = plain_convolutions(model.eval(), first_row(batches[0]))
    every: dict[str, Dense] = dict(named(model, nn.Linear, nn.Conv2d))
    check_kept(tuple(ranks), every, argument="ranks")
    layers = {name: every[name] for name in ranks if name in every}
    check_weights(layers, done="factored")
    picked = {name: _given(name, layer, tuple(ranks[name])) for name, layer in layers.items()}
    call_every_layer(model)
    reasons = reasons_to_stay_dense(model, layers, {})
    reasons |= irreplaceable(model, {name: layer for name, layer in layers.items() if name not in reasons}, first_row(batches[0]))
    free = {name: layer for name, layer in layers.items() if name not in reasons}
    moments = input_moments(model, batches, free)
    reasons |= {name: reason for name in free if (reason := _unused(moments.get(name))) is not None}
    for name, layer in free.items():
        if name not in reasons:
            replace(model, name, factorize(layer, picked[name].ranks, square_root(moments[name].shrunk())))
    return remember(model, paddings + [_change(name, layer, reasons.get(name), picked, "") for name, layer in layers.items()])


def _given(name: str, layer: Dense, ranks: tuple[int, ...]) -> Choice:
    full = full_ranks(layer)
    if len(ranks) != len(full) or not all(1 <= rank <= most for rank, most in zip(ranks, full, strict=True)):
        allowed = ", ".join(f"1-{most}" for most in full)
        raise MuntinError(f"ranks of '{name}': {', '.join(map(str, ranks)) or 'none'}; the layer takes {allowed}")
    return Choice(ranks=ranks, parameters=factored_parameters(layer, ranks))


def _change(name: str, layer: Dense, reason: str | None, picked: Mapping[str, Choice], note: str) -> Change:
    if reason is not None:
        return Change(layer=name, pass_="low_rank", done="kept", reason=reason)
    ranks = picked[name].ranks
    return Change(layer=name, pass_="low_rank", done=_ranks_text(ranks, full_ranks(layer)), ranks=ranks, note=note)


def _uncertain(moment: Moment | None, config: LowRankConfig) -> str:
    if moment is None or config.criterion != "activation" or moment.rows >= FEW_ROWS * len(moment.mean):
        return ""
    return f"{moment.rows} rows of calibration for {len(moment.mean)} channels"


def _ranks_text(ranks: tuple[int, ...], full: tuple[int, ...]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))} of {', '.join(map(str, full))}"


def reasons_to_stay_dense(model: nn.Module, layers: Mapping[str, Dense], unnamed: Mapping[str, str]) -> dict[str, str]:
    """Reasons to keep layers dense for any budget, by name. `unnamed`: those of layers that the caller leaves out."""
    factored = {id(part) for layer in factored_layers(model).values() for part in layer.children()}
    users = parameter_users(model)
    reasons = {}
    for name, layer in layers.items():
        if id(layer) in factored:
            reasons[name] = "already factored"
        elif name in unnamed:
            reasons[name] = unnamed[name]
        elif layer is model:
            reasons[name] = WHOLE_MODEL
        elif (reason := _no_form(layer) or _tied(layer, users)) is not None:
            reasons[name] = reason
    return reasons


def _no_form(layer: Dense) -> str | None:
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"{type(layer).__name__} may compute something else than its kind: no factored form"
    if (reason := computed_weight(layer)) is not None:
        return reason
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"{'depthwise' if layer.groups == layer.in_channels else 'grouped'} convolution: no factored form here"
    return other_padding(layer, "factored form")


def _tied(layer: Dense, users: Mapping[int, list[str]]) -> str | None:
    shared = next((by for parameter in layer.parameters() if len(by := users[id(parameter)]) > 1), None)
    return None if shared is None else f"its parameters are shared by {' and '.join(shared)}: factoring one of them saves nothing"


def _unused(moment: Moment | None) -> str | None:
    if moment is None:
        return "no calibration image reached it"
    if not moment.matrix.any():
        return "its input is zero on every calibration image"
    return None


def _why_dense(layer: Dense, ranks: tuple[int, ...], config: LowRankConfig) -> str:
    full, dense = full_ranks(layer), _dense_parameters(layer)
    tried = ranks or tuple(ladder(most, config.multiple)[0] for most in full)
    count = factored_parameters(layer, tried)
    if count >= dense:
        return f"{_ranks_text(tried, full)} would have {count:,} parameters, dense has {dense:,}"
    return "dense within the budget: factoring other layers harms the answer less"


def _dense_parameters(layer: Dense) -> int:
    return sum(parameter.numel() for parameter in layer.parameters())


def _pick_by_answer(
    free: Mapping[str, Dense],
    moments: Mapping[str, Moment],
    sensitivity: Mapping[str, float],
    config: LowRankConfig,
    factored: FactoredCosts,
) -> dict[str, Choice]:
    menus = {}
    for name, layer in free.items():
        positions = moments[name].positions
        menus[name] = choices(
            spectra(layer, square_root(moments[name].matrix)),
            lambda ranks, layer=layer, n=positions: (factored_parameters(layer, ranks), factored_macs(layer, ranks, n)),  # type: ignore[misc]
            Choice(parameters=_dense_parameters(layer), macs=layer.weight.numel() * positions),
            multiple=config.multiple,
            scale=sensitivity[name] * positions,
        )
    budget, fixed = factored.budget(config), factored.fixed(free)
    if config.macs is None:
        return chosen_ranks(menus, budget, fixed=fixed)
    whole = factored.dense_macs + sum(menu[-1].macs for menu in menus.values())  # dense
    return chosen_ranks(menus, budget, macs=config.macs * whole * (1 + 1e-9) - factored.macs, fixed=fixed)


def _pick_by_threshold(free: Mapping[str, Dense], config: LowRankConfig, factored: FactoredCosts) -> dict[str, Choice]:
    power = 1.0 if config.criterion == "energy" else 0.5
    values = {name: [carried**power for carried in spectra(layer)] for name, layer in free.items()}

    def pick(threshold: float) -> dict[str, Choice]:
        picked = {}
        for name, layer in free.items():
            ranks = tuple(rank_at(mode, threshold, config.multiple) for mode in values[name])
            picked[name] = Choice(ranks=ranks, parameters=factored_parameters(layer, ranks))
        return picked

    budget, fixed = factored.budget(config), factored.fixed(free)

    def total(threshold: float) -> int:
        return fixed + sum(min(choice.parameters, _dense_parameters(free[name])) for name, choice in pick(threshold).items())

    return pick(config.threshold or largest_threshold(total, budget))


def square_root(moment_II: Tensor) -> Tensor:
    """Lower triangular L with L·Lᵀ = moment + `DAMPING` · the mean of its diagonal, float64 `(I, I)`."""
    diagonal = moment_II.diagonal()
    damped_II = moment_II + torch.diag_embed(torch.full_like(diagonal, DAMPING * float(diagonal.mean())))
    return torch.linalg.cholesky(damped_II)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Whitened:
    """A weight in float64 on the CPU, for input channels that are uncorrelated and of variance 1: `(O, I, H, W)`, 1x1 for a matrix."""

    weight: Tensor
    root: Tensor | None

    def back(self, rows_NI: Tensor) -> Tensor:
        """Rows over whitened channels as rows over the layer's channels."""
        if self.root is None:
            return rows_NI
        return torch.linalg.solve_triangular(self.root, rows_NI, upper=False, left=False)  # type: ignore[no-any-return]

    @property
    def matrix(self) -> Tensor:
        """`(O·W, I·H)`: the unfolding of the spatial form, for 1x1 the weight itself."""
        return self.weight.permute(0, 3, 1, 2).flatten(2).flatten(0, 1)

    def gram_in(self) -> Tensor:
        """Gram matrix of the unfolding by input channels, `(I, I)`."""
        return torch.einsum("oihw,ojhw->ij", self.weight, self.weight)

    def gram_out(self) -> Tensor:
        """Gram matrix of the unfolding by output channels, `(O, O)`."""
        return torch.einsum("oihw,pihw->op", self.weight, self.weight)


def _whiten(layer: Dense, root_II: Tensor | None) -> _Whitened:
    weight = layer.weight.detach().to("cpu", torch.float64)
    weight_OIHW = weight.reshape(*weight.shape[:2], 1, 1) if weight.ndim == 2 else weight
    if root_II is not None:
        weight_OIHW = torch.einsum("oihw,ij->ojhw", weight_OIHW, root_II)
    return _Whitened(weight_OIHW, root_II)


def spectra(layer: Dense, root_II: Tensor | None = None) -> list[Values]:
    """σ² of the components of each mode that `factorize` can drop, descending: one array, two of Tucker-2.

    With the square root of the input's moment, σ² is the component's part of the output's power: for a matrix the squared error of dropping
    it (SVD-LLM, theorem 3.2). Without, it is of the weight alone.
    """
    whitened, full = _whiten(layer, root_II), full_ranks(layer)
    if len(full) == 2:
        grams = [whitened.gram_in(), whitened.gram_out()]
    else:
        matrix = whitened.matrix
        grams = [matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix]
    values = [torch.linalg.eigvalsh(gram).flip(0).clamp_min(0).numpy()[:most] for gram, most in zip(grams, full, strict=True)]
    return [np.asarray(v, np.float64) for v in values]


@torch.no_grad()
def factorize(layer: Dense, ranks: tuple[int, ...], root_II: Tensor | None = None) -> FactoredLayer:
    """The factored form of a Linear or Conv2d at `ranks` with the least error for inputs whose moment has the square root given.

    Without a root all inputs count alike. At full ranks (`full_ranks`) the output is the layer's. The layer itself is not changed. The
    scale of each component is split as √σ between neighbouring parts, so that training and 8 bits suit both.
    """
    factored, whitened = shell(layer, ranks), _whiten(layer, root_II)
    if len(ranks) == 2:
        _fill_tucker(cast(FactoredConv2d, factored), whitened)
    else:
        _fill_product(factored, whitened)
    if layer.bias is not None:
        cast(Tensor, factored.expand.bias).copy_(layer.bias)
    return factored.requires_grad_(layer.weight.requires_grad)


def _fill_product(factored: FactoredLayer, whitened: _Whitened) -> None:
    (rank,) = factored.ranks
    outputs, inputs, height, width = whitened.weight.shape
    left, sigma_R, right = torch.linalg.svd(whitened.matrix, full_matrices=False)
    half_R = sigma_R[:rank].sqrt()
    reduce_RIH = (half_R[:, None] * right[:rank]).reshape(rank, inputs, height)
    reduce_RHI = whitened.back(reduce_RIH.transpose(1, 2).reshape(-1, inputs)).reshape(rank, height, inputs)
    expand_OWR = (left[:, :rank] * half_R).reshape(outputs, width, rank)
    factored.reduce.weight.copy_(reduce_RHI.transpose(1, 2).reshape(factored.reduce.weight.shape))
    factored.expand.weight.copy_(expand_OWR.transpose(1, 2).reshape(factored.expand.weight.shape))


def _fill_tucker(factored: FactoredConv2d, whitened: _Whitened) -> None:
    rank_in, rank_out = factored.ranks
    basis_IR, half_R = _mode(whitened.gram_in(), rank_in)
    basis_OP, half_P = _mode(whitened.gram_out(), rank_out)
    core_PRHW = torch.einsum("oihw,op,ir->prhw", whitened.weight, basis_OP / half_P, basis_IR / half_R)
    factored.reduce.weight.copy_(whitened.back((basis_IR * half_R).T).reshape(factored.reduce.weight.shape))
    factored.core.weight.copy_(core_PRHW)
    factored.expand.weight.copy_((basis_OP * half_P).reshape(factored.expand.weight.shape))


def _mode(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The first `rank` components of an unfolding, and √σ of each."""
    values, vectors = torch.linalg.eigh(gram)
    sigma = values.flip(0)[:rank].clamp_min(0).sqrt()
    largest = float(sigma.max())
    return vectors.flip(1)[:, :rank], torch.where(sigma > 1e-6 * largest, sigma, torch.full_like(sigma, largest or 1.0)).sqrt()


def structure_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The ranks of each factored layer, by dotted name."""
    return {name: layer.ranks for name, layer in factored_layers(model).items()}


def apply_structure(model: nn.Module, structure: Mapping[str, Sequence[int]]) -> None:
    """Put factored layers with zero weights where `structure` says, in place; load the weights of a checkpoint next.

    Layers that already have these ranks are kept. Raises `MuntinError` for a name that is no layer of the model, or ranks that
    do not fit it, before anything is changed.
    """
    shells: dict[str, FactoredLayer] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, ranks in structure.items():
        layer = modules.get(name)
        if isinstance(layer, FactoredLinear | FactoredConv2d) and layer.ranks == tuple(ranks):
            continue
        if not name or type(layer) not in (nn.Linear, nn.Conv2d):
            what = "is not in the model" if layer is None else f"is a {type(layer).__name__}, not a Linear or Conv2d"
            raise MuntinError(f"structure: layer '{name}' {what}: build the model that the checkpoint was made of")
        try:
            shells[name] = shell(cast(Dense, layer), tuple(ranks))
        except ValueError as error:
            raise MuntinError(f"structure: layer '{name}': {error}: build the model that the checkpoint was made of") from error
    for name, factored in shells.items():
        replace(model, name, factored)
    call_every_layer(model)
