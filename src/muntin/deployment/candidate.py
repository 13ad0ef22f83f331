"""A run or one of its checkpoints as a candidate of `muntin.runtime.profiling.bench`: the live PyTorch model beside what is deployed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from muntin.deployment.live import best_device, checkpoint_session
from muntin.runtime.options import SessionOptions
from muntin.runtime.profiling.cold_start import Candidate
from muntin.runtime.profiling.timing import Mapper
from muntin.training import read_checkpoint


@dataclass(frozen=True, kw_only=True)
class CheckpointCandidate(Candidate):
    """A run's folder or a checkpoint, in PyTorch FP32 on the best device there is. It has one stream. `compile`: by `torch.compile`."""

    compile: bool = False

    def prepare(self) -> None:
        # PyTorch's kernels have libraries of their own, loaded when first used, and a GPU what has to be set up once a process.
        torch.nn.Conv2d(1, 1, 1, device=(device := best_device()))(torch.zeros(1, 1, 1, 1, device=device))

    def open(self, options: SessionOptions) -> Mapper:
        torch.set_num_threads(options.thread_count)
        session = checkpoint_session(read_checkpoint(self.path), compile=self.compile)
        for shape in options.shapes or ():
            session(np.zeros((*shape, session.signature.channels), np.uint8))
        return session
