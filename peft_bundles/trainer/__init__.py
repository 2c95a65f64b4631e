"""Training with several objectives: `BundleTrainer` and its arguments."""

from .config import BundleTrainingConfig
from .trainer import BundleTrainer


__all__ = ["BundleTrainer", "BundleTrainingConfig"]
