"""Rewards of completions by TRL-style functions: `f(prompts=, completions=, completion_ids=, **columns) -> list`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def score(
    objective: str,
    functions: Sequence[Callable[..., Sequence[float | None]]],
    prompts: list[Any],
    completions: list[Any],
    completion_ids: list[list[int]],
    columns: Mapping[str, list[Any]],
) -> Tensor:
    """What each function gives each completion, (B, F) float32; NaN where a function returned None (does not apply).

    Raises:
        RuntimeError: a function raised.
        ValueError: another number of rewards than completions; NaN or infinity; a completion that none applies to.
    """
    table = torch.zeros(len(prompts), len(functions))
    for f, function in enumerate(functions):
        me = f"objective {objective!r}: reward function {name_of(function)!r}"
        try:
            rewards = list(function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns))
        except Exception as error:
            raise RuntimeError(
                f"{me} raised {type(error).__name__}: {error}. It was called with {len(prompts)} completions, the "
                f"first {completions[0]!r}; it must take **kwargs and cope with any text."
            ) from error
        if len(rewards) != len(prompts):
            raise ValueError(
                f"{me} returned {len(rewards)} rewards for {len(prompts)} completions; return one a completion."
            )
        for row, reward in enumerate(rewards):
            if reward is not None and not math.isfinite(reward):
                raise ValueError(
                    f"{me} gave row {row} the reward {reward!r} (prompt {prompts[row]!r}, completion "
                    f"{completions[row]!r}); return a finite number, or None where it does not apply."
                )
            table[row, f] = math.nan if reward is None else float(reward)
    if (silent := table.isnan().all(1)).any():
        row = int(silent.nonzero()[0])
        raise ValueError(
            f"objective {objective!r}: no reward function applies to row {row} (prompt {prompts[row]!r}); all returned "
            "None."
        )
    return table


def name_of(function: Callable[..., Any]) -> str:
    """The function's name in logs and errors."""
    return getattr(function, "__name__", type(function).__name__)
