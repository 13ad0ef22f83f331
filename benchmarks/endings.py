"""Compare two forms of a segmenter's last step in OpenVINO: as the exporter writes it, and as `muntin.load` opens the same artifact.

    python benchmarks/endings.py [--presets hybrid-xxs hybrid-xs hybrid-s hybrid-m] [--sides 512 1024]

A hybrid's last step shuffles channels to pixels. OpenVINO reorders the channels first: two passes over the largest tensor. `muntin.load`
writes scores as one permutation, and for labels chooses the best class before the shuffle, which then moves one byte instead of four for
each class. The baseline is compiled with the same options; for labels, the best class is chosen at its end. The artifacts are those of
roofline.py: presets trained for 30 steps, in floats (run in FP32 and where the CPU has it in BF16) and in W4A8. ms: median of a call on one
image, in turns, mean over two models of each, as the order of opening matters. same: bit for bit on an image of noise. Time on two cores: a
minute a preset to train and export, then half a minute for its rows. Run it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import fmean
from typing import Any

import numpy as np

from crossed import crossed
from documents import Document, Row
from harness import Benchmark, Options, Run, main, option, threads_option
from measures import ms_in_turns, noise
from muntin.artifact import Artifact
from muntin.models import PRESETS
from muntin.runtime import load
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
from resumed import demo_recipe, float_artifact, integer_artifact, network_of, trained
from segmentation_peers.deployment import precisions

ANSWERS = ("scores", "labels")
Predictor = Callable[[Any], Any]


def opened_as_exported(artifact: Artifact, answer: str, shape: tuple[int, ...], precision: str, threads: int) -> Predictor:
    """The exported model in OpenVINO as it is; for labels with its best class found at the end."""
    core, opset = openvino.Core(), openvino.opset13
    model = core.read_model(model=artifact.model_bytes(), weights=b"")
    if answer == "labels":
        scores = model.outputs[0].get_node().input_value(0)
        best = opset.topk(scores, opset.constant(np.int64(1)), 1, "max", "value", "i32", stable=True)
        labels = opset.squeeze(opset.convert(best.output(1), "u8"), opset.constant(np.int64(1)))
        model = openvino.Model([labels], model.get_parameters(), "labels")
    model.reshape(list(shape))
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return lambda images_BHWC: request.infer([images_BHWC], share_inputs=True, share_outputs=True)[0]


def opened_by_muntin(artifact: Artifact, answer: str, shape: tuple[int, ...], precision: str, threads: int) -> Predictor:
    session = load(artifact.path, precision=precision, threads=threads, shapes=(), cache=False)
    session.warm_up([shape[:3]], labels=answer == "labels")
    return session if answer == "scores" else session.labels


def measure(artifact: Artifact, precision: str, answer: str, side: int, threads: int, rounds: int) -> Row:
    image = noise(side, artifact.manifest.signature.channels)
    makers = {"exported": opened_as_exported, "muntin": opened_by_muntin}
    with signal_stack_kept():
        order = ("exported", "muntin", "muntin", "exported")
        calls = {f"{way} {place}": makers[way](artifact, answer, image.shape, precision, threads) for place, way in enumerate(order)}
        first, second = (calls[name](image).copy() for name in ("exported 0", "muntin 1"))
        medians = ms_in_turns(calls, image, rounds)
        del calls
    exported, muntin = (fmean(ms for name, ms in medians.items() if name.startswith(way)) for way in makers)
    same = bool(np.array_equal(first, second))
    return {"exported_ms": exported, "muntin_ms": muntin, "gain": exported / muntin, "same": same, "medians": medians}


@dataclass(frozen=True, kw_only=True)
class EndingsOptions(Options):
    presets: tuple[str, ...] = option(("hybrid-xxs", "hybrid-xs", "hybrid-s", "hybrid-m"), "networks", choices=list(PRESETS), selects=True)
    sides: tuple[int, ...] = option((512, 1024), "sides of the image, pixels", least=64, selects=True)
    threads: int = threads_option()
    rounds: int = option(20, "timed calls", least=1)


def rows(run: Run) -> Iterator[Row]:
    for preset in run.options.presets:
        folder = run.folder / preset
        checkpoint = trained(demo_recipe({"training.steps": 30, "model.name": preset}), folder / "trained")
        floats, integers = float_artifact(checkpoint, folder / "float"), integer_artifact(checkpoint, folder / "int8")
        ways = [*((name, floats, name) for name in precisions()), ("int8", integers, precisions()[-1])]
        for side, (way, artifact, hint), answer in product(run.options.sides, ways, ANSWERS):
            measured = partial(measure, artifact, hint, answer, side, run.options.threads, run.options.rounds)
            row = run.row(f"{preset}/{way}-{answer}-{side}", measured, **network_of(preset))
            yield {"preset": preset, "side": side, "way": way, "answer": answer, **row}


def cell(row: Row) -> str:
    return f"{row['gain']:.2f} ({row['exported_ms']:.1f}, {row['muntin_ms']:.1f} ms)" + ("" if row["same"] else ", OTHER NUMBERS")


def newest(document: Document) -> str:
    gains = {answer: [row["gain"] for row in document.rows if (row["way"], row["answer"]) == ("int8", answer)] for answer in ANSWERS}
    ranges = ", ".join(f"{answer} {min(values):.2f} to {max(values):.2f}" for answer, values in gains.items())
    same = "the same numbers" if all(row["same"] for row in document.rows) else "**not the same numbers**"
    return f"`muntin.load` over the exported graph in OpenVINO, INT8, times as fast: {ranges}; {same}"


BENCHMARK = Benchmark(
    name="endings", options=EndingsOptions, measure=rows, newest=newest,
    about="""How many times as fast `muntin.load` is as the exported graph that OpenVINO compiles as it is (and the milliseconds of both). A
cell says so where their numbers are not the same, bit for bit.""",
    tables=(crossed("way, answer, side", "preset", cell),),
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
