"""Cuts of a graph: the tensors of the fewest bytes from which some others follow, each cell from itself."""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx

from muntin.graph.tiling.levels import Levels, NoPlanError
from muntin.runtime.exact_tiles.parts import IMAGES

_UNIT = 1 << 24
"""Capacity of a byte for each pixel. Below it, a cut that repeats fewer products is preferred, then one with fewer windows."""


class Cuts:
    """Cuts of a graph with levels."""

    def __init__(self, levels: Levels) -> None:
        self._levels, self._layouts = levels, levels.layouts
        self._products: dict[str, int] = {IMAGES: 0}
        for node in levels.graph.nodes:
            behind = max((self._products.get(name, 0) for name in levels.inputs(node)), default=0)
            self._products.update(dict.fromkeys(node.output, behind + (node.op_type in ("MatMul", "Gemm", "Conv", "ConvTranspose"))))
        self._most = max(self._products.values())

    def before(self, needed: Iterable[str], stored: set[str], *, through_windows: bool) -> set[str]:
        """Return the cut before some tensors. Those `stored` already cost nothing. Raises NoPlanError where there is none.

        Method: the minimum cut of a flow from the picture to the needed tensors, the one nearest to these.
        """
        flow = nx.DiGraph()
        waiting, seen = list(needed), set(needed)
        for name in seen:
            flow.add_edge((name, "out"), "needed")
        while waiting:
            name = waiting.pop()
            cost = self._cost(name, stored)
            flow.add_edge((name, "in"), (name, "out"), **({} if cost is None else {"capacity": cost}))
            inputs = self._behind(name, through_windows=through_windows)
            if inputs is None:
                flow.add_edge("picture", (name, "in"))
            for other in inputs or ():
                flow.add_edge((other, "out"), (name, "in"))
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)
        if not seen:
            return set()
        try:
            _, (before, _) = nx.minimum_cut(flow, "picture", "needed")
        except nx.NetworkXUnbounded as error:
            raise NoPlanError(f"there is no place to cut before {', '.join(sorted(needed))[:200]}") from error
        return {name for name in seen if (name, "in") in before and (name, "out") not in before}

    def _cost(self, name: str, stored: set[str]) -> int | None:
        """Capacity of a tensor, None where it cannot be cut."""
        tensor = self._layouts.of(name)
        if tensor is None:
            return None
        space = 0 if name == IMAGES or name in stored else int(self._layouts.bytes_per_pixel(name) * _UNIT)
        return space + 2 * (self._most - self._products[name]) + (tensor.window is not None)

    def _behind(self, name: str, *, through_windows: bool) -> list[str] | None:
        """The covering tensors from which each cell of a tensor follows; None where it needs its surroundings, and for the picture."""
        node = self._levels.graph.makers.get(name)
        if node is None or self._levels.spreads(node) or name in self._levels.reductions:
            return None
        inputs = self._levels.covering(node)
        return None if not through_windows and any(self._in_windows(tensor) for tensor in inputs) else inputs

    def _in_windows(self, name: str) -> bool:
        tensor = self._layouts.of(name)
        return len(self._layouts.shape(name)) > 4 or (tensor is not None and tensor.window is not None)
