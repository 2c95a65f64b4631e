"""PPO: rollouts, what is computed from them, who is updated, and that it finds the reward."""

import math

import pytest
import torch
from models import EOS, TINY, perturb
from peft import get_peft_model
from training import arguments, bundles_of, chat, config, greedy, losses_of, model, pairs, texts, tokenizer, trainer

from peft_bundles.objectives import LM, PPO, Forward, Preference
from peft_bundles.objectives.tokens import token_logprobs
from peft_bundles.trainer import BundlePPOTrainer


PROMPTS = [{"prompt": f"{i}:", "answer": str(i)} for i in range(8)]
SMALL = {"max_completion_length": 5, "entropy_coef": 0.01, "epochs": 2}


def length(completions, **_) -> list[float]:
    return [float(len(c)) for c in completions]


def vowels(completions, **_) -> list[float]:
    return [float(sum(c.count(v) for v in "aeiou")) for c in completions]


def rollout_of(run, objective: PPO, step: int = 0) -> dict:
    (batch,) = objective.batches(run.forward, step, run.share(objective.name))
    return batch


# ---- rollouts ----


def test_what_a_rollout_holds(tmp_path):
    objective = PPO(PROMPTS, [length, vowels], reward_weights=[1.0, -0.5], missing_eos_penalty=3.0, **SMALL)
    run = trainer(tmp_path, objective, per_device_train_batch_size=6)
    with torch.no_grad():
        objective.value_head.bias.fill_(0.25)
    batch = rollout_of(run, objective)
    ids, mask = batch["input_ids"], batch["completion_mask"].bool()
    tok = tokenizer()
    completions = [row[m] for row, m in zip(ids, mask)]
    reward = [
        len(t) - 0.5 * sum(t.count(v) for v in "aeiou") - 3.0 * (c[-1].item() != EOS)
        for c in completions
        for t in tok.batch_decode([c], skip_special_tokens=True)
    ]
    assert batch["metric.reward"].item() == pytest.approx(sum(reward) / 6, rel=1e-5)
    # one forward of all rows gives what was recomputed chunk by chunk
    now = run.forward.current("ppo", batch)
    kept = mask[:, 1:]
    torch.testing.assert_close(token_logprobs(now.logits, ids)[kept], batch["old_logprobs"][kept])
    reference = run.forward.reference(batch)
    torch.testing.assert_close(token_logprobs(reference.logits, ids)[kept], batch["ref_logprobs"][kept])
    torch.testing.assert_close(batch["old_values"][kept], torch.full((int(kept.sum()),), 0.25))
    advantages = batch["advantages"][kept]
    torch.testing.assert_close((advantages.mean(), advantages.std()), (torch.tensor(0.0), torch.tensor(1.0)))
    assert not batch["advantages"][~kept].any()
    # gamma 1 and values that are equal everywhere: the return of the last token is the reward
    last = torch.stack([batch["returns"][i][m].flip(0)[0] for i, m in enumerate(kept)])
    torch.testing.assert_close(last, torch.tensor(reward))


def test_completions_are_those_of_generate_and_end_at_the_end_token(tmp_path):
    """Greedy, prompts of different length: what a row gets does not depend on the rows beside it."""
    rows = [{"prompt": "a" * n} for n in (1, 9, 4)]
    objective = greedy(PPO(rows, length, **SMALL))
    run = trainer(tmp_path, objective, per_device_train_batch_size=3)
    batch = rollout_of(run, objective)
    for row, attention, mask in zip(
        batch["input_ids"], batch["attention_mask"].bool(), batch["completion_mask"].bool()
    ):
        prompt = row[attention & ~mask][None]
        with torch.no_grad():
            alone = run.model.eval().generate(input_ids=prompt, max_new_tokens=5, do_sample=False)[0]
        assert row[attention].tolist() == alone.tolist()[: int(attention.sum())]
        assert EOS not in row[mask].tolist()[:-1]


def test_reward_functions_get_what_trl_gives_them(tmp_path):
    seen = {}

    def spy(prompts, completions, completion_ids, answer, **kwargs):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, answer=answer, **kwargs)
        return [None if a == answer[0] else 1.0 for a in answer]

    def other(completions, **_):
        return [2.0] * len(completions)

    rows = [{"prompt": chat([("user", p["prompt"])]), "answer": p["answer"]} for p in PROMPTS]
    objective = PPO(rows, [spy, other], num_generations=2, advantages="rloo", **SMALL)
    run = trainer(tmp_path, objective, per_device_train_batch_size=4)
    batch = rollout_of(run, objective)
    assert seen.keys() == {"prompts", "completions", "completion_ids", "answer"}
    assert seen["answer"][0] == seen["answer"][1] and seen["answer"][0] != seen["answer"][2]
    assert seen["prompts"][0] == chat([("user", f"{seen['answer'][0]}:")])
    assert [c[0]["role"] for c in seen["completions"]] == ["assistant"] * 4
    assert batch["metric.reward"].item() == pytest.approx(2.5)  # None does not count


def test_epochs_and_minibatches_use_every_row_of_one_rollout_equally(tmp_path):
    objective = PPO(PROMPTS, length, max_completion_length=4, epochs=2, minibatches=3)
    run = trainer(tmp_path, objective, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    share, seen, rollouts = run.share("ppo"), [], []
    for step in range(7):
        batches = objective.batches(run.forward, step, share)
        assert len(batches) == 2 and all(len(b["input_ids"]) == 2 for b in batches)
        rollouts.append(id(objective._rollout))
        seen.append(
            [tuple(ids[mask > 0].tolist()) for b in batches for ids, mask in zip(b["input_ids"], b["attention_mask"])]
        )
    assert len(set(rollouts[:6])) == 1 and rollouts[6] != rollouts[0]
    first, second = ([row for step in part for row in step] for part in (seen[:3], seen[3:6]))
    assert first != second and sorted(first) == sorted(second) and len(set(first)) == 12


def test_sampling_depends_on_the_step_and_leaves_other_random_numbers_alone(tmp_path):
    objective = PPO(PROMPTS, length, **SMALL)
    run = trainer(tmp_path, objective, per_device_train_batch_size=4)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    first = rollout_of(run, objective, 0)["input_ids"]
    assert torch.equal(torch.rand(3), expected)
    objective._index = -1
    assert torch.equal(rollout_of(run, objective, 0)["input_ids"], first)
    other = rollout_of(run, objective, 2)["input_ids"]
    assert other.shape != first.shape or not torch.equal(other, first)


# ---- losses and routing ----


def test_the_first_step_of_a_rollout_is_at_ratio_1(tmp_path):
    objective = PPO(PROMPTS, length, **SMALL)
    run = trainer(tmp_path, objective, per_device_train_batch_size=6)
    batch = rollout_of(run, objective)
    losses, metrics = objective.losses(run.forward({"ppo": batch})["ppo"], batch)
    kept = batch["completion_mask"][:, 1:].bool()
    assert losses["policy"].item() == pytest.approx(-batch["advantages"][kept].mean().item(), abs=1e-5)
    assert metrics["clip_fraction"] == 0 and metrics["kl_to_old"].abs() < 1e-6
    assert losses.keys() == {"policy", "value", "entropy", "kl"}
    assert metrics["entropy"].item() == pytest.approx(-losses["entropy"].item() / 0.01, rel=1e-5)
    assert metrics["kl"] > 0  # the bundles have moved away from the base model


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_loss_moves_its_own_bundle_and_the_value_head(tmp_path, checkpointing):
    made = model()
    before = bundles_of(made)
    objectives = [LM(texts()), PPO(PROMPTS, length, **SMALL), Preference(pairs())]
    run = trainer(tmp_path, objectives, made, max_steps=4, activation_checkpointing=checkpointing)
    run.train()
    after = bundles_of(made)
    assert {n for n in before if not all(torch.equal(a, b) for a, b in zip(before[n], after[n]))} == set(before)
    assert objectives[1].value_head.weight.abs().sum() > 0
    logged = run.state.log_history[0]
    for name in ("lm", "preference", "ppo/policy", "ppo/value", "ppo/entropy", "ppo/kl"):
        assert math.isfinite(logged[f"loss/{name}"])
    assert {
        f"ppo/{k}" for k in ("reward", "kl", "entropy", "completion_length", "ended", "reward/length")
    } <= logged.keys()


@pytest.mark.parametrize("signal", ["policy", "value", "entropy", "kl"])
def test_a_bundle_gets_the_gradient_of_its_own_loss(tmp_path, signal):
    """SGD, one step: the bundle moves by -lr times the gradient of that loss alone."""
    made, plain = (perturb(get_peft_model(TINY["llama"](initializer_range=0.2), config()), scale=0.3) for _ in range(2))
    objective = PPO(PROMPTS, length, kl_coef=0.5, **{**SMALL, "entropy_coef": 0.5})
    run = trainer(tmp_path, objective, made, optim="sgd", max_steps=1, max_grad_norm=0.0, learning_rate=1e-2)
    with torch.no_grad():
        objective.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
    head = objective.value_head.weight.detach().clone()
    run.train()
    assert not torch.equal(objective.value_head.weight, head)
    objective.value_head.weight.data.copy_(head), objective.value_head.bias.data.zero_()
    batch = rollout_of(run, objective)
    unrouted = Forward(plain, {}, {})._run(batch["input_ids"], batch["attention_mask"])
    losses, _ = objective.losses(unrouted, batch)
    own = plain.bundle_parameters(f"b_{signal}")
    gradients = torch.autograd.grad(losses[signal], own)
    assert max(g.abs().max() for g in gradients) > 1e-4
    for p, q, g in zip(made.bundle_parameters(f"b_{signal}"), own, gradients):
        torch.testing.assert_close(p.data - q.data, -1e-2 * g, rtol=1e-3, atol=1e-7)


def test_lm_with_the_rl_bundles_off_is_lm_alone_bit_for_bit(tmp_path):
    """The promise of the forward table, with dropout, so that random numbers would tell."""
    alone, both = model(dropout=0.2), model(dropout=0.2)
    common = {"forward": {"lm": ["b_lm"]}, "shared_forward": False, "max_steps": 5}
    trainer(tmp_path, LM(texts()), alone, **common).train()
    trainer(tmp_path, [PPO(PROMPTS, length, **SMALL), LM(texts())], both, **common).train()
    a, b = bundles_of(alone), bundles_of(both)
    assert all(torch.equal(x, y) for x, y in zip(a["b_lm"], b["b_lm"]))
    assert not all(torch.equal(x, y) for x, y in zip(a["b_policy"], b["b_policy"]))


@pytest.mark.parametrize("advantages", ["grpo", "rloo"])
def test_group_advantages_need_no_critic(tmp_path, advantages):
    made = model()
    before = bundles_of(made)["b_value"]
    objective = PPO(PROMPTS, length, advantages=advantages, num_generations=2, kl_in="reward", kl_estimator="k1",
                    max_completion_length=5)  # fmt: skip
    run = trainer(tmp_path, objective, made, per_device_train_batch_size=4)
    run.train()
    assert objective.signals == ("policy",) and objective.head() is None
    assert all(torch.equal(a, b) for a, b in zip(before, bundles_of(made)["b_value"]))
    assert {k for step in losses_of(run) for k in step} == {"loss/ppo/policy"}


def test_kl_in_the_reward_is_taken_off_the_tokens_that_have_it(tmp_path):
    """Returns at lambda 1 and values 0 are the reward minus the coefficient times the KL still to come."""
    constant = lambda completions, **_: [1.0] * len(completions)  # noqa: E731
    objective = PPO(PROMPTS, constant, kl_in="reward", kl_estimator="k1", kl_coef=0.5, lam=1.0, max_completion_length=5)
    run = trainer(tmp_path, objective, per_device_train_batch_size=4)
    batch = rollout_of(run, objective)
    mask = batch["completion_mask"][:, 1:]
    kl = (batch["old_logprobs"] - batch["ref_logprobs"]) * mask
    expected = (1 - 0.5 * kl.flip(1).cumsum(1).flip(1)) * mask
    torch.testing.assert_close(batch["returns"], expected)


def test_the_adaptive_coefficient_follows_the_kl_of_rollouts(tmp_path):
    objective = PPO(PROMPTS, length, kl_coef=0.1, kl_target=1e-6, kl_horizon=8, **SMALL)
    run = trainer(tmp_path, objective, per_device_train_batch_size=4, max_steps=4)
    run.train()
    logged = [e["ppo/kl_coefficient"] for e in run.state.log_history[:4]]
    # KL is far above the target: + 0.2 * 4 / 8 for each rollout, and a rollout is two steps
    assert logged == pytest.approx([0.11, 0.11, 0.121, 0.121])


def test_evaluation_rolls_out_on_held_out_prompts(tmp_path):
    objective = PPO(PROMPTS, length, eval_dataset=[{"prompt": "zz"}, {"prompt": "yyy"}, {"prompt": "x"}], **SMALL)
    run = trainer(tmp_path, objective)
    found = run.evaluate()
    assert {"eval_loss/policy", "eval_loss/value", "eval_ppo/reward", "eval_ppo/kl"} <= found.keys()
    assert found == {**run.evaluate()}  # the sampling is seeded


# ---- does it learn ----


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_count_of_one_token_rises_to_its_maximum(tmp_path, seed):
    """16 tokens, 6 a completion (the end token is none of them): the share of "a" starts at chance."""
    base = TINY["llama"](vocab_size=16, initializer_range=0.2)  # logits wide enough to be sure of a token
    share = lambda completions, **_: [c.count("a") / 6 for c in completions]  # noqa: E731
    args = arguments(tmp_path, max_steps=60, per_device_train_batch_size=64, learning_rate=0.02, seed=seed,
                     lr_multipliers={"ppo": 0.1}, logging_steps=4)  # fmt: skip
    run = BundlePPOTrainer(
        get_peft_model(base, config()), share, args, [{"prompt": p} for p in "bcdefgh"], tokenizer("abcdefghijkl"),
        max_completion_length=6, kl_in="reward", kl_coef=0.001, value_coef=0.5, generation={"eos_token_id": 16},
    )  # fmt: skip
    run.train()
    rewards = [entry["ppo/reward"] for entry in run.state.log_history if "ppo/reward" in entry]
    assert rewards[0] < 0.2 and sum(rewards[-3:]) / 3 > 0.9
