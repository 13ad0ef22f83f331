"""Patterns of zeros (2:4, 4:8) against fewer bits and lower ranks at the same bytes, as they are deployed.

    python benchmarks/sparsity.py --packages FOLDER [--only NAME ...] [--forms FORM ...] [--seeds 3] [--steps 150]
                                  [--output runs/benchmark-sparsity] [--json]

Networks: EfficientNet-Lite0, all-MiniLM-L6-v2 and a ResNet that is trained here, judged as in `foreign.py`, whose folder brings the weights
and pictures. Every form is exported, and all figures are the artefact's, in OpenVINO with float layers in FP32.

Forms without training: FP32 and zeros alone (by magnitude, activations, reconstruction), and lower ranks of about as many bytes; W4A8,
zeros on top of it, and fewer bits (2.7 on average take as many bytes as 2:4 of 4; below 4 bits no layer is raised to 8). Forms with
training: the same number of steps of distillation, zeros held or bits learned.
Columns as in `foreign.py`. Then the time of one call in OpenVINO: dense, with zeros, and with zeros and
CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE, all in turns. The option decompresses INT8 weights in products of fully connected layers whose sides
are multiples of 64, on CPUs with AMX; elsewhere it changes nothing, and the table says which CPU it was. No GPU was used: 2:4 has not been
run in TensorRT.
A row that is measured already is not measured again. Run it alone.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

import muntin
from foreign_networks.forms import FORMS, MULTIPLE, Form, Material, embeddings
from foreign_networks.judging import PRECISION, Judge, Makers, file_name, measure, print_table
from foreign_networks.subjects import PRETRAINED, Subject
from foreign_networks.trained import TRAINED
from kept import Row, kept_row, now
from muntin.artifact import write_standalone
from muntin.runtime import describe_hardware
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.profiling.timing import interleaved_latency
from options import at_least
from quantizer_peers.scoring import Call, PlainModel, each

PROTOCOL = 1
"""Version of the rows."""
SUBJECTS = tuple(subject for subject in (*PRETRAINED, *TRAINED) if subject.name in ("efficientnet-lite0", "minilm", "resnet"))
RATE = 0.4
"""Share of zeros from which on OpenVINO keeps weights compressed in the timing."""
FLOATS, INTEGERS = 0.52, 0.67
"""Share of the bytes that 2:4 leaves of the FP32 weights it thins, and of those of 4 bits; the low-rank forms leave as many parameters."""


def _sparse(model: nn.Module, material: Material, *, pattern: str, scores: Any = "reconstruction") -> nn.Module:
    muntin.sparsify(model, material.calibration, pattern=pattern, scores=scores, keep=material.subject.keep)
    return model


def _low_rank(model: nn.Module, material: Material, *, share: float) -> nn.Module:
    """`share`: of the parameters of the layers that 2:4 thins; embeddings and the like stay as they are in both."""
    thinned = _sparse(copy.deepcopy(model), material, pattern="2:4", scores="magnitude")
    left = 1 - 2 * (_zeros(thinned) - _zeros(model)) * (1 - share)
    muntin.low_rank(model, material.calibration, parameters=left, multiple=MULTIPLE, keep=material.subject.keep)
    return model


def _zeros(model: nn.Module) -> float:
    """The share of a model's parameters that are zero."""
    weights = list(model.parameters())
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def _same(model: nn.Module, material: Material) -> nn.Module:
    return model


def _bits(model: nn.Module, material: Material, *, before: Form = _same, bits: float) -> nn.Module:
    model = before(model, material)
    raised: dict[str, Any] = {"min_sqnr_db": 0} if bits < 4 else {}
    muntin.quantize(model, material.calibration, bits=bits, **raised, **embeddings(model))
    return model


def _trained(model: nn.Module, material: Material, *, before: Form = _same, bits: int | None = None) -> nn.Module:
    """A form, distilled; in quantisation-aware training if `bits` are given."""
    teacher = copy.deepcopy(model)
    model = before(model, material)
    if bits is not None:
        if tables := embeddings(model):
            names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Embedding)]
            muntin.quantize(model, material.calibration, only=names, **tables)
        muntin.prepare_qat(model, material.calibration, bits=bits)
    material.distil(model, teacher)
    if bits is not None:
        muntin.freeze(model, material.calibration)
    return model


TWO, FOUR = partial(_sparse, pattern="2:4"), partial(_sparse, pattern="4:8")
SPARSE_FORMS: dict[str, Form | None] = {
    "float": None,
    "2:4 magnitude": partial(_sparse, pattern="2:4", scores="magnitude"),
    "2:4 activations": partial(_sparse, pattern="2:4", scores="activations"),
    "2:4": TWO,
    "4:8": FOUR,
    "low rank": partial(_low_rank, share=FLOATS),
    "2:4 trained": partial(_trained, before=TWO),
    "low rank trained": partial(_trained, before=partial(_low_rank, share=FLOATS)),
    "int8": FORMS["int8"],
    "2:4 w8a8": partial(_bits, before=TWO, bits=8),
    "w4a8": partial(_bits, bits=4),
    "2:4 w4a8": partial(_bits, before=TWO, bits=4),
    "4:8 w4a8": partial(_bits, before=FOUR, bits=4),
    "w3a8": partial(_bits, bits=3),
    "w2.7a8": partial(_bits, bits=2.7),
    "w2a8": partial(_bits, bits=2),
    "low rank w4a8": partial(_bits, before=partial(_low_rank, share=INTEGERS), bits=4),
    "w4a8 trained": partial(_trained, bits=4),
    "2:4 w4a8 trained": partial(_trained, before=TWO, bits=4),
    "w3a8 trained": partial(_trained, bits=3),
    "w2a8 trained": partial(_trained, bits=2),
    "low rank w4a8 trained": partial(_trained, before=partial(_low_rank, share=INTEGERS), bits=4),
}
"""None: as it is. In the order of the table."""
PAIRS = (("float", "2:4"), ("int8", "2:4 w8a8"), ("w4a8", "2:4 w4a8"))
"""Dense and sparse forms whose times are compared."""


def makers(judge: Judge, forms: list[str]) -> Makers:
    return {name: partial(judge.artifact, name, SPARSE_FORMS[name]) for name in forms}


def timed(subject: Subject, arguments: argparse.Namespace, settings: dict[str, Any], machine: Row, forms: list[str]) -> Row:
    """Median milliseconds of a call of the first seed's files in OpenVINO, dense, sparse, and sparse with compressed weights."""
    folder = arguments.output.resolve() / subject.name / "0"
    pairs = [pair for pair in PAIRS if set(pair) <= set(forms)]
    one = each(subject.inputs(arguments.packages.resolve(), "test", 2, 0))[0]

    def opened(form: str, rate: float | None) -> Call:
        file = write_standalone(folder / file_name(form), folder / f"{file_name(form)}.onnx")
        options = {} if rate is None else {"CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE": rate}
        return PlainModel(file, one, precision=PRECISION, threads=settings["threads"], options=options)

    def times() -> Row:
        calls: dict[str, Callable[..., Any]] = {}
        for dense, sparse in pairs:
            calls |= {dense: opened(dense, None), sparse: opened(sparse, None), f"{sparse}, compressed": opened(sparse, RATE)}
        latencies = interleaved_latency(calls, one, rounds=settings["rounds"])
        return {"ms": {name: latency.median_ms for name, latency in latencies.items()}}

    if not pairs:
        return {}
    return dict(kept_row(folder / "sparse-times.json", settings | {"pairs": pairs, "rate": RATE}, times, hardware=machine)["ms"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder of the packages with weights and pictures")
    parser.add_argument("--only", nargs="+", choices=[subject.name for subject in SUBJECTS], default=None)
    parser.add_argument("--forms", nargs="+", choices=[*SPARSE_FORMS], default=[*SPARSE_FORMS])
    parser.add_argument("--held-out", type=at_least(16), default=1000, help="inputs that judge")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--steps", type=at_least(1), default=150, help="of distillation")
    parser.add_argument("--calibration", type=at_least(8), default=128, help="calibration inputs")
    parser.add_argument("--unlabelled", type=at_least(16), default=512, help="inputs of distillation")
    parser.add_argument("--threads", type=at_least(1), default=physical_cores())
    parser.add_argument("--rounds", type=at_least(1), default=60, help="of latency")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-sparsity"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    arguments = parser.parse_args()
    machine = describe_hardware()
    keys = ("held_out", "calibration", "unlabelled", "steps", "threads", "rounds")
    settings = {key: getattr(arguments, key) for key in keys} | {"protocol": PROTOCOL}
    chosen = [subject for subject in SUBJECTS if arguments.only is None or subject.name in arguments.only]
    forms = [name for name in SPARSE_FORMS if name in arguments.forms]
    networks = {}
    for subject in chosen:
        networks[subject.name] = measure(subject, partial(makers, forms=forms), arguments, settings, machine)
        made = [name for name, rows in networks[subject.name]["rows"].items() if "cannot" not in rows[0]]
        networks[subject.name]["sparse_ms"] = timed(subject, arguments, settings, machine, made)
    hardware = {**machine, "created": now()}
    if arguments.json:
        print(json.dumps({"benchmark": "sparsity", "hardware": hardware, "settings": settings, "rows": networks}, indent=1))
        return
    print_table(networks, hardware)
    amx = any("amx" in feature.lower() for feature in hardware["features"])
    print(
        f"time of a call in OpenVINO, ms ({'with' if amx else 'no'} AMX{'' if amx else ': the option changes nothing, weights are dense'}):"
    )
    for name, network in networks.items():
        print(f"  {name}: " + "; ".join(f"{form} {ms:.2f}" for form, ms in network["sparse_ms"].items()))


if __name__ == "__main__":
    main()
