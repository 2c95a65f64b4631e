"""What is measured of the bundles while they train: gradient and update norms, alphas, how much each writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..core.functional import bundle_reference
from ..core.gates import layer_alphas
from ..core.layer import BundleLayer
from ..core.walking import bundle_parameters


SAMPLE = 32  # tokens a layer that activation sizes are measured on


def labels(model: nn.Module) -> dict[tuple[str, str], str]:
    """(adapter, bundle) -> its name in logs: the bundle's, "adapter.bundle" with several adapters."""
    keys = list(bundle_parameters(model))
    several = len({adapter for adapter, _ in keys}) > 1
    return {(a, b): f"{a}.{b}" if several else b for a, b in keys}


def snapshot(model: nn.Module) -> dict[str, list[Tensor]]:
    """Copies of the weights, by bundle."""
    names = labels(model)
    return {names[key]: [p.detach().clone() for p in ps] for key, ps in bundle_parameters(model).items()}


def update_norms(model: nn.Module, before: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """Bundle -> norm of the difference to a snapshot, over all layers."""
    names = labels(model)
    return {
        names[key]: torch.stack([(p.detach() - b).norm() for p, b in zip(ps, before[names[key]])]).norm()
        for key, ps in bundle_parameters(model).items()
    }


@contextmanager
def watch(model: nn.Module, found: dict[str, list[Tensor]], *, spread: bool = False) -> Iterator[None]:
    """Measure the forwards inside: "alpha/<bundle>", its mean, where it varies "alpha_std/<bundle>", and
    "activation/<bundle>", the size of what the bundle writes, as a part of |h|.

    With `spread` the second is always there: alphas may vary on one process only, what is logged must be alike on all.

    The first row's last `SAMPLE` tokens stand for the batch, so it costs little; still, use it on some steps only.
    """
    names = labels(model)

    def measure(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, BundleLayer)
        if torch.is_grad_enabled():  # not the reference's forwards
            with torch.no_grad():
                _measure(layer, args[0].detach(), names, found, spread)

    handles = [m.register_forward_pre_hook(measure) for m in model.modules() if isinstance(m, BundleLayer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _measure(
    layer: BundleLayer,
    hidden: Tensor,
    names: Mapping[tuple[str, str], str],
    found: dict[str, list[Tensor]],
    spread: bool,
) -> None:
    for adapter in layer.bundle_adapters():
        numbers, tensor = layer_alphas(layer.state, adapter, layer.index, hidden)
        bundles = layer.packing(adapter).names
        table = hidden.new_tensor(numbers).view(1, 1, -1) if tensor is None else tensor.to(hidden.dtype)
        table = table.expand(*hidden.shape[:2], -1)
        sample = hidden[:1, -SAMPLE:]
        basis, mean, scale = (
            t[adapter].to(hidden.dtype) for t in (layer.bundle_basis, layer.bundle_mean, layer.bundle_scale)
        )
        for k, (name, weights) in enumerate(zip(bundles, layer.bundle_weights(adapter))):
            label, gate = names[adapter, name], table[:1, -SAMPLE:, k, None]
            written = bundle_reference(sample, [weights], basis, mean, scale, gate) - sample
            found.setdefault(f"alpha/{label}", []).append(table[..., k].mean())
            if spread or tensor is not None:
                found.setdefault(f"alpha_std/{label}", []).append(table[..., k].std(unbiased=False))
            found.setdefault(f"activation/{label}", []).append(written.norm() / sample.norm().clamp_min(1e-12))
