"""Bundles of several sources in one model, and the set of them changed while the model runs.

Bundles that were trained in one basis become one adapter and share U, mu and sigma; bundles of another basis become an
adapter of their own. A change of the set builds the adapters that are new beside the old ones, makes the new set
active in one step, and lets go of the old when the last call that runs with it has ended: a forward, and a whole
`generate`, runs with the set it started with. The base model is not touched.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from torch import nn

from ..core.base import check_base
from ..core.checkpoints import Checkpoint, basis_of
from ..core.layer import BundleLayer
from ..core.state import BundleState
from ..model import BundleModel
from .hub import read_source
from .parts import adapter_with, from_model, group_key, join, select, without


def compose(
    base_model: nn.Module, sources: Sequence[str | Path], rename: bool = False, token: str | None = None
) -> PeftModel:
    """One model with the bundles of several folders and repositories, for inference.

    Args:
        base_model: the model they were trained on, without adapters of PEFT's own; bundles are added to it in place.
        sources: `folder`, `repo`, `repo:bundle`, `repo@revision:bundle` (hub.py); one without `:bundle` brings all its
            bundles.
        rename: give a bundle whose name is taken another one (`b_x`, `b_x_2`) instead of refusing.
        token: of the Hub; None is the stored one.

    Returns:
        The PeftModel. `composition(model)` says what it consists of and costs. With bundles of several bases it also
        warns.

    Raises:
        ValueError: no source; a source that is no bundle, damaged or half-written; bundles of another base model or
            another revision of it (the message says what differs); two bundles of one name without `rename`.
    """
    if isinstance(sources, (str, Path)) or not sources:
        raise ValueError(f"sources={sources!r} must be a list of folders and repositories, at least one.")
    if isinstance(base_model, PeftModel):
        raise ValueError("the model has adapters already; add a bundle with load_bundle(model, source).")
    parts: list[Checkpoint] = []
    for source in sources:
        checkpoint, _ = read_source(source, token)
        check_base(checkpoint.config, base_model, str(source))
        for name in checkpoint.names:
            parts.append(select(checkpoint, name, _free(name, parts, checkpoint.source, rename)))
    groups: dict[Any, list[Checkpoint]] = {}
    for part in parts:
        groups.setdefault(group_key(part), []).append(part)
    joined = [join(members) for members in groups.values()]
    config = joined[0].config
    config.inference_mode = True
    kind = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)
    model: Any = kind(base_model, config, "composed_0", low_cpu_mem_usage=True)
    model.base_model.fill("composed_0", joined[0].layers)
    _state(model).use.built = 1
    names = ["composed_0", *(_attach(model, group) for group in joined[1:])]
    model.base_model.set_adapter(names, inference_mode=True)
    if len(groups) > 1:
        warnings.warn(str(composition(model)), stacklevel=2)
    return model.eval()


def _free(name: str, taken: Sequence[Checkpoint], source: str, rename: bool) -> str:
    used = {part.names[0]: part.source for part in taken}
    if name not in used:
        return name
    if not rename:
        raise ValueError(
            f"{source} and {used[name]} both have a bundle {name!r}; pass rename=True (--rename) to name the "
            f"second {name}_2."
        )
    number = 2
    while f"{name}_{number}" in used:
        number += 1
    return f"{name}_{number}"


def load_bundle(
    model: PeftModel, source: str | Path, name: str | None = None, *, replace: bool = False, token: str | None = None
) -> str:
    """Add a bundle to a running model, or put it in the place of another; returns its name.

    Other threads may be generating: their calls end with the bundles they started with. All checks are done before
    the model is touched.

    Args:
        model: a PeftModel with bundles.
        source: of one bundle (hub.py).
        name: what it is called in this model; None is its own name.
        replace: take the place of the bundle of that name, which must be there.
        token: of the Hub.

    Raises:
        ValueError: see `compose`; a source of several bundles; a name that is taken, or with `replace` is not.
    """
    state = _state(model)
    checkpoint, _ = read_source(source, token)
    if len(checkpoint.names) != 1:
        raise ValueError(f"{source} holds the bundles {checkpoint.names}; name one, '{source}:{checkpoint.names[0]}'.")
    check_base(checkpoint.config, model.get_base_model(), str(source))
    part = select(checkpoint, checkpoint.names[0], name)
    name = part.names[0]
    with state.use.swapping:
        there = [b for a in model.active_adapters if a in state.configs for b in state.configs[a].bundles or ()]
        if (name in there) != replace:
            raise ValueError(
                f"there is no bundle {name!r} to replace; there are {there}."
                if replace
                else f"there is a bundle {name!r} already; pass replace=True, or another name."
            )
        _exchange(model, name if replace else None, part)
    return name


def remove_bundle(model: PeftModel, name: str) -> None:
    """Take a bundle out of a running model; see `load_bundle`.

    Raises:
        ValueError: no such bundle, or it is the last one (then set its alpha to 0, or `model.unload()`).
    """
    with _state(model).use.swapping:
        _exchange(model, name, None)


def _state(model: PeftModel) -> BundleState:
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, BundleModel):
        raise ValueError(
            f"{type(model).__name__} is no PeftModel with bundles; make one with compose(base_model, sources) or "
            "get_peft_model(base_model, BundleConfig(...))."
        )
    return tuner._state


def _exchange(model: PeftModel, gone: str | None, new: Checkpoint | None) -> None:
    """Make the next set of adapters beside the one in use, and switch."""
    tuner, state = cast(BundleModel, model.base_model), _state(model)
    active = list(tuner.active_adapters)
    parts = {a: from_model(model, a) for a in active if a in state.configs}
    groups: dict[str, list[Checkpoint]] = {}  # adapter -> what takes its place
    if gone is not None:
        owner = adapter_with(model, gone)
        groups[owner] = [without(parts[owner], gone)] if len(parts[owner].names) > 1 else []
    if new is not None:
        host = next((a for a in parts if group_key(parts[a]) == group_key(new)), None)
        groups.setdefault(host or "", [] if host is None else [parts[host]]).append(new)
    if not any(groups.values()) and len(active) == len(groups):
        raise ValueError(f"{gone!r} is the last bundle; set its alpha to 0, or take all off with model.unload().")
    joined = [join(members) for members in groups.values() if members]
    built = [_attach(model, group) for group in joined]
    following = [a for a in active if a not in groups] + built
    for layer in tuner._layers:
        for what in layer.adapter_layer_names:
            getattr(layer, what).requires_grad_(False)
    with state.use.lock:
        # What PEFT's set_adapter does, without its walk over the model: a call that starts now waits for this.
        for layer in tuner._layers:
            layer._active_adapter = following
        tuner.active_adapter = following
        model.active_adapter = following[0]
        state.use.retired |= groups.keys() & set(active)
    tuner.delete_retired()


def _attach(model: PeftModel, group: Checkpoint) -> str:
    """Add an adapter that no call sees yet; it takes the tensors as they are. Returns its name."""
    use = _state(model).use
    name = next(name for n in itertools.count(use.built) if (name := f"composed_{n}") not in model.peft_config)
    use.built = int(name.rpartition("_")[2]) + 1
    group.config.inference_mode = True
    if {m.index for m in model.modules() if isinstance(m, BundleLayer)} >= group.layers.keys():
        cast(BundleModel, model.base_model).adopt(name, group.config, group.layers)
    else:
        model.add_adapter(name, group.config, low_cpu_mem_usage=True)
        cast(BundleModel, model.base_model).fill(name, group.layers)
    return name


# ---- what a composition consists of ----


@dataclass
class Composition:
    """The groups of a composed model: dicts of adapter, basis (digest), bundles, columns, hidden, basis_bytes."""

    groups: list[dict[str, Any]]

    def __str__(self) -> str:
        lines = [
            f"{g['adapter']}: {', '.join(g['bundles'])} in basis {g['basis'][:12]} ({g['columns']} directions, "
            f"{g['hidden']} hidden units, {g['basis_bytes'] / 2**20:.1f} MiB of basis)"
            for g in self.groups
        ]
        if len(self.groups) > 1:
            extra = sum(g["basis_bytes"] for g in self.groups[1:]) / 2**20
            lines.append(
                f"The bundles were trained in {len(self.groups)} bases. Each further one costs two more matrix "
                f"products a layer and its own basis in memory ({extra:.1f} MiB). Overlap between groups is not "
                "controlled: their bundles may write to the same directions. Measure it with "
                "peft_bundles.orthogonality(model) and peft_bundles.conflicts(model, texts, tokenizer)."
            )
        return "\n".join(lines)

    __repr__ = __str__


def composition(model: PeftModel) -> Composition:
    """Which bundles of a model share a basis, and what each basis costs in memory."""
    state, groups = _state(model), []
    for adapter in model.active_adapters:
        layers = [m for m in model.modules() if isinstance(m, BundleLayer) and adapter in m.bundle_basis]
        if adapter not in state.configs or not layers:
            continue
        packing, bases = layers[0].packing(adapter), [layer.bundle_basis[adapter] for layer in layers]
        groups.append(
            {
                "adapter": adapter,
                "basis": basis_of(from_model(model, adapter))["digest"],
                "bundles": list(packing.names),
                "columns": packing.basis_rank,
                "hidden": len(packing.owner) - packing.padding,
                "basis_bytes": sum(b.numel() * b.element_size() for b in bases),
            }
        )
    return Composition(groups)
