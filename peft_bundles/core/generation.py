"""Sampling from a model's own distribution, whatever generation settings came with the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import GenerationConfig


@contextmanager
def own_distribution(model: nn.Module) -> Iterator[None]:
    """`model.generate` follows its arguments alone: settings on the model, such as a repetition penalty, are put aside.

    A setting of `generation_config` cannot be overridden in general: an argument that is None means the model's own.
    """
    owners = [module for module in model.modules() if "generation_config" in vars(module)]
    settings = [module.generation_config for module in owners]
    for module in owners:
        module.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, setting in zip(owners, settings):
            module.generation_config = setting
