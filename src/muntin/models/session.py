"""TorchSession: a live PyTorch model in the face of a deployed one, so that both are measured by the same code.

Axes: B images, H W map, C channels, K scores.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from muntin.artifact import Signature
from muntin.runtime.session import check_images


class TorchSession:
    """Calls a model on `(B, H, W, C)` uint8 images, returns float32 scores; the reference beside every engine.

    `dtype`: what products run in (autocast), None for FP32. The model is used as it is and put in `eval` mode for each call.
    """

    engine = "pytorch eager"

    def __init__(self, model: nn.Module, signature: Signature, *, dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.signature = signature
        self.dtype = dtype
        first = next(iter(model.parameters()), None)
        self.device = torch.device("cpu") if first is None else first.device

    @property
    def precision(self) -> str:
        """What products run in."""
        return {None: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}.get(self.dtype, str(self.dtype))

    @property
    def threads(self) -> int:
        """Threads of PyTorch's own operators."""
        return torch.get_num_threads()

    def __call__(self, images_BHWC: NDArray[np.uint8], /) -> NDArray[np.float32]:
        check_images(images_BHWC, self.signature)
        self.model.eval()
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            images = torch.from_numpy(np.ascontiguousarray(images_BHWC)).to(self.device).permute(0, 3, 1, 2).to(torch.float32)
            scores: NDArray[np.float32] = self.model(images).float().cpu().numpy()
        return scores
