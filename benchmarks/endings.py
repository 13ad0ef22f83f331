"""Compare two forms of a segmenter's last step in OpenVINO: as the exporter writes it, and as `muntin.load` opens the same artefact.

    python benchmarks/endings.py [--presets hybrid-xxs hybrid-xs hybrid-s hybrid-m] [--sides 512 1024] [--threads N] [--rounds 20]
                                 [--output runs/benchmark-endings] [--json]

A hybrid's channels become pixels at its very end (a pixel shuffle). OpenVINO brings the channels into another order first, and then
shuffles: two passes over the largest tensor. `muntin.load` writes scores as one permutation. For labels it chooses the best class before
the shuffle, which then moves one byte instead of four for each class. The baseline is the exported model, compiled by OpenVINO with the
same options; for labels, the best class is chosen at the end of its graph. The artefacts are roofline.py's: presets trained for 30 steps,
in floats (run in FP32 and where the CPU has it in BF16) and in W4A8. Columns:
    exported, muntin   milliseconds of a call on one image, in turns: medians
    gain               exported / muntin
    same               whether both give the same numbers, bit for bit, on a picture of noise

The order in which two models are opened changes the result by a few per cent, so each is opened twice, in both orders, and the two medians
are averaged.
A row that is there already is not measured again; one of another machine is refused. Time on two cores: a minute a preset to train and
export, then half a minute for its rows. Run it alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kept import Row, kept_row, now
from muntin.artifact import Artifact
from muntin.models import PRESETS
from muntin.runtime import describe_hardware, load
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
from muntin.runtime.profiling.timing import interleaved_latency
from muntin.runtime.session import Session
from options import at_least
from resumed import demo_recipe, float_artifact, integer_artifact, network_of, print_machines, trained

STEPS = 30
ANSWERS = ("scores", "labels")
InputShape = tuple[int, int, int, int]
Predictor = Callable[[NDArray[np.uint8]], NDArray[Any]]


class Exported:
    """The exported model in OpenVINO as it is; `answer` "labels": with its best class found at the end."""

    def __init__(self, artifact: Artifact, answer: str, shape: InputShape, precision: str, threads: int) -> None:
        core = openvino.Core()
        model = core.read_model(model=artifact.model_bytes(), weights=b"")
        if answer == "labels":
            opset = openvino.opset13
            best = opset.topk(
                model.outputs[0].get_node().input_value(0), opset.constant(np.int64(1)), 1, "max", "value", "i32", stable=True
            )
            labels = opset.squeeze(opset.convert(best.output(1), "u8"), opset.constant(np.int64(1)))
            model = openvino.Model([labels], model.get_parameters(), "labels")
        model.reshape(list(shape))
        options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
        self.request = core.compile_model(model, "CPU", options).create_infer_request()

    def __call__(self, images_BHWC: NDArray[np.uint8]) -> NDArray[Any]:
        found = self.request.infer([images_BHWC], share_inputs=True, share_outputs=True)
        answer: NDArray[Any] = found[0]
        return answer


def opened_by_muntin(artifact: Artifact, answer: str, shape: InputShape, precision: str, threads: int) -> Predictor:
    session: Session = load(artifact.path, precision=precision, threads=threads, shapes=(), cache=False)
    session.warm_up([shape[:3]], labels=answer == "labels")
    return session if answer == "scores" else session.labels


def measure(artifact: Artifact, precision: str, answer: str, side: int, threads: int, rounds: int) -> Row:
    shape = (1, side, side, artifact.manifest.signature.channels)
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    makers: dict[str, Callable[..., Predictor]] = {"exported": Exported, "muntin": opened_by_muntin}
    with signal_stack_kept():
        opened: dict[tuple[str, int], Any] = {
            (way, place): makers[way](artifact, answer, shape, precision, threads)
            for place, way in enumerate(("exported", "muntin", "muntin", "exported"))
        }
        first, second = (next(call for (way, _), call in opened.items() if way == name)(image).copy() for name in makers)
        found = interleaved_latency({f"{way} {place}": call for (way, place), call in opened.items()}, image, rounds=rounds)
        del opened
    ms = {name: float(np.mean([one.median_ms for key, one in found.items() if key.startswith(name)])) for name in makers}
    return {
        "exported_ms": ms["exported"], "muntin_ms": ms["muntin"], "gain": ms["exported"] / ms["muntin"],
        "same": bool(np.array_equal(first, second)), "medians": {key: one.median_ms for key, one in found.items()},
    }  # fmt: skip


def rows_of(preset: str, given: argparse.Namespace, hardware: Row) -> Iterable[Row]:
    folder = given.output / preset
    checkpoint = trained(demo_recipe({"training.steps": STEPS, "model.name": preset}), folder / "trained")
    floats, integers = float_artifact(checkpoint, folder / "float"), integer_artifact(checkpoint, folder / "int8")
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    precisions = ("f32", "bf16") if "BF16" in capabilities else ("f32",)
    ways = [*((name, floats, name) for name in precisions), ("int8", integers, precisions[-1])]
    settings = {**network_of(preset), "threads": given.threads, "rounds": given.rounds}
    for side in given.sides:
        for way, artifact, hint in ways:
            for answer in ANSWERS:
                place = folder / f"{way}-{answer}-{side}.json"
                found = kept_row(
                    place,
                    settings,
                    lambda a=artifact, h=hint, k=answer, s=side: measure(a, h, k, s, given.threads, given.rounds),  # type: ignore[misc]
                    hardware=hardware,
                )
                yield {"preset": preset, "side": side, "way": way, "answer": answer, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=["hybrid-xxs", "hybrid-xs", "hybrid-s", "hybrid-m"])
    parser.add_argument("--sides", type=at_least(64), nargs="+", default=[512, 1024], help="of the image, pixels")
    parser.add_argument("--threads", type=at_least(1), default=physical_cores())
    parser.add_argument("--rounds", type=at_least(1), default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-endings"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    given = parser.parse_args()
    hardware = describe_hardware()
    rows = [row for preset in given.presets for row in rows_of(preset, given, hardware)]
    if given.json:
        print(json.dumps({"benchmark": "endings", "hardware": {**hardware, "created": now()}, "rows": rows}, indent=1))
        return
    print(f"{'':<14}{'':>6}  {'':<6}{'':<8}{'exported ms':>12}{'muntin ms':>11}{'gain':>7}  same")
    for row in rows:
        times = f"{row['exported_ms']:>12.2f}{row['muntin_ms']:>11.2f}{row['gain']:>7.2f}"
        print(f"{row['preset']:<14}{row['side']:>5}²  {row['way']:<6}{row['answer']:<8}{times}  {'yes' if row['same'] else 'NO'}")
    print()
    print_machines(rows)


if __name__ == "__main__":
    main()
