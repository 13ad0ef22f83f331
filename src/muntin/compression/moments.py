"""What calibration images tell of a layer: which inputs it sees, and how much the model's answer listens to its output.

Both are streamed over the batches. Moments take O(C²) a layer, whatever the number of images; the answer's sensitivity what training on
one batch takes, all activations of its images.

Axes: N rows (tokens, positions of a map), I input channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from muntin.compression.calibration import as_input
from muntin.errors import MuntinError

POSITIONS = 65_536
"""Most rows of one call that enter a moment; of more, every n-th is taken."""
CHUNK = 8_192
"""Rows that are held in float64 at a time."""
SEED = 0
"""Of the random directions in which the answer is probed."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """What one layer saw of the calibration images."""

    matrix: Tensor
    """Uncentred second moment of the input, the mean of x·xᵀ over rows: float64 `(I, I)`, on the CPU."""
    mean: Tensor
    """Of the input over rows: float64 `(I,)`."""
    fourth: float
    """Mean over rows of the fourth power of their distance to the mean."""
    rows: int
    """Rows that were read."""
    positions: float
    """Rows of the output an image: tokens, or positions of its map, all calls of the layer together."""

    def shrunk(self) -> Tensor:
        """The second moment that is to be expected of other images, `(I, I)`: what few rows have not shown is not taken for nothing.

        The covariance is drawn towards the multiple of the identity that has its trace, the further the fewer rows there are for their
        channels. Source: Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance matrices (2004), section 3.2.
        Deviation: the mean, which they take to be 0, is taken out before and stays: left in, it is a direction that all rows agree on, and
        next to nothing is shrunk. Rows of one image are alike, and count as if they were not: of maps too little is shrunk, if anything.
        """
        spread_II = self.matrix - torch.outer(self.mean, self.mean)
        square, level = float(spread_II.square().sum()), float(spread_II.diagonal().mean())
        unlike = square - len(spread_II) * level**2
        share = min(1.0, (self.fourth - square) / self.rows / unlike) if unlike > 0 else 1.0
        return self.matrix - share * spread_II + share * level * torch.eye(len(spread_II), dtype=self.matrix.dtype)


class _Sum:
    def __init__(self, channels: int) -> None:
        self.total_II = torch.zeros(channels, channels, dtype=torch.float64)
        self.total_I = torch.zeros(channels, dtype=torch.float64)
        self.cubes_I = torch.zeros(channels, dtype=torch.float64)
        self.fourths = 0.0
        self.rows = 0
        self.positions = 0

    def add(self, rows_NI: Tensor, positions: int) -> None:
        step = -(-len(rows_NI) // POSITIONS) | 1  # odd, so that maps of even width are not always read at the same columns
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
        far = float(mean_I.square().sum())
        around = 4 * mean_I @ (matrix_II @ mean_I - self.cubes_I / self.rows) + 2 * far * matrix_II.trace() - 3 * far**2
        fourth = max(0.0, self.fourths / self.rows + float(around))  # of x - mean, multiplied out
        return Moment(matrix=matrix_II, mean=mean_I, fourth=fourth, rows=self.rows, positions=self.positions / images)


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer's input as rows of channels. A strided 1x1 convolution reads only some positions; larger kernels read all of them."""
    if isinstance(layer, nn.Conv2d):
        if layer.kernel_size == (1, 1):
            x = x[..., :: layer.stride[0], :: layer.stride[1]]
        x = x.movedim(-3, -1)
    return x.reshape(-1, x.shape[-1])


def input_moments(model: nn.Module, batches: Sequence[Tensor], layers: Mapping[str, nn.Module]) -> dict[str, Moment]:
    """The uncentred second moment of the inputs of `layers` (Linear and ungrouped Conv2d, by dotted name).

    Costs one forward pass and I² multiply-adds a row, at most `POSITIONS` rows a call, summed in float64. `batches`: the model's inputs,
    any integer or float type. A convolution's moment is over its input channels at every position, without its zero padding.
    Layers that no image reached are absent. The model runs as it is: call `eval()` first. Raises `MuntinError` on NaN or infinity.
    """
    sums: dict[str, _Sum] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Tensor], None]:
        def watch(layer: nn.Module, inputs: tuple[Any, ...], named_inputs: dict[str, Any], output: Tensor) -> None:
            x: Tensor = inputs[0] if inputs else named_inputs["input"]
            rows_NI = _rows(layer, x.detach())
            if not len(rows_NI):
                return
            channels = output.shape[-3] if isinstance(layer, nn.Conv2d) else output.shape[-1]
            try:
                sums.setdefault(name, _Sum(rows_NI.shape[1])).add(rows_NI, output.numel() // channels)
            except ValueError as error:
                raise MuntinError(f"calibration: {error} at the input of layer '{name}': check the weights and the images") from error

        return watch

    handles = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        with torch.no_grad():  # as in `watch_inputs`
            for batch in batches:
                model(as_input(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    images = sum(len(batch) for batch in batches)
    return {name: seen.moment(images) for name, seen in sums.items()}


def answer_sensitivity(model: nn.Module, batches: Sequence[Tensor], layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """How far the model's answer moves when the output of each of `layers` moves: needs no labels, so it works for any task.

    A layer's value, times the squared error that a pass puts on one of its output elements, times the number of these elements an
    image, is about the mean squared error of the scores over their variance: noise over signal of the answer. Precisely: the mean over
    output elements y of (∂⟨s, ε⟩/∂y)², with scores s and ε ~ N(0, 1) (Hutchinson's estimate of the squared Jacobian's trace), over the
    variance of the scores and their number an image. Scores that are all the same count as of variance 1. A layer that no image
    reached has 0.

    Costs one forward and one backward pass over the `batches`. The model runs in `eval` mode; modes, `requires_grad` flags, `.grad` and
    the global random state are left as they were. Raises `MuntinError` where the answer is no tensor, is not finite or depends
    on none of the layers.
    """
    if not layers:
        return {}
    squares, counts = dict.fromkeys(layers, 0.0), dict.fromkeys(layers, 0)
    scores = _Scores()
    generator = torch.Generator().manual_seed(SEED)
    probes: list[tuple[str, Tensor]] = []

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def probe(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            zero = torch.zeros_like(output, requires_grad=True)  # a leaf: its gradient is the output's, in-place operations behind or not
            probes.append((name, zero))
            return output + zero

        return probe

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        with _evaluating(model), torch.inference_mode(False), torch.enable_grad():
            for batch in batches:
                probes.clear()
                answer = _checked_answer(model(as_input(model, batch.clone())))
                scores.add(answer)
                direction = torch.randn(answer.shape, generator=generator).to(answer.device, answer.dtype)
                asked = list(probes)  # a model that checkpoints activations computes them, and calls the hooks, again for the gradient
                gradients = torch.autograd.grad((answer * direction).sum(), [zero for _, zero in asked], allow_unused=True)
                for (name, zero), gradient in zip(asked, gradients, strict=True):
                    counts[name] += zero.numel()
                    squares[name] += 0.0 if gradient is None else float(gradient.double().square().sum())
    finally:
        for handle in handles:
            handle.remove()
    images = sum(len(batch) for batch in batches)
    found = {name: squares[name] / max(counts[name], 1) / scores.variance() / (scores.count / images) for name in layers}
    for name, value in found.items():
        if not value < float("inf"):  # NaN fails every comparison
            raise MuntinError(
                f"calibration: the gradient at the output of layer '{name}' is NaN or infinity: check the weights and the images"
            )
    return found


class _Scores:
    """Variance of all scores of all batches."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.squares = 0.0

    def add(self, answer: Tensor) -> None:
        wide = answer.detach().double()
        self.count += wide.numel()
        self.total += float(wide.sum())
        self.squares += float(wide.square().sum())

    def variance(self) -> float:
        mean = self.total / self.count
        variance = self.squares / self.count - mean**2
        return variance if variance > 1e-12 * mean**2 else 1.0  # below: rounding of scores that are all the same


def _checked_answer(answer: Any) -> Tensor:
    if not isinstance(answer, Tensor):
        raise MuntinError(f"the model answers with a {type(answer).__name__}: wrap it in a module that returns the tensor of its scores")
    if not torch.isfinite(answer).all():
        raise MuntinError("calibration: the model's answer holds NaN or infinity: check the weights and the images")
    if not answer.requires_grad:
        raise MuntinError(
            "the model's answer depends smoothly on none of its Linear and Conv2d layers (labels, detached?): make it return scores"
        )
    return answer


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """`eval` mode and no gradients for parameters, then everything as it was."""
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
