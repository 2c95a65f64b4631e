"""Rewards of completions by TRL-style functions: `f(prompts=, completions=, completion_ids=, **columns) -> list`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    """The reward of every completion by every function, (B, F) float32; NaN where a function returned None.

    Args:
        objective: name of the objective, for errors.
        functions: F reward functions. One may return None for a completion that it does not apply to.
        prompts: B texts or conversations.
        completions: B texts or conversations.
        completion_ids: token ids of the completions.
        columns: further columns of the dataset, one value per completion.

    Raises:
        RuntimeError: a function raised an error.
        ValueError: a function returned another number of rewards than completions, or NaN or infinity; or no function
            applies to a completion.
    """
    table = torch.zeros(len(prompts), len(functions))
    for f, function in enumerate(functions):
        which = f"objective {objective!r}: reward function {name_of(function)!r}"
        try:
            returned: Any = function(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        except Exception as error:
            misses = isinstance(error, TypeError) and "argument" in str(error)
            advice = "write it as f(completions, **kwargs)" if misses else "it must cope with any text"
            raise RuntimeError(
                f"{which} raised {type(error).__name__}: {error}. It was called with {len(prompts)} completions, the "
                f"first {completions[0]!r}; {advice}."
            ) from error
        scalar = not isinstance(returned, Iterable) or getattr(returned, "ndim", 1) == 0
        if scalar or isinstance(returned, (str, Mapping)):
            raise ValueError(
                f"{which} returned {returned!r}, a {type(returned).__name__}; return a list, one number per completion."
            )
        rewards = list(returned)
        if len(rewards) != len(prompts):
            raise ValueError(
                f"{which} returned {len(rewards)} rewards for {len(prompts)} completions; return one per completion."
            )
        for row, reward in enumerate(rewards):
            try:
                finite = reward is None or math.isfinite(reward)
            except (TypeError, ValueError, RuntimeError):  # text, a list, a tensor of several numbers
                finite = False
            if not finite:
                raise ValueError(
                    f"{which} gave row {row} the reward {reward!r} (prompt {prompts[row]!r}, completion "
                    f"{completions[row]!r}); return a finite number, or None where it does not apply."
                )
            table[row, f] = math.nan if reward is None else float(reward)
    if (unrewarded := table.isnan().all(1)).any():
        row = int(unrewarded.nonzero()[0])
        raise ValueError(
            f"objective {objective!r}: no reward function applies to row {row} (prompt {prompts[row]!r}): all returned "
            "None; return a number from at least one."
        )
    return table


def name_of(function: Callable[..., Any]) -> str:
    """The name of a reward function in logs and errors."""
    return getattr(function, "__name__", type(function).__name__)
