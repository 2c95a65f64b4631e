"""What the autograd graph of a loss reaches: parameters, bundle operations and the routes they ran under."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from ..core.functional import BundleOperation
from ..core.packing import JoinWeights


Edge: TypeAlias = tuple[Any, int]  # a node and which of its outputs, as in `next_functions`


@dataclass
class Reach:
    """What a graph reaches.

    Attributes:
        nodes: its nodes, except those reached only through the D and E of bundle operations.
        leaves: all tensors that may get a gradient, by id.
        beside: ids of the leaves that are reached by a way other than D and E (or by both).
        folds: the edges that the D and E of bundle operations come from.
        routes: the routes of the bundle operations; None stands for outside route(...).
        nested: whether the D or E of one operation depends on that of another (E depends on what D depends on, and on
            alphas).
        compiled: whether parts of the graph are compiled; what is inside them cannot be seen.
    """

    nodes: set[Any] = field(default_factory=set)
    leaves: dict[int, Tensor] = field(default_factory=dict)
    beside: set[int] = field(default_factory=set)
    folds: dict[Edge, None] = field(default_factory=dict)
    routes: dict[Any, None] = field(default_factory=dict)
    nested: bool = False
    compiled: bool = False

    def update(self, other: Reach) -> None:
        """Add what another part of the graph reaches."""
        self.nodes |= other.nodes
        self.leaves.update(other.leaves)
        self.beside |= other.beside
        self.folds.update(other.folds)
        self.routes.update(other.routes)
        self.nested |= other.nested
        self.compiled |= other.compiled


def walk(losses: Sequence[Tensor]) -> list[Reach]:
    """What the graph of each loss reaches.

    The parts below a node that several losses share are walked once for all losses after the first.
    """
    kinds: dict[type, str] = {}
    below: dict[Any, Reach] = {}  # shared node -> what it reaches
    behind: dict[Any, Reach] = {}  # node that D or E comes from -> what it reaches
    seen: set[Any] = set()  # nodes of earlier losses

    def kind_of(node: Any) -> str:
        if isinstance(node, BundleOperation._backward_cls):  # type: ignore[attr-defined]
            return "bundles"
        if isinstance(node, JoinWeights._backward_cls):  # type: ignore[attr-defined]
            return "join"
        if hasattr(node, "variable"):
            return "leaf"
        return "compiled" if "CompiledFunction" in type(node).__name__ else ""

    def reach_of(root: Any, share: bool) -> Reach:
        """What `root` reaches; with `share`, nodes of earlier losses are looked up in `below`."""
        reach, stack = Reach(), [root]
        while stack:
            node = stack.pop()
            if node is None or node in reach.nodes:
                continue
            if share and node in seen:
                below[node] = below.get(node) or reach_of(node, False)
                reach.update(below[node])
                continue
            reach.nodes.add(node)
            kind = kinds.get(type(node))
            kind = kinds.setdefault(type(node), kind_of(node)) if kind is None else kind
            edges = node.next_functions
            if kind == "bundles":
                reach.routes[None if node.gate is None else node.gate.route] = None
                first = 1 if node.shared else 2  # D and E come after hidden, and after residual where there is one
                reach.folds.update((edge, None) for edge in edges[first : first + 2] if edge[0] is not None)
                edges = edges[:first] + edges[first + 2 :]
            elif kind == "join":  # weights that do not learn get no gradient
                edges = [edge for edge, learns in zip(edges[1:], node.learns) if learns]
            elif kind == "leaf":
                reach.leaves.setdefault(id(node.variable), node.variable)
                reach.beside.add(id(node.variable))
            reach.compiled |= kind == "compiled"
            stack.extend(child for child, _ in edges)
        folds = {node for node, _ in reach.folds}
        for node in folds:
            behind[node] = behind.get(node) or reach_of(node, False)
            reach.leaves.update(behind[node].leaves)
            reach.nested |= not behind[node].nodes.isdisjoint(folds - {node})
            reach.compiled |= behind[node].compiled
        return reach

    reached = []
    for loss in losses:
        reached.append(reach_of(loss.grad_fn, bool(seen)))
        seen |= reached[-1].nodes
    return reached
