"""The forms that each layer of a model may take, and what they cost in an artefact.

model -> copy, folded as `quantize` folds -> Linear and Conv2d with their inputs' grids and moments -> ranks x bits
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils import _pytree

from muntin.artifact.packing import packed_size
from muntin.budgeting.forms.plans import Form
from muntin.compression.activation_moments import Moment, input_moments
from muntin.compression.low_rank.factored_layers import factored_macs, factored_parameters, full_ranks, shell
from muntin.compression.low_rank.factorization import Dense, reasons_to_stay_dense
from muntin.compression.low_rank.rank_choices import ladder
from muntin.compression.quantization.embeddings import replaceable_tables, scale_columns
from muntin.compression.quantization.preparation import prepare
from muntin.compression.rewrite import EVERY
from muntin.graph.grids import ByteGrid
from muntin.models.eager import ModelInputs, batch_rows, eager_copy, run

KEPT = 16
"""Bits of a weight that stays in 16-bit floats."""
BITS = (3, 4, 5, 6, 8, KEPT)
"""Bits to choose from."""
EMBEDDING_BITS = (4, 5, 6, 8, KEPT)
"""Bits of embeddings to choose from."""
RANKS = 6
"""Maximum number of ranks to choose from, beside none."""
MULTIPLE = 16
"""Ranks are multiples of it, as those of `low_rank` are."""
LEAST_SHARE = 1 / 12
"""The least rank to choose from, relative to the greatest that saves parameters."""
SCALE_BYTES, BIAS_BYTES, EMBEDDING_SCALE_BYTES = 4, 4, 2
"""Bytes of an output's weight scale, of its bias, and of a scale of an embedding."""
NODE_BYTES = 700
"""Approximate bytes of graph and manifest for a layer, or a part of a factored one, and again for its integers and grid."""


@dataclass(frozen=True, kw_only=True)
class FormCost:
    """Parameters, weights and biases; their bytes in the artefact, with graph and manifest; multiply-adds for one row of inputs."""

    parameters: int
    bytes: int
    macs: float


@dataclass(frozen=True, kw_only=True)
class FormLayer:
    """A layer of the folded copy and its forms with their costs. Its present form in 16 bits, `Form(None, 16)`, is always one.

    `grid`: of its input; None for a layer that has one form only. `moment`: of its input on the batches `fitted`, None where there are no
    ranks. `positions`: rows of its output for one row of inputs. `shape`: of its input without the batch; `calls`: in a run of the model.
    `reasons`: why it has no integer form, or no factored one.
    """

    layer: Dense
    forms: Mapping[Form, FormCost]
    grid: ByteGrid | None
    moment: Moment | None
    positions: float
    shape: tuple[int, ...]
    calls: float
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class FormLayers:
    """The folded copy of a model, and its layers and its embeddings with integer forms by dotted name.

    `fitted`, `judged`: two parts of the calibration batches. A form is fitted to the first, and its harm is measured on the second: a layer
    with few rows of calibration, as behind a pooling, loses nothing on those that its factors were made of, at any rank.
    """

    model: nn.Module
    fitted: Sequence[ModelInputs]
    judged: Sequence[ModelInputs]
    layers: Mapping[str, FormLayer]
    embeddings: Mapping[str, nn.Embedding]


def ranks_of(layer: Dense, rank: int, multiple: int = MULTIPLE) -> tuple[int, ...]:
    """The ranks of a layer's factored form at the rank of a `Form`.

    That is the rank of its largest mode; a second one, of Tucker-2, is in proportion, rounded to a multiple. Raises ValueError for a rank
    below 1 or above the full one.
    """
    full = full_ranks(layer)
    most = max(full)
    if not 1 <= rank <= most:
        raise ValueError(f"rank {rank}: {type(layer).__name__} {tuple(layer.weight.shape)} takes 1 to {most}")
    return tuple(rank if mode == most else min(mode, max(1, round(rank * mode / most / multiple)) * multiple) for mode in full)


def offered_ranks(layer: Dense, multiple: int = MULTIPLE) -> list[int]:
    """At most `RANKS` ranks, descending in equal ratios from the greatest at which the factored form has fewer parameters."""
    dense = sum(parameter.numel() for parameter in layer.parameters())
    smaller = [
        rank for rank in ladder(max(full_ranks(layer)), multiple) if factored_parameters(layer, ranks_of(layer, rank, multiple)) < dense
    ]
    if not smaller:
        return []
    targets = [smaller[-1] * LEAST_SHARE ** (step / (RANKS - 1)) for step in range(RANKS)]
    return sorted({min(smaller, key=lambda rank: abs(rank - target)) for target in targets}, reverse=True)


def form_cost(layer: Dense, form: Form, positions: float) -> FormCost:
    """Cost of a form of a layer. `positions`: rows of its output (tokens, positions of a map) for one row of inputs."""
    bias = 0 if layer.bias is None else layer.bias.numel()
    if form.rank is None:
        parts, ranks = [layer.weight.shape], None
    else:
        ranks = ranks_of(layer, form.rank)
        parts = [part.weight.shape for part in shell(layer, ranks).children() if isinstance(part, nn.Linear | nn.Conv2d)]
    if form.bits == KEPT:
        stored = sum(2 * shape.numel() + NODE_BYTES for shape in parts)
    else:
        stored = sum(packed_size(shape.numel(), form.bits) + SCALE_BYTES * shape[0] + 2 * NODE_BYTES for shape in parts)
    return FormCost(
        parameters=sum(shape.numel() for shape in parts) + bias,
        bytes=stored + BIAS_BYTES * bias,
        macs=layer.weight.numel() * positions if ranks is None else factored_macs(layer, ranks, positions),
    )


def embedding_forms(table: nn.Embedding) -> dict[Form, FormCost]:
    """The forms of an embedding and their costs."""
    values = table.weight.numel()
    stored = {
        bits: 2 * values if bits == KEPT else packed_size(values, bits) + EMBEDDING_SCALE_BYTES * (values // scale_columns(table, bits))
        for bits in EMBEDDING_BITS
    }
    return {Form(None, bits): FormCost(parameters=values, bytes=NODE_BYTES + count, macs=0.0) for bits, count in stored.items()}


def layer_forms(model: nn.Module, calibration: Iterable[ModelInputs], *, bits: Sequence[int] = BITS) -> FormLayers:
    """The forms of every Linear and Conv2d of a model, any eager nn.Module; the model itself is not changed.

    A layer that `quantize` or `low_rank` would keep has fewer forms, with the reason. Names are those after folding: a convolution that
    pads in its own way is "NAME.conv". Costs the passes of `prepare` and one of moments. Raises the errors of `prepare`.
    """
    model = eager_copy(model).eval()
    ready = prepare(model, calibration, only=EVERY, keep=(), done={}, cut=True)
    layers = {name: layer for name, layer in ready.operations.items() if isinstance(layer, nn.Linear | nn.Conv2d)}
    sizes = _sizes(model, ready.batches, layers)
    dense = reasons_to_stay_dense(model, layers, {})
    free = {name: layer for name, layer in layers.items() if name in sizes and name not in ready.reasons}
    fitted, judged = halves(ready.batches)
    moments = input_moments(model, fitted, {name: layer for name, layer in free.items() if name not in dense})
    grids = {name: ready.observed[name][0].grid() for name in free}
    offered = {}
    for name, layer in layers.items():
        reasons = tuple(dict.fromkeys(reason for by_name in (ready.reasons, dense) if (reason := by_name.get(name)) is not None))
        shape, positions, calls = sizes.get(name, ((), 0.0, 0.0))
        ranks: list[int | None] = [None]
        if name in moments and moments[name].matrix.any():
            ranks += offered_ranks(layer)
        forms = [Form(rank, width) for rank in ranks for width in bits] if name in free else []
        forms = list(dict.fromkeys([*forms, Form(None, KEPT)]))
        offered[name] = FormLayer(
            layer=layer,
            forms={form: form_cost(layer, form, positions) for form in forms},
            grid=grids.get(name),
            moment=moments.get(name),
            positions=positions,
            shape=shape,
            calls=calls,
            reasons=reasons,
        )
    embeddings, _ = replaceable_tables(model, ready.batches[0])
    return FormLayers(model=model, fitted=fitted, judged=judged, layers=offered, embeddings=embeddings)


def halves(batches: Sequence[ModelInputs]) -> tuple[list[ModelInputs], list[ModelInputs]]:
    """Every second batch, and the others. A single batch is cut in two; with a single row it is both."""
    if len(batches) > 1:
        return list(batches[::2]), list(batches[1::2])
    (batch,) = batches
    rows = batch_rows(batch)
    if rows < 2:
        return [batch], [batch]
    return [some_rows(batch, 0, (rows + 1) // 2)], [some_rows(batch, (rows + 1) // 2, rows)]


def some_rows(batch: ModelInputs, first: int, last: int) -> ModelInputs:
    """The rows of a batch from `first` to before `last`. Tensors of another length than the batch's are kept."""
    rows = batch_rows(batch)
    cut: ModelInputs = _pytree.tree_map(
        lambda one: one[first:last] if isinstance(one, Tensor) and one.ndim and len(one) == rows else one,
        dict(batch) if isinstance(batch, Mapping) else batch,
    )
    return cut


def _sizes(
    model: nn.Module, batches: Sequence[ModelInputs], layers: Mapping[str, Dense]
) -> dict[str, tuple[tuple[int, ...], float, float]]:
    """The shape of each layer's input in its first call, without the batch, the rows of its output for one row of inputs, and its calls."""
    shapes: dict[str, tuple[int, ...]] = {}
    counts, calls = dict.fromkeys(layers, 0), dict.fromkeys(layers, 0)

    def hook(name: str, layer: Dense) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
        def count(_: nn.Module, inputs: tuple[Tensor, ...], by_name: dict[str, Tensor], output: Tensor) -> None:
            x = inputs[0] if inputs else by_name["input"]
            shapes.setdefault(name, tuple(x.shape[1:]))
            calls[name] += 1
            counts[name] += output.numel() // (output.shape[-3] if isinstance(layer, nn.Conv2d) else output.shape[-1])

        return count

    run(model, batches, [layer.register_forward_hook(hook(name, layer), with_kwargs=True) for name, layer in layers.items()])
    rows = sum(map(batch_rows, batches))
    return {name: (shape, counts[name] / rows, calls[name] / len(batches)) for name, shape in shapes.items()}
