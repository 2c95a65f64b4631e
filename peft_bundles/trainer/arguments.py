"""transformers' training arguments, each of them: what it does in `BundleTrainer`, or why it is refused.

`docs/training-arguments.md` shows these tables.
"""

from __future__ import annotations

import os
from dataclasses import MISSING, fields
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig


AS_THERE = "as in transformers"
TRACKER = "as in transformers, for trackers and cards"
HUB = "as in transformers, for `trainer.push_to_hub()`"
SCRIPTS = "as in transformers: the trainer does not read it, scripts may"

ACTS = {
    "output_dir": "as in transformers; a checkpoint gets its name when it is complete",
    "per_device_train_batch_size": "rows of each objective in a micro-batch (a preference row is a pair); see `rows`",
    "gradient_accumulation_steps": "micro-batches in a step; it does not change the gradient (tokens are weighed)",
    "max_grad_norm": "for every bundle, the trunk and every head separately; see `max_grad_norms`",
    "learning_rate": "of bundles, trunk and heads; see `lr_multipliers`",
    "optim": "as in transformers, but for GaLore, APOLLO, LOMO and AdaLomo, which are refused",
    "num_train_epochs": "passes over the objective that needs most steps for one",
    "bf16": "as in transformers, around every forward of an objective",
    "activation_checkpointing": "as in transformers; alphas and routes of the call hold when blocks run again",
    "activation_checkpointing_kwargs": "as in transformers, but for `use_reentrant=True`, which is refused",
    "gradient_checkpointing": "the older name of `activation_checkpointing`",
    "gradient_checkpointing_kwargs": "the older name of `activation_checkpointing_kwargs`",
    "neftune_noise_alpha": "as in transformers, in every forward with gradients; references have no noise",
    "logging_steps": "as in transformers, default 10; bundles are measured in the step that is logged",
    "disable_tqdm": "as in transformers; the console shows losses and rewards, a tracker gets everything",
    "eval_strategy": "as in transformers, over the held-out rows of the objectives",
    "per_device_eval_batch_size": "held-out rows of each objective in a forward",
    "metric_for_best_model": 'as in transformers, e.g. "eval_loss/lm"',
    "seed": "also seeds rows, dropout, rollouts and the step's draws; resuming needs the same",
    "fsdp": "FSDP2: the frozen trunk is sharded, all that trains is whole",
    "fsdp_config": "as `fsdp`",
    "push_to_hub": 'only with `hub_strategy="end"`',
    "hub_strategy": 'with `push_to_hub` only "end"',
    **dict.fromkeys(("hub_token", "hub_private_repo", "hub_model_id", "hub_revision"), HUB),
    **dict.fromkeys(("report_to", "run_name", "project"), TRACKER),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), TRACKER),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank"), SCRIPTS),
    **dict.fromkeys(
        (
            *("max_steps", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim_args", "weight_decay"),
            *("adam_beta1", "adam_beta2", "adam_epsilon", "tf32", "logging_strategy", "logging_first_step"),
            *("log_on_each_node", "logging_nan_inf_filter", "log_level", "log_level_replica", "eval_steps"),
            *("eval_delay", "eval_on_start", "save_only_model", "save_strategy", "save_steps", "save_on_each_node"),
            *("save_total_limit", "load_best_model_at_end", "greater_is_better"),
            *("restore_callback_states_from_checkpoint", "full_determinism", "use_cpu"),
            *("ddp_backend", "ddp_timeout", "debug", "skip_memory_metrics"),
        ),
        AS_THERE,
    ),
}

LOADER = "its loader holds numbers of micro-batches, no rows"
ROWS = "the rows of a step are a function of its number, the seed and the objective"
DDP = "it reduces the gradients of bundles itself, without DDP's wrapper"
LOSSES = "its losses are those of the objectives"
EVALUATION = "evaluate() gives the means of the objectives' losses and metrics, and keeps no predictions"
COMPILE = "it does not compile the model"

# Field -> why only its default is taken. Refused rather than ignored: a run must be what its arguments say.
REFUSED = {
    "deepspeed": "DeepSpeed gives bundles without a gradient one of zero, and momentum moves them; use DDP or FSDP2",
    "fp16": "a gradient scaler cannot handle several backwards per step; use bf16=True",
    "fp16_full_eval": "evaluation runs in the dtypes of training",
    "bf16_full_eval": "evaluation runs in the dtypes of training; with bf16=True it is autocast too",
    "label_smoothing_factor": LOSSES,
    "average_tokens_across_devices": "a token weighs the same on all processes, always",
    "optim_target_modules": "it is for GaLore and APOLLO, whose parameter groups are not those of bundles",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), COMPILE),
    "use_liger_kernel": "its losses read logits and hidden states of the model's own forward",
    "liger_kernel_config": "it takes no Liger kernels",
    "use_cache": "a training forward has no cache; generation always has one",
    "torch_empty_cache_steps": "its step has several forwards and backwards; empty the cache in a callback",
    "auto_find_batch_size": "the rows of a step must be known before it; give per_device_train_batch_size",
    "include_num_input_tokens_seen": "the log has tokens_per_second instead",
    **dict.fromkeys(
        (
            *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
            *("include_for_metrics", "batch_eval_metrics", "label_names"),
        ),
        EVALUATION,
    ),
    "enable_jit_checkpoint": "checkpoints are complete or absent; use save_steps",
    "hub_always_push": "it pushes at the end, when you call trainer.push_to_hub()",
    "ignore_data_skip": ROWS,
    "data_seed": f"{ROWS}; give seed",
    **dict.fromkeys(("train_sampling_strategy", "length_column_name"), ROWS),
    "remove_unused_columns": "objectives take the columns that they need, and reward functions get all others",
    **dict.fromkeys(
        (
            *("accelerator_config", "dataloader_drop_last", "dataloader_num_workers", "dataloader_pin_memory"),
            *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
            "dataloader_in_order",
        ),
        LOADER,
    ),
    "parallelism_config": "DDP and FSDP2 are the ways that it runs on several GPUs",
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"), DDP
    ),
}
NOTHING = (None, False, "no")
# Values that transformers sets itself, so that `dataclasses.replace` of checked arguments is not refused.
OF_TRANSFORMERS: dict[str, Any] = {
    "accelerator_config": AcceleratorConfig(),
    "dataloader_pin_memory": False,
    "dataloader_multiprocessing_context": "fork",
}
OPTIMIZERS = ("galore", "apollo", "lomo")  # need parameter groups or an optimizer step of their own


def default_of(name: str) -> Any:
    """The default of one of transformers' training arguments."""
    (field,) = (field for field in fields(TrainingArguments) if field.name == name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def refuse_without_effect(args: Any) -> None:
    """Raises ValueError if an argument of `REFUSED` is given; called before transformers changes any."""
    for name, reason in REFUSED.items():
        value, default = getattr(args, name), default_of(name)
        off = value in NOTHING and default in NOTHING
        if not off and value not in (default, OF_TRANSFORMERS.get(name, default)):
            raise ValueError(f"{name}={value!r} is not supported by BundleTrainer: {reason}. Leave {name} out.")
    for variable, name in (("ACCELERATE_USE_DEEPSPEED", "deepspeed"), ("ACCELERATE_DYNAMO_BACKEND", "torch_compile")):
        if os.environ.get(variable, "no").lower() not in ("no", "false", "0", ""):
            raise ValueError(
                f"accelerate's launch sets {name} ({variable}={os.environ[variable]!r}), which is not supported by "
                f"BundleTrainer: {REFUSED[name]}. Launch with recipes/accelerate/ddp_2.yaml or fsdp_2.yaml."
            )
    if any(kind in str(getattr(args.optim, "value", args.optim)) for kind in OPTIMIZERS):
        raise ValueError(f"optim={str(args.optim)!r} is not supported by BundleTrainer; use e.g. 'adamw_torch_fused'.")
    if args.push_to_hub and str(getattr(args.hub_strategy, "value", args.hub_strategy)) != "end":
        raise ValueError(
            f"push_to_hub=True with hub_strategy={str(getattr(args.hub_strategy, 'value', args.hub_strategy))!r} would "
            "upload checkpoints that are not complete; set hub_strategy='end' and call trainer.push_to_hub()."
        )
