"""Measure a model with bundles: alpha sweeps, conflicts between bundles, distillation into a plain LoRA."""

from .distillation import DistillReport, distill_to_lora
from .interference import Conflicts, Orthogonality, conflicts, orthogonality
from .sweeps import AlphaSweep, alpha_sweep, negative_loss, spearman, text_batch


__all__ = [
    "AlphaSweep",
    "Conflicts",
    "DistillReport",
    "Orthogonality",
    "alpha_sweep",
    "conflicts",
    "distill_to_lora",
    "negative_loss",
    "orthogonality",
    "spearman",
    "text_batch",
]
