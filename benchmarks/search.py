"""Search networks in the minutes in which others are trained by hand: muntin search, random search, presets, other widths, peers.

    python benchmarks/search.py [--source earth] [--model hybrid-xs] [--minutes 60] [--seeds 3] [--candidates 100] [--networks 4]
                                [--peers NAME ...]

Every contender has `--minutes` for each seed, all its training together, and the recipe of the demonstration otherwise: `muntin search`,
and `--networks` of its front trained alone; as many random architectures of the same space; hybrid-xxs, hybrid-xs and hybrid-s; `--model`
with half, all and one and a half times its channels; and peers (`segmentation_peers/models.py`; YOLO26n-sem needs the package ultralytics,
AGPL-3.0). All networks are exported in INT8, scored as artifacts, and those of a seed are timed in turns. A search goes on where it was
interrupted. Time: contenders x seeds x minutes, and a fifth more for exports. Run it alone.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

import muntin
from documents import Column, Document, Goal, Row, Table, columns, seeds_of, spread
from harness import Benchmark, Options, Run, main, option, threads_option
from measures import ms_in_turns, noise
from muntin.data import open_source
from muntin.deployment.checkpoint_export import ARTIFACT, export_checkpoint, export_side
from muntin.models import PRESETS, ModelConfig
from muntin.runtime import load
from muntin.searching import SearchSettings, default_space, search_architectures
from muntin.searching.architecture_search import MANY_STEPS, TRAINING_SHARE, document
from muntin.searching.finalists import ROUNDS, train_finalist
from muntin.searching.preparation import base_config
from muntin.searching.space import Architecture, UnbuildableError
from muntin.tasks.folders import SplitName
from muntin.training import Recipe, evaluate, load_recipe
from muntin.training.evaluation import tile_of
from muntin.training.recipe import override_recipe
from segmentation_peers.deployment import parameters_of
from segmentation_peers.models import ENTRIES
from segmentation_peers.training import train

RECIPE = Path(muntin.__file__).parent / "recipes" / "demo.yaml"
BY_HAND = ("hybrid-xxs", "hybrid-xs", "hybrid-s")
WIDTHS = (0.5, 1.0, 1.5)
NOT_SLOWER = 1.02
RIVALS = {"random": "random search", "presets": "the presets", "width": "other widths", "peers": "the peers"}
PEERS = ("linknet-resnet18", "fpn-mobilenetv4-conv-small", "yolo26n-sem")
FIGURES = ("seconds", "scored", "correlation", "importances")
GO_ON = "interrupted: the same command goes on"


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    source: str = option("earth", "data", choices=("earth", "earth:climate", "earth:shore"))
    model: str = option("hybrid-xs", "the recipe's model", choices=tuple(name for name in PRESETS if name != "dense-s"))
    minutes: float = option(60.0, "minutes of each contender and seed")
    seeds: int = option(3, "number of seeds", least=1, selects=True)
    candidates: int = option(100, "candidates of the search", least=1)
    networks: int = option(4, "networks trained alone by search and by random", least=1)
    peers: tuple[str, ...] = option(PEERS, "peers", choices=tuple(name for name, entry in ENTRIES.items() if not entry.hybrid))
    threads: int = threads_option()
    set: tuple[str, ...] = option((), "values of the recipe, such as data.crop=128; for smoke tests")

    def __post_init__(self) -> None:
        if "yolo26n-sem" in self.peers and find_spec("ultralytics") is None:
            raise ValueError("yolo26n-sem needs the package ultralytics (AGPL-3.0): install it, or name other --peers")


class Bench:
    """One seed: the recipe, the data and the space."""

    def __init__(self, run: Run, seed: int) -> None:
        given = run.options
        values = {"data.source": given.source, "model.name": given.model, "seed": seed, "training.threads": given.threads}
        self.options, self.seed = given, seed
        self.recipe = load_recipe(RECIPE, [*(f"{name}={value}" for name, value in values.items()), *given.set])
        self.root, self.folder = RECIPE.parent, (run.folder / str(seed)).resolve()
        self.source = open_source(self.recipe.data, task=self.recipe.task, root=self.root)
        self.base = base_config(self.recipe, self.source)
        self.space = default_space(self.recipe.task, self.base.head_dim)

    def search(self) -> Row:
        given = self.options
        settings = SearchSettings(minutes=given.minutes, candidates=given.candidates, finalists=given.networks, own=False)
        result = search_architectures(
            self.recipe, self.space, folder=self.folder / "search", root=self.root, settings=settings,
            report=lambda stage: print(f"search: {stage.stage} {stage.done} of {stage.total}", file=sys.stderr, flush=True),
        )  # fmt: skip
        if not result.finished:
            raise SystemExit(GO_ON)
        content = document(result)
        networks = [{**network.row(), "test": self._score(network.artifact, network.recipe, "test")} for network in result.networks]
        return {"networks": networks, **{key: content[key] for key in FIGURES}}

    def trained(self, contender: str) -> Row:
        """Networks trained alone, each for its share of the minutes."""
        chosen = self._architectures(contender)
        limited, rows = self._limited(len(chosen)), []
        for name, architecture in chosen.items():
            options = {**limited.model.options, **architecture.options(self.base)}
            recipe = limited.model_copy(update={"model": limited.model.model_copy(update={"options": options})})
            folder = self.folder / contender / name
            network = train_finalist(recipe, architecture, name=f"{contender}-{name}", folder=folder, root=self.root, source=self.source)
            if network is None:
                raise SystemExit(GO_ON)
            rows.append({**network.row(), "test": self._score(network.artifact, recipe, "test")})
        return {"networks": rows}

    def peers(self) -> Row:
        """Networks of others, trained alone, each for its share of the minutes."""
        rows = []
        for name in self.options.peers:
            folder = self.folder / "peers" / name
            recipe = override_recipe(self._limited(len(self.options.peers)), [f"model={{name: '{ENTRIES[name].model}'}}"])
            checkpoint = train(recipe, folder, self.root)
            artifact = export_checkpoint(checkpoint, folder / ARTIFACT)
            score, test = (self._score(artifact.path, recipe, split) for split in ("validation", "test"))
            rows.append({
                "name": name, "float_score": float((checkpoint.state.result or {})["score"]), "score": score, "test": test,
                "bytes": artifact.bytes, "parameters": parameters_of(checkpoint), "artifact": str(artifact.path),
            })  # fmt: skip
        return {"networks": rows}

    def _limited(self, count: int) -> Recipe:
        minutes = TRAINING_SHARE * self.options.minutes / count
        return override_recipe(self.recipe, [f"training.minutes={minutes}", f"training.steps={MANY_STEPS}"])

    def _architectures(self, contender: str) -> dict[str, Architecture]:
        if contender == "presets":
            return {name: Architecture(config=self._config(PRESETS[name])) for name in BY_HAND}
        if contender == "width":
            return {f"x{width:g}": Architecture(config=self._config(self._scaled(width))) for width in WIDTHS}
        generator, found = random.Random(self.seed), dict[str, Architecture]()  # noqa: S311 - no secret
        while len(found) < self.options.networks:
            try:
                found[f"{len(found) + 1:03d}"] = self.space.architecture(self.space.sample(generator), self.base)
            except UnbuildableError:
                continue
        return found

    def _config(self, fields: Mapping[str, Any]) -> ModelConfig:
        own = {"task": self.base.task, "classes": self.base.classes, "channels": self.base.channels}
        return ModelConfig.model_validate({**own, **fields})

    def _scaled(self, width: float) -> Row:
        """The preset with its channels times a width, in multiples of 8, and of a head in attention stages."""
        base, unit = self.base, self.base.head_dim

        def rounded(value: int, multiple: int, least: int) -> int:
            return max(least, round(width * value / multiple) * multiple)

        return {
            **base.model_dump(), "stem": tuple(rounded(c, 8, 8) for c in base.stem), "decoder": rounded(base.decoder, 8, 8),
            "dims": tuple(rounded(c, unit, 2 * unit) for c in base.dims),
        }  # fmt: skip

    def _score(self, artifact: Path, recipe: Recipe, split: SplitName) -> float:
        with closing(load(artifact, threads=self.options.threads)) as session:
            return evaluate(session, self.source.split(split), tile=tile_of(recipe.data.crop)).score

    def timed(self, artifacts: Mapping[str, str]) -> Row:
        """Latency of all networks of this seed in turns, by their names."""
        side, channels = export_side(self.recipe), self.recipe.data.channels
        sessions = {name: load(Path(path), threads=self.options.threads) for name, path in artifacts.items()}
        return {"ms": ms_in_turns(sessions, noise(side, channels), ROUNDS)}


def rows(run: Run) -> Iterator[Row]:
    with redirect_stdout(sys.stderr):  # ultralytics prints
        for seed in range(run.options.seeds):
            bench = Bench(run, seed)
            keep = run.row
            found = {"search": keep(f"{seed}/search", bench.search)}
            found |= {name: keep(f"{seed}/{name}", partial(bench.trained, name)) for name in RIVALS if name != "peers"}
            found["peers"] = keep(f"{seed}/peers", bench.peers)
            artifacts = {f"{contender}/{one['name']}": one["artifact"] for contender, row in found.items() for one in row["networks"]}
            ms = keep(f"{seed}/latency", partial(bench.timed, artifacts))["ms"]
            yield {"part": "search", "seed": seed, **{key: found["search"][key] for key in FIGURES}}
            for contender, row in found.items():
                for one in row["networks"]:
                    network = {key: value for key, value in one.items() if key not in ("run", "artifact")}
                    yield {"part": "network", "seed": seed, "contender": contender, **network, "ms": ms[f"{contender}/{one['name']}"]}


# Pages


def against(found: Sequence[Row], others: Sequence[Row]) -> Row:
    """How far found networks are ahead of another contender's: in points at equal time, and in time at an equal validation score."""
    points, faster = [], []
    for one in found:
        rivals = [other for other in others if other["ms"] <= NOT_SLOWER * one["ms"]]
        points += [100 * (one["test"] - max(rivals, key=lambda other: float(other["score"]))["test"])] if rivals else []
        as_good = [other["ms"] for other in others if other["score"] >= one["score"]]
        faster += [min(as_good) / one["ms"]] if as_good else []
    return {"points": statistics.mean(points) if points else None, "times as fast": statistics.mean(faster) if faster else None}


def correlation(found: Sequence[Row], first: str, second: str) -> float | None:
    """Spearman's; None where there are too few networks."""
    pairs = [(row[first], row[second]) for row in found if row.get(first) is not None]
    if len(pairs) < 3 or any(len({pair[side] for pair in pairs}) == 1 for side in (0, 1)):
        return None
    return float(spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic)


def by_contender(found: list[Row], seed: int) -> dict[str, list[Row]]:
    networks = [row for row in found if row["part"] == "network" and row["seed"] == seed]
    return {name: sorted((row for row in networks if row["contender"] == name), key=lambda row: row["ms"]) for name in ("search", *RIVALS)}


def comparisons(found: list[Row]) -> dict[str, list[float]]:
    """Leads over each rival, and rank correlations, of each seed that has them."""
    values: dict[str, list[float | None]] = {}
    for seed in dict.fromkeys(row["seed"] for row in found):
        networks = by_contender(found, seed)
        for key in ("points", "times as fast"):
            for rival in RIVALS:
                values.setdefault(f"{key} beside {rival}", []).append(against(networks["search"], networks[rival])[key])
        for second in ("float_score", "ms"):
            for first in ("parameters", "macs"):
                rank = correlation([*networks["search"], *networks["random"]], first, second)
                values.setdefault(f"rank of {first} with {second}".replace("_", " "), []).append(rank)
        values.setdefault("rank of short trainings with whole ones", []).extend(
            row["correlation"] for row in found if row["part"] == "search" and row["seed"] == seed
        )
    return {name: [value for value in each if value is not None] for name, each in values.items()}


def beside(key: str, *others: str, spreads: int = 0) -> Callable[[Document], dict[str, float]]:
    """A goal's cases: means of comparisons over the seeds, less some times their spread."""

    def cases(document: Document) -> dict[str, float]:
        found = {other: each for other in others if (each := comparisons(document.rows)[f"{key} {other}"])}
        return {name: statistics.mean(each) - (spreads * statistics.stdev(each) if len(each) > 1 else 0) for name, each in found.items()}

    return cases


def newest(document: Document) -> str:
    told = [f"{points:+.1f} beside {rival}" for rival, points in beside("points beside", *RIVALS)(document).items()]
    return f"found networks at no more time, points of test mIoU: {', '.join(told)}"


def claims(documents: list[Document]) -> str:
    newest = documents[-1]
    points, minutes = beside("points beside", *RIVALS)(newest), newest.settings["minutes"]
    each = f"{'ten' if minutes == 10 else f'{minutes:g}'} minutes each, {newest.n.replace('1', 'one')}"
    leads = [f"{abs(value):.1f} points {'behind' if value < 0 else 'ahead of'} {RIVALS[rival]}" for rival, value in points.items()]
    faster = beside("times as fast beside", "presets")(newest)["presets"]
    earlier = "an earlier search, by shared weights, " if newest.created < "2026-12-03" else ""
    return f"{earlier}{each}: at no more time {', '.join(leads)}; at no lower validation score {faster:.2f} times as fast as the presets"


BENCHMARK = Benchmark(
    name="search", options=SearchOptions, measure=rows, newest=newest, n=seeds_of,
    variant=lambda document: "{model} on {source}, {minutes:g} minutes".format(**document.settings),
    about="""mIoU and milliseconds (one image of twice the training crop) of the INT8 artifacts. Points: 100 x (test score of a found
network less that of its rival), mean over the found networks that have one; the rival is the other contender's network with the best
validation score among those not slower, within 2 %. Times as fast: ms of the fastest network of the other contender that scores no less on
the validation split, over that of a found network. Rank: Spearman, of parameters and multiply-adds over the found and the random networks,
of short trainings over the found ones. Figures until 2 December 2026 are of an earlier search, by shared weights. Better than the presets
and other widths is a point ahead beyond the spread, or 1.3 times as fast: one of the two goals is enough.""",
    tables=(
        Table(
            columns=(
                *columns("seed, contender, network=name, test:.4f, validation=score:.4f, ms:.2f, parameters"),
                Column(title="MB", value=lambda row: row["bytes"] / 1e6, form="{:.3f}"),
            ),
            rows=lambda found: (
                row for seed in dict.fromkeys(row["seed"] for row in found) for rows in by_contender(found, seed).values() for row in rows
            ),
        ),
        Table(
            title="Search beside the others", columns=columns("comparison, mean"),
            rows=lambda found: ({"comparison": name, "mean": spread(each, "{:.2f}")} for name, each in comparisons(found).items()),
        ),
        Table(
            title="Searches", rows=lambda found: [row for row in found if row["part"] == "search"],
            columns=columns(
                "seed, scored, seconds:.0f, correlation:.2f"
            ),
        ),
    ),
    goals=(
        Goal(
            name="points ahead, beyond the spread",
            values=beside("points beside", "presets", "width", spreads=1), at_least=1.0, form="{:.1f}",
        ),
        Goal(name="or times as fast", values=beside("times as fast beside", "presets", "width"), at_least=1.3, form="{:.2f}"),
        Goal(name="points ahead of random search", values=beside("points beside", "random"), at_least=0.0, form="{:.1f}"),
        Goal(name="rank correlation", values=beside("rank of", "short trainings with whole ones"), at_least=0.7, form="{:.2f}"),
    ),
    blocks={"M20": claims},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
