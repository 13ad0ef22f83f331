"""TorchSession: a live PyTorch model with the interface of a deployed one, so that the same code measures both.

Batches are copied asynchronously: the next one to the device, and scores back, during a computation. On a CPU nothing is copied.

    host              pageable -> pinned |  pageable -> pinned |  ...
    copy-in stream                       pinned -> device | ...
    compute stream                                         model | ...
    copy-out stream                                               device -> pinned | ...

Axes: B images, H W map, C channels, K scores.
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from muntin.artifact import Signature
from muntin.errors import DependencyError, MuntinError
from muntin.runtime.inputs import check_classes, check_images
from muntin.runtime.session import Labels, class_names

BUFFERS = 2
"""Batches in flight: one in computation, one in a copy."""


def require_compiler(device: str) -> None:
    """Raise `DependencyError` if `torch.compile` would find no C++ compiler."""
    if device != "cpu":
        return
    from torch._inductor import config  # importing it takes most of a second

    compiler = config.cpp.cxx  # the variable CXX, or PyTorch's own choice
    names = [compiler] if isinstance(compiler, str) else [name for name in compiler if name]
    if not any(shutil.which(name) for name in names):
        raise DependencyError(
            f"torch.compile needs a C++ compiler on CPUs and there is no {' or '.join(names)}: install it, or leave `compile` false"
        )


class TorchSession:
    """Calls a model on `(B, H, W, C)` uint8 images and returns float32 scores: the reference for every engine.

    `dtype`: type of products (autocast), None for FP32. `compile`: use `torch.compile`, a minute or more for each shape. The model is not
    copied or moved, runs in `eval` mode, and receives pixels in float32, or in the 16-bit type of all its weights. Raises `DependencyError`
    for `compile` without a compiler; a call raises `MuntinError` if the model returns no tensor.
    """

    streams = 1

    def __init__(self, model: nn.Module, signature: Signature, *, dtype: torch.dtype | None = None, compile: bool = False) -> None:
        self.model = model
        self.signature = signature
        self.dtype = dtype
        tensors = [*model.parameters(), *model.buffers()]  # a quantised model may have buffers alone
        self.device = tensors[0].device if tensors else torch.device("cpu")
        types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        self._pixels = types.pop() if types in ({torch.float16}, {torch.bfloat16}) else torch.float32
        if compile:
            require_compiler(self.device.type)
        self.compiled = compile
        self.engine = f"pytorch {'compile' if compile else 'eager'}{'' if self.device.type == 'cpu' else f' on {self.device.type}'}"
        self._forward: Callable[[Tensor], Tensor] = torch.compile(model) if compile else model

    @property
    def precision(self) -> str:
        """Type of products."""
        dtype = self._pixels if self.dtype is None else self.dtype
        return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, str(dtype))

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, by number."""
        return class_names(self.signature)

    @property
    def threads(self) -> int:
        """Threads of PyTorch's own operators."""
        return torch.get_num_threads()

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
        """Scores of one batch."""
        check_images(images_BHWC, self.signature)
        scores: NDArray[np.float32] = self._compute(torch.from_numpy(np.ascontiguousarray(images_BHWC)).to(self.device)).cpu().numpy()
        return scores

    def labels(self, images_BHWC: NDArray[np.uint8]) -> Labels:
        """The class of the highest score, computed on the model's device; see `Session.labels`."""
        if isinstance(images_BHWC, np.ndarray) and images_BHWC.ndim == 3:
            one: Labels = self.labels(images_BHWC[None])[0]
            return one
        check_images(images_BHWC, self.signature)
        check_classes(self.signature)
        scores_BK = self._compute(torch.from_numpy(np.ascontiguousarray(images_BHWC)).to(self.device))
        labels: Labels = scores_BK.argmax(1).to(torch.int32).cpu().numpy().astype(self.signature.label_type)
        return labels

    def map(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
        """Scores of each batch, in order; on a GPU the next batch is copied during the computation."""
        return pipelined(self._checked(batches), self._compute, self.device)

    def _checked(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
        for images_BHWC in batches:
            check_images(images_BHWC, self.signature)
            yield images_BHWC

    def _compute(self, images_BHWC: Tensor) -> Tensor:
        """Images on the device to scores on the device."""
        self.model.eval()
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            answer = self._forward(images_BHWC.permute(0, 3, 1, 2).to(self._pixels))
        if not isinstance(answer, Tensor):
            raise MuntinError(
                f"the model answers with a {type(answer).__name__}: wrap it in a module that returns the tensor of its scores"
            )
        return answer.float()


@dataclass(frozen=True)
class _Flight:
    """A batch in flight. `inward` is held until the answer arrives, because the copy to the device reads it."""

    inward: Tensor
    scores: Tensor
    done: Any

    def land(self) -> NDArray[np.float32]:
        self.done.synchronize()
        landed: NDArray[np.float32] = self.scores.numpy()
        return landed


def pipelined(
    batches: Iterable[NDArray[np.uint8]], compute: Callable[[Tensor], Tensor], device: torch.device
) -> Iterator[NDArray[np.float32]]:
    """The answers to batches (B, H, W, C), in order, each a new array; `compute` maps a tensor on the device to one on the device."""
    module = torch.get_device_module(device)
    streams = module.Stream(), module.Stream()
    flights: deque[_Flight] = deque()
    for images_BHWC in batches:
        flights.append(_launch(images_BHWC, compute, device, streams))
        if len(flights) >= BUFFERS:
            yield flights.popleft().land()
    while flights:
        yield flights.popleft().land()


def _launch(images_BHWC: NDArray[np.uint8], compute: Callable[[Tensor], Tensor], device: torch.device, streams: tuple[Any, Any]) -> _Flight:
    module = torch.get_device_module(device)
    (copy_in, copy_out), computing = streams, module.current_stream()
    inward = torch.from_numpy(np.ascontiguousarray(images_BHWC))
    apart = device.type != "cpu"
    if apart:
        inward = inward.pin_memory()
    with module.stream(copy_in):
        images = inward.to(device, non_blocking=True)
    computing.wait_stream(copy_in)
    scores = compute(images)
    copy_out.wait_stream(computing)
    with module.stream(copy_out):
        answer = torch.empty(scores.shape, dtype=scores.dtype, pin_memory=True).copy_(scores, non_blocking=True) if apart else scores
        done = module.Event()
        done.record(copy_out)
    if apart:  # the allocator must not reuse memory that another stream still reads
        images.record_stream(computing)
        scores.record_stream(copy_out)
    return _Flight(inward, answer, done)
