"""The bundle operation for a few tokens in two kernels (Triton), where plain PyTorch takes six: what decoding pays for.

y = h + (alpha * act((h - mu) D)) E as in functional.py, rounded where it is rounded there. A program reads its part of
D or E for one token, so this is for few of them; with many, matrix products are faster.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError:  # a PyTorch without GPU support has none
    triton = None

TOKENS = 8  # as many at most


def fits(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether `few_tokens` is for such states, (B, T, d), with products in `dtype`."""
    if triton is None or not hidden.is_cuda or hidden.shape[0] * hidden.shape[1] > TOKENS:
        return False
    here = hidden.device.index == torch.cuda.current_device()  # where Triton launches
    return here and hidden.dtype == dtype and dtype in (torch.bfloat16, torch.float16) and _builds(hidden.device)


@cache
def _builds(device: torch.device) -> bool:
    """Whether Triton can build kernels here: it needs a C compiler, and a GPU that it knows."""
    h = torch.zeros(1, 1, 16, device=device, dtype=torch.float16)
    try:
        few_tokens(h, h, None, h[0].T, h[0], 1, None)
    except Exception as error:
        warnings.warn(f"Triton cannot build kernels here ({error}); a few tokens take plain PyTorch's.", stacklevel=2)
        return False
    return True


if triton is not None:

    @triton.jit
    def _read(  # type: ignore[no-untyped-def]
        h, mean, D, alpha, a, H, d, nonlinear, rows, MEAN: tl.constexpr, ALPHA: tl.constexpr, U: tl.constexpr,
        C: tl.constexpr,
    ):  # fmt: skip
        """a (N, H) = alpha * act((h - mu) D) of U hidden units and a token a program; D is (H, d) here."""
        units, token = tl.program_id(0) * U + tl.arange(0, U), tl.program_id(1)
        columns = tl.arange(0, C)
        total = tl.zeros((U, C), tl.float32)
        for start in range(0, d, C):
            at = start + columns
            x = tl.load(h + token * d + at, mask=at < d, other=0.0)
            if MEAN:
                x = (x.to(tl.float32) - tl.load(mean + at, mask=at < d, other=0.0).to(tl.float32)).to(x.dtype)
            inside = (units < H)[:, None] & (at < d)[None, :]
            weights = tl.load(D + units[:, None] * d + at[None, :], mask=inside, other=0.0)
            total += weights.to(tl.float32) * x.to(tl.float32)[None, :]
        s = tl.sum(total, 1).to(a.dtype.element_ty).to(tl.float32)
        active = (0.5 * s * (1.0 + tl.math.erf(s * 0.7071067811865476))).to(a.dtype.element_ty).to(tl.float32)
        out = tl.where(units < nonlinear, active, s)
        if ALPHA:
            out = out * tl.load(alpha + token // rows * H + units, mask=units < H, other=0.0).to(tl.float32)
        tl.store(a + token * H + units, out.to(a.dtype.element_ty), mask=units < H)

    @triton.jit
    def _write(h, a, E, y, H, d, U: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
        """y (N, d) = h + a E of C columns and a token a program."""
        columns, token = tl.program_id(0) * C + tl.arange(0, C), tl.program_id(1)
        units = tl.arange(0, U)
        total = tl.zeros((U, C), tl.float32)
        for start in range(0, H, U):
            at = start + units
            active = tl.load(a + token * H + at, mask=at < H, other=0.0).to(tl.float32)
            inside = (at < H)[:, None] & (columns < d)[None, :]
            weights = tl.load(E + at[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            total += active[:, None] * weights
        base = tl.load(h + token * d + columns, mask=columns < d, other=0.0).to(tl.float32)
        tl.store(y + token * d + columns, (base + tl.sum(total, 0)).to(y.dtype.element_ty), mask=columns < d)


def few_tokens(
    hidden: Tensor, residual: Tensor, mean: Tensor | None, D: Tensor, E: Tensor, nonlinear: int, alpha: Tensor | None
) -> Tensor:
    """residual + (alpha * act((hidden - mean) D)) E, without gradients.

    Args:
        hidden, residual: (B, T, d), contiguous, of one dtype; see `fits`.
        mean: (d,) or None.
        D, E: (d, H) and (H, d), D with its columns and E with its rows contiguous.
        alpha: (B, 1, H), contiguous, or None.

    Returns:
        (B, T, d).
    """
    (batch, length, d), H, D = hidden.shape, E.shape[0], D.T
    a = hidden.new_empty(batch * length, H)
    given = mean if mean is not None else D, D, alpha if alpha is not None else D
    _read[(-(-H // 2), batch * length)](
        hidden, *given, a, H, d, nonlinear, length, MEAN=mean is not None, ALPHA=alpha is not None, U=2, C=1024
    )
    y = torch.empty_like(residual)
    _write[(-(-d // 32), batch * length)](residual, a, E, y, H, d, U=64, C=32)
    return y
