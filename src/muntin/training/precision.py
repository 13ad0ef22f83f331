"""Mixed precision: which 16-bit type this hardware really computes in, and why that one was taken."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor, nn

from muntin.errors import DependencyError, RecipeError

PrecisionName = Literal["auto", "fp32", "bf16", "fp16"]
PAYS = 1.2
"""How many times as fast BF16 has to be for "auto" to take it on a CPU: below, what it gains is lost again in converting."""
_SIDE, _REPEATS = 1024, 8


@dataclass(frozen=True, kw_only=True)
class Precision:
    """What training computes in. `dtype` None is FP32."""

    name: str
    device: str
    dtype: torch.dtype | None
    reason: str

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Products and convolutions in `dtype` inside the block; parameters, sums and losses stay FP32."""
        with torch.autocast(self.device, self.dtype, enabled=self.dtype is not None):
            yield

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss where gradients would underflow: FP16 only, elsewhere it passes everything through."""
        return torch.amp.GradScaler(self.device, enabled=self.dtype is torch.float16)


def cpu_computes_bf16() -> bool:
    """Whether this CPU has BF16 products (AVX512-BF16, AMX or Arm's), not emulated ones. They may still be slow: see `bf16_gain`."""
    return bool(torch.backends.mkldnn.is_available()) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # type: ignore[no-untyped-call]


@cache
def bf16_gain() -> float:
    """How many times as fast as FP32 this CPU multiplies matrices in BF16, as measured: about a tenth of a second, once a process.

    The instruction alone says nothing: AVX512-BF16 doubles the speed on one make of CPU and halves it on another.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(_SIDE, _SIDE, dtype=dtype), torch.ones(_SIDE, _SIDE, dtype=dtype)
        torch.mm(a, b)
        times = []
        for _ in range(_REPEATS):
            began = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - began)
        seconds[dtype] = min(times)
    return seconds[torch.float32] / seconds[torch.bfloat16]


def resolve_precision(name: PrecisionName, device: str, *, begun: str | None = None) -> Precision:
    """Turn a recipe's word into what this machine does. Raises `DependencyError` for a type that the hardware lacks.

    `begun`: what a run that goes on was computed in so far: with "auto" it stays with it where the hardware has it, so that a run which
    was interrupted ends as it would have.
    """
    if device == "cuda":
        return _on_cuda(name)
    if name == "fp16":
        raise DependencyError("precision fp16: CPUs compute it at FP32 speed or not at all; write auto, bf16 or fp32")
    has_bf16 = cpu_computes_bf16()
    if name == "bf16" and not has_bf16:
        raise DependencyError("precision bf16: this CPU has no BF16 products (AVX512-BF16 or AMX); write auto or fp32")
    if name == "fp32" or not has_bf16:
        return Precision(name="fp32", device=device, dtype=None, reason="as asked" if name == "fp32" else "this CPU has no BF16 products")
    if name == "bf16":
        reason = "as asked"
    elif begun in ("fp32", "bf16"):
        name, reason = ("fp32" if begun == "fp32" else "bf16"), "as the run was begun; this CPU has BF16 products"
    else:
        gain = bf16_gain()
        name, reason = ("bf16" if gain >= PAYS else "fp32"), f"this CPU multiplies {gain:.2g} times as fast in BF16 as in FP32"
    return Precision(name=name, device=device, dtype=torch.bfloat16 if name == "bf16" else None, reason=reason)


def check_maps(model: nn.Module, precision: Precision, *, crop: int, channels: int, asked: PrecisionName) -> Precision:
    """The precision that a model's gradients are right in: FP32 in place of "auto"'s BF16 where a kernel reaches over all of its map.

    There PyTorch 2.13 on CPUs (oneDNN, AVX512-BF16) reads memory that nobody wrote: a 3 x 3 convolution of stride 2 over a map of 1 x 1 has
    a gradient that differs from call to call, is infinite or no number. Wrong were 3 x 3 with stride 2 on a side of 1, 5 x 5 on it with
    any stride, 7 x 7 on sides of up to 3; never 3 x 3 with stride 1. Costs a forward pass of one crop, in BF16 on a CPU
    only. Raises RecipeError where BF16 was asked for by name.
    """
    if precision.device != "cpu" or precision.dtype is not torch.bfloat16:
        return precision
    small: list[str] = []

    def look(layer: nn.Conv2d, inputs: tuple[Tensor, ...], named_inputs: dict[str, Tensor], name: str) -> None:
        sides = (*inputs, *named_inputs.values())[0].shape[-2:]
        for side, kernel, dilation, stride in zip(sides, layer.kernel_size, layer.dilation, layer.stride, strict=True):
            reach = (kernel - 1) * dilation + 1
            if side <= reach // 2 and (reach > 3 or stride > 1):
                small.append(f"the {kernel}x{kernel} convolution {name} sees maps of {sides[0]}x{sides[1]}")

    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, by_name, name=name: look(layer, inputs, by_name, name), with_kwargs=True)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d)
    ]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, crop, crop))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not small:
        return precision
    why = f"at data.crop {crop} {small[0]}, where gradients in BF16 are wrong on CPUs"
    if asked == "bf16":
        raise RecipeError(f"training.precision bf16: {why}: write auto or fp32, or take larger crops")
    return Precision(name="fp32", device="cpu", dtype=None, reason=why)


def _on_cuda(name: PrecisionName) -> Precision:
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "auto":
        name = "bf16" if has_bf16 else "fp16"
    if name == "bf16" and not has_bf16:
        raise DependencyError(f"training.precision bf16: {torch.cuda.get_device_name()} has none: write auto, fp16 or fp32")
    if name == "fp32":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
        return Precision(name="tf32", device="cuda", dtype=None, reason="FP32 with TF32 products")
    dtype = torch.bfloat16 if name == "bf16" else torch.float16
    return Precision(name=name, device="cuda", dtype=dtype, reason=f"{name} tensor cores of {torch.cuda.get_device_name()}")
