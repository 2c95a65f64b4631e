"""The local penalty for PEFT's LoRA: the control of bundles at linear layers, which have the same one.

For a linear layer W with input v it is E_v |s B A v|^2 / E |W v|^2, on inputs that were kept while text passed that
must not be disturbed. There is no pass through the trunk. As `peft_bundles.calibrate` does, it leaves attention sinks
out.

Shapes: L layers of one size, N kept inputs, I input and O output features, r the rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from peft_bundles.calibration import OUTLIER
from studies.training import autocast


DRAW, KEPT, BATCH = 256, 4096, 32  # inputs a step, inputs kept, rows of a forward


class _Kept:
    """Inputs of one linear layer (bfloat16), and the sum of |W v|^2 over all that are no outliers."""

    def __init__(self, share: float) -> None:
        self.share, self.sample, self.count = share, list[Tensor](), 0
        self.energy = torch.zeros((), dtype=torch.float64)

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> None:
        inputs, outputs = args[0].flatten(0, -2), output.flatten(0, -2)
        norms = inputs.double().norm(dim=-1)
        inside = norms <= OUTLIER * norms.median()
        self.count += int(inside.sum())
        self.energy = self.energy.to(inputs.device) + outputs[inside].double().square().sum()
        self.sample.append(spread(inputs[inside], math.ceil(self.share * len(inputs))).to(torch.bfloat16))


class LocalPenalty:
    """weight * sum over the LoRA layers of a model of E_v |s B A v|^2 / E |W v|^2; calling it gives a scalar.

    Args:
        model: with LoRA on some linear layers, fresh: its inputs are then the base's.
        trunk: token rows -> final states.
        rows: (R, T) of text that must not be disturbed; all of it passes once.
        weight: a factor.

    Raises:
        ValueError: no LoRA layers, or layers (DoRA's) that add something else than s B A v.
    """

    def __init__(self, model: nn.Module, trunk: Callable[[Tensor], Tensor], rows: Tensor, weight: float) -> None:
        layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
        if not layers or any(any(layer.use_dora.values()) for layer in layers):
            raise ValueError("the local penalty needs plain LoRA layers; leave `local` out for other methods.")
        kept = [_Kept(KEPT / rows.numel()) for _ in layers]
        handles = [layer.base_layer.register_forward_hook(keep) for layer, keep in zip(layers, kept)]
        with torch.no_grad(), autocast(rows.device):
            for batch in rows.split(BATCH):
                trunk(batch)
        for handle in handles:
            handle.remove()
        alike: dict[tuple[int, ...], list[tuple[Any, _Kept, Tensor]]] = {}
        for layer, one in zip(layers, kept):
            inputs = spread(torch.cat(one.sample), KEPT)
            alike.setdefault((*inputs.shape, layer.out_features, layer.r["default"]), []).append((layer, one, inputs))
        self.groups: list[tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]] = []  # A and B, inputs LNI, factors L
        for group in alike.values():
            maps = [(layer.lora_A["default"].weight, layer.lora_B["default"].weight) for layer, _, _ in group]
            inputs_LNI = torch.stack([inputs for _, _, inputs in group])
            factors = [layer.scaling["default"] ** 2 * one.count / one.energy for layer, one, _ in group]
            self.groups.append((maps, inputs_LNI, weight * torch.stack(factors).to(maps[0][0].dtype)))

    def __call__(self) -> Tensor:
        total = torch.zeros((), device=self.groups[0][1].device)
        for maps, inputs_LNI, factor_L in self.groups:
            A_LrI, B_LOr = (torch.stack(weights) for weights in zip(*maps))
            count = inputs_LNI.shape[1]
            if count > DRAW:
                drawn = torch.randint(count, (len(maps), DRAW, 1), device=inputs_LNI.device)
                inputs_LNI = inputs_LNI.gather(1, drawn.expand(-1, -1, inputs_LNI.shape[2]))
            added_LNO = (inputs_LNI.to(A_LrI.dtype) @ A_LrI.mT) @ B_LOr.mT
            energy_L = added_LNO.to(factor_L.dtype).square().sum(-1).mean(-1)
            total = total + (energy_L * factor_L).sum()
        return total


def spread(rows: Tensor, count: int) -> Tensor:
    """At most `count` rows, evenly spread."""
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), count), device=rows.device).long()]
