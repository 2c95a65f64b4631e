"""Objectives: rows in, `{signal: loss}` out. One file a family; `base.py` says what one is."""

from .base import Objective, Outputs, Share
from .forward import Forward
from .lm import LM
from .preference import Preference


__all__ = ["LM", "Forward", "Objective", "Outputs", "Preference", "Share"]
