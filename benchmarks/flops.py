"""Count the multiply-adds of a hybrid block and of its dense twin, by PyTorch and by formula, and find where the claimed 42 % are saved.

    python benchmarks/flops.py

A block of each kind at the same width, depth, heads of 64 and MLP ratio: C channels, N = H x W tokens, windows of 8 x 8 tokens, 32 latents;
then the presets hybrid-s and dense-s as whole networks. The count by `torch.utils.flop_counter` and the formula of the layers' docstrings
must agree to a thousandth, or the benchmark ends with an error. It takes seconds on any machine, as nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product, starmap
from math import ceil

import torch
from torch import nn

from crossed import crossed
from documents import Column, Document, Goal, Row
from harness import Benchmark, Options, Run, main
from muntin.deployment import image_macs
from muntin.layers import Attention, DenseAttention, HybridAttention, ParallelBlock
from muntin.models import create_model

CLAIM = 0.42
HEAD, WINDOW, LATENTS = 64, 8, 32
CHANNELS = (128, 192, 256, 384)
SIDES = (16, 32, 64, 128)
RATIOS = (2.0, 4.0)
"""MLP ratios; the presets have the first."""
IMAGES = (256, 512, 1024, 2048)


class _AsMap(nn.Module):
    """A block as the counter calls models: (B, C, H, W)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_BCHW: torch.Tensor) -> torch.Tensor:
        return self.block(x_BCHW.permute(0, 2, 3, 1))


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
    return ceil((hybrid_formula(C, 1, ratio) / (1 - CLAIM) - (4 + 2 * ratio) * C**2) / (2 * C))


def block(ratio: float, C: int, side: int) -> Row:
    N = side**2
    dense = counted(DenseAttention(C, heads=C // HEAD), side, ratio)
    hybrid = counted(HybridAttention(C, heads=C // HEAD, window=WINDOW, latents=LATENTS), side, ratio)
    for count, formula in ((dense, dense_formula(C, N, ratio)), (hybrid, hybrid_formula(C, N, ratio))):
        if abs(count - formula) > 1e-3 * formula:
            raise SystemExit(f"C={C}, N={N}, MLP ratio {ratio:g}: counted {count:,}, by formula {formula:,.0f}: one is wrong")
    return {"part": "block", "mlp_ratio": ratio, "C": C, "N": N, "dense": dense, "hybrid": hybrid, "claim_from_N": passed_at(C, ratio)}


def network(side: int) -> Row:
    image = torch.empty(1, 3, side, side, device="meta")
    dense, hybrid = (image_macs(create_model(name, classes=6).to("meta"), image) for name in ("dense-s", "hybrid-s"))
    return {"part": "hybrid-s", "side": side, "N": (side // 16) ** 2, "dense": dense, "hybrid": hybrid}


def rows(run: Run) -> Iterator[Row]:
    counts = chain(starmap(block, product(RATIOS, CHANNELS, SIDES)), map(network, IMAGES))
    return ({**row, "saved": 1 - row["hybrid"] / row["dense"]} for row in counts)


def like_presets(document: Document) -> list[Row]:
    return [row for row in document.rows if row.get("mlp_ratio") == RATIOS[0]]


def claim(documents: list[Document]) -> str:
    """From how many tokens the claim holds, and the savings of the network, for docs/claims.md."""
    least = {row["C"]: f"{row['claim_from_N']:,}" for row in like_presets(documents[-1])}
    saved = {row["side"]: f"{100 * row['saved']:.0f}" for row in documents[-1].rows if row["part"] == "hybrid-s"}
    return (
        f"a block saves 42 % from {', '.join(least.values())} tokens on with {', '.join(map(str, least))} channels. "
        f"hybrid-s as a whole: {', '.join(saved.values())} % at {min(saved)}² to {max(saved)}²"
    )


BENCHMARK = Benchmark(
    name="flops", options=Options, measure=rows, newest=lambda document: claim([document]),
    about="""Share of the multiply-adds that a hybrid saves against its dense twin (and the multiply-adds of both), by tokens. 42 % is
claimed for blocks; the last column says from how many tokens on it is true. The presets have an MLP ratio of 2.""",
    tables=(
        crossed(
            "part, mlp_ratio, C", "N", lambda row: f"{row['saved']:.1%} ({row['hybrid'] / 1e6:,.0f}, {row['dense'] / 1e6:,.0f} M)",
            head="{:,} tokens", more=[Column(title="42 % from", value="claim_from_N", form="{:,} tokens")],
        ),
    ),
    goals=(
        Goal(
            name="the claimed 42 % of a block like the presets'", at_least=CLAIM, form="{:.0%}",
            values=lambda document: {f"{row['C']} channels, {row['N']:,} tokens": row["saved"] for row in like_presets(document)},
        ),
    ),
    blocks={"M2": claim},
)  # fmt: skip

if __name__ == "__main__":
    main(BENCHMARK, __doc__)
