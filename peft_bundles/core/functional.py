"""The bundle operation on tensors: the plain reference and the stacked form that training uses.

Both compute design.md section 2,

    x = ((h - mu) / sigma) U,    z_k = x W_k^T,    u_k = up_k act(down_k z_k),    y = h + c sum_k alpha_k (u_k W_k) U^T

(where a bundle has no projector, W_k just picks the columns of its support). The reference is written bundle by bundle
as it stands there. The stacked form uses that everything left of the activation is linear, and so is everything right
of it. With all bundles' hidden units side by side (H = sum_k b_k)

    s = (h - mu) D,    y = h + (alpha * act(s)) E,    D = (down W U^T / sigma)^T  (d x H),    E = c up^T W U^T  (H x d)

so a token pays for two thin matrix products whatever the number of bundles, the rank or the size of the basis. `D` and
`E` are folded from the bundles' own parameters once a forward (`layer.py`), a cost that does not depend on the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import centred, units_backward, usable


@dataclass
class BundleWeights:
    """What one bundle is made of; a field its adapter kind does not have is None (shapes in `BundleLayer`)."""

    kind: str
    support: Tensor
    weight: Any = None
    down: Any = None
    up: Any = None
    scaling: float = field(default=1.0, kw_only=True)


def bundle_reference(
    hidden: Tensor,
    bundles: Sequence[BundleWeights],
    basis: Tensor,
    mean: Tensor,
    scale: Tensor,
    alphas: Tensor,
) -> Tensor:
    """Design.md section 2, one bundle after another: what the stacked form is tested against.

    Args:
        hidden: h, (B, T, d).
        basis: U, (d, R). mean, scale: mu and sigma, (d,).
        alphas: gates, broadcast against (B, T, M).

    Returns:
        y, (B, T, d).
    """
    standardised = (hidden - mean) / scale
    x = standardised @ basis
    alphas = alphas.expand(*hidden.shape[:-1], len(bundles))
    out = hidden
    for k, b in enumerate(bundles):
        gate = b.scaling * alphas[..., k, None]
        if b.kind == "full":
            out = out + gate * F.linear(F.gelu(F.linear(standardised, b.down)), b.up)
            continue
        z = x[..., b.support]
        z = z if b.weight is None else F.linear(z, b.weight)
        if b.kind == "mlp":
            u = F.linear(F.gelu(F.linear(z, b.down)), b.up)
        elif b.kind == "linear":
            u = F.linear(F.linear(z, b.down), b.up)
        else:
            u = z * b.up
        out = out + gate * ((u if b.weight is None else u @ b.weight) @ basis[:, b.support].T)
    return out


def activate(s: Tensor, nonlinear: int) -> Tensor:
    """GELU on the first `nonlinear` hidden units, identity on the rest."""
    if nonlinear == s.shape[-1]:
        return F.gelu(s)
    if nonlinear == 0:
        return s
    return torch.cat([F.gelu(s[..., :nonlinear]), s[..., nonlinear:]], -1)


def activate_backward(grad: Tensor, s: Tensor, nonlinear: int) -> Tensor:
    if nonlinear == s.shape[-1]:
        return torch.ops.aten.gelu_backward(grad, s)
    if nonlinear == 0:
        return grad
    first = torch.ops.aten.gelu_backward(grad[..., :nonlinear].contiguous(), s[..., :nonlinear].contiguous())
    return torch.cat([first, grad[..., nonlinear:]], -1)


def _add_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base + left @ right in the dtype of `base`: one fused kernel where the product runs in that dtype too."""
    if base.dtype == right.dtype:
        out = torch.addmm(base.flatten(0, -2), left.flatten(0, -2), right)
        # No view: an in-place operation on a block's output that is one loses the hooks that FSDP puts on it.
        return torch.ops.aten._unsafe_view(out, base.shape)
    return base + (left.flatten(0, -2) @ right).view_as(base)


class _Bundles(torch.autograd.Function):
    """`bundle_forward` with its own backward: row gates on the weight gradients.

    A weight gradient is a sum over tokens, so scaling a token's term by the gate of its row routes it (design.md
    section 3, guarantee 3). The gradient that flows on to earlier layers is never gated. Kept for backward are the
    centred states, where D learns, and the hidden units before the activation.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, residual: Tensor | None, D: Tensor, E: Tensor, *rest: Any) -> Tensor:
        mean, alpha, mask, gate, nonlinear, dtype = rest
        out = None
        if mean is not None and residual is None and usable(hidden, dtype):
            x, out = centred(hidden, mean)
        else:
            x = hidden if mean is None else hidden - mean.to(hidden.dtype)
        x = x.flatten(0, -2).to(dtype)
        s = x @ D.to(dtype)
        a = activate(s, nonlinear).view(*hidden.shape[:-1], -1)
        for factor in (mask, alpha):
            a = a if factor is None else a * factor.to(dtype)
        if out is not None:
            out.flatten(0, -2).addmm_(a.flatten(0, -2), E.to(dtype))
        else:
            out = _add_product(hidden if residual is None else residual, a, E.to(dtype))
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, s, D, E, alpha, mask)
        # The gate is kept out of `save_for_backward` on purpose: `routed_backward` rewrites it in place between the
        # passes of one graph (signals.py), which the version check of saved tensors would forbid.
        ctx.gate, ctx.nonlinear, ctx.dtype, ctx.shared = gate, nonlinear, dtype, residual is None
        ctx.hidden_dtype = hidden.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, s, D_given, E_given, alpha, mask = ctx.saved_tensors
        needs, dtype, nonlinear = ctx.needs_input_grad, ctx.dtype, ctx.nonlinear
        D, E = D_given.to(dtype), E_given.to(dtype)
        dy, shape = grad.flatten(0, -2).to(dtype), (*grad.shape[:-1], -1)
        da = (dy @ E.T).view(shape)

        # Units outside, and these others, have a gate of 0 in all rows of this pass (`Route.choose`).
        first, last = getattr(ctx.gate, "units", (0, s.shape[-1]))
        others = getattr(ctx.gate, "others", None)
        fused = alpha is None and mask is None and usable(da, dtype)
        gate = None if ctx.gate is None or fused else ctx.gate[..., first:last].to(dtype)

        def learnt(units: Tensor, states: Tensor, like: Tensor) -> Tensor:
            """units^T states, (H, d), with the gate on the units where it is not there yet."""
            units = units.view(shape)[..., first:last]
            units = (units if gate is None else units * gate).flatten(0, -2).T
            if len(units) == s.shape[-1]:
                whole = units @ states
            else:
                whole = states.new_zeros(s.shape[-1], states.shape[1])
                torch.mm(units, states, out=whole[first:last])
            if others is not None:  # 0 times what is not finite is not 0
                whole.index_fill_(0, others, 0.0)
            return whole.to(like.dtype)

        a: Any = None
        d_alpha = None
        if fused:
            a, ds, learning = units_backward(s.view(shape), da, ctx.gate, nonlinear)
        else:
            if needs[5] or needs[3]:
                a = activate(s, nonlinear).view(shape)
                a = a if mask is None else a * mask.to(dtype)
                d_alpha = (da * a).sum_to_size(alpha.shape).to(alpha.dtype) if needs[5] else None
                a = a if alpha is None else a * alpha.to(dtype)
            for factor in (alpha, mask):
                da = da if factor is None else da * factor.to(dtype)
            ds = learning = activate_backward(da.flatten(0, -2), s, nonlinear)
        dE = learnt(a, dy, E_given) if needs[3] else None
        d_hidden = d_residual = None
        if ctx.shared:  # the residual is h itself: one fused product gives both terms
            d_hidden = _add_product(grad, ds.view(shape), D.T) if needs[0] else None
        else:
            d_hidden = (ds.flatten(0, -2) @ D.T).view_as(grad).to(ctx.hidden_dtype) if needs[0] else None
            d_residual = grad if needs[1] else None
        dD = learnt(learning, x, D_given).T if needs[2] else None
        return d_hidden, d_residual, dD, dE, None, d_alpha, None, None, None, None


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: that of h, or autocast's."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def bundle_forward(
    hidden: Tensor,
    D: Tensor,
    E: Tensor,
    *,
    nonlinear: int,
    residual: Tensor | None = None,
    mean: Tensor | None = None,
    alpha: Tensor | None = None,
    mask: Tensor | None = None,
    gate: Tensor | None = None,
    route: Any = None,
) -> Tensor:
    """The stacked bundle operation, y = residual + (alpha * mask * act((h - mu) D)) E.

    Args:
        hidden: h, (B, T, d), any floating dtype; the token-wise products run in that dtype, or in autocast's.
        D, E: the folded maps, (d, H) and (H, d).
        nonlinear: hidden units up to this one pass through GELU, the rest are linear.
        residual: what the result is added to, (B, T, d); None is `hidden` itself.
        mean: mu, (d,); None is 0. (sigma is folded into D.)
        alpha: gates of the hidden units, broadcast against (B, T, H); None is 1. Differentiable.
        mask: dropout mask of the hidden units, already scaled, broadcast against (B, T, H).
        gate: routing weights of the hidden units, broadcast against (B, T, H); multiplies the gradients of D and E
            row by row and touches nothing else. Read during backward. None is 1.
        route: what made the gate; `walk` finds it in the graph of a loss (of an eager forward).

    Returns:
        (B, T, d), in the dtype of `hidden`.
    """
    dtype, device = compute_dtype(hidden), hidden.device.type
    # The casts are our own, the same forward and backward. (Entering autocast costs as much as a kernel or two.)
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        out = _Bundles.apply(hidden, residual, D, E, mean, alpha, mask, gate, nonlinear, dtype)
    if not torch.compiler.is_compiling() and isinstance(out.grad_fn, _Bundles._backward_cls):  # type: ignore[attr-defined]
        cast(Any, out.grad_fn).route = route
    return out


def within_budget(hidden: Tensor, out: Tensor, tau: float | Tensor) -> Tensor:
    """`out` with out - hidden scaled, token by token, to at most `tau` times the length of `hidden`; (B, T, d).

    A token within the limit is returned as it is.
    """
    update = (out - hidden).float()
    size, limit = update.norm(dim=-1, keepdim=True), tau * hidden.float().norm(dim=-1, keepdim=True)
    scaled = hidden + (update * (limit / size.clamp_min(torch.finfo(torch.float32).tiny))).to(hidden.dtype)
    return torch.where(size > limit, scaled, out)


# For graphs whose gates are rewritten between backward passes: a compiled graph may have multiplied them in already by
# the end of its forward.
eager_bundle_forward = torch.compiler.disable(bundle_forward)
