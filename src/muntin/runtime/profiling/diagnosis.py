"""Diagnosis of a profile: where time could be saved, in words, with numbers and places.

Each rule reads a profile and yields findings. The time that could be saved is an upper limit: the present time, less the shortest time by
the machine's ceilings for the work that must remain. A float product may be in two findings, for its precision and for its distance from
the ceiling: do not add them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from muntin.artifact import Signature
from muntin.runtime.profiling.contention import BUSY
from muntin.runtime.profiling.kernels import CONVERT, COPIES, ELEMENTWISE, IMAGES, LAYOUT, PRECISION_LABELS, PRODUCTS, Kernel, macs_ms
from muntin.runtime.profiling.profile import Profile
from muntin.text import count

LEAST_SHARE = 0.005
"""Share of the time: findings that save less are left out."""
GOOD_SHARE = 0.5
"""Share of a ceiling from which on a kernel is no finding."""
BETWEEN_SHARE = 0.05
"""Share of the time between kernels from which on it is a finding."""
NAMED = 3
"""Kernels that a finding names; the others are counted."""
FEW_CHANNELS = 64
"""Channels up to which a product does not fill vector units, which take several blocks of 16 to 64 8-bit channels at a time."""
LITTLE_WORK = 5e6
"""Multiply-adds below which starting and ending the threads matters."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One reason for the time of a call.

    `kind`: one word for its rule. `saves_ms`: upper limit of the saved time, at most `profiled_ms`; None where unknown.
    """

    kind: str
    words: str
    saves_ms: float | None


def findings(profile: Profile) -> tuple[Finding, ...]:
    """All findings, the largest saving first, those without a saving last."""
    graph = _Graph(profile)
    kept = []
    for finding in (finding for rule in RULES for finding in rule(profile, graph)):
        if finding.saves_ms is None or finding.kind == "fallback" or finding.saves_ms >= LEAST_SHARE * profile.profiled_ms:
            # kernels' medians may sum to more than the median of the whole
            kept.append(replace(finding, saves_ms=finding.saves_ms and min(finding.saves_ms, profile.profiled_ms)))
    return tuple(sorted(kept, key=lambda finding: (finding.saves_ms is None, -(finding.saves_ms or 0.0))))


class _Graph:
    """Position of each kernel between the products of a profile."""

    def __init__(self, profile: Profile) -> None:
        kernels = {kernel.name: kernel for kernel in profile.kernels}
        sources = {kernel.name: [read.source for read in kernel.inputs if read.source in kernels] for kernel in profile.kernels}
        readers: dict[str, list[str]] = {name: [] for name in kernels}
        for name, read in sources.items():
            for source in read:
                readers[source or ""].append(name)
        images = isinstance(profile.artifact.manifest.signature, Signature)
        self._start, self._end = (IMAGES, "the scores") if images else ("the inputs", "the outputs")
        self._before = _nearest_products(kernels, sources)
        self._after = _nearest_products(dict(reversed(kernels.items())), readers)
        recognised = {kernel.layer for kernel in profile.kernels}.issuperset(record.name for record in profile.artifact.manifest.layers)
        self.tail = frozenset(name for name, kernel in kernels.items() if recognised and self._ends(kernel))
        """Kernels after the last layer, which only write the scores. Empty if a layer has no kernel, since it may be in one of these."""

    def _ends(self, kernel: Kernel) -> bool:
        before = self._before[kernel.name]
        return not _is_product(kernel) and self._after[kernel.name] is None and before is not None and before.layer is not None

    def place(self, kernel: Kernel) -> str:
        """The layers before and after a kernel, in words."""
        before, after = self._before[kernel.name], self._after[kernel.name]
        return f"between {self._start if before is None else before.label} and {self._end if after is None else after.label}"


def _nearest_products(kernels: Mapping[str, Kernel], neighbours: Mapping[str, Sequence[str | None]]) -> dict[str, Kernel | None]:
    """For each kernel the nearest product in the direction of `neighbours`, which precede it in `kernels`."""
    nearest: dict[str | None, Kernel | None] = {}
    for name in kernels:
        products = (kernels[other] if other and _is_product(kernels[other]) else nearest.get(other) for other in neighbours[name])
        nearest[name] = next((product for product in products if product is not None), None)
    return {name: nearest[name] for name in kernels}


_PASSES = {
    LAYOUT: ("layout", "is layout changes", ""),
    CONVERT: ("convert", "goes into passes that only quantise or change the type", ""),
    ELEMENTWISE: ("element-wise", "is softmaxes and element-wise passes", "copying as much"),
    COPIES: ("copies", "goes into copies (split, join, pad, resize)", "plain ones"),
}
"""Kinds of kernels that multiply nothing -> the finding's kind, its words, and what must remain (empty: nothing)."""


def _passes(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    for group, (kind, words, remainder) in _PASSES.items():
        kernels = _longest(kernel for kernel in profile.kernels if kernel.group == group and kernel.name not in graph.tail)
        if not _sum(kernels):
            continue
        least = _attainable(profile, kernels) if remainder else 0.0
        places = [f"{kernel.kind} {graph.place(kernel)} ({_ms(kernel.ms)} ms)" for kernel in kernels[:NAMED]]
        yield Finding(
            kind=kind,
            words=f"{_share(_sum(kernels), profile)} {words}{f', where {remainder} would take {_ms(least)} ms' if remainder else ''}: "
            f"{_listed(places, len(kernels))}",
            saves_ms=max(0.0, _sum(kernels) - least),
        )


def _output(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    kernels = _longest(kernel for kernel in profile.kernels if kernel.name in graph.tail)
    signature = profile.artifact.manifest.signature
    if not kernels or not isinstance(signature, Signature) or profile.shape is None or signature.answer.one:
        return
    shape = signature.scores_shape(*profile.shape)
    labels = signature.answer.argmax
    pixels, alternative = (prod(shape) // signature.outputs, "labels of one byte") if labels else (prod(shape), "an image of bytes")
    named = [f"{kernel.kind} {kernel.name} ({_ms(kernel.ms)} ms)" for kernel in kernels[:NAMED]]
    yield Finding(
        kind="output",
        words=f"{_share(_sum(kernels), profile)} is writing the scores, "
        f"{_bytes(4 * prod(shape))} of float32 {shape}, after the last layer: {_listed(named, len(kernels))}; "
        f"{alternative} would be {_bytes(pixels)}",
        saves_ms=max(0.0, _sum(kernels) - (4 * prod(shape) + pixels) / profile.ceilings.copy_gb_s / 1e6),
    )


def _fallbacks(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    kernels = _fallen_back(profile)
    if not kernels:
        return
    least = _all_in_precision(kernels, "i8", profile)
    named = [f"{kernel.label} in {kernel.precision} ({_ms(kernel.ms)} ms)" for kernel in kernels[:NAMED]]
    yield Finding(
        kind="fallback",
        words=f"{count(len(kernels), 'layer')} recorded with 8-bit activations ran in float: {_listed(named, len(kernels))}"
        + ("" if least is None else f"; on integer kernels about {_ms(least)} ms"),
        saves_ms=None if least is None else _sum(kernels) - least,
    )


def _fallen_back(profile: Profile) -> list[Kernel]:
    integer = {record.name for record in profile.artifact.manifest.layers if record.integer_activations}
    return _longest(kernel for kernel in profile.kernels if kernel.layer in integer and kernel.precision != "i8")


def _all_in_precision(kernels: Sequence[Kernel], precision: str, profile: Profile) -> float | None:
    """Time of products in another precision at the same share of the ceiling; None where a ceiling is missing."""
    total = 0.0
    for kernel in kernels:
        now, then = (macs_ms(kernel.macs, name, profile.ceilings) for name in (kernel.precision, precision))
        if not now or then is None:
            return None
        total += min(kernel.ms, kernel.ms * then / now)
    return total


def _float_layers(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    fallen = {kernel.name for kernel in _fallen_back(profile)}
    kernels = _longest(
        kernel for kernel in profile.kernels if kernel.group == PRODUCTS and kernel.precision != "i8" and kernel.name not in fallen
    )
    total, least = _sum(kernels), _all_in_precision(kernels, "i8", profile)
    if not kernels or least is None:
        return
    groups: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault(_pattern(kernel.label), []).append(kernel)
    longest = sorted(groups.items(), key=lambda group: -_sum(group[1]))
    named = [f"{name if len(group) > 1 else group[0].label} ({_ms(_sum(group))} ms)" for name, group in longest[:NAMED]]
    kinds = " and ".join(sorted({PRECISION_LABELS.get(kernel.precision, kernel.precision) for kernel in kernels}))
    half = _all_in_precision(kernels, "bf16", profile) if profile.precision == "f32" else None
    in_half = f", in BF16 about {_ms(half)}" if half is not None and half < 0.9 * total else ""
    yield Finding(
        kind="float",
        words=f"{_share(total, profile)} goes into {count(len(kernels), 'product')} in {kinds}, not quantised in the artefact: "
        f"{_listed(named, len(longest))}; in INT8 about {_ms(least)} ms{in_half}, at a cost in accuracy to be measured",
        saves_ms=total - least,
    )


def _ceilings(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    """Products far from the ceiling of their precision; equal ones in repeated blocks are one finding."""
    fallen = {kernel.name for kernel in _fallen_back(profile)}
    alike: dict[tuple[object, ...], list[Kernel]] = {}
    for kernel in profile.kernels:
        attainable = kernel.attainable_ms(profile.ceilings)
        if kernel.group == PRODUCTS and kernel.name not in fallen and attainable is not None and attainable < GOOD_SHARE * kernel.ms:
            shapes = tuple(operand.shape for operand in (*kernel.inputs, *kernel.outputs))
            alike.setdefault((_pattern(kernel.label), kernel.precision, shapes), []).append(kernel)
    for kernels in map(_longest, alike.values()):
        first, total, least = kernels[0], _sum(kernels), _attainable(profile, kernels)
        if _ms(total) == _ms(least):  # shorter products are below the resolution of the engine's clock
            continue
        arithmetic, memory = first.bounds_ms(profile.ceilings)
        by_memory = arithmetic is not None and memory > arithmetic
        ceiling = "bandwidth of a copy" if by_memory else f"{PRECISION_LABELS.get(first.precision, first.precision)} ceiling"
        subject = f"{first.label} reaches" if len(kernels) == 1 else f"{_pattern(first.label)} ({len(kernels)} alike) reach"
        reasons = _reasons(first)
        yield Finding(
            kind="ceiling",
            words=f"{subject} {least / total:.0%} of the {ceiling}: {_ms(total)} ms where {_ms(least)} would do"
            + (f" ({'; '.join(reasons)})" if reasons else ""),
            saves_ms=total - least,
        )


def _reasons(kernel: Kernel) -> list[str]:
    """Properties of a product's shape and types that keep kernels from their ceiling."""
    if not kernel.inputs or not kernel.outputs:
        return []
    entry, output = kernel.inputs[0], kernel.outputs[0]
    axis = 1 if "Conv" in kernel.kind or kernel.kind == "Deconvolution" else -1
    channels, outputs = entry.shape[axis], output.shape[axis]
    each = kernel.macs // max(1, prod(output.shape))
    reasons = []
    if each < min(FEW_CHANNELS, channels):
        reasons.append(f"only {each} multiply-adds for each output")
    elif min(channels, outputs) <= FEW_CHANNELS:
        reasons.append(f"few channels: {channels} in, {outputs} out")
    if kernel.precision == "i8" and output.type not in ("u8", "i8"):
        reasons.append(f"it writes {_bytes(output.bytes)} of {output.type}, since the next kernel takes no integers")
    if kernel.macs < LITTLE_WORK:
        reasons.append(f"little work, {kernel.macs:,} multiply-adds")
    return reasons


def _between(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    busy = profile.others is not None and profile.others >= BUSY  # then other processes cause a part of it
    if profile.between_ms >= BETWEEN_SHARE * profile.profiled_ms and not busy:
        number = len(profile.kernels)
        yield Finding(
            kind="between",
            words=f"{_share(profile.between_ms, profile)} passes between the {number} kernels, "
            f"{profile.between_ms * 1e3 / number:.0f} microseconds for each: fewer operations, or more images in a call",
            saves_ms=profile.between_ms,
        )


RULES: tuple[Callable[[Profile, _Graph], Iterable[Finding]], ...] = (_fallbacks, _ceilings, _float_layers, _passes, _output, _between)


def _is_product(kernel: Kernel) -> bool:
    return kernel.compute or kernel.macs > 0


def _longest(kernels: Iterable[Kernel]) -> list[Kernel]:
    return sorted(kernels, key=lambda kernel: -kernel.ms)


def _sum(kernels: Iterable[Kernel]) -> float:
    return sum(kernel.ms for kernel in kernels)


def _attainable(profile: Profile, kernels: Iterable[Kernel]) -> float:
    return sum(kernel.attainable_ms(profile.ceilings) or 0.0 for kernel in kernels)


def _pattern(label: str) -> str:
    """A layer's name without the numbers of its blocks: "stages.*.blocks.*.mlp.expand"."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", label)


def _share(ms: float, profile: Profile) -> str:
    return f"{ms / profile.profiled_ms:.0%} of the time ({_ms(ms)} of {_ms(profile.profiled_ms)} ms)"


def _listed(named: Sequence[str], total: int) -> str:
    """Names, and the number of those that are not named."""
    return ", ".join(named) + (f", and {total - len(named)} more" if total > len(named) else "")


def _ms(ms: float) -> str:
    if ms < 0.0005:
        return "0"
    return f"{ms:.0f}" if ms >= 9.95 else f"{ms:.1f}" if ms >= 0.95 else f"{ms:.2f}" if ms >= 0.0095 else f"{ms:.3f}"


def _bytes(size: int) -> str:
    return f"{size / 1e6:.2g} MB" if size < 9.5e6 else f"{size / 1e6:.0f} MB"
