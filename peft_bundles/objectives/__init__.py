"""Objectives: rows in, `{signal: loss}` out. One file a family; `base.py` says what one is."""

from .anchor import Anchor
from .base import Objective, Outputs, Share
from .forward import Forward
from .lm import LM
from .preference import Preference
from .rollout import PPO


__all__ = ["LM", "PPO", "Anchor", "Forward", "Objective", "Outputs", "Preference", "Share"]
