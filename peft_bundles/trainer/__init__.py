"""Training with several objectives: `BundleTrainer`, `BundlePPOTrainer`, their arguments; a log for others."""

# ruff: noqa: E402 - the check comes first
from ..extras import require


for _module in ("datasets", "trl"):
    require(_module, "train")

from .config import BundleTrainingConfig
from .ppo import BundlePPOTrainer
from .quiet_logging import QuietLogging
from .trainer import BundleTrainer


__all__ = ["BundlePPOTrainer", "BundleTrainer", "BundleTrainingConfig", "QuietLogging"]
