"""Groups of whole attention heads, in the place of groups of channels that cannot leave alone.

    query, key, value -> heads -> mixed values -> projection      one group: rows of the first weights, columns of the last weight

Heads are recognised by gradients, not by names: the columns of the projection that belong to one head depend on some channels of the layers
before it, and on no channel of another head. The number of heads is an integer attribute of a module around these layers.

Axes: C heads of a group, O output and I input channels of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from muntin.compression.channels.groups import Attribute, ChannelGroup, ChannelSide, Member
from muntin.compression.channels.sizes import SIZED, prunable
from muntin.models.eager import ModelInputs, call

_SIZE_WORDS = ("dim", "size", "width", "channels", "features")
"""Parts of the names of attributes that hold a width, even where it equals the number of heads."""


def head_groups(model: nn.Module, row: ModelInputs, pending: Sequence[str], *, single: bool = False) -> dict[str, list[ChannelGroup]]:
    """Groups of heads among the outputs of the layers `pending`, by the first of these layers in each; if `single`, of channels first.

    Of each there is one form for each guess which attributes must be lowered: a trial chooses. `model`: a copy with random weights. Costs
    a forward pass, and small backward passes: one a layer, and for each number of heads that is tried one a head.
    """
    layers = {name: layer for name, layer in model.named_modules() if prunable(type(layer))}
    outputs, inputs = _run_in_pieces(model, row, layers)
    forms = {}
    for writers, readers in _components(outputs, inputs, pending):
        if any(getattr(layers[name], "groups", 1) > 1 for name in (*writers, *readers)):
            continue  # their inputs and outputs leave together: a residual path, no heads
        read = {name: _channels_last(layers[name], inputs[name][0]) for name in readers}
        written = {name: outputs[name][0] for name in writers}
        widths = {tensor.shape[-1] for tensor in read.values()}
        places = _places(model, (*writers, *readers))
        every = widths.union(_channels_last(layers[name], tensor).shape[-1] for name, tensor in written.items())
        if single and len(every) == 1:
            members = [_member(name, "out", range(*every)) for name in writers] + [_member(name, "in", range(*every)) for name in readers]
            forms[writers[0]] = [ChannelGroup(name=writers[0], channels=max(every), members=tuple(members), obstacle="")]
        for count in sorted({value for _, _, value in places if 1 < value < min(widths)}, reverse=True):
            owners = None if any(width % count for width in widths) else _heads_of(layers, written, read, count)
            if owners is None:
                continue
            members = [_member(name, "out", heads) for name, heads in owners.items()]
            for name, tensor in read.items():
                size = tensor.shape[-1]
                members.append(_member(name, "in", [place // (size // count) for place in range(size)]))
            forms[writers[0]] = forms.get(writers[0], []) + [
                ChannelGroup(name=writers[0], channels=count, members=tuple(members), obstacle="", unit="heads", attributes=attributes)
                for attributes in _guesses(places, count, every)
            ]
            break
    return forms


def _member(layer: str, side: ChannelSide, heads: Sequence[int]) -> Member:
    return Member(layer=layer, side=side, positions=tuple(range(len(heads))), channels=tuple(heads))


def _components(
    outputs: Mapping[str, Sequence[Tensor]], inputs: Mapping[str, Sequence[Tensor]], pending: Sequence[str]
) -> list[tuple[list[str], list[str]]]:
    """Layers of `pending`, and the layers that read them directly and nothing else; each called once."""
    leaves = [(name, tensor) for name, tensors in outputs.items() for tensor in tensors]
    components: list[tuple[set[str], list[str]]] = []
    for reader, tensors in inputs.items():
        writers: set[str] = set()
        for tensor in tensors:
            if tensor.requires_grad:
                ones = torch.ones_like(tensor)
                gradients = torch.autograd.grad(tensor, [leaf for _, leaf in leaves], ones, retain_graph=True, allow_unused=True)
                writers.update(name for (name, _), gradient in zip(leaves, gradients, strict=True) if gradient is not None)
        joined = [component for component in components if component[0] & writers]
        components = [component for component in components if component not in joined]
        readers = [name for _, names in joined for name in names]
        components.append((writers.union(*(names for names, _ in joined)), [*readers, reader]))
    once = {name for name in outputs if len(outputs[name]) == 1}
    return [
        ([name for name in outputs if name in writers], readers)
        for writers, readers in components
        if writers and writers <= once.intersection(pending) and once.issuperset(readers)
    ]


def _run_in_pieces(
    model: nn.Module, row: ModelInputs, layers: Mapping[str, nn.Module]
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """The outputs and the inputs of each call of the layers. A gradient at an input goes back to the outputs before it, and not further."""
    outputs: dict[str, list[Tensor]] = {}
    inputs: dict[str, list[Tensor]] = {}
    handles = []
    for name, layer in layers.items():

        def hook(layer: nn.Module, given: tuple[Any, ...], by_name: dict[str, Any], output: Tensor, *, name: str = name) -> Tensor:
            leaf = output.detach().requires_grad_()
            outputs.setdefault(name, []).append(leaf)
            inputs.setdefault(name, []).append(given[0] if given else by_name["input"])
            return leaf.clone()

        handles.append(layer.register_forward_hook(hook, with_kwargs=True))
    try:
        with torch.inference_mode(False), torch.enable_grad():
            call(model, row)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, inputs


def _channels_last(layer: nn.Module, tensor: Tensor) -> Tensor:
    return tensor if isinstance(layer, nn.Linear) else tensor.movedim(-1 - len(layer.kernel_size), -1)  # type: ignore[arg-type]


def _heads_of(
    layers: Mapping[str, nn.Module], written: Mapping[str, Tensor], read: Mapping[str, Tensor], count: int
) -> dict[str, list[int]] | None:
    """The head of each output channel of the layers; None if the inputs that are read do not fall into `count` independent heads."""
    if not all(tensor.requires_grad for tensor in read.values()):
        return None
    generator = torch.Generator().manual_seed(0)
    owners = {name: [-1] * _channels_last(layers[name], tensor).shape[-1] for name, tensor in written.items()}
    for head in range(count):
        parts = [tensor.chunk(count, -1)[head] for tensor in read.values()]
        directions = [torch.randn(part.shape, generator=generator).to(part.device, part.dtype) for part in parts]
        gradients = torch.autograd.grad(parts, list(written.values()), directions, retain_graph=True, allow_unused=True)
        for (name, owner), gradient in zip(owners.items(), gradients, strict=True):
            if gradient is None:
                return None
            used = _channels_last(layers[name], gradient).flatten(0, -2).any(0).nonzero().flatten().tolist()
            if len(used) * count != len(owner) or any(owner[channel] != -1 for channel in used):
                return None
            for channel in used:
                owner[channel] = head
    return owners


def _places(model: nn.Module, layers: Sequence[str]) -> list[tuple[str, str, int]]:
    """Integer attributes of the modules that may know the heads: name of the module, of the attribute, and its value."""
    paths = [layer.split(".")[:-1] for layer in layers]
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    root = ".".join(common)
    around = [".".join(common[:-1])] if common else []
    inside = [f"{root}.{name}".strip(".") if name else root for name, _ in model.get_submodule(root).named_modules()] if root else [root]
    return [
        (name, key, value)
        for name in (*inside, *around)
        if not isinstance(module := model.get_submodule(name), SIZED)
        for key, value in vars(module).items()
        if type(value) is int and not key.startswith("_") and value > 0
    ]


def _guesses(places: Sequence[tuple[str, str, int]], count: int, widths: set[int]) -> Iterator[tuple[Attribute, ...]]:
    """Sets of attributes that may have to be lowered with the heads, the likeliest first."""
    equal = [Attribute(module=module, name=name, each=1) for module, name, value in places if value == count]
    wide = [Attribute(module=module, name=name, each=value // count) for module, name, value in places if value in widths]
    named = [
        Attribute(module=module, name=name, each=value // count)
        for module, name, value in places
        if value % count == 0 and "head" in name and not any(word in name for word in _SIZE_WORDS)
    ]
    guesses = [tuple(equal), (*equal, *wide), tuple(named), (*named, *wide), ()]
    yield from dict.fromkeys(tuple(dict.fromkeys(guess)) for guess in guesses)
