"""Options of a session: one checked value that goes unchanged from the command line to the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from muntin.errors import DataError
from muntin.runtime.host.hardware import physical_cores
from muntin.runtime.inputs import Dims, Shape, check_dims, check_shapes

EngineName = Literal["openvino", "onnxruntime", "onnxruntime-cuda", "onnxruntime-tensorrt"]
Precision = Literal["recorded", "f32", "bf16", "f16"]

DEFAULT_ENGINE: EngineName = "openvino"
MAX_THREADS = 4096
"""More than any machine has: engines accept any number, or report another error."""


def check_threads(threads: int | None) -> None:
    """Raises DataError unless `threads` is None (the usable physical cores) or from 1 to `MAX_THREADS`."""
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS):
        raise DataError(f"threads={threads!r}: give a whole number from 1 to {MAX_THREADS}, or None for the usable physical cores")


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """Options of a session. Raises DataError for a value that is not allowed.

    `engine`: an engine's name. `precision`: "recorded" (the precision of the manifest's figures, or f32 where the machine has no such
    kernels), "f32", "bf16" or "f16". `threads`: None for the usable physical cores. `streams`: number of calls that compute at the same
    time: 1 for the lowest latency, as many as threads for the most images a second (with `Session.map`). `shapes`: the (B, H, W) to
    compile for and to compute once when the session is opened; None: the manifest's `example`, (): nothing. `dims`: the same for a model
    with named tensors, as sizes of its free dimensions, `[{"batch": 8, "tokens": 128}]`. `dynamic` (OpenVINO only):
    True: sizes that are not in `shapes` are computed without compiling for them, which is slower, and no call waits for a compilation;
    False: the first call of a size compiles for it. `cache`: keep what the engine compiles in the user's cache, and read it from there.
    """

    engine: str = DEFAULT_ENGINE
    precision: str = "recorded"
    threads: int | None = None
    streams: int = 1
    shapes: tuple[Shape, ...] | None = None
    dims: tuple[Dims, ...] | None = None
    dynamic: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("engine", get_args(EngineName)), ("precision", get_args(Precision))):
            if getattr(self, name) not in allowed:
                raise DataError(f'{name}="{getattr(self, name)}": give one of {", ".join(allowed)}')
        check_threads(self.threads)
        if isinstance(self.streams, bool) or not isinstance(self.streams, int) or self.streams < 1:
            raise DataError(f"streams={self.streams!r}: give 1 for the lowest latency, more for several images at the same time")
        if self.shapes is not None:
            object.__setattr__(self, "shapes", check_shapes(self.shapes))  # JSON has lists
        if self.dims is not None:
            object.__setattr__(self, "dims", check_dims(self.dims))

    @property
    def thread_count(self) -> int:
        """Threads that the engine gets."""
        return self.threads or physical_cores()


DEFAULT_OPTIONS = SessionOptions()
