"""FSDP2: a run whose frozen trunk is sharded over two processes is the run of one process with a whole model."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from models import TINY, batch, layers, logits, quietly_loaded, unchanged
from torch import nn
from torch.distributed.tensor import DTensor
from training import (
    Watch,
    arguments,
    bundles_of,
    everywhere,
    greedy,
    losses_of,
    model,
    pairs,
    texts,
    tokenizer,
    two_processes,
)

from peft_bundles.objectives import LM, PPO, Preference
from peft_bundles.trainer import BundleTrainer
from peft_bundles.trainer.sharding import shard


FSDP = {"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}


def length(completions, **_) -> list[float]:
    return [float(len(c)) for c in completions]


def run_of(folder: Path, world: int, **fields) -> BundleTrainer:
    """One objective a step and SGD with momentum: a gradient that is zero where it should be None moves a bundle."""
    prompts = [{"prompt": "a" * n} for n in (3, 1, 5, 2)]
    objectives = [
        LM([*texts(), {"text": "z" * 50}], eval_dataset=texts(5)),
        Preference(pairs(), eval_dataset=pairs(1)),  # fewer rows than processes
        greedy(PPO(prompts, length, entropy_coef=0.01, max_completion_length=4, epochs=2)),
    ]
    args = arguments(
        folder, max_steps=6, per_device_train_batch_size=4 // world, optim="sgd", optim_args="momentum=0.9",
        learning_rate=0.05, mixing="alternate", kl_clamp={"strength": {"lm": 1.0}, "beta": {"b_lm": 1.0}}, **fields,
    )  # fmt: skip
    made = model(calibrated=True, bundles=everywhere())
    return BundleTrainer(made, args, objectives, tokenizer())


def worker(rank: int, folder: str) -> None:
    common = {"ddp_backend": "gloo", "save_strategy": "steps", "save_steps": 3, **FSDP}
    run = run_of(Path(folder), 2, **common)
    run.add_callback(watch := Watch(run))
    run.train()
    run.save_model(f"{folder}/adapter")
    kinds = {n for n, p in run.model.named_parameters() if not isinstance(p, DTensor)}
    ids = batch(2)
    made = run.model.generate(input_ids=ids, do_sample=False, max_new_tokens=2 + 4 * rank, min_new_tokens=2 + 4 * rank)
    torch.save(
        {
            "bundles": bundles_of(run.model),
            "moved": watch.moved(),
            "heads": run.objectives["ppo"].value_head.state_dict(),
            "whole": kinds,
            "log": losses_of(run),
            "eval": run.evaluate(),
            "logits": logits(run.model, ids),
            "generated": made,
            "layers": {type(layer.get_base_layer()).__name__ for layer in layers(run.model)},
        },
        f"{folder}/{rank}.pt",
    )
    again = run_of(Path(folder), 2, **common)
    again.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    torch.save(bundles_of(again.model), f"{folder}/resumed-{rank}.pt")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[Path, dict, dict]:
    """The folder of a run of two processes, and what each of them found."""
    folder = tmp_path_factory.mktemp("sharded")
    return folder, *two_processes(worker, folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> BundleTrainer:
    run = run_of(tmp_path_factory.mktemp("alone"), 1)
    run.train()
    return run


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


@pytest.mark.slow
def test_the_trunk_is_sharded_and_what_trains_is_whole(sharded):
    _, first, _ = sharded
    outside = {n for n, p in model(bundles=everywhere()).named_parameters() if p.requires_grad or ".layers." not in n}
    assert first["whole"] == outside
    assert first["layers"] == {"FSDPLlamaDecoderLayer", "Linear"}  # a linear layer is no unit of its own


@pytest.mark.slow
def test_two_sharded_processes_equal_one(sharded, alone):
    _, first, second = sharded
    assert same(first["bundles"], second["bundles"]) and unchanged(first["heads"], second["heads"])
    expected = bundles_of(alone.model)
    for name, found in first["bundles"].items():
        torch.testing.assert_close(found, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    heads = dict(alone.objectives["ppo"].value_head.state_dict())
    torch.testing.assert_close(first["heads"], heads, rtol=1e-3, atol=1e-5)
    for a, b in zip(first["log"], losses_of(alone), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    found = alone.evaluate()
    for name in ("eval_loss/lm", "eval_loss/preference", "eval_preference/rewards/margin"):
        assert first["eval"][name] == pytest.approx(found[name], rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_a_step_moves_its_owners_alone_on_every_process(sharded):
    """Behind blocks and at linear layers; the bundle without an objective never moves."""
    _, first, second = sharded
    owners = {"b_lm", "l_lm"}, {"b_preference", "l_rest"}, {"b_policy", "b_value", "b_entropy", "b_kl", "l_rest"}
    assert first["moved"] == second["moved"] == [*owners, *owners]


@pytest.mark.slow
def test_what_is_saved_is_a_plain_adapter(sharded):
    folder, first, _ = sharded
    loaded = quietly_loaded(TINY["llama"](), folder / "adapter").eval()
    assert same(bundles_of(loaded), first["bundles"])
    torch.testing.assert_close(logits(loaded, batch(2)), first["logits"], rtol=1e-5, atol=1e-5)
    files = {path.name for path in (folder / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in files and not any("fsdp" in name for name in files)


@pytest.mark.slow
def test_a_resumed_sharded_run_is_the_run(sharded):
    folder, first, _ = sharded
    for rank in (0, 1):
        assert same(torch.load(folder / f"resumed-{rank}.pt"), first["bundles"])


@pytest.mark.slow
def test_processes_may_generate_different_numbers_of_tokens(sharded):
    _, first, second = sharded
    assert [r["generated"].shape[1] for r in (first, second)] == [9 + 2, 9 + 6]
    assert torch.equal(first["generated"], second["generated"][:, :11])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fsdp_version": 1}, r"fsdp_version=1 does not work with bundles; set it to 2"),
        ({"cpu_ram_efficient_loading": True}, r"cpu_ram_efficient_loading=True .* set it to False"),
        ({"cpu_offload": True}, r"cpu_offload=True .* set it to False"),
    ],
)
def test_settings_that_do_not_go_with_bundles_are_refused(settings, message, monkeypatch):
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # accelerate changes it; it is put back after
    plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **settings})
    with pytest.raises(ValueError, match=message):
        shard(model(), plugin, SimpleNamespace())


def test_a_trunk_that_trains_or_is_quantised_is_refused():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    made = model()
    made.get_base_model().model.layers[1].input_layernorm.weight = nn.Parameter(
        torch.ones(64, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"input_layernorm\.weight' is quantised"):
        shard(made, plugin, SimpleNamespace())
    with pytest.raises(ValueError, match="shards frozen blocks, but all weights of the blocks train"):
        shard(model().requires_grad_(True), plugin, SimpleNamespace())
