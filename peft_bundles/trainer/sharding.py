"""FSDP2 and DeepSpeed: frozen weights may be sharded, and the optimizer's state, but weights that train stay whole.

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

from ..core.layer import BundleLayer


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


def zero_stage(args: BundleTrainingConfig, accelerator: Any) -> int | None:
    """1 or 2: the stage of ZeRO that DeepSpeed's settings ask for; None without DeepSpeed, with stage 0 or one process.

    Of the settings only the stage is used: the optimizer and its schedule, clipping and precision are the arguments'.

    Raises:
        ValueError: stage 3, or a setting that would be passed over in silence.
    """
    if (plugin := args.deepspeed_plugin) is None:
        return None
    config = plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2):
        raise ValueError(
            f"DeepSpeed: zero_optimization.stage={stage!r} does not go with bundles, whose weights stay whole; set it "
            "to 1 or 2, or shard the frozen trunk with FSDP2 (recipes/accelerate/fsdp_2.yaml)."
        )
    for field in ("offload_optimizer", "offload_param"):
        if (device := (zero.get(field) or {}).get("device", "none")) not in (None, "none"):
            raise ValueError(
                f"DeepSpeed: zero_optimization.{field}.device={device!r} is not supported; set it to 'none'."
            )
    for field, instead in (("optimizer", "optim, learning_rate, ..."), ("scheduler", "lr_scheduler_type, ...")):
        if field in config:
            raise ValueError(f"DeepSpeed: {field}={config[field]!r} is not read; use the arguments {instead} instead.")
    if config.get("fp16", {}).get("enabled") is True:
        raise ValueError("DeepSpeed: fp16.enabled=True: several backwards do not go through a loss scaler; use bf16.")
    if config.get("bf16", {}).get("enabled") is True and not args.bf16:
        raise ValueError("DeepSpeed: bf16.enabled=True, but bf16=False among the arguments, which is what counts.")
    return stage or None if accelerator.num_processes > 1 else None


def as_whole(accelerator: Any, mixed_precision: str = "no") -> None:
    """Let accelerate treat the run as one with whole models: no second sharding, no engine, nothing of theirs saved.

    Args:
        mixed_precision: of the arguments; under DeepSpeed accelerate leaves autocast to the engine.
    """
    state = copy.copy(accelerator.state)  # its own: all states of a process share one dict
    if state.distributed_type == DistributedType.DEEPSPEED:
        state._mixed_precision, accelerator.native_amp = mixed_precision, mixed_precision == "bf16"
    kind = DistributedType.MULTI_GPU if torch.device(accelerator.device).type == "cuda" else DistributedType.MULTI_CPU
    state.distributed_type = kind if accelerator.num_processes > 1 else DistributedType.NO
    state.fsdp_plugin = None
    accelerator.state = state
