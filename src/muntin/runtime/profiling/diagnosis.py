"""Diagnosis of a profile: where time could be saved, in words, with numbers and places.

Each rule reads a profile and yields findings. The time that could be saved is an upper limit: the present time, less the shortest time by
the machine's ceilings for the work that must remain. A float product may be in two findings, for its precision and for its distance from
the ceiling: do not add them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

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
SHOWN = 0.005
"""Shortest time of a kernel that is named, ms."""
FEW_CHANNELS = 64
"""Channels up to which a product does not fill vector units, which take several blocks of 16 to 64 8-bit channels at a time."""
LITTLE_WORK = 5e6
"""Multiply-adds below which starting and ending the threads matters."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One reason for the time of a call.

    `kind`: one word for its rule. `saves_ms`: upper limit of the saved time, at most `profiled_ms`; None where unknown or not caused by the
    artefact. `kernels`: names of the kernels concerned, longest first.
    """

    kind: str
    words: str
    saves_ms: float | None
    kernels: tuple[str, ...] = ()


def findings(profile: Profile) -> tuple[Finding, ...]:
    """All findings, the largest saving first, those without a saving last."""
    graph = _Graph(profile)
    candidates = [_within(finding, profile.profiled_ms) for rule in RULES for finding in rule(profile, graph)]
    least = LEAST_SHARE * profile.profiled_ms
    kept = [finding for finding in candidates if finding.saves_ms is None or finding.saves_ms >= least or finding.kind in _ALWAYS]
    return tuple(sorted(kept, key=lambda finding: (finding.saves_ms is None, -(finding.saves_ms or 0.0))))


def _within(finding: Finding, profiled_ms: float) -> Finding:
    """Limits a saving to the whole: kernels' medians may sum to more than the median of the whole."""
    return finding if finding.saves_ms is None else replace(finding, saves_ms=min(finding.saves_ms, profiled_ms))


class _Graph:
    """Connections between kernels, and the position of a kernel between the layers."""

    def __init__(self, profile: Profile) -> None:
        self.kernels = {kernel.name: kernel for kernel in profile.kernels}
        self._readers: dict[str, list[str]] = {}
        for kernel in profile.kernels:
            for source in self._sources(kernel.name):
                self._readers.setdefault(source, []).append(kernel.name)
        self.tail = frozenset(self._tail(profile))
        """Kernels after the last layer, which only write the scores. Empty if a layer has no kernel, since it may be in one of these."""

    def _tail(self, profile: Profile) -> Iterator[str]:
        executed = {kernel.layer for kernel in profile.kernels}
        if not executed.issuperset(record.name for record in profile.artifact.manifest.layers):
            return
        for kernel in profile.kernels:
            if not _is_product(kernel) and self._nearest(kernel.name, self._reading) is None:
                last = self._nearest(kernel.name, self._sources)
                if last is not None and last.layer is not None:
                    yield kernel.name

    def _sources(self, name: str) -> list[str]:
        return [operand.source for operand in self.kernels[name].inputs if operand.source in self.kernels]

    def _reading(self, name: str) -> list[str]:
        return self._readers.get(name, [])

    def _nearest(self, name: str, step: Callable[[str], list[str]]) -> Kernel | None:
        """The nearest product in one direction; of equally near ones the first in the graph."""
        seen, front = {name}, [name]
        while front:
            front = [further for near in front for further in step(near) if further not in seen]
            seen.update(front)
            for other in front:
                if _is_product(self.kernels[other]):
                    return self.kernels[other]
        return None

    def place(self, kernel: Kernel) -> str:
        """The layers before and after a kernel, in words."""
        before, after = self._nearest(kernel.name, self._sources), self._nearest(kernel.name, self._reading)
        end = "the scores" if after is None else after.label
        if before is None and not self._reads_images(kernel.name):
            return f"on a constant of {end}"
        return f"between {IMAGES if before is None else before.label} and {end}"

    def _reads_images(self, name: str) -> bool:
        seen, front = {name}, [name]
        while front:
            if any(operand.source == IMAGES for near in front for operand in self.kernels[near].inputs):
                return True
            front = list({further for near in front for further in self._sources(near)} - seen)
            seen.update(front)
        return False


_PASSES = {
    LAYOUT: ("layout", "is layout changes", ""),
    CONVERT: ("convert", "goes into passes that only quantise or change the type", ""),
    ELEMENTWISE: ("element-wise", "is softmaxes and element-wise passes", "copying as much"),
    COPIES: ("copies", "goes into copies (split, join, pad, resize)", "plain ones"),
}
"""Kinds of kernels that multiply nothing -> the finding's kind, its words, and what must remain (empty: nothing)."""


def _passes(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    for group, (kind, words, remainder) in _PASSES.items():
        kernels = [kernel for kernel in profile.kernels if kernel.group == group and kernel.name not in graph.tail and kernel.ms > 0]
        if not kernels:
            continue
        least = _attainable(profile, kernels) if remainder else 0.0
        words += f", where {remainder} would take {_ms(least)} ms" if remainder else ""
        yield _pass_finding(kind, words, profile, graph, kernels, max(0.0, _sum(kernels) - least))


def _pass_finding(kind: str, what: str, profile: Profile, graph: _Graph, kernels: Sequence[Kernel], saves: float) -> Finding:
    """A finding about kernels that multiply nothing, with the positions of the longest."""
    kernels = _longest(kernels)
    total = _sum(kernels)
    largest = [
        f"{_article(kernel.kind)} {kernel.kind}{_layouts(kernel)} {graph.place(kernel)} ({_ms(kernel.ms)} ms)" for kernel in _named(kernels)
    ]
    verb = "it is" if len(kernels) == 1 else "the largest is" if len(largest) == 1 else "the largest are"
    places = f"{verb} {', '.join(largest)}{_more(len(kernels) - len(largest))}" if largest else f"{count(len(kernels), 'short pass')}"
    return Finding(
        kind=kind,
        words=f"{_share(total, profile)} {what}: {places}",
        saves_ms=saves,
        kernels=_names(kernels),
    )


def _layouts(kernel: Kernel) -> str:
    """A reorder's layouts, which its name does not tell."""
    before, after = kernel.inputs[0].layout if kernel.inputs else "", kernel.outputs[0].layout if kernel.outputs else ""
    return f" from {before} to {after}" if kernel.kind == "Reorder" and before and after and before != after else ""


def _output(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    kernels = _longest(kernel for kernel in profile.kernels if kernel.name in graph.tail)
    signature = profile.artifact.manifest.signature
    if not kernels or signature.task == "classify":
        return
    shape = signature.scores_shape(*profile.shape)
    pixels = prod(shape) if signature.task == "restore" else prod(shape) // signature.outputs
    alternative = "an image of bytes" if signature.task == "restore" else "labels of one byte"
    named = _named(kernels) or kernels[:1]
    ways = ", ".join(f"{kernel.kind} {kernel.name} ({_ms(kernel.ms)} ms)" for kernel in named)
    total = _sum(kernels)
    yield Finding(
        kind="output",
        words=f"{_share(total, profile)} is writing the scores, "
        f"{_bytes(4 * prod(shape))} of float32 {shape}, after the last layer: {ways}{_more(len(kernels) - len(named))}; {alternative} "
        f"would be {_bytes(pixels)}",
        saves_ms=max(0.0, total - (4 * prod(shape) + pixels) / profile.ceilings.copy_gb_s / 1e6),
        kernels=_names(kernels),
    )


def _fallbacks(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    kernels = _fallen_back(profile)
    if not kernels:
        return
    named = [f"{kernel.label} in {kernel.precision} ({_ms(kernel.ms)} ms{_on_integers(kernel, profile)})" for kernel in kernels[:NAMED]]
    first = kernels[0]
    one = f"{first.label}, recorded with 8-bit activations, ran in {first.precision}: {_ms(first.ms)} ms{_on_integers(first, profile)}"
    many = f"{len(kernels)} layers recorded with 8-bit activations ran in float: {', '.join(named)}{_more(len(kernels) - NAMED)}"
    least = _all_in_precision(kernels, "i8", profile)
    yield Finding(
        kind="fallback",
        words=one if len(kernels) == 1 else many,
        saves_ms=None if least is None else _sum(kernels) - least,
        kernels=_names(kernels),
    )


def _fallen_back(profile: Profile) -> list[Kernel]:
    integer = {
        record.name for record in profile.artifact.manifest.layers if record.activation_bits is not None and record.activation_bits <= 8
    }
    return _longest(kernel for kernel in profile.kernels if kernel.layer in integer and kernel.precision != "i8")


def _on_integers(kernel: Kernel, profile: Profile) -> str:
    ms = _in_precision(kernel, "i8", profile)
    return "" if ms is None else f"; on integer kernels about {_ms(ms)}"


def _in_precision(kernel: Kernel, precision: str, profile: Profile) -> float | None:
    """A product's time in another precision at the same share of the ceiling; None without both ceilings."""
    now, then = (macs_ms(kernel.macs, name, profile.ceilings) for name in (kernel.precision, precision))
    return None if not now or then is None else min(kernel.ms, kernel.ms * then / now)


def _all_in_precision(kernels: Sequence[Kernel], precision: str, profile: Profile) -> float | None:
    times = [_in_precision(kernel, precision, profile) for kernel in kernels]
    return None if None in times else sum(ms for ms in times if ms is not None)


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
    names = ", ".join(f"{name if len(group) > 1 else group[0].label} ({_ms(_sum(group))} ms)" for name, group in longest[:NAMED])
    kinds = " and ".join(sorted({PRECISION_LABELS.get(kernel.precision, kernel.precision) for kernel in kernels}))
    half = _all_in_precision(kernels, "bf16", profile) if profile.precision == "f32" else None
    run, take, they, them = ("runs", "takes", "it", "it") if len(kernels) == 1 else ("run", "take", "they", "them")
    ways = f"in INT8 {they} would take about {_ms(least)} ms" + (
        f", in BF16 about {_ms(half)}" if half is not None and half < 0.9 * total else ""
    )
    yield Finding(
        kind="float",
        words=f"{count(len(kernels), 'product')} {run} in {kinds}, since the artefact does not quantise {them}, and {take} "
        f"{_share(total, profile)}: {names}{_more(len(longest) - NAMED)}; {ways}, at a cost in accuracy to be measured",
        saves_ms=total - least,
        kernels=_names(kernels),
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
    for kernels in alike.values():
        if _ms(_sum(kernels)) != _ms(_attainable(profile, kernels)):  # shorter products are below the resolution of the engine's clock
            yield _far_from_ceiling(_longest(kernels), profile)


def _far_from_ceiling(kernels: list[Kernel], profile: Profile) -> Finding:
    first = kernels[0]
    total, least = _sum(kernels), _attainable(profile, kernels)
    arithmetic, memory = first.bounds_ms(profile.ceilings)
    precision = PRECISION_LABELS.get(first.precision, first.precision)
    ceiling = "bandwidth of a copy" if arithmetic is not None and memory > arithmetic else f"{precision} ceiling"
    subject = f"{first.label} reaches" if len(kernels) == 1 else f"{_pattern(first.label)} ({len(kernels)} alike) reach"
    reasons = _reasons(first)
    return Finding(
        kind="ceiling",
        words=f"{subject} {least / total:.0%} of the {ceiling}: {_ms(total)} ms where {_ms(least)} would do"
        + (f" ({'; '.join(reasons)})" if reasons else ""),
        saves_ms=total - least,
        kernels=_names(kernels),
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
        reasons.append(f"it writes {_bytes(output.bytes)} of {output.type}, since what follows takes no integers")
    if kernel.macs < LITTLE_WORK:
        work = f"{kernel.macs / 1e6:.1f} million" if kernel.macs >= 5e4 else f"{kernel.macs:,}"
        reasons.append(f"little work, {work} multiply-adds")
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


def _threads(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    if profile.fewer_threads_ms is None:
        return
    cores, now, then = profile.physical_cores, profile.whole_ms, profile.fewer_threads_ms
    faster = then < now
    yield Finding(
        kind="threads",
        words=f"{profile.threads} threads on {count(cores, 'physical core')}: with {cores} the same image takes "
        + (
            f"{_ms(then)} ms instead of {_ms(now)}"
            if faster
            else f"{_ms(then)} ms, with {profile.threads} {_ms(now)}: threads beyond the cores gain nothing reliable"
        ),
        saves_ms=(now - then) / now * profile.profiled_ms if faster else None,
    )


def _contention(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    if profile.others is not None and profile.others >= BUSY:
        yield Finding(
            kind="contention",
            words=f"other processes used {profile.others:.1f} cores while this was measured: the times are too long; run it alone",
            saves_ms=None,
        )


Rule = Callable[[Profile, _Graph], Iterable[Finding]]

RULES: tuple[Rule, ...] = (
    _fallbacks,
    _ceilings,
    _float_layers,
    _passes,
    _output,
    _between,
    _threads,
    _contention,
)
_ALWAYS = frozenset({"fallback", "threads", "contention"})


def _is_product(kernel: Kernel) -> bool:
    return kernel.compute or kernel.macs > 0


def _named(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The first kernels, without those whose time would be shown as 0."""
    return [kernel for kernel in kernels[:NAMED] if kernel.ms >= SHOWN]


def _longest(kernels: Iterable[Kernel]) -> list[Kernel]:
    return sorted(kernels, key=lambda kernel: -kernel.ms)


def _sum(kernels: Iterable[Kernel]) -> float:
    return sum(kernel.ms for kernel in kernels)


def _attainable(profile: Profile, kernels: Iterable[Kernel]) -> float:
    return sum(kernel.attainable_ms(profile.ceilings) or 0.0 for kernel in kernels)


def _names(kernels: Iterable[Kernel]) -> tuple[str, ...]:
    return tuple(kernel.name for kernel in kernels)


def _pattern(label: str) -> str:
    """A layer's name without the numbers of its blocks: "stages.*.blocks.*.mlp.expand"."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", label)


def _share(ms: float, profile: Profile) -> str:
    return f"{ms / profile.profiled_ms:.0%} of the time ({_ms(ms)} of {_ms(profile.profiled_ms)} ms)"


def _more(number: int) -> str:
    return f", and {number} more" if number > 0 else ""


def _article(word: str) -> str:
    return "an" if word[:1] in "AEIOU" else "a"


def _ms(ms: float) -> str:
    if ms < 0.0005:
        return "0"
    return f"{ms:.0f}" if ms >= 9.95 else f"{ms:.1f}" if ms >= 0.95 else f"{ms:.2f}" if ms >= 0.0095 else f"{ms:.3f}"


def _bytes(size: int) -> str:
    return f"{size / 1e6:.2g} MB" if size < 9.5e6 else f"{size / 1e6:.0f} MB"
