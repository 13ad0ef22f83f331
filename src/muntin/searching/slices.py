"""How the weights of a network lie inside shared ones: the shared layer of each of its layers, and the entries of each axis.

Every entry of an axis has a coordinate, such as ("query", head, channel). A network's coordinates are some of those of the shared
weights, which gives the slice, so layers need no special form. Entries without a role of their own are numbered, and a network has the
first ones. Layers of different kinds of attention, of stems of other lengths and of other strides share nothing.

Axes: E heads, D channels of a head, M latents.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from muntin.models import ModelConfig

Coordinates = Sequence[Hashable]


def strides(config: ModelConfig) -> tuple[int, ...]:
    """Strides of the maps, from 2 to the coarsest: of the convolutional stages, then of the attention stages."""
    return tuple(2 << index for index in range(len(config.stem) + len(config.dims)))


def shared_layer(name: str, config: ModelConfig) -> str:
    """The name of the shared layer for a layer of the network, such as `stages.16.of-3.blocks.0.attention.hybrid-0_5.out`."""
    parts = name.split(".")
    of = f"of-{len(config.stem)}"
    maps = strides(config)
    if parts[0] == "stages":
        parts[1:2] = [str(maps[len(config.stem) + int(parts[1])]), of]
        if "attention" in parts:
            split = f"-{config.latent_share:g}".replace(".", "_") if config.attention == "hybrid" else ""
            parts.insert(parts.index("attention") + 1, config.attention + split)
    elif parts[0] == "decoder":
        if parts[1] in ("lateral", "smooth"):
            parts[2:3] = [str(decoder_stride(parts[1:], config)), of]
        elif parts[1] == "fuse":
            parts[2:2] = [str(config.finest), of]
        parts[1:1] = [config.fusion]
    elif parts[0] == "head":
        parts[1:1] = [str(maps[-1]), of] if config.answer.one else [str(config.finest)]
    return ".".join(parts)


def decoder_stride(parts: Sequence[str], config: ModelConfig) -> int:
    """The stride of the map that a layer of the decoder is applied to; 0 for the context, which is applied to a mean.

    `parts`: of the layer's name inside the decoder.
    """
    coarse_first = strides(config)[::-1]
    if parts[0] == "context":
        return 0
    if parts[0] == "fuse":
        return config.finest
    finer = config.fusion == "progressive" and parts[0] == "smooth"  # the coarsest map is not smoothed
    return coarse_first[int(parts[1]) + finer]


def coordinates(name: str, shape: Sequence[int], config: ModelConfig) -> list[Coordinates]:
    """The coordinates of each axis of a parameter of the network."""
    axes: list[Coordinates] = [range(length) for length in shape]
    layer, _, last = name.rpartition(".")
    module = layer.rpartition(".")[2]
    if name.startswith("decoder.fuse.") and config.fusion == "upernet" and len(shape) == 4:
        joined = [stride for stride in strides(config)[::-1] if stride >= config.finest]
        axes[1] = [(stride, channel) for stride in joined for channel in range(config.decoder)]
        return axes
    if ".attention." not in name:
        return axes
    dim = config.dims[int(name.split(".")[1])]
    heads = dim // config.head_dim
    latent_heads = config.latent_heads(dim) if config.attention == "hybrid" else heads
    local_heads = heads - latent_heads
    if module == "out" and last == "weight" and config.attention == "hybrid":
        axes[1] = [*_grid("local", local_heads, config.head_dim), *_grid("latent", latent_heads, config.head_dim)]
    elif module == "project_latent" or (module == "project" and config.attention == "global"):
        logits = [*_grid("read", latent_heads, config.latents), *_grid("write", latent_heads, config.latents)]
        axes[0] = [*_grid("value", latent_heads, config.head_dim), *logits]
    elif module in ("project", "project_local"):
        own = local_heads if module == "project_local" else heads
        axes[0] = [entry for role in ("query", "key", "value") for entry in _grid(role, own, config.head_dim)]
    return axes


def _grid(role: str, heads: int, entries: int) -> list[Hashable]:
    return [(role, head, entry) for head in range(heads) for entry in range(entries)]
