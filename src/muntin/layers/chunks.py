"""Operators in chunks: perceptrons, attention and sums that take a part of their rows at a time, within a bound on temporary memory.

    perceptron         chunk of tokens  -> hidden channels                            -> tokens of the answer
    window attention   chunk of windows -> scores, softmax                            -> windows of the answer
    latent attention   chunk of tokens  -> running maximum, sum and weighted values   -> latents
                       chunk of tokens  -> softmax over the latents                   -> tokens of the answer
    dense attention    chunk of queries, where PyTorch has no fused kernel            -> tokens of the answer

Applied to a model from outside (`chunked`). Names, weights and answers stay as they are, up to rounding. With a gradient, the inputs alone
are kept, and each chunk is computed again in the backward pass, whose temporaries are bounded, too; there is no second derivative.

Sources: Rabe & Staats, "Self-attention Does Not Need O(n²) Memory" (2112.05682); the running softmax: Milakov & Gimelshein (1805.02867,
algorithm 3); its gradient: FlashAttention (Dao et al., 2205.14135, appendix B.2).

Axes: B images, N tokens in an image, S windows, T tokens in a window or in a chunk, C channels, I channels of a projection, E heads,
D channels a head, M latents.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from muntin.layers.block import Perceptron
from muntin.layers.gate import ChannelGate
from muntin.layers.latent import LatentMixer
from muntin.layers.local import WindowMixer
from muntin.layers.ops import DenseProduct, Product, SoftmaxProduct
from muntin.layers.windows import Grid

ModuleCall = Callable[..., Any]
_BY_TOKEN = (nn.Linear, nn.Identity, nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish)
"""Layers that compute each token on its own."""


@contextmanager
def chunked(model: nn.Module, *, memory: int) -> Iterator[tuple[str, ...]]:
    """Compute the operators of a model in chunks inside the block; yields their dotted names.

    `memory`: most temporary bytes of an operator, beyond its input, its answer and their gradients; at least one token, window or query is
    taken at a time. Operators are muntin's attention and all perceptrons of `perceptrons_of`; those with quantised products stay whole.
    Training computes each chunk once more. Time (benchmarks/operators.py): at 65,536 tokens a sixteenth at a time takes 0.3 to 0.9 of the
    whole operator's; at 4,096 tokens windows and latents take 2 to 4.3 times as long. Raises ValueError for `memory` below 1.
    """
    calls = ReplacedCalls()
    try:
        yield chunk_operators(calls, operators_of(model), memory)
    finally:
        calls.restore()


class ReplacedCalls:
    """Methods of modules that are replaced from outside, until `restore`."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, str, ModuleCall | None]] = []

    def replace(self, module: nn.Module, method: str, call: ModuleCall) -> None:
        """Let `call` answer instead of a method of this module."""
        self._before.append((module, method, module.__dict__.get(method)))
        setattr(module, method, call)

    def restore(self) -> None:
        """Take all replacements away, the last one first."""
        for module, method, before in reversed(self._before):
            delattr(module, method)
            if before is not None:
                setattr(module, method, before)
        self._before.clear()


def chunk_operators(calls: ReplacedCalls, operators: dict[str, nn.Module], memory: int) -> tuple[str, ...]:
    """Replace the calls of operators (`operators_of`) by calls in chunks of at most `memory` bytes. Returns their names."""
    if memory < 1:
        raise ValueError(f"memory={memory}: give at least 1 byte, such as {16 << 20} (16 MiB)")
    for operator in operators.values():
        ways: dict[type[nn.Module], ModuleCall] = {WindowMixer: _windows, LatentMixer: _latents, DenseProduct: _queries}
        way = ways.get(type(operator), _tokens)
        calls.replace(operator, "forward", partial(way, operator, operator.forward, memory))
    return tuple(operators)


def operators_of(model: nn.Module) -> dict[str, nn.Module]:
    """The operators that can be computed in chunks, by dotted name."""
    plain = {Product, SoftmaxProduct}
    mixers = {
        name: module
        for name, module in model.named_modules()
        if type(module) in (WindowMixer, LatentMixer, DenseProduct) and all(type(product) in plain for product in module.children())
    }
    return mixers | perceptrons_of(model)


def perceptrons_of(model: nn.Module) -> dict[str, nn.Module]:
    """The perceptrons that compute each token on its own: muntin's, timm's, and sequences of linear layers and activations."""
    timm_layers = sys.modules.get("timm.layers")  # loaded if the model is timm's
    kinds: tuple[type[nn.Module], ...] = (Perceptron, nn.Sequential)
    if timm_layers is not None:
        kinds += (timm_layers.Mlp, timm_layers.GluMlp, timm_layers.SwiGLU)
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        and all(_is_by_token(layer) for layer in module.children())
        and sum(isinstance(layer, nn.Linear) for layer in module.children()) > 1
    }


def _is_by_token(layer: nn.Module) -> bool:
    if isinstance(layer, nn.LayerNorm):
        return len(layer.normalized_shape) == 1
    if isinstance(layer, ChannelGate):
        return layer.axis == -1
    return isinstance(layer, _BY_TOKEN) or (isinstance(layer, nn.Dropout) and layer.p == 0)


def rows_within(memory: int, row_bytes: int, rows: int) -> int:
    """Rows of a chunk, at least 1, so that `rows` rows of `row_bytes` temporary bytes are cut into the fewest chunks of one size."""
    chunks = -(-rows // max(1, memory // max(1, row_bytes)))
    return -(-rows // max(1, chunks))


def in_chunks(
    call: Callable[..., Tensor], tensors: Sequence[Tensor], parameters: Sequence[Tensor] = (), *, rows: int, summed: bool = False
) -> Tensor:
    """`call(*tensors)` from slices of `rows` rows of each tensor, its first axis. The answers are joined, or added if `summed`.

    `parameters`: tensors that `call` uses beside its arguments, and that get a gradient.
    """
    parts = _slices(len(tensors[0]), rows)
    answer: Tensor = _InChunks.apply(call, parts, summed, tuple(parameters), *tensors, *parameters)  # type: ignore[no-untyped-call]
    return answer


def _slices(length: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


class _InChunks(torch.autograd.Function):
    """See `in_chunks`. Keeps the tensors alone; `torch.utils.checkpoint` on slices would add copies of the answer and of the gradient."""

    @staticmethod
    def forward(ctx: Any, call: ModuleCall, parts: list[slice], summed: bool, parameters: tuple[Tensor, ...], *tensors: Tensor) -> Tensor:
        cut = tensors[: len(tensors) - len(parameters)]
        ctx.call, ctx.parts, ctx.summed, ctx.parameters = call, parts, summed, parameters
        device = cut[0].device.type
        # without the cache of cast weights, which would hold weights that were cast without a gradient
        ctx.autocast = partial(
            torch.autocast, device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        ctx.save_for_backward(*cut)
        answer = None
        with ctx.autocast():
            for part in parts:
                rows = call(*(tensor[part] for tensor in cut))
                if summed:
                    answer = rows if answer is None else answer + rows
                    continue
                if answer is None:
                    answer = rows.new_empty(len(cut[0]), *rows.shape[1:])
                answer[part] = rows
        return answer  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cut, parameters = ctx.saved_tensors, ctx.parameters
        needs = ctx.needs_input_grad[-len(cut) - len(parameters) :]
        grads = [torch.empty_like(tensor) if needed else None for tensor, needed in zip(cut, needs[: len(cut)], strict=True)]
        added = [
            torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)) if needed else None
            for tensor, needed in zip(parameters, needs[len(cut) :], strict=True)
        ]
        for part in ctx.parts:
            _InChunks._part_gradient(ctx, [tensor[part] for tensor in cut], grad if ctx.summed else grad[part], part, grads, added)
        sums = [None if total is None else total.to(tensor.dtype) for total, tensor in zip(added, parameters, strict=True)]
        return None, None, None, None, *grads, *sums

    @staticmethod
    def _part_gradient(
        ctx: Any, rows: list[Tensor], grad: Tensor, part: slice, grads: list[Tensor | None], added: list[Tensor | None]
    ) -> None:
        """Write the gradient of a chunk into `grads`, and add that of the parameters to `added`."""
        rows = [row if target is None else row.detach().requires_grad_() for row, target in zip(rows, grads, strict=True)]
        with torch.enable_grad(), ctx.autocast():
            answer = ctx.call(*rows)
        sources = [row for row, target in zip(rows, grads, strict=True) if target is not None]
        weights = [tensor for tensor, total in zip(ctx.parameters, added, strict=True) if total is not None]
        gradients = iter(torch.autograd.grad(answer, [*sources, *weights], grad, materialize_grads=True))
        for target in grads:
            if target is not None:
                target[part] = next(gradients)
        for total in added:
            if total is not None:
                total += next(gradients)


def _item_bytes(tensor: Tensor) -> int:
    """Bytes of a temporary value: at least 4, as softmaxes and norms of 16-bit tensors are computed in float32."""
    return max(4, tensor.element_size())


def _has_gradient(module: nn.Module, tensor: Tensor) -> bool:
    return torch.is_grad_enabled() and (tensor.requires_grad or any(parameter.requires_grad for parameter in module.parameters()))


def _tokens(perceptron: nn.Module, forward: ModuleCall, memory: int, t: Tensor) -> Tensor:
    """A perceptron, `(..., C) -> (..., C)`, by chunks of tokens."""
    widths, width = [], t.shape[-1]
    for layer in perceptron.children():
        width = layer.out_features if isinstance(layer, nn.Linear) else width
        widths += [] if isinstance(layer, nn.Identity) else [width]
    values = sum(widths) + (2 * max(widths) + t.shape[-1] if _has_gradient(perceptron, t) else 0)
    tokens = t.numel() // max(1, t.shape[-1])
    rows = rows_within(memory, values * _item_bytes(t), tokens)
    if rows >= tokens:
        output: Tensor = forward(t)
        return output
    return in_chunks(forward, [t.reshape(tokens, -1)], tuple(perceptron.parameters()), rows=rows).reshape(*t.shape[:-1], -1)


def _windows(mixer: WindowMixer, forward: ModuleCall, memory: int, qkv_ST3C: Tensor, grid: Grid) -> Tensor:
    """Window attention by chunks of windows: scores, scores with the bias and their softmax, and copies of Q, K, V and the answer."""
    windows, tokens = qkv_ST3C.shape[:2]
    values = 3 * mixer.heads * tokens**2 + (14 if _has_gradient(mixer, qkv_ST3C) else 6) * tokens * mixer.dim
    rows = rows_within(memory, values * _item_bytes(qkv_ST3C), windows)
    if rows >= windows:
        output: Tensor = forward(qkv_ST3C, grid)
        return output

    def call(qkv_ST3C: Tensor, bias_S1T: Tensor | None = None) -> Tensor:
        answer: Tensor = forward(qkv_ST3C, replace(grid, bias_S1T=bias_S1T))
        return answer

    return in_chunks(call, [qkv_ST3C] if grid.bias_S1T is None else [qkv_ST3C, grid.bias_S1T], rows=rows)


def _latents(mixer: LatentMixer, forward: ModuleCall, memory: int, projected_STI: Tensor, grid: Grid) -> Tensor:
    """Latent attention by chunks of the tokens of all images: some copies of their logits and values."""
    images, tokens = grid.batch, projected_STI.shape[0] * projected_STI.shape[1] // grid.batch
    values = 4 * mixer.heads * mixer.latents + 3 * mixer.dim
    rows = rows_within(memory, images * values * _item_bytes(projected_STI), tokens)
    if rows >= tokens:
        output: Tensor = forward(projected_STI, grid)
        return output
    p_BNI = projected_STI.reshape(images, tokens, -1)
    out: Tensor = _LatentsInChunks.apply(p_BNI, grid.bias_B1N, mixer, _slices(tokens, rows))  # type: ignore[no-untyped-call]
    return out.reshape(*projected_STI.shape[:2], -1)


class _LatentsInChunks(torch.autograd.Function):
    """The answer of a `LatentMixer`, `(B, N, I) -> (B, N, C)`, by chunks of tokens. Softmaxes are computed in float32 or float64.

    Keeps the projection and, of each latent, the maximum and the sum of its read weights and its value.
    """

    @staticmethod
    def forward(ctx: Any, p_BNI: Tensor, bias_B1N: Tensor | None, mixer: LatentMixer, parts: list[slice]) -> Tensor:
        precise = torch.promote_types(p_BNI.dtype, torch.float32)
        shape = len(p_BNI), mixer.heads, mixer.latents
        top_BEM1 = p_BNI.new_full((*shape, 1), torch.finfo(precise).min, dtype=precise)
        sum_BEM1, latents_BEMD = torch.zeros_like(top_BEM1), top_BEM1.new_zeros(*shape, mixer.dim // mixer.heads)
        for part in parts:
            v_BETD, read_BEMT, _ = mixer.split(p_BNI[:, part])
            read_BEMT = _logits(read_BEMT, bias_B1N, part, precise)
            before_BEM1, top_BEM1 = top_BEM1, torch.maximum(top_BEM1, read_BEMT.amax(-1, keepdim=True))
            weight_BEMT = (read_BEMT - top_BEM1).exp_()
            shrink_BEM1 = (before_BEM1 - top_BEM1).exp_()
            sum_BEM1 = sum_BEM1 * shrink_BEM1 + weight_BEMT.sum(-1, keepdim=True)
            latents_BEMD = latents_BEMD * shrink_BEM1 + weight_BEMT.to(v_BETD.dtype) @ v_BETD
        latents_BEMD = latents_BEMD / sum_BEM1
        out_BNC: Tensor | None = None
        for part in parts:
            write_BETM = mixer.split(p_BNI[:, part])[2]
            weight_BETM = write_BETM.softmax(-1, precise).to(p_BNI.dtype)
            rows_BTC = _joined(weight_BETM @ latents_BEMD.to(p_BNI.dtype))
            if out_BNC is None:
                out_BNC = rows_BTC.new_empty(*p_BNI.shape[:2], mixer.dim)
            out_BNC[:, part] = rows_BTC
        ctx.mixer, ctx.parts = mixer, parts
        ctx.save_for_backward(p_BNI, bias_B1N, top_BEM1, sum_BEM1, latents_BEMD)
        return out_BNC  # type: ignore[return-value]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNC: Tensor) -> tuple[Tensor | None, ...]:
        p_BNI, bias_B1N, top_BEM1, sum_BEM1, latents_BEMD = ctx.saved_tensors
        split, dtype, precise = ctx.mixer.split, p_BNI.dtype, latents_BEMD.dtype
        grad_BNI, values_BEMD = torch.empty_like(p_BNI), latents_BEMD.to(p_BNI.dtype)
        grad_BEMD = torch.zeros_like(latents_BEMD)
        for part in ctx.parts:
            write_BETM, target_BETM = split(p_BNI[:, part])[2], split(grad_BNI[:, part])[2]
            g_BETD = grad_BNC[:, part].reshape(len(p_BNI), -1, ctx.mixer.heads, values_BEMD.shape[-1]).transpose(1, 2).to(dtype)
            weight_BETM = write_BETM.softmax(-1, precise)
            grad_BEMD += weight_BETM.to(dtype).transpose(-1, -2) @ g_BETD
            target_BETM.copy_(_softmax_gradient(weight_BETM, g_BETD @ values_BEMD.transpose(-1, -2), None))
        # the gradient of a softmax needs Σ weight · gradient of the weight over all tokens, which is gradient · latent
        common_BEM1, grad_BEMD = (grad_BEMD * latents_BEMD).sum(-1, keepdim=True), grad_BEMD.to(dtype)
        for part in ctx.parts:
            (v_BETD, read_BEMT, _), (v_target_BETD, target_BEMT, _) = split(p_BNI[:, part]), split(grad_BNI[:, part])
            weight_BEMT = _logits(read_BEMT, bias_B1N, part, precise).sub(top_BEM1).exp_().div_(sum_BEM1)
            v_target_BETD.copy_(weight_BEMT.to(dtype).transpose(-1, -2) @ grad_BEMD)
            target_BEMT.copy_(_softmax_gradient(weight_BEMT, grad_BEMD @ v_BETD.transpose(-1, -2), common_BEM1))
        return grad_BNI, None, None, None


def _logits(read_BEMT: Tensor, bias_B1N: Tensor | None, part: slice, dtype: torch.dtype) -> Tensor:
    read_BEMT = read_BEMT.to(dtype)
    return read_BEMT if bias_B1N is None else read_BEMT + bias_B1N[:, None, :, part].to(dtype)


def _softmax_gradient(weight: Tensor, grad: Tensor, common: Tensor | None) -> Tensor:
    """The gradient by logits, for the gradient by their softmax. `common`: Σ weight · grad over the last axis, computed here if None."""
    grad = grad.to(weight.dtype)
    return grad.sub_((weight * grad).sum(-1, keepdim=True) if common is None else common).mul_(weight)


def _joined(x_BETD: Tensor) -> Tensor:
    return x_BETD.transpose(1, 2).flatten(2)


def _queries(product: DenseProduct, forward: ModuleCall, memory: int, q_BEND: Tensor, k_BEND: Tensor, v_BEND: Tensor) -> Tensor:
    """Dense attention by chunks of queries, if PyTorch would hold all scores."""
    images, heads, tokens, _ = q_BEND.shape
    values = images * heads * k_BEND.shape[2] * (5 if _has_gradient(product, q_BEND) else 3)
    rows = rows_within(memory, values * _item_bytes(q_BEND), tokens)
    if rows >= tokens or _is_fused(q_BEND, k_BEND, v_BEND):
        output: Tensor = forward(q_BEND, k_BEND, v_BEND)
        return output
    if torch.is_grad_enabled():
        forward = partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
    return torch.cat([forward(part_BETD, k_BEND, v_BEND) for part_BETD in torch.split(q_BEND, rows, 2)], 2)


def _is_fused(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Return True if PyTorch's attention of these tensors does not hold their scores."""
    cuda = torch.backends.cuda
    if q.device.type != "cuda":
        return q.device.type == "cpu" and cuda.flash_sdp_enabled()  # type: ignore[no-untyped-call]  # there the switch is for CPUs, too
    use = cuda.SDPAParams(q, k, v, None, 0.0, False, False)
    return cuda.can_use_flash_attention(use) or cuda.can_use_efficient_attention(use) or cuda.can_use_cudnn_attention(use)
