"""Meta-correctness: is this reasoning right?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from .base import ROW, Batch, Outputs
from .data import require
from .heads import at, labels, texts
from .judged import Judged, accuracy, sequences
from .tokens import masked_sum, token_logprobs


SINGLE, PAIR = ("prompt", "completion", "correct"), ("prompt", "chosen", "rejected")


class MetaCorrectness(Judged):
    """BCE(s, correct), for pairs also -log sigmoid(s_right - s_wrong), and the loss of an explanation as text.

    s = a(h_end) + mean_t w(h_{t-1}) log p_t over the tokens t of the reasoning: a linear head in the owners' subspace
    (`heads.py`) reads a from the state of the last token, and from the state before every token how much it counts that
    the token was expected. A wrong step is improbable where it is made and need not leave a trace in the states that
    follow (docs/signals.md). log p is the model's own now and no gradient passes through it: to judge must not make
    what is judged likelier. The two sides of a pair are read apart and compared as by Bradley and Terry (1952), so what
    is said cannot depend on which of them came first. An explanation follows the reasoning in the same row: causal
    attention keeps it from the head, and its tokens add `explanation_weight` times their mean -log p.

    Failure mode: right and wrong reasonings that differ in length, style or source are told apart by that. Take both
    from the same source, and look at `accuracy` on answers of a source that was not trained on. What is right and
    unusual looks wrong, and a confident mistake right: compare with which side is the likelier. An explanation made by
    a template teaches the template.

    Args:
        dataset: `prompt`, `completion`, `correct` and, if there are some, `explanation`; or pairs `prompt`, `chosen`
            (right), `rejected` (wrong), and `chosen_explanation`, `rejected_explanation`. Explanations are text; an
            empty one is none.
        signal: name of the signal, and of the objective.
        surprise: whether s has its second part.
        explanation_weight: of the explanation's loss.
        eval_dataset, max_length: as of `Confusion`.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        signal: str = "meta_correctness",
        surprise: bool = True,
        explanation_weight: float = 0.5,
        eval_dataset: Any = None,
        max_length: int | None = 1024,
    ) -> None:
        super().__init__(dataset, signal, eval_dataset, max_length)
        if not 0 <= explanation_weight < math.inf:
            raise ValueError(f"objective {signal!r}: explanation_weight={explanation_weight!r} must be a number >= 0.")
        self.outputs, self.explanation_weight = 1 + surprise, explanation_weight

    def prepare(self, dataset: Dataset, split: str) -> list[dict[str, Any]]:
        found = require(self.name, dataset, PAIR, SINGLE)
        texts(self.name, dataset, *(column for column in found if column != "correct"))
        if found == SINGLE:
            marks = labels(self.name, dataset["correct"], "correct")
            explained = self._explanations(dataset, "explanation")
            rows = self.answers(dataset, "completion", list(zip(marks, explained)))
            return [
                {"sides": [self._explained(row, why)], "correct": [mark], ROW: row[ROW]} for row, (mark, why) in rows
            ]
        for number, (a, b) in enumerate(zip(dataset["chosen"], dataset["rejected"])):
            if a == b:
                raise ValueError(f"objective {self.name!r}: row {number}: chosen and rejected are the same; drop it.")
        sides = []
        for column in ("chosen", "rejected"):
            carried = list(enumerate(self._explanations(dataset, f"{column}_explanation")))
            rows = self.answers(dataset, column, carried)
            sides.append({number: self._explained(row, why) for row, (number, why) in rows})
        kept = [number for number in sides[0] if number in sides[1]]
        return [{"sides": [side[n] for side in sides], "correct": [1.0, 0.0], ROW: n} for n in kept]

    def _explanations(self, dataset: Dataset, column: str) -> list[str]:
        if column not in dataset.column_names:
            return [""] * len(dataset)
        found = [value or "" for value in dataset[column]]
        for row, value in enumerate(found):
            if not isinstance(value, str):
                raise ValueError(f"objective {self.name!r}: row {row} has {column}={value!r}; give it as text.")
        return found

    def _explained(self, row: dict[str, Any], explanation: str) -> dict[str, Any]:
        """The row with the tokens of its explanation, as far as max_length lets them, in `told`."""
        extra: list[int] = []
        if explanation.strip():
            extra = self.tokenizer(text=explanation, add_special_tokens=False)["input_ids"]
            extra = [*extra, self.tokenizer.eos_token_id]
        if self.max_length is not None:
            extra = extra[: self.max_length - len(row["ids"])]
        return {
            "ids": [*row["ids"], *extra],
            "mask": [*row["mask"], *[0] * len(extra)],
            "told": [*[0] * len(row["ids"]), *[1] * len(extra)],
        }

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        """The sequences of a batch are all first sides, then all second ones."""
        sides = [row["sides"][i] for i in range(len(rows[0]["sides"])) for row in rows]
        batch = sequences(sides, self.tokenizer)
        told = torch.zeros_like(batch["input_ids"])
        for i, side in enumerate(sides):
            told[i, : len(side["told"])] = torch.tensor(side["told"])
        correct = [row["correct"][i] for i in range(len(rows[0]["correct"])) for row in rows]
        return {**batch, "told": told, "correct": torch.tensor(correct), "sides": len(rows[0]["sides"])}

    def items(self, batch: Batch) -> Tensor:
        return super().items(batch) / batch["sides"]

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logprobs, mask = token_logprobs(outputs.logits, batch["input_ids"]), batch["told"][:, 1:]
        loss, metrics = self.compare(outputs.hidden, logprobs, batch)
        if self.explanation_weight and mask.any():
            told = -(masked_sum(logprobs, mask) / mask.sum(1).clamp_min(1)).mean()
            loss = loss + self.explanation_weight * told.to(loss.dtype)
            metrics["explanation_loss"] = told.detach()
        else:
            metrics["explanation_loss"] = torch.zeros_like(loss)
        return {self.signals[0]: loss}, metrics

    def compare(self, hidden: Tensor, logprobs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the judgement and metrics from final states (B, T, d) and log p of tokens t >= 1 (B, T - 1)."""
        scores = self.scores(hidden, logprobs, batch)
        loss = F.binary_cross_entropy_with_logits(scores, batch["correct"].to(scores.dtype))
        metrics = {"accuracy": accuracy(scores.detach(), batch["correct"])}
        if batch["sides"] == 2:
            right, wrong = scores.chunk(2)
            loss = loss - F.logsigmoid(right - wrong).mean()
            metrics["pair_accuracy"] = (right > wrong).float().mean()
        return loss, metrics

    def scores(self, hidden: Tensor, logprobs: Tensor, batch: Batch) -> Tensor:
        """s of every sequence (B,), from what `compare` takes."""
        end = self.read(at(hidden, batch["last"]))[:, 0]
        if self.outputs == 1:
            return end
        mask, weights = batch["completion_mask"][:, 1:], self.read(hidden[:, :-1])[..., 1]
        return end + masked_sum(weights * logprobs.detach().to(weights.dtype), mask) / mask.sum(1)
