"""One phase of continual.py: the steps of a method on its rows."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from studies.continual.methods import Method
from studies.rows import Rows, batches_of
from studies.training import Training, autocast, warmup_decay


def train_phase(
    method: Method, phase: int, batches: Rows, rows: list[tuple[str, str]], settings: dict[str, Any]
) -> dict[str, Any]:
    """AdamW with linear warm-up and decay; the gradient of every group of parameters is clipped separately.

    Args:
        batches: ids (steps, rows, T), the rest (steps, P).
        rows: task and tag of every row.
        settings: those of the cell, with "lr".

    Raises:
        FloatingPointError: the loss is not finite.
    """
    device, steps = batches.ids.device, len(batches.ids)
    groups = method.begin(phase, [tag for _, tag in rows])
    record: dict[str, Any] = {"steps": steps, "loss": []}

    def gradients(batch: Rows) -> Tensor:
        return torch.stack(method.gradients(batch, lambda: autocast(device)))

    def rates(step: int) -> list[float]:
        share = warmup_decay(step, steps, settings["warmup"])
        return [settings["lr"] * factor * share for _, factor in groups]

    def after(done: int, losses: Tensor) -> None:
        if done % 30 == 0 or done == steps:
            record["loss"].append([done, *(round(x, 4) for x in losses.tolist())])
            if not math.isfinite(record["loss"][-1][1]):
                raise FloatingPointError(f"the loss is {record['loss'][-1][1]} at step {done}.")

    training = Training(
        [parameters for parameters, _ in groups],
        gradients,
        fixed=[batches.at(0)],
        clip=settings["max_grad_norm"],
        update=method.update,
    )
    begin = time.perf_counter()
    with method.training():
        training.run(batches_of(batches), rates, after)
    for parameter in method.model.parameters():
        parameter.grad = None
    return {
        **record,
        "seconds": time.perf_counter() - begin,
        "graph": training.captured,
        "moved": sum(p.numel() for p in training.parameters),
    }
