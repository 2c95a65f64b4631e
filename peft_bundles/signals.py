"""Gradient routing: which bundles a loss may update (design.md section 3).

The signal table is the config's: `config.column(signal)` gives a weight in [0, 1] for every bundle. Two ways to route:

- `with route(model, ...)` around a forward says which signal each row carries. A bundle's weight gradients are sums
  over rows, so one gate per row inside the bundle's own backward routes a mixed batch in one forward and one backward.
  Off-owner bundles enter the forward as constants, so their `.grad` stays None.
- `routed_backward(model, {signal: loss})` for several losses on the same rows: one pass over the graph per distinct
  routing column, each into the owners of its column only.

`finalize_grads` closes a step: it reduces over processes where there are several, keeping None where no rank has a
gradient, and complains if an owner got none.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .alphas import BundleState, state_of
from .config import BundleConfig
from .layer import BundleLayer
from .packing import Packing


Signals: TypeAlias = str | tuple[str, ...]  # one signal, or several losses that will be computed on the same row
Segments: TypeAlias = list[tuple[Signals, int]]  # a packed row: (signals, number of tokens), in order


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
    ) -> None:
        self._configs = dict(configs)
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
        self._columns = {s: routing_column(configs, s) for s in self.signals}
        self.deferred = any(len({self._columns[s] for s in signals}) > 1 for row in self.rows for signals, _ in row)
        self._live = {
            adapter: {name for s in self.signals for name, w in config.column(s).items() if w > 0}
            for adapter, config in configs.items()
        }
        # Made here and not in the forward: a compiled graph only looks them up.
        self._gates: dict[tuple[str, torch.device], tuple[Packing, Tensor]] = {}
        self.tokens = 1
        for (adapter, device), (packing, dtype) in packings.items():
            table = self._table(adapter, None)
            self.tokens = table.shape[1]
            live = [name in self._live[adapter] for name in packing.names]
            if self.deferred or not bool((table[..., live] == 1.0).all()):  # others that are not live are constants
                gate = table.to(device, dtype)[..., packing.index(device)["owner"]]
                self._gates[adapter, device] = packing, gate

    def live(self, adapter: str) -> set[str]:
        """Bundles of the adapter that some row may update."""
        return self._live[adapter]

    def _table(self, adapter: str, chosen: set[str] | None) -> Tensor:
        """Weights (B|1, T|1, M) for the chosen signals (None: all); NaN where a row's signals disagree."""
        config = self._configs[adapter]
        assert config.bundles is not None
        names = list(config.bundles)

        def weights(signals: tuple[str, ...]) -> list[float]:
            columns = [config.column(s) for s in signals if chosen is None or s in chosen]
            if not columns:
                return [0.0] * len(names)
            return [columns[0][n] if all(c[n] == columns[0][n] for c in columns) else float("nan") for n in names]

        rows = [[weights(signals) for signals, n in row for _ in range(max(n, 1))] for row in self.rows]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), -1, len(names))

    def gate(self, adapter: str, hidden: Tensor) -> Tensor | None:
        """Gate of the hidden units (B|1, T|1, H) for a forward of `hidden` (B, T, d); None if all live ones are 1."""
        if not self.uniform and len(self.rows) != hidden.shape[0]:
            raise ValueError(f"route() was given {len(self.rows)} rows, but the batch has {hidden.shape[0]}.")
        if self.packed and self.tokens != hidden.shape[1]:
            raise ValueError(f"route() was given {self.tokens} tokens a row, but the batch has {hidden.shape[1]}.")
        found = self._gates.get((adapter, hidden.device))
        return None if found is None else found[1]

    def choose(self, signals: set[str]) -> None:
        """Set the gates of this forward's graph for a backward of these signals' losses."""
        for (adapter, device), (packing, gate) in self._gates.items():
            table = self._table(adapter, signals).to(device, gate.dtype)
            # In place and past the version counter: the graph holds this very tensor and reads it when it runs.
            gate.data.copy_(table[..., packing.index(device)["owner"]])


def check_signals(configs: Mapping[str, BundleConfig], signals: Sequence[str]) -> None:
    """Raise ValueError for a signal that no bundle takes part in."""
    known = list(dict.fromkeys(s for config in configs.values() for s in config.signals))
    if unknown := [s for s in signals if s not in known]:
        raise ValueError(f"no bundle takes part in signal(s) {unknown}; the config's signals are {known}.")


def routing_column(configs: Mapping[str, BundleConfig], signal: str) -> tuple[float, ...]:
    """A signal's weight for every bundle of every adapter: signals with equal columns need only one backward."""
    return tuple(w for config in configs.values() for w in config.column(signal).values())


@contextmanager
def route(
    model: nn.Module, signals: Signals | Sequence[Signals | Segments], *, block_diagonal: bool = False
) -> Iterator[None]:
    """Route the gradients of the block's forwards. Rows are those of the batch; forward values do not change.

    Args:
        signals: one signal for all rows; or a list with one entry a row: a signal, a tuple of signals whose losses will
            be computed on that row (then call `routed_backward`), or a packed row's segments `[(signal, tokens)]`.
        block_diagonal: say that packed segments do not attend to each other. Only then is a gate per segment exact.

    Raises:
        ValueError: a signal that no bundle takes part in; rows that do not fit the batch.
    """
    state = state_of(model)
    layers = [m for m in model.modules() if isinstance(m, BundleLayer)]
    new = Route(
        state.configs,
        signals,
        {
            (adapter, basis.device): (layer.packing(adapter), basis.dtype)
            for layer in layers
            for adapter, basis in layer.bundle_basis.items()
        },
    )
    if new.packed and not block_diagonal:
        warnings.warn(
            "A gate per segment is exact only where segments do not attend to each other; with ordinary attention it "
            "is a heuristic. Pass block_diagonal=True if the attention mask is.",
            stacklevel=3,
        )
    if torch.is_grad_enabled():
        state.seen.update((adapter, name) for adapter in state.configs for name in new.live(adapter))
        if new.deferred:
            state.deferred.append(new)
    before, state.call.route = state.call.route, new
    try:
        yield
    finally:
        state.call.route = before


def _leaves(loss: Tensor) -> list[Tensor]:
    """The leaf tensors that a loss's graph accumulates into, in a fixed order."""
    found: dict[int, Tensor] = {}
    visited: set[Any] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        if (variable := getattr(node, "variable", None)) is not None:
            found.setdefault(id(variable), variable)
        stack.extend(child for child, _ in node.next_functions)
    return list(found.values())


def bundle_parameters(model: nn.Module) -> dict[tuple[str, str], list[nn.Parameter]]:
    """(adapter, bundle) -> its parameters over all layers."""
    table: dict[tuple[str, str], list[nn.Parameter]] = {}
    for layer in model.modules():
        if isinstance(layer, BundleLayer):
            for adapter in layer.bundle_adapters():
                for name in layer.packing(adapter).names:
                    table.setdefault((adapter, name), []).extend(layer.bundle_parameters(adapter, name))
    return table


def routed_backward(model: nn.Module, losses: Mapping[str, Tensor], *, retain_graph: bool = False) -> None:
    """Backward of several losses, each into the owners of its signal only; `.grad` accumulates, as in `.backward()`.

    Losses whose routing columns are equal are added first. Where the forward ran under `route(...)` with the signals
    of every row, losses on different rows share a pass, and only the graph that a further pass reaches is walked again.
    Where it ran outside any `route`, every distinct column takes a pass and the weights scale whole gradients.
    Parameters that belong to no bundle (a value head, LoRA, a trained trunk) get the gradient of the sum of all losses.

    Args:
        losses: signal -> scalar loss.
        retain_graph: keep the graph after the last pass too.

    Raises:
        ValueError: an unknown signal, a loss that is no scalar or has no graph, a loss for rows that nobody announced.
        RuntimeError: a loss that no owner of its signal takes part in (for one: re-entrant gradient checkpointing).
    """
    state = state_of(model)
    check_signals(state.configs, list(losses))
    for signal, loss in losses.items():
        if loss.numel() != 1 or loss.grad_fn is None:
            raise ValueError(f"losses[{signal!r}] must be a scalar with a graph, got shape {tuple(loss.shape)}.")
    routes = state.deferred
    announced = {s for r in routes for s in r.signals}
    if routes and (stray := [s for s in losses if s not in announced]):
        raise ValueError(
            f"losses {stray} belong to no row of the forwards in flight, whose signals are {sorted(announced)}."
        )
    owner_of = {id(p): key for key, parameters in bundle_parameters(model).items() for p in parameters}

    passes = _plan_passes(state, routes, list(losses))
    for number, signals in enumerate(passes):
        last = number == len(passes) - 1 and not retain_graph
        total = torch.stack([losses[s].reshape(()) for s in signals]).sum()
        weights: dict[tuple[str, str], float] = {}  # largest weight of any of the pass's signals
        for s in signals:
            for adapter, config in state.configs.items():
                for name, w in config.column(s).items():
                    weights[adapter, name] = max(w, weights.get((adapter, name), 0.0))
        leaves = [p for p in _leaves(total) if weights.get(owner_of.get(id(p), ("", "")), 1.0) > 0]
        for r in routes:
            r.choose(set(signals))
        gradients = torch.autograd.grad(total, leaves, retain_graph=not last, allow_unused=True) if leaves else ()
        _check_reached(state, owner_of, weights, [p for p, g in zip(leaves, gradients) if g is not None], signals)
        for leaf, gradient in zip(leaves, gradients):
            if gradient is None:
                continue
            key = owner_of.get(id(leaf))
            if key is not None and not routes and weights[key] != 1.0:
                gradient = gradient * weights[key]
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
    if not retain_graph:
        state.deferred = []


def _plan_passes(state: BundleState, routes: list[Route], signals: list[str]) -> list[list[str]]:
    """Group signals into passes: in one pass no row may see two different columns."""
    columns = {s: routing_column(state.configs, s) for s in signals}
    together = [set(segment) for r in routes for row in r.rows for segment, _ in row]

    def clash(a: str, b: str) -> bool:
        return columns[a] != columns[b] and (not routes or any(a in row and b in row for row in together))

    passes: list[list[str]] = []
    for signal in signals:
        home = next((p for p in passes if not any(clash(signal, other) for other in p)), None)
        passes.append([signal]) if home is None else home.append(signal)
    return passes


def _check_reached(
    state: BundleState,
    owner_of: Mapping[int, tuple[str, str]],
    weights: Mapping[tuple[str, str], float],
    reached: list[Tensor],
    signals: list[str],
) -> None:
    owners = {key for key, w in weights.items() if w > 0}
    if owners and not owners & {owner_of.get(id(p)) for p in reached}:
        raise RuntimeError(
            f"the loss of {signals} reached none of its bundles {sorted(owners)}. Is their alpha 0, is the adapter "
            "inactive, or is gradient checkpointing re-entrant? Use use_reentrant=False."
        )


def finalize_grads(model: nn.Module, *, reduce: bool = True) -> None:
    """Close the backward passes of a step, before clipping and `optimizer.step()`.

    With several processes, gradients are averaged over ranks: a bitmap of which exist on any rank, then one flat
    all-reduce, so that a gradient that no rank has stays None on all. Run the backwards without synchronisation
    (`ddp.no_sync()`, or no DDP at all).

    Args:
        reduce: False where something else (plain DDP) has reduced already; what it filled with zeros becomes None.

    Raises:
        RuntimeError: routed forwards ran, but no owner got a gradient; or rows with several signals were never given to
            `routed_backward`.
    """
    state = state_of(model)
    if state.deferred:
        state.deferred = []
        raise RuntimeError("rows with several signals wait for their losses: call routed_backward({signal: loss}).")
    table = bundle_parameters(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    seen = torch.tensor([key in state.seen for key in table], dtype=torch.int32)
    if several:
        device = parameters[0].device if parameters else torch.device("cpu")
        seen = seen.to(device)
        dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        if reduce:
            _reduce_gradients(parameters)
    if not bool(seen.any()):
        return  # nothing was routed: a plain backward
    learnt = [key for key, flag in zip(table, seen.tolist()) if flag]
    for key in table.keys() - set(learnt):
        for parameter in table[key]:
            parameter.grad = None
    if all(p.grad is None for key in learnt for p in table[key]):
        raise RuntimeError(
            f"no gradient reached any of the bundles {learnt} of the routed forwards. Was .backward() called, is their "
            "alpha 0, or is gradient checkpointing re-entrant? Use use_reentrant=False."
        )
    state.seen.clear()


def _reduce_gradients(parameters: list[nn.Parameter]) -> None:
    """Average gradients over ranks; a gradient that no rank has stays None."""
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
