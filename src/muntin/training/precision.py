"""Mixed precision: the type that training computes in on this hardware, and why.

On a CPU with BF16 products "auto" measures a few steps of the model itself in both types, interleaved (`choose_by_speed`). They are
computed by one thread and timed by its processor time: on a busy machine wall-clock times of several threads vary by factors of 3.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Literal

import torch

from muntin.errors import DependencyError, MuntinError
from muntin.models.session import require_compiler
from muntin.training.config import TrainingConfig
from muntin.training.distributed.ranks import ALONE, Ranks

PrecisionName = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
MIN_GAIN = 1.2
"""Speed of BF16 over FP32 from which "auto" takes BF16 on a CPU, in every pair of steps but one."""
PAIRS = 5
"""Pairs of steps, one in FP32 and one in BF16, that are compared. With their warm-up they are `PAIRS + 1`."""
MAX_SHARE = 0.04
"""Largest share of a run that the comparison may take; shorter runs keep FP32."""
MAX_SECONDS = 3.0
"""Seconds of the comparison if steps of the fewest rows allow; more only within `MAX_SHARE` of the run."""


@dataclass(frozen=True, kw_only=True)
class TrainingPrecision:
    """The type of products in training. `dtype` None is FP32.

    `undecided`: FP32 that "auto" takes unless BF16 is measured to be faster. `gains`: the measured speeds of BF16 over FP32.
    """

    name: str
    device: str
    dtype: torch.dtype | None
    reason: str
    undecided: bool = False
    gains: tuple[float, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """The choice and its figures in words, if it was measured."""
        return (f"precision auto: {self.name}, since {self.reason}",) if self.gains else ()

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute products and convolutions in `dtype` during the block; parameters, sums and losses stay FP32."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            yield

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaler for FP16; for other types it does nothing."""
        return torch.amp.GradScaler(self.device, enabled=self.dtype is torch.float16)


def cpu_computes_bf16() -> bool:
    """Return True if this CPU has BF16 products (AVX512-BF16, AMX or Arm's). They may still be slow: see `choose_by_speed`."""
    return bool(torch.backends.mkldnn.is_available()) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]


def resolve_precision(name: PrecisionName, device: str, *, begun: str | None = None) -> TrainingPrecision:
    """Choose the precision for a recipe's `name` on this machine. Raises `DependencyError` for a type that the hardware lacks.

    `begun`: the precision of a resumed run so far, which "auto" keeps if the hardware has it. Otherwise "auto" is undecided on a CPU with
    BF16 products.
    """
    if device == "cuda":
        return _on_cuda(name)
    if name in ("fp16", "tf32"):
        raise DependencyError(f"precision {name}: CPUs compute it at FP32 speed or not at all; write auto, bf16 or fp32")
    has_bf16 = cpu_computes_bf16()
    if name == "bf16" and not has_bf16:
        raise DependencyError("precision bf16: this CPU has no BF16 products (AVX512-BF16 or AMX); write auto or fp32")
    fp32 = TrainingPrecision(name="fp32", device=device, dtype=None, reason="as asked")
    if name == "fp32":
        return fp32
    if not has_bf16:
        return replace(fp32, reason="this CPU has no BF16 products")
    if name == "auto" and begun not in ("fp32", "bf16"):
        return replace(fp32, reason="BF16 was not measured with this model", undecided=True)
    reason = "as asked" if name == "bf16" else "as the run was begun"
    if name == "bf16" or begun == "bf16":
        return replace(fp32, name="bf16", dtype=torch.bfloat16, reason=reason)
    return replace(fp32, reason=reason)


def prepare_hardware(config: TrainingConfig, *, begun: str | None, ranks: Ranks = ALONE) -> TrainingPrecision:
    """Set the number of threads and resolve the precision, one for all processes. `begun`: the precision of a resumed run so far.

    Raises `DependencyError` for a precision or compiler that this machine lacks.
    """
    # in any case, since it also fixes the threads of MKL: a resumed run, which measures no precision, computes the same bits
    torch.set_num_threads(config.threads or torch.get_num_threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.compile:
        require_compiler(device)
    precision = resolve_precision(config.precision, device, begun=begun)
    if ranks.count > 1 and config.precision == "auto" and device == "cpu" and ranks.any(not cpu_computes_bf16()):
        return replace(resolve_precision("fp32", device), reason="the CPU of a process has no BF16 products")
    return precision


def choose_by_speed(
    precision: TrainingPrecision,
    config: TrainingConfig,
    step: Callable[[TrainingPrecision, int], object],
    *,
    rows: int,
    least: int = 1,
    ranks: Ranks = ALONE,
    clock: Callable[[], float] = time.thread_time,
) -> TrainingPrecision:
    """Decide an undecided precision: BF16 if steps are at least `MIN_GAIN` times as fast in it, in every pair but one; otherwise FP32.

    `step(precision, rows)` computes the gradient of some rows and leaves no trace; FP32 stays if it raises `MuntinError`. A step of the run
    has `rows`; the measured ones have at least `least`, and more if all of them still take less than `MAX_SECONDS`. Of several processes
    the first one's result counts.
    """
    if not precision.undecided:
        return precision
    threads = torch.get_num_threads()
    try:
        decided = _compared(precision, config, step, rows, min(least, rows), clock)
    except MuntinError as error:
        decided = replace(precision, reason=f"BF16 was not measured: {error}", undecided=False)
    finally:
        torch.set_num_threads(threads)
    if ranks.of_first(decided.dtype is not None) == (decided.dtype is not None):
        return decided
    name, dtype = ("bf16", torch.bfloat16) if decided.dtype is None else ("fp32", None)
    return replace(decided, name=name, dtype=dtype, reason="the first process measured it", gains=())


def _compared(
    precision: TrainingPrecision,
    config: TrainingConfig,
    step: Callable[[TrainingPrecision, int], object],
    rows: int,
    least: int,
    clock: Callable[[], float],
) -> TrainingPrecision:
    fp32 = replace(precision, reason="the run is too short to measure BF16", undecided=False)
    bf16 = replace(fp32, name="bf16", dtype=torch.bfloat16)

    def seconds(each: TrainingPrecision, rows: int) -> float:
        started = clock()
        step(each, rows)
        return clock() - started

    if 2 * (PAIRS + 1) * least > MAX_SHARE * config.steps * rows:
        return fp32
    run = math.inf if config.minutes is None else 60 * config.minutes
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for each in (fp32, bf16):  # the first step of each compiles kernels and maps memory
        seconds(each, least)
    small = {each.name: seconds(each, least) for each in (fp32, bf16)}
    needed = (PAIRS + 1) * sum(small.values())
    by_steps = config.steps * rows / least * small["fp32"] / threads
    if needed > min(MAX_SHARE * run, max(MAX_SECONDS, MAX_SHARE * by_steps)):
        return fp32
    taken = min(rows, least * max(1, int(min(MAX_SHARE * run, MAX_SECONDS) / needed)))
    if taken > least:
        for each in (fp32, bf16):
            seconds(each, taken)
    gains = []
    for pair in range(PAIRS):
        order = (fp32, bf16) if pair % 2 == 0 else (bf16, fp32)
        spent = {each.name: seconds(each, taken) for each in order}
        gains.append(spent["fp32"] / spent["bf16"])
    gains.sort()
    chosen = bf16 if gains[1] >= MIN_GAIN else fp32
    spread = f"{gains[0]:.2f} to {gains[-1]:.2f} in {PAIRS} pairs of steps"
    reason = f"BF16 is {median(gains):.2f} times as fast with this model ({spread})"
    if chosen is fp32 and median(gains) > 1:
        reason += f", too little: it is taken from {MIN_GAIN:g} times on in all pairs but one"
    return replace(chosen, reason=reason, gains=tuple(gains))


def _on_cuda(name: PrecisionName) -> TrainingPrecision:
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "bf16" if has_bf16 else "fp16"
    if name == "bf16" and not has_bf16:
        raise DependencyError(f"training.precision bf16: {torch.cuda.get_device_name()} has none: write auto, fp16 or fp32")
    if name in ("fp32", "tf32"):
        products = "tf32" if name == "tf32" else "ieee"
        torch.backends.cuda.matmul.fp32_precision = products
        torch.backends.cudnn.conv.fp32_precision = products  # type: ignore[attr-defined]
        return TrainingPrecision(name=name, device="cuda", dtype=None, reason=f"as asked, with {products.upper()} products")
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    return TrainingPrecision(name=name, device="cuda", dtype=dtype, reason=f"{name} tensor cores of {torch.cuda.get_device_name()}")
