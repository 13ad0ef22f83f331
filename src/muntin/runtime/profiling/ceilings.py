"""Measures how fast this machine multiplies and copies: the ceilings of the roofline model (Williams et al., 2009).

OpenVINO's kernels, on which artefacts run, compute graphs of two equal products in sequence:

    x (side, side) @ w (side, side) @ w            a Linear of many tokens
    x (1, 256, side, side) * w (256, 256, 3, 3) * w   a convolution of many channels

The second product reads the first one's output in bfloat16 or uint8, as inside a model. Only the kernels that multiply are timed, by
the engine; the fastest product counts. A product that did not run in the requested precision is ignored: a precision that the CPU lacks is
absent, never emulated.
"""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from muntin.errors import DataError
from muntin.runtime.engines.openvino.compiled import capabilities, executed_products
from muntin.runtime.host.hardware import last_level_cache, memory_gib, physical_cores
from muntin.runtime.host.quiet_imports import openvino
from muntin.runtime.host.signal_stack import signal_stack_kept
from muntin.runtime.options import check_threads
from muntin.runtime.profiling.contention import watch_cpu
from muntin.runtime.profiling.kernels import Ceilings
from muntin.runtime.verification.exactness import serialised

Kind = Literal["MatMul", "Conv"]

# Precision -> the CPU's capability, OpenVINO's hint, and OpenVINO's names of the precision that a product then runs in
PRODUCT_PRECISIONS: dict[str, tuple[str, str, frozenset[str]]] = {
    "f32": ("FP32", "f32", frozenset({"f32"})),
    "bf16": ("BF16", "bf16", frozenset({"bf16"})),
    "f16": ("FP16", "f16", frozenset({"f16"})),
    "i8": ("INT8", "f32", frozenset({"u8", "i8"})),
}
_CHANNELS = 256
_REPEATS = 3
_COPY_ROUNDS = 4
_BLOCK = 8
"""Minimum number of calls whose mean counts as one run."""


@signal_stack_kept()
def measure_ceilings(*, threads: int | None = None, seconds: float = 1.0) -> Ceilings:
    """Measures every precision that the CPU has, and the copy: the best of repeated runs after a warm-up.

    A median would be lower on a busy machine, and a layer that is measured in a quiet moment would exceed it.

    `threads`: None for the usable physical cores. Takes about `seconds` for each precision and for the copy, and half a second for each
    compilation; a few hundred megabytes of memory, at most an eighth of the machine's. Raises DataError for a number of threads or seconds
    that is not positive, ModuleNotFoundError where OpenVINO is not installed.
    """
    check_threads(threads)
    if not seconds > 0:
        raise DataError(f"seconds={seconds!r}: give a positive number")
    threads = threads or physical_cores()
    with watch_cpu() as watch:
        core = openvino.Core()
        available = capabilities(core)
        rates = {
            precision: [measure_product(core, kind, precision, threads=threads, seconds=seconds / 2) for kind in ("MatMul", "Conv")]
            for precision, (capability, _, _) in PRODUCT_PRECISIONS.items()
            if capability in available
        }
        copy_gb_s = measure_copy(threads, seconds)
    gmacs = {precision: max(measured) for precision, kinds in rates.items() if (measured := [rate for rate in kinds if rate is not None])}
    return Ceilings(gmacs=gmacs, copy_gb_s=copy_gb_s, threads=threads, others=watch.others)


@signal_stack_kept()
def measure_product(core: Any, kind: Kind, precision: str, *, threads: int, seconds: float) -> float | None:
    """1e9 multiply-adds a second of the faster of two products; None without kernels for the precision.

    `core`: an `openvino.Core`. Runs for `seconds`, and at least three times.
    """
    _, hint, names = PRODUCT_PRECISIONS[precision]
    cores = min(threads, physical_cores())  # every core gets milliseconds of work, and a slow one a second of repeats
    side = (1 if cores <= 4 else 2 if cores <= 32 else 4) * (1024 if kind == "MatMul" else 64)
    options = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "PERF_COUNT": True}
    model = core.read_model(model=product_graph(kind, side, integer=precision == "i8"), weights=b"")
    try:
        compiled = core.compile_model(model, "CPU", options)
    except RuntimeError:  # ONEDNN_MAX_CPU_ISA may disable the kernels of a capability
        return None
    ran = {name for name, ran_in in executed_products(compiled.get_runtime_model()).items() if ran_in in names}
    if not ran:
        return None
    request = compiled.create_infer_request()
    x = np.random.default_rng(0).standard_normal(compiled.input(0).shape, np.float32)
    request.infer([x], share_inputs=True, share_outputs=True)  # the first call packs the weights
    # The engine's counter is the mean over all calls so far, in whole microseconds: a block's time is the difference of two sums.
    before, best, calls = _counted(request, x, ran, 1), dict.fromkeys(ran, float("inf")), 2
    start, blocks = time.perf_counter(), 0
    while time.perf_counter() - start < seconds or blocks < _REPEATS:
        block = max(_BLOCK, calls // 4)  # a mean is rounded by up to 1 us, so a block's error grows with the number of earlier calls
        after = _counted(request, x, ran, block)
        for name in ran:
            best[name] = min(best[name], (after[name] * (calls + block) - before[name] * calls) / block)
        before, calls, blocks = after, calls + block, blocks + 1
    macs = side**3 if kind == "MatMul" else side**2 * _CHANNELS**2 * 9
    return max(macs / max(seconds, 1e-6) / 1e9 for seconds in best.values())


def _counted(request: Any, x: NDArray[np.float32], names: set[str], calls: int) -> dict[str, float]:
    """The kernels' counters, in seconds, after `calls` more calls."""
    for _ in range(calls):
        request.infer([x], share_inputs=True, share_outputs=True)
    return {node.node_name: node.real_time.total_seconds() for node in request.get_profiling_info() if node.node_name in names}


def product_graph(kind: Kind, side: int, *, integer: bool) -> bytes:
    """A serialised ONNX model of two products with the same weights, float32 in and out, all sizes static; `integer`: in QDQ form.

    The weights' scale keeps the values' size from one product to the next.
    """
    shape: tuple[int, ...] = (side, side) if kind == "MatMul" else (1, _CHANNELS, side, side)
    weight_shape = (side, side) if kind == "MatMul" else (_CHANNELS, _CHANNELS, 3, 3)
    axis, inputs = (1, side) if kind == "MatMul" else (0, 9 * _CHANNELS)
    generator = np.random.default_rng(1)
    nodes, x = [], "x"
    constants: dict[str, NDArray[Any]] = {}
    if integer:
        constants["weight"] = generator.integers(-127, 128, weight_shape, np.int8)
        constants["weight_scale"] = np.full(weight_shape[axis], 1 / (73 * inputs**0.5), np.float32)  # 73: their standard deviation
        constants["weight_zero"] = np.zeros(weight_shape[axis], np.int8)
        constants["scale"], constants["zero"] = np.array(4 / 128, np.float32), np.array(128, np.uint8)
        nodes.append(helper.make_node("DequantizeLinear", ["weight", "weight_scale", "weight_zero"], ["w"], axis=axis))
    else:
        constants["w"] = generator.standard_normal(weight_shape, np.float32) / np.float32(inputs**0.5)
    for step in ("first", "second"):
        if integer:
            nodes.append(helper.make_node("QuantizeLinear", [x, "scale", "zero"], [f"{step}_q"]))
            nodes.append(helper.make_node("DequantizeLinear", [f"{step}_q", "scale", "zero"], [f"{step}_dq"]))
            x = f"{step}_dq"
        pads = {"pads": [1, 1, 1, 1]} if kind == "Conv" else {}
        nodes.append(helper.make_node(kind, [x, "w"], [step], name=step, **pads))
        x = step
    return serialised(nodes, constants, shape, shape)


def measure_copy(threads: int, seconds: float) -> float:
    """1e9 bytes a second, read and written, that `threads` threads copy together, each its part of an array far larger than the caches.

    Counted as in the STREAM benchmark: the best of `_COPY_ROUNDS` rounds, which share `seconds`, without the cache's reads before writes.
    """
    size, barrier = _copy_bytes() // threads, Barrier(threads)
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(_copy, size, barrier, seconds / _COPY_ROUNDS) for _ in range(threads)]
    for failure in (future.exception() for future in futures):
        if failure is not None and not isinstance(failure, BrokenBarrierError):
            raise failure
    return max(map(sum, zip(*(future.result() for future in futures), strict=True))) / 1e9


def _copy(size: int, barrier: Barrier, seconds: float) -> list[float]:
    """Bytes a second of one thread in each round. It writes its arrays first, so that they lie in the memory next to its core."""
    try:
        source, target, rates = np.full(size, 1, np.uint8), np.full(size, 2, np.uint8), []
        for _ in range(_COPY_ROUNDS):
            barrier.wait()
            start, copies = time.perf_counter(), 0
            while copies == 0 or time.perf_counter() - start < seconds:
                np.copyto(target, source)
                copies += 1
            rates.append(2 * size * copies / (time.perf_counter() - start))
    except BaseException:
        barrier.abort()
        raise
    return rates


def _copy_bytes() -> int:
    """Bytes of one array: together the two are four times the caches, and at most an eighth of the memory."""
    size = max(128 << 20, 2 * (last_level_cache() or 0))
    memory = memory_gib()
    return size if memory is None else min(size, int(memory * 2**30) // 16)
