"""TorchSession: a live PyTorch model in the face of a deployed one, so that both are measured by the same code.

Axes: B images, H W map, C channels, K scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from muntin.artifact import Signature
from muntin.errors import MuntinError
from muntin.models.compiler import require_compiler
from muntin.models.transfer import pipelined
from muntin.runtime.session import check_classes, check_images


class TorchSession:
    """Calls a model on `(B, H, W, C)` uint8 images, returns float32 scores; the reference beside every engine.

    `dtype`: what products run in (autocast), None for FP32. `compile`: by `torch.compile`, at the first call of each shape (a minute
    or more). The model is used as it is, on the device where it is, in `eval` mode; pixels are given to it in float32, or in the 16 bits
    that all of its weights have. Raises `DependencyError` for `compile` without a compiler; a call raises `MuntinError` where the model
    answers no tensor.
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
        """What products run in."""
        dtype = self._pixels if self.dtype is None else self.dtype
        return {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, str(dtype))

    @property
    def threads(self) -> int:
        """Threads of PyTorch's own operators."""
        return torch.get_num_threads()

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
        """Scores of one batch."""
        check_images(images_BHWC, self.signature)
        scores: NDArray[np.float32] = self._compute(torch.from_numpy(np.ascontiguousarray(images_BHWC)).to(self.device)).cpu().numpy()
        return scores

    def labels(self, images_BHWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The class of the highest score, found where the model is, as of a deployed session (`Session.labels`)."""
        check_images(images_BHWC, self.signature)
        check_classes(self.signature)
        scores_BK = self._compute(torch.from_numpy(np.ascontiguousarray(images_BHWC)).to(self.device))
        labels: NDArray[np.uint8] = scores_BK.argmax(1).to(torch.uint8).cpu().numpy()
        return labels

    def map(self, batches: Iterable[NDArray[np.uint8]]) -> Iterator[NDArray[np.float32]]:
        """Scores of each batch, in their order; on a GPU the next batch is read and copied while this one is computed."""
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
