"""Consistency: which statement of a text contradicts an earlier one?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn
from trl.trainer.utils import pad

from .base import ROW, Batch, Objective, Outputs
from .data import require
from .heads import SubspaceHead, joined, labels, subspace
from .judged import accuracy


class Consistency(Objective):
    """mean_i BCE(s_i, contradicts_i) over the statements i >= 1 of all rows.

    s_i is read by a linear head in the owners' subspace (`heads.py`) from the last token of statement i, which has seen
    all before it. Two statements are a pair, more a sequence; `studies.data.breaks` makes sequences with a break.

    Failure mode: breaks that are made by a rule leave its mark ("not", a rarer number), and the mark is what is learnt.
    A control made by the same rule without the contradiction must be among the consistent rows, as `breaks` does. Most
    statements of long sequences contradict nothing: compare `accuracy` with that of never, `1 - positives`.

    Args:
        dataset: `statements` (two or more texts) and `contradicts`, one true or false each; the first has nothing to
            contradict and must be false. Or pairs: `first`, `second`, `contradicts`.
        signal: name of the signal, and of the objective.
        eval_dataset: held-out rows of the same format.
        max_length: rows with more tokens are left out. None keeps all.
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
        found = require(self.name, dataset, ("statements", "contradicts"), ("first", "second", "contradicts"))
        given: list[tuple[list[str], list[Any]]]
        if "statements" in found:
            given = [(row["statements"], row["contradicts"]) for row in dataset]
        else:
            given = [([row["first"], row["second"]], [False, row["contradicts"]]) for row in dataset]
        rows: list[dict[str, Any]] = []
        for number, (statements, marks) in enumerate(given):
            ids, of = joined(self.name, number, statements, "statements", self.tokenizer)
            if not isinstance(marks, list) or len(marks) != len(statements) or marks[0] not in (0, 1) or marks[0]:
                raise ValueError(
                    f"objective {self.name!r}: row {number} has {len(statements)} statements and "
                    f"contradicts={marks!r}; give one true or false each, false for the first (nothing is before it)."
                )
            try:
                later = labels(self.name, marks[1:], "contradicts", both=False)
            except ValueError:
                raise ValueError(
                    f"objective {self.name!r}: row {number} has contradicts={marks!r}; give true or false, 1 or 0."
                ) from None
            ends = [max(i for i, p in enumerate(of) if p == piece) for piece in range(1, len(statements))]
            rows.append({"ids": ids, "ends": ends, "contradicts": later, ROW: number})
        labels(self.name, [mark for row in rows for mark in row["contradicts"]], "contradicts")
        return [row for row in rows if self.max_length is None or len(row["ids"]) <= self.max_length]

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        ids = [torch.tensor(row["ids"]) for row in rows]
        marks, read = [], []
        for row, tokens in zip(rows, ids):
            mark, place = torch.zeros(len(tokens)), torch.zeros(len(tokens))
            mark[row["ends"]], place[row["ends"]] = torch.tensor(row["contradicts"]), 1.0
            marks.append(mark)
            read.append(place)
        return {
            "input_ids": pad(ids, padding_value=self.tokenizer.pad_token_id),
            "attention_mask": pad([torch.ones_like(i) for i in ids]),
            "contradicts": pad(marks),
            "read": pad(read),
        }

    def items(self, batch: Batch) -> Tensor:
        return batch["read"].sum()

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.compare(outputs.hidden[batch["read"] > 0], batch["contradicts"][batch["read"] > 0])

    def compare(self, states: Tensor, contradicts: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and metrics from the states (N, d) at the ends of statements, and their marks (N,)."""
        assert self.reader is not None, "setup() makes the head"
        scores = self.reader(states)[:, 0]
        loss = F.binary_cross_entropy_with_logits(scores, contradicts.to(scores.dtype))
        metrics = {"accuracy": accuracy(scores.detach(), contradicts), "positives": contradicts.mean()}
        return {self.signals[0]: loss}, metrics
