"""Measuring bundles while they train: sizes of updates, alphas, and how much each bundle writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.basis import SHARED
from ..core.functional import bundle_reference, linear_reference
from ..core.gates import layer_alphas
from ..core.layer import BundleLayer
from ..core.walking import bundle_layers, bundle_parameters
from ..routing.reduction import bundle_labels


SAMPLE = 32  # tokens per layer on which the size of what bundles write is measured


def snapshot(model: nn.Module) -> dict[str, list[Tensor]]:
    """Bundle -> copies of its weights."""
    names = bundle_labels(model)
    return {names[key]: [p.detach().clone() for p in ps] for key, ps in bundle_parameters(model).items()}


def update_norms(model: nn.Module, before: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """Bundle -> norm of the difference to a snapshot, over all layers."""
    names = bundle_labels(model)
    return {
        names[key]: torch.stack([(p.detach() - b).norm() for p, b in zip(ps, before[names[key]])]).norm()
        for key, ps in bundle_parameters(model).items()
    }


@contextmanager
def watch(model: nn.Module, values: dict[str, list[Tensor]], *, spread: bool = False) -> Iterator[None]:
    """Measure forward passes with gradients inside the block; adds a value per layer and bundle to `values`.

    - "alpha/<bundle>": mean over rows and tokens.
    - "alpha_std/<bundle>": standard deviation over rows and tokens, where alpha varies.
    - "activation/<bundle>": norm of what the bundle adds to the stream (or to the output of a linear layer), divided by
      the norm of that, on the last `SAMPLE` tokens of the first row.

    Args:
        model: with bundles.
        values: name -> values; added to.
        spread: always measure "alpha_std": alphas may vary on one process only, but all must log the same names.
    """
    names = bundle_labels(model)

    def measure(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, BundleLayer)
        if torch.is_grad_enabled():  # forwards of the reference have no gradients
            # In float32: base, stream and bundles may each have a dtype of their own.
            with torch.no_grad(), torch.autocast(args[0].device.type, enabled=False):
                _measure(layer, args[0].detach(), args[-1].detach(), names, values, spread)

    handles = [layer.register_forward_pre_hook(measure) for layer in bundle_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _measure(
    layer: BundleLayer,
    h_BTd: Tensor,
    y_BTd: Tensor,
    names: Mapping[tuple[str, str], str],
    values: dict[str, list[Tensor]],
    spread: bool,
) -> None:
    """B rows, T tokens, d hidden size, K bundles, S sampled tokens."""
    for adapter in layer.bundle_adapters():
        packing = layer.packing(adapter)
        numbers, tensor = layer_alphas(layer.state, adapter, layer.index, h_BTd, names=packing.names)
        sample_1Sd, size = h_BTd[:1, -SAMPLE:].float(), y_BTd[:1, -SAMPLE:].float().norm().clamp_min(1e-12)
        alphas_BTK = sample_1Sd.new_tensor(numbers).view(1, 1, -1) if tensor is None else tensor.float()
        alphas_BTK = alphas_BTK.expand(*h_BTd.shape[:2], -1)
        for k, (name, weights) in enumerate(zip(packing.names, layer.bundle_weights(adapter))):
            weights = replace(
                weights, **{f: t.float() for f in ("weight", "down", "up") if (t := getattr(weights, f)) is not None}
            )
            label, gate = names[adapter, name], alphas_BTK[:1, -SAMPLE:, k, None]
            if layer.site.path:
                written = linear_reference(sample_1Sd, 0.0, [weights], gate)
            else:
                basis, mean, scale = (getattr(layer, what)[adapter].float() for what in SHARED)
                written = bundle_reference(sample_1Sd, [weights], basis, mean, scale, gate) - sample_1Sd
            values.setdefault(f"alpha/{label}", []).append(alphas_BTK[..., k].mean())
            if spread or tensor is not None:
                values.setdefault(f"alpha_std/{label}", []).append(alphas_BTK[..., k].std(unbiased=False))
            values.setdefault(f"activation/{label}", []).append(written.norm() / size)
