"""Triton kernels for what plain PyTorch does badly on a GPU; benchmarks/kernel_trials.py times each against it.

`few_tokens` is the whole operation y = h + (alpha * act((h - mu) D)) E of functional.py in two kernels, where PyTorch
takes six, rounded where it is rounded there. A program reads its part of D or E for one token, so this is for few of
them (decoding); with many, matrix products are faster.

`centred` is h - mu in one pass at the memory's speed: PyTorch's subtraction of a row runs at half of it.

`added` is base + left right with all three kept. PyTorch has no such product: `addmm` copies the base first.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


try:
    import triton
    import triton.language as tl
except ImportError:  # a PyTorch without GPU support has none
    triton = None

TOKENS, MANY = 8, 512  # `few_tokens` is for as many at most, `added` for as many at least


def fits(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether `few_tokens` is for such states, (B, T, d), with products in `dtype`."""
    return hidden.is_cuda and hidden.shape[0] * hidden.shape[1] <= TOKENS and usable(hidden, dtype)


def usable(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether these states, with products in `dtype`, can have Triton kernels at all."""
    return hidden.dtype == dtype and dtype in (torch.bfloat16, torch.float16) and _launches(hidden)


def _launches(tensor: Tensor) -> bool:
    """Whether Triton kernels run where this tensor is, and are right there."""
    if triton is None or not tensor.is_cuda or torch.compiler.is_compiling():
        return False
    return tensor.device.index == torch.cuda.current_device() and _right(tensor.device)  # the one it launches on


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
    """The largest relative error on random numbers, infinite where they should be exact. float16 has its digits."""
    generator = torch.Generator(device).manual_seed(0)

    def new(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).half()

    def off(found: Tensor, update: Tensor) -> float:
        return float((found.double() - residual.double() - update).norm() / update.norm())

    h, residual, mean, alpha = new(2, 2, 72) + 3, new(2, 2, 72), new(72) + 3, new(2, 1, 12)
    D, E, nonlinear = (new(12, 72) / 72**0.5).T, new(72, 12).T, 5
    x, places = centred(h, mean), torch.arange(71, -1, -1, device=device, dtype=torch.int32)
    if not (torch.equal(x, h - mean) and torch.equal(_gathered(h[0, 0].float(), places, h.dtype), h[0, 0].flip(0))):
        return float("inf")
    s = x.double() @ D.double()
    update = (torch.cat([F.gelu(s[..., :nonlinear]), s[..., nonlinear:]], -1) * alpha.double()) @ E.double()
    sum_error = off(added(residual, s.half(), E), s.half().double() @ E.double())
    return max(sum_error, off(few_tokens(h, residual, mean, D, E, nonlinear, alpha), update))


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
        """y (N, d) = h + a E of C columns and a token a program; E is (d, H) here."""
        columns, token = tl.program_id(0) * C + tl.arange(0, C), tl.program_id(1)
        total = tl.zeros((C, U), tl.float32)
        for start in range(0, H, U):
            at = start + tl.arange(0, U)
            active = tl.load(a + token * H + at, mask=at < H, other=0.0).to(tl.float32)
            inside = (columns < d)[:, None] & (at < H)[None, :]
            weights = tl.load(E + columns[:, None] * H + at[None, :], mask=inside, other=0.0).to(tl.float32)
            total += weights * active[None, :]
        base = tl.load(h + token * d + columns, mask=columns < d, other=0.0).to(tl.float32)
        tl.store(y + token * d + columns, (base + tl.sum(total, 1)).to(y.dtype.element_ty), mask=columns < d)

    @triton.jit
    def _centre(h, mean, x, d, C: tl.constexpr):  # type: ignore[no-untyped-def]
        """x = h - mean of a token, both (N, d), a program."""
        columns = tl.arange(0, C)
        at = tl.program_id(0).to(tl.int64) * d + columns
        value = tl.load(h + at, mask=columns < d)
        middle = tl.load(mean + columns, mask=columns < d).to(value.dtype).to(tl.float32)
        tl.store(x + at, (value.to(tl.float32) - middle).to(value.dtype), mask=columns < d)

    @triton.jit
    def _gather(values, index, out, n, C: tl.constexpr):  # type: ignore[no-untyped-def]
        """out (n,) = values[index], C of them a program."""
        at = tl.program_id(0) * C + tl.arange(0, C)
        found = tl.load(values + tl.load(index + at, mask=at < n, other=0), mask=at < n, other=0.0)
        tl.store(out + at, found.to(out.dtype.element_ty), mask=at < n)

    @triton.jit
    def _add(base, left, right, out, N, H, d, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):  # type: ignore[no-untyped-def]
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


_built: dict[tuple[Any, ...], Any] = {}


def _launch(kernel: Any, grid: tuple[int, int], tensors: tuple[Tensor, ...], *rest: Any, **options: Any) -> None:
    """`kernel` over a grid. Triton looks at every argument of every call, which takes longer than a decoding kernel.

    So one that was built for these very numbers, with pointers to multiples of 16 bytes, is called as it is. (All
    tensors have the dtype of the first, but for the second of `_centre` and the last of `_gather`; on AMD's GPUs Triton
    tells apart more than this.)
    """
    address = 0
    for tensor in tensors:
        address |= tensor.data_ptr()
    key = kernel, tensors[0].dtype, tensors[1].dtype, tensors[-1].dtype, tensors[0].device, rest
    built = _built.get(key) if address % 16 == 0 else None
    if built is not None:
        built[(*grid, 1)](*tensors, *rest)
        return
    built = kernel[grid](*tensors, *rest, **options)
    if address % 16 == 0 and torch.version.hip is None:
        if len(_built) > 1000:  # batches of many sizes
            _built.clear()
        _built[key] = built  # (None from the interpreter)


def centred(hidden: Tensor, mean: Tensor) -> Tensor:
    """hidden - mean, contiguous, for (B, T, d) and (d,); see `usable`."""
    hidden, d = hidden.contiguous(), hidden.shape[-1]
    x = torch.empty_like(hidden)
    _launch(_centre, (hidden.numel() // d, 1), (hidden, mean.contiguous(), x), d, triton.next_power_of_2(d))
    return x


def gathered(values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """values[index] in `dtype`, (n,), for (N,) and (n,) of int32; plain PyTorch where Triton is not to be used."""
    if _launches(values):
        return _gathered(values, index, dtype)
    values = values.to(dtype) if dtype.itemsize < values.dtype.itemsize else values
    return values.index_select(0, index).to(dtype)


def _gathered(values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(index), device=values.device, dtype=dtype)
    _launch(_gather, (-(-len(index) // 512), 1), (values.contiguous(), index, out), len(index), 512)
    return out


def added(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base + left @ right, contiguous, for (B, T, d), (B, T, H) and (H, d) of one dtype; see `usable`."""
    base, left, right = base.contiguous(), left.contiguous(), right.contiguous()
    (H, d), out = right.shape, torch.empty_like(base)
    N, M = base.numel() // d, 64
    _launch(_add, (-(-d // 128), -(-N // M)), (base, left, right, out), N, H, d, M, 128, 64, num_stages=2)
    return out


def few_tokens(
    hidden: Tensor, residual: Tensor, mean: Tensor | None, D: Tensor, E: Tensor, nonlinear: int, alpha: Tensor | None
) -> Tensor:
    """residual + (alpha * act((hidden - mean) D)) E, without gradients.

    Args:
        hidden, residual: (B, T, d), contiguous, of one dtype; see `fits`.
        mean: (d,) or None.
        D, E: (d, H) and (H, d), both with their columns contiguous.
        alpha: (B, 1, H), contiguous, or None.

    Returns:
        (B, T, d).
    """
    (batch, length, d), H, D, E = hidden.shape, E.shape[0], D.T, E.T
    a, y = hidden.new_empty(batch * length, H), torch.empty_like(residual)
    given = mean if mean is not None else D, D, alpha if alpha is not None else D
    flags = mean is not None, alpha is not None
    _launch(_read, (-(-H // 2), batch * length), (hidden, *given, a), H, d, nonlinear, length, *flags, 2, 1024)
    _launch(_write, (-(-d // 8), batch * length), (residual, a, E, y), H, d, 256, 8)
    return y
