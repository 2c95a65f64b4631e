"""Triton kernels for what plain PyTorch does badly on a GPU: a few tokens (decoding), and centring a training batch.

`few_tokens` is the whole operation y = h + (alpha * act((h - mu) D)) E of functional.py in two kernels, where PyTorch
takes six, rounded where it is rounded there. A program reads its part of D or E for one token, so this is for few of
them; with many, matrix products are faster.

`centred` is h - mu and a copy of h (to add the update to, in place) in one pass over h: PyTorch's subtraction of a row
runs at half of the memory's speed.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError:  # a PyTorch without GPU support has none
    triton = None

TOKENS = 8  # as many at most


def fits(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether `few_tokens` is for such states, (B, T, d), with products in `dtype`."""
    return hidden.is_cuda and hidden.shape[0] * hidden.shape[1] <= TOKENS and usable(hidden, dtype)


def usable(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether these states, with products in `dtype`, can have Triton kernels at all."""
    if triton is None or not hidden.is_cuda or hidden.dtype != dtype or torch.compiler.is_compiling():
        return False
    here = hidden.device.index == torch.cuda.current_device()  # where Triton launches
    return here and dtype in (torch.bfloat16, torch.float16) and _right(hidden.device)


_checked: dict[torch.device, bool] = {}


def _right(device: torch.device) -> bool:
    """Whether Triton builds the kernels on this device, and they say what plain PyTorch says; tried once a process."""
    if device not in _checked:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # not the time to compare numbers; plain PyTorch this once
        try:
            error = _error(device)
            wrong = None if error < 5e-3 else f"they are off by {error:.1e}"
        except Exception as failure:
            wrong = str(failure)
        if wrong is not None:
            warnings.warn(f"Triton's kernels cannot be used here ({wrong}); plain PyTorch is.", stacklevel=3)
        _checked[device] = wrong is None
    return _checked[device]


@torch.no_grad()
def _error(device: torch.device) -> float:
    """Relative error of `few_tokens` on random numbers, infinite if `centred` is not exact. float16 has its digits."""
    generator = torch.Generator(device).manual_seed(0)

    def new(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).half()

    h, residual, mean, alpha = new(2, 2, 72) + 3, new(2, 2, 72), new(72) + 3, new(2, 1, 12)
    D, E, nonlinear = (new(12, 72) / 72**0.5).T, new(12, 72), 5
    x, copy = centred(h, mean)
    if not (torch.equal(x, h - mean) and torch.equal(copy, h)):
        return float("inf")
    s = (h - mean).double() @ D.double()
    update = (torch.cat([F.gelu(s[..., :nonlinear]), s[..., nonlinear:]], -1) * alpha.double()) @ E.double()
    found = few_tokens(h, residual, mean, D, E, nonlinear, alpha)
    return float((found.double() - residual.double() - update).norm() / update.norm())


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

    @triton.jit
    def _centre(h, mean, x, y, d, C: tl.constexpr):  # type: ignore[no-untyped-def]
        """x = h - mean and y = h of a token, all (N, d), a program."""
        columns = tl.arange(0, C)
        at = tl.program_id(0).to(tl.int64) * d + columns
        value = tl.load(h + at, mask=columns < d)
        middle = tl.load(mean + columns, mask=columns < d).to(value.dtype).to(tl.float32)
        tl.store(x + at, (value.to(tl.float32) - middle).to(value.dtype), mask=columns < d)
        tl.store(y + at, value, mask=columns < d)


def centred(hidden: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """hidden - mean and a copy of hidden, both contiguous, for (B, T, d) and (d,); see `usable`."""
    hidden, d = hidden.contiguous(), hidden.shape[-1]
    x, copy = torch.empty_like(hidden), torch.empty_like(hidden)
    _centre[(hidden.numel() // d,)](hidden, mean.contiguous(), x, copy, d, C=triton.next_power_of_2(d))
    return x, copy


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
