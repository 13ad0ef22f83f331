"""The plan of a graph for exact tiles: probes, cuts between levels, passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import lcm

import numpy as np
import onnx
from onnx import helper

from muntin.artifact.manifest import Signature
from muntin.artifact.tile_plan import MapTensor, TilePass, TilePlan, TokenCount, WholeValue
from muntin.errors import ExportError
from muntin.graph.calibration import output_shapes
from muntin.graph.onnx_graph import Graph
from muntin.graph.tiling.cuts import Cuts
from muntin.graph.tiling.layouts import AxisLengths, Layouts, PictureSize
from muntin.graph.tiling.levels import Levels, NoPlanError, data_tensors, whole_softmaxes
from muntin.graph.tiling.reach import halo
from muntin.runtime.exact_tiles.parts import IMAGES, SCORES, GraphParts, reducible

_PROBES: tuple[PictureSize, PictureSize] = ((353, 289), (865, 737))
"""Sizes of the two pictures whose shapes are compared: sides that no stride divides, with other numbers of windows up to 512 pixels."""


def make_plan(model: onnx.ModelProto, signature: Signature) -> TilePlan:
    """Return the plan of an image model. Raises NoPlanError with the reason where there is none."""
    if signature.answer.one:
        raise NoPlanError("the model has one answer for a picture")
    sizes = [signature.sizes.at_least(*size) for size in _PROBES]
    if sizes[0] == sizes[1]:
        raise NoPlanError(f"the model takes {signature.sizes.text} only")
    try:
        return _Planner(model, signature, sizes).plan()
    except NoPlanError:
        raise
    except ExportError as error:
        raise NoPlanError(str(error)) from error


class _Planner:
    """The steps from a graph to its plan."""

    def __init__(self, model: onnx.ModelProto, signature: Signature, sizes: Sequence[PictureSize]) -> None:
        self._model, self._signature, self._sizes = model, signature, sizes
        graph = Graph(model)
        layouts = self._layouts(graph)
        self.softmaxes = whole_softmaxes(graph, layouts, data_tensors(graph.nodes, IMAGES))
        if self.softmaxes:
            graph.nodes = reducible(graph.nodes, self.softmaxes)
            graph.reindex()
            layouts = self._layouts(graph)
        self.layouts = layouts
        self.levels = Levels(graph, layouts, IMAGES)
        self.graph = graph
        if layouts.of(SCORES) is None:
            raise NoPlanError("its scores are no map of the picture")
        self.counts = self._counts()

    def _layouts(self, graph: Graph) -> Layouts:
        data = data_tensors(graph.nodes, IMAGES)
        inferred = onnx.shape_inference.infer_shapes(graph.proto()).graph
        kinds = {entry.name: entry.type.tensor_type.elem_type for entry in (*inferred.value_info, *inferred.input, *inferred.output)}
        types = {name: helper.tensor_dtype_to_np_dtype(kind) for name, kind in kinds.items() if kind}
        shapes: list[dict[str, AxisLengths]] = []
        for height, width in self._sizes:
            picture = np.zeros((1, height, width, self._signature.channels), np.uint8)
            shapes.append({**output_shapes(graph, sorted(data), {IMAGES: picture})})
        return Layouts(self._sizes, shapes, types)

    def plan(self) -> TilePlan:
        """Return the plan."""
        stored = self._stored()
        last = self.levels.level[SCORES]
        passes: list[TilePass] = []
        for level in range(last + 1):
            outputs = [name for name in stored if self.levels.level[name] == level]
            if level == last:
                outputs.append(SCORES)
            if outputs:
                passes.append(self._pass(outputs, stored))
            values = [name for name in self.levels.reductions if self.levels.level[name] == level + 1]
            if values and level < last:
                alone = not outputs or any(passes[-1].halo)
                given = [] if alone else list(passes.pop().gives_maps)  # without surroundings one pass serves both
                passes.append(self._pass([*given, *values], stored))
        used = {name for walk in passes for name in (*walk.maps, *walk.gives_maps)}
        maps = [self._map(name) for name in (IMAGES, *stored, SCORES) if name in used]
        merged = [
            WholeValue(name=name, merge=merge, shape=self.layouts.shape(name), stride=self._stride_of(name))
            for name, merge in self.levels.reductions.items()
        ]
        return TilePlan(
            maps=tuple(maps), values=tuple(merged), counts=tuple(self.counts), softmaxes=tuple(self.softmaxes), passes=tuple(passes)
        )

    def _map(self, name: str) -> MapTensor:
        tensor = self.layouts.of(name)
        assert tensor is not None
        return tensor

    def _stride_of(self, name: str) -> int:
        """Pixels of a cell of what is reduced."""
        source = self.graph.makers[name].input[0]
        tensor = self.layouts.of(source)
        if self.levels.reductions[name] == "mean" and (tensor is None or tensor.window is not None):
            raise NoPlanError(f"'{name}' is a mean over cells in an order that is not known")
        return 1 if tensor is None else tensor.stride

    def _counts(self) -> list[TokenCount]:
        """The numbers of tokens that the graph computes with as numbers, from the shapes of tensors."""
        counts = []
        for node in self.graph.nodes:
            if node.op_type != "Shape" or node.input[0] not in self.levels.data or node.input[0] == IMAGES:
                continue
            options = {entry.name: entry.i for entry in node.attribute}
            if not self._becomes_float(node.output[0]):
                continue
            parts = [shape[options.get("start", 0) : options.get("end", len(shape))] for shape in self.layouts.shapes(node.input[0])]
            count = self.layouts.count(node.output[0], [part[0] for part in parts]) if len(parts[0]) == 1 else None
            if count is None:
                raise NoPlanError(f"'{node.output[0]}', a size that it computes with, is no number of tokens")
            counts.append(count)
        return counts

    def _becomes_float(self, name: str) -> bool:
        """True if numbers made of a shape are cast to floats."""
        waiting, seen = [name], set()
        while waiting:
            tensor = waiting.pop()
            for node in self.graph.readers.get(tensor, []):
                if node.op_type == "Cast" and {entry.name: entry.i for entry in node.attribute}.get("to") in (1, 10, 11):
                    return True
                if node.op_type in ("Add", "Sub", "Mul", "Div", "Squeeze", "Unsqueeze", "Gather", "Slice", "Cast", "Mod", "Concat"):
                    fresh = [output for output in node.output if output not in seen]
                    seen.update(fresh)
                    waiting += fresh
        return False

    def _stored(self) -> list[str]:
        """Names of the tensors to store, in the order of the graph."""
        cuts = Cuts(self.levels)
        stored: set[str] = set()
        for level in range(self.levels.level[SCORES], 0, -1):
            apart: dict[bool, set[str]] = {True: set(), False: set()}
            for node in self.levels.readers(level):
                needed = {name for name in self.levels.covering(node) if self.levels.level[name] < level}
                apart[self.levels.spreads(node)].update(needed)
            for spread, needed in apart.items():
                stored |= cuts.before(needed, stored, through_windows=not spread)
        stored.discard(IMAGES)
        return sorted(stored, key=lambda name: self.levels.order[name])

    def _pass(self, outputs: list[str], stored: Iterable[str]) -> TilePass:
        """Return the pass that computes some maps, or contributions to some values, from the maps stored before."""
        before = {name for name in stored if name not in outputs and self.levels.order[name] < max(self.levels.order[o] for o in outputs)}
        maps, values, inner = self._needs(outputs, before)
        layouts = [tensor for name in inner if (tensor := self.layouts.of(name)) is not None]
        step = lcm(1, *(tensor.step for tensor in (*layouts, *(self._map(name) for name in maps if name != IMAGES))))
        if step > 4096:
            raise NoPlanError(f"tiles would have to begin at multiples of {step} pixels")
        given: dict[bool, list[str]] = {True: [], False: []}
        for name in outputs:
            given[name in self.levels.reductions].append(name)
        walk = TilePass(maps=tuple(maps), values=tuple(values), gives_maps=tuple(given[False]), gives_values=tuple(given[True]), step=step)
        return walk if given[True] else walk.model_copy(update={"halo": self._halo(walk)})  # values: from each cell alone

    def _needs(self, outputs: Iterable[str], before: set[str]) -> tuple[list[str], list[str], set[str]]:
        """Maps and values that some tensors follow from, and all tensors between."""
        maps, values, inner = [], [], set()
        waiting = list(outputs)
        while waiting:
            name = waiting.pop()
            if name in inner:
                continue
            inner.add(name)
            for tensor in self.levels.inputs(self.graph.makers[name]):
                if tensor == IMAGES or tensor in before:
                    maps.append(tensor)
                elif tensor in self.levels.reductions:
                    values.append(tensor)
                else:
                    waiting.append(tensor)
        return list(dict.fromkeys(maps)), list(dict.fromkeys(values)), inner

    def _halo(self, walk: TilePass) -> tuple[int, int]:
        maps = {name: self._map(name) for name in walk.maps}
        values = {name: (np.dtype(np.float32), self.layouts.shape(name)) for name in walk.values}
        draft = TilePlan(maps=(), counts=tuple(self.counts), softmaxes=tuple(self.softmaxes), passes=(walk,))
        parts = GraphParts(self._model, draft)

        def cut(size: PictureSize) -> onnx.ModelProto:
            shapes = {name: (np.dtype(tensor.dtype), tensor.shape(*size)) for name, tensor in maps.items()}
            return parts.cut({**shapes, **values}, walk.gives_maps, size, size, self._signature.channels)

        return halo(cut, maps.values(), [self._map(name) for name in walk.gives_maps], walk.step)
