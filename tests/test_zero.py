"""DeepSpeed's ZeRO: the run of two processes whose optimizer lies in parts is the run of two with a whole one each."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import unchanged
from training import arguments, bundles_of, losses_of, model, pairs, texts, tokenizer

from peft_bundles.objectives import LM, PPO, Preference
from peft_bundles.trainer import BundleTrainer


ZERO = {"deepspeed": {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}}
WHOLE = {"trunk": "full", "trunk_ranks": {"lm": 3}}  # norms get no gradient from text


def length(completions, **_) -> list[float]:
    return [float(len(c)) for c in completions]


def run_of(folder: Path, world: int, **fields) -> BundleTrainer:
    """One objective a step, so that in every step most bundles get no gradient while they have momentum."""
    prompts = [{"prompt": "a" * n} for n in (3, 1, 5, 2)]
    objectives = [
        LM([*texts(), {"text": "z" * 50}]),
        Preference(pairs()),
        PPO(prompts, length, entropy_coef=0.01, max_completion_length=4, epochs=2, generation={"do_sample": False}),
    ]
    fields = {"learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "linear", **fields}
    args = arguments(
        folder, max_steps=6, per_device_train_batch_size=4 // world, mixing="alternate", save_strategy="steps",
        save_steps=3, lr_multipliers={"b_kl": 0.1, "ppo": 2.0}, **fields,
    )  # fmt: skip
    return BundleTrainer(model(calibrated=True), args, objectives, tokenizer())


def outcome(run: BundleTrainer) -> dict:
    return {
        "weights": {n: p.detach().clone() for n, p in run.model.named_parameters()},
        "heads": run.objectives["ppo"].value_head.state_dict(),
        "log": losses_of(run),
        "grad_norm": losses_of(run, "grad_norm"),
        "rates": [e["learning_rate"] for e in run.state.log_history if "learning_rate" in e],
    }


def worker(rank: int, folder: str, port: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    found = {}
    for name, fields in (
        ("ddp", {}),
        ("zero", ZERO),
        ("sgd", {**ZERO, **WHOLE, "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05}),
    ):
        run = run_of(Path(folder) / name, 2, ddp_backend="gloo", **fields)
        steps = []
        if name == "zero":
            moved = []
            note, step = run._after_update, run.training_step

            def before(*args, step=step, run=run, moved=moved, **kwargs):
                moved.append(bundles_of(run.model))
                return step(*args, **kwargs)

            run.training_step = before
            steps = moved
            del note
        run.train()
        found[name] = outcome(run)
        if name == "zero":
            found["bundles"] = [*steps, bundles_of(run.model)]
            state = run.optimizer.optimizer.state
            found["elements"] = sum(t.numel() for s in state.values() for t in s.values() if t.dim())
    for name in ("zero", "ddp"):
        again = run_of(Path(folder) / "again", 2, ddp_backend="gloo", **ZERO)
        again.train(resume_from_checkpoint=f"{folder}/{name}/checkpoint-3")
        found[f"resumed from {name}"] = outcome(again)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, dict, dict]:
    """The folder of the runs of two processes, and what each of them found."""
    folder = tmp_path_factory.mktemp("zero")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    mp.spawn(worker, args=(str(folder), port), nprocs=2)
    return folder, *(torch.load(folder / f"{rank}.pt") for rank in (0, 1))


@pytest.mark.slow
def test_zero_is_the_run_without_it(ran):
    """The same arithmetic on the same gradients: bit for bit, under AdamW with decay, a schedule, rates of bundles."""
    _, first, second = ran
    for found in (first, second):
        assert unchanged(found["ddp"]["weights"], found["zero"]["weights"])
        assert unchanged(found["ddp"]["heads"], found["zero"]["heads"])
        for key in ("log", "grad_norm", "rates"):
            assert found["ddp"][key] == found["zero"][key]
