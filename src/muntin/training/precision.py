"""Mixed precision: the type that training computes in on this hardware, and why."""

from __future__ import annotations

import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Literal

import torch

from muntin.errors import DependencyError
from muntin.models.session import require_compiler
from muntin.training.config import TrainingConfig
from muntin.training.distributed.ranks import ALONE, Ranks

PrecisionName = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
MIN_GAIN = 1.2
"""Speed of BF16 over FP32 from which "auto" takes BF16 on a CPU; below it, conversions cost the gain."""
_SIDE, _REPEATS = 1024, 9


@dataclass(frozen=True, kw_only=True)
class TrainingPrecision:
    """The type of products in training. `dtype` None is FP32."""

    name: str
    device: str
    dtype: torch.dtype | None
    reason: str

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute products and convolutions in `dtype` during the block; parameters, sums and losses stay FP32."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            yield

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaler for FP16; for other types it does nothing."""
        return torch.amp.GradScaler(self.device, enabled=self.dtype is torch.float16)


def cpu_computes_bf16() -> bool:
    """Return True if this CPU has BF16 products (AVX512-BF16, AMX or Arm's). They may still be slow: see `bf16_gain`."""
    return bool(torch.backends.mkldnn.is_available()) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]


@cache
def bf16_gain() -> float:
    """Speed of BF16 matrix products over FP32 on this CPU, measured once a process: AVX512-BF16 is faster on some CPUs only."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(_SIDE, _SIDE, dtype=dtype), torch.ones(_SIDE, _SIDE, dtype=dtype)
        seconds[dtype] = min(timeit.repeat(partial(torch.mm, a, b), number=1, repeat=_REPEATS))
    return seconds[torch.float32] / seconds[torch.bfloat16]


def resolve_precision(name: PrecisionName, device: str, *, begun: str | None = None) -> TrainingPrecision:
    """Choose the precision for a recipe's `name` on this machine. Raises `DependencyError` for a type that the hardware lacks.

    `begun`: the precision of a resumed run so far, which "auto" keeps if the hardware has it.
    """
    if device == "cuda":
        return _on_cuda(name)
    if name in ("fp16", "tf32"):
        raise DependencyError(f"precision {name}: CPUs compute it at FP32 speed or not at all; write auto, bf16 or fp32")
    has_bf16 = cpu_computes_bf16()
    if name == "bf16" and not has_bf16:
        raise DependencyError("precision bf16: this CPU has no BF16 products (AVX512-BF16 or AMX); write auto or fp32")
    if name == "fp32" or not has_bf16:
        return TrainingPrecision(
            name="fp32", device=device, dtype=None, reason="as asked" if name == "fp32" else "this CPU has no BF16 products"
        )
    if name == "bf16":
        reason = "as asked"
    elif begun in ("fp32", "bf16"):
        name, reason = ("fp32" if begun == "fp32" else "bf16"), "as the run was begun"
    else:
        gain = bf16_gain()
        name, reason = ("bf16" if gain >= MIN_GAIN else "fp32"), f"this CPU multiplies {gain:.2g} times as fast in BF16 as in FP32"
    return TrainingPrecision(name=name, device=device, dtype=torch.bfloat16 if name == "bf16" else None, reason=reason)


def prepare_hardware(config: TrainingConfig, *, begun: str | None, ranks: Ranks = ALONE) -> TrainingPrecision:
    """Set the number of threads and choose the precision, one for all processes. `begun`: the precision of a resumed run so far.

    Raises `DependencyError` for a precision or compiler that this machine lacks.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.compile:
        require_compiler(device)
    precision = resolve_precision(config.precision, device, begun=begun)
    if ranks.count == 1 or config.precision != "auto" or device == "cuda":
        return precision
    bf16 = ranks.of_first(precision.name == "bf16")  # measured in each process
    return resolve_precision("bf16" if bf16 else "fp32", device)


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
