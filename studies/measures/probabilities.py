"""How good probabilities are: area under the ROC curve, Brier score, expected calibration error. Needs scikit-learn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from sklearn.metrics import brier_score_loss, roc_auc_score
from torch import Tensor

from peft_bundles.objectives import calibration


Numbers = Sequence[float] | Sequence[bool] | np.ndarray | Tensor


def auc(correct: Numbers, scores: Numbers) -> float:
    """Area under the ROC curve (scikit-learn's): a right answer outscores a wrong one of another question so often.

    Raises:
        ValueError: labels other than 0 and 1, or all alike: then nothing can be told apart.
    """
    labels, values = _labelled(correct, scores)
    if len(set(labels.tolist())) < 2:
        raise ValueError(f"all {len(labels)} labels are {labels[0]}; discrimination needs right and wrong answers.")
    return float(roc_auc_score(labels, values))


def brier(correct: Numbers, probabilities: Numbers) -> float:
    """Mean squared error of the probability of being right (Brier 1950; scikit-learn's)."""
    labels, values = _labelled(correct, probabilities, unit=True)
    return float(brier_score_loss(labels, values, pos_label=1))


def ece(correct: Numbers, probabilities: Numbers, bins: int = 10) -> float:
    """Expected calibration error with bins of equal width; the formula is `peft_bundles.objectives.calibration.ece`.

    Raises:
        ValueError: labels other than 0 and 1, probabilities outside [0, 1], or no bin.
    """
    labels, values = _labelled(correct, probabilities, unit=True)
    if bins < 1:
        raise ValueError(f"bins={bins!r} must be at least 1.")
    return float(calibration.ece(torch.from_numpy(values), torch.from_numpy(labels).double(), bins))


def _labelled(correct: Numbers, scores: Numbers, unit: bool = False) -> tuple[np.ndarray, np.ndarray]:
    labels, values = _numbers("correct", correct), _numbers("scores", scores)
    if len(labels) != len(values):
        raise ValueError(f"{len(labels)} labels and {len(values)} scores; give one each.")
    if wrong := sorted(set(labels.tolist()) - {0.0, 1.0}):
        raise ValueError(f"labels {wrong} must be 0 (wrong) or 1 (right).")
    if unit and not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"probabilities from {values.min():g} to {values.max():g} must be in [0, 1].")
    return labels.astype(int), values


def _numbers(name: str, given: Numbers) -> np.ndarray:
    values = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given, dtype=float).reshape(-1)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"{name} has {len(values)} values, not all finite; give at least one finite number.")
    return values
