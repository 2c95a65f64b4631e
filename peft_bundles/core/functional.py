"""The bundle operation on tensors: a plain reference, and the stacked form that every forward runs.

Both compute

    x = ((h - mu) / sigma) U,    z_k = x W_k^T,    u_k = up_k act(down_k z_k),    y = h + c sum_k alpha_k (u_k W_k) U^T

(without a projector, W_k picks the columns of the bundle's support). The reference goes bundle by bundle, like the
formula. The stacked form puts the hidden units of all bundles side by side (H = sum_k b_k). Everything before the
activation is linear, and so is everything after it:

    s = (h - mu) D,    y = h + (alpha * act(s)) E,    D = (down W U^T / sigma)^T  (d x H),    E = c up^T W U^T  (H x d)

So a token pays for two thin matrix products, whatever the number of bundles, their rank or the size of the basis. D and
E are folded from the bundles' parameters once a forward (packing.py), at a cost that does not depend on the tokens.

Shapes: B rows, T tokens, N = B T, d hidden size, R columns of U, M bundles, H hidden units of all bundles.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import centred, units_backward, usable


@dataclass
class BundleWeights:
    """The weights of one bundle; None where its adapter kind has no such weight.

    Attributes:
        kind: "mlp", "linear", "diag" or "full".
        support: the columns of U that it may use, (|S|,).
        weight: W_k, (r, |S|).
        down, up: the maps into and out of its hidden units (shapes in `BundleLayer`).
        scaling: c.
    """

    kind: str
    support: Tensor
    weight: Any = None
    down: Any = None
    up: Any = None
    scaling: float = field(default=1.0, kw_only=True)


@dataclass(eq=False)
class Gate:
    """Routing weights of hidden units, for one forward under a route. Read when backward runs.

    `Route.choose` sets the fields again before each pass over the graph, which holds this very object.

    Attributes:
        weights: (B|1, T|1, H), factors on the gradients of D and E, row by row; None: all are 1.
        route: the route that made it; `routing.graph.walk` reads it from the graph of a loss.
        span: (first, last): units before first and from last on have weight 0 in all rows; None: unknown.
        others: units inside the span with weight 0 in all rows, (n,); None: none.
    """

    weights: Tensor | None
    route: Any = None
    span: tuple[int, int] | None = None
    others: Tensor | None = None


def bundle_reference(
    hidden_BTd: Tensor,
    bundles: Sequence[BundleWeights],
    basis_dR: Tensor,
    mean_d: Tensor,
    scale_d: Tensor,
    alphas_BTM: Tensor,
) -> Tensor:
    """The formula at the top, bundle by bundle: what the stacked form is tested against.

    Args:
        hidden_BTd: h, the output of the block.
        bundles: M bundles.
        basis_dR: U.
        mean_d, scale_d: mu and sigma.
        alphas_BTM: alphas, broadcast against (B, T, M).

    Returns:
        y, (B, T, d).
    """
    standardised = (hidden_BTd - mean_d) / scale_d
    x_BTR = standardised @ basis_dR
    alphas = alphas_BTM.expand(*hidden_BTd.shape[:-1], len(bundles))
    out = hidden_BTd
    for k, b in enumerate(bundles):
        factor = b.scaling * alphas[..., k, None]
        if b.kind == "full":
            out = out + factor * F.linear(F.gelu(F.linear(standardised, b.down)), b.up)
            continue
        z = x_BTR[..., b.support]
        z = z if b.weight is None else F.linear(z, b.weight)
        if b.kind == "mlp":
            u = F.linear(F.gelu(F.linear(z, b.down)), b.up)
        elif b.kind == "linear":
            u = F.linear(F.linear(z, b.down), b.up)
        else:
            u = z * b.up
        out = out + factor * ((u if b.weight is None else u @ b.weight) @ basis_dR[:, b.support].T)
    return out


def linear_reference(
    inputs_BTI: Tensor, outputs_BTO: Tensor | float, bundles: Sequence[BundleWeights], alphas_BTM: Tensor
) -> Tensor:
    """W v + sum_k alpha_k s_k up_k act(down_k v), bundle by bundle, for the bundles at a linear layer.

    Args:
        inputs_BTI: v.
        outputs_BTO: W v.
        bundles: M bundles of kind "lora" or "mlp"; `up` is (O, r).
        alphas_BTM: alphas, broadcast against (B, T, M).

    Returns:
        y, (B, T, O).
    """
    alphas = alphas_BTM.expand(*inputs_BTI.shape[:-1], len(bundles))
    out: Any = outputs_BTO
    for k, b in enumerate(bundles):
        z = F.linear(inputs_BTI, b.down)
        out = out + b.scaling * alphas[..., k, None] * F.linear(F.gelu(z) if b.kind == "mlp" else z, b.up)
    return out


def activate(s: Tensor, nonlinear: int | Tensor | None) -> Tensor:
    """GELU on some hidden units, (..., H); the others are linear.

    Args:
        nonlinear: GELU applies to the units before this one, or to the units in this mask (H,); None: to all.
    """
    if nonlinear is None or isinstance(nonlinear, Tensor):
        return F.gelu(s) if nonlinear is None else torch.where(nonlinear, F.gelu(s), s)
    if nonlinear == s.shape[-1]:
        return F.gelu(s)
    if nonlinear == 0:
        return s
    return torch.cat([F.gelu(s[..., :nonlinear]), s[..., nonlinear:]], -1)


def activate_backward(grad: Tensor, s: Tensor, nonlinear: int) -> Tensor:
    """The gradient for s of `activate(s, nonlinear)`."""
    if nonlinear == s.shape[-1]:
        return torch.ops.aten.gelu_backward(grad, s)
    if nonlinear == 0:
        return grad
    first = torch.ops.aten.gelu_backward(grad[..., :nonlinear].contiguous(), s[..., :nonlinear].contiguous())
    return torch.cat([first, grad[..., nonlinear:]], -1)


_unsafe_view = torch.ops.aten._unsafe_view.default  # looked up once: a decoding step waits for every look-up


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # `to` takes longer to find that nothing is to be done


def add_product(base: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """base + left @ right in the dtype of `base`: one fused kernel where the product runs in that dtype too."""
    if base.dtype == right.dtype:
        out = torch.addmm(base.flatten(0, -2), left.flatten(0, -2), right)
        # Not a view: an in-place operation on a block output that is a view loses the hooks that FSDP puts on it.
        return _unsafe_view(out, base.shape)
    return base + (left.flatten(0, -2) @ right).view_as(base)


def stacked(
    hidden_BTd: Tensor,
    residual_BTd: Tensor,
    D_dH: Tensor,
    E_Hd: Tensor,
    mean_d: Tensor | None,
    nonlinear: int | Tensor | None,
    factors: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """y = residual + (factors * act((h - mu) D)) E, with products in `dtype`. `BundleOperation` has the backward.

    Args:
        factors: each broadcast against (B, T, H): dropout mask, alphas.

    Returns:
        y, (B, T, d), and what a backward needs: h - mu, (N, d), and s, (N, H), both in `dtype`.
    """
    copy = None
    if mean_d is None:
        x = hidden_BTd
    elif residual_BTd is hidden_BTd and usable(hidden_BTd, dtype):
        x, copy = centred(hidden_BTd, mean_d)
    else:
        x = hidden_BTd - _cast(mean_d, hidden_BTd.dtype)
    x_Nd = _cast(x.flatten(0, -2), dtype)
    s_NH = x_Nd @ _cast(D_dH, dtype)
    a = activate(s_NH, nonlinear)
    if factors:
        a = a.view(*hidden_BTd.shape[:-1], -1)
        for factor in factors:
            a = a * _cast(factor, dtype)
    if copy is None:
        return add_product(residual_BTd, a, _cast(E_Hd, dtype)), x_Nd, s_NH
    copy.flatten(0, -2).addmm_(a.flatten(0, -2), E_Hd.to(dtype))
    return copy, x_Nd, s_NH


class BundleOperation(torch.autograd.Function):
    """`bundle_forward` with its own backward: gates on the weight gradients, row by row.

    A weight gradient is a sum over tokens, so scaling a token's term by the gate of its row routes it. The gradient
    that flows on to earlier layers is never gated. Saved for backward: the centred states (if D learns) and the hidden
    units before the activation.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, residual: Tensor | None, D: Tensor, E: Tensor, *rest: Any) -> Tensor:
        mean, alpha, mask, gate, nonlinear, dtype = rest
        factors = [factor for factor in (mask, alpha) if factor is not None]
        base = hidden if residual is None else residual
        out, x, s = stacked(hidden, base, D, E, mean, nonlinear, factors, dtype)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, s, D, E, alpha, mask)
        # The gate is not a saved tensor: `routed_backward` rewrites it in place between the passes over one graph,
        # which the version check of saved tensors would forbid.
        ctx.gate, ctx.nonlinear, ctx.dtype, ctx.shared = gate, nonlinear, dtype, residual is None
        ctx.hidden_dtype = hidden.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x_Nd, s_NH, D_saved, E_saved, alpha, mask = ctx.saved_tensors
        needs, dtype, nonlinear, gate = ctx.needs_input_grad, ctx.dtype, ctx.nonlinear, ctx.gate
        D, E, H = D_saved.to(dtype), E_saved.to(dtype), s_NH.shape[-1]
        dy_Nd, shape = grad.flatten(0, -2).to(dtype), (*grad.shape[:-1], -1)
        da = (dy_Nd @ E.T).view(shape)

        first, last = (0, H) if gate is None or gate.span is None else gate.span
        weights = None if gate is None else gate.weights
        fused = alpha is None and mask is None and usable(da, dtype)
        factor = None if weights is None or fused else weights[..., first:last].to(dtype)

        def weight_gradient(units: Tensor, states_Nd: Tensor, like: Tensor) -> Tensor:
            """units^T states, (H, d), with the units gated first unless they are gated already."""
            units = units.view(shape)[..., first:last]
            units_hN = (units if factor is None else units * factor).flatten(0, -2).T
            if len(units_hN) == H:
                out_Hd = units_hN @ states_Nd
            else:
                out_Hd = states_Nd.new_zeros(H, states_Nd.shape[1])
                torch.mm(units_hN, states_Nd, out=out_Hd[first:last])
            if gate is not None and gate.others is not None:  # a gate of 0 times inf is not 0
                out_Hd.index_fill_(0, gate.others, 0.0)
            return out_Hd.to(like.dtype)

        a: Any = None
        d_alpha = None
        if fused:
            a, ds, ds_gated = units_backward(s_NH.view(shape), da, weights, nonlinear)
        else:
            if needs[5] or needs[3]:
                a = activate(s_NH, nonlinear).view(shape)
                a = a if mask is None else a * mask.to(dtype)
                d_alpha = (da * a).sum_to_size(alpha.shape).to(alpha.dtype) if needs[5] else None
                a = a if alpha is None else a * alpha.to(dtype)
            for each in (alpha, mask):
                da = da if each is None else da * each.to(dtype)
            ds = ds_gated = activate_backward(da.flatten(0, -2), s_NH, nonlinear)
        dE = weight_gradient(a, dy_Nd, E_saved) if needs[3] else None
        d_hidden = d_residual = None
        if ctx.shared:  # the residual is h: one fused product gives both terms
            d_hidden = add_product(grad, ds.view(shape), D.T) if needs[0] else None
        else:
            d_hidden = (ds.flatten(0, -2) @ D.T).view(shape).to(ctx.hidden_dtype) if needs[0] else None
            d_residual = grad if needs[1] else None
        dD = weight_gradient(ds_gated, x_Nd, D_saved).T if needs[2] else None
        return d_hidden, d_residual, dD, dE, None, d_alpha, None, None, None, None


def compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the matrix products: autocast's where it is on, else that of h."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def bundle_forward(
    hidden_BTd: Tensor,
    D_dH: Tensor,
    E_Hd: Tensor,
    *,
    nonlinear: int,
    residual: Tensor | None = None,
    mean: Tensor | None = None,
    alpha: Tensor | None = None,
    mask: Tensor | None = None,
    gate: Gate | None = None,
) -> Tensor:
    """The stacked bundle operation, y = residual + (alpha * mask * act((h - mu) D)) E, for training.

    Args:
        hidden_BTd: h, any floating dtype; the products run in that dtype, or in autocast's.
        D_dH, E_Hd: the folded maps.
        nonlinear: hidden units before this one pass through GELU, the rest are linear.
        residual: what the result is added to, (B, T, d); None: h.
        mean: mu, (d,); None: 0. (sigma is folded into D.)
        alpha: alphas of the hidden units, broadcast against (B, T, H); None: 1. Differentiable.
        mask: dropout mask of the hidden units, already scaled, broadcast against (B, T, H).
        gate: routes the gradients of D and E; changes nothing else. None: they are not routed.

    Returns:
        (B, T, d), in the dtype of h.
    """
    dtype, device = compute_dtype(hidden_BTd), hidden_BTd.device.type
    # The operation casts its inputs itself, in the same way in forward and backward. So autocast is turned off, but
    # only if it is on: entering the context costs as much as a kernel or two.
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        return BundleOperation.apply(hidden_BTd, residual, D_dH, E_Hd, mean, alpha, mask, gate, nonlinear, dtype)


def within_budget(hidden_BTd: Tensor, out_BTd: Tensor, tau: float | Tensor) -> Tensor:
    """`out` with out - hidden scaled, token by token, to at most `tau` times the length of `hidden`; (B, T, d).

    A token within the limit is returned as it is.
    """
    update = (out_BTd - hidden_BTd).float()
    size, limit = update.norm(dim=-1, keepdim=True), tau * hidden_BTd.float().norm(dim=-1, keepdim=True)
    scaled = hidden_BTd + (update * (limit / size.clamp_min(torch.finfo(torch.float32).tiny))).to(hidden_BTd.dtype)
    return torch.where(size > limit, scaled, out_BTd)


# For graphs whose gates are rewritten between backward passes. A compiled graph may already have multiplied the gates
# in by the end of its forward.
eager_bundle_forward = torch.compiler.disable(bundle_forward)
