"""The gate: an updated artefact beside the one that it is to replace, both as deployed, on held-out pictures.

    old data    the mean score and each class's may fall by a bound at most
    new data    the mean score rises, new classes are found, and the old artefact finds no swapped labels
    artefact    golden answers and integer kernels on this machine, latency, size

The verdict lists every check with its value, its interval and its bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from muntin.artifact import Artifact
from muntin.errors import ArtifactError, DataError
from muntin.images.writing import write_whole
from muntin.runtime import SessionOptions, describe_hardware, verify
from muntin.runtime.engines.registry import open_image_session
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.tasks.samples import Sample
from muntin.training.config import AcceptConfig
from muntin.updating.comparison import Differences, Estimate, compare_counts, count_labels, relabel_gain

VERDICT = "verdict.json"
ROUNDS = 30
"""Timed calls of each artefact."""
ROUNDING = 1e-9
"""Amount by which a value may miss its bound: 18/20 - 17/20 is 0.050000000000000044."""
FEW = 10
"""Held-out pictures below which a note says that little is certain."""


class GateCheck(BaseModel):
    """One condition. `value` must be at most, or at least, the `bound`; `low` and `high`: its 95 % interval, None where there is none."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    limit: Literal["at most", "at least"]
    bound: float
    passed: bool
    note: str = ""


class GateVerdict(BaseModel):
    """Content of `verdict.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    accepted: bool
    created: str
    artifact: str
    """Digest of the judged artefact."""
    parent: str
    """Digest of the artefact that it is to replace."""
    data: str
    """Digest of the new pictures."""
    strategy: str
    old_pictures: int
    """Held-out old pictures, or windows."""
    new_pictures: int
    scores: dict[str, tuple[float, float]]
    """Scores of the old and the new artefact on "old data" and "new data"."""
    hardware: str
    conditions: AcceptConfig
    checks: tuple[GateCheck, ...]
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[GateCheck, ...]:
        """The checks that the artefact did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def summary(self) -> str:
        """One line: scores, and the first failed check."""
        parts = [f"{name} {old:.3f} -> {new:.3f}" for name, (old, new) in self.scores.items()]
        parts += [f"{self.failed[0].name} {self.failed[0].value:.3g}"] if self.failed else []
        return f"{'accepted' if self.accepted else 'refused'}: {', '.join(parts)}"


def next_steps(verdict: GateVerdict, share: float) -> tuple[str, ...]:
    """What to try after a refusal, a line for each kind of failed check. `share`: the `update.share` of the update."""
    longer = f"more new images, or more steps (--set update.share={min(10, 2 * share):.3g})"
    lines = {
        "loss": f"for the loss on old data fewer steps (--set update.share={share / 2:.3g}) or more kept images (--set update.memory), or "
        "allow it by --accept max_drop, of a class max_class_drop",
        "gain": f"for a gain {longer}",
        "new class": f"for the new class more images of it, or {longer}",
        "swapped": "for swapped labels correct the new masks or folders",
        "problems": "`muntin verify` of the artifact, which names its problems",
        "latency": "for the latency --accept max_slowdown, which also measures it again",
        "size": "for the size --accept max_growth",
    }
    return tuple(text for kind, text in lines.items() if any(check.name.startswith(kind) for check in verdict.failed))


def write_verdict(verdict: GateVerdict, directory: Path) -> Path:
    """Write `verdict.json` into the folder of an update."""
    path = directory / VERDICT
    write_whole(path, verdict.model_dump_json(indent=1).encode() + b"\n")
    return path


def read_verdict(directory: Path) -> GateVerdict | None:
    """The verdict in the folder of an update; None if there is none. Raises `DataError` if it is damaged."""
    path = directory / VERDICT
    if not path.is_file():
        return None
    try:
        return GateVerdict.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise DataError(f"{path}: damaged ({' '.join(str(error).split())[:120]}): remove it, and update again") from error


def judge_artifact(
    new: Artifact,
    old: Artifact,
    *,
    old_samples: Sequence[Sample],
    new_samples: Sequence[Sample],
    accept: AcceptConfig,
    tile: int,
    data: str,
    strategy: str,
    threads: int | None = None,
    stage: Callable[[str], None] = lambda name: None,
) -> GateVerdict:
    """Judge an artefact. Costs a prediction of all samples by both artefacts, a verification, and `ROUNDS` timed calls of each.

    `old_samples`, `new_samples`: held-out pictures with the labels of the new artefact's classes. `threads`: of the engine.
    """
    names = [entry.name for entry in new.picture.classes]
    known = len(old.picture.classes)
    options = SessionOptions(threads=threads)
    with closing(open_image_session(old.path, options)) as old_session, closing(open_image_session(new.path, options)) as new_session:
        stage("judging old data")
        on_old = compare_counts(*(count_labels(one, old_samples, tile=tile, classes=len(names)) for one in (old_session, new_session)))
        stage("judging new data")
        old_counts, new_counts = (count_labels(one, new_samples, tile=tile, classes=len(names)) for one in (old_session, new_session))
        on_new = compare_counts(old_counts, new_counts)
        gain, renamed = relabel_gain(old_counts, known)
        stage("measuring latency")
        size = (new.manifest.shape or (1, tile, tile))[1:]
        images_BHWC = np.full((1, *size, new.picture.channels), 127, np.uint8)
        latency = interleaved_latency({"old": old_session, "new": new_session}, images_BHWC, rounds=ROUNDS)
    stage("verifying")
    hardware = describe_hardware()
    swaps = ", ".join(f"'{names[truth]}' is found as '{names[found]}'" for truth, found in renamed.items())
    checks = [
        *_old_checks(on_old, names[:known], accept),
        check_at_least("gain on new data", on_new.gain, accept.min_gain, accept.certain),
        *_new_class_checks(on_new, names, known, accept),
        GateCheck(
            name="swapped labels in new data", value=gain, limit="at most", bound=accept.max_relabel_gain,
            passed=_within(gain, accept.max_relabel_gain), note="" if _within(gain, accept.max_relabel_gain) else swaps,
        ),
        *_artifact_checks(new, old, latency["new"].median_ms / latency["old"].median_ms, accept, threads),
    ]  # fmt: skip
    return GateVerdict(
        accepted=all(check.passed for check in checks), created=datetime.now(UTC).isoformat(timespec="seconds"), artifact=new.digest,
        parent=old.digest, data=data, strategy=strategy, conditions=accept, old_pictures=len(old_samples), new_pictures=len(new_samples),
        scores={"old data": (on_old.old, on_old.new.value), "new data": (on_new.old, on_new.new.value)},
        hardware=f"{hardware['cpu']}, {hardware['cores']} cores", checks=tuple(checks),
        notes=_notes(on_old, names[:known], len(old_samples), len(new_samples)),
    )  # fmt: skip


def _old_checks(on_old: Differences, names: Sequence[str], accept: AcceptConfig) -> list[GateCheck]:
    return [
        check_at_most("loss on old data", _negative(on_old.gain), accept.max_drop, accept.certain),
        *(
            check_at_most(f"loss of '{names[label]}' on old data", _negative(gain), accept.max_class_drop, accept.certain)
            for label, (_, _, gain) in on_old.by_class.items()
            if label < len(names)
        ),
    ]


def _new_class_checks(on_new: Differences, names: Sequence[str], known: int, accept: AcceptConfig) -> list[GateCheck]:
    checks = []
    for label in range(known, len(names)):
        name = f"new class '{names[label]}' on new data"
        if label in on_new.by_class:
            checks.append(check_at_least(name, on_new.by_class[label][1], accept.min_new_class, accept.certain))
        else:
            note = "no held-out picture shows it: add pictures of it"
            checks.append(GateCheck(name=name, value=0, limit="at least", bound=accept.min_new_class, passed=False, note=note))
    return checks


def _artifact_checks(new: Artifact, old: Artifact, slowdown: float, accept: AcceptConfig, threads: int | None) -> list[GateCheck]:
    growth = new.bytes / old.bytes
    try:
        problems = verify(new.path, SessionOptions(threads=threads)).problems
    except ArtifactError as error:
        problems = (str(error),)
    found = GateCheck(
        name="problems of verification", value=len(problems), limit="at most", bound=0, passed=not problems, note="; ".join(problems[:2])
    )
    ratios = (("latency, times the old", slowdown, accept.max_slowdown), ("size, times the old", growth, accept.max_growth))
    return [
        found,
        *(GateCheck(name=name, value=ratio, limit="at most", bound=bound, passed=_within(ratio, bound)) for name, ratio, bound in ratios),
    ]


def _negative(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, -estimate.high, -estimate.low)


def check_at_most(name: str, estimate: Estimate, bound: float, certain: bool) -> GateCheck:
    """A check of an upper bound; `certain`: of the upper end of the interval, too."""
    judged = estimate.high if certain else estimate.value
    return GateCheck(
        name=name, value=estimate.value, low=estimate.low, high=estimate.high, limit="at most", bound=bound, passed=_within(judged, bound)
    )


def check_at_least(name: str, estimate: Estimate, bound: float, certain: bool) -> GateCheck:
    """A check of a lower bound; `certain`: of the lower end of the interval, too."""
    judged = estimate.low if certain else estimate.value
    return GateCheck(
        name=name, value=estimate.value, low=estimate.low, high=estimate.high, limit="at least", bound=bound, passed=_within(bound, judged)
    )


def _within(lower: float, upper: float) -> bool:
    """True if `lower` is at most `upper`, rounding apart."""
    return lower <= upper + ROUNDING


def _notes(on_old: Differences, names: Sequence[str], old: int, new: int) -> tuple[str, ...]:
    notes = []
    if unseen := [name for label, name in enumerate(names) if label not in on_old.by_class]:
        notes.append(f"no held-out old picture shows {', '.join(unseen)}: nothing is said about it")
    if few := [f"{count} {kind} pictures" for kind, count in (("old", old), ("new", new)) if count < FEW]:
        notes.append(f"judged by {' and '.join(few)}: the intervals are rough")
    return tuple(notes)
