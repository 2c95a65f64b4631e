"""Cut an adapter into single bundles, and join bundles to an adapter.

The checkpoint of a single bundle has only the columns of U that the bundle may use, so its file is smaller than the
whole basis. It also has the digest of the whole basis: bundles with the same digest fit into one adapter and share U
in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import COMMON, BundleConfig
from ..core.base import PEFT_PREFIX, base_fingerprint
from ..core.basis import basis_rank, bundle_shapes, fingerprint, linear_shapes, sub_basis_columns
from ..core.checkpoints import SHARED, Checkpoint, basis_digest, basis_of, changed
from ..core.layer import BundleLayer
from ..core.places import CHILD, Site
from ..core.walking import state_of
from ..specs import BLOCK, BundleSpec, SubBasis


NO_BASIS = {"digest": basis_digest({}, [], False), "sub_bases": []}  # of bundles at linear layers alone


# ---- from a model ----


def from_model(model: nn.Module, adapter: str) -> Checkpoint:
    """The checkpoint of an adapter in a model. Its tensors are the model's own, not copies.

    Raises:
        ValueError: the adapter has no bundles, or trains other modules too (a bundle alone would not be what was
            trained).
    """
    layers, heads, config, keys = {}, {}, None, {}
    for name, module in model.named_modules():
        if not (isinstance(module, BundleLayer) and module.holds(adapter)):
            continue
        config = module.state.configs[adapter]
        keys = {bundle: key for (owner, bundle), key in module.state.keys.items() if owner == adapter}
        heads[module.site] = PEFT_PREFIX + name.removeprefix(PEFT_PREFIX).removesuffix(f".{CHILD}")
        tensors = {} if module.site.path else {what: getattr(module, what)[adapter] for what in SHARED}
        for what in module.adapter_layer_names:
            tensors.update({f"{what}.{bundle}": p for bundle, p in getattr(module, what)[adapter].items()})
        layers[module.site] = tensors
    if config is None:
        raise ValueError(f"adapter {adapter!r} has no bundles in this model; name an adapter that has.")
    if config.modules_to_save:
        raise ValueError(
            f"adapter {adapter!r} also trains {config.modules_to_save} (modules_to_save), so a single bundle is only a "
            "part of what was trained; save the whole adapter with save_pretrained."
        )
    return Checkpoint(config, layers, heads, f"adapter {adapter!r}", keys)


def with_base(checkpoint: Checkpoint, model: Any) -> Checkpoint:
    """The checkpoint with its basis and its present base model noted in the provenance."""
    state_of(model).check_unmerged()  # the base model that is noted would be the merged one
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    provenance = {
        **(checkpoint.config.provenance or {}),
        "basis": basis_of(checkpoint),
        "base": base_fingerprint(base),
        "base_revision": checkpoint.config.revision or getattr(base.config, "_commit_hash", None),
    }
    return replace(checkpoint, config=changed(checkpoint.config, provenance=provenance))


# ---- cut and join ----


def select(checkpoint: Checkpoint, bundle: str, name: str | None = None) -> Checkpoint:
    """The checkpoint of a single bundle, with only the columns of U that it may use.

    Args:
        bundle: its name in this checkpoint.
        name: its new name. None keeps the old one.

    Raises:
        ValueError: no such bundle.
    """
    config, d = checkpoint.config, checkpoint.hidden_size
    if bundle not in checkpoint.names:
        raise ValueError(f"{checkpoint.source} has no bundle {bundle!r}; name one of {checkpoint.names}.")
    assert config.bundles is not None
    spec, name = _resolved(config, bundle, d), name or bundle
    behind_blocks = BLOCK in config.places(bundle)
    columns = {n: c for n, c in sub_basis_columns(config, d).items() if behind_blocks and n in spec.sub_bases}
    if spec.overlap and behind_blocks:
        shape = bundle_shapes(config, d)[bundle]
        common = sub_basis_columns(config, d)[COMMON]
        columns[COMMON] = common[: len(shape.support) - sum(map(len, columns.values()))]
    columns = {n: columns[n] for n in config.sub_bases or () if n in columns}  # in the order of U
    basis = basis_of(checkpoint) if behind_blocks else NO_BASIS
    provenance = config.provenance or {}
    summaries = provenance.get("summaries", {})
    cut = changed(
        config,
        bundles={name: replace(spec, name=name)},
        sub_bases={n: SubBasis(len(c)) for n, c in columns.items()},
        basis_rank=None,
        save_basis=True,
        provenance={**provenance, "basis": basis, "summaries": {name: summaries.get(bundle, {})}},
        keys={name: config.keys[bundle]} if config.keys and bundle in config.keys else None,
    )
    width = basis_rank(cut, d)
    layers = {}
    for site, layer in checkpoint.layers.items():
        tensors = {}
        if behind_blocks and not site.path:
            U = layer["bundle_basis"]
            tensors = {what: layer[what] for what in SHARED}
            tensors["bundle_basis"] = _padded(U, [_take(U, c) for c in columns.values()], width)
        for tail, tensor in layer.items():
            what, _, owner = tail.partition(".")
            if owner == bundle:
                tensors[f"{what}.{name}"] = tensor
        if tensors:
            layers[site] = tensors
    heads = {site: checkpoint.heads[site] for site in layers}
    keys = {name: checkpoint.keys[bundle]} if bundle in checkpoint.keys else {}
    return _fingerprinted(Checkpoint(cut, layers, heads, checkpoint.source, keys))


def without(checkpoint: Checkpoint, bundle: str) -> Checkpoint:
    """The checkpoint without one of its bundles; U is unchanged."""
    bundles = {n: spec for n, spec in (checkpoint.config.bundles or {}).items() if n != bundle}
    layers = {
        site: {tail: t for tail, t in layer.items() if tail.partition(".")[2] != bundle}
        for site, layer in checkpoint.layers.items()
    }
    layers = {site: layer for site, layer in layers.items() if layer}
    provenance = {**(checkpoint.config.provenance or {}), "basis": basis_of(checkpoint)}
    noted = {name: counts for name, counts in (checkpoint.config.keys or {}).items() if name != bundle}
    keys = {name: key for name, key in checkpoint.keys.items() if name != bundle}
    config = changed(checkpoint.config, bundles=bundles, provenance=provenance, keys=noted or None)
    return replace(checkpoint, config=config, layers=layers, keys=keys)


def group_key(checkpoint: Checkpoint) -> tuple[Any, ...]:
    """Checkpoints with the same key fit into one adapter: same basis, projection, scaling and layers."""
    config, blocks = checkpoint.config, tuple(sorted({site.block for site in checkpoint.layers}))
    if not checkpoint.behind_blocks():
        return "", "", 1.0, blocks
    return basis_of(checkpoint)["digest"], config.projection, config.scaling, blocks


def join(members: Sequence[Checkpoint]) -> Checkpoint:
    """Join checkpoints of one `group_key`, whose bundles have different names, to one adapter.

    Raises:
        ValueError: two of them name the same basis, but its columns, mu or sigma differ.
    """
    if len(members) == 1:
        return members[0]
    first, d, basis = members[0], members[0].hidden_size, basis_of(members[0])
    columns = [sub_basis_columns(m.config, d) for m in members]
    donors = {  # sub-basis -> the member that has most of its columns
        name: max((i for i, c in enumerate(columns) if name in c), key=lambda i: len(columns[i][name]))
        for name, _ in basis["sub_bases"]
        if any(name in c for c in columns)
    }
    sizes = {name: len(columns[i][name]) for name, i in donors.items()}
    summaries = {k: v for m in members for k, v in (m.config.provenance or {}).get("summaries", {}).items()}
    config = changed(
        first.config,
        # Kind and sizes are written into each spec, so that the defaults of the joined config do not matter.
        bundles={name: _resolved(m.config, name, d) for m in members for name in m.config.bundles or ()},
        kind=None,
        sub_bases={name: SubBasis(size) for name, size in sizes.items()},
        basis_rank=None,
        save_basis=True,
        provenance={**(first.config.provenance or {}), "basis": basis, "summaries": summaries},
        keys={name: counts for m in members for name, counts in (m.config.keys or {}).items()} or None,
    )
    width = basis_rank(config, d)
    whole = next(  # a member that has all columns: then its U is used and nothing is copied
        (m for m, c in zip(members, columns) if all(len(c.get(name, ())) == size for name, size in sizes.items())), None
    )
    layers: dict[Site, dict[str, Tensor]] = {}
    for m in members:
        for site, layer in m.layers.items():
            if site.path:
                layers.setdefault(site, {}).update(layer)
    for number, layer in first.behind_blocks().items():
        site = Site(number)
        bases = [m.layers[site]["bundle_basis"].to(layer["bundle_basis"]) for m in members]
        for m, base, own in zip(members, bases, columns):
            for name, place in own.items():
                i = donors[name]
                if m is not members[i] and not torch.equal(
                    _take(base, place), _take(bases[i], columns[i][name][: len(place)])
                ):
                    raise ValueError(
                        f"{m.source} and {members[i].source} both name the basis {basis['digest'][:12]}, but their "
                        f"columns of {name!r} in layer {number} differ; one file was changed, get both again."
                    )
            for what in ("bundle_mean", "bundle_scale"):
                if not torch.equal(m.layers[site][what].to(layer[what]), layer[what]):
                    raise ValueError(
                        f"{m.source} and {first.source} both name the basis {basis['digest'][:12]}, but their {what} "
                        f"of layer {number} differs; one file was changed, get both again."
                    )
        tensors = {tail: t for m in members for tail, t in m.layers[site].items()}
        tensors.update({what: layer[what] for what in SHARED})
        if whole is not None and basis_rank(whole.config, d) == width:
            tensors["bundle_basis"] = whole.layers[site]["bundle_basis"]
        else:
            pieces = [_take(bases[i], columns[i][name]) for name, i in donors.items()]
            tensors["bundle_basis"] = _padded(bases[0], pieces, width)
        layers[site] = tensors
    heads = {site: head for m in members for site, head in m.heads.items()}
    keys = {name: key for m in members for name, key in m.keys.items()}
    return _fingerprinted(Checkpoint(config, layers, heads, " and ".join(m.source for m in members), keys))


def _resolved(config: BundleConfig, bundle: str, hidden_size: int) -> BundleSpec:
    """A bundle's spec with the place, kind and sizes that it has here, independent of the config's defaults."""
    assert config.bundles is not None
    spec, places = config.bundles[bundle], config.places(bundle)
    spec = replace(spec, place=list(places), kind=spec.kind or config.kind)
    if (shape := bundle_shapes(config, hidden_size).get(bundle)) is None:
        return replace(spec, rank=linear_shapes(config, hidden_size)[bundle][0])
    bottleneck = shape.hidden if shape.kind in ("mlp", "linear", "full") else None
    kind = shape.kind if places == (BLOCK,) else spec.kind
    return replace(spec, rank=shape.rank, kind=kind, bottleneck=bottleneck)


def _take(basis: Tensor, columns: Tensor) -> Tensor:
    """Adjacent columns of U, as a sub-basis has them; a view."""
    return basis[:, int(columns[0]) : int(columns[-1]) + 1] if len(columns) else basis[:, :0]


def _padded(like: Tensor, parts: list[Tensor], width: int) -> Tensor:
    """The parts side by side, filled up to `width` with zero columns, which no bundle uses."""
    joined = torch.cat([like[:, :0], *parts], 1)
    return torch.nn.functional.pad(joined, (0, width - joined.shape[1])).contiguous()


def _fingerprinted(checkpoint: Checkpoint) -> Checkpoint:
    """Write the fingerprints of its bases into its config."""
    prints = {str(i): fingerprint(layer["bundle_basis"]) for i, layer in checkpoint.behind_blocks().items()}
    checkpoint.config.basis_fingerprint = prints or None
    return checkpoint
