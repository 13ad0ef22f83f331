"""Measure the share of the machine's ceilings that the presets reach in BF16 and in INT8, as a whole and by kind of layer.

    python benchmarks/roofline.py [--presets hybrid-xxs hybrid-xs hybrid-s hybrid-m] [--sides 512 1024] [--threads N] [--rounds 40]
                                  [--output runs/benchmark-roofline] [--json]

Each preset is trained for 30 steps (speed does not depend on the weights' values, but an artefact of a random network is refused: its
labels depend on rounding) and exported twice: in floats, norms and gates folded, run in FP32 and where the CPU has it in BF16; and in W4A8
without training, attention products in 8 bits too. Goals: half of the ceiling for the whole network, in BF16 and in INT8, and INT8 at
least 1.3 times as fast as the same network's BF16. There are CPUs that have BF16 and multiply more slowly in it than in FP32: the ratio
to FP32 stands beside it.

A row is a preset at a size, and in one go: the ceilings (`muntin.runtime.profiling.ceilings`, what `muntin doctor` measures), the latency
of the three in turns, a profile of BF16 and of INT8, all with the same number of threads.
    GMAC       multiply-adds of the network by PyTorch's counter; of a kind, of the kernels that were executed
    ms, p90    one call on one picture, no counters: median and 90th percentile
    GMAC/s     GMAC over ms; `ceiling` what a large product reaches in this precision, `share` the first over the second
    x FP32     FP32's ms over this one's; x BF16 likewise
Then the kinds, by the engine's own counters (medians; whatever no kernel accounts for is "between kernels"):
    of time    share of the inference with counters on
    of ceiling the time that the multiply-adds would take at the ceiling of the precision that each kernel ran in, over its time
    of roof    the same, where the bytes at the speed of a copy may be what takes longer (more than 100 %: they came from a cache)
Latency includes writing float32 scores, 6 MB at 512 x 512. `others`: CPU time of other processes meanwhile, in cores; a row is valid only
if that is near 0. A row that is there already is not measured again; one of another machine, or of another structure of that name, is
refused. Time on two cores: about a minute a preset to train and export, then half a minute a row. Run it alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kept import Row, kept_row
from muntin.compression import load_model
from muntin.deployment import image_macs
from muntin.models import PRESETS
from muntin.runtime import describe_hardware, load
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.ceilings import measure_ceilings
from muntin.runtime.profiling.contention import watch_cpu
from muntin.runtime.profiling.kernels import BETWEEN, COPIES, Ceilings, Kernel, macs_ms
from muntin.runtime.profiling.profile import Profile, fill, profile
from muntin.runtime.profiling.timing import interleaved_latency
from resumed import demo_recipe, float_artifact, integer_artifact, network_of, print_machines, trained

STEPS = 30
GOALS = {"share": 0.5, "i8_over_bf16": 1.3}
LINEAR = "1 x 1 and linear"
CONVOLUTIONS = frozenset({"Convolution", "GroupConvolution"})
RESIZE = frozenset({"Interpolate", "DepthToSpace"})
MISCOUNTED = 0.01
"""Largest deviation of the executed kernels' multiply-adds from the network's, as a share; beyond it a line says so."""


def kind_of(kernel: Kernel) -> str:
    """A kernel's kind; of a product by what its second operand is: a kernel, a matrix of weights, another activation."""
    if not kernel.macs:
        if kernel.kind in RESIZE or (kernel.kind == "Transpose" and kernel.group == COPIES):  # which is channels that become pixels
            return "resize"
        return "split, join, pad" if kernel.group == COPIES else kernel.group
    weight = kernel.inputs[1]
    if kernel.kind in CONVOLUTIONS:
        if len(weight.shape) == 5:  # (groups, outputs, inputs, rows, columns): the presets group by single channels or not at all
            return "depthwise"
        rows, columns = weight.shape[-2:]
        return LINEAR if rows == columns == 1 else f"convolution {rows} x {columns}"
    return LINEAR if weight.source is None else "attention products"


def kind_rows(profiled: Profile) -> list[dict[str, Any]]:
    """Kernels by kind and precision, longest first; a precision matters where there are multiply-adds."""
    found: dict[tuple[str, str | None], list[Kernel]] = {}
    for kernel in profiled.kernels:
        found.setdefault((kind_of(kernel), kernel.precision if kernel.macs else None), []).append(kernel)
    rows: list[dict[str, Any]] = []
    for (kind, precision), kernels in found.items():
        macs, ms = sum(kernel.macs for kernel in kernels), sum(kernel.ms for kernel in kernels)
        least = macs_ms(macs, precision, profiled.ceilings) if precision else None
        attainable = [kernel.attainable_ms(profiled.ceilings) for kernel in kernels]
        roof = None if None in attainable else sum(value or 0.0 for value in attainable)
        shares = {"of_ceiling": least / ms if least and ms else None, "of_roof": roof / ms if roof is not None and ms else None}
        rows.append({"kind": kind, "precision": precision, "kernels": len(kernels), "gmac": macs / 1e9, "ms": ms, **shares})
    between = max(0.0, profiled.profiled_ms - profiled.kernels_ms)
    rows.append({"kind": BETWEEN, "precision": None, "kernels": 0, "gmac": 0.0, "ms": between, "of_ceiling": None, "of_roof": None})
    return sorted(({**row, "of_time": row["ms"] / profiled.profiled_ms} for row in rows), key=lambda row: -row["ms"])


def measure(preset: str, side: int, folder: Path, threads: int, rounds: int) -> Row:
    shape = (1, side, side)
    checkpoint = trained(demo_recipe({"training.steps": STEPS, "model.name": preset}), folder / "trained")
    floats, integers = float_artifact(checkpoint, folder / "float"), integer_artifact(checkpoint, folder / "int8")
    gmac = image_macs(load_model(checkpoint).to("meta"), torch.empty(1, 3, side, side, device="meta")) / 1e9
    images = fill(floats.golden()[0][0], shape)
    with watch_cpu() as watch:
        ceilings: Ceilings = measure_ceilings(threads=threads)
        ways = {name: (floats.path, name) for name in ("f32", "bf16") if name in ceilings.gmacs} | {"i8": (integers.path, "recorded")}
        sessions = {way: load(path, precision=hint, threads=threads, shapes=[shape]) for way, (path, hint) in ways.items()}
        latency = interleaved_latency(sessions, images, rounds=rounds)
        remaining = sessions["i8"].precision
        del sessions  # their memory is not what is profiled
        profiles = {
            way: profile(path, SessionOptions(precision=hint, threads=threads), shape=shape, rounds=rounds, ceilings=ceilings)
            for way, (path, hint) in ways.items()
            if way != "f32" or "bf16" not in ways
        }
    row: Row = {"preset": preset, "side": side, "gmac": gmac, "others": watch.others, "int8_floats_in": remaining, "ways": {}}
    row["ceilings"] = {"gmacs": dict(ceilings.gmacs), "copy_gb_s": ceilings.copy_gb_s}
    for way, found in latency.items():
        rate, ceiling = gmac / found.median_ms * 1e3, ceilings.gmacs.get(way)
        row["ways"][way] = {
            "ms": found.median_ms, "p90_ms": found.p90_ms, "gmac_per_s": rate, "ceiling": ceiling,
            "share": None if ceiling is None else rate / ceiling,
            **{f"over_{other}": latency[other].median_ms / found.median_ms for other in ("f32", "bf16") if other in latency},
        }  # fmt: skip
    for way, profiled in profiles.items():
        executed = sum(kernel.macs for kernel in profiled.kernels) / 1e9
        notes = [*profiled.notes, *_miscounted(executed, gmac)]
        row["ways"][way] |= {"profiled_ms": profiled.profiled_ms, "executed_gmac": executed, "kinds": kind_rows(profiled), "notes": notes}
    return row


def _miscounted(executed: float, gmac: float) -> Iterable[str]:
    if abs(executed - gmac) > MISCOUNTED * gmac:
        yield f"the kernels executed {executed:.3f} GMAC, the network has {gmac:.3f}: the kinds do not add up to the whole"


def judged(row: Row) -> dict[str, bool | None]:
    """Judge each goal; None if this machine has no BF16 to compare with."""
    shares = {way: row["ways"].get(way, {}).get("share") for way in ("bf16", "i8")}
    ratio = row["ways"]["i8"].get("over_bf16")
    return {
        **{f"{way} share": None if share is None else share >= GOALS["share"] for way, share in shares.items()},
        "i8 over bf16": None if ratio is None else ratio >= GOALS["i8_over_bf16"],
    }


def word(met: bool | None) -> str:
    return "not judged" if met is None else "met" if met else "MISSED"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def print_tables(rows: list[Row]) -> None:
    print(f"{'preset':<11}{'side':>6}{'':>6}{'GMAC':>8}{'ms':>9}{'p90':>9}{'GMAC/s':>9}{'ceiling':>9}{'share':>8}", end="")
    print(f"{'x FP32':>8}{'x BF16':>8}{'others':>8}")
    for row in rows:
        others = "–" if row["others"] is None else f"{row['others']:.2f}"
        for way, found in row["ways"].items():
            ceiling = "–" if found["ceiling"] is None else f"{found['ceiling']:.0f}"
            over = "".join(f"{format(found[key], '.2f') if key in found else '–':>8}" for key in ("over_f32", "over_bf16"))
            print(
                f"{row['preset']:<11}{row['side']:>6}{way:>6}{row['gmac']:>8.2f}{found['ms']:>9.2f}{found['p90_ms']:>9.2f}"
                f"{found['gmac_per_s']:>9.0f}{ceiling:>9}{percent(found['share']):>8}{over}{others:>8}"
            )
    print(f"\ngoals: {GOALS['share']:.0%} of the ceiling, INT8 over BF16 {GOALS['i8_over_bf16']:g}")
    for row in rows:
        print(f"  {row['preset']:<11}{row['side']:>6}   " + ", ".join(f"{goal} {word(met)}" for goal, met in judged(row).items()))
    for row in rows:
        for way, found in row["ways"].items():
            if "kinds" in found:
                remaining = f", remaining floats in {row['int8_floats_in']}" if way == "i8" else ""
                print_kinds(f"{row['preset']}, {row['side']} x {row['side']}, {way}{remaining}", found)
    print()
    for row in rows:
        roofs = ", ".join(f"{name} {rate:.0f}" for name, rate in row["ceilings"]["gmacs"].items())
        print(f"ceilings, {row['preset']} {row['side']}: {roofs} GMAC/s, copy {row['ceilings']['copy_gb_s']:.1f} GB/s")


def print_kinds(title: str, found: dict[str, Any]) -> None:
    print(f"\n{title}: {found['profiled_ms']:.2f} ms with counters on")
    print(f"  {'kind':<28}{'runs in':>8}{'kernels':>9}{'GMAC':>9}{'ms':>9}{'of time':>9}{'of ceiling':>12}{'of roof':>9}")
    for kind in found["kinds"]:
        gmac = f"{kind['gmac']:.3f}" if kind["gmac"] else ""
        print(
            f"  {kind['kind']:<28}{kind['precision'] or '':>8}{kind['kernels'] or '':>9}{gmac:>9}{kind['ms']:>9.2f}{kind['of_time']:>9.1%}"
            f"{percent(kind['of_ceiling']):>12}{percent(kind['of_roof']):>9}"
        )
    for note in found["notes"]:
        print(f"  note: {note}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [name for name in PRESETS if name.startswith("hybrid-")]
    parser.add_argument("--presets", nargs="+", choices=known, default=known)
    parser.add_argument("--sides", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--threads", type=int, default=physical_cores(), help="of the engine; the usable physical cores unless given")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls, and profiled ones")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-roofline"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    arguments = parser.parse_args()
    settings = {"threads": arguments.threads, "rounds": arguments.rounds}
    machine = describe_hardware()
    rows: list[Row] = []
    for preset in arguments.presets:
        folder = arguments.output / preset
        for side in arguments.sides:
            measured = partial(measure, preset, side, folder, **settings)
            rows.append(kept_row(folder / f"{side}.json", {**settings, **network_of(preset)}, measured, hardware=machine))
    if arguments.json:
        judgements = [{"preset": row["preset"], "side": row["side"], "met": judged(row)} for row in rows]
        print(json.dumps({"benchmark": "roofline", "rows": rows, "goals": GOALS, "judged": judgements}, indent=1))
    else:
        print_tables(rows)
        print_machines(rows)


if __name__ == "__main__":
    main()
