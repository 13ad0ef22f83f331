"""Measure the share of the machine's ceilings that the presets reach in BF16 and in INT8, as a whole and by kind of layer.

    python benchmarks/roofline.py [--presets hybrid-xxs hybrid-xs hybrid-s hybrid-m] [--sides 512 1024]

Each preset is trained for 30 steps and exported in floats (FP32, and where the CPU has it BF16) and in W4A8, attention products in 8 bits
too. A row has in one go the ceilings (what `muntin doctor` measures), latencies in turns, and a profile of BF16 and of INT8. `of ceiling`:
GMAC/s over those of a large product in this precision; `of roof` the same, where copying the bytes may take longer. `others`: CPU time of
other processes in cores, near 0 in a valid row. Time on two cores: a minute a preset, then half a minute a row. Run it alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch

from documents import Column, Document, Goal, Row, Table, columns
from harness import Benchmark, Options, Run, main, option, threads_option
from muntin.compression import load_model
from muntin.deployment import image_macs
from muntin.models import PRESETS
from muntin.runtime import SessionOptions, load
from muntin.runtime.profiling.ceilings import measure_ceilings
from muntin.runtime.profiling.contention import watch_cpu
from muntin.runtime.profiling.kernels import BETWEEN, COPIES, Ceilings, Kernel, macs_ms
from muntin.runtime.profiling.profile import Profile, fill, profile
from muntin.runtime.profiling.timing import interleaved_latency
from resumed import demo_recipe, float_artifact, integer_artifact, network_of, trained

STEPS = 30
PRESET_NAMES = tuple(name for name in PRESETS if name.startswith("hybrid-"))
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
    images = fill(floats.golden_images()[0][0], shape)
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
        notes = list(profiled.notes)
        if abs(executed - gmac) > MISCOUNTED * gmac:
            notes.append(f"the kernels executed {executed:.3f} GMAC, the network has {gmac:.3f}: the kinds do not add up to the whole")
        row["ways"][way] |= {"profiled_ms": profiled.profiled_ms, "executed_gmac": executed, "kinds": kind_rows(profiled), "notes": notes}
    return row


class RooflineOptions(Options):
    presets: tuple[str, ...] = option(PRESET_NAMES, "networks", choices=PRESET_NAMES, selects=True)
    sides: tuple[int, ...] = option((512, 1024), "sides of the image, pixels", least=64, selects=True)
    threads: int = threads_option()
    rounds: int = option(40, "timed calls, and profiled ones", least=1)


def rows(run: Run) -> Iterator[Row]:
    for preset, side in product(run.options.presets, run.options.sides):
        arguments = (preset, side, run.folder / preset, run.options.threads, run.options.rounds)
        yield run.row(f"{preset}/{side}", measure, *arguments, **network_of(preset))


def ways(found: list[Row]) -> Iterator[Row]:
    """A row for each precision of each preset and size."""
    for row in found:
        for way, figures in row["ways"].items():
            yield {**row, "way": way, **figures}


def kinds(found: list[Row]) -> Iterator[Row]:
    """A row for each kind of kernel."""
    for row in ways(found):
        for kind in row.get("kinds", ()):
            yield {"preset": row["preset"], "side": row["side"], "way": row["way"], **kind}


def newest(document: Document) -> str:
    ms = {name: [f"{row['ways']['i8']['ms']:.1f}" for row in document.rows if row["preset"] == name] for name in PRESET_NAMES}
    sides = ", ".join(f"{side}²" for side in dict.fromkeys(row["side"] for row in document.rows))
    return f"INT8 at {sides}: " + "; ".join(f"{name} {', '.join(values)}" for name, values in ms.items() if values) + " ms"


BENCHMARK = Benchmark(
    name="roofline",
    options=RooflineOptions,
    measure=rows,
    about="One image, pixels in, float scores out. Times on these machines change by a fifth to a third between runs.",
    newest=newest,
    tables=(
        Table(
            columns=columns(
                "preset, side, precision=way, GMAC=gmac:.2f, ms:.2f, p90=p90_ms:.2f, GMAC/s=gmac_per_s:.0f, ceiling:.0f, "
                "of ceiling=share:.1%, x FP32=over_f32:.2f, x BF16=over_bf16:.2f, others:.2f"
            ),
            rows=ways,
        ),
        Table(
            title="By kind of layer",
            columns=(
                *columns("preset, side, network=way, kind, runs in=precision, kernels"),
                Column(title="GMAC", value=lambda row: row["gmac"] or None, form="{:.3f}"),
                *columns("ms:.2f, of time=of_time:.1%, of ceiling=of_ceiling:.1%, of roof=of_roof:.1%"),
            ),
            rows=kinds,
            paged=False,
        ),
    ),
    goals=(
        Goal(name="half of the BF16 ceiling", values="ways.bf16.share", case="{preset} {side}²", at_least=0.5, form="{:.0%}"),
        Goal(name="half of the INT8 ceiling", values="ways.i8.share", case="{preset} {side}²", at_least=0.5, form="{:.0%}"),
        Goal(name="INT8 over BF16", values="ways.i8.over_bf16", case="{preset} {side}²", at_least=1.3, form="{:.2f}"),
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
