"""Training with several objectives: `BundleTrainer`, `BundlePPOTrainer` and their arguments."""

from .config import BundleTrainingConfig
from .ppo import BundlePPOTrainer
from .trainer import BundleTrainer


__all__ = ["BundlePPOTrainer", "BundleTrainer", "BundleTrainingConfig"]
