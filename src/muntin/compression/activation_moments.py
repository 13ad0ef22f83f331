"""Statistics of layers on calibration images: moments of their inputs, and the sensitivity of the model's answer to their outputs.

Moments take O(C²) of memory a layer; the sensitivity takes the memory of training on one batch.

Axes: N rows (tokens, positions of a map), I input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from muntin.compression.calibration import not_finite
from muntin.errors import MuntinError
from muntin.models.eager import ModelInputs, batch_rows, call, run, tensors_of

POSITIONS = 65_536
"""Maximum number of rows of one call that enter a moment; of more, every n-th is taken."""
CHUNK = 8_192
"""Rows in float64 at a time."""
SEED = 0
"""Seed of the random directions."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Moments of one layer's input over the calibration images."""

    matrix: Tensor
    """Uncentred second moment, the mean of x·xᵀ over rows: float64 `(I, I)`, on the CPU."""
    mean: Tensor
    """Mean over rows: float64 `(I,)`."""
    fourth: float
    """Mean over rows of the fourth power of the distance to the mean."""
    rows: int
    """Rows that were read."""
    positions: float
    """Rows of the output an image (tokens, or positions of its map), summed over all calls of the layer."""

    def shrunk(self) -> Tensor:
        """An estimate of the second moment for other images, `(I, I)`.

        The covariance is shrunk towards the multiple of the identity that has its trace, the more the fewer rows there are for the
        channels. Source: Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices (2004), section 3.2.
        Deviation: the mean, 0 in the source, is subtracted before. Rows of one image are counted as independent.
        """
        spread_II = self.matrix - torch.outer(self.mean, self.mean)
        square, level = float(spread_II.square().sum()), float(spread_II.diagonal().mean())
        dispersion = square - len(spread_II) * level**2
        share = min(1.0, (self.fourth - square) / self.rows / dispersion) if dispersion > 0 else 1.0
        return self.matrix - share * spread_II + share * level * torch.eye(len(spread_II), dtype=self.matrix.dtype)


class _MomentSum:
    def __init__(self, channels: int) -> None:
        self.total_II = torch.zeros(channels, channels, dtype=torch.float64)
        self.total_I = torch.zeros(channels, dtype=torch.float64)
        self.cubes_I = torch.zeros(channels, dtype=torch.float64)
        self.fourths = 0.0
        self.rows = 0
        self.positions = 0

    def add(self, rows_NI: Tensor, positions: int) -> None:
        step = -(-len(rows_NI) // POSITIONS) | 1  # odd, so that the columns differ on maps of even width
        sums = (self.total_II, self.total_I, self.cubes_I)
        total_II, total_I, cubes_I = (torch.zeros_like(total, device=rows_NI.device) for total in sums)
        for part_NI in torch.split(rows_NI[::step], CHUNK):
            wide_NI = part_NI.double()
            total_II += wide_NI.T @ wide_NI
            squares_N = wide_NI.square().sum(1)
            total_I += wide_NI.sum(0)
            cubes_I += squares_N @ wide_NI
            self.fourths += float(squares_N.square().sum())
        if not torch.isfinite(total_II).all():
            raise ValueError("the activation holds NaN or infinity")
        self.total_II += total_II.cpu()
        self.total_I += total_I.cpu()
        self.cubes_I += cubes_I.cpu()
        self.rows += len(rows_NI[::step])
        self.positions += positions

    def moment(self, images: int) -> Moment:
        matrix_II, mean_I = self.total_II / self.rows, self.total_I / self.rows
        mean_square = float(mean_I.square().sum())
        correction = 4 * mean_I @ (matrix_II @ mean_I - self.cubes_I / self.rows) + 2 * mean_square * matrix_II.trace() - 3 * mean_square**2
        fourth = max(0.0, self.fourths / self.rows + float(correction))  # of x - mean, expanded
        return Moment(matrix=matrix_II, mean=mean_I, fourth=fourth, rows=self.rows, positions=self.positions / images)


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's input as rows of channels. A strided 1x1 convolution reads only some positions; larger kernels read all of them."""
    if isinstance(layer, nn.Conv2d):
        if layer.kernel_size == (1, 1):
            x = x[..., :: layer.stride[0], :: layer.stride[1]]
        x = x.movedim(-3, -1)
    return x.reshape(-1, x.shape[-1])


def input_moments(model: nn.Module, batches: Sequence[ModelInputs], layers: Mapping[str, nn.Module]) -> dict[str, Moment]:
    """The moments of the inputs of `layers` (Linear and ungrouped Conv2d, by dotted name).

    Costs one forward pass and I² multiply-adds a row, at most `POSITIONS` rows a call, summed in float64. A convolution's moment is over
    its input channels at every position, without its zero padding. Layers that no image reached are absent. The model runs in its current
    mode: call `eval()` first. Raises `MuntinError` on NaN or infinity.
    """
    sums: dict[str, _MomentSum] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def watch(layer: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any], output: Tensor) -> None:
            x: Tensor = inputs[0] if inputs else named_inputs["input"]
            rows_NI = _rows(layer, x.detach())
            if not len(rows_NI):
                return
            channels = output.shape[-3] if isinstance(layer, nn.Conv2d) else output.shape[-1]
            try:
                sums.setdefault(name, _MomentSum(rows_NI.shape[1])).add(rows_NI, output.numel() // channels)
            except ValueError as error:
                raise not_finite(name, error) from error

        return watch

    run(model, batches, [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()])
    images = sum(map(batch_rows, batches))
    return {name: total.moment(images) for name, total in sums.items()}


def answer_sensitivity(model: nn.Module, batches: Sequence[ModelInputs], layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """Sensitivity of the model's answer to an error in the output of each of `layers`. Needs no labels, so it works for any task.

    The value is the mean over output elements y of (∂⟨s, ε⟩/∂y)², with scores s and ε ~ N(0, 1) (Hutchinson's estimate of the squared
    Jacobian's trace), over the variance of the scores (1 for constant scores) and their number an image. Times the squared error of an
    output element and the number of elements an image, it is about the noise over signal of the answer. 0 for a layer without calls.

    Costs one forward and one backward pass. The model runs in `eval` mode; modes, `requires_grad` flags, `.grad` and the global random
    state are restored. Of an answer of any structure, the tensors of floats with a gradient count. Raises `MuntinError` if there is none,
    or one is not finite.
    """
    if not layers:
        return {}
    squares, counts = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0)
    sums = np.zeros(3)  # of the scores: their number, sum and sum of squares
    generator = torch.Generator().manual_seed(SEED)
    probes: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def probe(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)  # a leaf with the output's gradient, also before in-place operations
            probes.append((name, zero))
            return output + zero

        return probe

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with _evaluating(model), torch.inference_mode(False), torch.enable_grad():
            for batch in batches:
                probes.clear()
                answer = _checked_answer(call(model, copied(batch)))
                wide = answer.detach().double()
                sums += wide.numel(), float(wide.sum()), float(wide.square().sum())
                direction = torch.randn(answer.shape, generator=generator).to(answer.device, answer.dtype)
                forward = list(probes)  # activation checkpointing calls the hooks again during the backward pass
                gradients = torch.autograd.grad((answer * direction).sum(), [zero for _, zero in forward], allow_unused=True)
                for (name, zero), gradient in zip(forward, gradients, strict=True):
                    counts[name] += zero.numel()
                    squares[name] += 0.0 if gradient is None else float(gradient.double().square().sum())
    finally:
        for handle in handles:
            handle.remove()
    images = sum(map(batch_rows, batches))
    sensitivity = {name: squares[name] / max(counts[name], 1) / _variance(*sums) / (sums[0] / images) for name in layers}
    for name, value in sensitivity.items():
        if not value < float("inf"):  # also catches NaN
            raise MuntinError(
                f"calibration: the gradient at the output of layer '{name}' is NaN or infinity: check the weights and the images"
            )
    return sensitivity


def _variance(count: float, total: float, squares: float) -> float:
    """Variance from a number of values, their sum and the sum of their squares; 1 for constant values."""
    mean = total / count
    variance = squares / count - mean**2
    return variance if variance > 1e-12 * mean**2 else 1.0  # below: rounding


def _checked_answer(answer: Any) -> Tensor:
    tensors = tensors_of(answer)
    if not tensors:
        raise MuntinError(f"the model answers with a {type(answer).__name__}: wrap it in a module that returns the tensor of its scores")
    if not all(torch.isfinite(tensor).all() for tensor in tensors):
        raise MuntinError("calibration: the model's answer holds NaN or infinity: check the weights and the images")
    smooth = [tensor for tensor in tensors if tensor.requires_grad]
    if not smooth:
        raise MuntinError(
            "the model's answer depends smoothly on none of its Linear and Conv2d layers (labels, detached?): make it return scores"
        )
    return smooth[0] if len(smooth) == 1 else torch.cat([tensor.flatten() for tensor in smooth])


def copied(batch: ModelInputs) -> ModelInputs:
    """A batch of copies of the tensors, for a model that may write into its inputs."""
    copies: ModelInputs = _pytree.tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, batch)
    return copies


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """`eval` mode without gradients for parameters during the block; restores all modes and flags."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval()
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
