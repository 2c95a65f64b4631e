"""Finding the bundles of a model: its bundle layers, the state they share, their parameters by bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper

from .layer import BundleLayer
from .places import CHILD
from .recompute import recompute_with_call
from .state import BundleState


@contextmanager
def measured(model: nn.Module, *, bundles: bool = False) -> Iterator[None]:
    """Run the block in eval mode, without gradients and, unless `bundles`, with all bundles off."""
    layers = bundle_layers(model)  # of every adapter: others may sit on other layers
    off, training = [layer._disable_adapters for layer in layers], {m: m.training for m in model.modules()}
    for layer in layers:
        layer._disable_adapters = not bundles
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for layer, before in zip(layers, off):
            layer._disable_adapters = before
        for module, mode in training.items():
            module.training = mode


def down_to_blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model, as `model.modules()`; of a block with bundles only its bundle layers.

    Every step walks the model before its first kernel, while the GPU waits: with 16 blocks 8 us instead of 350.
    """
    seen: set[nn.Module] = set()
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        layer = module._modules.get(CHILD)
        if isinstance(layer, BundleLayer):
            yield from layer.inner.values()
            yield layer
        else:
            yield module
            stack.extend(reversed(module._modules.values()))


def bundle_layers(model: nn.Module) -> list[BundleLayer]:
    """The bundle layers of a model, in order."""
    return [module for module in down_to_blocks(model) if isinstance(module, BundleLayer)]


def basis_layers(model: nn.Module, adapter: str) -> list[BundleLayer]:
    """The bundle layers of the blocks behind which this adapter has bundles, in order."""
    return [layer for layer in bundle_layers(model) if adapter in layer.bundle_basis]


def adapter_layers(model: nn.Module, adapter: str) -> list[BundleLayer]:
    """The bundle layers of a model that have this adapter, in order."""
    return [layer for layer in bundle_layers(model) if layer.holds(adapter)]


def checked_layers(model: nn.Module) -> list[BundleLayer]:
    """The bundle layers of a model, made safe for a forward with its own alphas or route.

    With gradient checkpointing a block may run its hook again in backward, when both are gone. Blocks that transformers
    checkpoints get them back (`recompute_with_call`); blocks wrapped from outside are refused.

    Raises:
        ValueError: the model has no bundle layer, or is merged.
        RuntimeError: gradients are on, and blocks are wrapped by torch's `checkpoint_wrapper`.
    """
    modules = list(down_to_blocks(model))
    layers = [module for module in modules if isinstance(module, BundleLayer)]
    if not layers:
        raise ValueError(_no_bundles(model))
    layers[0].state.check_unmerged()
    if not torch.is_grad_enabled():
        return layers
    # By class: `isinstance` asks the wrapper's abstract base, which takes as long as the walk.
    if any(CheckpointWrapper in type(module).__mro__ for module in modules):
        raise RuntimeError(
            "blocks are wrapped by torch's checkpoint_wrapper (as accelerate does for FSDP), which runs their bundles "
            "again in backward, without this call's alphas and route. Leave the wrapper out and call "
            "model.gradient_checkpointing_enable()."
        )
    recompute_with_call((layer for layer in layers if not layer.site.path), required=True)
    return layers


def state_of(model: nn.Module) -> BundleState:
    """What the bundle layers of a model share, whichever way they were attached.

    Raises:
        ValueError: the model has no bundle layer.
    """
    for module in down_to_blocks(model):
        if isinstance(module, BundleLayer):
            return module.state
    raise ValueError(_no_bundles(model))


def resolve_adapter(model: nn.Module, adapter: str | None = None, *, bundle: str | None = None) -> str:
    """The name of the bundle adapter to use.

    Args:
        model: a model with bundles.
        adapter: its name. None: the only one that the model has; with `bundle`, the only active one that holds it.
        bundle: a bundle that the adapter must hold.

    Raises:
        ValueError: the model has no bundles, no adapter of this name, no such bundle, or several adapters fit.
    """
    configs = state_of(model).configs
    if adapter is not None and adapter not in configs:
        raise ValueError(f"there is no bundle adapter {adapter!r}; the model has {sorted(configs)}; name one of these.")
    names = [adapter] if adapter is not None else list(configs)
    if bundle is not None:
        active = bundle_layers(model)[0].active_adapters
        names = [name for name in names if name in active] if adapter is None else names
        held = {name: list(configs[name].bundles or ()) for name in names}
        names = [name for name in names if bundle in held[name]]
        if not names:
            raise ValueError(f"there is no bundle {bundle!r}; the bundles by adapter are {held}; name one of these.")
    if not names:
        raise ValueError(f"{type(model).__name__} has no bundle adapter any more; attach one first.")
    if len(names) > 1:
        raise ValueError(f"several adapters fit: {sorted(names)}; name one with adapter=.")
    return names[0]


def bundle_parameters(model: nn.Module) -> dict[tuple[str, str], list[nn.Parameter]]:
    """The parameters of every bundle over all layers, by (adapter, bundle)."""
    table: dict[tuple[str, str], list[nn.Parameter]] = {}
    for layer in bundle_layers(model):
        for adapter in layer.bundle_adapters():
            for name in layer.packing(adapter).names:
                table.setdefault((adapter, name), [])
            for weights in layer.tables(adapter):
                for name, parameter in weights.items():
                    table[adapter, name].append(parameter)
    return table


def active_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters that have bundles.

    Raises:
        ValueError: the model has no bundle layer.
    """
    configs = state_of(model).configs
    return [adapter for adapter in bundle_layers(model)[0].active_adapters if adapter in configs]


def _no_bundles(model: nn.Module) -> str:
    return f"{type(model).__name__} has no bundles; attach some with get_peft_model(model, BundleConfig(...))."
