"""`BundleTrainer` with text and preferences: routing, the forward table's promise, weights in a step, logs."""

import math

import pytest
import torch
from models import layers, snapshot, unchanged
from training import (
    arguments,
    bundles_of,
    chat,
    completions,
    config,
    losses_of,
    model,
    pairs,
    texts,
    tokenizer,
    trainer,
)
from transformers import EarlyStoppingCallback

from peft_bundles import BundleConfig
from peft_bundles.objectives import LM, Forward, Preference
from peft_bundles.trainer import BundleTrainer, monitor
from peft_bundles.trainer.mixing import MixingPlan
from peft_bundles.trainer.tables import company, forward_table, promises, untouched_by


def moved(before: dict, after: dict) -> set[str]:
    return {name for name in before if not all(torch.equal(a, b) for a, b in zip(before[name], after[name]))}


def assert_close(a: dict, b: dict, **tolerance) -> None:
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, k=name: f"{k}: {m}", **tolerance)


# ---- who is updated ----


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("shared", [True, False])
def test_each_objective_moves_its_own_bundles_and_nothing_else(tmp_path, name, shared):
    made = model(name)
    before, trunk = bundles_of(made), snapshot(made.get_base_model().state_dict())
    run = trainer(tmp_path, [LM(texts()), Preference(pairs())], made, shared_forward=shared)
    run.forward.calls = 0
    run.train()
    assert moved(before, bundles_of(made)) == {"b_lm", "b_preference"}
    now = made.get_base_model().state_dict()
    assert unchanged(
        {k: v for k, v in trunk.items() if ".bundle_" not in k}, {k: now[k] for k in trunk if ".bundle_" not in k}
    )
    # a forward for both, or one each; and the reference's
    assert run.forward.calls == 3 * (2 if shared else 3)


def test_a_signal_alone_gives_the_gradient_of_its_own_loss(tmp_path):
    """SGD, one step: the weights move by -lr times what autograd says of the plain loss."""
    made, plain = model(), model()
    rows = LM(completions())
    run = trainer(tmp_path, rows, made, optim="sgd", max_steps=1, max_grad_norm=0.0, learning_rate=0.1)
    run.train()
    (batch,) = rows.batches(run.forward, 0, run.share("lm"))
    loss, _ = rows.losses(Forward(plain, {"lm": ("lm",)}, {"lm": {}})({"lm": batch})["lm"], batch)
    loss["lm"].backward()
    for p, q in zip(made.parameters(), plain.parameters()):
        torch.testing.assert_close(p.data, q.data - 0.1 * q.grad if q.grad is not None else q.data)
    assert losses_of(run)[0]["loss/lm"] == pytest.approx(loss["lm"].item(), rel=1e-5)


# ---- the forward table's promise ----

RL_OFF = {"lm": ["b_lm"]}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_lm_rows_forwarded_alone_with_the_others_off_give_the_weights_of_lm_alone_bit_for_bit(tmp_path, order):
    alone, both = model(calibrated=True), model(calibrated=True)
    common = {"forward": RL_OFF, "shared_forward": False, "gradient_accumulation_steps": 2, "max_steps": 4}
    trainer(tmp_path, LM(texts()), alone, **common).train()
    objectives = [LM(texts()), Preference(pairs())]
    trainer(tmp_path, [objectives[i] for i in order], both, **common).train()
    a, b = bundles_of(alone), bundles_of(both)
    assert all(torch.equal(x, y) for x, y in zip(a["b_lm"], b["b_lm"]))
    assert "b_preference" in moved(a, b)
    ids = torch.randint(4, 100, (2, 9))
    off = dict.fromkeys(set(a) - {"b_lm"}, 0.0)
    with torch.no_grad(), alone.alphas(off), both.alphas(off):  # and so the model with the others off
        assert torch.equal(alone(ids).logits, both(ids).logits)


def test_an_alpha_that_is_an_int_is_one_number():
    bundles = {
        name: {"rank": 8, "sub_bases": ["a"], "signals": {signal: 1.0}, "alpha": 1}
        for name, signal in (("b_lm", "lm"), ("b_preference", "preference"))
    }
    forward = Forward(
        model(bundles=bundles), {"lm": ("lm",), "preference": ("preference",)}, {"lm": {}, "preference": {"b_lm": 0.0}}
    )
    rows = {"input_ids": torch.ones(2, 3, dtype=torch.long)}
    assert forward.row_alphas({"lm": rows, "preference": rows})["b_lm"].tolist() == [1, 1, 0, 0]


def test_in_a_shared_forward_the_promise_holds_to_rounding_and_without_the_table_not_at_all(tmp_path):
    def run(objectives, **fields):
        made = model()
        trainer(tmp_path, objectives, made, optim="sgd", **fields).train()
        return made

    alone = bundles_of(run([LM(texts())], forward=RL_OFF))["b_lm"]
    shared = bundles_of(run([LM(texts()), Preference(pairs())], forward=RL_OFF))["b_lm"]
    torch.testing.assert_close(shared, alone, rtol=1e-5, atol=1e-6)
    start = bundles_of(model())["b_lm"]
    felt = bundles_of(run([LM(texts()), Preference(pairs())]))["b_lm"]
    size = lambda a, b: math.sqrt(sum(float((x - y).square().sum()) for x, y in zip(a, b)))  # noqa: E731
    assert size(felt, alone) > 1e-2 * size(start, alone) > 100 * size(shared, alone)


def test_tables_say_what_they_promise():
    signals = {"lm": ("lm",), "preference": ("preference",), "ppo": ("policy", "value")}
    none = forward_table(config(), signals, None)
    assert untouched_by(config(), signals, none) == {"lm": [], "preference": [], "ppo": []}
    table = forward_table(config(), signals, {"lm": "owners", "policy": ["b_policy", "b_value", "b_preference"]})
    assert untouched_by(config(), signals, table) == {"lm": ["preference", "ppo"], "preference": [], "ppo": []}
    said = promises(config(), signals, table)
    assert any(line.startswith("lm: its bundles get the weights of a run without preference, ppo") for line in said)
    # ppo reads b_preference, so it feels whatever preference feels
    heard = lambda rows: untouched_by(config(), signals, forward_table(config(), signals, {**off, "preference": rows}))  # noqa: E731
    off = {"lm": "owners", "ppo": {"b_lm": 0.0}}
    assert heard(["b_preference"]) == {"lm": ["preference", "ppo"], "preference": ["lm", "ppo"], "ppo": ["lm"]}
    assert heard("owners") == heard(["b_preference"])
    assert heard(["owners", "general"]) == {"lm": ["preference", "ppo"], "preference": ["ppo"], "ppo": []}
    assert heard(["general", "b_preference"]) == heard(["owners", "b_lm"]) == heard(["owners", "general"])


@pytest.mark.parametrize("role", ["general", "semantic", "signal"])
def test_owners_are_the_owners_whatever_their_role(role):
    """And what stays on beside them is named."""
    signals = {"lm": ("lm",), "preference": ("preference",)}
    bundles = {f"b_{s}": {"rank": 4, "sub_bases": ["a"], "role": role, "signals": {s: 1.0}} for s in signals}
    plain = BundleConfig(sub_bases={"a": 16}, bundles={**bundles, "general": {"rank": 4, "sub_bases": ["a"]}})
    on = lambda entry: [b for b in plain.bundles if b not in forward_table(plain, signals, {"lm": entry})["lm"]]  # noqa: E731
    assert on("owners") == on(["owners"]) == ["b_lm"]
    assert on(["owners", role]) == (["b_lm", "general"] if role == "general" else ["b_lm", "b_preference"])
    assert on(["b_lm", "general"]) == ["b_lm", "general"]  # the bundle of that name, not its role
    table = forward_table(plain, signals, {"lm": "owners"})
    assert company(plain, signals, table) == [
        "lm: b_lm learns with no other bundle on.",
        "preference: b_preference learns with b_lm, general on.",
    ]
    (kept, depends) = promises(plain, signals, table)
    assert kept == "lm: its bundles get the weights of a run without preference."
    assert depends == "preference: what its bundles learn depends on lm (b_lm on in these rows)."


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lmm": "all"}, r"forward\['lmm'\] is not an objective or signal; use some of"),
        ({"lm": ["b_text"]}, r"forward\['lm'\] names bundle\(s\) \['b_text'\]; it takes some of"),
        ({"lm": "none"}, r"forward\['lm'\]='none' must be 'all', 'owners'"),
        ({"lm": ["b_policy"]}, r"turns off all bundles that signal 'lm' updates, \['b_lm'\]"),
        ({"policy": "all", "value": "owners"}, r"other signals of objective 'ppo' have 'all'"),
    ],
)
def test_a_forward_table_that_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        forward_table(config(), {"lm": ("lm",), "ppo": ("policy", "value")}, given)


# ---- rows in a step ----


@pytest.mark.parametrize("shared", [True, False])
def test_accumulation_does_not_change_the_step(tmp_path, shared):
    """Rows of different lengths: a mean of means would."""
    rows = lambda: [LM([*texts(), {"text": "z" * 60}]), Preference(pairs())]  # noqa: E731
    results = []
    for size, accumulation in ((4, 1), (2, 2), (1, 4)):
        made = model()
        run = trainer(
            tmp_path, rows(), made, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            optim="sgd", learning_rate=0.1, shared_forward=shared,
        )  # fmt: skip
        run.train()
        results.append((bundles_of(made), losses_of(run)))
    for other, logged in results[1:]:
        assert_close(results[0][0], other, rtol=1e-4, atol=1e-6)
        for a, b in zip(results[0][1], logged):
            assert a == pytest.approx(b, rel=1e-4)


def test_the_plan_is_a_function_of_the_step_and_counts_what_it_used():
    for kind, weights in (("together", None), ("alternate", None), ("ratio", {"a": 3.0})):
        plan, again = (MixingPlan(["a", "b", "c"], kind, weights, seed=5) for _ in range(2))
        used = dict.fromkeys("abc", 0)
        for step in range(1500):
            for name in used:
                if step % 97 == 0:
                    assert again.used(name, step) == used[name]
            for name in plan.objectives(step):
                used[name] += 1
        for name, count in used.items():
            assert count == pytest.approx(1500 * plan.share(name), rel=0.1)


def test_a_pass_over_the_rows_sees_each_once_and_the_next_in_another_order(tmp_path):
    rows = LM(texts(7))
    run = trainer(tmp_path, rows, per_device_train_batch_size=7, max_steps=-1, num_train_epochs=2)
    seen = [rows.batches(run.forward, step, run.share("lm"))[0]["input_ids"] for step in range(2)]
    first, second = ({tuple(r) for r in s.tolist()} for s in seen)
    assert first == second and len(first) == 7 and not torch.equal(*seen)
    run.train()
    assert run.state.global_step == 2 and run.state.epoch == 2


@pytest.mark.parametrize("mixing", ["ratio", "alternate"])
def test_steps_of_one_objective(tmp_path, mixing):
    run = trainer(tmp_path, [LM(texts()), Preference(pairs())], mixing=mixing, max_steps=8)
    run.train()
    logged = [[k for k in entry if k.startswith("loss/")] for entry in run.state.log_history[:8]]
    assert logged == [[f"loss/{name}" for name in run.plan.objectives(step)] for step in range(8)]
    assert {name for (name,) in logged} == {"loss/lm", "loss/preference"}
    for entry, (loss,) in zip(run.state.log_history, logged):
        updated = {k for k, v in entry.items() if k.startswith("update_norm/") and v > 0}
        assert updated == {"update_norm/b_" + loss.removeprefix("loss/")}


# ---- the objectives' own ----


def test_weights_of_tokens(tmp_path):
    """Completion-only, weighted prompts, and weights by token, all against the sum over tokens."""
    plain = [{"prompt": "1+1=", "completion": "22"}]
    tok = tokenizer()
    prompt, whole = tok("1+1=")["input_ids"], [*tok("1+1=22")["input_ids"], tok.eos_token_id]
    weights = [0.5] * len(prompt) + [2.0] * (len(whole) - len(prompt))
    given = [{"input_ids": whole, "token_weights": weights}]
    found = []
    for rows, options in (
        (plain, {}),
        (plain, {"prompt_weight": 0.5, "completion_weight": 2.0}),
        (given, {}),
    ):
        objective = LM(rows, **options)
        run = trainer(tmp_path, objective)
        (batch,) = objective.batches(run.forward, 0, run.share("lm"))
        outputs = run.forward({"lm": batch})["lm"]
        found.append((objective.losses(outputs, batch)[0]["lm"], batch))
    nll = -outputs.logits[0, :-1].log_softmax(-1).gather(-1, batch["input_ids"][0, 1:, None])[:, 0]
    w = torch.tensor(weights[1:])
    torch.testing.assert_close(found[0][0], nll[w == 2].mean())
    torch.testing.assert_close(found[1][0], (w * nll).sum() / w.sum())
    torch.testing.assert_close(found[2][0], found[1][0])


def test_conversations_are_rendered_by_their_template(tmp_path):
    tok = tokenizer()
    text = LM([{"messages": chat([("user", "hi"), ("assistant", "ho")])}])
    turn = LM([{"prompt": chat([("user", "hi")]), "completion": chat([("assistant", "ho")])}], signal="logic")
    pair = Preference(
        [
            {
                "prompt": chat([("user", "hi")]),
                "chosen": chat([("assistant", "ho")]),
                "rejected": chat([("assistant", "x")]),
            }
        ]
    )
    trainer(tmp_path, [text, turn, pair])
    assert tok.decode(text.rows[0]["input_ids"]).replace(" ", "") == "u:hi;a:ho;"
    assert turn.rows[0]["token_weights"] == [0.0] * len("u:hi;a:") + [1.0] * len("ho;")
    row = pair.rows[0]
    assert [tok.decode(row[k]).replace(" ", "") for k in ("prompt_ids", "chosen_ids", "rejected_ids")] == [
        "u:hi;a:", "ho;", "x;",
    ]  # fmt: skip


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "orpo", "kto"])
def test_every_preference_loss_learns_to_prefer(tmp_path, loss):
    made = model()
    objective = Preference(pairs(), loss=loss, beta=0.5, eval_dataset=pairs())
    run = trainer(tmp_path, objective, made, max_steps=12, per_device_train_batch_size=5)
    before = run.evaluate()
    run.train()
    after = run.evaluate()
    assert after["eval_loss/preference"] < before["eval_loss/preference"]
    if loss not in ("orpo", "kto"):
        assert after["eval_preference/rewards/margin"] > before["eval_preference/rewards/margin"]


def test_the_reference_is_the_base_model_bit_for_bit_and_margins_start_at_zero(tmp_path):
    made = model(moved=False)
    run = trainer(tmp_path, objective := Preference(pairs()), made, max_steps=1)
    run.train()
    assert losses_of(run)[0]["loss/preference"] == pytest.approx(math.log(2), abs=1e-6)
    (batch,) = objective.batches(run.forward, 1, run.share("preference"))
    with torch.no_grad(), made.disable_adapter():
        off = made(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(run.forward.reference(batch).logits, off)


def test_kto_takes_single_completions(tmp_path):
    rows = [{"prompt": f"{i}:", "completion": "ok" if i % 2 else "bad", "label": bool(i % 2)} for i in range(8)]
    run = trainer(tmp_path, Preference(rows, loss="kto"), max_steps=2, per_device_train_batch_size=4)
    run.train()
    assert all(0 < step["loss/preference"] < 1 for step in losses_of(run))


# ---- optimizer ----


def test_every_parameter_is_in_one_group_with_its_own_rate(tmp_path):
    run = trainer(tmp_path, LM(texts()), lr_multipliers={"b_lm": 0.5, "b_kl": 3.0}, weight_decay=0.1)
    run.create_optimizer()
    rates = {id(p): g["lr"] for g in run.optimizer.param_groups for p in g["params"]}
    assert len(rates) == sum(len(g["params"]) for g in run.optimizer.param_groups)
    assert {id(p) for p in run.model.parameters() if p.requires_grad} == set(rates)
    for name, factor in (("b_lm", 0.5), ("b_kl", 3.0), ("b_policy", 1.0)):
        assert {rates[id(p)] for p in run.model.bundle_parameters(name)} == {factor * 1e-2}
    assert run.optimizer.param_groups[0]["lr"] == 1e-2


def test_clipping_is_per_bundle_with_a_limit_of_its_own(tmp_path):
    made = model()
    before = bundles_of(made)
    objectives = [LM(texts()), Preference(pairs(), beta=50.0)]
    run = trainer(tmp_path, objectives, made, optim="sgd", learning_rate=1.0, max_steps=1, max_grad_norm=1e-3,
                  max_grad_norms={"b_preference": 1e-4})  # fmt: skip
    run.train()
    after = bundles_of(made)
    norm = lambda n: math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after[n], before[n])))  # noqa: E731
    assert norm("b_lm") == pytest.approx(1e-3, rel=1e-2) and norm("b_preference") == pytest.approx(1e-4, rel=1e-2)
    logged = run.state.log_history[0]
    assert logged["update_norm/b_lm"] == pytest.approx(norm("b_lm"), rel=1e-3)
    assert logged["grad_norm/b_preference"] > 1e-3  # before clipping


# ---- what runs around it ----


@pytest.mark.parametrize("fields", [{"activation_checkpointing": True}, {"bf16": True}])
def test_checkpointing_and_autocast(tmp_path, fields):
    plain, changed = model(), model()
    objectives = lambda: [LM(texts()), Preference(pairs())]  # noqa: E731
    trainer(tmp_path, objectives(), plain, optim="sgd").train()
    trainer(tmp_path, objectives(), changed, optim="sgd", **fields).train()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if "bf16" not in fields else {"rtol": 0.1, "atol": 3e-3}
    a, b = bundles_of(plain), bundles_of(changed)
    assert_close(a, b, **tolerance)
    assert moved(a, b) == set() or "bf16" in fields
    assert all(p.dtype == torch.float32 for p in changed.parameters())


def test_logs_name_every_loss_and_every_bundle(tmp_path):
    made = model()
    run = trainer(tmp_path, [LM(texts()), Preference(pairs())], made, max_steps=4, logging_steps=2, forward=RL_OFF)
    run.train()
    first, second = run.state.log_history[:2]
    assert first.keys() == second.keys() and first["step"] == 2
    for bundle in bundles_of(made):
        assert {f"alpha/{bundle}", f"activation/{bundle}", f"update_norm/{bundle}"} <= first.keys()
        assert (f"grad_norm/{bundle}" in first) == (bundle in ("b_lm", "b_preference"))
        assert (first[f"update_norm/{bundle}"] > 0) == (bundle in ("b_lm", "b_preference"))
    assert first["alpha/b_lm"] == 1 and first["activation/b_lm"] > 0
    assert first["alpha/b_kl"] == pytest.approx(4 / 6)  # on in the 4 sequences of 2 pairs, off in 2 rows of text
    assert first["loss"] == pytest.approx(first["loss/lm"] + first["loss/preference"], rel=1e-4)
    assert first["tokens_per_second"] > 0


def test_what_is_watched_is_what_the_layers_add(tmp_path):
    """With one bundle on, all that a layer adds to its last tokens is that bundle's."""
    made, ids, found, seen = model(), torch.randint(4, 100, (3, 40)), {}, []
    table = dict.fromkeys(bundles_of(made), 0.0) | {"b_lm": torch.tensor([0.5, 1.0, 2.0])}
    handles = [layer.register_forward_hook(lambda m, args, out: seen.append((args[0], out))) for layer in layers(made)]
    with monitor.watch(made, found), made.alphas(table):
        made(ids)
    for handle in handles:
        handle.remove()
    for (h, y), size in zip(seen, found["activation/b_lm"]):
        h, y = h[0, -monitor.SAMPLE :], y[0, -monitor.SAMPLE :]
        torch.testing.assert_close(size, ((y - h).norm() / h.norm()).detach(), rtol=1e-3, atol=1e-6)
    assert len(seen) == len(found["activation/b_kl"]) and not any(map(bool, found["activation/b_kl"]))
    alphas = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(found["alpha/b_lm"][0], alphas.mean())
    torch.testing.assert_close(found["alpha_std/b_lm"][0], alphas.std(unbiased=False))
    assert not layers(made)[0]._forward_pre_hooks


def test_every_micro_batch_and_step_has_dropout_of_its_own_and_the_same_in_every_run(tmp_path):
    """One row again and again, at a rate of 0: only the dropout can change the loss."""
    run = lambda accumulation: [  # noqa: E731
        step["loss/lm"]
        for step in losses_of(_trained(tmp_path, LM([{"text": "abcdef"}]), model(dropout=0.5), accumulation))
    ]
    single, double = run(1), run(2)
    assert single == run(1) and len(set(single)) == 3
    assert all(a != b for a, b in zip(single, double))  # the mean of two masks


def _trained(folder, objectives, made, accumulation):
    made = trainer(
        folder, objectives, made, learning_rate=0.0, per_device_train_batch_size=1,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    made.train()
    return made


def test_evaluation_is_over_all_held_out_rows_and_can_stop_early(tmp_path):
    held_out = [{"text": "a" * n} for n in (3, 9, 30)]
    objectives = [LM(texts(), eval_dataset=held_out), Preference(pairs(), eval_dataset=pairs(3))]
    args = arguments(tmp_path, max_steps=50, eval_strategy="steps", eval_steps=1, learning_rate=0.0,
                     metric_for_best_model="eval_loss/lm", greater_is_better=False, save_strategy="steps", save_steps=1,
                     load_best_model_at_end=True, save_total_limit=1)  # fmt: skip
    run = BundleTrainer(model(), args, objectives, tokenizer(), callbacks=[EarlyStoppingCallback(2)])
    run.train()
    assert run.state.global_step == 3  # nothing gets better at a rate of 0
    found = run.evaluate()
    (batch,) = [objectives[0].collate(list(objectives[0].eval_rows))]
    loss, _ = objectives[0].losses(run.forward.current("lm", batch), batch)
    assert found["eval_loss/lm"] == pytest.approx(loss["lm"].item(), rel=1e-5)
    assert found["eval_loss"] == pytest.approx(found["eval_loss/lm"] + found["eval_loss/preference"])
