"""A checkpoint as a candidate of `muntin bench`, in PyTorch beside the deployed artefact."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from muntin.artifact import Signature
from muntin.compression import load_model
from muntin.deployment.checkpoint_export import SIZE_REASON, export_side
from muntin.models import TorchSession
from muntin.models.trusted_code import trust_model, trusted_models
from muntin.runtime.inputs import image_dims
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.cold_start import Candidate, ExampleInputs
from muntin.runtime.profiling.timing import Mapper
from muntin.training import Checkpoint, read_checkpoint
from muntin.training.checkpoint import source_of


def checkpoint_session(checkpoint: Checkpoint, *, compile: bool = False, device: str | None = None) -> TorchSession:
    """Return a checkpoint's model in FP32 as a session on a device (None: the best one), compressed or not.

    A quantised checkpoint runs as the simulation of training, slower than the model in floats, which the session's `engine` says.
    """
    session = TorchSession(load_model(checkpoint).to(device or _best_device()), checkpoint.signature, compile=compile)
    if checkpoint.quantized:
        session.engine += ", simulating integers"
    return session


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class CheckpointCandidate(Candidate):
    """A run's folder or a checkpoint, in PyTorch FP32 with one stream. `compile`: by `torch.compile`. `device`: None for the best one."""

    compile: bool = False
    device: str | None = None
    trusted: tuple[str, ...] = field(default_factory=trusted_models)

    @property
    def signature(self) -> Signature:
        return read_checkpoint(self.path).signature

    def example(self) -> ExampleInputs:
        """Images of the training split; raises `DataError` where the data are gone."""
        checkpoint = read_checkpoint(self.path)
        side = export_side(checkpoint.recipe)
        image_HWC = source_of(checkpoint).split("train")[0].corner
        return ExampleInputs(inputs={"images": image_HWC[None]}, dims=dict(image_dims((1, side, side))), reason=SIZE_REASON)

    def prepare(self) -> None:
        # The first convolution loads PyTorch's kernel libraries and sets up a GPU.
        torch.nn.Conv2d(1, 1, 1, device=(device := self.device or _best_device()))(torch.zeros(1, 1, 1, 1, device=device))

    def open(self, options: SessionOptions) -> Mapper:
        for name in self.trusted:  # in the process that measures loading
            trust_model(name)
        torch.set_num_threads(options.thread_count)
        session = checkpoint_session(read_checkpoint(self.path), compile=self.compile, device=self.device)
        for shape in options.shapes or ():
            session(np.zeros((*shape, session.signature.channels), np.uint8))
        return session
