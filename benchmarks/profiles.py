"""Profile the demonstration's model before and after compression, and check that the kernels' times add up.

    python benchmarks/profiles.py [--run runs/demo] [--output runs/benchmark-profiles] [--picture docs/roofline.svg]

Writes each profile's page, and the rooflines of before and after. Time on two cores: a minute, beyond the demonstration. Run it alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from documents import Column, Document, Goal, Row, Table, columns
from engines import SHAPE, artifacts, demonstration
from harness import Benchmark, Options, Run, main, option
from muntin.reporting import roofline_svg, write_profile
from muntin.runtime.profiling.ceilings import measure_ceilings
from muntin.runtime.profiling.profile import profile
from muntin.runtime.profiling.profile_document import profile_dict

TITLES = {"fp32": "FP32 layers, before", "int8": "plain INT8", "compressed": "compressed, after"}


class ProfilesOptions(Options):
    run: Path = option(Path("runs/demo"), "run of `muntin demo`", selects=True)
    picture: Path | None = option(None, "where to write the rooflines of before and after, an SVG", parse=Path, selects=True)
    rounds: int = option(60, "profiled calls", least=1)


def rows(run: Run) -> Iterator[Row]:
    options = run.options
    demonstration(options.run)
    paths = {name: path for name, (_, path, _) in artifacts(options.run, run.folder / "artifacts").items()}
    ceilings, pages = measure_ceilings(), {}
    for name, path in paths.items():
        page = pages[name] = profile_dict(profile(path, shape=SHAPE, rounds=options.rounds, ceilings=ceilings)) | {"title": TITLES[name]}
        write_profile(run.folder / name, page)
        attainable = sum(kernel["attainable_ms"] or 0.0 for kernel in page["kernels"])
        yield {key: value for key, value in page.items() if key != "kernels"} | {"attainable_ms": attainable}
    if options.picture is not None:
        options.picture.write_text(roofline_svg([pages["fp32"], pages["compressed"]]), encoding="utf-8")


def sums(document: Document) -> dict[str, float]:
    return {row["title"]: row["kernels_ms"] / row["profiled_ms"] for row in document.rows}


BENCHMARK = Benchmark(
    name="profiles",
    options=ProfilesOptions,
    measure=rows,
    about="""One call of the demonstration's model at 512 x 512, the call with the engine's counters on, and the sum of its kernels' times;
in the last column the least time that the machine's ceilings allow, of a call.""",
    newest=lambda document: f"the kernels' times over the profiled call: {', '.join(f'{share:.1%}' for share in sums(document).values())}",
    unrecorded="the kernels' times add up to 98.6 % (float layers), 97.5 % (plain INT8) and 94.9 % (compressed) of the profiled call; one "
    "call takes 24.5, 15.5 and 11.5 ms, of which the ceilings allow 85.8, 79.5 and 63.5 %. 25 November 2026, EPYC, an earlier recipe; the "
    "machine was in a slow phase",
    tables=(
        Table(
            columns=(
                *columns("title, plain ms=whole_ms:.2f, counted=profiled_ms:.2f, kernels=kernels_ms:.2f"),
                Column(title="kernels/counted", value=lambda row: row["kernels_ms"] / row["profiled_ms"], form="{:.1%}"),
                Column(title="counted/plain", value=lambda row: row["profiled_ms"] / row["whole_ms"], form="{:.1%}"),
                Column(title="at the ceilings", value=lambda row: row["attainable_ms"] / row["whole_ms"], form="{:.1%}"),
            ),
        ),
    ),
    goals=(
        Goal(name="kernels' times over the profiled call", values=sums, at_least=0.9, form="{:.1%}"),
        Goal(name="kernels' times over the profiled call", values=sums, at_most=1.1, form="{:.1%}"),
    ),
)

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
