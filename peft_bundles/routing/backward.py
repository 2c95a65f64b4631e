"""Several losses on the same rows: one pass over the graph per distinct routing column, each into its owners only."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ..core.state import BundleState
from ..core.walking import bundle_parameters, state_of
from .graph import Edge, Reach, walk
from .routes import Route, check_signals, routing_column


def routed_backward(model: nn.Module, losses: Mapping[str, Tensor], *, retain_graph: bool = False) -> None:
    """Backward of several losses, each into the owners of its signal only; `.grad` accumulates, as in `.backward()`.

    Losses whose routing columns are equal are added first. Where the forward ran under `route(...)` with the signals
    of every row, losses on different rows share a pass, and only the graph that a further pass reaches is walked again.
    Where it ran outside any `route`, every distinct column takes a pass and the weights scale whole gradients.
    Parameters of no bundle (a value head, LoRA, a trained trunk) get the gradient of the sum of all losses.

    Args:
        losses: signal -> scalar loss.
        retain_graph: keep the graph after the last pass too.

    Raises:
        ValueError: an unknown signal, a loss that is no scalar or has no graph, a loss of rows routed otherwise.
        RuntimeError: no owner of a signal takes part in its loss (for one: re-entrant gradient checkpointing); by then
            the others have their gradients. A compiled forward outside `route((...))` and attenuated weights, which
            would not be found in its graph.
    """
    state = state_of(model)
    check_signals(state.configs, list(losses))
    for signal, loss in losses.items():
        if loss.numel() != 1 or loss.grad_fn is None:
            raise ValueError(f"losses[{signal!r}] must be a scalar with a graph, got shape {tuple(loss.shape)}.")
    reached = dict(zip(losses, walk(list(losses.values()))))
    routes = {signal: _routes(state, signal, reach) for signal, reach in reached.items()}
    owners = {signal: _owners(state, signal, found) for signal, found in routes.items()}
    owner_of = {id(p): key for key, parameters in bundle_parameters(model).items() for p in parameters}
    used = list(dict.fromkeys(r for found in routes.values() for r in found))
    passes = _plan_passes(state, routes)
    # Where weights are reached through D and E alone, whose gradients are gated already, passes add those up, and they
    # are folded back once. Not where one lies behind the other (an alpha that is a number other than 1 is multiplied
    # into E), nor with projectors: what is not finite in one bundle's rows would reach the others' W.
    once = len(passes) > 1 and all(routes.values()) and all(c.projection == "none" for c in state.configs.values())
    once = once and not any(r.nested or r.beside & owner_of.keys() for r in reached.values())
    folds: dict[Edge, Tensor] = {}
    learnt: set[int] = set()
    try:
        for number, signals in enumerate(passes):
            for r in used:
                r.choose(set(signals))
            total = torch.stack([losses[s].reshape(()) for s in signals]).sum()
            weights = {key: weight for s in signals for key, weight in owners[s].items()}
            leaves = _leaves([reached[s] for s in signals], owner_of, {} if once else weights)
            edges = list(dict.fromkeys(edge for s in signals for edge in reached[s].folds)) if once else []
            keep = retain_graph or number < len(passes) - 1
            gradients = _gradients(total, leaves, edges, keep)
            scale = {} if any(routes[s] for s in signals) else weights
            learnt |= _add(leaves, gradients, [scale.get(owner_of.get(id(p), ("", "")), 1.0) for p in leaves])
            for edge, gradient in zip(edges, gradients[len(leaves) :]):
                if gradient is not None:
                    folds[edge] = gradient if edge not in folds else folds[edge].add_(gradient)
        if folds:
            mine = {i: p for s, r in reached.items() for i, p in r.leaves.items() if owner_of.get(i) in owners[s]}
            roots, leaves = [GradientEdge(*edge) for edge in folds], list(mine.values())
            learnt |= _add(
                leaves, torch.autograd.grad(roots, leaves, list(folds.values()), retain_graph, allow_unused=True)
            )
    finally:
        for r in used:
            r.choose(None)
    for signal, of in owners.items():
        if of and not any(owner_of.get(leaf) in of for leaf in learnt & reached[signal].leaves.keys()):
            raise RuntimeError(
                f"the loss of {signal!r} reached none of its bundles {sorted(of)}. Is their alpha 0, is the adapter "
                "inactive, or is gradient checkpointing re-entrant? Use use_reentrant=False."
            )
    state.waiting = [r for r in state.waiting if r not in used]


def _routes(state: BundleState, signal: str, reach: Reach) -> list[Route]:
    """The routes of the forwards that a loss comes from; none if they ran outside any."""
    routes = [r for r in reach.routes if r is not None]
    if routes and None in reach.routes:
        raise ValueError(f"losses[{signal!r}] mixes forwards inside and outside route(); use one loss for each.")
    if stray := [r.signals for r in routes if signal not in r.signals]:
        raise ValueError(f"losses[{signal!r}] belong to no row of its forward, whose signals are {stray[0]}.")
    if reach.compiled and not routes and any(0 < w < 1 for w in routing_column(state.configs, signal)):
        raise RuntimeError(
            f"losses[{signal!r}] comes from a compiled forward, whose graph does not tell how it was routed, and the "
            "signal has attenuated owners. Run the forward under route() with a tuple of signals, or use .backward()."
        )
    return routes


def _plan_passes(state: BundleState, routes: Mapping[str, list[Route]]) -> list[list[str]]:
    """Group signals into passes: in one pass no row may see two different columns."""

    def clash(a: str, b: str) -> bool:
        if not (routes[a] and routes[b]):  # outside a route, weights scale the gradients of a whole pass
            return bool(routes[a] or routes[b]) or routing_column(state.configs, a) != routing_column(state.configs, b)
        return any(r.clash(a, b) for r in routes[a] if r in routes[b])

    passes: list[list[str]] = []
    for signal in routes:
        home = next((p for p in passes if not any(clash(signal, other) for other in p)), None)
        passes.append([signal]) if home is None else home.append(signal)
    return passes


def _owners(state: BundleState, signal: str, routes: Sequence[Route]) -> dict[tuple[str, str], float]:
    """(adapter, bundle) -> weight of those that learn from a signal, in forwards under these routes (if any)."""
    return {
        (adapter, name): weight
        for adapter, config in state.configs.items()
        for name, weight in config.column(signal).items()
        # A bundle that the weights of all rows shut out (topics) is not missed.
        if weight > 0 and (not routes or any(name in r.live(adapter) for r in routes))
    }


def _leaves(
    reached: Sequence[Reach], owner_of: Mapping[int, tuple[str, str]], owners: Mapping[tuple[str, str], float]
) -> list[Tensor]:
    """What losses reach: parameters of these owners and of no bundle at all."""
    leaves = {number: leaf for reach in reached for number, leaf in reach.leaves.items()}
    return [leaf for number, leaf in leaves.items() if number not in owner_of or owner_of[number] in owners]


def _gradients(
    loss: Tensor, leaves: Sequence[Tensor], edges: Sequence[Edge], retain_graph: bool
) -> Sequence[Tensor | None]:
    """Of leaves, then of what the edges lead to; None where the loss does not reach."""
    inputs: Any = [*leaves, *(GradientEdge(*edge) for edge in edges)]
    return torch.autograd.grad(loss, inputs, retain_graph=retain_graph, allow_unused=True) if inputs else ()


def _add(leaves: Sequence[Tensor], gradients: Sequence[Tensor | None], weights: Sequence[float] = ()) -> set[int]:
    """Add gradients to the leaves' `.grad`, times weights (none: 1); ids of the leaves that got one."""
    learnt = set()
    for leaf, gradient, weight in zip(leaves, gradients, weights or itertools.repeat(1.0)):
        if gradient is not None:
            gradient = gradient if weight == 1.0 else gradient * weight
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            learnt.add(id(leaf))
    return learnt
