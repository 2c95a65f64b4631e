"""Loss and perplexity of texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def text_loss(model: Any, ids: Tensor, batch_size: int = 32) -> float:
    """Mean next-token loss, in nats, of rows of equal length, (N, T), in the mode and with the alphas that hold."""
    losses = []
    for rows in ids.split(batch_size):
        rows = rows.to(model.device)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.transpose(1, 2).float(), rows[:, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


@torch.no_grad()
def perplexity(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], *, max_length: int = 512, batch_size: int = 8
) -> dict[str, float]:
    """{"loss", "perplexity", "tokens"}: exp of the mean -log p(token | those before), over all tokens of all texts.

    `evaluate`'s metric of that name is a mean over texts, loads the model itself and is fetched from the Hub; this one
    takes the model as it is, with the alphas that hold.

    Args:
        max_length: tokens read of a text; the first is predicted from nothing and does not count.

    Raises:
        ValueError: no text has two tokens.
    """
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"][:max_length] for text in texts]
    rows = sorted((row for row in rows if len(row) > 1), key=len)
    if not rows:
        raise ValueError(f"none of the {len(texts)} texts has two tokens; there is nothing to predict.")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            ids = torch.full((len(part), max(map(len, part))), 0)
            mask = torch.zeros_like(ids)
            for n, row in enumerate(part):
                ids[n, : len(row)], mask[n, : len(row)] = torch.tensor(row), 1
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits[:, :-1]
            target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100).to(device)
            total += float(F.cross_entropy(logits.float().transpose(1, 2), target, reduction="sum"))
            count += int(mask[:, 1:].sum())
    finally:
        model.train(training)
    return {"loss": total / count, "perplexity": math.exp(total / count), "tokens": count}
