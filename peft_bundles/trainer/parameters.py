"""What trains, by its owner: a bundle, the trunk, or an objective's head."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..core.walking import bundle_parameters
from ..objectives.base import Objective
from ..routing.reduction import bundle_labels, clip_parts
from .topics import MARK


def start_alike(model: nn.Module) -> None:
    """Give every process the first one's weights of the bundles, as DDP does: each has drawn its own."""
    for parameters in bundle_parameters(model).values():
        for parameter in parameters:
            dist.broadcast(parameter.data, 0)


def head_parameters(objectives: Mapping[str, Objective]) -> dict[str, list[nn.Parameter]]:
    """Objective -> the parameters of its head; objectives without a head are left out."""
    heads = {name: objective.head() for name, objective in objectives.items()}
    return {name: list(head.parameters()) for name, head in heads.items() if head is not None}


def optimizer_groups(
    model: nn.Module,
    objectives: Mapping[str, Objective],
    decayed: Collection[str],
    *,
    learning_rate: float,
    weight_decay: float,
    factors: Mapping[str, float],
    apart: Collection[str],
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: one for every learning rate and weight decay, each parameter in one of them.

    Args:
        model: with bundles.
        objectives: by name; a head's matrices are decayed, its vectors are not.
        decayed: names of the model's parameters that weight decay acts on.
        learning_rate, weight_decay: of a parameter without a factor.
        factors: bundle, "trunk" or objective (its head) -> factor on the learning rate.
        apart: bundles that get their own groups, marked with `MARK`.

    Returns:
        The groups, those of factor 1 first: the logged learning rate is that of the first group.
    """
    bundle_of = {id(p): bundle for (_, bundle), ps in bundle_parameters(model).items() for p in ps}
    owned = [(bundle_of.get(id(p), "trunk"), p, name in decayed) for name, p in model.named_parameters()]
    owned += [(name, p, p.dim() > 1) for name, ps in head_parameters(objectives).items() for p in ps]
    groups: dict[tuple[float, float, str], list[nn.Parameter]] = {}
    for owner, parameter, decays in owned:
        if parameter.requires_grad:
            mark = owner if owner in apart else ""
            key = float(factors.get(owner, 1.0)), weight_decay if decays else 0.0, mark
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": params, "weight_decay": decay, "lr": learning_rate * factor} | ({MARK: mark} if mark else {})
        for (factor, decay, mark), params in sorted(groups.items(), key=lambda g: (g[0][0] != 1.0, g[0]))
    ]


def clip_gradients(
    model: nn.Module,
    objectives: Mapping[str, Objective],
    trunk: Mapping[str, nn.Parameter],
    max_norm: float | None,
    max_norms: Mapping[str, float],
) -> dict[str, Tensor]:
    """Clip the gradient of every bundle, of the trunk and of every head separately.

    Args:
        model: with bundles.
        objectives: by name.
        trunk: its parameters by name.
        max_norm: largest norm; None or 0 clips nothing.
        max_norms: bundle -> norm, where it differs from `max_norm`.

    Returns:
        Bundle, "trunk" or "<objective>_head" -> norm before clipping, of what has a gradient.
    """
    limit = max_norm or math.inf
    labels, limits = bundle_labels(model), {}
    parts: dict[str, list[nn.Parameter]] = {}
    for key, parameters in bundle_parameters(model).items():
        parts[labels[key]], limits[labels[key]] = parameters, max_norms.get(key[1], limit)
    parts["trunk"] = list(trunk.values())
    parts |= {f"{name}_head": parameters for name, parameters in head_parameters(objectives).items()}
    return clip_parts(parts, dict.fromkeys(parts, limit) | limits)
