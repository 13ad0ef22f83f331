"""Measure operators computed in chunks within a bound on temporary memory, against the same operators computed whole.

    python benchmarks/operators.py [--operators perceptron ...] [--tokens 4096 65536] [--rounds 5] [--threads 2] [--device cpu]
                                   [--output runs/benchmark-operators] [--json]

Operators, of random inputs in FP32: `perceptron` (192 channels, 768 hidden, GELU), `windows` (attention of 6 heads in windows of 8 x 8
tokens, padded), `latents` (attention of 6 heads through 32 latents), `dense` (attention of 6 heads without PyTorch's fused kernel; only up
to 8192 tokens, as its scores take 24 bytes for each pair of tokens), `loss` (cross-entropy and soft IoU of 19 classes in 4 maps).
`inference` computes the answer, `gradient` the answer and the gradient by all inputs and weights.

    part       share of the whole operator's temporary memory that is allowed, "whole" without a bound
    MiB        peak of memory beyond inputs, answer and gradients: of the process on a CPU (Linux), of tensors on CUDA; `bound` the bound
    ms         median of the rounds; `time` over that of the whole operator
    differs    largest difference from the whole operator's answer and gradients, as a share of the largest value of each

The tests count tensors, which stay within the bound; a process's peak also has memory that its allocator keeps. Goals at 65536 tokens: MiB
within the bound and 8 MiB; inference at most 1.2 times, a gradient at most 1.6 times the time. Rows measured already are kept.
Time on two cores: five minutes. Run it alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kept import Row, kept_row, now
from muntin.images import IGNORED
from muntin.layers import DenseProduct, chunked, partition
from muntin.layers.latent import LatentMixer
from muntin.layers.local import WindowMixer
from muntin.runtime import describe_hardware
from muntin.training.loss import Loss
from muntin.training.memory.peak import watch_peak
from options import at_least

DIM, HEADS, LATENTS, WINDOW, CLASSES, MAPS = 192, 6, 32, 8, 19, 4
DENSE_TOKENS = 8192
"""Most tokens of dense attention."""
PARTS = {"whole": None, "1/4": 4, "1/16": 16}
OPERATORS = ("perceptron", "windows", "latents", "dense", "loss")
Run = Callable[[int | None], list[Tensor]]
"""Computes an operator within a bound: the answer and, with a gradient, the gradients."""


def runner(name: str, tokens: int, gradient: bool, device: str) -> Run:
    """The operator of a name on random inputs."""
    torch.manual_seed(0)
    if name == "loss":
        return loss_runner(tokens, gradient, device)
    side = math.isqrt(tokens)
    operator, channels = {
        "perceptron": lambda: (nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM)), DIM),
        "windows": lambda: (WindowMixer(DIM, HEADS), 3 * DIM),
        "latents": lambda: (LatentMixer(DIM, HEADS, LATENTS), DIM + 2 * HEADS * LATENTS),
        "dense": lambda: (DenseProduct(), DIM),
    }[name]()
    operator = operator.to(device)
    if name == "dense":
        inputs: list[Any] = [torch.randn(1, HEADS, tokens, DIM // HEADS, device=device) for _ in range(3)]
    elif name == "perceptron":
        inputs = [torch.randn(tokens, channels, device=device)]
    else:
        t_STC, grid = partition(torch.randn(1, side - 3, side - 3, channels, device=device), WINDOW)
        inputs = [t_STC, grid]
    sources = [value.requires_grad_(gradient) for value in inputs if isinstance(value, Tensor)] + list(operator.parameters())

    def run(memory: int | None) -> list[Tensor]:
        with torch.set_grad_enabled(gradient), chunked(operator, memory=memory or 1 << 60):
            answer = operator(*inputs)
            return [answer.detach(), *(torch.autograd.grad(answer, sources, answer.detach()) if gradient else ())]

    return run


def loss_runner(pixels: int, gradient: bool, device: str) -> Run:
    side = math.isqrt(pixels)
    scores = torch.randn(MAPS, CLASSES, side, side, device=device).to(memory_format=torch.channels_last).requires_grad_(gradient)
    target = torch.randint(0, CLASSES, (MAPS, side, side), device=device)
    target[:, :3] = IGNORED

    def run(memory: int | None) -> list[Tensor]:
        with torch.set_grad_enabled(gradient):
            value = Loss(task="segment", overlap=1.0, memory=memory)(scores, target)
            return [value.detach(), *(torch.autograd.grad(value, scores) if gradient else ())]

    return run


def measure(run: Run, rounds: int, device: str) -> Row:
    whole = run(None)  # also the warm-up
    outputs = sum(tensor.numel() * tensor.element_size() for tensor in whole)
    results: Row = {}
    for part, share in PARTS.items():
        memory = None if share is None else results["whole"]["peak"] // share
        if memory is not None and memory < 1 << 16:
            return {"cannot": f"the whole operator takes {results['whole']['peak']} bytes beside its answer: too few to divide"}
        computed = run(memory)
        differs = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(computed, whole, strict=True))
        del computed
        with watch_peak(device) as watch:
            run(memory)
        if watch.peak is None:
            return {"cannot": "this system does not tell the peak of memory (Linux and CUDA do)"}
        times = [timed(partial(run, memory), device) for _ in range(rounds)]
        results[part] = {"peak": max(0, watch.peak - outputs), "bound": memory, "ms": median(times), "differs": differs}
    return results


def timed(call: Callable[[], object], device: str) -> float:
    """Milliseconds of a call."""
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--tokens", type=at_least(64), nargs="+", default=[4096, 65536], help="tokens, or pixels of a map for the loss")
    parser.add_argument("--rounds", type=at_least(1), default=5)
    parser.add_argument("--threads", type=at_least(1), default=2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark-operators"))
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    given = parser.parse_args()
    hardware = describe_hardware()
    torch.set_num_threads(given.threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[Row] = []
    for name in given.operators:
        for tokens in given.tokens:
            if name == "dense" and tokens > DENSE_TOKENS:
                print(f"left out: dense with {tokens} tokens, more than {DENSE_TOKENS}", file=sys.stderr)
                continue
            for mode in ("inference", "gradient"):
                print(f"{name}, {tokens} tokens, {mode}", file=sys.stderr)
                settings = {"rounds": given.rounds, "threads": given.threads, "device": given.device}

                def measured(name: str = name, tokens: int = tokens, mode: str = mode) -> Row:
                    with sdpa_kernel(SDPBackend.MATH):
                        return measure(runner(name, tokens, mode == "gradient", given.device), given.rounds, given.device)

                row = kept_row(given.output / f"{name}-{tokens}-{mode}.json", settings, measured, hardware=hardware)
                if "cannot" in row:
                    print(f"left out: {name}, {tokens} tokens, {mode}: {row['cannot']}", file=sys.stderr)
                    continue
                for part in PARTS:
                    time_ratio = row[part]["ms"] / row["whole"]["ms"]
                    rows.append({"operator": name, "tokens": tokens, "mode": mode, "part": part, **row[part], "time": time_ratio})
    if given.json:
        print(json.dumps({"benchmark": "operators", "hardware": {**hardware, "created": now()}, "rows": rows}, indent=1))
        return
    print(f"{'':<12}{'tokens':>7}  {'mode':<10}{'part':>6}{'MiB':>9}{'bound':>9}{'ms':>10}{'time':>7}{'differs':>10}")
    for row in rows:
        bound = "" if row["bound"] is None else f"{row['bound'] / 2**20:.1f}"
        head = f"{row['operator']:<12}{row['tokens']:>7}  {row['mode']:<10}{row['part']:>6}{row['peak'] / 2**20:>9.1f}{bound:>9}"
        print(f"{head}{row['ms']:>10.1f}{row['time']:>7.2f}{row['differs']:>10.1e}")
    print(f"\n{hardware['cpu']}, {hardware['physical_cores']} cores; {now()}")


if __name__ == "__main__":
    main()
