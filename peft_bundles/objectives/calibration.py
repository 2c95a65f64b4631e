"""Calibration: confidence in an answer that is right as often as it says."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .base import Batch, Outputs
from .heads import at
from .judged import Judged, mean_logprobs


class Calibration(Judged):
    """mean_rows (c - correct)^2 + ece_weight * SB-ECE(c), c = sigmoid(logit(p) / T + b).

    p is the geometric mean of the probabilities that the model gives the answer's tokens; log T and b are read by a
    linear head in the owners' subspace (`heads.py`) from the state of its last token: Platt's scaling (1999), or the
    temperature of Guo et al. 2017 (arXiv 1706.04599), one a row. The gradient reaches the owners through the head and
    through p. The first term is the Brier score; the second the soft-binned calibration error of Karandikar et al.
    2021 (arXiv 2108.00106, with squares).

    Failure mode: answering every row with the share of right ones is perfectly calibrated, so a low ECE says nothing by
    itself: compare `brier` with that of the constant, share * (1 - share). SB-ECE is that of a micro-batch: of few rows
    it is close to the Brier score, and it is what accumulation changes.

    Args:
        dataset: `prompt`, `completion`, `correct`, see `Judged`.
        signal: name of the signal, and of the objective.
        ece_weight: of the second term. bins: of it, and of the logged `ece`.
        eval_dataset, max_length: as of `Confusion`.
    """

    outputs = 2

    def __init__(
        self,
        dataset: Any,
        *,
        signal: str = "calibration",
        ece_weight: float = 0.5,
        bins: int = 10,
        eval_dataset: Any = None,
        max_length: int | None = 1024,
    ) -> None:
        super().__init__(dataset, signal, eval_dataset, max_length)
        if not 0 <= ece_weight < math.inf or bins < 2:
            raise ValueError(f"objective {signal!r}: ece_weight={ece_weight!r} must be >= 0 and bins={bins!r} >= 2.")
        self.ece_weight, self.bins = ece_weight, bins

    def losses(self, outputs: Outputs, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return self.compare(outputs.hidden, mean_logprobs(outputs, batch), batch)

    def compare(self, hidden: Tensor, logprobs: Tensor, batch: Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Loss and metrics from final states (B, T, d) and mean log-probabilities of the answers (B,)."""
        correct = batch["correct"].to(logprobs.dtype)
        confidence, temperature = self.confidence(hidden, logprobs, batch)
        brier = (confidence - correct).square().mean()
        loss = brier + self.ece_weight * soft_ece(confidence, correct, self.bins)
        before = logprobs.detach().exp()
        metrics = {
            "brier": brier.detach(),
            "ece": ece(confidence.detach(), correct, self.bins),
            "brier_before": (before - correct).square().mean(),
            "ece_before": ece(before, correct, self.bins),
            "temperature": temperature.detach().mean(),
        }
        return {self.signals[0]: loss}, metrics

    def confidence(self, hidden: Tensor, logprobs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """c and T, both (B,)."""
        said = self.read(at(hidden, batch["last"])).to(logprobs.dtype)
        temperature = said[:, 0].clamp(-5, 5).exp()
        logprobs = logprobs.clamp(max=-1e-6)  # p = 1 has no logit
        odds = logprobs - torch.log(-torch.expm1(logprobs))
        return torch.sigmoid(odds / temperature + said[:, 1]), temperature


def soft_ece(confidence: Tensor, correct: Tensor, bins: int, width: float = 0.01) -> Tensor:
    """sum_j (n_j / N) (accuracy_j - confidence_j)^2 over soft bins with centres (j + 1/2) / bins, a scalar.

    A confidence belongs to bin j with weight softmax_j(-(c - centre_j)^2 / width) (Karandikar et al., eq. 5).
    """
    centres = (torch.arange(bins, device=confidence.device, dtype=confidence.dtype) + 0.5) / bins
    member = (-(confidence[:, None] - centres).square() / width).softmax(-1)  # (B, bins)
    size = member.sum(0)
    gap = ((correct - confidence)[:, None] * member).sum(0) / size.clamp_min(1e-6)
    return (size / len(confidence) * gap.square()).sum()


def ece(confidence: Tensor, correct: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error with equal bins, sum_j (n_j / N) |accuracy_j - confidence_j| (Guo et al., eq. 3).

    Of N rows; biased upwards when bins hold few of them.
    """
    place = (confidence * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, device=confidence.device, dtype=confidence.dtype)
    return gap.index_add(0, place, correct - confidence).abs().sum() / len(confidence)
