"""Several losses on the same rows: one pass over the graph for each distinct routing column, into its owners only."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from ..core.penalty import arrive
from ..core.state import BundleState
from ..core.walking import bundle_parameters, state_of
from .graph import Edge, Reach, walk
from .routes import Route, check_signals, routing_column


def routed_backward(model: nn.Module, losses: Mapping[str, Tensor], *, retain_graph: bool = False) -> None:
    """Backward of several losses, each into the owners of its signal only; `.grad` accumulates, as in `.backward()`.

    Losses whose routing columns are equal are added first. If the forward ran under `route(...)` with the signals of
    every row, losses on different rows share a pass, and a further pass walks only the graph that it reaches. If it ran
    outside any route, every distinct column takes a pass, and the weights scale whole gradients. Parameters of no
    bundle (a value head, LoRA, a trained trunk) get the gradient of the sum of all losses. As in `.backward()`, the
    first gradients of a step hold the quiet penalty's.

    Args:
        model: a model with bundles.
        losses: signal -> scalar loss.
        retain_graph: keep the graph after the last pass too.

    Raises:
        ValueError: an unknown signal; a loss that is not a scalar or has no graph; a loss on rows of other signals.
        RuntimeError: no owner of a signal takes part in its loss (for example with re-entrant gradient checkpointing);
            by then the other owners have their gradients. Or a forward was compiled outside `route((...))` and the
            signal has weights below 1, which a compiled graph cannot show.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, route, routed_backward
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> signals = {"b_lm": {"lm": 1.0}, "b_rl": {"policy": 1.0}}
        >>> bundles = {name: {"rank": 8, "sub_bases": ["main"], "signals": signals[name]} for name in signals}
        >>> model = get_peft_model(base, BundleConfig(sub_bases={"main": 8}, bundles=bundles))
        >>> ids = torch.arange(8).view(2, 4)
        >>> with route(model, ("lm", "policy")):  # both losses on every row
        ...     out = model(input_ids=ids, labels=ids)
        >>> routed_backward(model, {"lm": out.loss, "policy": out.logits.logsumexp(-1).mean()})
        >>> all(any(p.grad is not None for p in model.bundle_parameters(name)) for name in bundles)
        True
    """
    state = state_of(model)
    if not isinstance(losses, Mapping) or not all(isinstance(loss, Tensor) for loss in losses.values()):
        raise ValueError(f"losses is {losses!r}; give a dict of signal -> loss, such as {{'lm': loss}}.")
    check_signals(state.configs, list(losses))
    for signal, loss in losses.items():
        if loss.numel() != 1 or loss.grad_fn is None:
            raise ValueError(
                f"losses[{signal!r}] must be a scalar with a graph, got shape {tuple(loss.shape)} and grad_fn "
                f"{loss.grad_fn}; give a mean over tokens, computed with gradients on."
            )
    reached = dict(zip(losses, walk(list(losses.values()))))
    routes = {signal: _routes(state, signal, reach) for signal, reach in reached.items()}
    owners = {signal: _owners(state, signal, under) for signal, under in routes.items()}
    owner_of = {id(p): key for key, parameters in bundle_parameters(model).items() for p in parameters}
    all_routes = list(dict.fromkeys(r for under in routes.values() for r in under))
    passes = _plan_passes(state, routes)
    once = len(passes) > 1 and _can_fold_once(state, routes, reached, owner_of)
    fold_gradients: dict[Edge, Tensor] = {}
    learned: set[int] = set()
    try:
        for number, signals in enumerate(passes):
            for r in all_routes:
                r.choose(set(signals))
            total = torch.stack([losses[s].reshape(()) for s in signals]).sum()
            weights = {key: weight for s in signals for key, weight in owners[s].items()}
            leaves = _leaves([reached[s] for s in signals], owner_of, {} if once else weights)
            edges = list(dict.fromkeys(edge for s in signals for edge in reached[s].folds)) if once else []
            keep = retain_graph or number < len(passes) - 1
            with state.penalty.ignored():  # `_add` adds it, for these are parts of gradients
                gradients = _gradients(total, leaves, edges, keep)
            scale = {} if any(routes[s] for s in signals) else weights
            learned |= _add(leaves, gradients, [scale.get(owner_of.get(id(p), ("", "")), 1.0) for p in leaves])
            for edge, gradient in zip(edges, gradients[len(leaves) :]):
                if gradient is not None:
                    before = fold_gradients.get(edge)
                    fold_gradients[edge] = gradient if before is None else before.add_(gradient)
        if fold_gradients:
            owned = {i: p for s, r in reached.items() for i, p in r.leaves.items() if owner_of.get(i) in owners[s]}
            roots, leaves = [GradientEdge(*edge) for edge in fold_gradients], list(owned.values())
            with state.penalty.ignored():
                gradients = torch.autograd.grad(
                    roots, leaves, list(fold_gradients.values()), retain_graph, allow_unused=True
                )
            learned |= _add(leaves, gradients)
    finally:
        for r in all_routes:
            r.choose(None)
    for signal, of in owners.items():
        if of and not any(owner_of.get(leaf) in of for leaf in learned & reached[signal].leaves.keys()):
            raise RuntimeError(
                f"the loss of {signal!r} reached none of its bundles {sorted(of)}. Set an alpha other than 0 and "
                "activate the adapter; with gradient checkpointing, use use_reentrant=False."
            )
    state.waiting = [r for r in state.waiting if r not in all_routes]


def _can_fold_once(
    state: BundleState,
    routes: Mapping[str, list[Route]],
    reached: Mapping[str, Reach],
    owner_of: Mapping[int, tuple[str, str]],
) -> bool:
    """Whether the passes may add up the gradients of D and E, which then go back to the bundles' weights once.

    It needs weights that are reached through D and E alone, whose gradients are gated already. Not so if E depends on
    D's inputs (an alpha that is a number other than 1 is multiplied into E), nor with projectors: inf or NaN in one
    bundle's rows would reach the W of others.
    """
    return (
        all(routes.values())
        and all(config.projection == "none" for config in state.configs.values())
        and not any(reach.nested or reach.beside & owner_of.keys() for reach in reached.values())
    )


def _routes(state: BundleState, signal: str, reach: Reach) -> list[Route]:
    """The routes of the forwards that a loss comes from; none if they ran outside route(...)."""
    routes = [r for r in reach.routes if r is not None]
    if routes and None in reach.routes:
        raise ValueError(
            f"losses[{signal!r}] mixes forwards inside and outside route(); give one loss for each of them."
        )
    if stray := [r.signals for r in routes if signal not in r.signals]:
        raise ValueError(
            f"losses[{signal!r}] comes from a forward whose rows have the signals {stray[0]}; name {signal!r} for "
            "these rows in route(...)."
        )
    if reach.compiled and not routes and any(0 < w < 1 for w in routing_column(state.configs, signal)):
        raise RuntimeError(
            f"losses[{signal!r}] comes from a compiled forward, whose graph does not show how it was routed, and the "
            "signal has owners with a weight below 1. Run the forward under route() with a tuple of signals, or use "
            ".backward()."
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
        fitting = next((p for p in passes if not any(clash(signal, other) for other in p)), None)
        passes.append([signal]) if fitting is None else fitting.append(signal)
    return passes


def _owners(state: BundleState, signal: str, routes: Sequence[Route]) -> dict[tuple[str, str], float]:
    """(adapter, bundle) -> weight of the bundles that learn from a signal, in forwards under these routes (if any)."""
    return {
        (adapter, name): weight
        for adapter, config in state.configs.items()
        for name, weight in config.column(signal).items()
        # A bundle that the weights of all rows shut out (topics) need not be reached.
        if weight > 0 and (not routes or any(name in r.live(adapter) for r in routes))
    }


def _leaves(
    reached: Sequence[Reach], owner_of: Mapping[int, tuple[str, str]], owners: Mapping[tuple[str, str], float]
) -> list[Tensor]:
    """The leaves that losses reach: parameters of these owners, and of no bundle at all."""
    leaves = {number: leaf for reach in reached for number, leaf in reach.leaves.items()}
    return [leaf for number, leaf in leaves.items() if number not in owner_of or owner_of[number] in owners]


def _gradients(
    loss: Tensor, leaves: Sequence[Tensor], edges: Sequence[Edge], retain_graph: bool
) -> Sequence[Tensor | None]:
    """Gradients of the leaves, then at the edges; None where the loss does not reach."""
    inputs: Any = [*leaves, *(GradientEdge(*edge) for edge in edges)]
    return torch.autograd.grad(loss, inputs, retain_graph=retain_graph, allow_unused=True) if inputs else ()


def _add(leaves: Sequence[Tensor], gradients: Sequence[Tensor | None], weights: Sequence[float] = ()) -> set[int]:
    """Add gradients, times weights (none: 1), to the `.grad` of the leaves; ids of the leaves that got one.

    The quiet penalty's gradient joins the first of a step, with weight 1.
    """
    learned = set()
    for leaf, gradient, weight in zip(leaves, gradients, weights or itertools.repeat(1.0)):
        if gradient is not None:
            gradient = arrive(leaf, gradient if weight == 1.0 else gradient * weight)
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
            learned.add(id(leaf))
    return learned
