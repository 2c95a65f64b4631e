"""Objectives: rows in, `{signal: loss}` out. One file a family; `base.py` says what one is."""

from .base import Objective, Outputs, Share
from .forward import Forward
from .lm import LM
from .preference import Preference
from .rollout import PPO


__all__ = ["LM", "PPO", "Forward", "Objective", "Outputs", "Preference", "Share"]
