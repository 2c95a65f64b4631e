"""Answers marked right or wrong, and a head that reads them: the base of several meta signals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.utils import pad

from .base import Objective
from .batches import ROW, Batch, Outputs, numbered
from .checks import binary_labels, require_columns, require_text
from .data import text_rows
from .heads import SubspaceHead, subspace
from .tokens import row_mean, token_logprobs


class Judged(Objective):
    """Rows `prompt`, `completion`, `correct` (true or false), standard or conversational, and a head on their states.

    The answers should come from tasks with a checker. A row longer than max_length is left out: truncated, it would no
    longer be the answer that was marked.
    """

    outputs = 1  # of the head

    def __init__(self, dataset: Any, signal: str, eval_dataset: Any, max_length: int | None) -> None:
        super().__init__(signal, (signal,), dataset, eval_dataset)
        self.max_length = max_length
        self.reader: SubspaceHead | None = None

    def setup(self, tokenizer: Any, model: nn.Module) -> None:
        super().setup(tokenizer, model)
        self.reader = SubspaceHead(subspace(model, self.signals[0]), self.outputs, self.name)

    def head(self) -> nn.Module | None:
        return self.reader

    def read(self, hidden: Tensor) -> Tensor:
        """The head's outputs for final states (..., d): (..., outputs)."""
        assert self.reader is not None, "setup() makes the head"
        return self.reader(hidden)

    def prepare(self, dataset: Dataset, split: str) -> list[dict[str, Any]]:
        require_columns(self.name, dataset, ("prompt", "completion", "correct"))
        require_text(self.name, dataset, "prompt", "completion")
        labels = binary_labels(self.name, dataset["correct"], "correct")
        return [row | {"correct": label} for row, label in self.answers(dataset, "completion", labels)]

    def answers(self, dataset: Dataset, column: str, extra: list[Any]) -> list[tuple[dict[str, Any], Any]]:
        """Ids and completion mask of every prompt with the answer in `column`, and the row's entry of `extra`.

        Rows longer than max_length are left out.
        """
        template = [c for c in ("tools", "chat_template_kwargs") if c in dataset.column_names]
        pairs = numbered(dataset.select_columns(["prompt", column, *template]))
        if column != "completion":
            pairs = pairs.rename_column(column, "completion")
        rows = text_rows(self.name, pairs, self.tokenizer, None)
        limit = self.max_length or max(len(ids) for ids in rows["input_ids"])
        return [
            ({"ids": row["input_ids"], "mask": row["completion_mask"], ROW: row[ROW]}, extra[row[ROW]])
            for row in rows
            if len(row["input_ids"]) <= limit
        ]

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        return {**sequences(rows, self.tokenizer), "correct": torch.tensor([row["correct"] for row in rows])}

    def items(self, batch: Batch) -> Tensor:
        """The rows."""
        return torch.tensor(float(len(batch["correct"])), device=batch["correct"].device)


def sequences(rows: list[Mapping[str, Any]], tokenizer: Any) -> Batch:
    """Rows of `ids` and `mask` as a batch; `last` (B,) is the position of the last token of the mask."""
    ids, masks = ([torch.tensor(row[key]) for row in rows] for key in ("ids", "mask"))
    return {
        "input_ids": pad(ids, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad([torch.ones_like(i) for i in ids]),
        "completion_mask": pad(masks),
        "last": torch.stack([mask.nonzero()[-1, 0] for mask in masks]),
    }


def mean_logprobs(outputs: Outputs, batch: Batch) -> Tensor:
    """Mean log p of the tokens of each completion, (B,), in nats."""
    return row_mean(token_logprobs(outputs.logits, batch["input_ids"]), batch["completion_mask"][:, 1:])
