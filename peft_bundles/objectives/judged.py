"""Answers marked right or wrong, and a head that reads them: the rows that several meta signals share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.utils import pad

from .base import ROW, Batch, Objective, Outputs
from .data import require, text_rows
from .heads import SubspaceHead, labels, subspace, texts
from .tokens import masked_sum, token_logprobs


class Judged(Objective):
    """Rows `prompt`, `completion`, `correct` (true or false), standard or conversational; a head reads their states.

    The answers come from tasks with a checker: `studies.data.judgements` marks those of the model itself and adds
    corrupted ones. A row that max_length would cut is left out: its mark would be of another text.
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
        """What the head says of states (..., d): (..., outputs)."""
        assert self.reader is not None, "setup() makes the head"
        return self.reader(hidden)

    def prepare(self, dataset: Dataset, split: str) -> list[dict[str, Any]]:
        require(self.name, dataset, ("prompt", "completion", "correct"))
        texts(self.name, dataset, "prompt", "completion")
        marks = labels(self.name, dataset["correct"], "correct")
        return [row | {"correct": mark} for row, mark in self.answers(dataset, "completion", marks)]

    def answers(self, dataset: Dataset, column: str, carried: list[Any]) -> list[tuple[dict[str, Any], Any]]:
        """Ids and completion mask of prompt + a column, each with what is carried along; too long ones left out."""
        pairs = {"prompt": dataset["prompt"][:], "completion": dataset[column][:], ROW: list(range(len(dataset)))}
        rows = text_rows(Dataset.from_dict(pairs), self.tokenizer, None)
        limit = self.max_length or max(len(ids) for ids in rows["input_ids"])
        return [
            ({"ids": row["input_ids"], "mask": row["completion_mask"], ROW: row[ROW]}, carried[row[ROW]])
            for row in rows
            if len(row["input_ids"]) <= limit
        ]

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        return {**sequences(rows, self.tokenizer), "correct": torch.tensor([row["correct"] for row in rows])}

    def items(self, batch: Batch) -> Tensor:
        return torch.tensor(float(len(batch["correct"])), device=batch["correct"].device)


def sequences(rows: list[Mapping[str, Any]], tokenizer: Any) -> Batch:
    """Rows of `ids` and `mask` side by side; `last` is the place of the last token of the mask."""
    ids, masks = ([torch.tensor(row[key]) for row in rows] for key in ("ids", "mask"))
    return {
        "input_ids": pad(ids, padding_value=tokenizer.pad_token_id),
        "attention_mask": pad([torch.ones_like(i) for i in ids]),
        "completion_mask": pad(masks),
        "last": torch.stack([mask.nonzero()[-1, 0] for mask in masks]),
    }


def mean_logprobs(outputs: Outputs, batch: Batch) -> Tensor:
    """Mean log p of the tokens of each completion, (B,), in nats."""
    mask = batch["completion_mask"][:, 1:]
    return masked_sum(token_logprobs(outputs.logits, batch["input_ids"]), mask) / mask.sum(1)


def accuracy(scores: Tensor, correct: Tensor) -> Tensor:
    """Share of scores (B,) on the right side of 0."""
    return ((scores > 0) == (correct > 0.5)).float().mean()
