"""Which bundles the rows of a forward may update (design.md section 3).

The signal table is the config's: `config.column(signal)` gives a weight in [0, 1] for every bundle. `with route(model,
...)` around a forward says which signal each row carries. A bundle's weight gradients are sums over rows, so one gate
per row inside the bundle's own backward routes a mixed batch in one forward and one backward. Off-owner bundles get no
gradient from the forward at all, so their `.grad` stays None.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..config import BundleConfig
from ..core.layer import BundleLayer
from ..core.packing import Packing
from ..core.walking import check_checkpointing, down_to_blocks, state_of


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
