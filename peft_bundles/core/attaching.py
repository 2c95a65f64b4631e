"""Where the tensors of an adapter come from when it is attached: another adapter of the model, or a file."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..config import BundleConfig
from .base import PEFT_PREFIX, other_base
from .basis import SHARED
from .basis_files import of_block, read_basis
from .checkpoints import by_layer, check_digest, check_tensors, named_keys
from .layer import BundleLayer
from .state import Key
from .walking import adapter_layers, state_of


def own_config(model: nn.Module, adapter: str) -> BundleConfig:
    """An adapter's config, made an object of its own: another model may have been attached with the very same one."""
    state, configs = state_of(model), getattr(model, "peft_config", {})
    config = copy.deepcopy(before := state.configs[adapter])
    state.configs[adapter] = config
    if configs.get(adapter) is before:
        configs[adapter] = config
    return config


def borrow_basis(layers: Sequence[BundleLayer], others: Mapping[str, Any], adapter: str, config: BundleConfig) -> None:
    """Give a new adapter the basis that its config names, if another adapter of the model has it.

    Args:
        layers: of the model.
        others: configs of the other adapters by name.
        adapter: the new one.
        config: the one it was attached with. If it is another adapter's very config, that one lends its basis;
            otherwise one with an equal record of the basis and of its calibration.
    """

    def record(c: BundleConfig) -> tuple[Any, ...]:
        return c.basis_fingerprint, c.calibration, c.basis_rank, c.sub_bases

    lenders = [name for name, other in others.items() if other is config] or [
        name for name, other in others.items() if isinstance(other, BundleConfig) and record(other) == record(config)
    ]
    layers = [layer for layer in layers if adapter in layer.bundle_basis]
    if not lenders or any(name not in layer.bundle_basis for name in lenders for layer in layers):
        return
    for layer in layers:  # two calibrations may have the same record
        if not all(torch.equal(layer.bundle_mean[name], layer.bundle_mean[lenders[0]]) for name in lenders):
            return
    for layer in layers:
        layer.copy_basis(adapter, lenders[0])


@contextmanager
def basis_brought(model: nn.Module, adapter: str) -> Iterator[None]:
    """Run a block that loads U from a file. Bases not drawn yet stay empty inside, and are drawn if it fails."""
    layers = [layer for layer in adapter_layers(model, adapter) if adapter in layer.bundle_basis.later]
    drawn = [layer.bundle_basis.later[adapter] for layer in layers]
    for layer, how in zip(layers, drawn):
        layer.bundle_basis[adapter] = torch.empty(how[:2], device=layer.bundle_mean[adapter].device)
    try:
        yield
    except Exception:
        for layer, how in zip(layers, drawn):
            layer.bundle_basis.draw_later(adapter, *how)
        raise


def with_shared_basis(
    model: nn.Module, config: BundleConfig, adapter: str, state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a file, and U, mu and sigma of every block from the file that `basis_source` names, if any.

    Raises:
        ValueError: that file is missing or damaged, or has no basis for a block.
    """
    if config.basis_source is None or not config.bundles:
        return dict(state_dict)
    bases, added = read_basis(config.basis_source)[1], {}
    names = {name: m for name, m in model.named_modules() if isinstance(m, BundleLayer) and adapter in m.bundle_basis}
    prefix = PEFT_PREFIX if any(key.startswith(PEFT_PREFIX) for key in state_dict) else ""
    for name, layer in names.items():
        for what, tensor in of_block(bases, layer.index, config.basis_source).items():
            added[f"{prefix}{name.removeprefix(PEFT_PREFIX)}.{what}"] = tensor
    return {**state_dict, **added}


def check_loaded(
    model: nn.Module,
    config: BundleConfig,
    adapter: str,
    state_dict: Mapping[str, Tensor],
    keys: Mapping[str, Key],
    remapped: dict[str, Tensor],
) -> None:
    """Check that the tensors of a file are what its config says.

    Args:
        model: with the adapter.
        config: of the adapter.
        adapter: its name.
        state_dict: the file, without keys.
        keys: bundle -> its key for routers, from the file.
        remapped: its tensors under the model's keys. A basis that the file does not hold is added.

    Raises:
        ValueError: tensors missing, of another shape, left over, not finite or changed; another basis.
    """
    source = f"the checkpoint of adapter {adapter!r}"
    layers = {name: m for name, m in model.named_modules() if isinstance(m, BundleLayer) and m.holds(adapter)}
    tensors, others = by_layer(state_dict, {name: layer.site for name, layer in layers.items()})
    if others:  # modules that were trained too (`modules_to_save`)
        places = {key.removeprefix(PEFT_PREFIX) for key in model.state_dict()}
        if extra := sorted(set(others) - places):
            raise ValueError(
                f"{source} has {len(extra)} tensors that the model has no place for, first {extra[0]!r}; it "
                "belongs to another base model or another config."
            )
    for name, layer in layers.items():
        if not (
            config.save_basis or config.basis_source or layer.site.path
        ):  # drawn from the seed when the adapter was attached
            basis = remapped[f"{name}.bundle_basis.{adapter}"] = layer.bundle_basis[adapter]
            tensors[layer.site]["bundle_basis"] = basis
        check_linear(layer, adapter, tensors[layer.site], source)
        check_tensors({layer.site: tensors[layer.site]}, config, layer.hidden_size, source)
        layer.state.unchecked.discard((adapter, layer.index))
    check_digest(config, {**state_dict, **named_keys(keys)}, source)


def check_linear(layer: BundleLayer, adapter: str, tensors: Mapping[str, Tensor], source: str) -> None:
    """Refuse tensors of a linear layer that do not fit the one in the model.

    Raises:
        ValueError: other bundles than those that sit there, or another number of features.
    """
    if not layer.site.path:
        return
    shapes = {
        f"{what}.{name}": tuple(weight.shape)
        for what, table in zip(layer.adapter_layer_names, layer.tables(adapter))
        for name, weight in table.items()
    }
    sizes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    if sizes != shapes:
        key = min(key for key in shapes.keys() | sizes.keys() if shapes.get(key) != sizes.get(key))
        raise ValueError(
            f"{source}: linear layer {layer.site} has {key!r} of shape {sizes.get(key)}, but the model and config ask "
            f"for {shapes.get(key)}; it belongs to another base model or another config, or is damaged."
        )


def check_saved(model: nn.Module, config: BundleConfig, adapter: str) -> None:
    """Check that an adapter to be saved has its basis. Forget the record of a base model that has been trained since,
    and of keys that the model does not have: those of another model with the same config.

    Raises:
        ValueError: the adapter lacks the basis that its config names, or its tensors are offloaded.
    """
    for layer in adapter_layers(model, adapter):
        if any(p.is_meta for p in layer.parameters()):
            raise ValueError(
                f"adapter {adapter!r} is on the meta device: accelerate offloads it, or it was never loaded. Save it "
                "before offloading it, or after accelerate.hooks.remove_hook_from_submodules(model)."
            )
        layer.check_basis(adapter)
    if config.basis_source is not None:
        bases = read_basis(config.basis_source)[1]
        for layer in adapter_layers(model, adapter):
            if adapter in layer.bundle_basis:
                kept = of_block(bases, layer.index, config.basis_source)
                if not all(torch.equal(getattr(layer, what)[adapter].cpu().float(), kept[what]) for what in SHARED):
                    raise ValueError(
                        f"basis_source={config.basis_source!r} is not the basis of adapter {adapter!r}; save its own "
                        "with save_basis, or set basis_source=None."
                    )
    keyed = {name for owner, name in state_of(model).keys if owner == adapter}
    config.keys = {name: counts for name, counts in (config.keys or {}).items() if name in keyed} or None
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if config.base_fingerprint and other_base(config.base_fingerprint, base) is not None:
        config.base_fingerprint = None
