"""Measure operators computed in chunks within a bound on temporary memory, against the same operators computed whole.

    python benchmarks/operators.py [--operators perceptron ...] [--tokens 4096 65536] [--rounds 5] [--threads 2]

`windows`: attention of 6 heads in windows of 8 x 8 tokens; `latents`: through 32 latents; `dense`: without a fused kernel, up to 8192
tokens; `loss`: 19 classes in 4 maps. The bound is a share of the whole operator's peak: memory beyond inputs, output and gradients,
of the process (Linux). Time on two cores: five minutes. Run it alone.
"""

from __future__ import annotations

import math
import sys
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from documents import Document, Goal, Row, crossed, grouped
from harness import Benchmark, Options, Run, main, option
from muntin.images import IGNORED
from muntin.layers import DenseProduct, chunked, partition
from muntin.layers.latent import LatentMixer
from muntin.layers.local import WindowMixer
from muntin.training.loss import Loss
from muntin.training.memory.peak import watch_peak

DIM, HEADS, LATENTS, WINDOW, CLASSES, MAPS = 192, 6, 32, 8, 19, 4
DENSE_TOKENS = 8192
"""Most tokens of dense attention."""
PARTS = {"whole": None, "1/4": 4, "1/16": 16}
OPERATORS = ("perceptron", "windows", "latents", "dense", "loss")
MIB = 2**20
Operator = Callable[[int | None], list[Tensor]]
"""Computes within a bound, in bytes: the output and, with a gradient, the gradients."""


def operator_of(name: str, tokens: int, gradient: bool) -> Operator:
    """The operator of a name on random inputs."""
    torch.manual_seed(0)
    if name == "loss":
        return loss_of(math.isqrt(tokens), gradient)
    module, channels = {
        "perceptron": lambda: (nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)), DIM),
        "windows": lambda: (WindowMixer(DIM, HEADS), 3 * DIM),
        "latents": lambda: (LatentMixer(DIM, HEADS, LATENTS), DIM + 2 * HEADS * LATENTS),
        "dense": lambda: (DenseProduct(), DIM),
    }[name]()
    inputs: list[Any]
    if name == "dense":
        inputs = [torch.randn(1, HEADS, tokens, DIM // HEADS) for _ in range(3)]
    elif name == "perceptron":
        inputs = [torch.randn(tokens, channels)]
    else:
        side = math.isqrt(tokens) - 3
        inputs = list(partition(torch.randn(1, side, side, channels), WINDOW))
    sources = [value.requires_grad_(gradient) for value in inputs if isinstance(value, Tensor)] + list(module.parameters())

    def compute(memory: int | None) -> list[Tensor]:
        with torch.set_grad_enabled(gradient), chunked(module, memory=memory or 1 << 60):
            output = module(*inputs)
            return [output.detach(), *(torch.autograd.grad(output, sources, output.detach()) if gradient else ())]

    return compute


def loss_of(side: int, gradient: bool) -> Operator:
    scores = torch.randn(MAPS, CLASSES, side, side).to(memory_format=torch.channels_last).requires_grad_(gradient)
    target = torch.randint(0, CLASSES, (MAPS, side, side))
    target[:, :3] = IGNORED

    def compute(memory: int | None) -> list[Tensor]:
        with torch.set_grad_enabled(gradient):
            value = Loss(task="segment", overlap=1.0, memory=memory)(scores, target)
            return [value.detach(), *(torch.autograd.grad(value, scores) if gradient else ())]

    return compute


def measure(name: str, tokens: int, mode: str, rounds: int) -> Row:
    with sdpa_kernel(SDPBackend.MATH):
        compute = operator_of(name, tokens, mode == "gradient")
        whole = compute(None)  # also the warm-up
        outputs = sum(tensor.numel() * tensor.element_size() for tensor in whole)
        results: Row = {}
        for part, share in PARTS.items():
            memory = None if share is None else results["whole"]["peak"] // share
            if memory is not None and memory < 1 << 16:
                return {"cannot": f"the whole operator takes {results['whole']['peak']} bytes beside its output: too few to divide"}
            computed = compute(memory)
            differs = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(computed, whole, strict=True))
            del computed
            with watch_peak("cpu") as watch:
                compute(memory)
            if watch.peak is None:
                return {"cannot": "this system does not tell the peak of memory (Linux does)"}
            ms = median(timeit.repeat(partial(compute, memory), number=1, repeat=rounds)) * 1e3
            results[part] = {"peak": max(0, watch.peak - outputs), "bound": memory, "ms": ms, "differs": differs}
        return results


class OperatorsOptions(Options):
    operators: tuple[str, ...] = option(OPERATORS, "operators", choices=OPERATORS, selects=True)
    tokens: tuple[int, ...] = option((4096, 65536), "tokens, or pixels of a map for the loss", least=64, selects=True)
    rounds: int = option(5, "timed calls", least=1)
    threads: int = option(2, "threads of PyTorch", least=1)


def rows(run: Run) -> Iterator[Row]:
    options = run.options
    torch.set_num_threads(options.threads)
    for name, tokens, mode in product(options.operators, options.tokens, ("inference", "gradient")):
        if name == "dense" and tokens > DENSE_TOKENS:
            print(f"left out: dense with {tokens} tokens, more than {DENSE_TOKENS}", file=sys.stderr)
            continue
        row = run.row(f"{name}-{tokens}-{mode}", measure, name, tokens, mode, options.rounds)
        case = {"operator": name, "tokens": tokens, "mode": mode, "created": row["created"]}
        parts = [{"part": "whole", "cannot": row["cannot"]}] if "cannot" in row else [{"part": part, **row[part]} for part in PARTS]
        yield from ({**case, **part, "time": part["ms"] / row["whole"]["ms"] if "ms" in part else None} for part in parts)


def goal(name: str, value: Callable[[Row], float], *keys: str, mode: str = "", **bound: Any) -> Goal:
    """A goal with a case for each value of the `keys`: the worst one within a bound."""

    def cases(document: Document) -> dict[str, float]:
        rows = [row for row in document.rows if row.get("bound") is not None and mode in row["mode"]]
        return {" ".join(map(str, case)): max(map(value, group)) for case, group in grouped(rows, *keys).items()}

    return Goal(name=name, values=cases, **bound)


def sixteenth(rows: list[Row]) -> tuple[str, list[float]]:
    """At the largest size, how much less memory a sixteenth takes than the whole operators, in words, and its times over theirs."""
    largest = max(row["tokens"] for row in rows)
    found = {(row["part"], row["operator"], row["mode"]): row for row in rows if row["tokens"] == largest and "ms" in row}
    chosen = [row for row in found.values() if row["part"] == "1/16"]
    saved = sorted((found["whole", row["operator"], row["mode"]]["peak"] / row["peak"], row["operator"]) for row in chosen)
    return " to ".join(f"1/{times:.0f} ({name})" for times, name in (saved[0], saved[-1])), [row["time"] for row in chosen]


def claim(documents: list[Document]) -> str:
    return f"operators in chunks of a sixteenth: {sixteenth(documents[-1].rows)[0]} of the temporaries"


def newest(document: Document) -> str:
    times = sixteenth(document.rows)[1]
    return f"{claim([document])}, in {min(times):.2f} to {max(times):.2f} times the time"


def cell(row: Row) -> str:
    bound = "" if row["bound"] is None else f" ({row['bound'] / MIB:.1f})"
    return f"{row['peak'] / MIB:.1f}{bound} MiB, {row['ms']:.1f} ms, {row['time']:.2f}, {row['differs']:.0e}"


BENCHMARK = Benchmark(
    name="operators",
    options=OperatorsOptions,
    measure=rows,
    about="""Peak of temporary memory (and its bound), time, time over that of the whole operator, and largest relative difference of the
results. `perceptron` is an MLP, `dense` attention without a fused kernel. The goals were set for 65,536 tokens: memory within the bound and
8 MiB, inference in at most 1.2 times and a gradient in at most 1.6 times the time; here they judge every size.""",
    newest=newest,
    tables=(crossed("operator, tokens, mode", "part", cell),),
    goals=(
        goal("MiB beyond the bound", lambda row: (row["peak"] - row["bound"]) / MIB, "operator", at_most=8, form="{:.1f}"),
        *(
            goal(f"time, {mode}", lambda row: row["time"], "operator", "tokens", mode=mode, at_most=most, form="{:.2f}")
            for mode, most in (("inference", 1.2), ("gradient", 1.6))
        ),
        goal("difference of the results", lambda row: row["differs"], at_most=1e-6, form="{:.0e}"),
    ),
    blocks={"M8": claim},
)

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
