"""The package's Triton kernels (kernels.py) beside what PyTorch does: microseconds, one JSON.

    python benchmarks/kernel_trials.py --output benchmarks/results/kernel_trials.json

Shapes of bundles with LoRA r16's parameters: batch 8 x 1024 of training, and a few tokens of decoding. A time is
that of a replayed CUDA graph, the ways side by side three times over. Decoding goes through the D and E of 64 layers in
turn, as a model does: those of one would lie in the GPU's cache. `host_us` is what the CPU takes for one layer's token.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from peft_bundles.core import kernels
from peft_bundles.core.functional import activate, activate_backward
from peft_bundles.core.kernels import FewTokens, centred, units_backward
from studies.records import made_by, write


WIDTHS = {"1.2b": (2048, 176), "3b": (3072, 192)}  # d and H
TOKENS, LAYERS = 8 * 1024, 64


def ways(d: int, H: int) -> dict[str, tuple[Callable[[], Any], int]]:
    """What is timed, and how many times it does its work."""

    def new(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    base, s, da, mean, gate = new(1, TOKENS, d), new(TOKENS, H), new(TOKENS, H), new(d), new(8, 1, H)

    def backward() -> None:
        ds = activate_backward(da, s, H).view(8, -1, H)
        (activate(s, H).view(8, -1, H) * gate, ds * gate)

    found: dict[str, tuple[Callable[[], Any], int]] = {
        "h - mu, and a copy of h": (lambda: (base - mean, base.clone()), 1),
        "centred": (lambda: centred(base, mean), 1),
        "hidden units backward": (backward, 1),
        "units_backward": (lambda: units_backward(s.view(8, -1, H), da.view(8, -1, H), gate, H), 1),
    }
    layers = [((new(H, d) / 64).T, new(d, H).T / 16) for _ in range(LAYERS)]
    for rows in (1, 8, 16, 32, 64):
        h = new(rows, 1, d)
        few = [FewTokens(h.shape, mean, D, E, H, None) for D, E in layers]

        def plain(h: Tensor = h) -> None:
            for D, E in layers:
                torch.addmm(h[:, 0], F.gelu((h[:, 0] - mean) @ D), E)

        def kernels(h: Tensor = h, few: list[FewTokens] = few) -> None:
            for each in few:
                each(h, h)

        found |= {f"plain, {rows} tokens": (plain, LAYERS), f"FewTokens, {rows} tokens": (kernels, LAYERS)}
    return found


@torch.no_grad()
def host(d: int, H: int) -> dict[str, float]:
    """Microseconds of the CPU for one layer's token, which an eager step waits for: medians of 9 times 500 calls."""
    h, mean, D, E = (torch.randn(*size, device="cuda").bfloat16() for size in ((1, 1, d), (d,), (H, d), (d, H)))
    few, D, E = FewTokens(h.shape, mean, D.T, E.T, H, None), D.T, E.T

    def runner(built: Any, grid: Any, stream: int, pointers: Any, rest: Any) -> None:
        built[grid](*pointers, *rest)

    ways = {
        "plain": (lambda: torch.addmm(h[:, 0], F.gelu((h[:, 0] - mean) @ D), E), kernels._again),
        "FewTokens": (lambda: few(h, h), kernels._again),
        "FewTokens, through Triton's runner": (lambda: few(h, h), runner),
    }
    us: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(10):  # the first builds
        for name, (way, launch) in ways.items():
            with mock.patch.object(kernels, "_again", launch):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                for _ in range(500):
                    way()
                us[name].append((time.perf_counter() - begin) / 500 * 1e6)
    return {name: round(median(times[1:]), 2) for name, times in us.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    us: dict[str, dict[str, list[float]]] = {shape: {} for shape in WIDTHS}
    for shape, widths in WIDTHS.items():
        timed = ways(*widths)
        for _ in range(3):
            for name, (way, times) in timed.items():
                ms = triton.testing.do_bench_cudagraph(way, rep=20, return_mode="median")
                us[shape].setdefault(name, []).append(round(ms * 1e3 / times, 2))
    record = {
        **made_by(" ".join(["python", *sys.argv]), "triton"),
        "us": us,
        "host_us": {shape: host(*widths) for shape, widths in WIDTHS.items()},
    }
    print(json.dumps(record, indent=2))
    write(args.output, record)


if __name__ == "__main__":
    main()
