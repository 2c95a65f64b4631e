"""Calibration: of the answers given with confidence c, a share c should be right."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .batches import Batch, Outputs
from .judged import Judged, mean_logprobs
from .tokens import at


class Calibration(Judged):
    """mean_rows (c - correct)^2 + ece_weight * SB-ECE(c), c = sigmoid(logit(p) / T + b).

    p is the geometric mean of the probabilities that the model gives the answer's tokens. A linear head in the owners'
    subspace (`heads.py`) reads log T and b from the state of the answer's last token: Platt's scaling (1999), or the
    temperature of Guo et al. 2017 (arXiv 1706.04599), one for every row. The gradient reaches the owners through the
    head and through p. The first term is the Brier score; the second is the soft-binned calibration error of Karandikar
    et al. 2021 (arXiv 2108.00106, with squares).

    Failure mode: a constant confidence, the share of right answers, is perfectly calibrated, so a low ECE alone says
    nothing: compare `brier` with that of the constant, share * (1 - share). SB-ECE is taken over a micro-batch: with
    few rows it is close to the Brier score, and gradient accumulation does not enlarge it.

    Args:
        dataset: rows `prompt`, `completion`, `correct` (true or false), standard or conversational.
        signal: name of the signal and of the objective.
        ece_weight: weight of the second term, >= 0.
        bins: bins of the second term and of the logged `ece`, at least 2.
        eval_dataset: held-out rows of the same format.
        max_length: rows with more tokens are left out. None keeps all.

    Raises:
        ValueError: `ece_weight` or `bins` is out of range.

    Example:
        >>> from peft_bundles.objectives import Calibration
        >>> rows = [{"prompt": "1+1=", "completion": "2", "correct": True},
        ...         {"prompt": "1+2=", "completion": "4", "correct": False}]
        >>> Calibration(rows).signals
        ('calibration',)
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
            raise ValueError(
                f"objective {signal!r}: ece_weight={ece_weight!r} must be a number >= 0, and bins={bins!r} at least 2."
            )
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
        """The confidence c and the temperature T, both (B,)."""
        outputs = self.read(at(hidden, batch["last"])).to(logprobs.dtype)
        temperature = outputs[:, 0].clamp(-5, 5).exp()
        logprobs = logprobs.clamp(max=-1e-6)  # p = 1 has no logit
        odds = logprobs - torch.log(-torch.expm1(logprobs))
        return torch.sigmoid(odds / temperature + outputs[:, 1]), temperature


def soft_ece(confidence: Tensor, correct: Tensor, bins: int, width: float = 0.01) -> Tensor:
    """Soft-binned calibration error: sum_j (n_j / N) (accuracy_j - confidence_j)^2, a scalar with a gradient.

    A confidence belongs to bin j, with centre (j + 1/2) / bins, by the weight softmax_j(-(c - centre_j)^2 / width)
    (Karandikar et al., eq. 5).
    """
    centres = (torch.arange(bins, device=confidence.device, dtype=confidence.dtype) + 0.5) / bins
    member = (-(confidence[:, None] - centres).square() / width).softmax(-1)  # (B, bins)
    size = member.sum(0)
    gap = ((correct - confidence)[:, None] * member).sum(0) / size.clamp_min(1e-6)
    return (size / len(confidence) * gap.square()).sum()


def ece(confidence: Tensor, correct: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error with bins of equal width, sum_j (n_j / N) |accuracy_j - confidence_j|.

    Naeini et al. 2015; Guo et al. 2017, eq. 3. It is biased upwards where bins hold few rows.

    Args:
        confidence: (N,), in [0, 1].
        correct: (N,), 0 or 1.
        bins: number of bins.

    Returns:
        A scalar in [0, 1].
    """
    bin_of = (confidence * bins).long().clamp(0, bins - 1)
    gap = torch.zeros(bins, device=confidence.device, dtype=confidence.dtype)
    return gap.index_add(0, bin_of, correct - confidence).abs().sum() / len(confidence)
