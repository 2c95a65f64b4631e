"""Two Triton kernels that are not in the package: would they beat what is? One JSON; right first, then timed.

    python benchmarks/kernel_trials.py --output benchmarks/results/kernel_trials.json
    TRITON_INTERPRET=1 python benchmarks/kernel_trials.py    # no GPU: right or wrong only

`added` is base + left @ right with all three kept. PyTorch has no such product: `addmm` copies the base first (20 us a
block of the 1.2 B shape, docs/speed.md), so the forward has the copy made by `kernels.centred`, and the backward pays.
`few_tokens_turned` is `kernels.few_tokens` with E laid out as D is, a column of the output a row: its second kernel now
reads rows of 64 bytes (5.2 us, the first takes 2.6).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peft_bundles.kernels import _read, centred, few_tokens


WIDTHS = {"1.2b": (2048, 176), "3b": (3072, 192)}  # d, H of bundles with LoRA r16's parameters, or nearly
TOKENS = 8 * 1024


@triton.jit
def _added(base, left, right, out, N, H, d, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out (N, d) = base + left (N, H) @ right (H, d), BM x BN of it a program."""
    columns, rows = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, H, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(left + rows[:, None] * H + k[None, :], mask=(rows < N)[:, None] & (k < H)[None, :], other=0.0)
        b = tl.load(
            right + k[:, None] * d + columns[None, :], mask=(k < H)[:, None] & (columns < d)[None, :], other=0.0
        )
        total = tl.dot(a, b, total)
    at, inside = rows[:, None].to(tl.int64) * d + columns[None, :], (rows < N)[:, None] & (columns < d)[None, :]
    whole = tl.load(base + at, mask=inside, other=0.0).to(tl.float32) + total
    tl.store(out + at, whole.to(out.dtype.element_ty), mask=inside)


def added(base: Tensor, left: Tensor, right: Tensor, tile: tuple[int, int, int] = (128, 128, 64)) -> Tensor:
    """base + left @ right, (N, d), of contiguous (N, d), (N, H) and (H, d)."""
    (N, H), d, out = left.shape, right.shape[1], torch.empty_like(base)
    grid = (triton.cdiv(d, tile[1]), triton.cdiv(N, tile[0]))
    _added[grid](base, left, right, out, N, H, d, BM=tile[0], BN=tile[1], BK=tile[2], num_warps=8)
    return out


@triton.jit
def _write_turned(h, a, E, y, H, d, U: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """y (N, d) = h + a E of U columns and a token a program; E is (d, H) here."""
    columns, token = tl.program_id(0) * U + tl.arange(0, U), tl.program_id(1)
    total = tl.zeros((U, C), tl.float32)
    for start in range(0, H, C):
        at = start + tl.arange(0, C)
        active = tl.load(a + token * H + at, mask=at < H, other=0.0).to(tl.float32)
        inside = (columns < d)[:, None] & (at < H)[None, :]
        weights = tl.load(E + columns[:, None] * H + at[None, :], mask=inside, other=0.0).to(tl.float32)
        total += weights * active[None, :]
    whole = tl.load(h + token * d + columns, mask=columns < d, other=0.0).to(tl.float32) + tl.sum(total, 1)
    tl.store(y + token * d + columns, whole.to(y.dtype.element_ty), mask=columns < d)


def few_tokens_turned(h: Tensor, residual: Tensor, mean: Tensor, D: Tensor, E: Tensor, nonlinear: int) -> Tensor:
    """`kernels.few_tokens` without alphas, for E (d, H) contiguous."""
    (batch, length, d), H = h.shape, E.shape[1]
    a, y, D = h.new_empty(batch * length, H), torch.empty_like(residual), D.T
    _read[(-(-H // 2), batch * length)](h, mean, D, D, a, H, d, nonlinear, length, MEAN=True, ALPHA=False, U=2, C=1024)
    _write_turned[(-(-d // 4), batch * length)](residual, a, E, y, H, d, U=4, C=256)
    return y


def error(found: Tensor, exact: Tensor, base: Tensor) -> float:
    """Of what is added to the base, relative."""
    return float((found.double() - exact).norm() / (exact - base.double()).norm())


def right(device: str) -> dict[str, float]:
    """Relative errors in float16 against float64, sizes that fill no tile."""
    torch.manual_seed(0)

    def new(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=torch.float16)

    base, left, into = new(150, 200), new(150, 72), new(72, 200) / 8
    found = {"added": error(added(base, left, into), base.double() + left.double() @ into.double(), base)}
    h, mean, D, E = new(3, 1, 200) + 3, new(200) + 3, (new(72, 200) / 14).T, new(72, 200)
    turned = few_tokens_turned(h, h, mean, D, E.T.contiguous(), 40)
    s = (h - mean).double() @ D.double()
    a = torch.cat([torch.nn.functional.gelu(s[..., :40]), s[..., 40:]], -1)
    return {**found, "few_tokens_turned": error(turned, h.double() + a @ E.double(), h)}


def timed() -> dict[str, Any]:
    """Microseconds of each way, as replays of a CUDA graph, and the ways side by side three times over."""
    found: dict[str, Any] = {}
    for shape, (d, H) in WIDTHS.items():

        def new(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

        base, left, into, mean = new(1, TOKENS, d), new(TOKENS, H), new(H, d) / 16, new(d)
        flat, D, turned = base.view(-1, d), (new(H, d) / 16).T, into.T.contiguous()

        def forward() -> Tensor:
            x, copy = centred(base, mean)  # noqa: B023
            copy.view(-1, d).addmm_(left, into)  # noqa: B023
            return x

        ways: dict[str, Callable[[], Any]] = {
            "addmm": lambda: torch.addmm(flat, left, into),  # noqa: B023
            "forward, as it is": forward,
            "centred alone": lambda: centred(base, mean),  # noqa: B023
            "h - mu": lambda: base - mean,  # noqa: B023
        }
        for tile in ((128, 128, 64), (128, 256, 64), (64, 256, 64), (128, 128, 32), (64, 128, 64)):
            ways[f"added {tile}"] = lambda tile=tile: added(flat, left, into, tile)  # noqa: B023
        for rows in (1, 8):
            h = new(rows, 1, d)
            ways[f"few_tokens, {rows}"] = lambda h=h: few_tokens(h, h, mean, D, into, H, None)  # noqa: B023
            ways[f"turned, {rows}"] = lambda h=h: few_tokens_turned(h, h, mean, D, turned, H)  # noqa: B023
        for _ in range(3):
            for name, way in ways.items():
                us = triton.testing.do_bench_cudagraph(way, rep=20, return_mode="median") * 1e3
                found.setdefault(shape, {}).setdefault(name, []).append(round(us, 2))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": "Triton's interpreter" if interpreted else torch.cuda.get_device_name(),
        "versions": {m.__name__: m.__version__ for m in (torch, triton)},
        "relative_error": right("cpu" if interpreted else "cuda"),
    }
    if not interpreted:
        record["us"] = timed()
    print(json.dumps(record, indent=2))
    if args.output:
        args.output.write_text(json.dumps(record, indent=2) + "\n")
    sys.exit(max(record["relative_error"].values()) > 2e-3)


if __name__ == "__main__":
    main()
