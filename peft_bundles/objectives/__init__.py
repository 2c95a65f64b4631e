"""Objectives: rows in, `{signal: loss}` out. One file per family; `base.py` has the interface."""

# ruff: noqa: E402 - the check comes first
from ..extras import require


for _module in ("datasets", "trl"):
    require(_module, "train")

from .anchor import Anchor
from .base import Objective
from .batches import Outputs, Share
from .calibration import Calibration
from .confusion import Confusion
from .consistency import Consistency
from .contrastive import Contrastive, document_pairs
from .forward import Forward
from .lm import LM
from .meta_correctness import MetaCorrectness
from .ppo import PPO
from .preference import Preference
from .temporal import Temporal


__all__ = [
    "LM",
    "PPO",
    "Anchor",
    "Calibration",
    "Confusion",
    "Consistency",
    "Contrastive",
    "Forward",
    "MetaCorrectness",
    "Objective",
    "Outputs",
    "Preference",
    "Share",
    "Temporal",
    "document_pairs",
]
