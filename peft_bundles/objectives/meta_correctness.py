"""Meta-correctness: is this reasoning right?"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor

from .batches import ROW, Batch, Outputs
from .checks import binary_labels, require_columns, require_text
from .judged import Judged, sequences
from .tokens import accuracy, at, row_mean, token_logprobs


SINGLE, PAIR = ("prompt", "completion", "correct"), ("prompt", "chosen", "rejected")


class MetaCorrectness(Judged):
    """BCE(s, correct), plus -log sigmoid(s_right - s_wrong) for pairs, plus the loss of an explanation as text.

    s = a(h_end) + mean_t w(h_{t-1}) log p_t over the tokens t of the reasoning. A linear head in the owners' subspace
    (`heads.py`) reads a from the state of the last token, and w, the weight of each token's log-probability, from the
    state before that token. A wrong step is improbable where it is made, and need not leave a trace in the states that
    follow. log p is that of the current model and gets no gradient: judging an answer must not make it likelier. The
    two sides of a pair are read separately and compared as by Bradley and Terry (1952), so their order cannot matter.
    An explanation follows the reasoning in the same sequence. Causal attention hides it from the head; its tokens add
    `explanation_weight` times their mean -log p.

    Failure mode: right and wrong reasonings that differ in length, style or source are told apart by that. Take both
    from the same source, and look at `accuracy` on answers of a source that was not trained on. An unusual right answer
    looks wrong, and a confident mistake looks right: compare with choosing the likelier side. Explanations made from a
    template teach the template.

    Args:
        dataset: rows `prompt`, `completion`, `correct` (true or false) and optionally `explanation`; or pairs `prompt`,
            `chosen` (right), `rejected` (wrong) and optionally `chosen_explanation`, `rejected_explanation`.
            Explanations are text; an empty one counts as none.
        signal: name of the signal and of the objective.
        surprise: whether s has its second part, the log-probabilities.
        explanation_weight: weight of the explanation's loss, >= 0.
        eval_dataset: held-out rows of the same format.
        max_length: rows whose reasoning has more tokens are left out; an explanation is cut off there. None keeps all.

    Raises:
        ValueError: `explanation_weight` is negative or not finite.

    Example:
        >>> from peft_bundles.objectives import MetaCorrectness
        >>> rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"},
        ...         {"prompt": "1+2=", "chosen": "3", "rejected": "4"}]
        >>> MetaCorrectness(rows).signals
        ('meta_correctness',)
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
        columns = require_columns(self.name, dataset, PAIR, SINGLE)
        require_text(self.name, dataset, *(column for column in columns if column != "correct"))
        if columns == SINGLE:
            labels = binary_labels(self.name, dataset["correct"], "correct")
            explanations = self._explanations(dataset, "explanation")
            rows = self.answers(dataset, "completion", list(zip(labels, explanations)))
            return [
                {"sides": [self._explained(row, text)], "correct": [label], ROW: row[ROW]}
                for row, (label, text) in rows
            ]
        for number, (chosen, rejected) in enumerate(zip(dataset["chosen"], dataset["rejected"])):
            if chosen == rejected:
                raise ValueError(f"objective {self.name!r}: row {number}: chosen and rejected are the same; drop it.")
        sides = []
        for column in ("chosen", "rejected"):
            explanations = self._explanations(dataset, f"{column}_explanation")
            rows = self.answers(dataset, column, explanations)
            sides.append({row[ROW]: self._explained(row, text) for row, text in rows})
        kept = [number for number in sides[0] if number in sides[1]]
        return [{"sides": [side[n] for side in sides], "correct": [1.0, 0.0], ROW: n} for n in kept]

    def _explanations(self, dataset: Dataset, column: str) -> list[str]:
        if column not in dataset.column_names:
            return [""] * len(dataset)
        explanations = [value or "" for value in dataset[column]]
        for row, value in enumerate(explanations):
            if not isinstance(value, str):
                raise ValueError(f"objective {self.name!r}: row {row} has {column}={value!r}; give it as text.")
        return explanations

    def _explained(self, row: dict[str, Any], explanation: str) -> dict[str, Any]:
        """The row with the tokens of its explanation up to max_length; `explains` is 1 at these tokens."""
        extra: list[int] = []
        if explanation.strip():
            extra = self.tokenizer(text=explanation, add_special_tokens=False)["input_ids"]
            extra = [*extra, self.tokenizer.eos_token_id]
        if self.max_length is not None:
            extra = extra[: self.max_length - len(row["ids"])]
        return {
            "ids": [*row["ids"], *extra],
            "mask": [*row["mask"], *[0] * len(extra)],
            "explains": [*[0] * len(row["ids"]), *[1] * len(extra)],
        }

    def collate(self, rows: list[Mapping[str, Any]]) -> Batch:
        """The first sides of all rows, then the second sides of all rows."""
        sides = [row["sides"][i] for i in range(len(rows[0]["sides"])) for row in rows]
        batch = sequences(sides, self.tokenizer)
        explains = torch.zeros_like(batch["input_ids"])
        for i, side in enumerate(sides):
            explains[i, : len(side["explains"])] = torch.tensor(side["explains"])
        correct = [row["correct"][i] for i in range(len(rows[0]["correct"])) for row in rows]
        return {**batch, "explains": explains, "correct": torch.tensor(correct), "sides": len(rows[0]["sides"])}

    def items(self, batch: Batch) -> Tensor:
        """The number of rows; a pair is one row."""
        return super().items(batch) / batch["sides"]

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        logprobs, mask = token_logprobs(outputs.logits, batch["input_ids"]), batch["explains"][:, 1:]
        loss, metrics = self.compare(outputs.hidden, logprobs, batch)
        if self.explanation_weight and mask.any():
            explanation = -row_mean(logprobs, mask).mean()
            loss = loss + self.explanation_weight * explanation.to(loss.dtype)
            metrics["explanation_loss"] = explanation.detach()
        else:
            metrics["explanation_loss"] = torch.zeros_like(loss)
        return {self.signals[0]: loss}, metrics

    def compare(self, hidden: Tensor, logprobs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of the judgement, and metrics, from final states (B, T, d) and log p of tokens t >= 1 (B, T - 1)."""
        scores = self.scores(hidden, logprobs, batch)
        loss = F.binary_cross_entropy_with_logits(scores, batch["correct"].to(scores.dtype))
        metrics = {"accuracy": accuracy(scores.detach(), batch["correct"])}
        if batch["sides"] == 2:
            right, wrong = scores.chunk(2)
            loss = loss - F.logsigmoid(right - wrong).mean()
            metrics["pair_accuracy"] = (right > wrong).float().mean()
        return loss, metrics

    def scores(self, hidden: Tensor, logprobs: Tensor, batch: Batch) -> Tensor:
        """s of every sequence, (B,); arguments as for `compare`."""
        end = self.read(at(hidden, batch["last"]))[:, 0]
        if self.outputs == 1:
            return end
        mask, weights = batch["completion_mask"][:, 1:], self.read(hidden[:, :-1])[..., 1]
        return end + row_mean(weights * logprobs.detach().to(weights.dtype), mask)
