"""Put bundles of several sources into one model, and add, replace or remove bundles while the model runs.

Bundles that were trained in the same basis become one adapter and share U, mu and sigma. Bundles of another basis
become another adapter.

To change the set, the new adapters are built next to the old ones and made active in one step. The old ones are deleted
when the last call that uses them has ended. So every forward, and every whole `generate`, runs with the set it started
with. The base model does not change.
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
from ..core.state import BundleState
from ..core.walking import active_adapters, adapter_layers, basis_layers, bundle_layers, resolve_adapter
from ..model import BundleModel
from ..routers.keys import Null
from .hub import read_source
from .parts import from_model, group_key, join, select, without


def compose(
    base_model: nn.Module,
    sources: Sequence[str | Path],
    rename: bool = False,
    token: str | None = None,
    *,
    router: Any = None,
    null: Null | None = None,
) -> PeftModel:
    """Load bundles of several folders and Hub repositories into one model, for inference.

    Args:
        base_model: the model that the bundles were trained on, without PEFT adapters. It is changed in place.
        sources: a list. Each entry is `folder`, `folder:bundle`, `repo`, `repo:bundle`, `repo@revision` or
            `repo@revision:bundle`. Without `:bundle`, all bundles of the source are loaded.
        rename: if two bundles have the same name, call the second `name_2` instead of raising.
        token: Hub token. None: the stored one.
        router: "keys" or a `KeyRouter`: the model chooses which bundles are on (`BundleModel.set_router`). It needs
            `null`. None: all are on, at their alphas.
        null: what `learn_null` measured on this base model, on text that belongs to no bundle.

    Returns:
        A `PeftModel` in eval mode, with all bundles active. `composition(model)` lists them. Bundles of more than one
        basis cost extra; then that list is also given as a warning.

    Raises:
        ValueError: no source; a source that is not a bundle, is damaged or half-written; a bundle of another base model
            or another revision of it (the message says what differs); two bundles of one name without `rename`; with a
            router a bundle without a key, or one whose key wins text that is nobody's.

    Example:
        >>> import copy, tempfile
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, compose, save_bundle
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> trained = get_peft_model(copy.deepcopy(base), BundleConfig(preset="ssl_rl_separate"))
        >>> folder = tempfile.TemporaryDirectory()
        >>> one = save_bundle(trained, "b_rl_policy", f"{folder.name}/one")
        >>> two = save_bundle(trained, "b_ssl_main", f"{folder.name}/two")
        >>> model = compose(base, [one, two])
        >>> model.active_adapters  # one basis, so one adapter
        ['composed_0']
        >>> folder.cleanup()
    """
    if isinstance(sources, (str, Path)) or not sources:
        raise ValueError(
            f"sources={sources!r} is not a list of folders and repositories; give at least one, as [source]."
        )
    if isinstance(base_model, PeftModel):
        raise ValueError("base_model has adapters already; add a bundle with load_bundle(model, source).")
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
    model: Any = kind(base_model, config, "composed_0")
    _fill(model, "composed_0", joined[0])
    _state(model).use.built = 1
    names = ["composed_0", *(_attach(model, group) for group in joined[1:])]
    model.base_model.set_adapter(names, inference_mode=True)
    if len({key[0] for key in groups} - {""}) > 1:
        warnings.warn(str(composition(model)), stacklevel=2)
    if null is not None:
        model.set_null(null)
    model.set_router(router)
    return model.eval()


def _free(name: str, taken: Sequence[Checkpoint], source: str, rename: bool) -> str:
    """The name, or with `rename` the first of name_2, name_3, ... that is free."""
    used = {part.names[0]: part.source for part in taken}
    if name not in used:
        return name
    if not rename:
        raise ValueError(
            f"{source} and {used[name]} both have a bundle {name!r}; pass rename=True (--rename) to call the "
            f"second {name}_2."
        )
    number = 2
    while f"{name}_{number}" in used:
        number += 1
    return f"{name}_{number}"


def load_bundle(
    model: PeftModel, source: str | Path, name: str | None = None, *, replace: bool = False, token: str | None = None
) -> str:
    """Add a bundle to a running model, or replace one.

    Other threads may be generating at the same time: their calls end with the bundles they started with. All checks
    are done before the model is changed.

    Args:
        model: a `PeftModel` with bundles.
        source: of a single bundle, written as in `compose`.
        name: name of the bundle in this model. None: the name it was saved with.
        replace: replace the bundle of that name, which must exist.
        token: Hub token. None: the stored one.

    Returns:
        The name of the bundle in this model.

    Raises:
        ValueError: as in `compose`; a source of several bundles; a name that exists already, or with `replace` does
            not exist.

    Example:
        >>> import copy, tempfile
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, compose, load_bundle, remove_bundle, save_bundle
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> trained = get_peft_model(copy.deepcopy(base), BundleConfig(preset="ssl_rl_separate"))
        >>> folder = tempfile.TemporaryDirectory()
        >>> model = compose(base, [save_bundle(trained, "b_ssl_main", f"{folder.name}/one")])
        >>> load_bundle(model, save_bundle(trained, "b_rl_policy", f"{folder.name}/two"))
        'b_rl_policy'
        >>> remove_bundle(model, "b_ssl_main")
        >>> folder.cleanup()
    """
    state = _state(model)
    state.check_unmerged()  # before the base model is compared, which would look like another one
    checkpoint, _ = read_source(source, token)
    if len(checkpoint.names) != 1:
        raise ValueError(
            f"{source} holds the bundles {checkpoint.names}; name one, e.g. '{source}:{checkpoint.names[0]}'."
        )
    check_base(checkpoint.config, model.get_base_model(), str(source))
    part = select(checkpoint, checkpoint.names[0], name)
    name = part.names[0]
    with state.use.swapping:
        names = [bundle for adapter in active_adapters(model) for bundle in state.configs[adapter].bundles or ()]
        if (name in names) != replace:
            raise ValueError(
                f"there is no bundle {name!r} to replace; name one of {names}, or leave replace out."
                if replace
                else f"there is already a bundle {name!r}; pass replace=True, or another name."
            )
        _exchange(model, name if replace else None, part)
    return name


def remove_bundle(model: PeftModel, name: str) -> None:
    """Remove a bundle from a running model. Calls in other threads end with the bundles they started with.

    Args:
        model: a `PeftModel` with bundles.
        name: of the bundle.

    Raises:
        ValueError: no such bundle, or it is the last one (set its alpha to 0, or call `model.unload()`).

    Example: see `load_bundle`.
    """
    with _state(model).use.swapping:
        _exchange(model, name, None)


def _state(model: PeftModel) -> BundleState:
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, BundleModel):
        raise ValueError(
            f"{type(model).__name__} is not a PeftModel with bundles; build one with compose(base_model, sources) or "
            "get_peft_model(base_model, BundleConfig(...))."
        )
    return tuner._state


def _exchange(model: PeftModel, gone: str | None, new: Checkpoint | None) -> None:
    """Build the next set of adapters while the current one stays in use, then switch."""
    tuner, state = cast(BundleModel, model.base_model), _state(model)
    state.check_unmerged()  # unmerging would take other weights off the base model than were added
    active = list(tuner.active_adapters)
    parts = {adapter: from_model(model, adapter) for adapter in active_adapters(model)}
    groups: dict[str, list[Checkpoint]] = {}  # adapter -> the parts that replace it
    if gone is not None:
        owner = resolve_adapter(model, bundle=gone)
        groups[owner] = [without(parts[owner], gone)] if len(parts[owner].names) > 1 else []
    if new is not None:
        host = next((a for a in parts if group_key(parts[a]) == group_key(new)), None)
        groups.setdefault(host or "", [] if host is None else [parts[host]]).append(new)
    if not any(groups.values()) and len(active) == len(groups):
        raise ValueError(f"{gone!r} is the last bundle; set its alpha to 0, or remove all with model.unload().")
    joined = [join(members) for members in groups.values() if members]
    built = [_attach(model, group) for group in joined]
    following = [a for a in active if a not in groups] + built
    try:
        if state.router is not None:
            state.router.check(state, following)
    except ValueError:
        for name in built:
            tuner.delete_adapter(name)
        raise
    for layer in tuner._layers:
        for what in layer.adapter_layer_names:
            getattr(layer, what).requires_grad_(False)
    with state.use.lock:
        # As PEFT's set_adapter, without its walk over the model: calls that start now wait for this lock.
        for layer in tuner._layers:
            layer._active_adapter = following
        tuner.active_adapter = following
        model.active_adapter = following[0]
        state.use.retired |= groups.keys() & set(active)
    tuner.delete_retired()


def _attach(model: PeftModel, group: Checkpoint) -> str:
    """Add an adapter that is not active yet and uses the given tensors, not copies. Returns its name."""
    use = _state(model).use
    name = next(name for n in itertools.count(use.built) if (name := f"composed_{n}") not in model.peft_config)
    use.built = int(name.rpartition("_")[2]) + 1
    group.config.inference_mode = True
    if {layer.site for layer in bundle_layers(model)} >= group.layers.keys():
        cast(BundleModel, model.base_model).adopt(name, group.config, group.layers)
        _state(model).take_keys(name, group.keys)
    else:
        model.add_adapter(name, group.config)
        _fill(model, name, group)
    return name


def _fill(model: PeftModel, adapter: str, group: Checkpoint) -> None:
    """Give a new adapter its tensors. (PEFT's `low_cpu_mem_usage` would affect modules that other threads make.)"""
    tuner, sites = cast(BundleModel, model.base_model), {layer.site for layer in adapter_layers(model, adapter)}
    if sites != group.layers.keys():
        tuner.delete_adapter(adapter)
        has, asked = ([str(site) if site.path else site.block for site in sorted(of)] for of in (group.layers, sites))
        raise ValueError(
            f"{group.source} has tensors of layers {has}, but its config asks for {asked}; one of its files was "
            "changed, get both again."
        )
    tuner.fill(adapter, group.layers)
    _state(model).take_keys(adapter, group.keys)


# ---- describing a composed model ----


@dataclass
class Composition:
    """The adapters of a composed model; bundles of one adapter share a basis.

    Attributes:
        groups: one dict per adapter. "adapter": its name. "basis": digest of its basis; None if all are at linear
            layers. "bundles": their names.
            "columns": columns of U. "hidden": hidden units of all bundles in a layer. "basis_bytes": memory of U over
            all layers.
    """

    groups: list[dict[str, Any]]

    def __str__(self) -> str:
        bases = [g for g in self.groups if g["basis"] is not None]
        lines = [
            f"{g['adapter']}: {', '.join(g['bundles'])} "
            + (
                f"in basis {g['basis'][:12]} ({g['columns']} directions, {g['hidden']} hidden units, "
                f"{g['basis_bytes'] / 2**20:.1f} MiB of basis)"
                if g in bases
                else f"at linear layers ({g['hidden']} hidden units)"
            )
            for g in self.groups
        ]
        if len(bases) > 1:
            extra = sum(g["basis_bytes"] for g in bases[1:]) / 2**20
            lines.append(
                f"The bundles were trained in {len(bases)} bases. Each basis after the first costs two more "
                f"matrix products per layer, and its own memory ({extra:.1f} MiB in all). Overlap between bundles of "
                "different bases is not controlled: they may write to the same directions. Measure it with "
                "peft_bundles.orthogonality(model) and peft_bundles.conflicts(model, texts, tokenizer)."
            )
        return "\n".join(lines)

    __repr__ = __str__


def composition(model: PeftModel) -> Composition:
    """List which bundles of a model share a basis, and the memory of each basis.

    Args:
        model: a `PeftModel` with bundles. Its active adapters are listed.

    Returns:
        A `Composition`, which prints as one line per adapter.

    Raises:
        ValueError: the model is not a `PeftModel` with bundles.

    Example:
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> from peft_bundles import BundleConfig, composition
        >>> base = AutoModelForCausalLM.from_config(LlamaConfig(hidden_size=32, num_hidden_layers=2,
        ...     num_attention_heads=2, intermediate_size=64, vocab_size=50))
        >>> bundles = {"b_lm": {"rank": 4, "sub_bases": ["a"]}}
        >>> model = get_peft_model(base, BundleConfig(sub_bases={"a": 8}, bundles=bundles))
        >>> (group,) = composition(model).groups
        >>> group["bundles"], group["columns"], group["basis_bytes"]  # 2 layers of 32 x 8 numbers of 4 bytes
        (['b_lm'], 8, 2048)
    """
    _state(model)  # raises for other models
    groups = []
    for adapter in active_adapters(model):
        layers = adapter_layers(model, adapter)
        if not layers:  # an adapter without bundles
            continue
        bases = [layer.bundle_basis[adapter] for layer in basis_layers(model, adapter)]
        groups.append(
            {
                "adapter": adapter,
                "basis": basis_of(from_model(model, adapter))["digest"] if bases else None,
                "bundles": list(_state(model).configs[adapter].bundles or ()),
                "columns": bases[0].shape[1] if bases else 0,
                "hidden": max(len(p.owner) - p.padding for p in (layer.packing(adapter) for layer in layers)),
                "basis_bytes": sum(b.numel() * b.element_size() for b in bases),
            }
        )
    return Composition(groups)
