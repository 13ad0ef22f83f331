"""Export models of timm, torchvision, segmentation_models_pytorch and transformers, and compare each artifact with PyTorch.

    python benchmarks/architectures.py [--only mobilenet vit ...] [--limit 600] [--nncf-python PATH]

The list is architectures.txt, one model a line. Weights are random, as nothing is downloaded, but batch norms have the statistics of real
images, and scales of zero, which switch residual branches off, have others. Each model is quantised with 24 crops of the Earth's
photographs and maps at its own size, by the defaults of `muntin.export`; models with named tensors go through `muntin.export_onnx`. Each
runs in a process of its own, so that a crash is a row. Time on two cores: half a minute to two minutes a model. Needs `pip install
'.[bench]' 'transformers>=5,<6'`.
"""

from __future__ import annotations

import math
import os
import signal
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from architecture_sweep.measure import AGREES_DB, measure
from documents import Document, Goal, Row, Table, columns
from harness import Benchmark, Options, Run, apart, main, option
from quantizer_peers.artifacts import WAITING

LIST = Path(__file__).with_name("architectures.txt")
NOISY_DB = 20.0
"""Signal over noise of PyTorch with a grey level of noise, below which a model is noisy."""
OUTCOMES = ("agrees", "noisy", "differs", "unverified", "refused", "failed", "crashed", "too long", "missing")


def read_list(path: Path = LIST, patterns: Iterable[str] = ()) -> dict[str, int | None]:
    """Sources of models, and the sides of their images in pixels (None: the package's), of those that contain one of the patterns.

    Ends the program for a damaged line, and for a pattern without a model."""
    models: dict[str, int | None] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        source, *size = line.split()
        if ":" not in source or len(size) > 1 or not all(text.isdecimal() for text in size):
            raise SystemExit(f"{path}, line {number}: '{line}' is no model: give a source and, if needed, the side of its images")
        if source in models:
            raise SystemExit(f"{path}, line {number}: {source} is there twice")
        models[source] = int(size[0]) if size else None
    if missing := [pattern for pattern in patterns if not any(pattern in source for source in models)]:
        raise SystemExit(f"--only {missing[0]}: no model of the list has this in its name")
    return {source: size for source, size in models.items() if not patterns or any(pattern in source for pattern in patterns)}


def measure_here(source: str, size: int | None, nncf_python: str | None) -> Row:
    """Measure one model in this process. What packages print goes to stderr."""
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with tempfile.TemporaryDirectory() as folder:
        return measure(source, size, Path(folder), nncf_python)


def measure_apart(source: str, size: int | None, nncf_python: str | None, limit: int) -> Row:
    row = apart(measure_here, source, size, nncf_python, limit_s=limit)
    if "outcome" not in row:  # its process ended without a row
        row["outcome"] = "too long" if row["cannot"].startswith("not within") else "crashed"
    elif row["outcome"] == "exported" and not row["verified"]:
        row["outcome"] = "unverified"
    elif row["outcome"] == "exported":
        row["outcome"] = "agrees" if row["db"] >= AGREES_DB else "noisy" if row.get("noise_db", math.inf) < NOISY_DB else "differs"
    return row


@dataclass(frozen=True, kw_only=True)
class ArchitecturesOptions(Options):
    only: tuple[str, ...] = option((), "models of the list whose name contains one of these texts", selects=True)
    limit: int = option(600, "seconds a model may take", least=10, selects=True)
    nncf_python: str | None = option(None, "interpreter with NNCF, which quantises the models that do not agree", selects=True)


def rows(run: Run) -> Iterator[Row]:
    models = read_list(patterns=run.options.only)
    os.environ.update(WAITING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the process of the model is ended, too
    for source, size in models.items():
        make = partial(measure_apart, source, size, run.options.nncf_python, run.options.limit)
        yield {"model": source, **run.row(source.replace(":", "-"), make, source=source, size=size)}


# Pages


def shown(found: list[Row]) -> Iterator[Row]:
    """Rows with the texts of some columns."""
    for row in found:
        if "coverage" in row:
            mark = "*" if any("is not counted" in note for note in row["notes"]) else ""
            labels = f"cos {row['cosine']:.4f}" if "cosine" in row else f"{row['labels']:.0%} ({row['labels_centred']:.0%})"
            phases = "/".join(f"{row['seconds'].get(phase, 0):.0f}" for phase in ("capture", "quantise", "check"))
            sizes = "named tensors" if row["task"] == "tensors" else row["sizes"]
            texts = {"int8": f"{row['coverage']:.1%}{mark}", "equal": labels, "phases": phases, "sizes": sizes}
            row = {**row, **texts, "share": row["bytes"] / row["bytes_fp32"]}
        yield row


def exported(document: Document) -> list[Row]:
    return [row for row in document.rows if "coverage" in row]


def share(document: Document, key: str, value: object) -> float:
    return sum(row.get(key) == value for row in document.rows) / len(document.rows)


def ahead_of_nncf(document: Document) -> float | None:
    """The smallest lead over NNCF, dB, of models that do not agree."""
    return min((row["db"] - row["nncf"]["db"] for row in exported(document) if "db" in row.get("nncf", {})), default=None)


def in_integers(document: Document) -> str:
    shares = [100 * row["coverage"] for row in exported(document)]
    return f"{min(shares):.0f} to {max(shares):.0f} % of the multiply-adds in INT8"


def newest(document: Document) -> str:
    counts, seconds = Counter(row["outcome"] for row in document.rows), [row["seconds"]["export"] for row in exported(document)]
    told = ", ".join(f"{outcome} {counts[outcome]}" for outcome in OUTCOMES if counts[outcome])
    medians = f"{statistics.median(seconds):.0f} s in the median, up to {max(seconds):.0f} s"
    return f"{len(document.rows)} models: {told}; {in_integers(document)}; exports take {medians}"


def claims(documents: list[Document]) -> str:
    newest, agree = documents[-1], 100 * share(documents[-1], "outcome", "agrees")
    told = "all" if share(newest, "verified", True) == 1 else sum(row.get("verified", False) for row in newest.rows)
    parts = f"{len(newest.rows)} models of four packages: {told} exported and verified, {in_integers(newest)}"
    return f"{parts}; {agree:.0f} % of them agree by 10 dB (random weights; goal 95)"


def limits(documents: list[Document]) -> str:
    count, agree = len(documents[-1].rows), sum(row["outcome"] == "agrees" for row in documents[-1].rows)
    return f"of {count} architectures with random weights {agree} agree with their floats by 10 dB in INT8"


BENCHMARK = Benchmark(
    name="architectures", options=ArchitecturesOptions, measure=rows, newest=newest,
    about="""24 images for calibration, 32 others for the comparison with PyTorch in FP32. *agrees*: at least 10 dB. *noisy*: less, and one
grey level of noise in the images leaves less than 20 dB in PyTorch, too, as in some networks without training. *differs*: less, without
that. *unverified*: `muntin.verify` found a problem. INT8: share of the multiply-adds on integer kernels of OpenVINO (\\*: without Einsum,
LSTM and the like, which muntin does not count). dB: signal over noise of the scores without their mean over the images; f32: with float
layers in f32; noise: of PyTorch with a grey level of noise; NNCF: of its artifact by its defaults, for models that do not agree. Labels:
equal ones, in brackets without that mean; cos: smallest cosine. Bytes: over the FP32 weights. c/q/c: capture, quantisation, comparison,
parts of the export.""",
    tables=(
        Table(
            columns=columns(
                "model, outcome, INT8=int8, dB=db:.1f, f32=db_f32:.0f, noise=noise_db:.0f, NNCF=nncf.db:.1f, labels=equal, "
                "bytes=share:.0%, export (s)=seconds.export:.0f, c/q/c=phases, sizes, precision"
            ),
            rows=shown,
        ),
    ),
    goals=(
        Goal(name="models that agree by 10 dB", values=lambda document: share(document, "outcome", "agrees"), at_least=0.95, form="{:.0%}"),
        Goal(name="models exported and verified", values=lambda document: share(document, "verified", True), at_least=1.0, form="{:.1%}"),
        Goal(name="smallest lead over NNCF below 10 dB, dB", values=ahead_of_nncf, at_least=0.0, form="{:.1f}"),
    ),
    blocks={"M13": claims, "limits": limits},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
