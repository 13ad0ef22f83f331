"""N:M sparsity (2:4, 4:8) against fewer bits and lower ranks at the same bytes, as deployed.

    python benchmarks/sparsity.py --packages FOLDER [--only NAME ...] [--forms FORM ...] [--seeds 3] [--steps 150]

Networks: EfficientNet-Lite0, all-MiniLM-L6-v2 and a ResNet that is trained here, judged as in `foreign.py`. Forms in FP32 and on top of
bits, without training and with the same number of steps of distillation (zeros held, bits learned). 2.7 bits on average take as many bytes
as 2:4 of 4; below 4 bits no layer is raised to 8. Then the time of one call in OpenVINO: dense, with zeros, and with zeros and
CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE, which decompresses INT8 weights of fully connected layers on CPUs with AMX. Run it alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

import muntin
from documents import Document, Goal, Row, Table, columns, seeds_of
from foreign_networks.judging import TABLES, Judge, NetworkOptions, agreements, by_form, cases, judges, points
from foreign_networks.subjects import Material, Pass, chain, ranks
from harness import Benchmark, Run, file_name, main, option
from muntin.artifact import write_standalone
from quantizer_peers.artifacts import Call, PlainModel
from quantizer_peers.data import HELD_OUT

NAMES = ("efficientnet-lite0", "minilm", "resnet")
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
    return ranks(model, material, parameters=1 - 2 * (_zeros(thinned) - _zeros(model)) * (1 - share))


def _zeros(model: nn.Module) -> float:
    """The share of a model's parameters that are zero."""
    weights = list(model.parameters())
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


TWO, FOUR = partial(_sparse, pattern="2:4"), partial(_sparse, pattern="4:8")
FLOAT_RANKS, INTEGER_RANKS = partial(_low_rank, share=FLOATS), partial(_low_rank, share=INTEGERS)
plain, learned = partial(chain, bits=None), partial(chain, trained=True, aware=True)
SPARSE_FORMS: dict[str, Pass | None] = {
    "float": None,  # as it is
    "2:4 magnitude": plain(partial(_sparse, pattern="2:4", scores="magnitude")),
    "2:4 activations": plain(partial(_sparse, pattern="2:4", scores="activations")),
    "2:4": plain(TWO),
    "4:8": plain(FOUR),
    "low rank": plain(FLOAT_RANKS),
    "2:4 trained": plain(TWO, trained=True),
    "low rank trained": plain(FLOAT_RANKS, trained=True),
    "int8": chain(),
    "2:4 w8a8": chain(TWO),
    "w4a8": chain(bits=4),
    "2:4 w4a8": chain(TWO, bits=4),
    "4:8 w4a8": chain(FOUR, bits=4),
    **{f"w{bits:g}a8": chain(bits=bits, min_sqnr_db=0) for bits in (3, 2.7, 2)},
    "low rank w4a8": chain(INTEGER_RANKS, bits=4),
    "w4a8 trained": learned(bits=4),
    "2:4 w4a8 trained": learned(TWO, bits=4),
    **{f"w{bits}a8 trained": learned(bits=bits) for bits in (3, 2)},
    "low rank w4a8 trained": learned(INTEGER_RANKS, bits=4),
}
PAIRS = (("float", "2:4"), ("int8", "2:4 w8a8"), ("w4a8", "2:4 w4a8"))
"""Dense and sparse forms whose times are compared."""


@dataclass(frozen=True, kw_only=True)
class SparsityOptions(NetworkOptions):
    only: tuple[str, ...] = option(NAMES, "networks", choices=NAMES, selects=True)
    forms: tuple[str, ...] = option(tuple(SPARSE_FORMS), "forms", choices=tuple(SPARSE_FORMS), selects=True)
    held_out: int = option(HELD_OUT, "inputs that judge", least=16)


def rows(run: Run) -> Iterator[Row]:
    forms = {name: form for name, form in SPARSE_FORMS.items() if name in run.options.forms}
    for judge in judges(run, {"test": run.options.held_out}, "f32", agreements):
        found = judge.made({name: partial(judge.artifact, name, form) for name, form in forms.items()})
        fit = [row["form"] for row in found if "cannot" not in row]
        yield from found if judge.seed else (judge.facts(), *judge.timed(found), *times(judge, fit))


def times(judge: Judge, forms: list[str]) -> Iterator[Row]:
    """Median milliseconds of a call of plain ONNX files in OpenVINO: dense, sparse, and sparse with compressed weights."""

    def opened(form: str, **options: float) -> Call:
        file = write_standalone(judge.folder / file_name(form), judge.folder / f"{file_name(form)}.onnx")
        return PlainModel(file, judge.one, precision=judge.precision, threads=judge.options.threads, options=options)

    calls = {}
    for dense, sparse in PAIRS:
        if dense in forms and sparse in forms:
            calls |= {form: partial(opened, form) for form in (dense, sparse)}
            calls[f"{sparse}, compressed"] = partial(opened, sparse, CPU_SPARSE_WEIGHTS_DECOMPRESSION_RATE=RATE)
    for form, ms in (judge.in_turns(calls, rate=RATE) if calls else {}).items():
        yield {"part": "time", "network": judge.subject.name, "form": form, "ms": ms}


# Pages


def pairs(found: list[Row]) -> Iterator[Row]:
    """Milliseconds of each pair of a network: dense, with zeros, and with compressed weights."""
    ms = {(row["network"], row["form"]): row["ms"] for row in found if row["part"] == "time"}
    for network in dict.fromkeys(network for network, _ in ms):
        for dense, sparse in PAIRS:
            if (network, sparse) in ms:
                zeros = {"zeros": ms[network, sparse], "compressed": ms[network, f"{sparse}, compressed"]}
                yield {"network": network, "form": dense, "dense": ms[network, dense], **zeros}


def faster(document: Document) -> dict[str, float]:
    return {f"{row['network']} {row['form']}": row["dense"] / row["compressed"] for row in pairs(document.rows)}


def newest(document: Document) -> str:
    found = {name: forms["2:4 w4a8"] for name, forms in by_form(document).items() if "2:4 w4a8" in forms}
    told = [f"{name} agreement {row['agreement']:.3f}" for name, row in found.items()]
    return f"2:4 on 4 bits: {', '.join(told)}"


COMPARED = {
    "refitting adds to 2:4 by magnitude": ("2:4", "2:4 magnitude"),
    "training adds to 2:4": ("2:4 trained", "2:4"),
    "2:4 W4A8 is ahead of 2.7 bits": ("2:4 w4a8", "w2.7a8"),
    "2:4 W4A8 is ahead of lower ranks in W4A8": ("2:4 w4a8", "low rank w4a8"),
    "2:4 W4A8 trained is ahead of 3 bits trained": ("2:4 w4a8 trained", "w3a8 trained"),
    "2:4 W4A8 trained is ahead of lower ranks trained": ("2:4 w4a8 trained", "low rank w4a8 trained"),
}
BENCHMARK = Benchmark(
    name="sparsity", options=SparsityOptions, measure=rows, newest=newest, n=seeds_of,
    about="""Columns as in [foreign](#foreign). Trained: distillation; zeros are held, bits are learned. Lower ranks have the parameters
that make the bytes of 2:4; 2.7 bits on average take as many bytes as 2:4 of 4. Times: one call of a plain ONNX file in OpenVINO, in turns;
without AMX the option that keeps weights compressed changes nothing. No GPU was used: 2:4 has not been run in TensorRT.
Artefacts stored the zeros of a pattern packed then (2:4 of 4 bits in two thirds of the bytes); now they are stored as other values.""",
    tables=(*TABLES, Table(title="OpenVINO, ms", columns=columns("network, form, dense:.2f, zeros:.2f, compressed:.2f"), rows=pairs)),
    goals=(
        *(Goal(name=f"points that {name}", values=cases(one, points, other), at_least=0.0, form="{:.1f}")
          for name, (one, other) in COMPARED.items()),
        Goal(name="times as fast with zeros, beyond the noise", values=faster, at_least=1.1, form="{:.2f}"),
    ),
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
