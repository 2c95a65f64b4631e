"""Gradient routing: which bundles a loss may update (design.md section 3).

The signal table is the config's: `config.column(signal)` gives a weight in [0, 1] for every bundle. Two ways to route:

- `with route(model, ...)` around a forward says which signal each row carries. A bundle's weight gradients are sums
  over rows, so one gate per row inside the bundle's own backward routes a mixed batch in one forward and one backward.
  Off-owner bundles get no gradient from the forward at all, so their `.grad` stays None.
- `routed_backward(model, {signal: loss})` for several losses on the same rows: one pass over the graph per distinct
  routing column, each into the owners of its column only.

`finalize_grads` closes a step: it reduces over processes where there are several, keeping None where no rank has a
gradient, and complains if an owner got none.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from .alphas import BundleState, bundle_layers, check_checkpointing, down_to_blocks, state_of
from .config import BundleConfig
from .functional import Reach, walk
from .layer import BundleLayer
from .packing import Packing


Signals: TypeAlias = str | tuple[str, ...]  # one signal, or several losses that will be computed on the same row
Segments: TypeAlias = list[tuple[Signals, int]]  # a packed row: (signals, number of tokens), in order
Edge: TypeAlias = tuple[Any, int]  # as `next_functions` has them


class Route:
    """The signals of the rows of one forward, as gates on the bundles.

    Attributes:
        deferred: some row carries signals with different columns, so the gates are not known before `routed_backward`
            (NaN until then: a plain `.backward()` cannot go unnoticed).
    """

    def __init__(
        self,
        configs: Mapping[str, BundleConfig],
        signals: Signals | Sequence[Signals | Segments],
        packings: Mapping[tuple[str, torch.device], tuple[Packing, torch.dtype]],
        weights: Mapping[str, Tensor | Sequence[float]] | None = None,
    ) -> None:
        self._configs = dict(configs)
        self._weights = _row_weights(configs, weights or {})
        if self._weights and isinstance(signals, (str, tuple)):
            signals = [signals] * len(next(iter(self._weights.values())))
        self.uniform = isinstance(signals, (str, tuple))
        given: Sequence[Any] = [signals] if self.uniform else signals
        self.packed = any(isinstance(row, list) for row in given)
        if not given:
            raise ValueError("route([]) names no row; give one signal per row of the batch.")
        segments = [row if isinstance(row, list) else [(row, 0)] for row in given]
        self.rows: list[list[tuple[tuple[str, ...], int]]] = [
            [(s if isinstance(s, tuple) else (s,), n) for s, n in row] for row in segments
        ]
        self.signals = list(dict.fromkeys(s for row in self.rows for segment, _ in row for s in segment))
        check_signals(configs, self.signals)
        if len(lengths := {sum(n for _, n in row) for row in self.rows}) > 1:
            raise ValueError(f"packed rows have {sorted(lengths)} tokens; the segments of every row must add up alike.")
        if wrong := {name: len(w) for name, w in self._weights.items() if len(w) != len(self.rows)}:
            raise ValueError(f"weights have {wrong} values, but there are {len(self.rows)} rows; give one a row.")
        self._shares = {adapter: {s: c.column(s) for s in self.signals} for adapter, c in configs.items()}
        self._columns = {s: tuple(w for of in self._shares.values() for w in of[s].values()) for s in self.signals}
        segments_met = {signals for row in self.rows for signals, _ in row}
        self.deferred = any(len({self._columns[s] for s in signals}) > 1 for signals in segments_met)
        # Every signal is some row's: where rows have no weights of their own, one row with all of them says as much.
        rows_met = list(enumerate(self.rows if self._weights else [[(tuple(self.signals), 0)]]))
        self._live = {
            adapter: {
                name
                for i, row in rows_met
                for s in dict.fromkeys(s for segment, _ in row for s in segment)
                for name, w in of[s].items()
                if w > 0 and (name not in self._weights or self._weights[name][i] > 0)
            }
            for adapter, of in self._shares.items()
        }
        # Made here and not in the forward: a compiled graph only looks them up.
        self._gates: dict[tuple[str, torch.device], tuple[Packing, Tensor]] = {}
        self._places: set[tuple[str, torch.device]] = set()
        self.tokens = 1
        for (adapter, device), (packing, dtype) in packings.items():
            table, live = self._table(adapter, None), self._live[adapter]
            self.tokens = table.shape[1]
            self._places.add((adapter, device))
            ones = (table == 1.0).flatten(0, -2).all(0).tolist()
            if self.deferred or not all(one or name not in live for name, one in zip(packing.names, ones)):
                gate = _sent(table.to(dtype), device).index_select(-1, packing.index(device)["owner"])
                self._gates[adapter, device] = packing, gate  # (bundles that are not live are constants)

    def live(self, adapter: str) -> set[str]:
        """Bundles of the adapter that some row may update."""
        return self._live[adapter]

    def _table(self, adapter: str, chosen: set[str] | None) -> Tensor:
        """Weights (B|1, T|1, M) for the chosen signals (None: all); NaN where a row's signals disagree."""
        shares, names = self._shares[adapter], list(self._configs[adapter].bundles or ())

        def weights(signals: tuple[str, ...]) -> list[float]:
            columns = [shares[s].values() for s in signals if chosen is None or s in chosen]
            return [w[0] if len({*w}) == 1 else float("nan") for w in zip(*columns)] or [0.0] * len(names)

        known = {signals: weights(signals) for signals in {signals for row in self.rows for signals, _ in row}}
        rows = [[known[signals] for signals, n in row for _ in range(max(n, 1))] for row in self.rows]
        table = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(rows[0]), len(names))
        for name in (n for n in names if n in self._weights):
            table[..., names.index(name)] *= torch.tensor(self._weights[name], dtype=torch.float64)[:, None]
        return table

    def gate(self, adapter: str, hidden: Tensor) -> Tensor | None:
        """Gate of the hidden units (B|1, T|1, H) for a forward of `hidden` (B, T, d); None if all live ones are 1."""
        if not self.uniform and len(self.rows) != hidden.shape[0]:
            raise ValueError(f"route() was given {len(self.rows)} rows, but the batch has {hidden.shape[0]}.")
        if self.packed and self.tokens != hidden.shape[1]:
            raise ValueError(f"route() was given {self.tokens} tokens a row, but the batch has {hidden.shape[1]}.")
        if (adapter, hidden.device) not in self._places:
            raise RuntimeError(f"the bundles of {adapter!r} were not on {hidden.device} when route() was entered.")
        found = self._gates.get((adapter, hidden.device))
        return None if found is None else found[1]

    def choose(self, signals: set[str] | None) -> None:
        """Set the gates of the graphs made under this route for a backward of these signals' losses; None: as made."""
        for (adapter, device), (packing, gate) in self._gates.items():
            table = self._table(adapter, signals)
            # In place and past the version counter: the graph holds this very tensor and reads it when it runs.
            gate.data.copy_(_sent(table.to(gate.dtype), device)[..., packing.index(device)["owner"]])
            # Weight gradients of units that no row lets learn are not computed, or 0 if they lie between others.
            learns = (table != 0).flatten(0, -2).any(0)
            first, last = packing.span(learns)
            others = (~learns[packing.owner[first:last]]).nonzero().flatten() + first
            vars(gate)["units"] = first, last
            vars(gate)["others"] = _sent(others, device) if len(others) else None

    def clash(self, a: str, b: str) -> bool:
        """Whether some row carries both signals, and they want different gates on it."""
        together = any(a in signals and b in signals for row in self.rows for signals, _ in row)
        return together and self._columns[a] != self._columns[b]


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """A table made on the CPU, on the device. Sent as it is, it would hold up the CPU until the GPU gets there."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def check_signals(configs: Mapping[str, BundleConfig], signals: Sequence[str]) -> None:
    """Raise ValueError for a signal that no bundle takes part in (without any bundle, all signals train the trunk)."""
    known = list(dict.fromkeys(s for config in configs.values() for s in config.signals))
    unknown = [s for s in signals if s not in known]
    if unknown and any(config.bundles for config in configs.values()):
        raise ValueError(f"no bundle takes part in signal(s) {unknown}; the config's signals are {known}.")


def _row_weights(
    configs: Mapping[str, BundleConfig], weights: Mapping[str, Tensor | Sequence[float]]
) -> dict[str, list[float]]:
    """The rows' own weights as lists; raises ValueError for an unknown bundle or a weight outside [0, 1]."""
    known = list(dict.fromkeys(name for config in configs.values() for name in config.bundles or ()))
    found = {}
    for name, values in weights.items():
        if name not in known:
            raise ValueError(f"weights name the bundle {name!r}; known are {known}.")
        row = torch.as_tensor(values, dtype=torch.float64)
        if row.dim() != 1 or not len(row) or not bool(((row >= 0) & (row <= 1)).all()):
            raise ValueError(f"weights[{name!r}]={values!r} must be one number in [0, 1] a row of the batch.")
        found[name] = row.tolist()
    return found


def routing_column(configs: Mapping[str, BundleConfig], signal: str) -> tuple[float, ...]:
    """A signal's weight for every bundle of every adapter: signals with equal columns need only one backward."""
    return tuple(w for config in configs.values() for w in config.column(signal).values())


@contextmanager
def route(
    model: nn.Module,
    signals: Signals | Sequence[Signals | Segments],
    *,
    weights: Mapping[str, Tensor | Sequence[float]] | None = None,
    block_diagonal: bool = False,
) -> Iterator[None]:
    """Route the gradients of the block's forwards. Rows are those of the batch; forward values do not change.

    Args:
        signals: one signal for all rows; or a list with one entry a row: a signal, a tuple of signals whose losses will
            be computed on that row (then call `routed_backward`), or a packed row's segments `[(signal, tokens)]`.
        weights: bundle -> one number in [0, 1] a row, a factor on what the signal's table says of that bundle (topics:
            `routers.topics`); bundles not named have 1. One that is 0 in all rows gets no gradient, not a zero.
        block_diagonal: say that packed segments do not attend to each other. Only then is a gate per segment exact.

    Raises:
        ValueError: a signal that no bundle takes part in; rows that do not fit the batch; weights of no bundle, or
            outside [0, 1].
        RuntimeError: activation checkpointing from outside of the blocks (`alphas.check_checkpointing`).
    """
    modules = list(down_to_blocks(model))  # once: the GPU waits for a step to begin
    check_checkpointing(modules)
    state = state_of(model)
    packings: dict[tuple[str, torch.device], tuple[Packing, torch.dtype]] = {}
    for layer in (module for module in modules if isinstance(module, BundleLayer)):
        for adapter, basis in layer.bundle_basis.items():
            if (adapter, basis.device) not in packings:
                packings[adapter, basis.device] = layer.packing(adapter), basis.dtype
    new = Route(state.configs, signals, packings, weights)
    if new.packed and not block_diagonal:
        warnings.warn(
            "A gate per segment is exact only where segments do not attend to each other; with ordinary attention it "
            "is a heuristic. Pass block_diagonal=True if the attention mask is.",
            stacklevel=3,
        )
    before, state.call.route = state.call.route, new
    try:
        yield
    finally:
        state.call.route = before


def bundle_parameters(model: nn.Module) -> dict[tuple[str, str], list[nn.Parameter]]:
    """(adapter, bundle) -> its parameters over all layers."""
    table: dict[tuple[str, str], list[nn.Parameter]] = {}
    for layer in bundle_layers(model):
        for adapter in layer.bundle_adapters():
            for name in layer.packing(adapter).names:
                table.setdefault((adapter, name), [])
            for kind in layer.tables(adapter):
                for name, parameter in kind.items():
                    table[adapter, name].append(parameter)
    return table


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


def finalize_grads(model: nn.Module, *, reduce: bool = True) -> None:
    """Close the backward passes of a step, before clipping and `optimizer.step()`.

    With several processes, gradients are averaged over ranks: a bitmap of which exist on any rank, then one flat
    all-reduce, so that a gradient that no rank has stays None on all. Run the backwards without synchronisation
    (`ddp.no_sync()`, or no DDP at all).

    Args:
        reduce: False where something else (plain DDP) has reduced already; what it filled with zeros becomes None.

    Raises:
        RuntimeError: forwards ran with gradients on, but no bundle got one; or rows with several signals were never
            given to `routed_backward`.
    """
    state = state_of(model)
    waiting, state.waiting = state.waiting, []
    seen_here, state.seen = state.seen, set()
    if waiting:
        raise RuntimeError("rows with several signals wait for their losses: call routed_backward({signal: loss}).")
    table = bundle_parameters(model)
    seen = torch.tensor([key in seen_here for key in table], dtype=torch.int32)
    if _several_ranks():
        seen = seen.to(next(model.parameters()).device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        if reduce:
            reduce_gradients([p for p in model.parameters() if p.requires_grad])
    if not bool(seen.any()):
        return  # no forward with gradients since the last call
    learnt = [key for key, flag in zip(table, seen.tolist()) if flag]
    for key in table.keys() - set(learnt):
        for parameter in table[key]:
            parameter.grad = None
    if all(p.grad is None for key in learnt for p in table[key]):
        raise RuntimeError(
            f"no gradient reached any of the bundles {learnt} of the forwards since the last call. Was .backward() "
            "called, is their alpha 0, or is gradient checkpointing re-entrant? Use use_reentrant=False."
        )


def share_seen(model: nn.Module) -> None:
    """Tell all processes which bundles the forwards of any have let learn, so that `quiet_loss` is of the same ones."""
    if not _several_ranks():
        return
    state, table = state_of(model), bundle_parameters(model)
    device = next(model.parameters()).device
    seen = torch.tensor([key in state.seen for key in table], dtype=torch.int32, device=device)
    dist.all_reduce(seen, op=dist.ReduceOp.MAX)
    state.seen = {key for key, flag in zip(table, seen.tolist()) if flag}


def _several_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def reduce_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over ranks, where there are several; a gradient that no rank has stays None."""
    if not parameters or not _several_ranks():
        return
    device = parameters[0].device
    exists = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=device)
    dist.all_reduce(exists, op=dist.ReduceOp.MAX)
    by_kind: dict[Any, list[nn.Parameter]] = {}
    for parameter, flag in zip(parameters, exists.tolist()):
        if flag:
            by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in by_kind.values():
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for parameter, gradient in zip(group, flat.split([p.numel() for p in group])):
            parameter.grad = gradient.view_as(parameter).clone()


def clip_bundle_grads(model: nn.Module, max_norm: float) -> dict[str, Tensor]:
    """Clip the gradient of every bundle to `max_norm` by itself; returns each bundle's norm before clipping.

    One global norm would let one signal's large gradient shrink another's (design.md section 3, guarantee 6). Keys are
    bundle names, "adapter.bundle" with several adapters; bundles without gradient are left out.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm={max_norm!r} must be positive.")
    table = bundle_parameters(model)
    several = len({adapter for adapter, _ in table}) > 1
    norms = {}
    for (adapter, name), parameters in table.items():
        if any(p.grad is not None for p in parameters):
            norms[f"{adapter}.{name}" if several else name] = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norms
