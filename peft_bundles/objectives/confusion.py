"""Confusion: does the model know that it does not know?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import Batch, Outputs
from .judged import Judged
from .tokens import accuracy, at, row_mean, token_entropy


class Confusion(Judged):
    """mean_rows [ entropy_weight * mean_t Huber(e_t - H_t) + correct_weight * BCE(c, correct) ].

    A linear head in the owners' subspace (`heads.py`) reads two things: e_t, from the state before every token of the
    answer, is to be the entropy H_t (nats) of that token's distribution; c, from the state of the answer's last token,
    is to say whether the answer is right. H is that of the current model and gets no gradient: the entropy is to be
    known, not changed. Kadavath et al. 2022 (arXiv 2207.05221) train such a head for the second part.

    Failure mode: the entropy is read from the state that makes the logits, so it can be learnt without knowing anything
    about the answer. A low sum may therefore hide a second part at chance: look at `accuracy`. Corrupted answers are
    improbable under the model; a head that has only learnt "improbable" calls confident mistakes right.

    Args:
        dataset: rows `prompt`, `completion`, `correct` (true or false), standard or conversational.
        signal: name of the signal and of the objective.
        entropy_weight: weight of the first part, >= 0.
        correct_weight: weight of the second part, >= 0.
        eval_dataset: held-out rows of the same format.
        max_length: rows with more tokens are left out. None keeps all.

    Raises:
        ValueError: a weight is negative, or both are 0.

    Example:
        >>> from peft_bundles.objectives import Confusion
        >>> rows = [{"prompt": "1+1=", "completion": "2", "correct": True},
        ...         {"prompt": "1+2=", "completion": "4", "correct": False}]
        >>> Confusion(rows).signals
        ('confusion',)
    """

    outputs = 2

    def __init__(
        self,
        dataset: Any,
        *,
        signal: str = "confusion",
        entropy_weight: float = 1.0,
        correct_weight: float = 1.0,
        eval_dataset: Any = None,
        max_length: int | None = 1024,
    ) -> None:
        super().__init__(dataset, signal, eval_dataset, max_length)
        if not (entropy_weight >= 0 and correct_weight >= 0 and entropy_weight + correct_weight > 0):
            raise ValueError(
                f"objective {signal!r}: entropy_weight={entropy_weight!r} and correct_weight={correct_weight!r} must "
                "be >= 0, and not both 0."
            )
        self.entropy_weight, self.correct_weight = entropy_weight, correct_weight

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with torch.no_grad():
            entropy = token_entropy(outputs.logits)
        return self.compare(outputs.hidden, entropy, batch)

    def compare(self, hidden: Tensor, entropy: Tensor, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and metrics from final states (B, T, d) and entropies of tokens t >= 1 (B, T - 1)."""
        mask = batch["completion_mask"][:, 1:]
        predicted, scores = self.read(hidden[:, :-1])[..., 0], self.read(at(hidden, batch["last"]))[:, 1]
        huber = row_mean(F.smooth_l1_loss(predicted, entropy.to(predicted.dtype), reduction="none"), mask)
        bce = F.binary_cross_entropy_with_logits(scores, batch["correct"].to(scores.dtype))
        metrics = {
            "entropy_error": row_mean((predicted - entropy).abs().detach(), mask).mean(),
            "correct_loss": bce.detach(),
            "accuracy": accuracy(scores.detach(), batch["correct"]),
        }
        return {self.signals[0]: self.entropy_weight * huber.mean() + self.correct_weight * bce}, metrics
