"""Confusion: does the model know that it does not know?"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Batch, Outputs
from .heads import at
from .judged import Judged, accuracy
from .tokens import masked_sum, token_entropy


class Confusion(Judged):
    """mean_rows [ entropy_weight * mean_t Huber(e_t - H_t) + correct_weight * BCE(c, correct) ].

    A linear head in the owners' subspace (`heads.py`) reads e_t, the entropy H_t (nats) of the distribution of every
    token of the answer from the state before it, and c, whether the answer is right, from the state of its last token.
    H is the model's own now and no gradient passes through it: entropy is to be known, not changed. Kadavath et al.
    2022 (arXiv 2207.05221) train such a head for the second part.

    Failure mode: entropy is read from the state that makes the logits, so it can be learnt without knowing anything of
    the answer, and a low loss of the sum may hide a `correct` at chance: look at `accuracy`. Corrupted answers are
    improbable under the model; a head that only learnt "improbable" calls its confident mistakes right.

    Args:
        dataset: `prompt`, `completion`, `correct`, see `Judged`.
        signal: name of the signal, and of the objective.
        entropy_weight, correct_weight: of the two parts.
        eval_dataset: held-out rows of the same format.
        max_length: rows with more tokens are left out. None keeps all.
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
        said, right = self.read(hidden[:, :-1])[..., 0], self.read(at(hidden, batch["last"]))[:, 1]
        huber = masked_sum(F.smooth_l1_loss(said, entropy.to(said.dtype), reduction="none"), mask) / mask.sum(1)
        bce = F.binary_cross_entropy_with_logits(right, batch["correct"].to(right.dtype))
        metrics = {
            "entropy_error": (masked_sum((said - entropy).abs().detach(), mask) / mask.sum(1)).mean(),
            "correct_loss": bce.detach(),
            "accuracy": accuracy(right.detach(), batch["correct"]),
        }
        return {self.signals[0]: self.entropy_weight * huber.mean() + self.correct_weight * bce}, metrics
