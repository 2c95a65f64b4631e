"""A sharded trunk: FSDP2 on what is frozen, while what trains stays whole on every process.

Gradients of sharded parameters are reduced by hooks that a routed backward does not run, and would be zeros where they
must be None. So bundles, and whatever else trains, are left out of the sharding: the step, clipping, the optimizer and
the checkpoints are those of a run with whole models, and checkpoints can be resumed with or without FSDP.
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

from ..layer import BundleLayer


if TYPE_CHECKING:
    from .config import BundleTrainingConfig


def fsdp_plugin(args: BundleTrainingConfig, accelerator: Any) -> FullyShardedDataParallelPlugin | None:
    """accelerate's settings for FSDP, from `args.fsdp` or its launcher; None without FSDP or with one process.

    Read anew: on CPUs accelerate takes them and forgets them.
    """
    if accelerator.num_processes == 1:
        return None
    if args.fsdp_plugin_args is not None:
        return FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    return FullyShardedDataParallelPlugin() if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else None


def shard(model: PeftModel, plugin: FullyShardedDataParallelPlugin, accelerator: Any) -> None:
    """Shard the base model's frozen blocks in place, those that have bundles, each a unit.

    Args:
        model: with bundles; the trunk on any device, what trains is moved to accelerate's.
        plugin: of its settings `reshard_after_forward` and `activation_checkpointing` are used. Mixed precision is
            autocast's, as without sharding.

    Raises:
        ValueError: another FSDP version, a setting that does not go with bundles, a trunk that trains or is quantised.
    """
    for field, value, wanted in (
        ("fsdp_version", plugin.fsdp_version, 2),
        ("cpu_ram_efficient_loading", plugin.cpu_ram_efficient_loading, False),
        ("cpu_offload", isinstance(plugin.cpu_offload, CPUOffloadPolicy), False),
    ):
        if value != wanted:
            raise ValueError(f"FSDP: {field}={value!r} does not go with bundles; set it to {wanted!r}.")
    base: Any = model.get_base_model()
    layers = [m for m in base.modules() if isinstance(m, BundleLayer)]
    blocks = [layer.get_base_layer() for layer in layers]
    ours = {p for layer in layers for p in layer.parameters()}
    frozen = {p: n for block in blocks for n, p in block.named_parameters() if p not in ours and not p.requires_grad}
    if not frozen:
        raise ValueError("FSDP shards frozen blocks, and here everything trains; use trunk='frozen', or no FSDP.")
    if quantised := next((n for p, n in frozen.items() if not p.is_floating_point()), None):
        raise ValueError(f"FSDP: {quantised!r} is quantised; take a base model in a floating dtype, or no FSDP.")
    if plugin.activation_checkpointing:
        # accelerate would wrap whole blocks, whose hooks then run again in backward, when their route is closed.
        base.activation_checkpointing_enable({"use_reentrant": False})
    # Embeddings, the last norm and the head stay whole too: a loss may start at the final state (a value head), and
    # the backward of such a loss passes no output of the model that would have its weights gathered.
    whole = set(base.parameters()) - set(frozen)
    for parameter in whole:
        parameter.data = parameter.data.to(accelerator.device)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward, ignored_params=whole)
    fully_shard(base, mesh=mesh, ignored_params=whole)  # has nothing to shard, and lets the blocks share streams
    base._is_fsdp_managed_module = True  # transformers' own mark: processes generate until all of them are done


def as_whole(accelerator: Any) -> None:
    """Let accelerate treat the run as one with whole models: no second sharding, nothing of FSDP's saved."""
    state = copy.copy(accelerator.state)  # its own: all states of a process share one dict
    kind = DistributedType.MULTI_GPU if torch.device(accelerator.device).type == "cuda" else DistributedType.MULTI_CPU
    state.distributed_type, state.fsdp_plugin = kind, None
    accelerator.state = state
