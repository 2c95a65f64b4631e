"""Merge several bundles into one: weighted sums, TIES, DARE and task arithmetic. Works on files, without a model.

A bundle is f(x) = up gelu(down x). `up` starts at zero, so it is its own task vector; `down` does not start at zero.
Hidden unit i of one bundle corresponds to hidden unit i of another only if both started from the same weights (same
seed, same config). Hence two families of methods:

- "cat" puts the hidden units side by side. The result is exactly sum_k w_k f_k(x) for any bundles, and as large as all
  of them together.
- "linear", "ties" (Yadav et al. 2023), "dare_linear" and "dare_ties" (Yu et al. 2023) use PEFT's functions. They merge
  `up` element by element and average `down`, weighted by |w|. The result is as large as one bundle. Bundles whose
  hidden units do not correspond are refused.

Weight -1 negates a bundle: task arithmetic (Ilharco et al. 2022).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft.utils.merge_utils import dare_linear, dare_ties, task_arithmetic, ties
from torch import Tensor

from ..core.basis import bundle_shapes, linear_shapes
from ..core.checkpoints import SHARED, Checkpoint, changed, write
from ..specs import BLOCK
from .cards import write_card
from .hub import read_source
from .parts import group_key, select


METHODS = ("cat", "linear", "ties", "dare_linear", "dare_ties")
ALIKE = 0.5  # hidden units correspond if the mean cosine of their input weights is at least this


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
    """Merge bundles of the same basis and support into a new bundle folder.

    Args:
        sources: of one bundle each, written as in `compose`. A single source is scaled or negated.
        weights: one finite number per bundle, of any sign. They scale the bundles at alpha 1; the result has alpha 1.
        folder: folder to write the merged bundle to.
        method: "cat" (exact; as large as all bundles together), "linear", "ties", "dare_linear" or "dare_ties" (as
            large as one bundle; hidden units must correspond).
        density: share of the numbers that TIES and DARE keep, in (0, 1], default 0.5.
        name: name of the merged bundle. None: "merged".
        seed: for DARE's random choice.
        token: Hub token. None: the stored one.

    Returns:
        The folder.

    Raises:
        ValueError: an unknown method; not one weight per source; several bundles in a source; bundles of different
            bases, supports or kinds; hidden units that do not correspond (every method but "cat").

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, merge_bundles, save_bundle
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> model = get_peft_model(base, BundleConfig(preset="ssl_rl_separate"))
        >>> folder = tempfile.TemporaryDirectory()
        >>> saved = save_bundle(model, "b_rl_policy", f"{folder.name}/policy")
        >>> merged = merge_bundles([saved, saved], [0.5, -0.5], f"{folder.name}/merged", name="b_nothing")
        >>> (merged / "adapter_model.safetensors").exists()
        True
        >>> folder.cleanup()
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}.")
    if not sources or len(weights) != len(sources) or not all(math.isfinite(w) for w in weights):
        raise ValueError(f"weights={list(weights)}; give one finite number for each of the {len(sources)} sources.")
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density={density!r} must be in (0, 1].")
    parts = []
    for source in sources:
        checkpoint, _ = read_source(source, token)
        if len(checkpoint.names) != 1:
            raise ValueError(
                f"{source} holds the bundles {checkpoint.names}; name one, e.g. '{source}:{checkpoint.names[0]}'."
            )
        parts.append(select(checkpoint, checkpoint.names[0], name or "merged"))
    write(merge(parts, weights, method, density, seed), folder)
    return write_card(folder).parent


def merge(parts: Sequence[Checkpoint], weights: Sequence[float], method: str, density: float, seed: int) -> Checkpoint:
    """`merge_bundles` on checkpoints that hold one bundle each, all of the same name."""
    first, name = parts[0], parts[0].names[0]
    if any(site.path for part in parts for site in part.layers):
        return _merge_linears(parts, weights, method, density, seed)
    shape = bundle_shapes(first.config, first.hidden_size)[name]
    for other in parts[1:]:
        other_shape = bundle_shapes(other.config, other.hidden_size)[name]
        if group_key(other) != group_key(first):
            raise ValueError(
                f"{other.source} and {first.source} have different bases, projections or scalings, so they cannot be "
                "merged; load them side by side with compose(base_model, sources)."
            )
        if list(other.config.sub_bases or ()) != list(first.config.sub_bases or ()) or not torch.equal(
            other_shape.support, shape.support
        ):
            raise ValueError(
                f"{other.source} and {first.source} have different supports, {list(other.config.sub_bases or ())} and "
                f"{list(first.config.sub_bases or ())}, so they cannot be merged; load them side by side with "
                "compose(base_model, sources)."
            )
        if other_shape.kind != shape.kind or (method != "cat" and other_shape.hidden != shape.hidden):
            raise ValueError(
                f"{other.source} is of kind {other_shape.kind!r} with {other_shape.hidden} hidden units, "
                f"{first.source} of kind {shape.kind!r} with {shape.hidden}, so {method!r} cannot merge them; use "
                + ('"cat".' if other_shape.kind == shape.kind else "bundles of one kind.")
            )
    if first.config.projection != "none" and len(parts) > 1:
        raise ValueError(
            f"{first.source} has projection={first.config.projection!r}, a trained projector per bundle, so it cannot "
            "be merged; load the bundles side by side with compose(base_model, sources)."
        )
    if method != "cat":
        _check_units(parts, name)
    if shape.kind == "diag" and method == "cat":
        method = "linear"  # a diag bundle is linear in its weights, so the weighted sum is exact
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
        keys=None,  # of rows of one part only
    )
    return Checkpoint(config, layers, first.heads, f"a merge of {origin}")


def _merge_linears(
    parts: Sequence[Checkpoint], weights: Sequence[float], method: str, density: float, seed: int
) -> Checkpoint:
    """`merge` of bundles at linear layers; scales that differ from the first's are multiplied into `up`."""
    first, name = parts[0], parts[0].names[0]
    shapes = [linear_shapes(part.config, part.hidden_size).get(name, (0, 0.0)) for part in parts]
    kinds = [part.config.kind_of(name, at_linears=True) for part in parts]
    for part, (rank, _), kind in zip(parts, shapes, kinds):
        if BLOCK in part.config.places(name):
            raise ValueError(f"{part.source} has bundles behind blocks and at linear layers, which cannot be merged.")
        if part.layers.keys() != first.layers.keys() or part.hidden_size != first.hidden_size:
            raise ValueError(
                f"{part.source} and {first.source} are on other layers, so they cannot be merged; load them side by "
                "side with compose(base_model, sources)."
            )
        if kind != kinds[0] or (method != "cat" and rank != shapes[0][0]):
            raise ValueError(
                f"{part.source} is of kind {kind!r} and rank {rank}, {first.source} of kind {kinds[0]!r} and rank "
                f"{shapes[0][0]}, so {method!r} cannot merge them; use "
                + ('"cat".' if kind == kinds[0] else "bundles of one kind.")
            )
    if method != "cat":
        _check_units(parts, name)
    layers, rank, scale = {}, 0, shapes[0][1]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for site in first.layers:
            ups = [part.layers[site][f"bundle_up.{name}"].T * (s / scale) for part, (_, s) in zip(parts, shapes)]
            downs = [part.layers[site][f"bundle_down.{name}"] for part in parts]
            up, down = _merged(ups, downs, weights, method, density)
            assert down is not None
            layers[site] = {f"bundle_up.{name}": up.T.contiguous(), f"bundle_down.{name}": down.contiguous()}
            rank = len(down)
    assert first.config.bundles is not None
    spec = replace(first.config.bundles[name], alpha=1.0, rank=rank, lora_alpha=rank * scale, use_rslora=False)
    origin = ", ".join(f"{w:g} x {p.source}" for w, p in zip(weights, parts))
    provenance = {**(first.config.provenance or {}), "summaries": {name: {"merged": origin, "method": method}}}
    config = changed(first.config, bundles={name: spec}, provenance=provenance, keys=None)
    return Checkpoint(config, layers, first.heads, f"a merge of {origin}")


def _merged(
    ups: list[Tensor], downs: list[Tensor], weights: Sequence[float], method: str, density: float
) -> tuple[Tensor, Tensor | None]:
    """`up` and `down` of the merged bundle in one layer."""
    if method == "cat":
        return torch.cat([w * up for w, up in zip(weights, ups)], -1), torch.cat(downs) if downs else None
    each = torch.tensor(list(weights), dtype=ups[0].dtype)
    merge = {"ties": ties, "dare_linear": dare_linear, "dare_ties": dare_ties}.get(method)
    up = task_arithmetic(ups, each) if merge is None else merge(ups, each, density)
    total = float(each.abs().sum())
    return up, task_arithmetic(downs, each.abs() / total) if downs and total else (downs[0] if downs else None)


def _check_units(parts: Sequence[Checkpoint], name: str) -> None:
    """Refuse bundles whose hidden units do not correspond, by the mean cosine of their input weights."""
    for other in parts[1:]:
        cosines = [
            torch.cosine_similarity(layer[f"bundle_down.{name}"], other.layers[number][f"bundle_down.{name}"]).mean()
            for number, layer in parts[0].layers.items()
            if f"bundle_down.{name}" in layer
        ]
        if cosines and (mean := float(torch.stack(cosines).mean())) < ALIKE:
            raise ValueError(
                f"the hidden units of {other.source} and {parts[0].source} do not correspond (mean cosine {mean:.2f}), "
                'because they started from different weights; use method="cat".'
            )
