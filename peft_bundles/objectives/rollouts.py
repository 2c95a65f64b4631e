"""Rollouts: the completions that a model generates for prompts, as tensors, and batches cut out of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

from .batches import TAU, Batch, has_topics
from .forward import Forward


# The tensors of a rollout of n completions: (n, T), or (n, T - 1) for tokens t >= 1.
BY_TOKEN = ("input_ids", "attention_mask", "completion_mask")
BY_NEXT_TOKEN = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
NEXT_STATES = "next_states"  # (n, T - 1, r), with curiosity only
TOPICS = "topics"  # (n, K), on the CPU, with topics only


def generate(
    forward: Forward,
    name: str,
    rows: list[dict[str, Any]],
    tokenizer: Any,
    options: Mapping[str, Any],
    key: tuple[int | str, ...],
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """One completion for every row.

    Args:
        forward: the model.
        name: name of the objective whose alphas hold.
        rows: prepared rows with `prompt_ids`.
        tokenizer: has an end token and a padding token.
        options: arguments of `model.generate`.
        key: seeds the sampling.

    Returns:
        The tensors `BY_TOKEN` of prompts with their completions, padded on the right, and `TOPICS` where the rows have
        topics; and the token ids of each completion, up to its end token.
    """
    pad_id, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    prompts = [torch.tensor(row["prompt_ids"]) for row in rows]
    ids = pad(prompts, padding_value=pad_id, padding_side="left").to(forward.device)
    mask = pad([torch.ones_like(prompt) for prompt in prompts], padding_side="left").to(forward.device)
    tau = torch.tensor([row[TAU] for row in rows], dtype=torch.float64) if has_topics(rows) else None
    options = {"pad_token_id": pad_id, "eos_token_id": eos, **options}
    generated = forward.generate(name, ids, mask, tau, key, **options)[:, ids.shape[1] :].tolist()
    completions = [c[: c.index(eos) + 1] if eos in c else c for c in generated]
    whole = [torch.tensor([*row["prompt_ids"], *c]) for row, c in zip(rows, completions)]
    masks = [torch.tensor([0] * len(row["prompt_ids"]) + [1] * len(c)) for row, c in zip(rows, completions)]
    rollout = {
        "input_ids": pad(whole, padding_value=pad_id),
        "attention_mask": pad([torch.ones_like(sequence) for sequence in whole]),
        "completion_mask": pad(masks),
    }
    rollout = {name: tensor.to(forward.device) for name, tensor in rollout.items()}
    return rollout if tau is None else rollout | {TOPICS: tau}, completions


def select(rollout: Mapping[str, Tensor], rows: Tensor) -> Batch:
    """Some rows of a rollout, without the padding that all of them have; `metric.` scalars stay as they are."""
    length = int(rollout["attention_mask"][rows.to(rollout["attention_mask"].device)].sum(1).max())
    batch: Batch = {k: v for k, v in rollout.items() if k.startswith("metric.")}
    for name in (*BY_TOKEN, *BY_NEXT_TOKEN, *({NEXT_STATES} & rollout.keys())):
        batch[name] = rollout[name].to(rows.device)[rows, : length - (name not in BY_TOKEN)]
    return batch | ({TOPICS: rollout[TOPICS][rows.cpu()]} if TOPICS in rollout else {})
