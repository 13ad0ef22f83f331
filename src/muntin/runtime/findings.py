"""What a profile means: where the time goes that could be saved, in words, with numbers and names of places.

A rule reads a profile and gives its findings. What could be saved is at most that: what a part takes now, less what the machine's ceilings
allow for the part of it that must remain. A float product may be in two findings, for its precision and for its distance from the ceiling:
the two are not to be added.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

from muntin.runtime.contention import BUSY
from muntin.runtime.kernels import CONVERT, COPIES, ELEMENTWISE, IMAGES, LAYOUT, PRECISION_LABELS, PRODUCTS, Kernel, macs_ms
from muntin.runtime.profile import Profile
from muntin.text import count

LEAST_SHARE = 0.005
"""Of the time: what saves less is not worth a line."""
GOOD_SHARE = 0.5
"""Of a ceiling: a kernel that reaches it is left alone."""
BETWEEN_SHARE = 0.05
"""Of the time: what passes between kernels is worth a line from here."""
NAMED = 3
"""Kernels that a finding names; the others are counted."""
SHOWN = 0.005
"""In ms: from here a kernel is named."""
FEW_CHANNELS = 64
"""Up to here a product's blocks are not full: vector units take 16 to 64 8-bit channels at a time, and several such blocks at once."""
LITTLE_WORK = 5e6
"""Multiply-adds below which the threads' start and end count."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One reason for the time that a call takes.

    `kind`: one word for the rule that found it. `saves_ms`: at most so much less of `profiled_ms`, and never more than that; None where
    it is not known or not the artefact's doing. `kernels`: the names of those that it is about, longest first.
    """

    kind: str
    words: str
    saves_ms: float | None
    kernels: tuple[str, ...] = ()


def findings(profile: Profile) -> tuple[Finding, ...]:
    """All findings, those that save most first, those that save nothing by themselves last."""
    graph = _Graph(profile)
    found = [_within(finding, profile.profiled_ms) for rule in RULES for finding in rule(profile, graph)]
    least = LEAST_SHARE * profile.profiled_ms
    worth = [finding for finding in found if finding.saves_ms is None or finding.saves_ms >= least or finding.kind in _ALWAYS]
    return tuple(sorted(worth, key=lambda finding: (finding.saves_ms is None, -(finding.saves_ms or 0.0))))


def _within(finding: Finding, profiled_ms: float) -> Finding:
    """Medians of kernels may sum to more than the median of the whole."""
    return finding if finding.saves_ms is None else replace(finding, saves_ms=min(finding.saves_ms, profiled_ms))


class _Graph:
    """Which kernel reads which, and where a kernel lies between those that a reader knows by name."""

    def __init__(self, profile: Profile) -> None:
        self.kernels = {kernel.name: kernel for kernel in profile.kernels}
        self._readers: dict[str, list[str]] = {}
        for kernel in profile.kernels:
            for source in self._sources(kernel.name):
                self._readers.setdefault(source, []).append(kernel.name)
        self.tail = frozenset(self._tail(profile))
        """Kernels after the last layer: they only bring the scores to where they are wanted. None where a layer was not found among the
        kernels, since it may be in them."""

    def _tail(self, profile: Profile) -> Iterator[str]:
        found = {kernel.layer for kernel in profile.kernels}
        if not found.issuperset(record.name for record in profile.artifact.manifest.layers):
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
        """The nearest product in one direction, in the order of the graph where several are as near."""
        seen, front = {name}, [name]
        while front:
            front = [further for near in front for further in step(near) if further not in seen]
            seen.update(front)
            for found in front:
                if _is_product(self.kernels[found]):
                    return self.kernels[found]
        return None

    def place(self, kernel: Kernel) -> str:
        """Between which layers a kernel lies, in words."""
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


def _layout(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    kernels = _of(profile, graph, LAYOUT)
    if kernels:
        yield _passes("layout", "is layout changes", profile, graph, kernels, _sum(kernels))


def _conversions(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    kernels = _of(profile, graph, CONVERT)
    if kernels:
        yield _passes("convert", "goes into passes that only quantise or change the type", profile, graph, kernels, _sum(kernels))


def _elementwise(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    kernels = _of(profile, graph, ELEMENTWISE)
    if kernels:
        least = _attainable(profile, kernels)
        what = f"is softmaxes and element-wise passes, where copying as much would take {_ms(least)} ms"
        yield _passes("element-wise", what, profile, graph, kernels, max(0.0, _sum(kernels) - least))


def _copies(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    kernels = _of(profile, graph, COPIES)
    if kernels:
        least = _attainable(profile, kernels)
        what = f"goes into copies (split, join, pad, resize), where plain ones would take {_ms(least)} ms"
        yield _passes("copies", what, profile, graph, kernels, max(0.0, _sum(kernels) - least))


def _passes(kind: str, what: str, profile: Profile, graph: _Graph, kernels: Sequence[Kernel], saves: float) -> Finding:
    """A finding about kernels that multiply nothing, with the places of the longest."""
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
    """The order in memory before and after, of a kernel whose name does not tell that it changes it."""
    before, after = kernel.inputs[0].layout if kernel.inputs else "", kernel.outputs[0].layout if kernel.outputs else ""
    return f" from {before} to {after}" if kernel.kind == "Reorder" and before and after and before != after else ""


def _output(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    kernels = _longest(kernel for kernel in profile.kernels if kernel.name in graph.tail)
    signature = profile.artifact.manifest.signature
    if not kernels or signature.task == "classify":
        return
    shape = signature.scores_shape(*profile.shape)
    pixels = prod(shape) if signature.task == "restore" else prod(shape) // signature.outputs
    wanted = "an image of bytes" if signature.task == "restore" else "labels of one byte"
    named = _named(kernels) or kernels[:1]
    ways = ", ".join(f"{kernel.kind} {kernel.name} ({_ms(kernel.ms)} ms)" for kernel in named)
    total = _sum(kernels)
    yield Finding(
        kind="output",
        words=f"{_share(total, profile)} is writing the scores, "
        f"{_bytes(4 * prod(shape))} of float32 {shape}, after the last layer: {ways}{_more(len(kernels) - len(named))}; {wanted} would be "
        f"{_bytes(pixels)}",
        saves_ms=max(0.0, total - (4 * prod(shape) + pixels) / profile.ceilings.copy_gb_s / 1e6),
        kernels=_names(kernels),
    )


def _fallbacks(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    kernels = _fallen_back(profile)
    if not kernels:
        return
    told = [f"{kernel.label} in {kernel.precision} ({_ms(kernel.ms)} ms{_on_integers(kernel, profile)})" for kernel in kernels[:NAMED]]
    first = kernels[0]
    one = f"{first.label}, recorded with 8-bit activations, ran in {first.precision}: {_ms(first.ms)} ms{_on_integers(first, profile)}"
    many = f"{len(kernels)} layers recorded with 8-bit activations ran in float: {', '.join(told)}{_more(len(kernels) - NAMED)}"
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
    """What a product would take in another precision at the same share of the ceiling; None where one of the ceilings is not known."""
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
    """Products far from the ceiling of the precision that they run in; equal ones in repeated blocks together."""
    fallen = {kernel.name for kernel in _fallen_back(profile)}
    alike: dict[tuple[object, ...], list[Kernel]] = {}
    for kernel in profile.kernels:
        attainable = kernel.attainable_ms(profile.ceilings)
        if kernel.group == PRODUCTS and kernel.name not in fallen and attainable is not None and attainable < GOOD_SHARE * kernel.ms:
            shapes = tuple(operand.shape for operand in (*kernel.inputs, *kernel.outputs))
            alike.setdefault((_pattern(kernel.label), kernel.precision, shapes), []).append(kernel)
    for kernels in alike.values():
        if _ms(_sum(kernels)) != _ms(_attainable(profile, kernels)):  # otherwise too short for the engine's clock
            yield _far_from_ceiling(_longest(kernels), profile)


def _far_from_ceiling(kernels: list[Kernel], profile: Profile) -> Finding:
    first = kernels[0]
    total, least = _sum(kernels), _attainable(profile, kernels)
    arithmetic, memory = first.bounds_ms(profile.ceilings)
    precision = PRECISION_LABELS.get(first.precision, first.precision)
    ceiling = "bandwidth of a copy" if arithmetic is not None and memory > arithmetic else f"{precision} ceiling"
    who = f"{first.label} reaches" if len(kernels) == 1 else f"{_pattern(first.label)} ({len(kernels)} alike) reach"
    reasons = _reasons(first)
    return Finding(
        kind="ceiling",
        words=f"{who} {least / total:.0%} of the {ceiling}: {_ms(total)} ms where {_ms(least)} would do"
        + (f" ({'; '.join(reasons)})" if reasons else ""),
        saves_ms=total - least,
        kernels=_names(kernels),
    )


def _reasons(kernel: Kernel) -> list[str]:
    """What of a product's shape and types is known to keep kernels from their ceiling."""
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
    busy = profile.others is not None and profile.others >= BUSY  # then it is others' time as much as the engine's
    if profile.between_ms >= BETWEEN_SHARE * profile.profiled_ms and not busy:
        number = len(profile.kernels)
        yield Finding(
            kind="between",
            words=f"{_share(profile.between_ms, profile)} passes between the {number} kernels, "
            f"{profile.between_ms * 1e3 / number:.0f} microseconds for each: fewer operations, or more images in a call",
            saves_ms=profile.between_ms,
        )


def _threads(profile: Profile, graph: _Graph) -> Iterator[Finding]:
    if profile.fewer is None:
        return
    there, now, then = profile.fewer.threads, profile.whole_ms, profile.fewer.whole_ms
    faster = then < now
    yield Finding(
        kind="threads",
        words=f"{profile.threads} threads on {count(there, 'physical core')}: with {there} the same image takes "
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
    _layout,
    _conversions,
    _elementwise,
    _copies,
    _output,
    _between,
    _threads,
    _contention,
)
_ALWAYS = frozenset({"fallback", "threads", "contention"})


def _of(profile: Profile, graph: _Graph, group: str) -> list[Kernel]:
    return [kernel for kernel in profile.kernels if kernel.group == group and kernel.name not in graph.tail and kernel.ms > 0]


def _is_product(kernel: Kernel) -> bool:
    return kernel.compute or kernel.macs > 0


def _named(kernels: Sequence[Kernel]) -> list[Kernel]:
    """The first few of sorted kernels, without those whose time is nothing in the digits that are shown."""
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
    """A layer's name with the numbers of its blocks left open: "stages.*.blocks.*.mlp.expand"."""
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
