"""Attention of other than four axes."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from muntin.deployment.capture.onnx_export import named_tensors_to_onnx
from muntin.deployment.capture.plain_attention import attention


@pytest.mark.parametrize("axes", [3, 4, 5])
@pytest.mark.parametrize("form", ["plain", "scaled", "causal", "bool", "float"])
def test_attention_is_pytorchs(axes: int, form: str) -> None:
    generator = torch.Generator().manual_seed(axes)
    query, key, value = (torch.randn(*(2,) * (axes - 2), n, 4, generator=generator, dtype=torch.float64) for n in (5, 6, 6))
    mask = torch.rand(5, 6, generator=generator) > 0.3
    mask[:, 0] = True
    options = {
        "plain": {},
        "scaled": {"scale": 0.3},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": mask},
        "float": {"attn_mask": torch.randn(5, 6, generator=generator, dtype=torch.float64)},
    }[form]
    torch.testing.assert_close(attention(query, key, value, **options), F.scaled_dot_product_attention(query, key, value, **options))


def test_grouped_queries() -> None:
    query, key, value = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    torch.testing.assert_close(attention(query, key, value, enable_gqa=True), expected)


class Blocks(nn.Module):
    """Attention over five axes, as in nested transformers, and over three."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Identity()  # names of layers are those of the wrapped model

    def forward(self, x: Tensor) -> tuple[Tensor]:
        five = F.scaled_dot_product_attention(x, x, x)
        three = five.flatten(0, 2)
        with_keywords = F.scaled_dot_product_attention(query=three, key=three, value=three, scale=0.5)
        return (with_keywords.reshape_as(x) + five,)


def test_exported_attention_of_five_axes() -> None:
    x = torch.randn(1, 2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    model = Blocks().eval()
    proto = named_tensors_to_onnx(model, (x,), input_names=["x"], output_names=["y"])
    (answer,) = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": x.numpy()})
    assert np.abs(answer - model(x)[0].numpy()).max() < 1e-5
