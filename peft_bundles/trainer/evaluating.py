"""The losses of objectives on their held-out rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from ..objectives.base import Objective
from ..objectives.batches import Share
from ..objectives.forward import Forward
from ..objectives.seeding import seeded


@torch.no_grad()
def held_out_means(
    forward: Forward, objectives: Mapping[str, Objective], shares: Mapping[str, Share]
) -> dict[str, dict[str, float]]:
    """Means over an objective's held-out rows on all processes.

    Args:
        forward: the model, in the mode to measure it in.
        objectives: by name.
        shares: objective -> the rows of this process.

    Returns:
        Objective with held-out rows -> "loss/<signal>" or "<objective>/<metric>" -> mean.
    """
    means: dict[str, dict[str, float]] = {}
    for name, objective in objectives.items():
        if objective.eval_rows is None:
            continue
        share = shares[name]
        sums: dict[str, Tensor] = {}
        count = torch.zeros((), device=forward.device)
        with seeded(forward.device, share.seed, "eval", name, share.rank):
            for batch in objective.eval_batches(forward, share):
                losses, metrics = objective.losses(forward({name: batch})[name], batch)
                items = objective.items(batch) * batch["weight"]
                count += items
                named = {f"loss/{s}": v for s, v in losses.items()} | {f"{name}/{m}": v for m, v in metrics.items()}
                for key, value in named.items():
                    sums[key] = sums.get(key, 0) + value.float() * items
        if share.world > 1:
            flat = torch.stack([*sums.values(), count])
            dist.all_reduce(flat)
            sums, count = dict(zip(sums, flat[:-1])), flat[-1]
        means[name] = {key: float(value / count.clamp_min(1e-12)) for key, value in sums.items()}
    return means
