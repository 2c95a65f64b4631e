"""Measuring: answers, probabilities, code, text, and sweeps of alpha."""

from .sweeps import AlphaSweep, alpha_sweep, negative_loss, text_batch


__all__ = ["AlphaSweep", "alpha_sweep", "negative_loss", "text_batch"]
