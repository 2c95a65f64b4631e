"""One bundle made of several: weighted sums, TIES, DARE and task arithmetic, on the files, without a model.

A bundle is up gelu(down x). `up` is zero when training starts, so it is its own task vector; `down` is not. Hidden
units of two bundles correspond only if they started from the same weights (one seed, one config). So

- "cat" puts the hidden units side by side: exactly sum_k w_k f_k(x), whatever the bundles started from. The result is
  as large as all of them together.
- "linear", "ties" (Yadav et al. 2023), "dare_linear" and "dare_ties" (Yu et al. 2023), by PEFT's own functions, merge
  `up` number by number and take the mean of `down`, weighted by |w|; the result is as large as one. Bundles whose units
  do not correspond are refused.

Negating a bundle (weight -1) takes out what it brought: task arithmetic (Ilharco et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties
from torch import Tensor

from ..core.basis import bundle_shapes
from ..core.checkpoints import SHARED, Checkpoint, changed, write
from .cards import write_card
from .hub import read_source
from .parts import group_key, select


METHODS = ("cat", "linear", "ties", "dare_linear", "dare_ties")
ALIKE = 0.5  # mean cosine of the hidden units' input weights above which two bundles are taken to have one start


def merge_bundles(
    sources: Sequence[str | Path],
    weights: Sequence[float],
    folder: str | Path,
    *,
    method: str = "cat",
    density: float = 0.5,
    name: str | None = None,
    seed: int = 0,
    token: str | None = None,
) -> Path:
    """Merge bundles of one basis and one support into a bundle folder of its own.

    Args:
        sources: one bundle each (hub.py); one alone may be scaled or negated.
        weights: one number a bundle, of any sign; of the bundles at alpha 1, and so is the result.
        folder: where to write the merged bundle.
        method: "cat", "linear", "ties", "dare_linear" or "dare_ties" (see the module).
        density: share of the numbers that TIES and DARE keep, in (0, 1].
        name: of the result; None is "merged".
        seed: of DARE's choice.
        token: of the Hub.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown method, another number of weights than bundles, several bundles in a source, bundles of
            another basis, support or kind, or (all methods but "cat") hidden units that do not correspond.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}.")
    if not sources or len(weights) != len(sources) or not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights={list(weights)} must be one finite number for each of the {len(sources)} sources.")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density={density!r} must be in (0, 1].")
    parts = []
    for source in sources:
        checkpoint, _ = read_source(source, token)
        if len(checkpoint.names) != 1:
            raise ValueError(
                f"{source} holds the bundles {checkpoint.names}; name one, '{source}:{checkpoint.names[0]}'."
            )
        parts.append(select(checkpoint, checkpoint.names[0], name or "merged"))
    write(merge(parts, weights, method, density, seed), folder)
    return write_card(folder).parent


def merge(parts: Sequence[Checkpoint], weights: Sequence[float], method: str, density: float, seed: int) -> Checkpoint:
    """`merge_bundles` on checkpoints of one bundle each, all of one name."""
    first, name = parts[0], parts[0].names[0]
    shape = bundle_shapes(first.config, first.hidden_size)[name]
    for other in parts[1:]:
        theirs = bundle_shapes(other.config, other.hidden_size)[name]
        if group_key(other) != group_key(first):
            raise ValueError(
                f"{other.source} and {first.source} were trained in different bases, or with another projection or "
                "scaling; they cannot merge."
            )
        if list(other.config.sub_bases or ()) != list(first.config.sub_bases or ()) or not torch.equal(
            theirs.support, shape.support
        ):
            raise ValueError(
                f"{other.source} and {first.source} have different supports: {list(other.config.sub_bases or ())} and "
                f"{list(first.config.sub_bases or ())}; only bundles of one support merge, put these side by side with "
                "compose(base_model, sources)."
            )
        if theirs.kind != shape.kind or (method != "cat" and theirs.hidden != shape.hidden):
            raise ValueError(
                f"{other.source} is of kind {theirs.kind!r} with {theirs.hidden} hidden units, {first.source} of kind "
                f"{shape.kind!r} with {shape.hidden}; they cannot merge by {method!r}."
            )
    if first.config.projection != "none" and len(parts) > 1:
        raise ValueError("bundles with a projector of their own (projection='tied') cannot merge.")
    if method != "cat":
        _check_units(parts, name)
    if shape.kind == "diag" and method == "cat":
        method = "linear"  # no hidden units to put side by side, and linear in its weights: the sum is exact
    layers, hidden = {}, 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for number, layer in first.layers.items():
            merged = {what: layer[what] for what in SHARED}
            if f"bundle_weight.{name}" in layer:
                merged.update({t: v for t, v in layer.items() if t.startswith("bundle_weight")})
            ups = [p.layers[number][f"bundle_up.{name}"] for p in parts]
            downs = [p.layers[number].get(f"bundle_down.{name}") for p in parts]
            up, down = _merged(ups, [d for d in downs if d is not None], weights, method, density)
            merged[f"bundle_up.{name}"], hidden = up.contiguous(), up.shape[-1]
            if down is not None:
                merged[f"bundle_down.{name}"] = down.contiguous()
            layers[number] = merged
    assert first.config.bundles is not None
    spec = first.config.bundles[name]
    spec = replace(spec, alpha=1.0, bottleneck=hidden if spec.bottleneck is not None else None)
    origin = ", ".join(f"{w:g} x {p.source}" for w, p in zip(weights, parts))
    provenance = {**(first.config.provenance or {}), "summaries": {name: {"merged": origin, "method": method}}}
    config = changed(
        first.config,
        bundles={name: spec},
        provenance=provenance,
        basis_fingerprint=first.config.basis_fingerprint,
    )
    return Checkpoint(config, layers, first.heads, f"a merge of {origin}")


def _merged(
    ups: list[Tensor], downs: list[Tensor], weights: Sequence[float], method: str, density: float
) -> tuple[Tensor, Tensor | None]:
    if method == "cat":
        return torch.cat([w * up for w, up in zip(weights, ups)], -1), torch.cat(downs) if downs else None
    each = torch.tensor(list(weights), dtype=ups[0].dtype)
    merge = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties}.get(method)
    up = task_arithmetic(ups, each) if merge is None else merge(ups, each, density)
    total = float(each.abs().sum())
    return up, task_arithmetic(downs, each.abs() / total) if downs and total else (downs[0] if downs else None)


def _check_units(parts: Sequence[Checkpoint], name: str) -> None:
    """Whether hidden unit i of one bundle is hidden unit i of the other: the cosine of what they read."""
    for other in parts[1:]:
        cosines = [
            torch.cosine_similarity(layer[f"bundle_down.{name}"], other.layers[number][f"bundle_down.{name}"]).mean()
            for number, layer in parts[0].layers.items()
            if f"bundle_down.{name}" in layer
        ]
        if cosines and (mean := float(torch.stack(cosines).mean())) < ALIKE:
            raise ValueError(
                f"the hidden units of {other.source} and {parts[0].source} do not correspond (mean cosine {mean:.2f}): "
                'they started from different weights, and merging number by number would give noise. Use method="cat".'
            )
