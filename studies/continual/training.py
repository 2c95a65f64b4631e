"""One phase of continual.py: a method's steps, captured as one CUDA graph."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from studies.continual.methods import Method
from studies.quality.run import Rows, capture


def train_phase(
    method: Method, phase: int, batches: Rows, rows: list[tuple[str, str]], what: dict[str, Any]
) -> dict[str, Any]:
    """AdamW with linear warm-up and decay; every group of parameters is clipped by itself.

    Args:
        batches: ids (steps, rows, T), the rest (steps, P).
        rows: task and tag of every row.
        what: the cell's settings, with "lr".
    """
    device, steps = batches.ids.device, len(batches.ids)
    cuda = device.type == "cuda"
    groups = method.begin(phase, [tag for _, tag in rows])
    rates = [torch.zeros((), device=device) for _ in groups]
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr": rate} for (parameters, _), rate in zip(groups, rates)],
        lr=rates[0],
        weight_decay=0.0,
        capturable=cuda,
        foreach=cuda,
    )
    moved = [p for parameters, _ in groups for p in parameters]
    batch = Rows(*(t[0].clone() for t in vars(batches).values()))
    losses = torch.zeros(2, device=device)

    def step() -> None:
        for parameter in moved:
            parameter.grad = None
        loss, extra = method.gradients(batch, lambda: torch.autocast(device.type, torch.bfloat16, enabled=cuda))
        for parameters, _ in groups:
            nn.utils.clip_grad_norm_(parameters, what["max_grad_norm"])
        method.update(optimizer)
        losses.copy_(torch.stack([loss, extra]))

    record: dict[str, Any] = {"steps": steps, "loss": []}
    begin = time.perf_counter()
    with method.training():
        run = step
        if cuda:
            run = capture(step, SimpleNamespace(parameters=moved), optimizer)  # type: ignore[arg-type]
        for n in range(steps):
            share = min(1.0, (n + 1) / what["warmup"]) * min(1.0, (steps - n) / max(1, steps - what["warmup"]))
            for rate, (_, factor) in zip(rates, groups):
                rate.fill_(what["lr"] * factor * share)
            for into, source in zip(vars(batch).values(), vars(batches).values()):
                into.copy_(source[n])
            run()
            if (n + 1) % 30 == 0 or n + 1 == steps:
                record["loss"].append([n + 1, *(round(x, 4) for x in losses.tolist())])
                if not math.isfinite(record["loss"][-1][1]):
                    raise FloatingPointError(f"the loss is {record['loss'][-1][1]} at step {n + 1}.")
    for parameter in method.model.parameters():
        parameter.grad = None
    return {
        **record,
        "seconds": time.perf_counter() - begin,
        "graph": run is not step,
        "moved": sum(p.numel() for p in moved),
    }
