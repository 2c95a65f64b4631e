"""Forwards of the model with bundles, for objectives: rows of several objectives, the reference, generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..core.dialling import alphas
from ..core.generation import own_distribution
from ..core.walking import state_of
from ..routing.routes import route
from .batches import Batch, Outputs
from .seeding import seeded
from .topical import RowTopics


class Forward:
    """The model as objectives use it.

    Args:
        model: a causal LM with bundles, from `get_peft_model`.
        signals: objective -> the signals of its losses.
        table: objective -> bundle -> alpha in that objective's rows; other bundles keep their alphas.
        autocast: makes the context of mixed precision. Default: none.
        topics: topic routing of rows whose batch has "topics". Default: none.

    Raises:
        ValueError: the model has no output embeddings.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig
        >>> from peft_bundles.objectives import Forward
        >>> shape = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        ...                     vocab_size=50)
        >>> bundles = {"b_lm": {"rank": 4, "sub_bases": ["a"], "signals": {"lm": 1.0}}}
        >>> config = BundleConfig(sub_bases={"a": 16}, bundles=bundles, task_type="CAUSAL_LM")
        >>> model = get_peft_model(AutoModelForCausalLM.from_config(shape), config)
        >>> forward = Forward(model, {"lm": ("lm",)}, {"lm": {"b_lm": 0.5}})
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[1, 1, 1]])}
        >>> forward({"lm": batch})["lm"].logits.shape
        torch.Size([1, 3, 50])
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
        self.calls = 0  # forwards so far
        head = model.get_base_model().get_output_embeddings()  # type: ignore[operator]
        if head is None:
            raise ValueError(
                f"the model, a {type(model).__name__}, has no output embeddings; give a causal LM, from "
                "AutoModelForCausalLM."
            )
        self.output_embeddings = head

    @property
    def device(self) -> torch.device:
        """The device for batches."""
        return self.output_embeddings.weight.device

    def __call__(self, batches: Mapping[str, Batch]) -> dict[str, Outputs]:
        """One forward of the rows of several objectives, each row with the alphas and the routing of its objective.

        Args:
            batches: objective -> its batch.

        Returns:
            objective -> the outputs of its rows.
        """
        ids = _stacked([batch["input_ids"] for batch in batches.values()])
        mask = _stacked([batch["attention_mask"] for batch in batches.values()])
        objective_of_row = [name for name, batch in batches.items() for _ in range(len(batch["input_ids"]))]
        signals: Any = [self.signals[name] for name in objective_of_row]
        if len(batches) == 1:
            signals = self.signals[objective_of_row[0]]
        routing: AbstractContextManager[None] = nullcontext()
        if torch.is_grad_enabled():
            routing = route(self.model, signals, weights=self.row_weights(batches))
        with routing, alphas(self.model, self.row_alphas(batches)):
            outputs = self._run(ids, mask)
        outputs_of, row = {}, 0
        for name, batch in batches.items():
            rows, tokens = batch["input_ids"].shape
            part = slice(row, row + rows)
            outputs_of[name] = Outputs(outputs.logits[part, :tokens], outputs.hidden[part, :tokens])
            row += rows
        return outputs_of

    def row_alphas(self, batches: Mapping[str, Batch]) -> dict[str, float | Tensor]:
        """Bundle -> its alpha: the number of the objective's table, times the gate of the row's topics.

        A bundle gets one number if all rows agree, else one number per row, (B,).
        """
        gates = {name: self._gates(batch) for name, batch in batches.items()}
        if len(batches) == 1 and not any(gates.values()):
            return dict(self.table[next(iter(batches))])
        changed = dict.fromkeys(bundle for name in batches for bundle in (*self.table[name], *gates[name]))
        default = default_alphas(self.model)
        alpha_of: dict[str, float | Tensor] = {}
        for bundle in changed:
            in_tables = {name: self.table[name].get(bundle, default[bundle]) for name in batches}
            values = {name: value for name, value in in_tables.items() if value is not None}
            if len(values) < len(in_tables):
                raise ValueError(
                    f"bundle {bundle!r} has alphas per layer or row. They cannot be combined with topics, nor with "
                    "rows of another objective that sets its alpha; give it one number, or set shared_forward=False."
                )
            gated = any(bundle in gates[name] for name in batches)
            if not gated and len(set(values.values())) == 1:
                alpha_of[bundle] = next(iter(values.values()))
                continue
            parts = [values[name] * gates[name].get(bundle, _ones(batch)) for name, batch in batches.items()]
            alpha_of[bundle] = torch.cat(parts).float().to(self.device)
        return alpha_of

    def row_weights(self, batches: Mapping[str, Batch]) -> dict[str, Tensor]:
        """Topic bundle -> gradient weight of every row, (B,); 1 in rows without topics. {} if no batch has topics."""
        weights = {
            name: self.topics.weights(batch["topics"], batch.get("draws"))
            for name, batch in batches.items()
            if self.topics is not None and "topics" in batch
        }
        bundles = dict.fromkeys(bundle for of_bundle in weights.values() for bundle in of_bundle)
        return {
            bundle: torch.cat(
                [weights.get(name, {}).get(bundle, _ones(batch)) for name, batch in batches.items()],
            )
            for bundle in bundles
        }

    def _gates(self, batch: Batch) -> dict[str, Tensor]:
        return self.topics.gates(batch["topics"]) if self.topics is not None and "topics" in batch else {}

    def _run(self, ids: Tensor, mask: Tensor) -> Outputs:
        states: list[Tensor] = []
        # The state that the LM head reads, whatever the architecture calls its final norm.
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
        """The model as it is now on rows of one objective, without gradient and without dropout."""
        with self.eval_mode(), alphas(self.model, self.row_alphas({name: batch})):
            return self._run(batch["input_ids"], batch["attention_mask"])

    @torch.no_grad()
    def reference(self, batch: Batch) -> Outputs:
        """The model with all bundles off and `modules_to_save` as they were: the base model bit for bit, without
        gradient and dropout."""
        off = dict.fromkeys(state_of(self.model).bundle_names(), 0.0)
        with self.eval_mode(), original_modules(self.model), alphas(self.model, off):
            return self._run(batch["input_ids"], batch["attention_mask"])

    @torch.no_grad()
    def generate(
        self,
        name: str,
        ids: Tensor,
        mask: Tensor,
        topics: Tensor | None = None,
        key: tuple[int | str, ...] | None = None,
        **options: Any,
    ) -> Tensor:
        """Completions under the alphas of one objective; generation settings of the model itself do not act.

        Args:
            name: of the objective.
            ids, mask: prompts and their attention mask, (B, P), padded on the left.
            topics: topic vectors of the rows, (B, K), or None.
            key: seeds the sampling. None samples from PyTorch's generator as it is.
            options: further arguments of `model.generate`.

        Returns:
            (B, P + T): prompts and completions.
        """
        rows: Batch = {"input_ids": ids} if topics is None else {"input_ids": ids, "topics": topics}
        table, sampling = self.row_alphas({name: rows}), nullcontext() if key is None else seeded(self.device, *key)
        with self.eval_mode(), alphas(self.model, table), self.autocast(), sampling, own_distribution(self.model):
            # use_cache is given because the trainer switches it off in the config.
            return self.model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **options)  # type: ignore

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """The model in eval mode inside the block, and in its former mode after it."""
        training = self.model.training
        self.model.eval()
        try:
            yield
        finally:
            self.model.train(training)


@contextmanager
def original_modules(model: nn.Module) -> Iterator[None]:
    """The modules that PEFT trains copies of (`modules_to_save`) as they were in the base model, inside the block.

    PEFT's `disable_adapter` does the same, and also sets `requires_grad` anew.
    """
    trained = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    before = [module._disable_adapters for module in trained]
    try:
        for module in trained:
            module._disable_adapters = True
        yield
    finally:
        for module, disabled in zip(trained, before):
            module._disable_adapters = disabled


def default_alphas(model: nn.Module) -> dict[str, float | None]:
    """Bundle -> its alpha if no table names it; None if that is not one number."""
    state = state_of(model)
    defaults: dict[str, float | None] = {}
    for config in state.configs.values():
        for name, spec in (config.bundles or {}).items():
            value = state.set_alphas.get(name, spec.alpha)
            defaults[name] = float(value) if isinstance(value, (int, float)) else None
    return defaults


def _ones(batch: Batch) -> Tensor:
    """A weight of 1 for every row."""
    return torch.ones(len(batch["input_ids"]), dtype=torch.float64)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """Tensors (B_i, T_i) stacked along the rows, the shorter ones padded on the right with zeros."""
    length = max(tensor.shape[1] for tensor in tensors)
    return torch.cat([F.pad(tensor, (0, length - tensor.shape[1])) for tensor in tensors])
