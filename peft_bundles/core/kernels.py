"""Triton kernels for what plain PyTorch does slowly on a GPU; benchmarks/kernel_trials.py times each against PyTorch.

- `FewTokens`: the whole operation y = h + (alpha * act((h - mu) D)) E of functional.py in two kernels instead of five,
  with the same roundings. A program reads its part of D or E for one token, so it is for few tokens (decoding); with
  many, matrix products are faster.
- `centred`: h - mu and a copy of h (to add the update to, in place) in one pass over h. PyTorch's subtraction of a row
  reaches only half of the memory bandwidth.
- `units_backward`: the backward of the hidden units in one kernel.
- `gathered`: a gather and a cast in one kernel.

Shapes: B rows, T tokens, N = B T, d hidden size, H hidden units.
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

TOKENS = 64  # limit of `FewTokens`; PyTorch's kernels win earlier on the GPU, but an eager step waits for the CPU


def fits(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether to use `FewTokens` for states like these, (B, T, d), with products in `dtype`."""
    return hidden.is_cuda and hidden.shape[0] * hidden.shape[1] <= TOKENS and usable(hidden, dtype)


def usable(hidden: Tensor, dtype: torch.dtype) -> bool:
    """Whether Triton kernels can take states like these, with products in `dtype`."""
    return hidden.dtype == dtype and dtype in (torch.bfloat16, torch.float16) and _launches(hidden)


def _launches(tensor: Tensor) -> bool:
    """Whether Triton kernels run on the device of this tensor and give right results."""
    if triton is None or not tensor.is_cuda or torch.compiler.is_compiling():
        return False
    return tensor.device.index == torch.cuda.current_device() and _right(
        tensor.device
    )  # Triton launches on the current device


_checked: dict[torch.device, bool] = {}


def _right(device: torch.device) -> bool:
    """Whether Triton builds the kernels on this device, and they agree with plain PyTorch; tried once per process."""
    if device not in _checked:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False  # numbers cannot be compared during a graph capture: use plain PyTorch this time
        try:
            # Twice: the first launches build the kernels, the second call the built ones directly.
            error = max(_error(device), _error(device))
            wrong = None if error < 5e-3 else f"they are off by {error:.1e}"
        except Exception as failure:
            wrong = str(failure)
        if wrong is not None:
            warnings.warn(
                f"Triton's kernels cannot be used here ({wrong}); plain PyTorch is used instead.", stacklevel=3
            )
        _checked[device] = wrong is None
    return _checked[device]


@torch.no_grad()
def _error(device: torch.device) -> float:
    """The largest relative error on random float16 numbers; infinite if a kernel that should be exact is not."""
    generator = torch.Generator(device).manual_seed(0)

    def new(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).half()

    h, residual, mean, alpha = new(2, 2, 72) + 3, new(2, 2, 72), new(72) + 3, new(2, 1, 12)
    D, E, nonlinear = (new(12, 72) / 72**0.5).T, new(72, 12).T, 5
    gate, places = new(2, 1, 12), torch.arange(71, -1, -1, device=device, dtype=torch.int32)
    x, copy = centred(h, mean)
    exact = torch.equal(x, h - mean) and torch.equal(copy, h)
    if not (exact and torch.equal(_gathered(h[0, 0].float(), places, h.dtype), h[0, 0].flip(0))):
        return float("inf")
    s, da = (x.double() @ D.double()).half(), new(2, 2, 12)
    wide, above = s.double(), da.double()
    active, slope = wide.clone(), above.clone()
    active[..., :nonlinear] = F.gelu(wide[..., :nonlinear])
    slope[..., :nonlinear] = torch.ops.aten.gelu_backward(above[..., :nonlinear], wide[..., :nonlinear])
    back = zip(units_backward(s, da, gate, nonlinear), (active * gate, slope, slope * gate))
    pairs, update = [*back], (active * alpha) @ E.double()
    for many in (slice(0, 2), slice(0, 1)):  # several tokens and one; each as it is built, then as a built kernel
        x, y = h[many, many], residual[many, many].contiguous()
        tokens = FewTokens(x.shape, mean, D, E, nonlinear, alpha[many])
        pairs += [(tokens(x.contiguous(), y).double() - y.double(), update[many, many]) for _ in "ab"]
    return max(float((result.double() - right).norm() / right.norm()) for result, right in pairs)


if triton is not None:

    @triton.jit
    def _read(  # type: ignore[no-untyped-def]
        h, mean, D, alpha, a, H, d, nonlinear, rows, MEAN: tl.constexpr, ALPHA: tl.constexpr, U: tl.constexpr,
        C: tl.constexpr,
    ):  # fmt: skip
        """a (N, H) = alpha * act((h - mu) D); a program does U hidden units of one token. D is (H, d) here."""
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
        """y (N, d) = h + a E; a program does C columns of one token. E is (d, H) here."""
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
    def _centre(h, mean, x, y, d, C: tl.constexpr):  # type: ignore[no-untyped-def]
        """x = h - mean and y = h, all (N, d); a program does one token."""
        columns = tl.arange(0, C)
        at = tl.program_id(0).to(tl.int64) * d + columns
        value = tl.load(h + at, mask=columns < d)
        middle = tl.load(mean + columns, mask=columns < d).to(value.dtype).to(tl.float32)
        tl.store(x + at, (value.to(tl.float32) - middle).to(value.dtype), mask=columns < d)
        tl.store(y + at, value, mask=columns < d)

    @triton.jit
    def _gather(values, index, out, n, C: tl.constexpr):  # type: ignore[no-untyped-def]
        """out (n,) = values[index]; a program does C entries."""
        at = tl.program_id(0) * C + tl.arange(0, C)
        entries = tl.load(values + tl.load(index + at, mask=at < n, other=0), mask=at < n, other=0.0)
        tl.store(out + at, entries.to(out.dtype.element_ty), mask=at < n)

    @triton.jit
    def _back(  # type: ignore[no-untyped-def]
        s, gate, da, a, ds, gated, H, nonlinear, length, by_row, by_token, GATE: tl.constexpr, C: tl.constexpr
    ):
        """a = gate act(s), ds = act'(s) da and gated = gate ds, all (N, H); a program does one token."""
        token, units = tl.program_id(0).to(tl.int64), tl.arange(0, C)
        at, inside = token * H + units, units < H
        x = tl.load(s + at, mask=inside, other=0.0)
        above = tl.load(da + at, mask=inside, other=0.0)
        wide = x.to(tl.float32)
        below = 0.5 * (1.0 + tl.math.erf(wide * 0.7071067811865476))
        slope = below + wide * tl.exp(-0.5 * wide * wide) * 0.3989422804014327
        active = tl.where(units < nonlinear, (wide * below).to(x.dtype), x)
        down = tl.where(units < nonlinear, (above.to(tl.float32) * slope).to(x.dtype), above)
        tl.store(ds + at, down, mask=inside)
        if GATE:
            row = gate + token // length * by_row + token % length * by_token
            open = tl.load(row + units, mask=inside, other=0.0).to(x.dtype).to(tl.float32)
            active = (active.to(tl.float32) * open).to(x.dtype)
            tl.store(gated + at, (down.to(tl.float32) * open).to(x.dtype), mask=inside)
        tl.store(a + at, active, mask=inside)


_built: dict[tuple[Any, ...], Any] = {}


def _alike(pointers: tuple[int, ...]) -> bool:
    """Whether a kernel that Triton built for these pointers fits any others of the same dtypes.

    Triton builds another kernel for a pointer that is not a multiple of 16 bytes; on AMD's GPUs it distinguishes more.
    """
    return not any(pointer % 16 for pointer in pointers) and torch.version.hip is None


def _again(
    built: Any, grid: tuple[int, int, int], stream: int, pointers: tuple[int, ...], rest: tuple[Any, ...]
) -> None:
    """Launch a built kernel. `built[grid](*tensors)` is slower than the kernel: it asks CUDA about each tensor."""
    built.run(*grid, stream, built.function, built.packed_metadata, None, None, None, *pointers, *rest)


def _launch(kernel: Any, grid: tuple[int, int], tensors: tuple[Tensor, ...], *rest: Any, **options: Any) -> None:
    """Launch `kernel` over a grid.

    Triton inspects every argument of every call, which takes longer than most kernels here. So a kernel that was built
    for these numbers is called directly. (All tensors have the dtype of the first, except for the second one of
    `_centre` and `_back`, and the last two of `_gather`.)
    """
    key = kernel, tensors[0].dtype, tensors[1].dtype, tensors[-1].dtype, tensors[0].device, rest
    pointers = tuple(t.data_ptr() for t in tensors)
    alike = _alike(pointers)
    built = _built.get(key) if alike else None
    if built is not None:
        _again(built, (*grid, 1), torch._C._cuda_getCurrentRawStream(tensors[0].get_device()), pointers, rest)
        return
    built = kernel[grid](*tensors, *rest, **options)
    if alike and built is not None:  # (None from the interpreter)
        if len(_built) > 1000:  # batches of many sizes
            _built.clear()
        _built[key] = built


def centred(hidden: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """hidden - mean and a copy of hidden, both contiguous, for (B, T, d) and (d,). Only where `usable` says so."""
    hidden, d = hidden.contiguous(), hidden.shape[-1]
    x, copy = torch.empty_like(hidden), torch.empty_like(hidden)
    _launch(_centre, (hidden.numel() // d, 1), (hidden, mean.contiguous(), x, copy), d, triton.next_power_of_2(d))
    return x, copy


def units_backward(s: Tensor, da: Tensor, gate: Tensor | None, nonlinear: int) -> tuple[Tensor, Tensor, Tensor]:
    """Backward of the hidden units in one pass. Only where `usable` says so.

    Args:
        s: the units before the activation, (B, T, H).
        da: the gradient of the units after it, (B, T, H), of the same dtype.
        gate: broadcast against them; None: 1.
        nonlinear: units before this one pass through GELU, the rest are linear.

    Returns:
        gate act(s), act'(s) da and gate act'(s) da, each (B, T, H). Without a gate the last two are the same tensor.
    """
    s, da, H = s.contiguous(), da.contiguous(), s.shape[-1]
    a, ds = torch.empty_like(s), torch.empty_like(s)
    gated = ds if gate is None else torch.empty_like(s)
    by_row = by_token = 0
    if gate is not None:
        gate = gate.expand(s.shape)
        gate = gate if gate.stride(-1) == 1 else gate.contiguous()
        by_row, by_token, _ = gate.stride()
    tensors = (s, s if gate is None else gate, da, a, ds, gated)
    rest = H, nonlinear, s.shape[1], by_row, by_token, gate is not None, triton.next_power_of_2(H)
    _launch(_back, (s.shape[0] * s.shape[1], 1), tensors, *rest, num_warps=1 if H <= 512 else 4)
    return a, ds, gated


def gathered(values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    """values[index] in `dtype`, (n,); values are (N,), the index int32. Plain PyTorch where Triton cannot run."""
    if _launches(values):
        return _gathered(values, index, dtype)
    values = values.to(dtype) if dtype.itemsize < values.dtype.itemsize else values
    return values.index_select(0, index).to(dtype)


def _gathered(values: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(index), device=values.device, dtype=dtype)
    _launch(_gather, (-(-len(index) // 512), 1), (values.contiguous(), index, out), len(index), 512)
    return out


class FewTokens:
    """residual + (alpha * act((hidden - mean) D)) E for a few tokens, without gradients.

    It runs for every layer and every token, so everything that does not depend on the states is prepared once, for a
    fixed number of tokens.

    Args:
        shape: of hidden, (B, T, d); only where `fits` says so.
        mean: mu, (d,); None: 0.
        D, E: the folded maps, (d, H) and (H, O); behind a block O is d.
        nonlinear: units before this one pass through GELU, the rest are linear.
        alpha: (B|1, 1, H|1); None: 1. All tensors have one dtype.
    """

    def __init__(
        self, shape: torch.Size, mean: Tensor | None, D: Tensor, E: Tensor, nonlinear: int, alpha: Tensor | None
    ) -> None:
        batch, length, d = shape
        (H, outputs), tokens = E.shape, batch * length
        D, self.E = D.T.contiguous(), E.T.contiguous()
        alpha = None if alpha is None else alpha.expand(batch, -1, H).contiguous()
        self.constants = D if mean is None else mean, D, D if alpha is None else alpha
        self.pointers = tuple(t.data_ptr() for t in self.constants)
        self.units = D.new_empty(tokens, H)  # a template; not reused, because two streams may run at once
        # Units and columns of a program, and warps: for one token there are as many programs as units.
        U, C, self.warps = (1, 2048, 8) if tokens == 1 else (2, 1024, 4)
        flags = mean is not None, alpha is not None
        self.read = (-(-H // U), tokens, 1), (H, d, nonlinear, length, *flags, U, C)
        self.write = (-(-outputs // 8), tokens, 1), (H, outputs, 256, 8)
        self.built: tuple[Any, Any] | None = None

    def __call__(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """The output, (B, T, O); hidden, (B, T, d), and residual, (B, T, O), are contiguous."""
        a, y = torch.empty_like(self.units), torch.empty_like(residual)
        h, base, units = hidden.data_ptr(), residual.data_ptr(), a.data_ptr()
        if self.built is not None and (h | base) % 16 == 0:
            (read, write), stream = self.built, torch._C._cuda_getCurrentRawStream(hidden.get_device())
            _again(read, self.read[0], stream, (h, *self.pointers, units), self.read[1])
            _again(write, self.write[0], stream, (base, units, self.E.data_ptr(), y.data_ptr()), self.write[1])
            return y
        read = _read[self.read[0]](hidden, *self.constants, a, *self.read[1], num_warps=self.warps)
        write = _write[self.write[0]](residual, a, self.E, y, *self.write[1])
        if read is not None and _alike((h, base, units, *self.pointers, self.E.data_ptr(), y.data_ptr())):
            self.built = read, write
        return y
