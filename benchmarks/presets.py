"""Compare the presets with networks that `muntin search` found at about their latency: as many training steps each, deployed in INT8.

    python benchmarks/presets.py [--seeds 3] [--steps 660] [--only hybrid-xxs ...]

Every network is trained by the demonstration's recipe on the same crops, seed by seed, and on three splits of the same photograph (`earth`,
`earth:climate`, `earth:shore`), because the validation split of `earth` is one region. FOUND are the networks of `search.py --minutes 10`
(results/search-2026-12-01-epyc.json) next to a preset on the front. Scores do not suffer from other work; for the timings run it alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ablation import shown, sign
from documents import Document, Goal, Row, Table, columns, grouped, mean, seeds_of
from harness import Benchmark, Options, Run, main, option
from measures import ms_in_turns, noise, score
from muntin.deployment.checkpoint_export import ARTIFACT, export_checkpoint
from muntin.runtime import load
from resumed import demo_recipe, trained

SHARED: dict[str, Any] = {
    "stem": [8, 16, 32], "pairs": [0, 0], "attention": "local", "window": 4, "mlp_ratio": 1, "fusion": "upernet", "finest": 8,
}  # fmt: skip
FOUND: dict[str, dict[str, dict[str, Any]]] = {
    "hybrid-xxs": {"062": {**SHARED, "dims": [128, 128], "depths": [1, 1], "decoder": 32}},
    "hybrid-xs": {"059": {**SHARED, "dims": [128, 192], "depths": [3, 1], "decoder": 48, "block": "serial", "gate": False}},
}
"""By preset, networks that a search found near its latency, as `model.options`."""
SOURCES, SPLITS = ("earth", "earth:climate", "earth:shore"), ("validation", "test")
AS_FAST = 1.05
"""Most time of a network that may replace a preset, as a share of the preset's."""
ROUNDS = 60


@dataclass(frozen=True, kw_only=True)
class PresetsOptions(Options):
    seeds: int = option(3, "number of seeds", least=1, selects=True)
    steps: int = option(660, "steps of training", least=1)
    only: tuple[str, ...] = option(tuple(FOUND), "presets", choices=tuple(FOUND), selects=True)


def measure(preset: str, options: dict[str, Any], source: str, seed: int, steps: int, folder: Path) -> Row:
    """Train and export one network and score its artifact."""
    changes = {"data.source": source, "model.name": preset, "model.options": options, "seed": seed, "training.steps": steps}
    checkpoint = trained(demo_recipe(changes), folder)
    artifact = export_checkpoint(checkpoint, folder / ARTIFACT)
    with closing(load(artifact.path)) as session:
        return {"bytes": artifact.bytes, **{split: score(checkpoint, session, split) for split in SPLITS}}


def latencies(folder: Path, names: list[str]) -> Row:
    return {"ms": ms_in_turns({name: load(folder / name / ARTIFACT) for name in names}, noise(512), ROUNDS)}


def rows(run: Run) -> Iterator[Row]:
    for preset in dict.fromkeys(run.options.only):
        networks: dict[str, dict[str, Any]] = {preset: {}, **FOUND[preset]}
        for seed in range(run.options.seeds):
            for source in SOURCES:
                for name, options in networks.items():
                    where = f"{preset}/{source.replace(':', '-')}-{seed}/{name}"
                    make = partial(measure, preset, options, source, seed, run.options.steps, run.folder / where)
                    names = {"part": "score", "preset": preset, "network": name, "source": source, "seed": seed}
                    yield names | run.row(where, make, options=options)
            make = partial(latencies, run.folder / preset / f"earth-{seed}", list(networks))
            timed = run.row(f"{preset}/latency-{seed}", make, networks=networks)
            for name, ms in timed["ms"].items():
                part = {"part": "latency", "preset": preset, "network": name, "seed": seed, "created": timed["created"]}
                yield {**part, "ms": ms, "time": ms / timed["ms"][preset]}


def summary(rows: list[Row]) -> Iterator[Row]:
    """A row for each network: means, and differences to its preset over pairs of a source and a seed, none for a preset itself."""
    times = grouped((row for row in rows if row["part"] == "latency"), "network")
    networks = grouped((row for row in rows if row["part"] == "score"), "network")
    for (name,), mine in networks.items():
        preset = mine[0]["preset"]
        found = {"preset": preset, "network": name, "trainings": len(mine), "mb": mine[0]["bytes"] / 1e6}
        found |= {figure: mean(times[name,], figure) for figure in ("ms", "time")} | {split: mean(mine, split) for split in SPLITS}
        if name != preset:
            pairs = list(zip(mine, networks[preset,], strict=True))
            gains = {split: [100 * (row[split] - base[split]) for row, base in pairs] for split in SPLITS}
            found |= {f"{split} points": shown(values, ".1f") for split, values in gains.items()}
            found["replaces"] = found["time"] <= AS_FAST and sign(gains["validation"]) > 0
        yield found


def rivals(document: Document) -> list[Row]:
    return [row for row in summary(document.rows) if "replaces" in row]


def newest(document: Document) -> str:
    return "; ".join(
        f"{row['network']} against {row['preset']}: validation {row['validation points']}, test {row['test points']} points, "
        f"{row['time']:.2f} of the time"
        for row in rivals(document)
    )


def claim(documents: list[Document]) -> str:
    found = rivals(documents[-1])
    replacing = f"{sum(row['replaces'] for row in found) or 'none'} of {len(found)} found networks replaces them"
    return f"Trained beside them for longer, {found[0]['trainings']} times, {replacing}"


BENCHMARK = Benchmark(
    name="presets", options=PresetsOptions, measure=rows, newest=newest,
    n=lambda rows: f"{seeds_of(row for row in rows if row['part'] == 'score')} on {len(SOURCES)} sources",
    about="""mIoU of the INT8 artifacts, means over sources and seeds; *points*: difference to the preset ± its standard error over pairs of
a source and a seed; ms is 512 x 512, all networks of a seed in turns; *time* is over the preset's. A found network replaces its preset
if it takes at most 5 % more time and is ahead on validation by more than twice the standard error. The test split decides nothing.""",
    variant=lambda document: f"{document.settings['steps']} steps",
    tables=(
        Table(
            columns=columns(
                "network, preset, trainings, validation:.3f, points=validation points, test:.3f, points=test points, MB=mb:.2f, ms:.2f, "
                "time:.2f, replaces"
            ),
            rows=summary,
        ),
    ),
    goals=(
        Goal(
            name="found networks that replace a preset",
            values=lambda document: sum(row["replaces"] for row in rivals(document)),
            at_least=1,
        ),
    ),
    blocks={"M20": claim},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
