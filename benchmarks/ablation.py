"""Measure the value of each part of a hybrid: the network without it, or with another choice, trained in the same way and deployed.

    python benchmarks/ablation.py [--model hybrid-s] [--seeds 0 1 2] [--steps 700] [--precision bf16] [--variants serial ...]

Each variant is the preset with one change (VARIANTS), trained by the demonstration's recipe for the same steps on the same crops, seed by
seed. Variants without an option of the configuration are factories of this module. `convolutions` has two 3 x 3 convolutions of about as
many multiply-adds in place of a block; `one-step decoder` brings all maps to the finest by one bilinear step; with a `gate budget`, gates
close while the network trains, until the open gated channels have that share of their multiply-adds, and closed channels are cut out.
Then parallel blocks are compared with serial ones, and cut networks with the base, in five ways of running: medians of five passes, both
networks in turns. A variant that cannot be trained or exported is left out; without the base there is no comparison. Time on two cores:
three to five minutes a variant and seed (windows of 32 several times that), two minutes a seed of timing, ten for the pairs. Scores do not
suffer from other work; for the timings run it alone.

Axes: B images, C channels, H W map, S windows, T tokens a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, sqrt
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, cast

import torch
from torch import Tensor, nn

import measures
from documents import Column, Document, Goal, Row, Table, columns, grouped, seeds_of, spread
from harness import Benchmark, Options, Run, file_name, main, option, seeds_option
from muntin.artifact import open_artifact
from muntin.compression import load_model, remove_closed_channels
from muntin.deployment import image_macs
from muntin.deployment.counting import parameter_count
from muntin.errors import MuntinError
from muntin.layers import ConvUnit, Grid, ParallelBlock, Perceptron, PixelHead, ProgressiveUpsampler, PyramidFusion, Sum, TokenNorm
from muntin.models import PRESETS, HybridNet, ModelConfig, TorchSession, create_model
from muntin.models.hybridnet import GAIN, AttentionStage
from muntin.runtime import load
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.profiling.contention import watch_cpu
from muntin.runtime.profiling.profile import fill
from muntin.training import Checkpoint
from muntin.training.checkpoint import source_of
from resumed import demo_recipe, float_artifact, integer_artifact, network_of, trained
from segmentation_peers.deployment import precisions

BASES = ("hybrid-xxs", "hybrid-xs", "hybrid-s", "hybrid-m")
"""Presets that can be taken apart."""
SIDE, PASSES = 512, 5
WAYS = ("eager f32", "compile f32", "deployed f32", "deployed bf16", "deployed i8")
"""Ways of running a pair of networks."""
SURE = 2.0
"""Standard errors beyond which a difference counts."""
MOST_LOST = 0.5
"""Goal: points of mIoU."""
CUT = "gate budget 0.25"


VARIANTS: dict[str, Row] = {
    "base": {},
    "local only": {"model.options": {"attention": "local"}},
    "global only": {"model.options": {"attention": "global"}},
    "convolutions": {"model.name": "with_convolutions"},
    "serial": {"model.options": {"block": "serial"}},
    "no gate": {"model.options": {"gate": False}},
    "no depthwise": {"model.name": "without_position"},
    **{f"window {window}": {"model.options": {"window": window}} for window in (4, 8, 16, 32)},
    **{f"latents {latents}": {"model.options": {"latents": latents}} for latents in (8, 16, 32, 64)},
    "LayerNorm": {"model.name": "with_layer_norm"},
    "GELU": {"model.name": "with_gelu"},
    "one-step decoder": {"model.options": {"fusion": "one-step"}},
    "UPerNet head": {"model.name": "with_uper_decoder"},
    **{f"gate budget {share}": {"training.gate_budget": share} for share in (0.5, 0.25)},
}
"""Changes of the recipe; `model.name` is a factory of this module, `training.gate_budget` the share of gated channels to keep."""


@dataclass(frozen=True, kw_only=True)
class AblationOptions(Options):
    model: str = option("hybrid-s", "the base: a preset", choices=BASES)
    seeds: tuple[int, ...] = seeds_option(0, 1, 2)
    steps: int = option(700, "steps of training, the same for all", least=1)
    precision: str = option("fp32", "precision of training, the same for all", choices=("fp32", "bf16"))
    variants: tuple[str, ...] = option(tuple(VARIANTS), "variants besides the base", choices=tuple(VARIANTS), selects=True)
    threads: int = option(physical_cores(), "threads of the timed networks", least=1, selects=True)
    rounds: int = option(20, "timed calls of each variant and seed", least=1, selects=True)


@dataclass(frozen=True, kw_only=True)
class Network:
    """A variant and a seed, trained in `folder` when it is first needed."""

    options: AblationOptions
    folder: Path
    name: str
    seed: int

    @property
    def checkpoint(self) -> Checkpoint:
        changes, preset = dict(VARIANTS[self.name]), self.options.model
        factory = changes.pop("model.name", None)
        name = preset if factory is None else f"ablation:{factory_name(factory, preset)}"
        shared = {"seed": self.seed, "training.steps": self.options.steps, "training.precision": self.options.precision}
        return trained(demo_recipe({**shared, "model.name": name, **changes}), self.folder)

    def model(self) -> nn.Module:
        """The network as it is deployed, but not folded: without the channels that its gates have closed."""
        model = load_model(self.checkpoint)
        remove_closed_channels(model)
        return model

    @property
    def gmac(self) -> float:
        return image_macs(self.model().to("meta"), torch.empty(1, 3, SIDE, SIDE, device="meta")) / 1e9

    @property
    def floats(self) -> Path:
        return float_artifact(self.checkpoint, self.folder / "float").path

    def image(self) -> Any:
        """One image of the timed size, from the artifact's reference outputs."""
        return fill(open_artifact(self.floats).golden_images()[0][0], (1, SIDE, SIDE))

    def open(self, way: str) -> Any:
        (kind, precision), checkpoint, threads = way.split(), self.checkpoint, self.options.threads
        if kind != "deployed":
            torch.set_num_threads(threads)
            return TorchSession(self.model(), checkpoint.recipe.signature(source_of(checkpoint).classes), compile=kind == "compile")
        integers = precision == "i8"
        path = integer_artifact(checkpoint, self.folder / "int8").path if integers else self.floats
        return load(path, precision="recorded" if integers else precision, threads=threads, shapes=[(1, SIDE, SIDE)])


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """The row with what is measured, or with the reason why it cannot be."""
    try:
        return row | measure()
    except (MuntinError, RuntimeError, ValueError) as error:  # what muntin, PyTorch and OpenVINO raise; other variants go on
        return row | {"cannot": " ".join(str(error).split())[:200]}


def score(network: Network) -> Row:
    checkpoint, model = network.checkpoint, network.model()
    session = load(network.floats, precision="f32", threads=network.options.threads)
    return {
        "miou": measures.score(checkpoint, session),
        "gmac": network.gmac,
        "parameters": parameter_count(model),
        "train_s": checkpoint.state.seconds,
    }


def latencies(networks: Sequence[Network], options: AblationOptions) -> Row:
    """Medians of all variants of a seed, the base first, timed in turns in one process; of a variant by its precision."""
    sessions = {f"{each.name}|{precision}": each.open(f"deployed {precision}") for each in networks for precision in precisions()}
    with watch_cpu() as watch:
        timed = measures.ms_in_turns(sessions, networks[0].image(), options.rounds)
    ms: Row = {network.name: {precision: timed[f"{network.name}|{precision}"] for precision in precisions()} for network in networks}
    timing = {"threads": options.threads, "rounds": options.rounds}
    return {"part": "latency", "seed": networks[0].seed, **timing, "ms": ms, "others": watch.others}


def gain(first: Network, other: Network, way: str) -> Row:
    """Time of the second network over that of the first one, in one way of running them, in turns."""
    torch._dynamo.reset()  # earlier networks of this process count against the limit of compilations
    sessions, images = {network.name: network.open(way) for network in (first, other)}, first.image()
    with watch_cpu() as watch:
        passes = [measures.ms_in_turns(sessions, images, first.options.rounds) for _ in range(PASSES)]
    ratios = [ms[other.name] / ms[first.name] for ms in passes]
    ms = [median(each[network.name] for each in passes) for network in (first, other)]
    gmac = [first.gmac, other.gmac]
    return {"gmac": gmac, "ms": ms, "gain": median(ratios), "range": [min(ratios), max(ratios)], "others": watch.others}


def rows(run: Run) -> Iterator[Row]:
    options: AblationOptions = run.options
    config, recipe = ModelConfig(**PRESETS[options.model]), demo_recipe({})
    data, training = (section.model_dump(mode="json") for section in (recipe.data, recipe.training))
    shared = {**network_of(options.model), "gain": GAIN, "data": data, "training": training}
    timing = {"threads": options.threads, "rounds": options.rounds}
    names = ["base"]  # then the variants that change this preset
    for name in dict.fromkeys(options.variants):
        changes = VARIANTS[name].get("model.options", {})
        if name != "base" and (not changes or any(getattr(config, key) != value for key, value in changes.items())):
            names.append(name)

    def variants(names: Iterable[str]) -> Row:
        return {**shared, "variants": {name: VARIANTS[name] for name in names}}

    seeds, networks = list(dict.fromkeys(options.seeds)), dict[int, dict[str, Network]]()
    for seed in seeds:
        measured = networks[seed] = {}
        for name in names:
            network = Network(options=options, folder=run.folder / f"seed-{seed}" / file_name(name), name=name, seed=seed)
            row: Row = {"part": "score", "variant": name, "seed": seed}
            row = run.row(f"seed-{seed}/{name}/row", partial(attempt, row, partial(score, network)), **variants([name]))
            if "cannot" not in row:
                measured[name] = network
            elif name == "base":
                raise SystemExit(f"the base, seed {seed}, cannot be trained or exported: {row['cannot']}")
            yield row
        make = partial(latencies, list(measured.values()), options)
        yield run.row(f"seed-{seed}/latency-{'+'.join(measured)}", make, **timing, **variants(measured))  # others need another row
    first = networks[seeds[0]]
    for name in (name for name in first if name == "serial" or name.startswith("gate budget")):
        pair = [first["base"], first[name]] if name == "serial" else [first[name], first["base"]]
        both = [network.name for network in pair]
        for way in WAYS:
            row = {"part": "pair", "variant": both[0], "other": both[1], "way": way, "seed": seeds[0], **timing}
            make = partial(attempt, row, partial(gain, *pair, way))
            yield run.row(f"seed-{seeds[0]}/pairs/{name}/{way}", make, **timing, **variants(both))


# Variants that the configuration has no option for. A recipe names one for each preset: `ablation:with_gelu_hybrid_xs`


class LayerNorm(nn.Module):
    """Normalises each token over its channels: the statistics depend on the image, so nothing folds away."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, t_STC: Tensor, grid: Grid) -> Tensor:
        out: Tensor = self.norm(t_STC)
        return out


class GeluPerceptron(Perceptron):
    """GELU for ReLU. The gate behind it does not fold into the layer before, because GELU is not linear in a scale."""

    def __init__(self, like: Perceptron) -> None:
        nn.Module.__init__(self)
        self.expand, self.gate, self.reduce = like.expand, like.gate, like.reduce
        self.activation = cast(nn.ReLU, nn.GELU())


class ConvolutionBlock(nn.Module):
    """x + conv(conv(x)), 3 x 3, `hidden` channels in between, then ReLU: `(B, C, H, W)` to the same shape."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first, self.second = ConvUnit(channels, hidden), ConvUnit(hidden, channels, activation=False)
        self.sum, self.activation = Sum(), nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.activation(self.sum(x_BCHW, self.second(self.first(x_BCHW))))
        return out


def _blocks(model: HybridNet) -> list[ParallelBlock]:
    return [module for module in model.modules() if isinstance(module, ParallelBlock)]


def without_position(model: HybridNet) -> None:
    """No depthwise convolution before the blocks: tokens do not know their positions."""
    for stage in model.stages:
        stage.position = nn.Identity()


def with_convolutions(model: HybridNet) -> None:
    """Blocks of as many multiply-adds; they know positions, so no `PositionUnit` either."""
    config = model.config
    for number, stage in enumerate(cast("list[AttentionStage]", list(model.stages))):
        dim = config.dims[number]
        local = dim - dim // config.head_dim // 2 * config.head_dim
        global_heads = (dim - local) // config.head_dim
        projections = dim * (3 * local + (dim - local) + 2 * global_heads * config.latents) + dim**2
        products = 2 * config.window**2 * local + 2 * config.latents * (dim - local)
        hidden = round((projections + products + 2 * config.mlp_ratio * dim**2) / (18 * dim) / 16) * 16
        model.stages[number] = nn.Sequential(stage.reduce, *(ConvolutionBlock(dim, hidden) for _ in stage.blocks))


def with_layer_norm(model: HybridNet) -> None:
    """LayerNorm in the blocks; the convolutions keep their norms."""
    for block in _blocks(model):
        block.norm = cast(TokenNorm, LayerNorm(block.norm.dim))


def with_gelu(model: HybridNet) -> None:
    """GELU in the blocks' MLPs; the convolutions keep ReLU."""
    for block in _blocks(model):
        block.mlp = GeluPerceptron(block.mlp)


def with_uper_decoder(model: HybridNet) -> None:
    """A head like UPerNet's, half as wide, which has about as many multiply-adds; the last step to the pixel stays."""
    config = model.config
    maps = [lateral.conv.in_channels for lateral in cast("list[ConvUnit]", list(model.decoder.lateral))]
    model.decoder = cast(ProgressiveUpsampler, PyramidFusion(maps, config.decoder // 2))
    model.head = PixelHead(config.decoder // 2, config.outputs, config.finest * config.scale, GAIN)


def factory_name(kind: str, preset: str) -> str:
    return f"{kind}_{preset.replace('-', '_')}"


def _changed(preset: str, change: Any, **arguments: Any) -> nn.Module:
    model = cast(HybridNet, create_model(preset, **arguments))
    change(model)
    return model


for _change in (without_position, with_convolutions, with_layer_norm, with_gelu, with_uper_decoder):
    for _preset in BASES:
        globals()[factory_name(_change.__name__, _preset)] = partial(_changed, _preset, _change)


# What the rows say


def error(values: Sequence[float]) -> float:
    """The standard error of a mean, infinite for one value."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else inf


def sign(values: Sequence[float]) -> int:
    """1 or -1 if the mean differs from 0 by more than SURE standard errors, otherwise 0."""
    return 0 if abs(fmean(values)) <= SURE * error(values) else 1 if fmean(values) > 0 else -1


def shown(values: Sequence[float], form: str = ".1f") -> str:
    return f"{fmean(values):+{form}}" + (f" ± {error(values):{form}}" if len(values) > 1 else "")


def verdict(points: Sequence[float], slower: Sequence[float]) -> str:
    """The verdict on the preset's choice: the score decides; if it shows no difference, speed decides."""
    if len(points) < 2:
        return "one seed: none"
    if sign(points):
        return "earns its place" if sign(points) < 0 else "costs score"
    return ("not told apart", "earns its place by speed", "slower, no better")[sign(slower)]


def summary(rows: list[Row]) -> list[Row]:
    """A row for each variant, the base first; `points` and `slower` are differences to the base, seed by seed. `shown`: as text."""
    latencies = {row["seed"]: row for row in rows if row["part"] == "latency"}
    scores = grouped((row for row in rows if row["part"] == "score"), "variant")
    of_base = [row["ms"]["base"] for row in latencies.values()]
    fastest = min(of_base[0], key=lambda precision: fmean(ms[precision] for ms in of_base))
    base = {row["seed"]: row["miou"] for row in scores["base",]}
    found: list[Row] = []
    for (name,), mine in scores.items():
        timed = [latencies[row["seed"]] for row in mine]
        row = {"variant": name, "gmac": mine[0]["gmac"], "millions": mine[0]["parameters"] / 1e6}
        row["miou"] = spread([each["miou"] for each in mine])
        row["ms"] = {precision: fmean(each["ms"][name][precision] for each in timed) for precision in of_base[0]}
        row["others"] = max((each["others"] for each in timed if each["others"] is not None), default=None)
        if name != "base":
            points = [100 * (each["miou"] - base[each["seed"]]) for each in mine]
            slower = [100 * (each["ms"][name][fastest] / each["ms"]["base"][fastest] - 1) for each in timed]
            row |= {"points": points, "slower": slower, "slower_in": fastest, "verdict": verdict(points, slower)}
            row["shown"] = {"points": shown(points, ".2f"), "slower": shown(slower)}
        found.append(row)
    return found + [{**row, "cannot": f"seed {row['seed']}: {row['cannot']}"} for row in rows if row["part"] == "score" and "cannot" in row]


def pairs(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["part"] == "pair"]


def shown_pairs(rows: list[Row]) -> Iterator[Row]:
    for row in pairs(rows):
        texts = {key: " and ".join(f"{value:.2f}" for value in row[key]) for key in ("gmac", "ms", "range") if key in row}
        yield {**row, **texts}


def gains(serial: bool) -> Callable[[Document], dict[str, float | None]]:
    def values(document: Document) -> dict[str, float | None]:
        mine = [row for row in pairs(document.rows) if (row["other"] == "serial") is serial]
        return {f"{row['variant']} {row['way']}": row.get("gain") for row in mine}

    return values


def points_lost(document: Document) -> dict[str, float | None]:
    """Points that closed channels cost, plus twice the standard error. One seed can miss the goal, but not meet it."""
    lost: dict[str, float | None] = {}
    for row in summary(document.rows):
        if "points" in row and row["variant"].startswith("gate budget"):
            mean, sure = -fmean(row["points"]), SURE * error(row["points"])
            lost[row["variant"]] = mean + sure if sure < inf else mean if mean > MOST_LOST else None
    return lost


def all_columns(document: Document) -> tuple[Column, ...]:
    ms = ", ".join(f"ms {precision}=ms.{precision}:.2f" for precision in summary(document.rows)[0]["ms"])
    differences = f"points=shown.points, {ms}, slower %=shown.slower, in=slower_in, verdict, others:.2f"
    return columns(f"variant, GMAC=gmac:.2f, M=millions:.2f, mIoU=miou, {differences}")


def setting(document: Document) -> str:
    names = [row["variant"] for row in summary(document.rows)[1:]]
    names = names if len(names) <= 2 else [f"{len(names)} variants"]
    return f"{document.settings['model']}, {document.settings['steps']} steps in {document.settings['precision']}: {', '.join(names)}"


def difference(row: Row) -> str:
    return f"{shown(row['points'])} points and {fmean(row['slower']):+.0f} % of time"


def newest(document: Document) -> str:
    """The largest differences."""
    found = sorted((row for row in summary(document.rows) if "points" in row), key=lambda row: -abs(fmean(row["points"])))
    return "against the preset: " + "; ".join(f"{row['variant']} {difference(row)}" for row in found[:4])


def of(documents: list[Document], model: str, name: str) -> tuple[Row, dict[str, float]]:
    """The summary of a preset's variant in the newest document that has it, with the base's ms, and its gains by the way of running."""
    for document in reversed(documents):
        for row in summary(document.rows) if document.settings["model"] == model else ():
            if row["variant"] == name:
                gains = {pair["way"]: pair["gain"] for pair in pairs(document.rows) if pair["variant"] == name and "gain" in pair}
                return {**row, "base_ms": summary(document.rows)[0]["ms"]}, gains
    raise LookupError(f"no document of {model} has {name}")


def between(values: Iterable[float]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]:.2f} to {ordered[-1]:.2f}"


def windows(documents: list[Document]) -> str:
    (large, _), (small, _) = (of(documents, "hybrid-xxs", f"window {side}") for side in (32, 4))
    ms, base = (large[key][large["slower_in"]] for key in ("ms", "base_ms"))
    narrow = f"windows of 4 at stride 16, the smallest measured, {shown(small['points'])} points"
    return f"{ms:.1f} for {base:.1f} ms and {shown(large['points'])} points; {narrow}"


def parallel(documents: list[Document]) -> str:
    found = [row for each in documents for row in pairs(each.rows) if row["other"] == "serial" and "gain" in row]
    return f"{between(row['gain'] for row in found)} times as fast as serial ones, in {len({row['way'] for row in found})} ways of running"


def gates(documents: list[Document]) -> str:
    (row, gains), (_, small) = (of(documents, model, CUT) for model in ("hybrid-s", "hybrid-xxs"))
    eager, compiled, f32, bf16, i8 = (f"{gains[way]:.2f}" for way in WAYS)
    fast = f"{eager} times as fast in eager PyTorch, {f32} and {bf16} deployed in FP32 and BF16, {compiled} compiled, {i8} in INT8"
    return f"hybrid-s with gates closed to a quarter: {fast}; {shown(row['points'])} points. hybrid-xxs: {between(small.values())}"


def decoders(documents: list[Document]) -> str:
    step, head = (difference(of(documents, "hybrid-xs", name)[0]) for name in ("one-step decoder", "UPerNet head"))
    return f"one bilinear step {step}; a UPerNet-like head {head}"


def attention(documents: list[Document]) -> str:
    xs, xxs = (shown([-value for value in of(documents, f"hybrid-{size}", "convolutions")[0]["points"]]) for size in ("xs", "xxs"))
    return f"Attention brings {xs} points in `hybrid-xs` and {xxs} in `hybrid-xxs`"


BENCHMARK = Benchmark(
    name="ablation", options=AblationOptions, measure=rows, newest=newest, n=seeds_of,
    about="""One change at a time, on `earth`. GMAC and ms are at 512 x 512 (float networks with folded norms and gates; all variants of a
seed in turns), mIoU is of the test split, the FP32 model deployed (± standard deviation over seeds). *Points* and *slower* are differences
to the base, seed by seed, ± standard error; *slower* is in the precision that is faster here. *Verdict* is on the preset's choice: a
difference counts if it is more than twice its standard error; the score decides, and if it shows no difference, speed does. Three seeds
make a weak test (by chance alone one difference in five passes it), and a preset that is changed because of it has an optimistic score.

In the pairs *gain* is the other network's time over the first one's. Goals: parallel blocks 1.3 times as fast as serial ones; networks with
closed channels cut out 1.3 times as fast as the base, at half a point lost or less, also with twice the standard error.""",
    variant=setting,
    tables=(
        Table(columns=all_columns, rows=summary),
        Table(
            title="Pairs",
            columns=columns("variant, other, way, seed, GMAC=gmac, ms, gain:.2f, passes between=range, others:.2f"),
            rows=shown_pairs,
        ),
    ),
    goals=(
        Goal(name="parallel over serial blocks", values=gains(serial=True), at_least=1.3, form="{:.2f}"),
        Goal(name="cut over uncut", values=gains(serial=False), at_least=1.3, form="{:.2f}"),
        Goal(name="points lost by cutting, plus twice the standard error", values=points_lost, at_most=MOST_LOST, form="{:.2f}"),
    ),
    blocks={"M1": windows, "M3": parallel, "M4": gates, "M5": decoders, "limits": attention},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
