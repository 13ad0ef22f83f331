"""Compress networks within an accuracy budget: muntin.compress, each pass alone swept, and NNCF's accuracy control, as deployed.

    python benchmarks/budget.py --packages FOLDER [--nncf-python PATH] [--only NAME ...] [--budgets 3] [--seeds 3] [--trials 10]

Networks, packages, NNCF's environment and held-out inputs: as for `foreign.py`. Metrics: share of crops with FP32's class
(EfficientNet-Lite0), mean cosine with FP32's embedding (MiniLM), accuracy (the ResNet). Every contender chooses on the same inputs
(`choosing`) the smallest of its artifacts whose metric is within the budget; the figures are those of other inputs (`holdout`). Contenders:
muntin.compress with `--trials` artifacts at most; quantize, low_rank and prune (then INT8) at several strengths;
nncf.quantize_with_accuracy_control. Only the ResNet is trained: `--steps` steps of distillation a contender, shared evenly among its
artifacts. Run it alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

import muntin
from documents import Document, Goal, Row, Table, columns, mean, seeds_of
from foreign_networks.judging import MEGABYTES, NETWORKS, Judge, NetworkOptions, Scores, judges, over, over_seeds
from foreign_networks.subjects import RATE, Pass, chain, channels, parameters_of, ranks
from harness import Benchmark, Run, main, option
from muntin.models.eager import call, tensors_of
from quantizer_peers.data import HELD_OUT, batches

BUDGETS = {"efficientnet-lite0": (0.05, 0.1, 0.2), "minilm": (0.005, 0.01, 0.02), "resnet": (0.005, 0.01, 0.02)}
SHARES = (0.8, 0.6, 0.4)
"""Parameters that low rank and pruning leave."""
SWEEPS: dict[str, tuple[float, ...]] = {"bits": (8, 6, 5, 4.5, 4), "ranks": SHARES, "channels": SHARES}
TOLERANCE = 1e-7
"""Points by which a drop may exceed its budget: a rounding error."""


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(NetworkOptions):
    nncf_python: str | None = option(None, "interpreter of an environment with NNCF", selects=True)
    only: tuple[str, ...] = option(tuple(BUDGETS), "networks", choices=tuple(BUDGETS), selects=True)
    budgets: int = option(3, "how many of each network's, the tightest first", least=1, selects=True)
    choosing: int = option(400, "inputs on which contenders choose", least=16)
    holdout: int = option(HELD_OUT, "inputs of the figures", least=16)
    trials: int = option(10, "most artifacts of muntin.compress", least=1)
    steps: int = option(1200, "steps of distillation, all artifacts of a contender together", least=1)
    unlabelled: int = option(1024, "inputs of distillation", least=16)


def metric(judge: Judge, part: str, outputs: Scores) -> NDArray[np.float64]:
    """The metric of each input."""
    exact, labels = judge.exact[part], judge.labels[part]
    if judge.subject.judged_by == "vectors":
        norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(outputs, axis=1)
        return np.asarray((exact * outputs).sum(1) / norms, np.float64)
    return np.asarray(outputs.argmax(1) == (exact.argmax(1) if labels is None else labels), np.float64)


def drops(judge: Judge, outputs: Mapping[str, Scores]) -> Row:
    """The metric of an artifact on both parts, and its drop from FP32's."""
    means = {part: [float(metric(judge, part, each).mean()) for each in (scores, judge.exact[part])] for part, scores in outputs.items()}
    return {part: {"score": score, "drop": exact - score} for part, (score, exact) in means.items()}


def compressed(judge: Judge, max_drop: float) -> Row:
    """muntin's contender."""

    def evaluate(model: Callable[..., Any]) -> NDArray[np.float64]:
        outputs = [tensors_of(call(model, batch))[0].numpy() for batch in batches(judge.inputs["choosing"])]  # type: ignore[arg-type]
        return metric(judge, "choosing", np.concatenate(outputs))

    given, lessons = judge.options, None if judge.labels["choosing"] is None else judge.material.batches
    recipe = {"trials": given.trials, "steps": given.steps // given.trials if lessons else None, "learning_rate": RATE}
    started = time.perf_counter()
    result = muntin.compress(
        judge.module, calibration=judge.material.calibration, evaluate=evaluate, finetune=lessons, recipe=recipe, seed=judge.seed,
        budget=muntin.Budget(max_drop=max_drop, confidence=None), folder=judge.folder / f"muntin-{max_drop:g}",
    )  # fmt: skip
    return {
        "seconds": time.perf_counter() - started, "artifacts": len(result.trials), "parameters": parameters_of(result.model),
        "width": result.best.plan.width if result.best else 1.0, **judge.deployed(result.artifact.path),
    }  # fmt: skip


def swept(sweep: str, strength: float, trains: bool) -> Pass:
    """A form of a sweep. Only networks with labels are trained, each form for an even share of the steps."""
    parts = len(SWEEPS[sweep])
    if sweep == "bits":
        learns = trains and float(strength).is_integer()
        return chain(bits=int(strength) if float(strength).is_integer() else strength, trained=learns, aware=learns, parts=parts)
    narrow = partial(ranks if sweep == "ranks" else channels, parameters=strength)
    return chain(narrow, trained=trains, parts=parts, embedding_bits=4)


def chosen(points: list[Row], max_drop: float) -> Row:
    """The smallest artifact of a sweep within the budget on the choosing inputs; the one with the least drop if there is none."""
    found = [row for row in points if "cannot" not in row]
    if not found:
        return points[0]
    kept = [row for row in found if row["choosing"]["drop"] <= max_drop]
    best = min(kept, key=lambda row: row["bytes"]) if kept else min(found, key=lambda row: row["choosing"]["drop"])
    return {**best, "seconds": sum(row["seconds"] for row in found), "artifacts": len(found)}


def controlled(judge: Judge, max_drop: float) -> Row:
    """NNCF's contender."""
    labels, exact, file = judge.labels["choosing"], judge.exact["choosing"], judge.folder / "choosing.npz"
    target = exact if judge.subject.judged_by == "vectors" else exact.argmax(1) if labels is None else labels
    np.savez(file, **judge.inputs["choosing"], target=target)
    control = {"inputs": str(file), "max_drop": max_drop}
    return {"artifacts": 1, **judge.nncf(f"nncf-{max_drop:g}", judge.subject.schemes["nncf"], control)}


def rows(run: Run) -> Iterator[Row]:
    given = run.options
    makers = {"muntin": compressed, **({"nncf": controlled} if given.nncf_python else {})}
    for judge in judges(run, {"holdout": given.holdout, "choosing": given.choosing}, None, drops):
        if judge.seed == 0:
            yield judge.facts()
        sweeps = {}
        for sweep, strengths in SWEEPS.items():
            forms = {f"{sweep}-{one:g}": swept(sweep, one, judge.labels["choosing"] is not None) for one in strengths}
            sweeps[sweep] = judge.made({name: partial(judge.artifact, name, form) for name, form in forms.items()})
        for budget in BUDGETS[judge.subject.name][: given.budgets]:
            found = judge.made({f"{name}-{budget:g}": partial(make, judge, budget) for name, make in makers.items()})
            found[1:1] = [chosen(points, budget) for points in sweeps.values()]
            names = ("muntin", *SWEEPS, "nncf")[: len(found)]
            yield from judge.timed([{**row, "form": name, "budget": budget} for name, row in zip(names, found, strict=True)])


# Pages


def contenders(found: list[Row]) -> Iterator[Row]:
    """Means over the seeds; `over`: points by which the drop on unseen inputs exceeds the budget; `speed`: beside bits alone."""
    groups = list(over_seeds("network", "budget", "form")(found))
    bits = {(row["network"], row["budget"]): row["ms"] for row in groups if row["form"] == "bits"}
    for row in groups:
        if "seeds" in row:
            over = 100 * ((mean(row["seeds"], "holdout.drop") or 0.0) - row["budget"])
            beside = bits.get((row["network"], row["budget"]))
            row |= {"over": over, "kept": "yes" if over <= TOLERANCE else "no", "speed": beside and beside / row["ms"]}
        yield row


def by_budget(document: Document) -> dict[str, dict[str, Row]]:
    """Rows of contenders by network and budget, of those with muntin's."""
    found: dict[str, dict[str, Row]] = {}
    for row in contenders(document.rows):
        if "seeds" in row:
            found.setdefault(f"{row['network']} {row['budget']:g}", {})[row["form"]] = row
    return {case: rows for case, rows in found.items() if "muntin" in rows}


def over_budget(document: Document) -> dict[str, float]:
    return {case: round(rows["muntin"]["over"], 7) for case, rows in by_budget(document).items()}


def fewest_bytes(document: Document) -> dict[str, float]:
    """Bytes of the smallest baseline that keeps the budget on unseen inputs, over muntin's; 0 where muntin's breaks it.

    Without such a baseline there is no comparison."""
    found = {}
    for case, rows in by_budget(document).items():
        baselines = [row["bytes"] for form, row in rows.items() if form != "muntin" and row["kept"] == "yes"]
        if baselines:
            found[case] = min(baselines) / rows["muntin"]["bytes"] if rows["muntin"]["kept"] == "yes" else 0.0
    return found


def counted(document: Document, form: str = "muntin") -> str:
    """Budgets that a contender keeps."""
    kept = [rows[form]["kept"] == "yes" for rows in by_budget(document).values() if form in rows]
    return f"{sum(kept)} of {len(kept)}"


def newest(document: Document) -> str:
    ours, won = [rows["muntin"] for rows in by_budget(document).values()], fewest_bytes(document).values()
    smaller, slower = sorted(row["smaller"] for row in ours), sorted(1 / row["speed"] for row in ours if row["speed"])
    excess = max(row["over"] for row in ours)
    broken = f" (exceeded by up to {excess:.4f} points)" if excess > TOLERANCE else ""
    others = f"by bits alone in {counted(document, 'bits')}, by NNCF's accuracy control in {counted(document, 'nncf')}"
    fewest = f"fewest bytes in {sum(one >= 1 for one in won)} of {len(won)} that a baseline keeps"
    size, latency = f"{smaller[0]:.1f} to {smaller[-1]:.1f} times fewer bytes", f"{slower[0]:.2f} to {slower[-1]:.2f} times the latency"
    return f"{size}; on unseen inputs kept in {counted(document)}{broken}, {others}; {fewest}; {latency} of bits alone"


def claims(documents: list[Document]) -> str:
    networks = list(dict.fromkeys(row["network"] for row in documents[-1].rows))
    budgets = f"{' and '.join(networks)}, {len(by_budget(documents[-1])) / len(networks):g} budgets each"
    return f"{budgets}, {documents[-1].n.replace('1', 'one')}: {newest(documents[-1])}"


def verdict(documents: list[Document]) -> str:
    won = fewest_bytes(documents[-1]).values()
    return f"fewest bytes in {sum(one >= 1 for one in won)} of {len(won)} comparisons; budget kept in {counted(documents[-1])}"


BENCHMARK = Benchmark(
    name="budget", options=BudgetOptions, measure=rows, newest=newest, n=seeds_of,
    about="""Drop: of the share of crops with FP32's class, of the mean cosine with FP32's embedding, or of the accuracy, as deployed, on
the inputs that the contenders choose on and on those that none has seen; over: points by which the latter exceeds the budget. All choose
by the measured drop, without the margin for other data of `Budget(confidence=0.95)`. x bits: how many times as fast as bits alone. s: of
the contender, a sweep's for each budget. Float layers run in 32 bits in muntin's artifacts, as recorded, and as OpenVINO chooses in
NNCF's. The goal of fewest bytes compares with the smallest baseline that keeps the budget on unseen inputs, where there is one; 0: muntin
breaks it.""",
    tables=(
        NETWORKS,
        Table(
            title="Contenders", rows=contenders,
            columns=(
                *columns("network, budget, contender=form"), over("drop, choosing", "choosing.drop", digits=4),
                over("drop, unseen", "holdout.drop", digits=4), *columns("kept, over:+.4f"), MEGABYTES,
                *columns("smaller:.1f, ms:.2f, x bits=speed:.2f, s=seconds:.0f, artifacts:.0f"),
            ),
        ),
    ),
    goals=(
        Goal(name="points over the budget on unseen inputs", values=over_budget, at_most=0.0, form="{:.4f}"),
        Goal(name="fewest bytes: the smallest baseline's over muntin's", values=fewest_bytes, at_least=1.0, form="{:.2f}"),
    ),
    blocks={"claims": claims, "verdict": verdict},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
