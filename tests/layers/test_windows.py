"""`partition` and `merge`: round trip, order of tokens, bias of the padding. Axes as in the module."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from muntin.layers import merge, partition
from muntin.layers.windows import hidden

SIDE = st.integers(1, 20)


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(1, 3), height=SIDE, width=SIDE, window=st.none() | st.integers(1, 9))
def test_merge_after_partition(batch: int, height: int, width: int, window: int | None) -> None:
    x_BHWC = torch.randn(batch, height, width, 2)
    t_STC, grid = partition(x_BHWC, window)
    assert torch.equal(merge(t_STC, grid), x_BHWC)
    assert t_STC.shape[0] == batch * grid.rows * grid.columns
    if grid.bias_S1T is not None:
        assert grid.bias_S1T.shape == (t_STC.shape[0], 1, t_STC.shape[1])
        assert (grid.bias_S1T == 0).sum() == batch * height * width  # the tokens of the image


@pytest.mark.parametrize("size", [(1, 1), (4, 8), (5, 13)])
def test_partition_token_by_token(size: tuple[int, int]) -> None:
    window = 4
    x_BHWC = torch.randn(2, *size, 3)
    t_STC, grid = partition(x_BHWC, window)
    for image in range(2):
        for row in range(grid.rows):
            for column in range(grid.columns):
                index = (image * grid.rows + row) * grid.columns + column
                for token in range(window**2):
                    y, x = row * window + token // window, column * window + token % window
                    inside = y < size[0] and x < size[1]
                    expected = x_BHWC[image, y, x] if inside else torch.zeros(3)
                    assert torch.equal(t_STC[index, token], expected)
                    assert grid.bias_S1T is not None
                    assert grid.bias_S1T[index, 0, token] == (0 if inside else hidden(torch.float32))


def test_grid_bias_of_an_image() -> None:
    _, grid = partition(torch.zeros(2, 5, 3, 1), 4)
    assert grid.bias_S1T is not None and grid.bias_B1N is not None
    assert torch.equal(grid.bias_B1N[1, 0], torch.cat([grid.bias_S1T[2, 0], grid.bias_S1T[3, 0]]))


def test_partition_into_one_window() -> None:
    t_STC, grid = partition(torch.zeros(2, 5, 3, 1), None)
    assert t_STC.shape == (2, 15, 1) and grid.bias_S1T is None and grid.bias_B1N is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_hidden_logit_in_each_float_type(dtype: torch.dtype) -> None:
    _, grid = partition(torch.zeros(1, 1, 1, 1, dtype=dtype), 2)
    assert grid.bias_S1T is not None and grid.bias_S1T.dtype == dtype
    assert torch.softmax(grid.bias_S1T, -1).flatten().tolist() == [1, 0, 0, 0]
