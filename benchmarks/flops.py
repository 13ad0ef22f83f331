"""Count the multiply-adds of a hybrid block and of its dense twin, by PyTorch and by formula, and find where the claimed 42 % are saved.

    python benchmarks/flops.py [--json]

A block of each kind at the same width, depth, heads of 64, MLP ratio and parameters but for the attention: C channels, N = H x W tokens,
windows of 8 x 8 tokens, 32 latents. `counted` is `torch.utils.flop_counter` over the executed products (halved: a multiply-add is two
FLOPs), `formula` is what the layers' docstrings say; the two must agree to a thousandth, or the benchmark ends with an error. Then the
presets hybrid-s and dense-s as whole networks. Nothing is computed (tensors without data), so it takes seconds on any machine.

42 % fewer FLOPs are claimed for such blocks. The number of tokens from which that holds follows from C and the MLP ratio: it is the last
column of the first table.
"""

from __future__ import annotations

import argparse
import json
from math import ceil
from typing import Any

import torch
from torch import nn

from kept import now
from muntin.deployment import image_macs
from muntin.layers import Attention, DenseAttention, HybridAttention, ParallelBlock
from muntin.models import create_model
from muntin.runtime import describe_hardware

CLAIM = 0.42
HEAD, WINDOW, LATENTS = 64, 8, 32
CHANNELS = (128, 192, 256, 384)
SIDES = (16, 32, 64, 128)
RATIOS = (2.0, 4.0)
IMAGES = (256, 512, 1024, 2048)


class _AsMap(nn.Module):
    """A block as the counter calls models: (B, C, H, W)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.block(x_BCHW.permute(0, 2, 3, 1))
        return out


def counted(attention: Attention, side: int, ratio: float) -> int:
    block = ParallelBlock(attention.dim, attention=attention, mlp_ratio=ratio, gate=False)
    return image_macs(_AsMap(block).to("meta"), torch.empty(1, attention.dim, side, side, device="meta"))


def dense_formula(C: int, N: int, ratio: float) -> float:
    return N * (4 * C**2 + 2 * N * C + 2 * ratio * C**2)


def hybrid_formula(C: int, N: int, ratio: float) -> float:
    heads = C // HEAD
    C_g, E_g = heads // 2 * HEAD, heads // 2
    C_l = C - C_g
    projections = C * (3 * C_l + C_g + 2 * E_g * LATENTS) + C**2
    mixing = 2 * WINDOW**2 * C_l + 2 * LATENTS * C_g
    return N * (projections + mixing + 2 * ratio * C**2)


def passed_at(C: int, ratio: float) -> int:
    """The least number of tokens from which a hybrid block saves the claimed share: hybrid is linear in N, dense has 2·N²·C more."""
    each = hybrid_formula(C, 1, ratio)
    return ceil((each / (1 - CLAIM) - (4 + 2 * ratio) * C**2) / (2 * C))


def block_rows() -> list[dict[str, Any]]:
    rows = []
    for ratio in RATIOS:
        for C in CHANNELS:
            for side in SIDES:
                N = side**2
                dense = counted(DenseAttention(C, heads=C // HEAD), side, ratio)
                hybrid = counted(HybridAttention(C, heads=C // HEAD, window=WINDOW, latents=LATENTS), side, ratio)
                for found, formula in ((dense, dense_formula(C, N, ratio)), (hybrid, hybrid_formula(C, N, ratio))):
                    if abs(found - formula) > 1e-3 * formula:
                        raise SystemExit(f"C={C}, N={N}, MLP ratio {ratio:g}: counted {found:,}, by formula {formula:,.0f}: one is wrong")
                rows.append(
                    {"mlp_ratio": ratio, "C": C, "N": N, "dense": dense, "hybrid": hybrid, "saved": 1 - hybrid / dense,
                     "claim_from_N": passed_at(C, ratio)}
                )  # fmt: skip
    return rows


def network_rows() -> list[dict[str, Any]]:
    rows = []
    for side in IMAGES:
        macs = {}
        for name in ("hybrid-s", "dense-s"):
            macs[name] = image_macs(create_model(name, classes=6).to("meta"), torch.empty(1, 3, side, side, device="meta"))
        rows.append({"side": side, "N": (side // 16) ** 2, **macs, "saved": 1 - macs["hybrid-s"] / macs["dense-s"]})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the tables")
    arguments = parser.parse_args()
    blocks, networks = block_rows(), network_rows()
    if arguments.json:
        hardware = {**describe_hardware(), "created": now()}
        print(json.dumps({"benchmark": "flops", "hardware": hardware, "claim": CLAIM, "blocks": blocks, "networks": networks}, indent=1))
        return
    print(f"{'MLP':>4}{'C':>6}{'N':>8}{'dense MMAC':>13}{'hybrid MMAC':>13}{'saved':>8}   42 % from N =")
    for row in blocks:
        print(
            f"{row['mlp_ratio']:>4g}{row['C']:>6}{row['N']:>8,}{row['dense'] / 1e6:>13,.0f}{row['hybrid'] / 1e6:>13,.0f}"
            f"{row['saved']:>8.1%}   {row['claim_from_N']:,}"
        )
    print(f"\n{'image':>10}{'N':>8}{'dense-s GMAC':>14}{'hybrid-s GMAC':>15}{'saved':>8}")
    for row in networks:
        dense, hybrid = row["dense-s"] / 1e9, row["hybrid-s"] / 1e9
        print(f"{row['side']:>6} x {row['side']:<5}{row['N']:>4,}{dense:>12,.2f}{hybrid:>15,.2f}{row['saved']:>8.1%}")


if __name__ == "__main__":
    main()
