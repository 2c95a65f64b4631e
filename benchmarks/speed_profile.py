"""`profile`, a section of benchmarks/speed.py: one decoder block and one token, kernel by kernel."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from speed_models import CUDA, DEVICE, DTYPE, SHAPES, adapted, precision, sync


def profile(shape: str, options: Any) -> dict[str, Any]:
    """One decoder block, forward and backward of a training batch, and one token: kernel by kernel."""
    cells = [(name, what) for name in ("base", "lora_r16", "bundles_15") for what in ("train", "token")]
    return {"profile": {f"{name}/{what}": kernels(shape, name, what, options.batch) for name, what in cells}}


def kernels(shape: str, name: str, what: str, batch: tuple[int, int]) -> dict[str, Any]:
    """Kernels of one run (on a CPU: operators), the slowest first; microseconds and calls a run."""
    training, model = what == "train", adapted(shape, name, inference=what == "token")
    inner = model if name == "base" else model.get_base_model()
    rows, length = batch if training else (1, 1)
    hidden = torch.randn(rows, length, SHAPES[shape][0], device=DEVICE, dtype=DTYPE, requires_grad=training)
    angles = inner.model.rotary_emb(hidden, torch.arange(length, device=DEVICE)[None])

    def run() -> None:
        with precision() if training else torch.no_grad():
            out = inner.model.layers[0](hidden, position_embeddings=angles)
        if training:
            out.backward(torch.ones_like(out))
            model.zero_grad()
            hidden.grad = None

    activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if CUDA else [])]
    with model.folded() if name.startswith("bundles") and not training else nullcontext():
        for _ in range(3):
            run()
        sync()
        with torch.profiler.profile(activities=activities) as seen:
            for _ in range(5):
                run()
            sync()
    found = []
    for event in seen.key_averages():
        us = event.self_device_time_total if CUDA else event.self_cpu_time_total
        if us and (not CUDA or "CUDA" in str(event.device_type)):
            found.append({"name": event.key[:200], "calls": event.count / 5, "us": round(us / 5, 2)})
    found.sort(key=lambda kernel: -kernel["us"])
    total = {"us": round(sum(k["us"] for k in found), 2), "calls": sum(k["calls"] for k in found)}
    return {**total, "kernels": found[:60]}
