"""DeepSpeed's ZeRO: the run of two processes whose optimizer lies in parts is the run of two with a whole one each."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from models import unchanged
from torch import nn
from training import arguments, bundles_of, losses_of, model, pairs, texts, tokenizer, two_processes
from transformers import TrainerCallback

from peft_bundles.objectives import LM, PPO, Preference
from peft_bundles.trainer import BundleTrainer
from peft_bundles.trainer.sharding import zero_stage
from peft_bundles.trainer.zero import ZeroOptimizer


ZERO = {"deepspeed": {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}}
# All that trains, the trunk too; norms get no gradient from text. SGD: a difference in a gradient keeps its size.
WHOLE = {
    "trunk": "full", "trunk_ranks": {"lm": 3}, "optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.05,
}  # fmt: skip
OWNERS = [{"b_lm"}, {"b_preference"}, {"b_policy", "b_value", "b_entropy", "b_kl"}]  # of the steps, in turn


def length(completions, **_) -> list[float]:
    return [float(len(c)) for c in completions]


class Watch(TrainerCallback):
    """The bundles after every step."""

    def __init__(self, run: BundleTrainer) -> None:
        self.run, self.seen = run, [bundles_of(run.model)]

    def on_step_end(self, *args, **kwargs) -> None:
        self.seen.append(bundles_of(self.run.model))


def run_of(folder: Path, world: int, **fields) -> BundleTrainer:
    """One objective a step, so that in every step most bundles have momentum and get no gradient."""
    prompts = [{"prompt": "a" * n} for n in (3, 1, 5, 2)]
    objectives = [
        LM([*texts(), {"text": "z" * 50}]),
        Preference(pairs()),
        PPO(prompts, length, entropy_coef=0.01, max_completion_length=4, epochs=2, generation={"do_sample": False}),
    ]
    fields = {"learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "linear", **fields}
    args = arguments(
        folder, max_steps=6, per_device_train_batch_size=4 // world, mixing="alternate", save_strategy="steps",
        save_steps=3, lr_multipliers={"b_entropy": 0.1, "ppo": 2.0}, **fields,
    )  # fmt: skip
    return BundleTrainer(model(calibrated=True), args, objectives, tokenizer())


def outcome(run: BundleTrainer) -> dict:
    return {
        "weights": {n: p.detach().clone() for n, p in run.model.named_parameters()},
        "heads": dict(run.objectives["ppo"].value_head.state_dict()),
        "log": losses_of(run),
        "norms": losses_of(run, "grad_norm"),
        "rates": [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry],
    }


def worker(rank: int, folder: str) -> None:
    found = {}
    for name, fields in (("ddp", {}), ("zero", ZERO), ("whole", ZERO | WHOLE)):
        run = run_of(Path(folder) / name, 2, ddp_backend="gloo", **fields)
        run.add_callback(watch := Watch(run))
        run.train()
        found[name] = outcome(run) | {"steps": watch.seen}
        state = run.optimizer.optimizer._inner.state if name != "ddp" else run.optimizer.state
        found[name]["held"] = sum(t.numel() for entry in state.values() for t in entry.values() if t.dim())
    for name in ("zero", "ddp"):
        again = run_of(Path(folder) / "again", 2, ddp_backend="gloo", **ZERO)
        again.train(resume_from_checkpoint=f"{folder}/{name}/checkpoint-3")
        found[f"resumed from {name}"] = outcome(again)
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> tuple[Path, dict, dict]:
    """The folder of the runs of two processes, and what each of them found."""
    folder = tmp_path_factory.mktemp("zero")
    return folder, *two_processes(worker, folder)


def same(a: dict, b: dict) -> bool:
    return unchanged(a["weights"], b["weights"]) and unchanged(a["heads"], b["heads"])


@pytest.mark.slow
def test_zero_is_the_run_without_it(ran):
    """The same arithmetic on the same gradients: bit for bit, with AdamW, decay, a schedule and rates by bundle."""
    _, first, second = ran
    for found in (first, second):
        assert same(found["ddp"], found["zero"])
        assert all(found["ddp"][key] == found["zero"][key] for key in ("log", "norms", "rates"))


@pytest.mark.slow
def test_every_process_holds_a_half_of_the_optimizers_state(ran):
    _, first, second = ran
    whole, halves = first["ddp"]["held"], [found["zero"]["held"] for found in (first, second)]
    assert halves[0] == halves[1] and whole <= sum(halves) < 1.01 * whole  # vectors are padded


@pytest.mark.slow
def test_bundles_without_a_gradient_stay_bitwise_where_they_are_though_they_have_momentum(ran):
    """Steps 4 to 6 are those in which every bundle has been stepped before. Also with a trunk that trains."""
    _, first, _ = ran
    for name in ("zero", "whole"):
        steps = first[name]["steps"]
        for number, (before, after) in enumerate(itertools.pairwise(steps)):
            moved = {b for b in before if not all(map(torch.equal, before[b], after[b]))}
            assert moved == OWNERS[number % 3], (name, number)


@pytest.mark.slow
def test_two_processes_under_zero_equal_one_without_it(ran, tmp_path):
    _, first, second = ran
    assert same(first["whole"], second["whole"])
    run = run_of(tmp_path, 1, **WHOLE)
    run.train()
    alone, found = outcome(run), first["whole"]
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
    torch.testing.assert_close(found["heads"], alone["heads"], rtol=1e-3, atol=1e-5)
    for a, b in zip(found["log"], alone["log"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_checkpoints_are_those_of_a_run_without_it_and_resume_either_way(ran):
    folder, first, second = ran
    ddp, zero = (torch.load(folder / name / "checkpoint-3" / "optimizer.pt") for name in ("ddp", "zero"))
    assert ddp["param_groups"] == zero["param_groups"] and ddp["state"].keys() == zero["state"].keys()
    assert all(unchanged(state, zero["state"][number]) for number, state in ddp["state"].items())
    for found in (first, second):
        for name in ("zero", "ddp"):
            assert same(found[f"resumed from {name}"], found["zero"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, r"stage=3 does not go with bundles.*set it to 1 or 2"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            r"offload_optimizer.device='cpu'",
        ),
        ({"optimizer": {"type": "AdamW"}}, r"optimizer=\{'type': 'AdamW'\} is not read"),
        ({"scheduler": {"type": "WarmupLR"}}, r"scheduler=\{'type': 'WarmupLR'\} is not read"),
        ({"fp16": {"enabled": True}}, r"fp16.enabled=True: .* use bf16"),
        ({"bf16": {"enabled": True}}, r"bf16.enabled=True, but bf16=False among the arguments"),
    ],
)
def test_settings_that_do_not_go_with_bundles_are_refused(settings, message):
    args = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=settings), bf16=False)
    with pytest.raises(ValueError, match=message):
        zero_stage(args, SimpleNamespace(num_processes=2))


def test_one_process_has_nothing_to_share():
    config = {"zero_optimization": {"stage": 2}}
    args = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config), bf16=False)
    assert [zero_stage(args, SimpleNamespace(num_processes=n)) for n in (1, 2)] == [None, 2]


def test_optimizers_and_weights_that_cannot_be_cut_are_refused():
    weight = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    names = {id(weight): "w"}
    with pytest.raises(ValueError, match=r"under ZeRO Adafactor would step parts of vectors"):
        ZeroOptimizer(torch.optim.Adafactor([weight]), names, names, 2)
    with pytest.raises(ValueError, match=r"'w' is torch.bfloat16; under ZeRO what trains must be float32"):
        ZeroOptimizer(torch.optim.AdamW([weight]), names, names, 2)


def test_a_scalar_that_trains_is_cut_and_its_step_is_not(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    scalar = nn.Parameter(torch.tensor(1.0))
    zero = object.__new__(ZeroOptimizer)  # no processes are needed to cut
    zero._parts, zero._zero = [[scalar]], SimpleNamespace(partition_size=[1])
    state = {id(scalar): {"step": torch.tensor(3.0), "exp_avg": torch.tensor(0.1)}}
    assert zero._cut(0, "step", state).shape == () and zero._cut(0, "exp_avg", state).tolist() == pytest.approx([0.1])
