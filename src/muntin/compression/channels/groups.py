"""Groups of channels that only leave a model together: the outputs of some layers, and the inputs of the layers that read them.

    convolution -> batch norm -> ReLU -> convolution        one group: rows of the first weight, the norm, columns of the second weight
    residual sums, depthwise convolutions, concatenation, flattening: all layers whose channels meet there are in one group

The groups come from torch-pruning's dependency graph (Fang et al., DepGraph, 2301.12900), traced on a copy of the model. The cutting is
done here, so that flags, subclasses and sizes stay as they are.

Axes: C channels of a group, O output and I input channels of a layer.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from muntin.compression.channels.sizes import SIZED, prunable
from muntin.errors import DependencyError, MuntinError, install
from muntin.models.eager import ModelInputs, call, tensors_of

ChannelSide = Literal["out", "in", "both"]
"""Side of a layer whose channels are in a group; both: of a norm, or of a depthwise convolution, whose outputs are its inputs."""
ChannelCuts = Mapping[str, Sequence[int]]
"""By the name of a group: the channels to remove, in the numbering of its first layer's outputs."""
VISITS_A_NODE = 30
"""Mean number of times that a group may reach a node. Where channels are repeated (keys shared by heads), torch-pruning would follow new
copies of them without end."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A layer or norm of a group."""

    layer: str
    side: ChannelSide
    positions: tuple[int, ...]
    """Positions along the layer's axis that belong to the group."""
    channels: tuple[int, ...]
    """For each position: the group's channel."""


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """An integer attribute of a module that is lowered with the channels of a group."""

    module: str
    name: str
    each: int
    """Amount by which one channel lowers it."""


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Channels that leave together, named by the first layer that gives them."""

    name: str
    channels: int
    members: tuple[Member, ...]
    obstacle: str
    """Why the group cannot be cut; empty if nothing is known against it."""
    unit: Literal["channels", "heads"] = "channels"
    """heads: a channel of the group is a head of an attention, several channels of each layer."""
    attributes: tuple[Attribute, ...] = ()

    @property
    def places_each(self) -> int:
        """The least number of positions that a channel has in a layer that reads it."""
        return min((len(member.positions) // self.channels for member in self.members if member.side == "in"), default=1)

    @property
    def givers(self) -> tuple[str, ...]:
        """The Linears and convolutions whose outputs are cut."""
        return tuple(dict.fromkeys(member.layer for member in self.members if member.side == "out"))


def channel_groups(model: nn.Module, example: ModelInputs) -> dict[str, ChannelGroup]:
    """The groups of a model's channels, by name. `example`: one row of inputs.

    Costs a copy of the model and a forward pass with its graph. Raises `MuntinError` if the model cannot be traced.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise DependencyError(f"prune needs the package torch-pruning: {install('train')}") from error
    traced = copy.deepcopy(model).eval().requires_grad_(True)
    names = {id(module): name for name, module in traced.named_modules()}
    try:
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            # of a graph that is too deep for it (shifted windows), torch-pruning would follow the channels without end
            warnings.filterwarnings("error", "Maximum recursive depth reached", UserWarning)
            graph = torch_pruning.DependencyGraph().build_dependency(
                traced,
                example_inputs=example,
                forward_fn=call,
                output_transform=lambda answer: [part for part in tensors_of(answer) if part.grad_fn is not None],
                verbose=False,
            )
            steps = _Visits(VISITS_A_NODE * len(graph.module2node))
            for node in graph.module2node.values():
                node.dependencies = _Counted(node.dependencies, steps)
            groups = []
            for group in graph.get_all_groups(root_module_types=[kind for kind in SIZED if prunable(kind)]):
                groups.append(group)
                steps.taken = 0
    except (UserWarning, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise MuntinError(
            f"the channels of this model cannot be followed ({reason}): check that it runs on the example, or use low_rank"
        ) from error
    return {group.name: group for group in (_as_group(items, names) for items in groups)}


@dataclass
class _Visits:
    """Visits of nodes while one group is followed."""

    limit: int
    taken: int = 0

    def take(self) -> None:
        self.taken += 1
        if self.taken > self.limit:
            raise RuntimeError(f"a group has more than {self.limit} parts, as where heads share their keys and values")


class _Counted(list[Any]):
    """The dependencies of a node; counts how often they are read."""

    def __init__(self, dependencies: Sequence[Any], steps: _Visits) -> None:
        super().__init__(dependencies)
        self.steps = steps

    def __iter__(self) -> Iterator[Any]:
        self.steps.take()
        return super().__iter__()


def _as_group(items: Any, names: Mapping[int, str]) -> ChannelGroup:
    members, obstacle, count = [], "", len(items[0].idxs)
    for item in items:
        module, handler = item.dep.target.module, item.dep.handler
        if id(module) not in names:
            known = _reason_of(module)
            obstacle = obstacle or known
            continue
        name = names[id(module)]
        if not isinstance(module, SIZED) or any(key not in ("weight", "bias") for key in module._parameters):
            obstacle = obstacle or f"{name} ({type(module).__name__}) cannot be cut"
            continue
        if isinstance(module, nn.PReLU) and module.num_parameters == 1:
            continue
        if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not _is_depthwise(module):
            obstacle = obstacle or f"{name} is a grouped convolution"
        member = Member(layer=name, side=_side(module, handler), positions=tuple(item.idxs), channels=tuple(item.root_idxs))
        if not _fits(module, member, count):
            obstacle = obstacle or f"the channels of {name} cannot be followed"
            continue
        members.append(member)
    return ChannelGroup(name=names[id(items[0].dep.target.module)], channels=count, members=tuple(members), obstacle=obstacle)


def _fits(module: nn.Module, member: Member, count: int) -> bool:
    """Return False for positions that the layer does not have: the graph maps no concatenation that is flattened, for instance."""
    tensors = [tensor for _, tensor in _tensors(module) if tensor.ndim]
    sizes = [
        tensor.shape[axis_of(module, member.side) if tensor.ndim > 1 else 0] for tensor in tensors if tensor.ndim > 1 or member.side != "in"
    ]
    known = all(channel is not None and channel < count for channel in member.channels)
    return known and len(member.channels) == len(member.positions) and all(max(member.positions, default=0) < size for size in sizes)


def _reason_of(module: object) -> str:
    if isinstance(module, nn.Parameter):
        return "a parameter outside of layers has its channels"
    return "the answer has its channels" if type(module).__name__ == "_OutputOp" else ""


def _side(module: nn.Module, handler: Callable[..., Any]) -> ChannelSide:
    if not prunable(type(module)) or (isinstance(module, nn.modules.conv._ConvNd) and _is_depthwise(module)):
        return "both"
    return "out" if "out" in handler.__name__ else "in"


def _is_depthwise(conv: nn.modules.conv._ConvNd) -> bool:
    return conv.groups == conv.out_channels == conv.in_channels and conv.groups > 1


def axis_of(layer: nn.Module, side: ChannelSide) -> int:
    """The axis of a weight that has the channels of one side."""
    transposed = isinstance(layer, nn.modules.conv._ConvNd) and layer.transposed
    return int((side == "in") != transposed) if prunable(type(layer)) and side != "both" else 0


def removed(groups: Mapping[str, ChannelGroup], cuts: ChannelCuts) -> dict[tuple[str, ChannelSide], set[int]]:
    """The positions that leave each layer and side."""
    leaving_at: dict[tuple[str, ChannelSide], set[int]] = {}
    for name, channels in cuts.items():
        leaving = set(channels)
        for member in groups[name].members:
            positions = {place for place, channel in zip(member.positions, member.channels, strict=True) if channel in leaving}
            leaving_at.setdefault((member.layer, member.side), set()).update(positions)
    return leaving_at


@torch.no_grad()
def cut(model: nn.Module, groups: Mapping[str, ChannelGroup], cuts: ChannelCuts) -> None:
    """Remove channels of groups, in place. Parameters are new, with the flags of the old ones and without gradients."""
    for (name, side), leaving_at in removed(groups, cuts).items():
        layer = model.get_submodule(name)
        for key, tensor in _tensors(layer):
            axis = axis_of(layer, side) if tensor.ndim > 1 else 0
            if tensor.ndim == 0 or (tensor.ndim == 1 and side == "in"):  # a counter, a bias
                continue
            kept = torch.tensor([place for place in range(tensor.shape[axis]) if place not in leaving_at], device=tensor.device)
            part = tensor.detach().index_select(axis, kept)
            if isinstance(tensor, nn.Parameter):
                layer._parameters[key] = nn.Parameter(part, requires_grad=tensor.requires_grad)
            else:
                layer._buffers[key] = part
        _shrink(layer, side, len(leaving_at))
    for name, channels in cuts.items():
        for attribute in groups[name].attributes:
            module: Any = model.get_submodule(attribute.module)
            setattr(module, attribute.name, getattr(module, attribute.name) - attribute.each * len(set(channels)))


def _tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in (*layer._parameters.items(), *layer._buffers.items()):
        if tensor is not None:
            yield key, tensor


def _shrink(layer: Any, side: ChannelSide, count: int) -> None:
    """Lower the attributes that hold a layer's sizes."""
    if isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = (layer.normalized_shape[0] - count,)
        return
    sides = {"out": ("out_features", "out_channels"), "in": ("in_features", "in_channels")}
    names = sides.get(side, ("in_channels", "out_channels", "groups", "num_features", "num_parameters"))
    for name in names:
        if isinstance(vars(layer).get(name), int):
            setattr(layer, name, getattr(layer, name) - count)


@torch.no_grad()
def mask(model: nn.Module, groups: Mapping[str, ChannelGroup], cuts: ChannelCuts) -> None:
    """Set to zero, in place, the weights that read the channels: what a model without them must compute."""
    for (name, side), leaving_at in removed(groups, cuts).items():
        layer = model.get_submodule(name)
        weight = layer._parameters.get("weight")
        if side == "in" and weight is not None and leaving_at:
            weight.index_fill_(axis_of(layer, side), torch.tensor(sorted(leaving_at), device=weight.device), 0.0)


@contextmanager
def counted_macs(model: nn.Module) -> Iterator[dict[str, float]]:
    """Count, by layer, the positions at which a call of the model multiplies a whole weight: multiply-adds over the weight's size."""
    positions: dict[str, float] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def count(layer: nn.Module, inputs: Any, output: Tensor) -> None:
            conv = isinstance(layer, nn.modules.conv._ConvNd)
            moved = inputs[0] if conv and layer.transposed and inputs else output
            axis = -1 - len(layer.kernel_size) if isinstance(layer, nn.modules.conv._ConvNd) else -1
            positions[name] = positions.get(name, 0.0) + moved.numel() / moved.shape[axis]

        return count

    handles = [layer.register_forward_hook(hook(name)) for name, layer in model.named_modules() if prunable(type(layer))]
    try:
        yield positions
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Costs:
    """Parameters of a model, and multiply-adds of its layers for one row of inputs."""

    parameters: int
    macs: int


def costs(model: nn.Module, groups: Mapping[str, ChannelGroup], cuts: ChannelCuts, positions: Mapping[str, float]) -> Costs:
    """The costs of a model once channels are removed, without removing them. `positions`: of `counted_macs`."""
    leaving_at: dict[str, dict[ChannelSide, int]] = {}
    for (name, side), places in removed(groups, cuts).items():
        leaving_at.setdefault(name, {})[side] = len(places)
    parameters, macs = 0, 0.0
    seen: set[int] = set()
    for name, layer in model.named_modules():
        for key, parameter in layer._parameters.items():
            if parameter is None:
                continue
            shape = list(parameter.shape)
            for side, count in leaving_at.get(name, {}).items():
                if parameter.ndim > 1 or side != "in":
                    shape[axis_of(layer, side) if parameter.ndim > 1 else 0] -= count
            size = torch.Size(shape).numel()
            parameters += 0 if id(parameter) in seen else size
            seen.add(id(parameter))
            macs += size * positions.get(name, 0.0) if key == "weight" else 0.0
    return Costs(parameters, round(macs))
