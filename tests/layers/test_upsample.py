"""Decoders: sizes and alignment. PixelHead: initialisation, gain, order of channels. Axes as in the module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from muntin.layers import OneStepUpsampler, PixelHead, ProgressiveUpsampler, PyramidFusion

CHANNELS = [7, 5, 4, 3]  # coarse to fine
Decoder = type[OneStepUpsampler] | type[ProgressiveUpsampler] | type[PyramidFusion]
decoders = pytest.mark.parametrize("decoder", [ProgressiveUpsampler, OneStepUpsampler, PyramidFusion])


def halved(height: int, width: int, stages: int) -> list[tuple[int, int]]:
    """Sizes coarse to fine, each half of the next, rounded up."""
    sizes = [(height, width)]
    for _ in range(stages - 1):
        sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
    return sizes[::-1]


def chain(height: int, width: int, stages: int, batch: int = 1) -> list[Tensor]:
    return [torch.randn(batch, c, *size) for c, size in zip(CHANNELS[-stages:], halved(height, width, stages), strict=True)]


@decoders
@settings(deadline=None, max_examples=60)
@given(height=st.integers(1, 40), width=st.integers(1, 40), stages=st.integers(1, 4))
def test_upsampler_output_size(decoder: Decoder, height: int, width: int, stages: int) -> None:
    out = decoder(CHANNELS[-stages:], 6).eval()(chain(height, width, stages))
    assert out.shape == (1, 6, height, width) and out.isfinite().all()


@decoders
def test_upsampler_gradient_to_every_map(decoder: Decoder) -> None:
    maps = [m.requires_grad_() for m in chain(9, 13, 4, batch=2)]
    decoder(CHANNELS, 6)(maps).square().sum().backward()
    assert all(m.grad is not None and (m.grad != 0).any() for m in maps)


@pytest.mark.parametrize("pixel", [(0, 0), (1, 2), (3, 4)])
def test_upsampler_alignment_of_a_coarse_pixel(pixel: tuple[int, int]) -> None:
    """A coarse pixel covers rows 2·y and 2·y + 1, and columns likewise; the 3x3 smoothing adds one pixel on each side."""
    upsampler = ProgressiveUpsampler([3, 2], 16).double().eval()
    coarse, fine = torch.randn(1, 3, 4, 5, dtype=torch.float64), torch.randn(1, 2, 7, 9, dtype=torch.float64)
    changed = coarse.clone()
    changed[0, :, pixel[0], pixel[1]] += 10
    differs_HW = (upsampler([changed, fine]) != upsampler([coarse, fine]))[0].any(0)
    rows, columns = (slice(max(0, 2 * p - 1), 2 * p + 3) for p in pixel)
    assert differs_HW[2 * pixel[0], 2 * pixel[1]]
    differs_HW[rows, columns] = False
    assert not differs_HW.any()


@decoders
def test_upsampler_of_one_image_and_of_a_batch(decoder: Decoder) -> None:
    upsampler = decoder(CHANNELS, 6).double().eval()
    maps = [m.double() for m in chain(9, 13, 4, batch=3)]
    alone = torch.cat([upsampler([m[i : i + 1] for m in maps]) for i in range(3)])
    torch.testing.assert_close(upsampler(maps), alone, rtol=0, atol=1e-12)


def test_upsampler_without_maps() -> None:
    with pytest.raises(ValueError, match="channels is empty: give the channels of at least one feature map"):
        ProgressiveUpsampler([], 6)


def test_upsampler_with_too_few_maps() -> None:
    with pytest.raises(ValueError, match="got 2 feature maps: give 4, coarse to fine"):
        ProgressiveUpsampler(CHANNELS, 6)(chain(9, 13, 2))


@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_pixel_head_at_the_start(factor: int) -> None:
    out = PixelHead(5, 3, factor)(torch.randn(2, 5, 4, 6))
    assert out.shape == (2, 3, 4 * factor, 6 * factor)
    cells = out.unfold(2, factor, factor).unfold(3, factor, factor)
    torch.testing.assert_close(cells, cells[..., :1, :1].expand_as(cells))
    assert out.std() > 0.1  # not all zero


def test_pixel_head_with_a_gain() -> None:
    x = torch.randn(2, 5, 4, 6)
    heads = []
    for gain in (1.0, 32.0):
        torch.manual_seed(0)
        heads.append(PixelHead(5, 3, 4, gain))
    before = [head(x) for head in heads]
    torch.testing.assert_close(before[1], before[0])
    for head in heads:
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.0)
        head(x).mean().backward()
        optimizer.step()
    slow, fast = (head(x) - first for head, first in zip(heads, before, strict=True))
    torch.testing.assert_close(fast, 32 * slow, rtol=1e-2, atol=1e-4)


def test_pixel_head_by_formula() -> None:
    head = PixelHead(5, 3, 2).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    x_BCHW = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    weight_OC, bias_O = head.conv.weight[:, :, 0, 0], head.conv.bias
    out = head(x_BCHW)
    for score in range(3):
        for y in range(6):
            for x in range(8):
                channel = score * 4 + y % 2 * 2 + x % 2
                expected = x_BCHW[:, :, y // 2, x // 2] @ weight_OC[channel] + bias_O[channel]
                torch.testing.assert_close(out[:, score, y, x], expected, rtol=0, atol=1e-12)
