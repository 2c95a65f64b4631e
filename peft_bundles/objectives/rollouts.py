"""Rollouts: the completions that a model generates for prompts, as tensors, and batches cut out of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from trl.trainer.utils import pad

from .batches import TAU, Batch, has_topics
from .forward import Forward
from .tokens import Sampling


# The tensors of a rollout of n completions: (n, T), or (n, T - 1) for tokens t >= 1.
BY_TOKEN = ("input_ids", "attention_mask", "completion_mask")
BY_NEXT_TOKEN = ("old_logprobs", "ref_logprobs", "old_values", "advantages", "returns")
NEXT_STATES = "next_states"  # (n, T - 1, r), with curiosity only
TOPICS = "topics"  # (n, K), on the CPU, with topics only


# Arguments of `model.generate` that leave the distribution of the tokens as it is.
HARMLESS = ("eos_token_id", "cache_implementation", "cache_config", "compile_config", "disable_compile")


def generation_options(prefix: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as a dict.

    Raises:
        ValueError: one of them would change what is sampled, while the losses score the policy itself.
    """
    ends = options.get("eos_token_id")
    ids = ends if isinstance(ends, (list, tuple)) else [ends]
    if ends is not None and not (ids and all(isinstance(i, int) and i >= 0 for i in ids)):
        raise ValueError(f"{prefix}: eos_token_id={ends!r} must be a token id or a list of token ids.")
    for option, value in options.items():
        if option in ("max_new_tokens", "max_length"):
            raise ValueError(f"{prefix}: generation={{{option!r}: {value!r}}}; write max_completion_length={value!r}.")
        if option in Sampling._fields:
            raise ValueError(f"{prefix}: generation={{{option!r}: {value!r}}}; write {option}={value!r} instead.")
        if option not in HARMLESS:
            raise ValueError(
                f"{prefix}: generation={{{option!r}: {value!r}}} could sample from another distribution than the one "
                f"that is scored; leave it out ({', '.join(HARMLESS)} can be given; temperature, top_k, top_p and "
                "min_p are arguments of the objective)."
            )
    return dict(options)


def end_tokens(options: Mapping[str, Any], tokenizer: Any, model: Any) -> frozenset[int]:
    """Ids that end a completion: `eos_token_id` of the options, else those of the tokenizer and of the model."""
    if options.get("eos_token_id") is not None:
        sources = [options["eos_token_id"]]
    else:
        settings = getattr(model, "generation_config", None)
        sources = [tokenizer.eos_token_id, getattr(settings, "eos_token_id", None)]
    ids: list[int] = []
    for source in sources:
        ids += source if isinstance(source, (list, tuple)) else [] if source is None else [source]
    return frozenset(ids)


def generate(
    forward: Forward,
    name: str,
    rows: list[dict[str, Any]],
    pad_id: int,
    ends: Collection[int],
    options: Mapping[str, Any],
    key: tuple[int | str, ...],
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """One completion for every row.

    Args:
        forward: the model.
        name: name of the objective whose alphas hold.
        rows: prepared rows with `prompt_ids`.
        pad_id: the padding token.
        ends: the end tokens; a completion ends with the first of them.
        options: further arguments of `model.generate`.
        key: seeds the sampling.

    Returns:
        The tensors `BY_TOKEN` of prompts with their completions, padded on the right, and `TOPICS` where the rows have
        topics; and the token ids of each completion, up to its end token.
    """
    prompts = [torch.tensor(row["prompt_ids"]) for row in rows]
    ids = pad(prompts, padding_value=pad_id, padding_side="left").to(forward.device)
    mask = pad([torch.ones_like(prompt) for prompt in prompts], padding_side="left").to(forward.device)
    tau = torch.tensor([row[TAU] for row in rows], dtype=torch.float64) if has_topics(rows) else None
    options = {"pad_token_id": pad_id, "eos_token_id": sorted(ends), **options}
    generated = forward.generate(name, ids, mask, tau, key, **options)[:, ids.shape[1] :].tolist()
    completions = [c[: next((n + 1 for n, i in enumerate(c) if i in ends), None)] for c in generated]
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
