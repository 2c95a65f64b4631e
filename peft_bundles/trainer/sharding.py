"""FSDP2: the frozen blocks are sharded, and weights that train stay whole.

FSDP reduces gradients of sharded parameters in hooks that a routed backward does not run, and fills them with zeros
where they must be None. So bundles, and whatever else trains, are left out of the sharding. The step, clipping, the
optimizer and the checkpoints are those of a run with whole models; a checkpoint can be resumed with or without FSDP.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from ..core.walking import bundle_layers


if TYPE_CHECKING:
    from .config import BundleTrainingConfig


def fsdp_plugin(args: BundleTrainingConfig, accelerator: Any) -> FullyShardedDataParallelPlugin | None:
    """accelerate's settings for FSDP, from `args.fsdp` or its launcher; None without FSDP or with one process.

    They are read here because accelerate drops them on CPUs.
    """
    if accelerator.num_processes == 1:
        return None
    if args.fsdp_plugin_args is not None:
        return FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    return FullyShardedDataParallelPlugin() if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else None


def shard(model: PeftModel, plugin: FullyShardedDataParallelPlugin, accelerator: Any) -> None:
    """Shard the frozen weights of the blocks that have bundles, in place; each block is a unit.

    Args:
        model: with bundles. The frozen blocks may be on any device; everything else is moved to accelerate's device.
        plugin: its `reshard_after_forward` and `activation_checkpointing` are used. Mixed precision is autocast's, as
            without sharding.

    Raises:
        ValueError: another FSDP version, a setting that does not work with bundles, a trunk that trains or is
            quantised.
    """
    for field, value, required in (
        ("fsdp_version", plugin.fsdp_version, 2),
        ("cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, False),
        ("cpu_offload", isinstance(plugin.cpu_offload, CPUOffloadPolicy), False),
    ):
        if value != required:
            raise ValueError(f"FSDP: {field}={value!r} does not work with bundles; set it to {required!r}.")
    base: Any = model.get_base_model()
    layers = bundle_layers(base)
    blocks = [layer.get_base_layer() for layer in layers if not layer.site.path]
    of_bundles = {p for layer in layers for p in layer.parameters()}
    frozen = {
        p: name
        for block in blocks
        for name, p in block.named_parameters()
        if p not in of_bundles and not p.requires_grad
    }
    if not frozen:
        raise ValueError(
            "FSDP shards frozen blocks, but all weights of the blocks train; use trunk='frozen', or leave FSDP out."
        )
    if quantised := next((name for p, name in frozen.items() if not p.is_floating_point()), None):
        raise ValueError(
            f"FSDP: {quantised!r} is quantised; load the base model in a floating dtype, or leave FSDP out."
        )
    if plugin.activation_checkpointing:
        # accelerate would wrap whole blocks. Their hooks would run again in the backward, when the route is closed.
        base.activation_checkpointing_enable({"use_reentrant": False})
    # Embeddings, the last norm and the LM head stay whole too. A loss may start at the final state (a value head's
    # does). Its backward passes through no output of the model, so FSDP would not gather their weights.
    whole = set(base.parameters()) - set(frozen)
    for parameter in whole:
        parameter.data = parameter.data.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward, ignored_params=whole)
    fully_shard(base, mesh=mesh, ignored_params=whole)  # shards nothing more, but lets the blocks share streams
    base._is_fsdp_managed_module = True  # for transformers: generate until all processes are done


def treat_as_whole(accelerator: Any) -> None:
    """Let accelerate treat the run as one with whole models: it neither shards again nor saves anything."""
    state = copy.copy(accelerator.state)  # a state of this run: all states of a process share one dict
    kind = DistributedType.MULTI_GPU if torch.device(accelerator.device).type == "cuda" else DistributedType.MULTI_CPU
    state.distributed_type = kind if accelerator.num_processes > 1 else DistributedType.NO
    state.fsdp_plugin = None
    accelerator.state = state
