"""What the autograd graph of a loss reaches: parameters, bundle operations and the routes they ran under."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from torch import Tensor

from ..core.functional import _Bundles
from ..core.packing import _Join


Edge: TypeAlias = tuple[Any, int]  # as `next_functions` has them


@dataclass
class Reach:
    """What a graph reaches.

    Attributes:
        nodes: all but what only lies behind the D and E of bundle operations.
        leaves: all that may get a gradient, by id. beside: ids of those that are reached beside D and E (too).
        folds: where the D and E of bundle operations come from, as `next_functions` has it.
        nested: whether one of those lies behind another (E comes from what D comes from, and alphas).
        routes: of bundle operations. compiled: whether parts are.
    """

    nodes: set[Any] = field(default_factory=set)
    leaves: dict[int, Tensor] = field(default_factory=dict)
    beside: set[int] = field(default_factory=set)
    folds: dict[tuple[Any, int], None] = field(default_factory=dict)
    routes: dict[Any, None] = field(default_factory=dict)
    nested: bool = False
    compiled: bool = False

    def update(self, other: Reach) -> None:
        self.nodes |= other.nodes
        self.leaves.update(other.leaves)
        self.beside |= other.beside
        self.folds.update(other.folds)
        self.routes.update(other.routes)
        self.nested |= other.nested
        self.compiled |= other.compiled


def walk(losses: Sequence[Tensor]) -> list[Reach]:
    """What the graph of each loss reaches. What several share below one node is walked once for all but the first."""
    kinds: dict[type, str] = {}
    known: dict[Any, Reach] = {}
    behind: dict[Any, Reach] = {}  # what a fold reaches
    seen: set[Any] = set()

    def kind_of(node: Any) -> str:
        if isinstance(node, _Bundles._backward_cls):  # type: ignore[attr-defined]
            return "bundles"
        if isinstance(node, _Join._backward_cls):  # type: ignore[attr-defined]
            return "join"
        if hasattr(node, "variable"):
            return "leaf"
        return "compiled" if "CompiledFunction" in type(node).__name__ else ""

    def reach(root: Any, fresh: bool) -> Reach:
        found, stack = Reach(), [root]
        while stack:
            node = stack.pop()
            if node is None or node in found.nodes:
                continue
            if fresh and node in seen:
                known[node] = known.get(node) or reach(node, False)
                found.update(known[node])
                continue
            found.nodes.add(node)
            kind = kinds.get(type(node))
            kind = kinds.setdefault(type(node), kind_of(node)) if kind is None else kind
            edges = node.next_functions
            if kind == "bundles":
                found.routes[cast(Any, node).route] = None
                first = 1 if cast(Any, node).shared else 2  # behind hidden, and residual where there is one
                found.folds.update((edge, None) for edge in edges[first : first + 2] if edge[0] is not None)
                edges = edges[:first] + edges[first + 2 :]
            elif kind == "join":  # those that do not learn get none
                edges = [edge for edge, learns in zip(edges[1:], cast(Any, node).learn) if learns]
            elif kind == "leaf":
                found.leaves.setdefault(id(node.variable), node.variable)
                found.beside.add(id(node.variable))
            found.compiled |= kind == "compiled"
            stack.extend(child for child, _ in edges)
        folds = {node for node, _ in found.folds}
        for node in folds:
            behind[node] = behind.get(node) or reach(node, False)
            found.leaves.update(behind[node].leaves)
            found.nested |= not behind[node].nodes.isdisjoint(folds - {node})
            found.compiled |= behind[node].compiled
        return found

    reached = []
    for loss in losses:
        reached.append(reach(loss.grad_fn, bool(seen)))
        seen |= reached[-1].nodes
    return reached
