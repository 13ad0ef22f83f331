"""Tables of embeddings as integers: rows of 2 to 8 bits with scales in FP16, which the engine looks up as integers.

    rows of the table -> groups of columns -> a scale for each group by least squared error -> integers

At 8 bits a row has one scale. Below, each `COLUMNS` columns have one, which may be negative, so that the value furthest from zero has the
level that the other sign lacks: 4 bits have the levels -8 to 7. Small tables (positions, types of tokens) keep 8 bits: what is added to
every token costs accuracy, and they hardly take bytes.

Axes: V rows, C columns, G groups of columns of one scale, N groups of all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.compression.calibration import check_weights
from muntin.compression.quantization.fake_quantization import sqnr_db, weight_scale
from muntin.compression.quantization.quantized_layers import keep_geometry
from muntin.compression.replaceability import irreplaceable
from muntin.compression.rewrite import UNUSUAL, WHOLE_MODEL, computed_weight, left_out, named, parameter_users, replace
from muntin.errors import MuntinError
from muntin.models.compression_record import Change, TableRecord
from muntin.models.eager import ModelInputs, first_row

COLUMNS = 32
"""Columns of a table below 8 bits that share a scale."""
SMALL = 0.05
"""Share of the values of all embeddings up to which a table is small."""
CLIPS = 12
"""Candidate ranges of a group for each sign, from all of its range to `LEAST_CLIP` of it."""
LEAST_CLIP = 0.6
BLOCK = 1 << 17
"""Groups that are searched at a time."""
TableBits = int | Mapping[str, int]
"""Bits of all embeddings, or of those named."""
_HALF = torch.finfo(torch.float16)


class QuantizedEmbedding(nn.Module):
    """An `nn.Embedding` of integers, `(...) -> (..., C)`: row i is `integers[i]` times its scales.

    `integers`: int8 `(V, C)`, also below 8 bits; the artefact packs them. `scale`: `(V, G)`, exact in FP16
    unless out of its range, in the type of the table.
    """

    integers: Tensor
    scale: Tensor

    def __init__(self, layer: nn.Embedding, bits: int, columns: int, *, scale: Tensor | None = None) -> None:
        super().__init__()
        keep_geometry(self, layer)
        self.bits, self.columns = bits, columns
        table = layer.weight.detach()
        groups = table.reshape(-1, columns)
        if scale is None:
            scale = _half(
                weight_scale(groups, 0, 8) if bits == 8 else torch.cat([_best_scale(part, bits) for part in torch.split(groups, BLOCK)])
            )
        scale = scale.to(table.dtype)  # of the answer
        self.register_buffer("integers", _levels(groups, scale[:, None], bits).to(torch.int8).reshape(table.shape))
        self.register_buffer("scale", scale.reshape(len(table), -1))

    @property
    def weight(self) -> Tensor:
        """The dequantised table, `(V, C)`, computed at each access."""
        return self._dequantized(self.integers, self.scale)

    def forward(self, input: Tensor) -> Tensor:  # nn.Embedding's parameter name
        return self._dequantized(F.embedding(input, self.integers), F.embedding(input, self.scale))

    def _dequantized(self, integers: Tensor, scale: Tensor) -> Tensor:
        groups = integers.reshape(*integers.shape[:-1], self.scale.shape[1], self.columns).to(scale.dtype)
        return (groups * scale[..., None]).flatten(-2)


def _levels(groups: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The levels of values, float32."""
    limit = 2 ** (bits - 1)
    return torch.round(groups.to(torch.float32) / scale).clamp_(-limit, limit - 1)


def _best_scale(groups: Tensor, bits: int) -> Tensor:
    """The scale of each group `(N, columns)` with the least squared error among `CLIPS` ranges and both signs. A group of zeros gets 1."""
    values = groups.to(torch.float32)
    furthest = values.gather(1, values.abs().argmax(1, keepdim=True))
    widest = torch.where(furthest == 0, 1.0, furthest / -(2 ** (bits - 1)))
    best, least = widest, torch.full_like(widest, float("inf"))
    for share in torch.linspace(1, LEAST_CLIP, CLIPS).tolist():
        for scale in (widest * share, widest * -share):
            error = (_levels(values, scale, bits) * scale - values).square_().sum(1, keepdim=True)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best.squeeze(1)


def _half(scale: Tensor) -> Tensor:
    """Round scales to FP16; those outside of its normal range stay in FP32."""
    normal = (scale.abs() >= _HALF.tiny) & (scale.abs() <= _HALF.max)
    return torch.where(normal, scale.to(torch.float16).to(torch.float32), scale)


def tables(model: nn.Module) -> dict[str, nn.Module]:
    """The embeddings, those of integers too, by dotted name."""
    return dict(named(model, nn.Embedding, nn.EmbeddingBag, QuantizedEmbedding))


def check_tables(model: nn.Module, bits: TableBits) -> None:
    """Raise `MuntinError` for bits out of range, for a name that is no embedding, and for a table that holds NaN or infinity."""
    found = tables(model)
    for width in bits.values() if isinstance(bits, Mapping) else [bits]:
        if isinstance(width, bool) or not isinstance(width, int) or not 2 <= width <= 8:
            raise MuntinError(f"embedding_bits={bits!r}: give a whole number from 2 to 8, or None to leave embeddings as they are")
    if isinstance(bits, Mapping) and (unknown := [name for name in bits if name not in found]):
        raise MuntinError(f"embedding_bits: {', '.join(unknown)}: no embedding of the model; it has {', '.join(found) or 'none'}")
    check_weights({name: table for name, table in found.items() if not isinstance(table, QuantizedEmbedding)})


def replaceable_tables(model: nn.Module, inputs: ModelInputs) -> tuple[dict[str, nn.Embedding], dict[str, str]]:
    """The embeddings in floats that have an integer form, and why others have none. `inputs`: a batch. Costs three passes of one row."""
    free = {name: cast(nn.Embedding, table) for name, table in tables(model).items() if not isinstance(table, QuantizedEmbedding)}
    users = parameter_users(model)
    reasons = {name: reason for name, table in free.items() if (reason := _no_integer_form(name, table, users))}
    reasons |= irreplaceable(model, {name: table for name, table in free.items() if name not in reasons}, first_row(inputs))
    return {name: table for name, table in free.items() if name not in reasons}, reasons


def quantize_tables(
    model: nn.Module, inputs: ModelInputs, bits: TableBits, *, min_sqnr_db: float, only: Sequence[str], keep: Sequence[str]
) -> list[Change]:
    """Replace embeddings by their integer forms, in place, and return a change for each. `inputs`: a batch.

    `bits`: of all tables but small ones, which get 8; or by name: tables without a name there stay in floats.

    A table stays as it is if its integers leave less signal over noise than `min_sqnr_db`, and if the model uses more of it than its rows.
    Costs three forward passes of one row.
    """
    candidates = tables(model)
    unnamed = {
        name: reason for name, reason in left_out(candidates | dict(model.named_modules()), only, keep).items() if name in candidates
    }
    if isinstance(bits, Mapping):
        unnamed |= {name: "not named in embedding_bits" for name in candidates if name not in bits}
    free, reasons = replaceable_tables(model, inputs)
    values = {name: _values(table) for name, table in candidates.items()}
    changes = []
    for name, table in candidates.items():
        if isinstance(table, QuantizedEmbedding):
            changes.append(Change(layer=name, pass_="quantize", done="kept", reason=f"already W{table.bits}"))
            continue
        reason, measured = reasons.get(name) or unnamed.get(name, ""), None
        if not reason:
            width = bits[name] if isinstance(bits, Mapping) else 8 if values[name] < SMALL * sum(values.values()) else bits
            form = integer_table(free[name], width)
            measured = sqnr_db(free[name].weight.detach(), form.weight)
            if measured < min_sqnr_db:
                reason = f"{width} bits leave {measured:.1f} dB of signal over noise, less than {min_sqnr_db:g}"
            else:
                replace(model, name, form)
        changes.append(Change(layer=name, pass_="quantize", done="kept" if reason else f"W{width}", reason=reason, sqnr_db=measured))
    return changes


def _values(table: nn.Module) -> int:
    return cast(int, table.num_embeddings) * cast(int, table.embedding_dim)


def integer_table(table: nn.Embedding, bits: int) -> QuantizedEmbedding:
    """The integer form of an embedding."""
    return QuantizedEmbedding(table, bits, scale_columns(table, bits))


def scale_columns(table: nn.Embedding, bits: int) -> int:
    """Number of columns of one scale."""
    return COLUMNS if bits < 8 and table.embedding_dim % COLUMNS == 0 else table.embedding_dim


def _no_integer_form(name: str, table: nn.Module, users: Mapping[int, Sequence[str]]) -> str:
    """Why a table cannot be quantised; empty if it can. `users`: names of the modules that hold each parameter."""
    if not isinstance(table, nn.Embedding):
        return f"{type(table).__name__}: no integer form"
    if not name:
        return WHOLE_MODEL
    if table.max_norm is not None:
        return f"max_norm={table.max_norm:g} changes its rows when they are read"
    if type(table).forward is not nn.Embedding.forward:
        return UNUSUAL
    if computed := computed_weight(table):
        return computed
    if others := [user for user in users.get(id(table._parameters.get("weight")), []) if user != name]:
        return f"its weight is also that of {', '.join(others)}"
    return ""


def table_structure(model: nn.Module) -> dict[str, TableRecord]:
    """The embeddings of integers, by dotted name, for a record."""
    return {name: TableRecord(bits=table.bits, columns=table.columns) for name, table in named(model, QuantizedEmbedding)}


def apply_tables(model: nn.Module, structure: Mapping[str, TableRecord]) -> None:
    """Put integer embeddings where `structure` says, in place; load their tensors next.

    Raises `MuntinError` for a name that is no such embedding of the model, before anything is changed.
    """
    candidates = dict(named(model, nn.Embedding))
    for name, record in structure.items():
        if name not in candidates or candidates[name].embedding_dim % record.columns:
            what = "is no Embedding of the model" if name not in candidates else f"has no groups of {record.columns} columns"
            raise MuntinError(f"embeddings: '{name}' {what}: build the model that was saved")
    for name, record in structure.items():
        table = candidates[name]
        groups = table.num_embeddings * (table.embedding_dim // record.columns)
        replace(model, name, QuantizedEmbedding(table, record.bits, record.columns, scale=torch.ones(groups, device=table.weight.device)))
