"""Rounding one layer's weight so that its outputs change least on calibration inputs.

    moments of the inputs -> least squares weight for rounded inputs -> rounding column by column -> bias

Source: GPTQ (Frantar et al., 2210.17323, sections 3.1 and 3.3, with the order of its code's `actorder`), and the asymmetric target of
GPTAQ (Li et al., 2504.02692): the outputs to be met are those of the float layer for the inputs of the float model. Deviations:
convolutions by patches, groups and depthwise ones as many small layers, and moments about the mean where a bias takes over its error.

Axes: G groups, O outputs and I inputs of a group, N rows (tokens, positions of a map).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's usual name

from muntin.compression.quantization.fake_quantization import weight_limit
from muntin.compression.quantization.qat import QATConv2d, QATLinear
from muntin.compression.sparsity.pattern import held_places

ROWS, VALUES = 8192, 2**22
"""Approximate maximum number of rows of one batch that enter a moment, and of their values; of more rows, every n-th is taken."""
DAMPING = 0.1
"""Added to the diagonal of a second moment, a share of its mean: inputs that hardly vary do not take over others' errors."""
SPARSE = 0.1
"""Added to `DAMPING`, times inputs over rows: few rows do not determine a moment."""
CANCELLED = 1e-3
"""Least spread of the inputs of a group, a share of their second moment: less is rounding of the sums, as of inputs that hardly vary."""
MAX_INPUTS = 8192
"""Maximum number of inputs of an output: of more, the moment takes too much memory."""
COLUMNS = 64
"""Columns that are rounded before their errors are passed on to the others."""
Layer = QATLinear | QATConv2d


@dataclass
class Moments:
    """Sums over the rows of a layer's rounded inputs x, and of the float model's inputs y at the same places; float64.

    `x`, `y`: (G, I). `xx`, and `yx`, the sum of (y - x) xᵀ: (G, I, I).
    """

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    yx: Tensor

    def centred(self, *, mean: bool) -> tuple[Tensor, Tensor]:
        """The second moments x xᵀ and (y - x) xᵀ, about the means if `mean`."""
        xx_GII, yx_GII = self.xx / self.count, self.yx / self.count
        if mean:
            x_GI, y_GI = self.x / self.count, self.y / self.count
            xx_GII = xx_GII - x_GI[:, :, None] * x_GI[:, None, :]
            yx_GII = yx_GII - (y_GI - x_GI)[:, :, None] * x_GI[:, None, :]
        return xx_GII, yx_GII


def add_rows(moments: Moments | None, layer: Layer, x: Tensor, y: Tensor) -> Moments:
    """Add a batch: a layer's input, which is rounded here, and the float model's."""
    x_GNI, y_GNI = (layer_rows(layer.shape_of[0], rows.float()) for rows in (layer.input(x), y))
    count, width = x_GNI.shape[1:]
    if moments is None:
        zeros = torch.zeros(layer.groups, width, dtype=torch.float64, device=x.device)
        squares = torch.zeros(layer.groups, width, width, dtype=torch.float64, device=x.device)
        moments = Moments(0, zeros, zeros.clone(), squares, squares.clone())
    moments.count += count
    moments.x += x_GNI.sum(1, dtype=torch.float64)
    moments.y += y_GNI.sum(1, dtype=torch.float64)
    moments.xx += (x_GNI.transpose(1, 2) @ x_GNI).double()
    moments.yx += ((y_GNI - x_GNI).transpose(1, 2) @ x_GNI).double()
    return moments


def inputs_of_an_output(layer: Layer | nn.Linear | nn.Conv2d) -> int:
    """Number of inputs that one output value is made of."""
    return layer.weight[0].numel()


def layer_rows(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """The inputs of output values, (G, N, I), of a layer for its input. At most about `ROWS` rows."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    most = max(1, min(ROWS, VALUES // (groups * inputs_of_an_output(layer))))
    if isinstance(layer, nn.Linear):
        x_NI = x.reshape(-1, x.shape[-1])
        return x_NI[None, :: -(-len(x_NI) // most)]
    assert not isinstance(layer.padding, str)
    x = x.reshape(-1, *x.shape[-3:])
    step = max(1, round((x.shape[0] * x.shape[2] * x.shape[3] / (layer.stride[0] * layer.stride[1]) / most) ** 0.5))
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, tuple(s * step for s in layer.stride))  # (B, C·k², positions)
    B, width, positions = patches.shape
    return patches.reshape(B, groups, width // groups, positions).permute(1, 0, 3, 2).reshape(groups, B * positions, -1)


@torch.no_grad()
def round_layer(layer: Layer, moments: Moments) -> float:
    """Move a layer's weight to values whose nearest rounding gives outputs near the float layer's, in place.

    The bias takes over the mean error. The zeros of a pattern stay. Returns the mean squared error of the outputs, as a share of nearest
    rounding's.
    """
    groups = layer.groups
    limit = weight_limit(layer.bits)
    mean = layer.bias is not None
    weight_GOI = layer.weight.detach().double().reshape(groups, -1, inputs_of_an_output(layer))
    scale_GO1 = layer.log_scale.detach().exp().double().reshape(groups, -1, 1)
    rounded_GOI = (weight_GOI / scale_GO1).round().clamp_(-limit, limit) * scale_GO1
    share = 1.0
    xx_GII, yx_GII = moments.centred(mean=mean)
    least_G = CANCELLED * moments.xx.diagonal(dim1=1, dim2=2).mean(1) / moments.count
    damped_GII = _damped(xx_GII, DAMPING + SPARSE * xx_GII.shape[1] / moments.count, least_G)
    shift_GIO = torch.linalg.solve(damped_GII, (weight_GOI @ yx_GII).transpose(1, 2))
    target_GOI = weight_GOI + shift_GIO.transpose(1, 2)
    places = held_places(layer)
    stay_GOI = None if places is None else places.reshape(weight_GOI.shape)
    moved_GOI = rounded_columns(target_GOI, scale_GO1, damped_GII, limit, stay_GOI)
    levels_GOI = (moved_GOI / scale_GO1).round().clamp_(-limit, limit)
    before, after = (_error(form_GOI - target_GOI, xx_GII) for form_GOI in (rounded_GOI, levels_GOI * scale_GO1))
    if after < before:
        share, rounded_GOI = after / before, levels_GOI * scale_GO1
        layer.weight.copy_(moved_GOI.reshape(layer.weight.shape))
    if mean:
        assert layer.bias is not None
        error_GO = weight_GOI @ moments.y[:, :, None] - rounded_GOI @ moments.x[:, :, None]
        layer.bias += (error_GO / moments.count).reshape(-1).to(layer.bias.dtype)
    return share


def _error(difference_GOI: Tensor, moment_GII: Tensor) -> float:
    return float(((difference_GOI @ moment_GII) * difference_GOI).sum(2).mean())


def _damped(moment_GII: Tensor, share: float, least_G: Tensor) -> Tensor:
    spread_G = moment_GII.diagonal(dim1=1, dim2=2).mean(1).maximum(least_G)
    spread_G = torch.where(spread_G > 0, spread_G, torch.ones_like(spread_G))
    eye_II = torch.eye(moment_GII.shape[1], dtype=moment_GII.dtype, device=moment_GII.device)
    return moment_GII + share * spread_G[:, None, None] * eye_II


def rounded_columns(weight_GOI: Tensor, scale_GO1: Tensor, moment_GII: Tensor, limit: int, stay_GOI: Tensor | None = None) -> Tensor:
    """Values whose nearest rounding to scale · q, |q| ≤ limit, gives outputs near those of `weight` for inputs of a (damped) second moment.

    `stay`: False where the value is 0. Inputs with the largest moment come first; the error of each column is made up for by those that
    follow. Costs I steps of G·O·I multiply-adds, and a Cholesky decomposition of I³.
    """
    order_GI = moment_GII.diagonal(dim1=1, dim2=2).argsort(1, descending=True)
    damped_GII = moment_GII.gather(1, order_GI[:, :, None].expand_as(moment_GII)).gather(2, order_GI[:, None, :].expand_as(moment_GII))
    upper_GII = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped_GII)), upper=True)
    left_GOI = weight_GOI.gather(2, order_GI[:, None, :].expand_as(weight_GOI)).clone()
    zeros_GOI = None if stay_GOI is None else ~stay_GOI.gather(2, order_GI[:, None, :].expand_as(weight_GOI))
    width = left_GOI.shape[2]
    for start in range(0, width, COLUMNS):
        end = min(start + COLUMNS, width)
        errors = []
        for i in range(start, end):
            column_GO1 = left_GOI[:, :, i : i + 1]
            rounded_GO1 = (column_GO1 / scale_GO1).round().clamp_(-limit, limit) * scale_GO1
            if zeros_GOI is not None:
                rounded_GO1.masked_fill_(zeros_GOI[:, :, i : i + 1], 0)
            error_GO1 = (column_GO1 - rounded_GO1) / upper_GII[:, i, i][:, None, None]
            left_GOI[:, :, i + 1 : end] -= error_GO1 * upper_GII[:, None, i, i + 1 : end]
            errors.append(error_GO1)
        left_GOI[:, :, end:] -= torch.cat(errors, 2) @ upper_GII[:, start:end, end:]
    if zeros_GOI is not None:
        left_GOI.masked_fill_(zeros_GOI, 0)
    return torch.empty_like(left_GOI).scatter_(2, order_GI[:, None, :].expand_as(left_GOI), left_GOI)
