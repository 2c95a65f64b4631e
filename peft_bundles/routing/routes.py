"""Which bundles the rows of a forward may update.

The signal table is the config's: `config.column(signal)` gives a weight in [0, 1] for every bundle. `with route(model,
...)` around a forward says which signal each row carries. A bundle's weight gradients are sums over rows, so one gate
per row inside the bundle's own backward routes a mixed batch in one forward and one backward. A bundle that no row may
update takes no part in the graph, so its `.grad` stays None.

Shapes: B rows, T tokens, M bundles of an adapter, H their hidden units. "B|1" is B or 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..config import BundleConfig
from ..core.functional import Gate
from ..core.packing import Layout
from ..core.walking import checked_layers


Signals: TypeAlias = str | tuple[str, ...]  # one signal, or several losses that will be computed on the same row
Segments: TypeAlias = list[tuple[Signals, int]]  # a packed row: (signals, number of tokens), in order


def _is_entry(entry: object) -> bool:
    """Whether it is a signal, a tuple of signals, or the segments of a packed row, pairs (signals, tokens)."""
    if isinstance(entry, list):
        return all(isinstance(e, tuple) and len(e) == 2 and isinstance(e[1], int) and _is_entry(e[0]) for e in entry)
    return isinstance(entry, str) or (isinstance(entry, tuple) and all(isinstance(s, str) for s in entry))


class Route:
    """The signals of the rows of one forward, as gates on the bundles.

    Args:
        configs: adapter -> its config.
        signals: as in `route`.
        packings: (adapter, layout, device) -> the dtype of the gate, for all layouts of the model's layers.
        weights: as in `route`.

    Attributes:
        signals: all signals, each once.
        rows: for each row, its segments as (signals, number of tokens).
        uniform: one entry stands for all rows.
        packed: some row has segments of several signals.
        deferred: some row carries signals with different columns, so the gates are not known before `routed_backward`.
            Until then they are NaN, so that a plain `.backward()` cannot go unnoticed.
        tokens: the number of tokens of packed rows; 1 otherwise.
    """

    def __init__(
        self,
        configs: Mapping[str, BundleConfig],
        signals: Signals | Sequence[Signals | Segments],
        packings: Mapping[tuple[str, Layout, torch.device], torch.dtype],
        weights: Mapping[str, Tensor | Sequence[float]] | None = None,
    ) -> None:
        self._configs = dict(configs)
        if not isinstance(signals, (str, tuple, list)) or not all(map(_is_entry, signals)):
            raise ValueError(
                f"signals is {signals!r}; give a signal such as 'lm', a tuple of signals for losses on the same rows, "
                "or a list with one of the two for each row."
            )
        self._weights = _row_weights(configs, weights or {})
        if self._weights and isinstance(signals, (str, tuple)):
            signals = [signals] * len(next(iter(self._weights.values())))
        self.uniform = isinstance(signals, (str, tuple))
        entries: Sequence[Any] = [signals] if self.uniform else signals
        self.packed = any(isinstance(row, list) for row in entries)
        if not entries:
            raise ValueError("route([]) names no row; give one signal for each row of the batch.")
        segments = [row if isinstance(row, list) else [(row, 0)] for row in entries]
        self.rows: list[list[tuple[tuple[str, ...], int]]] = [
            [(s if isinstance(s, tuple) else (s,), n) for s, n in row] for row in segments
        ]
        self.signals = list(dict.fromkeys(s for row in self.rows for segment, _ in row for s in segment))
        check_signals(configs, self.signals)
        if len(lengths := {sum(n for _, n in row) for row in self.rows}) > 1:
            raise ValueError(
                f"the segments of packed rows add up to {sorted(lengths)} tokens; all rows must have the same number."
            )
        if wrong := {name: len(w) for name, w in self._weights.items() if len(w) != len(self.rows)}:
            raise ValueError(
                f"weights have {wrong} values, but there are {len(self.rows)} rows; give one value for each row."
            )
        self._shares = {adapter: {s: c.column(s) for s in self.signals} for adapter, c in configs.items()}
        self._columns = {s: tuple(w for of in self._shares.values() for w in of[s].values()) for s in self.signals}
        combinations = {signals for row in self.rows for signals, _ in row}
        self.deferred = any(len({self._columns[s] for s in signals}) > 1 for signals in combinations)
        self._live = {adapter: self._live_bundles(adapter) for adapter in configs}
        # Made here and not in the forward: a compiled graph only looks them up.
        self._gates: dict[tuple[str, Layout, torch.device], Gate] = {}
        self.tokens = 1
        for (adapter, packing, device), dtype in packings.items():
            table, live, gate = self._table(adapter, packing, None), self._live[adapter], Gate(None, self)
            self.tokens = table.shape[1]
            all_one = (table == 1.0).flatten(0, -2).all(0).tolist()
            # (Bundles that are not live are constants, and need no gate.)
            if self.deferred or not all(one or name not in live for name, one in zip(packing.names, all_one)):
                gate.weights = _sent(table.to(dtype), device).index_select(-1, packing.index(device)["owner"])
            self._gates[adapter, packing, device] = gate

    def _live_bundles(self, adapter: str) -> set[str]:
        # Every signal belongs to some row, so without weights per row, one row with all signals says the same.
        rows = list(enumerate(self.rows if self._weights else [[(tuple(self.signals), 0)]]))
        return {
            name
            for i, row in rows
            for s in dict.fromkeys(s for segment, _ in row for s in segment)
            for name, weight in self._shares[adapter][s].items()
            if weight > 0 and (name not in self._weights or self._weights[name][i] > 0)
        }

    def live(self, adapter: str) -> set[str]:
        """Bundles of the adapter that some row may update."""
        return self._live[adapter]

    def rows_of(self, adapter: str, bundle: str) -> int:
        """The number of rows that the bundle learns from."""
        shares, weights = self._shares[adapter], self._weights.get(bundle)
        return sum(
            any(shares[s][bundle] > 0 for signals, _ in row for s in signals) and (weights is None or weights[i] > 0)
            for i, row in enumerate(self.rows)
        )

    def _table(self, adapter: str, packing: Layout, chosen: set[str] | None) -> Tensor:
        """Weights (B|1, T|1, M) for the chosen signals (None: all); NaN where a row's signals disagree."""
        shares, names = self._shares[adapter], packing.names

        def weights_of(signals: tuple[str, ...]) -> list[float]:
            columns = [[shares[s][n] for n in names] for s in signals if chosen is None or s in chosen]
            return [w[0] if len({*w}) == 1 else float("nan") for w in zip(*columns)] or [0.0] * len(names)

        by_signals = {signals: weights_of(signals) for signals in {signals for row in self.rows for signals, _ in row}}
        rows = [[by_signals[signals] for signals, n in row for _ in range(max(n, 1))] for row in self.rows]
        table = torch.tensor(rows, dtype=torch.float64).view(len(rows), len(rows[0]), len(names))
        for name in (n for n in names if n in self._weights):
            table[..., names.index(name)] *= torch.tensor(self._weights[name], dtype=torch.float64)[:, None]
        return table

    def gate(self, adapter: str, hidden: Tensor, packing: Layout | None = None) -> Gate:
        """The gate for a forward of `hidden` (B, T, d) in a layer with this layout; None: the adapter's only one.

        Raises:
            ValueError: the batch has another number of rows or tokens than the route.
            RuntimeError: the adapter was moved to another device inside the route.
        """
        if not self.uniform and len(self.rows) != hidden.shape[0]:
            raise ValueError(
                f"route() was given {len(self.rows)} rows, but the batch has {hidden.shape[0]}; give one signal for "
                "each row."
            )
        if self.packed and self.tokens != hidden.shape[1]:
            raise ValueError(
                f"route() was given segments of {self.tokens} tokens a row, but the batch has {hidden.shape[1]}; give "
                "segments that add up to the length of the rows."
            )
        if packing is None:
            packing = next((layout for name, layout, _ in self._gates if name == adapter), None)
        gate = None if packing is None else self._gates.get((adapter, packing, hidden.device))
        if gate is None:
            raise RuntimeError(
                f"the bundles of {adapter!r} were not on {hidden.device} when route() was entered; move the model "
                "first."
            )
        return gate

    def choose(self, signals: set[str] | None) -> None:
        """Set the gates of the graphs made under this route for a backward of these signals' losses; None: as made."""
        for (adapter, packing, device), gate in self._gates.items():
            if gate.weights is None:
                continue
            table = self._table(adapter, packing, signals)
            # In place and past the version counter: the graph holds this very tensor and reads it when it runs.
            gate.weights.data.copy_(_sent(table.to(gate.weights.dtype), device)[..., packing.index(device)["owner"]])
            # Weight gradients of units that learn from no row are not computed, or are 0 if such units are between
            # others.
            learns = (table != 0).flatten(0, -2).any(0)
            gate.span = first, last = packing.span(learns)
            others = (~learns[packing.owner[first:last]]).nonzero().flatten() + first
            gate.others = _sent(others, device) if len(others) else None

    def clash(self, a: str, b: str) -> bool:
        """Whether some row carries both signals, and they want different gates on it."""
        together = any(a in signals and b in signals for row in self.rows for signals, _ in row)
        return together and self._columns[a] != self._columns[b]


def _sent(table: Tensor, device: torch.device) -> Tensor:
    """A CPU table on the device. It is pinned first: without that, the CPU would wait until the GPU gets there."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def check_signals(configs: Mapping[str, BundleConfig], signals: Sequence[str]) -> None:
    """Raise ValueError for a signal that no bundle takes part in (without any bundle, all signals train the trunk)."""
    names = list(dict.fromkeys(s for config in configs.values() for s in config.signals))
    unknown = [s for s in signals if s not in names]
    if unknown and any(config.bundles for config in configs.values()):
        raise ValueError(f"no bundle takes part in signal(s) {unknown}; the config's signals are {names}.")


def _row_weights(
    configs: Mapping[str, BundleConfig], weights: Mapping[str, Tensor | Sequence[float]]
) -> dict[str, list[float]]:
    """The weights by row as lists; raises ValueError for an unknown bundle or a weight outside [0, 1]."""
    names = list(dict.fromkeys(name for config in configs.values() for name in config.bundles or ()))
    lists = {}
    for name, values in weights.items():
        if name not in names:
            raise ValueError(f"weights name the bundle {name!r}, which no adapter has; the bundles are {names}.")
        row = torch.as_tensor(values, dtype=torch.float64)
        if row.dim() != 1 or not len(row) or not bool(((row >= 0) & (row <= 1)).all()):
            raise ValueError(f"weights[{name!r}]={values!r} must be one number in [0, 1] for each row of the batch.")
        lists[name] = row.tolist()
    return lists


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
    """Route the gradients of the forwards inside the block. What the forwards return does not change.

    Args:
        model: a model with bundles.
        signals: one signal for all rows of the batch; or a list with one entry for each row: a signal, a tuple of
            signals whose losses will be computed on that row (then call `routed_backward`), or the segments of a packed
            row, `[(signal, tokens)]`.
        weights: bundle -> one number in [0, 1] for each row, a factor on what the signal table says of that bundle
            (topics: `routers.topics`). Bundles not named have 1. A bundle with 0 in all rows gets no gradient, not a
            gradient of zeros.
        block_diagonal: say that packed segments do not attend to each other. Only then is a gate per segment exact.

    Raises:
        ValueError: a signal that no bundle takes part in; rows that do not fit the batch; weights for an unknown
            bundle, or outside [0, 1]; a model without bundles.
        RuntimeError: blocks are wrapped for activation checkpointing from outside (`core.walking.checked_layers`).

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, route
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> signals = {"b_lm": {"lm": 1.0}, "b_rl": {"policy": 1.0}}
        >>> bundles = {name: {"rank": 8, "sub_bases": ["main"], "signals": signals[name]} for name in signals}
        >>> model = get_peft_model(base, BundleConfig(sub_bases={"main": 8}, bundles=bundles))
        >>> ids = torch.arange(8).view(2, 4)
        >>> with route(model, "lm"):
        ...     model(input_ids=ids, labels=ids).loss.backward()
        >>> [any(p.grad is not None for p in model.bundle_parameters(name)) for name in bundles]
        [True, False]
    """
    layers = checked_layers(model)
    state = layers[0].state
    packings: dict[tuple[str, Layout, torch.device], torch.dtype] = {}
    for layer in layers:
        for adapter in layer.bundle_adapters():
            if layer.packing(adapter).names:
                weight = next(iter(layer.bundle_up[adapter].values()))
                dtype = torch.promote_types(weight.dtype, torch.float32)
                packings[adapter, layer.packing(adapter), weight.device] = dtype
    new = Route(state.configs, signals, packings, weights)
    if new.packed and not block_diagonal:
        warnings.warn(
            "A gate per segment is exact only where segments do not attend to each other; with ordinary attention it "
            "is a heuristic. Pass block_diagonal=True if the attention mask is block-diagonal.",
            stacklevel=3,
        )
    before, state.call.route = state.call.route, new
    try:
        yield
    finally:
        state.call.route = before
