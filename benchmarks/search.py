"""Search networks in the minutes in which others are trained by hand: muntin search, random search, presets, other widths, peers.

    python benchmarks/search.py [--source earth] [--model hybrid-xs] [--minutes 60] [--seeds 3] [--space FILE.yaml] [--candidates 200]
                                [--networks 4] [--peers NAME ...] [--output runs/benchmark-search] [--json]

Every contender has `--minutes` for each seed, all its training together, and the recipe of the demonstration otherwise. Those of the search
cover its latencies, too.
    search    muntin search: shared weights, latencies of parts, `--networks` of the front trained alone
    random    `--networks` random architectures of the same space, trained alone, each for its share of the minutes
    presets   hybrid-xxs, hybrid-xs and hybrid-s, likewise
    width     `--model` with half, all and one and a half times its channels (in multiples of a head), likewise
    peers     those of `--peers` (`segmentation_peers/models.py`), likewise, each by `muntin export` in INT8, at the demonstration's rate,
              which `peers.py` tunes for each; YOLO26n-sem needs the package ultralytics (AGPL-3.0)
All networks are exported in INT8, scored on the validation and the test split as artefacts, and those of a seed are timed in turns.

    test, ms       mIoU of the test split; median milliseconds of one picture of twice the training crop
    points         100 x (test score of a found network - that of its rival): mean over the found networks that have one. The rival is the
                   network of the other contender with the best validation score among those that are not slower, within 2 %
    times faster   ms of the fastest network of the other contender that scores no less on the validation split, over that of a found
                   network: mean over the found networks that have such a rival
    ranks          over the found and the random networks, Spearman of the scores with shared weights, of the parameters and of the
                   multiply-adds with the score of the networks trained alone; of the predicted latency, the parameters and the
                   multiply-adds with the measured latency
    latency        share of the found networks whose latency is predicted within 10 %, and their median error
Goals: a point beyond the spread or 1.3 times as fast against presets and width; ahead of random; rank correlation 0.7; 90 % of latencies
within 10 %. What the parameter count predicts as well is not worth a table of latencies.

Rows that are measured are kept, and a search goes on where it was interrupted. Time: contenders x seeds x minutes, and a fifth more for
exports. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

import muntin
from kept import Row, kept_row, now
from muntin.compression import load_model
from muntin.data import open_source
from muntin.data.source import SplitName
from muntin.deployment.checkpoint_export import ARTIFACT, export_checkpoint, export_side
from muntin.models import PRESETS, ModelConfig
from muntin.runtime import describe_hardware, load
from muntin.runtime.host.hardware import physical_cores
from muntin.searching import SearchSettings, Space, default_space, load_space, search_architectures
from muntin.searching.candidates import CandidateScorer
from muntin.searching.finalists import Finalist, train_finalist, with_latencies
from muntin.searching.latency_table import ArchitectureLatency
from muntin.searching.preparation import base_config
from muntin.searching.run import MANY_STEPS, TRAINING_SHARE, document
from muntin.searching.space import Architecture, UnbuildableError
from muntin.searching.supernet import Supernet
from muntin.searching.supernet_training import SupernetTraining
from muntin.training import Recipe, evaluate, fit, load_recipe, read_checkpoint
from muntin.training.checkpoint import checkpoints_in
from muntin.training.evaluation import tile_of
from muntin.training.precision import prepare_hardware
from muntin.training.recipe import override_recipe
from options import at_least
from segmentation_peers.models import ENTRIES

PROTOCOL = 3
"""Version of the rows."""
RECIPE = Path(muntin.__file__).parent / "recipes" / "demo.yaml"
BY_HAND = ("hybrid-xxs", "hybrid-xs", "hybrid-s")
WIDTHS = (0.5, 1.0, 1.5)
NOT_SLOWER = 1.02
CONTENDERS = ("search", "random", "presets", "width", "peers")
PEERS = ("linknet-resnet18", "fpn-mobilenetv4-conv-small", "yolo26n-sem")
FIGURES = ("seconds", "scored", "correlation", "latency_error", "importances")


class Bench:
    """One seed: the recipe, the data and the space."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        values = {"data.source": arguments.source, "model.name": arguments.model, "seed": seed, "training.threads": arguments.threads}
        changes = [f"{name}={value}" for name, value in values.items()]
        self.arguments, self.seed = arguments, seed
        self.recipe = load_recipe(RECIPE, [*changes, *(arguments.set or ())])
        self.root, self.folder = RECIPE.parent, arguments.output.resolve() / str(seed)
        self.source = open_source(self.recipe.data, root=self.root)
        self.base = base_config(self.recipe, self.source)
        self.space: Space = default_space(self.recipe.task, self.base.head_dim) if arguments.space is None else load_space(arguments.space)

    def say(self, text: str) -> None:
        print(f"seed {self.seed}, {text}", file=sys.stderr, flush=True)

    def search(self) -> Row:
        given = self.arguments
        settings = SearchSettings(minutes=given.minutes, candidates=given.candidates, finalists=given.networks, own=False)
        result = search_architectures(
            self.recipe, self.space, folder=self.folder / "search", root=self.root, settings=settings,
            report=lambda stage: self.say(f"search: {stage.stage} {stage.done} of {stage.total}"),
        )  # fmt: skip
        if not result.finished:
            raise SystemExit("interrupted: the same command goes on")
        content = document(result)
        rows = {row["name"]: row for row in content["networks"]}
        return {
            "networks": [{**rows[network.name], **self._tested(network)} for network in result.networks],
            **{key: content[key] for key in FIGURES},
        }

    def trained(self, contender: str) -> Row:
        """Networks trained alone, each for its share of the minutes."""
        chosen = self._architectures(contender)
        minutes = TRAINING_SHARE * self.arguments.minutes / len(chosen)
        rows = []
        for name, architecture in chosen.items():
            recipe = self._recipe(architecture, minutes)
            network = train_finalist(
                recipe, architecture, name=f"{contender}-{name}", folder=self.folder / contender / name, root=self.root,
                source=self.source,
            )  # fmt: skip
            if network is None:
                raise SystemExit("interrupted: the same command goes on")
            rows.append({**network.row(), **self._tested(network)})
            self.say(f"{contender}: {name} {rows[-1]['test']:.4f}")
        return {"networks": rows}

    def peers(self) -> Row:
        """Networks of others, trained alone, each for its share of the minutes."""
        rows = []
        for name in self.arguments.peers:
            folder = self.folder / "peers" / name
            recipe = override_recipe(self._limited(TRAINING_SHARE * self.arguments.minutes / len(self.arguments.peers)), [
                f"model={{name: '{ENTRIES[name].model}'}}",
            ])  # fmt: skip
            result = fit(recipe, directory=folder, root=self.root, resume=bool(checkpoints_in(folder / "checkpoints")))
            if result.interrupted or result.stop_requested:
                raise SystemExit("interrupted: the same command goes on")
            checkpoint = read_checkpoint(result.checkpoint)
            artifact = export_checkpoint(checkpoint, folder / ARTIFACT)
            score, test = (self._score(artifact.path, recipe, split) for split in ("validation", "test"))
            parameters = sum(parameter.numel() for parameter in load_model(checkpoint).parameters())
            rows.append({
                "name": name, "float_score": float((result.result or result.validation[-1])["score"]), "score": score, "test": test,
                "bytes": artifact.bytes, "parameters": parameters, "run": str(folder), "artifact": str(artifact.path),
            })  # fmt: skip
            self.say(f"peers: {name} {test:.4f}")
        return {"networks": rows}

    def _limited(self, minutes: float) -> Recipe:
        return override_recipe(self.recipe, [f"training.minutes={minutes}", f"training.steps={MANY_STEPS}"])

    def _recipe(self, architecture: Architecture, minutes: float) -> Recipe:
        options = {**self.recipe.model.options, **architecture.options(self.base)}
        limited = self._limited(minutes)
        return limited.model_copy(update={"model": limited.model.model_copy(update={"options": options})})

    def _architectures(self, contender: str) -> dict[str, Architecture]:
        if contender == "presets":
            return {name: Architecture(config=self._config(PRESETS[name])) for name in BY_HAND}
        if contender == "width":
            return {f"x{width:g}": Architecture(config=self._config(self._scaled(width))) for width in WIDTHS}
        generator, found = random.Random(self.seed), dict[str, Architecture]()  # noqa: S311 - no secret
        while len(found) < self.arguments.networks:
            try:
                found[f"{len(found) + 1:03d}"] = self.space.architecture(self.space.sample(generator), self.base)
            except UnbuildableError:
                continue
        return found

    def _config(self, fields: Mapping[str, Any]) -> ModelConfig:
        own = {"task": self.base.task, "classes": self.base.classes, "channels": self.base.channels}
        return ModelConfig.model_validate({**own, **fields})

    def _scaled(self, width: float) -> dict[str, Any]:
        """The preset with its channels times a width, in multiples of 8, and of a head in attention stages."""
        base, unit = self.base, self.base.head_dim

        def rounded(value: int, multiple: int, least: int) -> int:
            return max(least, round(width * value / multiple) * multiple)

        return {
            **base.model_dump(), "stem": tuple(rounded(c, 8, 8) for c in base.stem), "decoder": rounded(base.decoder, 8, 8),
            "dims": tuple(rounded(c, unit, 2 * unit) for c in base.dims),
        }  # fmt: skip

    def _tested(self, network: Finalist) -> Row:
        return {"test": self._score(network.artifact, network.recipe, "test")}

    def _score(self, artifact: Path, recipe: Recipe, split: SplitName) -> float:
        with closing(load(artifact, threads=self.arguments.threads)) as session:
            return evaluate(session, self.source.split(split), tile=tile_of(recipe.data.crop)).score

    def rated(self) -> Row:
        """Score and latency of the random networks as the search predicts them: by its shared weights and the latencies of parts."""
        given, folder = self.arguments, self.folder / "search"
        newest = read_checkpoint(folder / "supernet")
        precision = prepare_hardware(self.recipe.training, begun=newest.state.precision)
        training = SupernetTraining(
            self.space, self.base, self.recipe, self.source, folder=folder / "supernet", root=self.root, precision=precision
        )  # fmt: skip
        supernet = training.average.model
        assert isinstance(supernet, Supernet)
        scorer = CandidateScorer(supernet, self.recipe, self.source, precision)
        latency = ArchitectureLatency(export_side(self.recipe), threads=given.threads)
        return {
            name: {"shared_score": scorer.score(one), "predicted": latency.predict(one)}
            for name, one in self._architectures("random").items()
        }  # fmt: skip

    def timed(self, rows: Mapping[str, Row]) -> Row:
        """Latency of all networks of this seed in turns, by their names."""
        networks = [
            Finalist(
                name=f"{contender}/{row['name']}", architecture=Architecture(config=self.base), point=None, run=Path(row["run"]),
                artifact=Path(row["artifact"]), recipe=self.recipe, float_score=0.0, score=0.0, bytes=row["bytes"],
            )
            for contender, content in rows.items() for row in content["networks"]
        ]  # fmt: skip
        return {"ms": {network.name: network.ms for network in with_latencies(networks, threads=self.arguments.threads)}}


def against(found: Sequence[Row], others: Sequence[Row]) -> Row:
    """How far found networks are ahead of another contender's: in points at equal time, and in time at an equal validation score."""
    points, faster = [], []
    for one in found:
        rivals = [other for other in others if other["ms"] <= NOT_SLOWER * one["ms"]]
        points += [100 * (one["test"] - max(rivals, key=lambda other: float(other["score"]))["test"])] if rivals else []
        as_good = [other["ms"] for other in others if other["score"] >= one["score"]]
        faster += [min(as_good) / one["ms"]] if as_good else []
    return {"points": statistics.mean(points) if points else None, "faster": statistics.mean(faster) if faster else None}


def ranks(found: Sequence[Row]) -> Row:
    """Spearman's correlations of what predicts scores and latencies; None where there are too few networks."""

    def correlation(first: str, second: str) -> float | None:
        pairs = [(row[first], row[second]) for row in found if row.get(first) is not None]
        if len(pairs) < 3 or any(len({pair[side] for pair in pairs}) == 1 for side in (0, 1)):
            return None
        return float(spearmanr([a for a, _ in pairs], [b for _, b in pairs]).statistic)

    scores = {f"{name} and score": correlation(name, "float_score") for name in ("shared_score", "parameters", "macs")}
    return scores | {f"{name} and ms": correlation(name, "ms") for name in ("predicted", "parameters", "macs")}


def measure(arguments: argparse.Namespace, seed: int, settings: Row, machine: Row) -> Row:
    """The rows of one seed by contender, with latencies and comparisons."""
    bench = Bench(arguments, seed)
    keep = partial(kept_row, settings=settings, hardware=machine)
    rows = {"search": keep(bench.folder / "search.json", measure=bench.search)}
    rows |= {
        name: keep(bench.folder / f"{name}.json", measure=bench.peers if name == "peers" else partial(bench.trained, name))
        for name in CONTENDERS[1:]
    }
    ms = keep(bench.folder / "latency.json", measure=partial(bench.timed, rows))["ms"]
    timed = {
        contender: [
            {key: value for key, value in row.items() if key not in ("run", "artifact")} | {"ms": ms[f"{contender}/{row['name']}"]}
            for row in content["networks"]
        ]
        for contender, content in rows.items()
    }  # fmt: skip
    rated = keep(bench.folder / "rated.json", measure=bench.rated)
    timed["random"] = [{**row, **rated[row["name"].removeprefix("random-")]} for row in timed["random"]]
    return {
        "networks": timed, "against": {name: against(timed["search"], timed[name]) for name in CONTENDERS[1:]},
        "ranks": ranks([*timed["search"], *timed["random"]]), **{key: rows["search"][key] for key in FIGURES},
    }  # fmt: skip


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "none"
    spread = f" ±{statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{spread}{'' if len(known) == len(values) else f' ({len(known)} of {len(values)} seeds)'}"


def print_table(seeds: Sequence[Row], hardware: Row) -> None:
    for number, seed in enumerate(seeds):
        print(f"seed {number}: {seed['scored']} architectures scored")
        print(f"  {'contender':<11}{'network':<22}{'test':>8}{'validation':>12}{'ms':>8}{'parameters':>12}{'MB':>8}")
        for contender, networks in seed["networks"].items():
            for row in sorted(networks, key=lambda row: row["ms"]):
                print(
                    f"  {contender:<11}{row['name']:<22}{row['test']:>8.4f}{row['score']:>12.4f}{row['ms']:>8.2f}{row['parameters']:>12,}"
                    f"{row['bytes'] / 1e6:>8.3f}"
                )
    for name in CONTENDERS[1:]:
        ahead = [seed["against"][name] for seed in seeds]
        points, faster = (_mean([one[key] for one in ahead], 2) for key in ("points", "faster"))
        print(f"search against {name}: {points} points at no more time; {faster} times as fast at no lower score")
    for name in seeds[0]["ranks"]:
        print(f"rank correlation of {name.replace('_', ' ')}: {_mean([seed['ranks'][name] for seed in seeds], 2)}")
    errors = [seed["latency_error"] or {} for seed in seeds]
    within, median = (_mean([error.get(key) for error in errors], 3) for key in ("within_tenth", "median"))
    print(f"latency of found networks: {within} of them predicted within 10 %, median error {median}")
    print(f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="earth", choices=["earth", "earth:climate", "earth:shore"])
    parser.add_argument("--model", default="hybrid-xs", choices=[name for name in PRESETS if name != "dense-s"])
    parser.add_argument("--minutes", type=float, default=60.0, help="of each contender and seed")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--space", type=Path, help="a YAML file of choices; by default the task's")
    parser.add_argument("--candidates", type=at_least(1), default=200)
    parser.add_argument("--networks", type=at_least(1), default=4, help="trained alone by search and by random")
    parser.add_argument("--peers", nargs="+", choices=[name for name, entry in ENTRIES.items() if not entry.hybrid], default=[*PEERS])
    parser.add_argument("--threads", type=at_least(1), default=physical_cores())
    parser.add_argument("--set", action="append", help="a value of the recipe, such as data.crop=128; for smoke tests")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-search"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    if "yolo26n-sem" in arguments.peers and find_spec("ultralytics") is None:
        parser.error("yolo26n-sem needs the package ultralytics (AGPL-3.0): install it, or name other --peers")
    machine = describe_hardware()
    keys = ("source", "model", "minutes", "candidates", "networks", "peers", "threads", "set")
    settings = {key: getattr(arguments, key) for key in keys} | {"protocol": PROTOCOL}
    settings["space"] = None if arguments.space is None else {n: list(v) for n, v in load_space(arguments.space).choices.items()}
    with redirect_stdout(sys.stderr):  # ultralytics prints
        seeds = [measure(arguments, seed, settings, machine) for seed in range(arguments.seeds)]
    hardware = {**machine, "created": now()}
    if arguments.json:
        print(json.dumps({"benchmark": "search", "hardware": hardware, "settings": settings, "rows": seeds}, indent=1, default=str))
    else:
        print_table(seeds, hardware)


if __name__ == "__main__":
    main()
