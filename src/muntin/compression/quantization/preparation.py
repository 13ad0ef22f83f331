"""The common beginning of `quantize` and `prepare_qat`: checks, folds, calibration, and the layers that stay in float."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from muntin.compression.calibration import calibration_list, check_weights, observe
from muntin.compression.channels.slimming import remove_closed_channels
from muntin.compression.equivalent.batch_norm import fold_batch_norms
from muntin.compression.equivalent.fold import fold
from muntin.compression.equivalent.plain_convolutions import plain_convolutions
from muntin.compression.quantization.quantized_layers import no_integer_form
from muntin.compression.replaceability import irreplaceable
from muntin.compression.rewrite import (
    UNUSUAL,
    WHOLE_MODEL,
    call_every_layer,
    computes_as_usual,
    keepable,
    left_out,
    named,
)
from muntin.graph.grids import RangeObserver
from muntin.models.compression_record import Change
from muntin.models.eager import ModelInputs, check_eager, first_row, watch_inputs


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The operations of a folded model, by dotted name, with the ranges of their inputs."""

    batches: list[ModelInputs]
    changes: list[Change]
    operations: dict[str, nn.Module]
    observed: dict[str, tuple[RangeObserver, RangeObserver]]
    """By operation that another form can replace: its first and second input."""
    reasons: dict[str, str]
    """Reasons to keep operations in float."""


def prepare(
    model: nn.Module,
    calibration: Iterable[ModelInputs],
    *,
    only: Sequence[str],
    keep: Sequence[str],
    done: Mapping[str, nn.Module],
    products: tuple[type[nn.Module], ...] = (),
    cut: bool = False,
) -> Prepared:
    """Check a model, fold its norms and gates in place, and observe the inputs of its layers and `products`.

    `cut`: remove closed channels first. `done`: operations that have another form already, which `only` and `keep` may name. Raises
    `MuntinError` if there is no batch, for NaN and infinity, and if `only` or `keep` name no layer.
    """
    check_eager(model)
    batches = calibration_list(calibration, model)
    left_out({**keepable(model), **done}, only, keep)
    check_weights(dict(named(model, nn.Linear, nn.Conv2d)))  # raises before the model is changed
    changes = [*(remove_closed_channels(model.eval()) if cut else ())]
    changes += plain_convolutions(model.eval(), first_row(batches[0]))
    unnamed = left_out({**keepable(model), **done}, only, keep)  # layers inside padded ones
    layers: dict[str, nn.Module] = dict(named(model, nn.Linear, nn.Conv2d))
    changes += fold(model) + fold_batch_norms(model, batches[0])
    check_weights(layers)
    operations = {**layers, **(dict(named(model, *products)) if products else {})}
    call_every_layer(model)
    fixed = irreplaceable(model, layers, first_row(batches[0]))
    replaceable = {name: operation for name, operation in operations.items() if name not in fixed}
    unusual = _unusual(model, replaceable, batches)
    observed = observe(model, replaceable, batches)
    reasons = {name: reason for name, (first, _) in observed.items() if (reason := no_integer_form(operations[name], first)) is not None}
    kept = {name: unnamed[name] for name in operations if name in unnamed}
    return Prepared(
        batches=batches,
        changes=changes,
        operations=operations,
        observed=observed,
        reasons=reasons | unusual | {"": WHOLE_MODEL} | kept | fixed,
    )


def _unusual(model: nn.Module, operations: Mapping[str, nn.Module], batches: Sequence[ModelInputs]) -> dict[str, str]:
    """Subclasses of Linear and Conv2d, by name, that do not compute what their kind does, with a reason."""
    kinds = (nn.Linear, nn.Conv2d)
    subclasses = {name: layer for name, layer in operations.items() if isinstance(layer, kinds) and type(layer) not in kinds}
    usual: dict[str, bool] = {}

    def watch(name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if name not in usual:
            usual[name] = computes_as_usual(layer, inputs[0])

    for batch in batches:
        if usual.keys() != subclasses.keys():
            watch_inputs(model, subclasses, [batch], watch)
    return {name: UNUSUAL for name, as_usual in usual.items() if not as_usual}
