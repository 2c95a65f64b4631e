"""Next-token loss with a weight for every token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl.trainer.utils import pad

from .base import Objective
from .batches import ROW, Batch, Outputs, numbered
from .checks import require_columns, short
from .data import text_rows
from .tokens import masked_mean, token_logprobs


PER_TOKEN = ("token_weights", "labels", "completion_mask", "assistant_masks", "attention_mask")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float))


class LM(Objective):
    """sum_t w_t (-log p(token t)) / sum_t w_t, in nats per token.

    Failure mode: a fact that is stated in only one way is learnt as that sentence; state it in several ways. Bundles of
    other signals that are on in these rows become part of the answer: switch one off later, and the loss is no longer
    the one that was trained. `forward={"lm": "owners"}` of the trainer prevents it.

    Args:
        dataset: rows in TRL's language-modelling format (`text` or `messages`) or prompt-completion format, standard or
            conversational; or tokenized rows with `input_ids` and any of `token_weights` (one number >= 0 per token),
            `labels` (-100 where a token does not count), `completion_mask`, `assistant_masks` and `attention_mask`.
        signal: name of the signal and of the objective, such as "lm" or "logic".
        eval_dataset: held-out rows of the same format.
        max_length: tokens kept of a row. None keeps all.
        prompt_weight: weight of the tokens of a prompt; 0 trains on completions only.
        completion_weight: weight of the tokens of a completion, and of text without a prompt.
        text_field: name of the column with text.

    Raises:
        ValueError: a weight is negative or not finite.

    Example:
        >>> from peft_bundles.objectives import LM
        >>> rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": "3+3=", "completion": "6"}]
        >>> LM(rows, signal="logic").signals
        ('logic',)
    """

    def __init__(
        self,
        dataset: Any,
        *,
        signal: str = "lm",
        eval_dataset: Any = None,
        max_length: int | None = 1024,
        prompt_weight: float = 0.0,
        completion_weight: float = 1.0,
        text_field: str = "text",
    ) -> None:
        super().__init__(signal, (signal,), dataset, eval_dataset)
        for field, value in (("prompt_weight", prompt_weight), ("completion_weight", completion_weight)):
            if not 0 <= value < math.inf:
                raise ValueError(f"objective {signal!r}: {field}={value!r} must be a number >= 0.")
        self.max_length, self.text_field = max_length, text_field
        self.prompt_weight, self.completion_weight = prompt_weight, completion_weight

    def prepare(self, dataset: Dataset, split: str) -> Dataset:
        formats = (("input_ids",), ("prompt", "completion"), ("messages",), (self.text_field,))
        columns = require_columns(self.name, dataset, *formats)
        dataset = numbered(dataset)
        if columns == ("input_ids",):
            if packed := [c for c in ("position_ids", "seq_lengths") if c in dataset.column_names]:
                raise ValueError(
                    f"objective {self.name!r}: the column {packed[0]!r} says that several sequences are packed into a "
                    "row; give one sequence a row, or pass `segments` to route() in a loop of your own."
                )
            unused = [c for c in dataset.column_names if c not in ("input_ids", ROW)]
            weighted = dataset.map(self._tokenized, remove_columns=unused)
        else:
            rows = text_rows(self.name, dataset, self.tokenizer, self.max_length, self.text_field)
            unused = [c for c in rows.column_names if c not in ("input_ids", ROW)]
            weighted = rows.map(self._weighted, remove_columns=unused)
        return weighted.filter(lambda row: any(w > 0 for w in row["token_weights"][1:]))

    def _weighted(self, row: Mapping[str, Any]) -> dict[str, list[float]]:
        mask = row.get("completion_mask") or [1] * len(row["input_ids"])
        weights = [self.completion_weight if bit else self.prompt_weight for bit in mask]
        return {"token_weights": weights[: len(row["input_ids"])]}  # TRL truncates the ids and not their mask

    def _tokenized(self, row: Mapping[str, Any]) -> dict[str, list[Any]]:
        """`input_ids` without padding, and the product of what the row's columns say of each token as its weight."""
        where, ids = f"objective {self.name!r}: row {row[ROW]}", row["input_ids"]
        if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(f"{where} has input_ids={short(ids)}; give a list of token ids.")
        values = {c: row[c] for c in PER_TOKEN if row.get(c) is not None}
        for column, value in values.items():
            if not isinstance(value, list) or len(value) != len(ids) or not all(map(_is_number, value)):
                raise ValueError(
                    f"{where} has {len(ids)} input_ids and {column}={short(value)}; give a number a token."
                )
        if not all(0 <= w < math.inf for w in values.get("token_weights", [])):
            raise ValueError(f"{where} has token_weights={short(values['token_weights'])}; give finite numbers >= 0.")
        attended = values.get("attention_mask", [1] * len(ids))
        labels = values.get("labels", ids)
        if wrong := [n for n, (i, label) in enumerate(zip(ids, labels)) if attended[n] and label not in (i, -100)]:
            raise ValueError(
                f"{where}: labels[{wrong[0]}] is {labels[wrong[0]]} and input_ids[{wrong[0]}] is {ids[wrong[0]]}; a "
                "label is the token itself or -100 (they are not shifted: the loss does that)."
            )
        weights = values.get("token_weights") or [self.completion_weight] * len(ids)
        if "completion_mask" in values:
            factors = [self.completion_weight if bit else self.prompt_weight for bit in values["completion_mask"]]
            weights = [w * f for w, f in zip(values.get("token_weights", [1.0] * len(ids)), factors)]
        counted = zip(labels, values.get("assistant_masks", [1] * len(ids)))
        weights = [w * (label != -100 and bool(bit)) for w, (label, bit) in zip(weights, counted)]
        kept = [n for n, bit in enumerate(attended) if bit][: self.max_length]
        if kept and kept != list(range(kept[0], kept[-1] + 1)):
            raise ValueError(f"{where}: attention_mask has a 0 between tokens; mask padding at the ends only.")
        return {"input_ids": [ids[n] for n in kept], "token_weights": [float(weights[n]) for n in kept]}

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        ids = [torch.tensor(row["input_ids"]) for row in rows]
        weights = [torch.tensor(row["token_weights"], dtype=torch.float32) for row in rows]
        return {
            "input_ids": pad(ids, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(i) for i in ids]),
            "weights": pad(weights),
        }

    def items(self, batch: Batch) -> Tensor:
        """The sum of the weights."""
        return batch["weights"][:, 1:].sum()

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logprobs = token_logprobs(outputs.logits, batch["input_ids"])
        return {self.signals[0]: -masked_mean(logprobs, batch["weights"][:, 1:])}, {}
