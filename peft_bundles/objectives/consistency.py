"""Consistency: which statement of a text contradicts an earlier one?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.utils import pad

from .base import Objective
from .batches import ROW, Batch, Outputs
from .checks import binary_labels, require_columns
from .data import joined_ids
from .heads import SubspaceHead, subspace
from .tokens import accuracy


class Consistency(Objective):
    """mean_i BCE(s_i, contradicts_i) over the statements i >= 1 of all rows.

    A linear head in the owners' subspace (`heads.py`) reads s_i from the last token of statement i, which attends to
    all statements before it.

    Failure mode: contradictions that are made by a rule carry the mark of the rule ("not", a rarer number), and the
    mark is what is learnt. Add consistent rows that the same rule changed without a contradiction. In long sequences
    most statements contradict nothing: compare `accuracy` with that of always saying no, `1 - positives`.

    Args:
        dataset: rows `statements` (two or more texts) and `contradicts` (true or false for each statement: does it
            contradict an earlier one? false for the first); or pairs `first`, `second`, `contradicts`.
        signal: name of the signal and of the objective.
        eval_dataset: held-out rows of the same format.
        max_length: rows with more tokens are left out. None keeps all.

    Example:
        >>> from peft_bundles.objectives import Consistency
        >>> rows = [{"first": "It rains.", "second": "It is wet.", "contradicts": False},
        ...         {"first": "It rains.", "second": "It is dry.", "contradicts": True}]
        >>> Consistency(rows).signals
        ('consistency',)
    """

    def __init__(
        self,
        dataset: Any,
        *,
        signal: str = "consistency",
        eval_dataset: Any = None,
        max_length: int | None = 1024,
    ) -> None:
        super().__init__(signal, (signal,), dataset, eval_dataset)
        self.max_length = max_length
        self.reader: SubspaceHead | None = None

    def setup(self, tokenizer: Any, model: nn.Module) -> None:
        super().setup(tokenizer, model)
        self.reader = SubspaceHead(subspace(model, self.signals[0]), 1, self.name)

    def head(self) -> nn.Module | None:
        return self.reader

    def prepare(self, dataset: Dataset, split: str) -> list[dict[str, Any]]:
        columns = require_columns(self.name, dataset, ("statements", "contradicts"), ("first", "second", "contradicts"))
        sequences: list[tuple[list[str], list[Any]]]
        if "statements" in columns:
            sequences = [(row["statements"], row["contradicts"]) for row in dataset]
        else:
            sequences = [([row["first"], row["second"]], [False, row["contradicts"]]) for row in dataset]
        rows: list[dict[str, Any]] = []
        for number, (statements, labels) in enumerate(sequences):
            ids, statement_of = joined_ids(self.name, number, statements, "statements", self.tokenizer)
            if not isinstance(labels, list) or len(labels) != len(statements) or labels[0] not in (0, 1) or labels[0]:
                raise ValueError(
                    f"objective {self.name!r}: row {number} has {len(statements)} statements and "
                    f"contradicts={labels!r}; give true or false for each statement, false for the first (nothing "
                    "comes before it)."
                )
            try:
                later = binary_labels(self.name, labels[1:], "contradicts", both=False)
            except ValueError:
                raise ValueError(
                    f"objective {self.name!r}: row {number} has contradicts={labels!r}; give true or false, 1 or 0."
                ) from None
            ends = [max(i for i, s in enumerate(statement_of) if s == piece) for piece in range(1, len(statements))]
            rows.append({"ids": ids, "ends": ends, "contradicts": later, ROW: number})
        binary_labels(self.name, [label for row in rows for label in row["contradicts"]], "contradicts")
        return [row for row in rows if self.max_length is None or len(row["ids"]) <= self.max_length]

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        """`read` (B, T) is 1 at the last token of every statement but the first; `contradicts` has its label there."""
        ids = [torch.tensor(row["ids"]) for row in rows]
        labels, read = [], []
        for row, tokens in zip(rows, ids):
            label, is_end = torch.zeros(len(tokens)), torch.zeros(len(tokens))
            label[row["ends"]], is_end[row["ends"]] = torch.tensor(row["contradicts"]), 1.0
            labels.append(label)
            read.append(is_end)
        return {
            "input_ids": pad(ids, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(i) for i in ids]),
            "contradicts": pad(labels),
            "read": pad(read),
        }

    def items(self, batch: Batch) -> Tensor:
        """The number of statements that have an earlier one."""
        return batch["read"].sum()

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.compare(outputs.hidden[batch["read"] > 0], batch["contradicts"][batch["read"] > 0])

    def compare(self, states: Tensor, contradicts: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and metrics from the states (N, d) at the ends of N statements and their labels (N,)."""
        assert self.reader is not None, "setup() makes the head"
        scores = self.reader(states)[:, 0]
        loss = F.binary_cross_entropy_with_logits(scores, contradicts.to(scores.dtype))
        metrics = {"accuracy": accuracy(scores.detach(), contradicts), "positives": contradicts.mean()}
        return {self.signals[0]: loss}, metrics
