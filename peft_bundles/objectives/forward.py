"""Forwards of the bundled model for objectives: rows of several of them at once, the reference, generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.dialling import alphas
from ..core.walking import state_of
from ..routing.routes import route
from .base import Batch, Outputs, seed_of
from .topical import RowTopics


class Forward:
    """The model as objectives use it.

    Args:
        model: with bundles attached.
        signals: objective -> its signals.
        table: objective -> bundle -> alpha in that objective's rows; bundles not named keep what they have.
        autocast: makes the context for mixed precision.
        topics: gates rows that have "topics" (B, K) and, for the mask "stochastic", "draws" (B, K) in their batch.
    """

    def __init__(
        self,
        model: nn.Module,
        signals: Mapping[str, tuple[str, ...]],
        table: Mapping[str, Mapping[str, float]],
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        topics: RowTopics | None = None,
    ) -> None:
        self.model, self.signals, self.table, self.autocast = model, signals, table, autocast
        self.topics = topics
        self.calls = 0
        head = model.get_base_model().get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings; objectives need a causal LM.")
        self.output_embeddings = head

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return self.output_embeddings.weight.device

    def __call__(self, batches: Mapping[str, Batch]) -> dict[str, Outputs]:
        """One forward of the rows of all these objectives, routed, each row with its objective's alphas."""
        ids, mask = (
            _stacked([b["input_ids"] for b in batches.values()]),
            _stacked([b["attention_mask"] for b in batches.values()]),
        )
        owners = [name for name, b in batches.items() for _ in range(len(b["input_ids"]))]
        signals: Any = [self.signals[name] for name in owners]
        if len(batches) == 1:
            signals = self.signals[owners[0]]
        routing: AbstractContextManager[None] = nullcontext()
        if torch.is_grad_enabled():
            routing = route(self.model, signals, weights=self.row_weights(batches))
        with routing, alphas(self.model, self.row_alphas(batches)):
            outputs = self._run(ids, mask)
        found, row = {}, 0
        for name, b in batches.items():
            rows, tokens = b["input_ids"].shape
            part = slice(row, row + rows)
            found[name] = Outputs(outputs.logits[part, :tokens], outputs.hidden[part, :tokens])
            row += rows
        return found

    def row_alphas(self, batches: Mapping[str, Batch]) -> dict[str, float | Tensor]:
        """Bundle -> a number, or one a row where rows disagree: their objectives' tables, times their topics' gates."""
        gates = {name: self._gates(batch) for name, batch in batches.items()}
        if len(batches) == 1 and not any(gates.values()):
            return dict(self.table[next(iter(batches))])
        changed = dict.fromkeys(bundle for name in batches for bundle in (*self.table[name], *gates[name]))
        default = default_alphas(self.model)
        found: dict[str, float | Tensor] = {}
        for bundle in changed:
            given = {name: self.table[name].get(bundle, default[bundle]) for name in batches}
            values = {name: value for name, value in given.items() if value is not None}
            if len(values) < len(given):
                raise ValueError(
                    f"bundle {bundle!r} has alphas per layer or row; they do not go together with topics, nor with "
                    "rows of another objective in which it is off (set shared_forward=False)."
                )
            gated = [name for name in batches if bundle in gates[name]]
            if not gated and len(set(values.values())) == 1:
                found[bundle] = next(iter(values.values()))
                continue
            parts = [
                values[name] * gates[name].get(bundle, torch.ones(len(batch["input_ids"]), dtype=torch.float64))
                for name, batch in batches.items()
            ]
            found[bundle] = torch.cat(parts).float().to(self.device)
        return found

    def row_weights(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Semantic bundle -> gradient weight of every row; 1 in rows without topics, {} without any."""
        weights = {
            name: self.topics.weights(batch["topics"], batch.get("draws"))
            for name, batch in batches.items()
            if self.topics is not None and "topics" in batch
        }
        every = dict.fromkeys(bundle for found in weights.values() for bundle in found)
        return {
            bundle: torch.cat(
                [
                    weights.get(name, {}).get(bundle, torch.ones(len(batch["input_ids"]), dtype=torch.float64))
                    for name, batch in batches.items()
                ]
            )
            for bundle in every
        }

    def _gates(self, batch: Batch) -> dict[str, Tensor]:
        return self.topics.gates(batch["topics"]) if self.topics is not None and "topics" in batch else {}

    def _run(self, ids: Tensor, mask: Tensor) -> Outputs:
        states: list[Tensor] = []
        # The state that the logits are read from, whatever the architecture calls its final norm.
        handle = self.output_embeddings.register_forward_pre_hook(lambda module, args: states.append(args[0]))
        self.calls += 1
        try:
            with self.autocast():
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        finally:
            handle.remove()
        return Outputs(logits, states[0])

    @torch.no_grad()
    def current(self, name: str, batch: Batch) -> Outputs:
        """The current policy on the rows of one objective, without gradient and without dropout."""
        with self.eval_mode(), alphas(self.model, self.row_alphas({name: batch})):
            return self._run(batch["input_ids"], batch["attention_mask"])

    @torch.no_grad()
    def reference(self, batch: Batch) -> Outputs:
        """The model without its bundles: with all alphas 0 the base model comes back bit for bit."""
        off = dict.fromkeys(state_of(self.model).bundle_names(), 0.0)
        with self.eval_mode(), alphas(self.model, off):
            return self._run(batch["input_ids"], batch["attention_mask"])

    @torch.no_grad()
    def generate(self, name: str, ids: Tensor, mask: Tensor, topics: Tensor | None = None, **options: Any) -> Tensor:
        """Completions under one objective's alphas; ids and mask (B, P) are padded on the left, returns (B, P + T).

        Args:
            topics: tau of the rows, (B, K), or None.
        """
        rows: Batch = {"input_ids": ids} if topics is None else {"input_ids": ids, "topics": topics}
        with self.eval_mode(), alphas(self.model, self.row_alphas({name: rows})), self.autocast():
            # Explicit: the trainer switches the cache off in the config.
            return self.model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)  # type: ignore

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """The model in eval mode inside, and as it was after."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)


@contextmanager
def seeded(device: torch.device, *key: int | str) -> Iterator[None]:
    """Random numbers inside depend on `key` alone, and those after are as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(*key))
        yield


def default_alphas(model: nn.Module) -> dict[str, float | None]:
    """Bundle -> the number its alpha is when no table says otherwise; None where it is not one number."""
    state = state_of(model)
    found: dict[str, float | None] = {}
    for config in state.configs.values():
        for name, spec in (config.bundles or {}).items():
            value = state.set_alphas.get(name, spec.alpha)
            found[name] = value if isinstance(value, float) else None
    return found


def _stacked(tensors: list[Tensor]) -> Tensor:
    """(B_i, T_i) one under the other, with zeros on the right of the shorter ones."""
    length = max(t.shape[1] for t in tensors)
    return torch.cat([F.pad(t, (0, length - t.shape[1])) for t in tensors])
