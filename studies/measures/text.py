"""Loss of texts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def text_loss(model: Any, ids: Tensor, batch_size: int = 32) -> float:
    """Mean next-token loss, in nats, of rows of equal length, (N, T), in the mode and with the alphas that hold."""
    losses = []
    for rows in ids.split(batch_size):
        rows = rows.to(model.device)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.transpose(1, 2).float(), rows[:, 1:], reduction="none"))
    return float(torch.cat(losses).mean())
