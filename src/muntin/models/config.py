"""ModelConfig: the structure of a HybridNet, frozen and checked when created. PRESETS: the named ones, which `muntin models` measures."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from muntin.artifact.answers import ANSWERS, Answer, Task

AtLeastOne = Annotated[int, Field(ge=1)]


class ModelConfig(BaseModel):
    """The structure of a `HybridNet`. Strides are in input pixels; channels and depths are counts."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    task: Task = "segment"
    classes: Annotated[int, Field(ge=1, le=65535, description="K, the classes of segment and classify; unused by restore")] = 2
    channels: Annotated[int, Field(ge=1, le=16, description="channels of the input image")] = 3
    scale: Annotated[int, Field(ge=1, le=4, description="output size over input size; above 1 only for restore")] = 1
    encoder: str | None = None
    """timm:NAME: a network whose maps replace `stem` and `pairs`; the attention stages are then at its coarsest strides."""
    stem: Annotated[tuple[AtLeastOne, ...], Field(min_length=2, max_length=3)] = (16, 32, 64)
    """Channels of the convolutional stages at strides 2, 4 and, with a third entry, 8."""
    pairs: tuple[Annotated[int, Field(ge=0)], ...] = (1, 1)
    """Residual pairs at stride 4 and, with three stages of the stem, at 8."""
    dims: Annotated[tuple[AtLeastOne, ...], Field(min_length=1)] = (256, 256)
    """Channels of the attention stages at the strides that follow the stem: 16, 32, ... after three stages, 8, 16, ... after two."""
    depths: tuple[AtLeastOne, ...] = (4, 2)
    """Blocks of each attention stage."""
    attention: Literal["hybrid", "local", "global", "dense"] = "hybrid"
    """Windows and latents side by side, only one of them, or all pairs of tokens."""
    block: Literal["parallel", "serial"] = "parallel"
    """parallel: attention and perceptron read the same norm; serial: one after the other."""
    head_dim: AtLeastOne = 64
    """Channels of an attention head; `dims` are multiples of it."""
    window: AtLeastOne = 8
    """Side of the windows, tokens."""
    latents: AtLeastOne = 32
    """Latents that exchange with the whole map."""
    latent_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the heads of hybrid attention that have latents, rounded down; at least one has latents, and one windows."""
    mlp_ratio: Annotated[float, Field(gt=0, le=8)] = 2.0
    """Width of the perceptrons over the width of their stage."""
    gate: bool = True
    """Channel gates, which `training.gate_budget` closes."""
    decoder: AtLeastOne = 64
    """Channels of the decoder."""
    fusion: Literal["progressive", "one-step", "upernet"] = "progressive"
    """How the decoder joins its maps: doubling step by step; enlarging all at once for a sum; or a pyramid with a global context."""
    finest: Literal[2, 4, 8] = 4
    """Stride at which the decoder ends and the last layer, `PixelHead`, begins; like `decoder`, unused by classify."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.encoder is not None and not self.encoder.startswith("timm:"):
            raise ValueError(f"encoder '{self.encoder}' names no package: give timm:NAME, as in timm:tf_efficientnet_lite0")
        if len(self.pairs) != len(self.stem) - 1:
            raise ValueError(
                f"pairs has {len(self.pairs)} entries for a stem of {len(self.stem)} stages: give one for each stage from stride 4 on, "
                f"{len(self.stem) - 1}"
            )
        if len(self.dims) != len(self.depths):
            raise ValueError(f"dims names {len(self.dims)} attention stages and depths {len(self.depths)}: give as many of each")
        if self.scale != 1 and not self.answer.picture:
            raise ValueError(f"scale={self.scale} is for task 'restore'; '{self.task}' answers at the input's size")
        smallest = 2 * self.head_dim if self.attention == "hybrid" else self.head_dim
        for dim in self.dims:
            if dim % self.head_dim or dim < smallest:
                raise ValueError(f"dim {dim} must be a multiple of head_dim {self.head_dim} and at least {smallest}")
            if round(dim * self.mlp_ratio) < 1:
                raise ValueError(f"mlp_ratio={self.mlp_ratio:g} leaves nothing of dim {dim}: give at least {1 / dim:g}")
        return self

    def latent_heads(self, dim: int) -> int:
        """Heads with latents of a stage of `dim` channels with hybrid attention."""
        heads = dim // self.head_dim
        return min(heads - 1, max(1, int(heads * self.latent_share)))

    @property
    def outputs(self) -> int:
        """Channels of the answer: K scores, or the image's own channels."""
        return self.answer.width(self.classes, self.channels)

    @property
    def answer(self) -> Answer:
        """Facts of the task."""
        return ANSWERS[self.task]


PRESETS: dict[str, dict[str, Any]] = {
    "hybrid-xxs": {"stem": (8, 16, 32), "pairs": (0, 0), "dims": (128,), "depths": (2,), "decoder": 32, "finest": 8, "latents": 8},
    "hybrid-xs": {"stem": (16, 24, 48), "pairs": (0, 1), "dims": (128, 128), "depths": (2, 2), "decoder": 48, "latents": 16},
    "hybrid-s": {},
    "hybrid-m": {"stem": (24, 48, 96), "pairs": (1, 2), "dims": (384, 384), "depths": (6, 4), "decoder": 96},
    "dense-s": {"attention": "dense"},
}
"""Fields of `ModelConfig` in which each preset differs from the defaults; `dense-s` is `hybrid-s` with SDPA over all tokens."""
