"""The harm of each form of each layer: how much the model's answer changes if this layer alone takes the form. Needs no labels.

    rows of each layer's input (patches of a convolution) -> output in the form's arithmetic -> squared error x response of the answer
    each layer's input on its 8-bit grid -> noise in the answer

Factors and rounding are fitted to one part of the calibration batches and judged on the other.

A layer is decomposed once; its lower ranks are parts of that. Factors and integers are computed on rows, as products of matrices, so a form
costs milliseconds. Weights are rounded to nearest with the error made as small as reconstruction (`quantization.rounding`) would make it,
a share that does not depend on the bits (`kept_by_reconstruction`).

Axes: N rows, G groups, O outputs and I inputs of a group, H W taps of a kernel, R and P ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.budgeting.forms.layer_forms import EMBEDDING_BITS, KEPT, FormLayer, FormLayers, ranks_of, some_rows
from muntin.budgeting.forms.plans import Form
from muntin.compression.activation_moments import answer_sensitivity, copied
from muntin.compression.low_rank.factored_layers import FactoredLayer
from muntin.compression.low_rank.factorization import Dense, factorize, square_root
from muntin.compression.quantization.embeddings import integer_table
from muntin.compression.quantization.fake_quantization import dequantize_weight, quantize_dequantize, quantize_weight
from muntin.compression.quantization.quantized_layers import InputGrid
from muntin.compression.quantization.rounding import DAMPING, MAX_INPUTS, SPARSE
from muntin.compression.quantization.widths import BATCHES
from muntin.graph.grids import ByteGrid, RangeObserver
from muntin.models.eager import ModelInputs, call, tensors_of, watch_inputs
from muntin.runtime.tiles import Progress

ROWS, VALUES = 1024, 2**21
"""Maximum number of rows of a layer, and of their values."""
PROBED, PROBED_MAPS, PROBE_BITS = 16, 4, 5
"""Rows of inputs on which the response of the output to each layer's rounding is measured (fewer of models with many numbers in a row's
output, whose means are exact with few), and the bits of that rounding."""
MAP_NUMBERS = 4096
"""Numbers in the output of a row from which `PROBED_MAPS` rows are probed."""
BLIND = "the answer does not depend on it, or not smoothly (no_grad, detach, argmax): the harm of its forms cannot be estimated"
"""Reason to keep a layer."""


def probe_of(model: nn.Module, batch: ModelInputs) -> ModelInputs:
    """Return the first rows of a batch, on which each layer is probed. Costs a call of the model with one row."""
    numbers = scores_of(model, some_rows(batch, 0, 1)).numel()
    return some_rows(batch, 0, PROBED if numbers < MAP_NUMBERS else PROBED_MAPS)


def measure_harm(
    layers: FormLayers, *, measured: Collection[str] = (), progress: Progress = lambda done, total: None
) -> Iterator[tuple[str, dict[Form, float]]]:
    """Yield each layer's and embedding's name with the harm of its forms: noise over signal that a form adds to the output, from 0.

    Harms are additive over layers. A layer that the output does not depend on smoothly has its present form only (`BLIND`).

    `measured`: names to leave out. `progress`: called with the layers done and their number. Costs a forward and backward pass over two
    batches, two forward passes over all, two of the probed rows for each layer (`probe_of`), a decomposition of each layer, and for each
    form products of at most `ROWS` rows with its weights. Memory: twice `VALUES` numbers a layer.
    """
    total = len(layers.layers) + len(layers.embeddings)
    left = {name: one for name, one in layers.layers.items() if name not in measured}
    varied = {name: one for name, one in left.items() if len(one.forms) > 1}
    sensitivity = answer_sensitivity(layers.model, layers.judged[:BATCHES], {name: one.layer for name, one in varied.items()})
    fitted, judged = (_rows_of(layers.model, batches, varied) for batches in (layers.fitted, layers.judged))
    probed = probe_of(layers.model, layers.judged[0])
    exact = scores_of(layers.model, probed)
    for done, (name, one) in enumerate(left.items(), start=len(layers.layers) - len(left)):
        progress(done, total)
        if name not in varied:
            yield name, dict.fromkeys(one.forms, 0.0)
        elif not sensitivity[name]:
            yield name, {Form(None, KEPT): 0.0}
        else:
            response = weight_response(layers.model, probed, exact, one.layer)
            scale = float(sensitivity[name]) * one.positions * len(one.layer.weight) if response is None else response
            rows = judged.pop(name)
            error_of_input = input_error(one, rows)
            measured_input = input_harm(layers.model, probed, exact, one)
            of_input = scale * error_of_input if measured_input is None else measured_input
            errors = form_errors(one, fitted.pop(name), rows)
            yield (
                name,
                {
                    form: scale * error if form.bits == KEPT else scale * max(0.0, error - error_of_input) + of_input
                    for form, error in errors.items()
                },
            )
    for done, (name, table) in enumerate(layers.embeddings.items(), start=len(layers.layers)):
        progress(done, total)
        if name not in measured:
            yield name, embedding_harm(layers.model, probed, exact, table)
    progress(total, total)


@torch.no_grad()
def embedding_harm(model: nn.Module, batch: ModelInputs, exact: Tensor, table: nn.Embedding) -> dict[Form, float]:
    """Return the harm of each form of an embedding, measured in the output; forms without a finite one are absent.

    `exact`: the scores of the batch (`scores_of`). Costs the rounding and a forward pass for each form.
    """
    harms = {Form(None, KEPT): 0.0}
    for bits in EMBEDDING_BITS:
        if bits < KEPT:
            rounded = integer_table(table, bits)

            def looked_up(ids: Tensor, output: Tensor, rounded: nn.Module = rounded) -> Tensor:
                found: Tensor = rounded(ids)
                return found

            harms[Form(None, bits)] = _noise_of(model, batch, exact, table, looked_up)
    return {form: noise for form, noise in harms.items() if math.isfinite(noise)}


@torch.no_grad()
def weight_response(model: nn.Module, batch: ModelInputs, exact: Tensor, layer: Dense) -> float | None:
    """Return noise over signal of the output for a mean squared error of 1 in a layer's output, measured with its weight rounded.

    `answer_sensitivity` assumes errors that are independent of each other. Those of rounding are smooth where the input is, and networks
    hardly respond to smooth errors of their first layers. None where rounding has no effect, or no finite one. Costs a forward pass.
    """
    probe = _Probe(layer)
    noise = _noise_of(model, batch, exact, layer, probe)
    return noise / (probe.square / probe.count) if probe.square > 0 and 0 < noise < math.inf else None


@torch.no_grad()
def input_harm(model: nn.Module, batch: ModelInputs, exact: Tensor, one: FormLayer) -> float | None:
    """Return noise over signal of the output with the input of one layer in 8 bits, measured; None if it is not finite.

    The response to rounded weights does not tell it: errors of an input are largest where its values are, which may be in rows and channels
    that the output hardly depends on. Costs a forward pass.
    """
    assert one.grid is not None
    noise = _noise_of(model, batch, exact, one.layer, _RoundedInput(one.layer, one.grid))
    return noise if 0 <= noise < math.inf else None


class _RoundedInput:
    """Computes a layer on its rounded input, without the mean error, which a bias takes over."""

    def __init__(self, layer: Dense, grid: ByteGrid) -> None:
        self.layer, self.grid = layer, grid

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        error = self.layer.forward(_on_grid(x.float(), self.grid).to(x.dtype)) - output
        return output + (error if self.layer.bias is None else _centred(error, self.layer))


def _centred(error: Tensor, layer: Dense) -> Tensor:
    channels = error.ndim - (3 if isinstance(layer, nn.Conv2d) else 1)
    return error - error.mean([axis for axis in range(error.ndim) if axis != channels], keepdim=True)


def _noise_of(model: nn.Module, batch: ModelInputs, exact: Tensor, layer: nn.Module, other: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Noise over signal of the answer, which is `exact`, if a layer's output is `other(input, output)`. Costs a forward pass."""

    def replaced(_: nn.Module, inputs: tuple[Tensor, ...], by_name: dict[str, Tensor], output: Tensor) -> Tensor:
        return other(inputs[0] if inputs else by_name["input"], output)

    handle = layer.register_forward_hook(replaced, with_kwargs=True)
    try:
        noise = float((scores_of(model, batch) - exact).square().mean())
    finally:
        handle.remove()
    return noise / (float(exact.var(correction=0)) or 1.0)


@torch.no_grad()
def scores_of(model: nn.Module, batch: ModelInputs) -> Tensor:
    """Return the floats of a model's output for a batch, in one dimension. Costs a forward pass."""
    return torch.cat([part.double().flatten() for part in tensors_of(call(model, copied(batch))) if part.is_floating_point()])


class _Probe:
    """Adds the rounding error of the layer's weight, without its mean, which a bias takes over."""

    def __init__(self, layer: Dense) -> None:
        weight = layer.weight.detach()
        self.layer = layer
        self.change = (dequantize_weight(*quantize_weight(weight, 0, PROBE_BITS), 0) - weight.float()).to(weight.dtype)
        self.square, self.count = 0.0, 0

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Conv2d):
            error = F.conv2d(x, self.change, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        else:
            error = F.linear(x, self.change)
        error = _centred(error, layer)
        self.square += float(error.double().square().sum())
        self.count += error.numel()
        return output + error


def _rows_of(model: nn.Module, batches: Sequence[ModelInputs], layers: Mapping[str, FormLayer]) -> dict[str, Tensor]:
    """Rows of each layer's input, (G, N, I), evenly from all batches."""
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        width = layer.weight[0].numel() * getattr(layer, "groups", 1)
        most = min(ROWS, VALUES // width) // len(batches)
        parts[name].append(input_rows(layer, inputs[0].float(), max(1, most)).cpu())

    watch_inputs(model, {name: one.layer for name, one in layers.items()}, batches, watch)
    return {name: torch.cat(some, 1) for name, some in parts.items()}


def input_rows(layer: Dense, x: Tensor, most: int) -> Tensor:
    """About `most` rows of a layer's input, (G, N, I): tokens, or the patches of a convolution, I channels by taps."""
    if isinstance(layer, nn.Linear):
        x_NI = x.reshape(-1, x.shape[-1])
        return x_NI[None, :: -(-len(x_NI) // most)].clone()
    assert not isinstance(layer.padding, str)
    x = x.reshape(-1, *x.shape[-3:])
    positions = x.shape[0] * x.shape[2] * x.shape[3] / (layer.stride[0] * layer.stride[1])
    step = max(1, round((positions / most) ** 0.5))
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, tuple(side * step for side in layer.stride))
    B, width, count = patches.shape  # width: channels by taps
    groups = layer.groups
    rows_GNI = patches.reshape(B, groups, width // groups, count).permute(1, 0, 3, 2).reshape(groups, B * count, -1)
    return rows_GNI[:, :: -(-rows_GNI.shape[1] // most)].clone()


@torch.no_grad()
def input_error(one: FormLayer, rows_GNI: Tensor) -> float:
    """The mean squared error of an output element by the 8-bit input alone."""
    assert one.grid is not None
    weight_GOI = one.layer.weight.detach().cpu().float().reshape(len(rows_GNI), -1, rows_GNI.shape[2])
    error_GNO = (_on_grid(rows_GNI, one.grid) - rows_GNI) @ weight_GOI.transpose(1, 2)
    if one.layer.bias is not None:
        error_GNO -= error_GNO.mean(1, keepdim=True)
    return float(error_GNO.double().square().mean())


@torch.no_grad()
def form_errors(one: FormLayer, fitted_GNI: Tensor, rows_GNI: Tensor) -> dict[Form, float]:
    """The mean squared error of an output element in each form, on rows of the layer's input. `fitted_GNI`: those that it is fitted to."""
    layer = one.layer
    assert one.grid is not None
    exact = layer.weight.detach().cpu().float()
    weight_GOI = exact.reshape(len(rows_GNI), -1, rows_GNI.shape[2])
    exact_GNO = rows_GNI @ weight_GOI.transpose(1, 2)
    rounded_GNI = _on_grid(rows_GNI, one.grid)
    kept_G = kept_by_reconstruction(fitted_GNI, rows_GNI)
    chain = _Chain(one, rows_GNI[0], float(kept_G[0])) if any(form.rank is not None for form in one.forms) else None
    errors = {}
    for form in one.forms:
        if form == Form(None, KEPT):
            errors[form] = 0.0
            continue
        if form.rank is None:
            weight = _rounded(exact, form.bits, kept_G.repeat_interleave(weight_GOI.shape[1])).reshape(weight_GOI.shape)
            output_GNO = rounded_GNI @ weight.transpose(1, 2)
        else:
            assert chain is not None
            output_GNO = chain.output(form, rounded_GNI[0])[None]
        error_GNO = output_GNO - exact_GNO
        if form.bits < KEPT and layer.bias is not None:
            error_GNO -= error_GNO.mean(1, keepdim=True)  # the bias takes it over
        errors[form] = float(error_GNO.double().square().mean())
    return errors


def _on_grid(x: Tensor, grid: ByteGrid) -> Tensor:
    rounding = InputGrid(grid)
    return quantize_dequantize(x, rounding.scale, rounding.zero_point)


def _rounded(weight: Tensor, bits: int, kept_O: Tensor) -> Tensor:
    """A weight with the rounding error of its bits, of which the share `kept_O` of the squared error stays; float32."""
    q, scale_O = quantize_weight(weight, 0, bits)
    return weight + (dequantize_weight(q, scale_O, 0) - weight) * kept_O.sqrt().reshape(-1, *[1] * (weight.ndim - 1))


def kept_by_reconstruction(fitted_GNI: Tensor, rows_GNI: Tensor) -> Tensor:
    """The share of the squared error of nearest rounding that stays after rounding column by column, by group `(G,)`; above 1 where few
    fitted rows mislead it.

    With the (damped) moment of the fitted rows as L·D·Lᵀ, L unit triangular, the weight's error is E·L⁻¹ for independent rounding errors E
    of the columns (GPTQ, 2210.17323, section 3.3, and `rounding.rounded_columns`), so that the share is tr(L⁻¹·M·L⁻ᵀ) / tr(M) on rows of
    moment M. Costs a Cholesky decomposition, I³, and a triangular one to solve.
    """
    count, width = fitted_GNI.shape[1:]
    if width > MAX_INPUTS:
        return torch.ones(len(fitted_GNI))
    fitted_GII, moment_GII = _covariance(fitted_GNI), _covariance(rows_GNI)
    variance_GI = fitted_GII.diagonal(dim1=1, dim2=2)
    mean_G1 = variance_GI.mean(1, keepdim=True)
    order_GI = variance_GI.argsort(1)  # those with the largest variance are rounded first: the last ones of the decomposition
    fitted_GII, moment_GII = (_ordered(one, order_GI) for one in (fitted_GII, moment_GII))
    fitted_GII.diagonal(dim1=1, dim2=2).add_(torch.where(mean_G1 > 0, mean_G1, 1.0) * (DAMPING + SPARSE * width / count))
    lower_GII = torch.linalg.cholesky(fitted_GII)
    unit_GII = lower_GII / lower_GII.diagonal(dim1=1, dim2=2)[:, None, :]
    half_GII = torch.linalg.solve_triangular(unit_GII, moment_GII, upper=False, unitriangular=True)
    left_GII = torch.linalg.solve_triangular(unit_GII, half_GII.transpose(1, 2), upper=False, unitriangular=True)
    before_G, after_G = (one.diagonal(dim1=1, dim2=2).sum(1) for one in (moment_GII, left_GII))
    return torch.where(before_G > 0, after_G / before_G, 1.0).clamp_min(0).float()


def _covariance(rows_GNI: Tensor) -> Tensor:
    centred_GNI = (rows_GNI - rows_GNI.mean(1, keepdim=True)).double()
    return centred_GNI.transpose(1, 2) @ centred_GNI / rows_GNI.shape[1]


def _ordered(moment_GII: Tensor, order_GI: Tensor) -> Tensor:
    rows_GII = moment_GII.gather(1, order_GI[:, :, None].expand_as(moment_GII))
    return rows_GII.gather(2, order_GI[:, None, :].expand_as(moment_GII))


class _Chain:
    """The factored forms of a layer on rows of its input, without the bias. All ranks are parts of one decomposition."""

    def __init__(self, one: FormLayer, rows_NI: Tensor, kept: float) -> None:
        assert one.moment is not None and one.grid is not None
        self.layer = one.layer
        ranks = [ranks_of(one.layer, form.rank) for form in one.forms if form.rank is not None]
        self.factored = factorize(one.layer, max(ranks), square_root(one.moment.shrunk()))
        self.rows_NI, self.kept = rows_NI, kept

    def output(self, form: Form, rounded_NI: Tensor) -> Tensor:
        """The output in a form, (N, O). `rounded_NI`: the rows on the grid of the layer's input."""
        assert form.rank is not None
        weights = cut_factors(self.factored, ranks_of(self.layer, form.rank))
        shape = getattr(self.layer, "kernel_size", (1, 1))
        exact = x = self.rows_NI.reshape(len(self.rows_NI), -1, *shape)
        if form.bits < KEPT:
            x = rounded_NI.reshape(exact.shape)
        for index, weight in enumerate(weights):
            if form.bits < KEPT and index:
                x = _on_grid(x, _grid_of(exact))
            used = weight
            if form.bits < KEPT:
                used = _rounded(weight, form.bits, torch.tensor(self.kept if index == 0 else 1.0))
            exact, x = (_part(values, one) for values, one in ((exact, weight), (x, used)))
        return x.flatten(1)


def cut_factors(factored: FactoredLayer, ranks: Sequence[int]) -> list[Tensor]:
    """The weights of the parts at lower ranks, each `(O, I, H, W)`: equal to those of `factorize` at these ranks."""
    weights = [
        part.weight.detach().cpu().float()
        for part in (factored.reduce, getattr(factored, "core", None), factored.expand)
        if part is not None
    ]
    weights = [weight.reshape(*weight.shape[:2], *(weight.shape[2:] or (1, 1))) for weight in weights]
    outputs = (*ranks, len(weights[-1]))
    inputs = (weights[0].shape[1], *ranks)
    return [weight[:out, :into] for weight, out, into in zip(weights, outputs, inputs, strict=True)]


def _part(x_NIHW: Tensor, weight_OIHW: Tensor) -> Tensor:
    """One part of a chain on patches: an axis on which its kernel has one tap stays, the other ones are summed over."""
    rows, columns = (1 if taps == side else side for taps, side in zip(weight_OIHW.shape[2:], x_NIHW.shape[2:], strict=True))
    x = x_NIHW.permute(0, 2, 3, 1)  # (N, H, W, I)
    N, H, W, C = x.shape
    x = x.reshape(N, rows, H // rows, columns, W // columns, C).permute(0, 1, 3, 5, 2, 4).reshape(N * rows * columns, -1)
    out = x @ weight_OIHW.flatten(1).T
    return out.reshape(N, rows, columns, -1).permute(0, 3, 1, 2)


def _grid_of(x: Tensor) -> ByteGrid:
    observer = RangeObserver()
    observer.see_range(float(x.min()), float(x.max()))
    observer.see_values(x.numpy())
    return observer.grid()
