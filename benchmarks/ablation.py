"""Measure the value of each part of a hybrid: the network without it, or with another choice, trained in the same way and deployed.

    python benchmarks/ablation.py [--model hybrid-s] [--seeds 0 1 2] [--steps 700] [--precision bf16] [--variants serial ...]
                                  [--threads N] [--rounds 20] [--output runs/benchmark-ablation] [--json]

Each variant is the preset with one change, trained by the demonstration's recipe (source earth, averaged weights) for the same steps on the
same crops, seed by seed, and in one precision (the recipe's `auto` measures the machine, and may choose differently from one variant to
the next). That recipe was tuned with hybrid-s, which favours it. A preset has attention in windows of 8 and through 8 to 32 latents,
parallel blocks, gates, a depthwise convolution for position, foldable norms, ReLU, a decoder of stages.
    local only, global only   all heads use windows; all heads use latents
    convolutions              no attention: two 3 x 3 convolutions of about as many multiply-adds in place of a block
    serial                    attention, then the perceptron, instead of both at once
    no gate, no depthwise     without gates; without the depthwise convolution
    window, latents           another number than the preset's: a window's side, which may be larger than the map; a head's latents
    LayerNorm, GELU           in the blocks, in place of norms that fold away and of ReLU, which fuses
    one-step decoder          all maps to the finest by one bilinear step, summed, smoothed once; the same projections
    UPerNet head              a pyramid with a global context fused at the finest, half as wide: about as many multiply-adds
The configuration has no option for a network without depthwise convolutions, or for another norm, activation or decoder. These are
factories (`ablation_models.py`) that a recipe can name as its model; they are not part of the package.

    GMAC, M     multiply-adds at 512 x 512, millions of parameters
    mIoU        of the test split, the FP32 model deployed in OpenVINO: mean over seeds ± standard deviation
    points      100 x (variant - base), seed by seed: mean ± standard error
    ms          512 x 512, deployed in floats with norms and gates folded: mean over seeds of medians, all variants of a seed in turns
    slower      variant over base in the precision that is faster here, seed by seed, as for points
    verdict     on the preset's choice: a difference counts if it is more than twice its standard error. The score decides; if it shows no
                difference, speed decides. Three seeds make a weak test: by chance alone one difference in five passes it. The score is
                that of the test split, so a preset that is changed because of it has an optimistic score there

Then it compares parallel blocks with serial ones of the same multiply-adds (+30 % is claimed for them), and networks whose closed channels
are cut out with the base: eager PyTorch, torch.compile, deployed in FP32, BF16 and W4A8, each pair in turns; the other's time over this
one's as the median of five passes and their range.

The variants `gate budget ...` are trained for the same steps while gates close, until the gated channels that are open have that share of
their multiply-adds; closed channels are cut out before GMAC, M, mIoU and ms are measured. Goal: 1.3 times as fast at no more than half a
point lost. Their speed is shown in each way of running, too.

A variant that cannot be trained or exported is left out with the reason; without the base there is no comparison.

Existing rows are not measured again, and an interrupted training continues; variants that failed are tried again each time. Scores may be
of any machine; times of another machine are refused. Time on two cores: three to five minutes a variant and seed (windows
of 32 several times that), so about five hours for all, two minutes a seed of timing, ten for the blocks. Scores do not suffer from other
work; for the timings run it alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import torch
from torch import nn

import muntin
from ablation_models import BASES, factory_name
from kept import Row, kept_row
from muntin.artifact import open_artifact
from muntin.compression import load_model, remove_closed_channels
from muntin.deployment import image_macs
from muntin.deployment.counting import parameter_count
from muntin.errors import DependencyError, MuntinError
from muntin.models import PRESETS, ModelConfig, TorchSession
from muntin.models.hybridnet import GAIN
from muntin.runtime import describe_hardware, load
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.profiling.contention import watch_cpu
from muntin.runtime.profiling.profile import BUSY, fill
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.training import Checkpoint
from muntin.training.checkpoint import source_of
from muntin.training.evaluation import tile_of
from options import at_least
from resumed import demo_recipe, float_artifact, integer_artifact, network_of, print_machines, trained

SIDE = 512
PASSES = 5
WAYS = ("eager f32", "compile f32", "deployed f32", "deployed bf16", "deployed i8")
"""Ways of running parallel and serial blocks."""
SURE = 2.0
"""Standard errors beyond which a difference counts."""
GOALS = {"parallel_over_serial": 1.3, "cut_over_base": 1.3, "cut_points_lost": 0.5}
FAILURES = (MuntinError, RuntimeError, ValueError)
"""As muntin, PyTorch and OpenVINO raise what cannot be done: the other variants go on."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A change of the configuration, or a factory of `ablation_models`; and the share of gated channels that training keeps."""

    factory: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    gate_budget: float = 1.0


VARIANTS = {
    "base": Variant(),
    "local only": Variant(options={"attention": "local"}),
    "global only": Variant(options={"attention": "global"}),
    "convolutions": Variant(factory="with_convolutions"),
    "serial": Variant(options={"block": "serial"}),
    "no gate": Variant(options={"gate": False}),
    "no depthwise": Variant(factory="without_position"),
    **{f"window {window}": Variant(options={"window": window}) for window in (4, 8, 16, 32)},
    **{f"latents {latents}": Variant(options={"latents": latents}) for latents in (8, 16, 32, 64)},
    "LayerNorm": Variant(factory="with_layer_norm"),
    "GELU": Variant(factory="with_gelu"),
    "one-step decoder": Variant(options={"fusion": "one-step"}),
    "UPerNet head": Variant(factory="with_uper_decoder"),
    **{f"gate budget {share}": Variant(gate_budget=share) for share in (0.5, 0.25)},
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Settings that all rows of a run share."""

    preset: str
    output: Path
    steps: int
    precision: str
    threads: int
    rounds: int

    def folder(self, name: str, seed: int) -> Path:
        return self.output / f"seed-{seed}" / slug(name)

    def differs(self, name: str) -> bool:
        """Return whether a variant changes this preset."""
        options = VARIANTS[name].options
        config = ModelConfig(**PRESETS[self.preset])
        return not options or any(getattr(config, key) != value for key, value in options.items())

    def checkpoint(self, name: str, seed: int) -> Checkpoint:
        variant = VARIANTS[name]
        training = {"training.steps": self.steps, "training.precision": self.precision, "training.gate_budget": variant.gate_budget}
        changes = {"seed": seed, **training}
        model = self.preset if variant.factory is None else f"ablation_models:{factory_name(variant.factory, self.preset)}"
        recipe = demo_recipe({**changes, "model.name": model, "model.options": variant.options})
        return trained(recipe, self.folder(name, seed))

    def model(self, name: str, seed: int) -> nn.Module:
        """As it is deployed but for folding: without the channels that its gates have closed."""
        model = load_model(self.checkpoint(name, seed))
        remove_closed_channels(model)
        return model

    def float_path(self, name: str, seed: int) -> Path:
        return float_artifact(self.checkpoint(name, seed), self.folder(name, seed) / "float").path


def slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def variants_of(names: Sequence[str]) -> Row:
    """Describe variants, for the settings of a row."""
    return {name: asdict(VARIANTS[name]) for name in names}


def macs_of(model: nn.Module) -> int:
    return image_macs(model.to("meta"), torch.empty(1, 3, SIDE, SIDE, device="meta"))


def reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def score_row(setting: Setting, name: str, seed: int) -> Row:
    """A variant's figures, or why it cannot be trained or exported."""
    row: Row = {"variant": name, "seed": seed}
    try:
        checkpoint = setting.checkpoint(name, seed)
        session = load(setting.float_path(name, seed), precision="f32", threads=setting.threads)
    except FAILURES as error:
        return row | {"cannot": reason(error)}
    test = source_of(checkpoint).split("test")
    return row | {
        "miou": muntin.evaluate(session, test, tile=tile_of(checkpoint.recipe.data.crop)).score,
        "gmac": macs_of(setting.model(name, seed)) / 1e9,
        "parameters": parameter_count(setting.model(name, seed)),
        "train_s": checkpoint.state.seconds,
    }


def float_precisions(path: Path) -> list[str]:
    """The types that a float artefact can be opened in here."""
    try:
        load(path, precision="bf16", shapes=(), cache=False)
    except DependencyError:
        return ["f32"]
    return ["f32", "bf16"]


def latency_row(setting: Setting, names: Sequence[str], seed: int) -> Row:
    """Medians of all variants of a seed, timed in turns in one process; of a variant by its precision."""
    paths = {name: setting.float_path(name, seed) for name in names}
    base = paths[names[0]]
    precisions = float_precisions(base)
    sessions = {
        f"{name}|{precision}": load(path, precision=precision, threads=setting.threads, shapes=[(1, SIDE, SIDE)])
        for name, path in paths.items()
        for precision in precisions
    }
    with watch_cpu() as watch:
        measured = interleaved_latency(sessions, pictures(base), rounds=setting.rounds)
    ms = {name: {precision: measured[f"{name}|{precision}"].median_ms for precision in precisions} for name in names}
    return {"seed": seed, "ms": ms, "others": watch.others}


def pictures(path: Path) -> Any:
    """One picture of the size that is timed, from an artefact's golden ones."""
    return fill(open_artifact(path).golden()[0][0], (1, SIDE, SIDE))


def pair_row(setting: Setting, name: str, other: str, way: str, seed: int) -> Row:
    """Two variants in one way of running them, in turns; a way that this machine has not says why."""
    macs = [macs_of(setting.model(variant, seed)) / 1e9 for variant in (name, other)]
    row: Row = {"variant": name, "other": other, "way": way, "seed": seed, "gmac": macs}
    images = pictures(setting.float_path("base", seed))
    torch._dynamo.reset()  # of what this process compiled before, each network has a share of what may be compiled
    try:
        sessions = {variant: open_way(way, setting, variant, seed) for variant in (name, other)}
        with watch_cpu() as watch:
            passes = [interleaved_latency(sessions, images, rounds=setting.rounds) for _ in range(PASSES)]
    except FAILURES as error:  # no such type here; a network that PyTorch cannot compile, or that W4A8 spoils
        return row | {"cannot": reason(error)}
    ratios = [found[other].median_ms / found[name].median_ms for found in passes]
    ms = [median(found[variant].median_ms for found in passes) for variant in (name, other)]
    return row | {"ms": ms, "gain": median(ratios), "range": [min(ratios), max(ratios)], "others": watch.others}


def open_way(way: str, setting: Setting, name: str, seed: int) -> Any:
    kind, precision = way.split()
    checkpoint, folder = setting.checkpoint(name, seed), setting.folder(name, seed)
    if kind != "deployed":
        torch.set_num_threads(setting.threads)
        signature = checkpoint.recipe.signature(source_of(checkpoint).classes)
        return TorchSession(setting.model(name, seed), signature, compile=kind == "compile")
    artifact = integer_artifact(checkpoint, folder / "int8") if precision == "i8" else float_artifact(checkpoint, folder / "float")
    asked = "recorded" if precision == "i8" else precision
    return load(artifact.path, precision=asked, threads=setting.threads, shapes=[(1, SIDE, SIDE)])


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Paired, over seeds. `error`: the standard error, None for one seed."""

    mean: float
    error: float | None

    @property
    def sign(self) -> int:
        """1 or -1 where the difference counts, otherwise 0."""
        if self.error is None or abs(self.mean) <= SURE * self.error:
            return 0
        return 1 if self.mean > 0 else -1

    def text(self, form: str) -> str:
        return format(self.mean, f"+{form}") + ("" if self.error is None else f" ±{format(self.error, form)}")


def difference(values: Sequence[float]) -> Difference:
    return Difference(mean=fmean(values), error=stdev(values) / sqrt(len(values)) if len(values) > 1 else None)


def verdict(points: Difference, slower: Difference) -> str:
    """On what the base has where the variant has something else."""
    if points.error is None:
        return "one seed: none"
    if points.sign:
        return "earns its place" if points.sign < 0 else "costs score"
    if slower.sign:
        return "earns its place by speed" if slower.sign > 0 else "slower, no better"
    return "not told apart"


def summary(scores: list[Row], latencies: list[Row]) -> dict[str, dict[str, Any]]:
    """Compute for each variant the means over its seeds, the paired differences to the base and the verdict."""
    ms = {row["seed"]: row["ms"] for row in latencies}
    first = next(iter(ms.values()))["base"]
    fastest = min(first, key=lambda precision: fmean(entry["base"][precision] for entry in ms.values()))
    base = {row["seed"]: row["miou"] for row in scores if row["variant"] == "base"}
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(row["variant"] for row in scores):
        mine = [row for row in scores if row["variant"] == name]
        values, times = [row["miou"] for row in mine], [ms[row["seed"]] for row in mine]
        points = difference([100 * (row["miou"] - base[row["seed"]]) for row in mine])
        slower = difference([100 * (entry[name][fastest] / entry["base"][fastest] - 1) for entry in times])
        found[name] = {
            "gmac": mine[0]["gmac"], "parameters": mine[0]["parameters"], "miou": fmean(values),
            "miou_spread": stdev(values) if len(values) > 1 else None, "points": points.mean, "points_error": points.error,
            "ms": {precision: fmean(entry[name][precision] for entry in times) for precision in first},
            "slower_percent": slower.mean, "slower_error": slower.error, "slower_in": fastest,
            "verdict": "" if name == "base" else verdict(points, slower),
        }  # fmt: skip
    return found


def print_summary(found: dict[str, dict[str, Any]], seeds: int) -> None:
    precisions = list(found["base"]["ms"])
    times = "".join(f"{'ms ' + precision:>10}" for precision in precisions)
    print(f"{'variant':<18}{'GMAC':>7}{'M':>7}{'mIoU':>16}{'points':>16}{times}{'slower %':>16}  verdict")
    for name, row in found.items():
        spread = "" if row["miou_spread"] is None else f" ±{row['miou_spread']:.4f}"
        times = "".join(f"{row['ms'][precision]:>10.2f}" for precision in precisions)
        points, slower = (
            "" if name == "base" else Difference(mean=row[mean], error=row[error]).text(form)
            for mean, error, form in (("points", "points_error", ".2f"), ("slower_percent", "slower_error", ".1f"))
        )
        print(
            f"{name:<18}{row['gmac']:>7.2f}{row['parameters'] / 1e6:>7.2f}{format(row['miou'], '.4f') + spread:>16}{points:>16}{times}"
            f"{slower:>16}  {row['verdict']}"
        )
    print(f"{seeds} seeds; slower: in {found['base']['slower_in']}")


def left_out_line(row: Row) -> str:
    return f"left out: {row['variant']}, seed {row['seed']}: {row['cannot']}"


def print_pair(rows: list[Row], names: tuple[str, str], claim: float) -> None:
    gmac = " and ".join(f"{value:.2f}" for value in rows[0]["gmac"])
    print(f"\n{names[0]} against {names[1]}, {gmac} GMAC, seed {rows[0]['seed']} (goal {claim:g})")
    print(f"{'':<16}{f'{names[0]} ms':>17}{f'{names[1]} ms':>11}{'gain':>7}{'range':>14}{'others':>8}")
    for row in rows:
        if "cannot" in row:
            print(f"{row['way']:<16}  cannot: {row['cannot']}")
            continue
        low, high = row["range"]
        others = "–" if row["others"] is None else f"{row['others']:.2f}"
        times = f"{row['ms'][0]:>17.2f}{row['ms'][1]:>11.2f}{row['gain']:>7.2f}"
        print(f"{row['way']:<16}{times}{f'{low:.2f} to {high:.2f}':>14}{others:>8}  {met(row['range'], claim)}")


def met(between: Sequence[float], claim: float) -> str:
    """A goal is met where all passes are, and missed where none is."""
    low, high = between
    return "met" if low >= claim else "MISSED" if high < claim else "within the range"


def points_lost(points: Difference) -> str:
    """Describe the score lost by closing channels. One seed cannot show whether the goal is met."""
    lost = Difference(mean=-points.mean, error=points.error)
    return f"points lost {lost.text('.2f')}: {_lost(lost)} (goal {GOALS['cut_points_lost']:g})"


def claim_of(name: str) -> float:
    return GOALS["parallel_over_serial" if name == "serial" else "cut_over_base"]


def judgements(found: dict[str, dict[str, Any]], name: str, rows: list[Row]) -> dict[str, str]:
    """Judge a pair's goals, for the table."""
    judged = {row["way"]: met(row["range"], claim_of(name)) for row in rows if "cannot" not in row}
    if name != "serial":
        judged["points_lost"] = _lost(Difference(mean=-found[name]["points"], error=found[name]["points_error"]))
    return judged


def _lost(lost: Difference) -> str:
    if lost.error is None:
        return "one seed"
    goal, sure = GOALS["cut_points_lost"], SURE * lost.error
    return "met" if lost.mean + sure <= goal else "MISSED" if lost.mean - sure > goal else "not told apart"


def notes(latencies: list[Row]) -> list[str]:
    """List reasons to doubt the times."""
    return [
        f"seed {row['seed']}: other processes used {row['others']:.1f} cores while it was timed"
        for row in latencies
        if row["others"] is not None and row["others"] >= BUSY
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=BASES, default="hybrid-s", help="the base: a preset")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=at_least(1), default=700, help="of training, the same for all")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of training, the same for all")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="the base comes first, asked for or not"
    )
    parser.add_argument(
        "--threads", type=at_least(1), default=physical_cores(), help="of what is timed; the usable physical cores unless given"
    )
    parser.add_argument("--rounds", type=at_least(1), default=20, help="timed calls of each variant and seed")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-ablation"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    arguments = parser.parse_args()
    machine = describe_hardware()
    chosen = {"preset": arguments.model, "steps": arguments.steps, "precision": arguments.precision}
    timed = {"threads": arguments.threads, "rounds": arguments.rounds}
    setting = Setting(output=arguments.output, **chosen, **timed)
    recipe = demo_recipe({"training.steps": arguments.steps, "training.precision": arguments.precision})
    training = {
        **chosen, **network_of(arguments.model), "gain": GAIN,
        "data": recipe.data.model_dump(mode="json"), "training": recipe.training.model_dump(mode="json"),
    }  # fmt: skip
    timing = {**timed, **training}
    names = [name for name in dict.fromkeys(["base", *arguments.variants]) if setting.differs(name)]
    seeds = list(dict.fromkeys(arguments.seeds))
    scores: list[Row] = []
    left_out: list[Row] = []
    latencies: list[Row] = []
    for seed in seeds:
        measured: list[str] = []
        for name in names:
            done = setting.folder(name, seed) / "row.json"
            row = kept_row(done, {**training, "variants": variants_of([name])}, partial(score_row, setting, name, seed))
            if "cannot" in row:
                if name == "base":
                    sys.exit(f"the base, seed {seed}, cannot be trained or exported: {row['cannot']}")
                left_out.append(row)
                print(left_out_line(row), file=sys.stderr)
                continue
            scores.append(row)
            measured.append(name)
            print(f"seed {seed}, {name}: {row['miou']:.4f}", file=sys.stderr)
        path = setting.output / f"seed-{seed}" / f"latency-{'+'.join(map(slug, measured))}.json"  # in turns: another set is another row
        made = partial(latency_row, setting, measured, seed)
        latencies.append(kept_row(path, {**timing, "variants": variants_of(measured)}, made, hardware=machine))
    pairs: dict[str, list[Row]] = {}
    seed = seeds[0]
    for name in [row["variant"] for row in scores if row["seed"] == seed]:
        if name != "serial" and VARIANTS[name].gate_budget == 1:
            continue
        first, other = ("base", "serial") if name == "serial" else (name, "base")
        folder, of_pair = setting.output / f"seed-{seed}" / "pairs" / slug(name), {**timing, "variants": variants_of((first, other))}
        pairs[name] = [
            kept_row(folder / f"{slug(way)}.json", of_pair, partial(pair_row, setting, first, other, way, seed), hardware=machine)
            for way in WAYS
        ]
    found = summary(scores, latencies)
    if arguments.json:
        judged = {name: judgements(found, name, rows) for name, rows in pairs.items()}
        document = {"scores": scores, "left_out": left_out, "latencies": latencies, "pairs": pairs, "summary": found, "goals": GOALS}
        print(json.dumps({"benchmark": "ablation", **document, "judged": judged, "notes": notes(latencies)}, indent=1))
        return
    print_summary(found, len(seeds))
    for row in left_out:
        print(left_out_line(row))
    for name, rows in pairs.items():
        if name == "serial":
            print_pair(rows, ("parallel", "serial"), claim_of(name))
        else:
            print_pair(rows, (name, "base"), claim_of(name))
            print(points_lost(Difference(mean=found[name]["points"], error=found[name]["points_error"])))
    for line in notes(latencies):
        print(f"note: {line}")
    print_machines(scores + latencies + [row for rows in pairs.values() for row in rows])


if __name__ == "__main__":
    main()
