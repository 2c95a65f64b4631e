"""Does a run of two processes give what one process gives? DDP and FSDP2, on the same rows; one JSON.

    torchrun --nproc_per_node 2 benchmarks/distributed_check.py --output benchmarks/results/distributed_check.json
    torchrun --nproc_per_node 2 benchmarks/distributed_check.py --backend gloo --size tiny --output FILE   # two CPUs

A Llama of random weights (that of SmolLM2-135M, or a tiny one) learns from text and preference pairs, in float32 and
by SGD with momentum, where a difference in gradients stays a difference of that size (Adam would blow up those of
gradients near 0). Every process first makes the run of one process by itself, then both make the others together.

Checked, and exit status 1 where it does not hold: the bundles of both processes are equal bit for bit; they differ from
those of one process by rounding alone; bundles that no loss owns are the bits they were, though momentum would move
them with a gradient of zero; under FSDP2 each process holds a half of every frozen block.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import get_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from training import config, pairs, texts, tokenizer

from peft_bundles.core.walking import bundle_parameters
from peft_bundles.objectives import LM, Preference
from peft_bundles.trainer import BundleTrainer, BundleTrainingConfig
from studies.records import made_by, write


SHAPES = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128},
    "135m": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "intermediate_size": 1536},
}
OWNERS = {"b_lm", "b_preference"}
ROWS = 8  # of each objective in a step, over all processes
TOLERANCE = 1e-3  # of a bundle's movement: rounding of sums over rows and processes, grown over some steps


def base_model(size: str) -> Any:
    heads = SHAPES[size]["num_attention_heads"]
    shape = transformers.LlamaConfig(**SHAPES[size], num_key_value_heads=max(heads // 3, 1), vocab_size=100)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32)


def bundles_of(model: Any) -> dict[str, Tensor]:
    """Bundle -> all its weights in one vector, on the CPU."""
    return {
        name: torch.cat([p.detach().flatten() for p in parameters]).cpu()
        for (_, name), parameters in bundle_parameters(model).items()
    }


def run(size: str, world: int, steps: int, **fields: Any) -> dict[str, Any]:
    """Train; what the bundles were and are, the losses, the seconds of training, the trunk's bytes on this process."""
    model: Any = get_peft_model(base_model(size), config())
    generator = torch.Generator().manual_seed(1)
    for parameters in bundle_parameters(model).values():  # away from the zeros that a fresh adapter starts with
        for p in parameters:
            p.data += 0.1 * torch.randn(p.shape, generator=generator)
    before = bundles_of(model)
    with tempfile.TemporaryDirectory() as folder:
        args = BundleTrainingConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=ROWS // world,
            learning_rate=0.1,
            lr_scheduler_type="constant",
            optim="sgd",
            optim_args="momentum=0.9",
            max_grad_norm=1.0,
            logging_steps=1,
            bf16=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **fields,
        )
        trainer = BundleTrainer(model, args, [LM(texts(40)), Preference(pairs(40))], tokenizer())
        trainer.remove_callback(transformers.PrinterCallback)
        begun = time.perf_counter()
        trainer.train(resume_from_checkpoint=False)
    trunk = [p for n, p in model.named_parameters() if ".layers." in n and ".bundle_" not in n]
    local = [p.to_local() if isinstance(p, DTensor) else p for p in trunk]
    return {
        "before": before,
        "after": bundles_of(model),
        "loss": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "seconds": round(time.perf_counter() - begun, 2),
        "processes": trainer.args.world_size,
        "local_block_bytes": sum(p.numel() * p.element_size() for p in local),
    }


def forget_state() -> None:
    """accelerate keeps the kind of a run for the life of a process."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def compare(found: dict[str, Any], alone: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Between the processes, against one process, and what must not have moved."""
    ranks_equal = True
    for vector in found["after"].values():
        first = vector.to(device)
        dist.broadcast(first, src=0)
        ranks_equal &= torch.equal(first.cpu(), vector)
    equal = torch.tensor(int(ranks_equal), device=device)
    dist.all_reduce(equal, op=dist.ReduceOp.MIN)
    difference = {}
    for name in sorted(OWNERS):
        moved = (alone["after"][name] - alone["before"][name]).norm()
        difference[name] = float((found["after"][name] - alone["after"][name]).norm() / moved)
    others = {n: torch.equal(found["after"][n], found["before"][n]) for n in found["after"] if n not in OWNERS}
    return {
        "processes": found["processes"],
        "ranks_bit_identical": bool(equal),
        "difference_to_one_process_by_its_movement": difference,
        "off_owner_bundles_bitwise_unchanged": others,
        "loss": found["loss"],
        "seconds": found["seconds"],
        "local_block_bytes": found["local_block_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--backend", choices=["nccl", "gloo"], default="nccl")
    parser.add_argument("--size", choices=list(SHAPES), default="135m")
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    begun = time.perf_counter()
    cpu = args.backend == "gloo"
    launched = {key: os.environ.pop(key) for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    rank, local = int(launched["RANK"]), int(launched["LOCAL_RANK"])
    if not cpu:  # a GPU each, before anything has looked: transformers would use all it sees in the run of one process
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = given.split(",")[local] if given else str(local)
        launched["LOCAL_RANK"] = "0"
    device = torch.device("cpu" if cpu else "cuda")

    alone = run(args.size, 1, args.steps, use_cpu=cpu)
    forget_state()
    os.environ |= launched
    fields = {"use_cpu": cpu, "ddp_backend": args.backend}
    found = {}
    for name, more in (
        ("ddp", {}),
        ("fsdp2", {"fsdp": True, "fsdp_config": {"reshard_after_forward": True}}),
    ):
        found[name] = compare(run(args.size, 2, args.steps, **fields, **more), alone, device)
        AcceleratorState._reset_state()
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it for the life of a process
    whole = alone["local_block_bytes"]
    checks = {
        f"{name}: {what}": holds
        for name, r in found.items()
        for what, holds in (
            ("two processes", r["processes"] == 2),
            ("ranks bit-identical", r["ranks_bit_identical"]),
            ("equal to one process", max(r["difference_to_one_process_by_its_movement"].values()) < TOLERANCE),
            ("off-owner bundles unchanged", all(r["off_owner_bundles_bitwise_unchanged"].values())),
            (
                "blocks sharded" if name == "fsdp2" else "blocks whole",
                r["local_block_bytes"] == whole // (1 + (name == "fsdp2")),
            ),
        )
    }
    record = {
        **made_by(" ".join(["torchrun --nproc_per_node 2", *sys.argv]), "trl", "accelerate"),
        "device": "cpu" if cpu else f"2 x {torch.cuda.get_device_name()}",
        "backend": dist.get_backend(),
        "size": args.size,
        "one_process": {"loss": alone["loss"], "seconds": alone["seconds"], "local_block_bytes": whole},
        **found,
        "tolerance": TOLERANCE,
        "checks": checks,
        "seconds": round(time.perf_counter() - begun, 1),
    }
    if rank == 0:
        write(args.output, record)
        print(json.dumps(record, indent=1))
    dist.destroy_process_group()
    sys.exit(0 if all(checks.values()) else 1)


if __name__ == "__main__":
    main()
