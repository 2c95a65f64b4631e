"""The signals of the taxonomy beside LM, preference and PPO: who is updated, what the losses are, that they fall."""

import pytest
import torch
import torch.nn.functional as F
from meta_rows import HEADS, judged, made, paraphrases, plans, rl, sides, statements, whole_table
from models import snapshot, unchanged
from training import bundles_of, completions, config, losses_of, model, texts, tokenizer, trainer

from peft_bundles import BundleConfig, objectives
from peft_bundles.objectives import (
    LM,
    Anchor,
    Calibration,
    Confusion,
    Consistency,
    Contrastive,
    Forward,
    MetaCorrectness,
    Objective,
    Temporal,
    document_pairs,
)
from peft_bundles.objectives.calibration import ece, soft_ece
from peft_bundles.objectives.heads import SubspaceHead, largest_owner_rank, owners, subspace
from peft_bundles.objectives.tokens import token_logprobs
from peft_bundles.routing.backward import routed_backward
from peft_bundles.routing.reduction import finalize_grads
from peft_bundles.taxonomy import SIGNALS


def moved(before: dict, after: dict) -> set[str]:
    return {n for n in before if not all(torch.equal(a, b) for a, b in zip(before[n], after[n]))}


def ready(objective, on=None, rows: int = 4):
    """The objective set up on a model, its first batch, and the forward of it."""
    on = on or made()
    objective.setup(tokenizer(), on)
    forward = Forward(on, {objective.name: objective.signals}, {objective.name: {}})
    batch = objective.complete(forward, objective.collate([objective.rows[i] for i in range(rows)]))
    return on, forward, batch


# ---- who is updated ----


def test_the_whole_table_trains_and_a_step_on_a_signal_moves_exactly_its_owners(tmp_path):
    """One AdamW with weight decay for all, so that a gradient of zero where there should be none would be seen."""
    on = made()
    assert on.peft_config["default"].bundles
    run = trainer(tmp_path, whole_table(), on)
    assert {s for o in run.objectives.values() for s in o.signals} == set(SIGNALS)
    optimizer = torch.optim.AdamW([p for p in on.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    trunk = {k: v for k, v in snapshot(on.get_base_model().state_dict()).items() if ".bundle_" not in k}
    for _ in range(2):
        for name, objective in run.objectives.items():
            batch = objective.batches(run.forward, 0, run.share(name))[0]
            for signal in objective.signals:
                before = bundles_of(on)
                losses, _ = objective.losses(run.forward({name: batch})[name], batch)
                assert losses.keys() == set(objective.signals)
                optimizer.zero_grad()
                routed_backward(on, {signal: losses[signal]})
                finalize_grads(on)
                optimizer.step()
                column = run.bundle_config.column(signal)
                assert moved(before, bundles_of(on)) == {b for b, w in column.items() if w > 0}, signal
    now = on.get_base_model().state_dict()
    assert unchanged(trunk, {k: now[k] for k in trunk})


def test_all_signals_train_in_one_job(tmp_path):
    on = made()
    before = bundles_of(on)
    run = trainer(tmp_path, whole_table(), on, max_steps=2)
    heads = {n: snapshot(dict(o.head().named_parameters())) for n, o in run.objectives.items() if o.head() is not None}
    run.train()
    assert moved(before, bundles_of(on)) == set(before)  # every bundle has an owner among the signals
    logged = losses_of(run)[-1]
    assert {k.rpartition("/")[2] for k in logged} == set(SIGNALS) and all(
        map(torch.isfinite, map(torch.tensor, logged.values()))
    )
    for name, head in heads.items():
        now = dict(run.objectives[name].head().named_parameters())
        assert not any(torch.equal(head[k], now[k]) for k in head), name


@pytest.mark.parametrize("name", list(HEADS))
def test_an_owner_gets_the_gradient_of_the_loss_and_the_head_its_own(name):
    """Against autograd on the plain loss: owners times their weight, the head whole, nobody else."""
    objective = HEADS[name]()
    on, forward, batch = ready(objective)
    signal = objective.signals[0]
    outputs = forward({objective.name: batch})[objective.name]
    loss, _ = objective.losses(outputs, batch)
    routed_backward(on, loss)
    finalize_grads(on)
    plain = made()
    unrouted = Forward(plain, {}, {})._run(batch["input_ids"], batch["attention_mask"])
    head = list(objective.head().parameters())
    wanted = objective.losses(unrouted, batch)[0][signal]
    own = torch.autograd.grad(wanted, head, retain_graph=True)
    for p, g in zip(head, own):
        torch.testing.assert_close(p.grad, g, rtol=1e-4, atol=1e-7)
    column = on.peft_config["default"].column(signal)
    for bundle, weight in column.items():
        for p, q in zip(on.bundle_parameters(bundle), plain.bundle_parameters(bundle)):
            if not weight:
                assert p.grad is None
                continue
            (g,) = torch.autograd.grad(wanted, q, retain_graph=True)
            assert g.any()
            torch.testing.assert_close(p.grad, weight * g, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["contrastive", "temporal", "consistency"])
def test_the_gradient_of_a_head_on_the_state_lies_in_the_subspace_of_the_owners(name):
    """These losses read nothing of the logits, so what is outside of the subspace can neither be seen nor asked for."""
    objective = HEADS[name]()
    on, forward, batch = ready(objective)
    outputs = forward.current(objective.name, batch)
    hidden = outputs.hidden.clone().requires_grad_()
    basis = subspace(on, objective.signals[0])
    objective.losses(type(outputs)(outputs.logits, hidden), batch)[0][objective.signals[0]].backward()
    assert hidden.grad.abs().max() > 1e-6 and basis.shape[1] < basis.shape[0]
    torch.testing.assert_close(hidden.grad @ basis @ basis.T, hidden.grad, rtol=1e-4, atol=1e-7)


def test_the_subspace_is_the_support_of_the_owners():
    on = made()
    assert owners(on, "temporal") == [("default", "b_temporal")]
    assert {b for _, b in owners(on, "meta_correctness")} == {"b_meta", "b_err_confusion", "b_err_consistency"}
    layer = [m for m in on.modules() if hasattr(m, "bundle_basis")][-1]
    for signal in SIGNALS:
        shapes = [layer.packing("default").shapes[b] for _, b in owners(on, signal)]
        support = torch.cat([s.support for s in shapes]).unique()
        basis = subspace(on, signal)
        assert torch.equal(basis, layer.bundle_basis["default"][:, support])
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(support)), rtol=1e-4, atol=1e-5)
    assert largest_owner_rank(on, "temporal") == layer.packing("default").shapes["b_temporal"].rank
    head = SubspaceHead(subspace(on, "temporal"), 3, "x")
    state = torch.randn(5, 64)
    inside = state @ head.basis @ head.basis.T
    torch.testing.assert_close(head(state), head(inside))
    torch.testing.assert_close(head(inside), head(7 * inside))
    assert torch.equal(head.map.weight, SubspaceHead(subspace(on, "temporal"), 3, "x").map.weight)


def test_the_subspace_of_owners_in_several_adapters_is_that_of_all_of_them():
    on = made()
    alone = subspace(on, "confusion")
    on.add_adapter("second", BundleConfig(preset="taxonomy", task_type="CAUSAL_LM", basis_seed=1))
    assert torch.equal(subspace(on, "confusion"), alone)  # it is not active
    on.base_model.set_adapter("second")
    other = subspace(on, "confusion")
    assert {a for a, _ in owners(on, "confusion")} == {"second"} and not torch.equal(other, alone)
    on.base_model.set_adapter(["default", "second"])
    both = subspace(on, "confusion")
    assert both.shape[1] == alone.shape[1] + other.shape[1]
    torch.testing.assert_close(both.T @ both, torch.eye(both.shape[1]), rtol=1e-4, atol=1e-5)
    for basis in (alone, other):
        torch.testing.assert_close(both @ both.T @ basis, basis, rtol=1e-4, atol=1e-5)
    # a second adapter of the same basis adds nothing
    on.add_adapter("twin", BundleConfig(preset="taxonomy", task_type="CAUSAL_LM"))
    on.base_model.set_adapter(["default", "twin"])
    both = subspace(on, "confusion")
    assert both.shape == alone.shape
    torch.testing.assert_close(both @ both.T @ alone, alone, rtol=1e-4, atol=1e-5)


# ---- losses ----


def test_every_objective_names_its_failure_mode():
    for name in objectives.__all__:
        kind = getattr(objectives, name)
        if isinstance(kind, type) and issubclass(kind, Objective) and kind is not Objective:
            assert "Failure mode" in (kind.__doc__ or ""), name


DRIVEN = {
    **HEADS,
    "lm": lambda **f: LM(texts(), **f),
    "logic": lambda **f: LM(completions(), signal="logic", **f),
    "anchor": lambda **f: Anchor(texts(), signal="lm", **f),
}


@pytest.mark.parametrize("name", list(DRIVEN))
def test_every_loss_can_be_driven_down(tmp_path, name):
    objective = DRIVEN[name](eval_dataset=DRIVEN[name]()._dataset)
    fields = {"max_steps": 100, "per_device_train_batch_size": 12, "learning_rate": 1e-2, "logging_steps": 1000}
    run = trainer(tmp_path, objective, made(), **fields)
    before = run.evaluate()["eval_loss"]
    run.train()
    part = 0.9 if type(objective) is LM else 0.65  # the frozen random trunk of a tiny model hardly writes text
    assert run.evaluate()["eval_loss"] < part * before


def test_value_advantage_and_curiosity_can_be_driven_down_on_a_rollout(tmp_path):
    objective = rl(epochs=60, value_clip=None)  # clipped, values stay near those of the rollout
    run = trainer(tmp_path, objective, made(), max_steps=60, per_device_train_batch_size=8, learning_rate=2e-2)
    run.train()
    first, last = losses_of(run)[0], losses_of(run)[-1]
    for signal in ("value", "advantage", "curiosity"):
        assert last[f"loss/ppo/{signal}"] < 0.6 * first[f"loss/ppo/{signal}"], signal


def test_confusion_is_the_entropy_of_every_token_and_the_mark_of_the_last():
    objective = Confusion(judged(), entropy_weight=2.0, correct_weight=3.0)
    _, forward, batch = ready(objective)
    outputs = forward.current("confusion", batch)
    total = 0.0
    for i, mask in enumerate(batch["completion_mask"].bool()):
        places = mask.nonzero()[:, 0]
        logs = outputs.logits[i, places - 1].log_softmax(-1)
        entropy = -(logs.exp() * logs).sum(-1)
        said = objective.reader(outputs.hidden[i])
        total += 2.0 * F.smooth_l1_loss(said[places - 1, 0], entropy)
        total += 3.0 * F.binary_cross_entropy_with_logits(said[places[-1], 1], batch["correct"][i])
    losses, metrics = objective.losses(outputs, batch)
    torch.testing.assert_close(losses["confusion"], total / 4)
    assert 0 <= metrics["accuracy"] <= 1 and objective.items(batch) == 4


def test_confusion_does_not_move_the_entropy_it_predicts():
    objective = Confusion(judged(), correct_weight=0.0)
    _, forward, batch = ready(objective)
    outputs = forward.current("confusion", batch)
    logits = outputs.logits.clone().requires_grad_()
    hidden = outputs.hidden.clone().requires_grad_()
    objective.losses(type(outputs)(logits, hidden), batch)[0]["confusion"].backward()
    assert logits.grad is None and hidden.grad.any()


def test_calibration_is_brier_and_soft_error_of_scaled_odds():
    objective = Calibration(judged(), ece_weight=0.0)
    _, forward, batch = ready(objective)
    outputs = forward.current("calibration", batch)
    with torch.no_grad():
        objective.reader.map.weight.zero_()
        objective.reader.map.bias.zero_()
    losses, metrics = objective.losses(outputs, batch)
    probability = []
    for i, mask in enumerate(batch["completion_mask"].bool()):
        places = mask.nonzero()[:, 0]
        logs = outputs.logits[i, places - 1].log_softmax(-1)
        probability.append(logs.gather(-1, batch["input_ids"][i, places, None]).mean().exp())
    p = torch.stack(probability)
    torch.testing.assert_close(losses["calibration"], (p - batch["correct"]).square().mean())  # T = 1, b = 0: p itself
    torch.testing.assert_close(metrics["brier"], metrics["brier_before"])
    assert metrics["temperature"] == 1
    with torch.no_grad():
        objective.reader.map.bias.copy_(torch.tensor([2.0, 0.0]).log().nan_to_num(neginf=0.0))  # T = 2
    c, temperature = objective.confidence(outputs.hidden, p.log(), batch)
    torch.testing.assert_close(c, torch.sigmoid(torch.logit(p) / 2))
    torch.testing.assert_close(temperature, torch.full((4,), 2.0))


def test_calibration_errors():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(20_000, generator=generator)
    right = (torch.rand(20_000, generator=generator) < confidence).float()
    assert ece(confidence, right) < 0.02 and soft_ece(confidence, right, 10) < 1e-3
    over = (torch.rand(20_000, generator=generator) < confidence / 2).float()
    assert ece(confidence, over).item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(
        ece(torch.tensor([0.95, 0.94, 0.1]), torch.tensor([1.0, 0.0, 0.0])), torch.tensor(0.99 / 3)
    )
    one = torch.tensor([0.3], requires_grad=True)  # of one row it is the Brier score
    torch.testing.assert_close(soft_ece(one, torch.ones(1), 10), torch.tensor(0.49))
    assert torch.autograd.grad(soft_ece(one, torch.ones(1), 10), one)[0].item() == pytest.approx(-1.4)


def test_the_head_does_not_see_the_explanation_and_its_tokens_are_a_loss_of_text():
    rows = [{**r, "explanation": "because" + "x" * i} for i, r in enumerate(judged(4))]
    told, silent = MetaCorrectness(rows, explanation_weight=0.5), MetaCorrectness(judged(4))
    on, forward, batch = ready(told)
    _, _, bare = ready(silent, on)
    outputs, short = (forward.current(told.name, b) for b in (batch, bare))
    logs = [token_logprobs(out.logits, x["input_ids"]) for out, x in ((outputs, batch), (short, bare))]
    given = ((told, outputs, logs[0], batch), (silent, short, logs[1], bare))
    a, b = (o.compare(out.hidden, log, x)[0] for o, out, log, x in given)
    torch.testing.assert_close(a, b)
    text = 0.0
    for i, mask in enumerate(batch["explains"].bool()):
        places = mask.nonzero()[:, 0]
        logs = outputs.logits[i, places - 1].log_softmax(-1)
        text -= logs.gather(-1, batch["input_ids"][i, places, None]).mean()
    torch.testing.assert_close(told.losses(outputs, batch)[0][told.name], a + 0.5 * text / 4)
    assert tokenizer().decode(batch["input_ids"][1][batch["explains"][1] > 0]).replace(" ", "") == "becausex<eos>"
    assert silent.losses(short, bare)[1]["explanation_loss"] == 0


def test_a_pair_says_the_same_whichever_side_comes_first():
    objective = MetaCorrectness(sides())
    _, forward, batch = ready(objective)
    turn = lambda x: torch.cat(x.chunk(2)[::-1])  # noqa: E731
    other = {k: turn(v) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    scores, losses = [], []
    for b in (batch, other):
        outputs = forward.current(objective.name, b)
        losses.append(objective.losses(outputs, b)[0][objective.name])
        scores.append(objective.scores(outputs.hidden, token_logprobs(outputs.logits, b["input_ids"]), b))
    torch.testing.assert_close(scores[0], turn(scores[1]))
    loss = losses[0]
    right, wrong = scores[0].chunk(2)
    wanted = F.softplus(-right).mean() / 2 + F.softplus(wrong).mean() / 2 + F.softplus(wrong - right).mean()
    torch.testing.assert_close(loss, wanted)
    assert objective.items(batch) == 4


def test_a_reasoning_is_read_at_its_end_and_by_how_expected_its_tokens_were():
    objective = MetaCorrectness(judged(), explanation_weight=0.0)
    _, forward, batch = ready(objective)
    outputs = forward.current(objective.name, batch)
    logprobs = token_logprobs(outputs.logits, batch["input_ids"])
    wanted = []
    for i, mask in enumerate(batch["completion_mask"].bool()):
        places = mask.nonzero()[:, 0]
        said = objective.read(outputs.hidden[i])
        logs = outputs.logits[i, places - 1].log_softmax(-1).gather(-1, batch["input_ids"][i, places, None])[:, 0]
        wanted.append(said[places[-1], 0] + (said[places - 1, 1] * logs).mean())
    torch.testing.assert_close(objective.scores(outputs.hidden, logprobs, batch), torch.stack(wanted))
    # who judges does not make what is judged likelier: nothing reaches the logits
    logits, hidden = (x.clone().requires_grad_() for x in (outputs.logits, outputs.hidden))
    objective.losses(type(outputs)(logits, hidden), batch)[0][objective.name].backward()
    assert hidden.grad.any() and (logits.grad is None or not logits.grad.any())
    plain = MetaCorrectness(judged(), surprise=False)
    ready(plain)
    assert plain.reader.map.out_features == 1
    at_end = plain.read(outputs.hidden[torch.arange(4), batch["last"]])[:, 0]
    assert torch.equal(plain.scores(outputs.hidden, logprobs, batch), at_end)


def test_statements_are_read_at_their_ends_and_pairs_are_sequences_of_two():
    on = made()
    pair = Consistency([{"first": f"a is {i}", "second": "a is 1", "contradicts": i != 1} for i in range(4)])
    sequence = Consistency([{"statements": [f"a is {i}", "a is 1"], "contradicts": [False, i != 1]} for i in range(4)])
    batches = [ready(o, on)[2] for o in (pair, sequence)]
    assert unchanged(*batches)
    assert pair.items(batches[0]) == 4
    _, _, batch = ready(Consistency(statements()), on)
    tok = tokenizer()
    first = [tok.decode(batch["input_ids"][0, : i + 1]).replace(" ", "") for i in batch["read"][0].nonzero()[:, 0]]
    assert first == ["ais0<unk>bis1<unk>", "ais0<unk>bis1<unk>ais0<unk>"]  # <unk>: the line's end
    assert batch["contradicts"][1].sum() == 1 and not batch["contradicts"][0].any()


def test_contrast_is_infonce_and_rows_of_a_document_are_no_negatives():
    rows = [{**row, "document": i // 2} for i, row in enumerate(paraphrases(4))]
    objective = Contrastive(rows)
    _, forward, batch = ready(objective)
    hidden = forward.current("contrastive", batch).hidden
    e = objective.embed(hidden, batch["attention_mask"])
    torch.testing.assert_close(e.norm(dim=1), torch.ones(8))
    total = 0.0
    for i in range(4):
        allowed = [j for j in range(4) if j == i or j // 2 != i // 2]
        for a, p in ((e[:4], e[4:]), (e[4:], e[:4])):
            scores = torch.stack([a[i] @ p[j] for j in allowed]) / 0.05
            total += scores.logsumexp(0) - scores[allowed.index(i)]
    losses, metrics = objective.compare(e, batch)
    torch.testing.assert_close(losses["contrastive"], total / 8)
    assert metrics["chance"].item() == pytest.approx(1 / 3) and objective.items(batch) == 4
    lonely = objective.collate([objective.rows[0]])  # a last batch of held-out rows counts nothing
    assert objective.items(lonely) == 0 and objective.compare(e[[0, 4]], lonely)[0]["contrastive"] == 0
    assert [r["anchor"] for r in document_pairs({"x": list("abcde"), "y": list("fg")})] == ["a", "c", "f"]


def test_padding_and_neighbours_change_neither_embeddings_nor_goals():
    on = made()
    for objective, rows in ((Contrastive(paraphrases()), 4), (Temporal(plans()), 4)):
        _, forward, batch = ready(objective, on, rows)
        alone = objective.collate([objective.rows[0]])
        both = []
        for b in (batch, alone):
            hidden = forward.current(objective.name, b).hidden
            if isinstance(objective, Contrastive):
                both.append(objective.embed(hidden, b["attention_mask"])[0])
            else:
                both.append(objective.tracker(objective.read(hidden, b))[0, : alone["segments"].shape[1]])
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)


def test_the_goal_is_updated_once_a_segment_and_expects_the_next():
    objective = Temporal(plans(), rank=5, temperature=0.5, consistency=2.0)
    _, forward, batch = ready(objective)
    hidden = forward.current("temporal", batch).hidden
    tracker, z = objective.tracker, objective.read(hidden, batch)
    assert tracker.start.shape == (5,)
    counts = batch["segments"].any(-1).sum(1).tolist()
    assert counts == [2, 3, 2, 3] and objective.items(batch) == 6
    among = torch.cat([z[i, :n] for i, n in enumerate(counts)])
    text, drift, place = 0.0, 0.0, 0
    for i, n in enumerate(counts):
        goal, goals = tracker.start, []
        for s in range(n):
            mine = batch["segments"][i, s] > 0
            torch.testing.assert_close(z[i, s], tracker.reader.coordinates(hidden[i][mine]).mean(0))
            goal = tracker.cell(tracker.reader.map(z[i, s]), goal)
            goals.append(goal)
        for s in range(n - 1):
            scores = F.cosine_similarity(tracker.expect(goals[s])[None], among) / 0.5
            text += scores.logsumexp(0) - scores[place + s + 1]
            drift += 1 - F.cosine_similarity(goals[s], goals[s + 1], dim=0)
        place += n
    losses, metrics = objective.losses(forward.current("temporal", batch), batch)
    torch.testing.assert_close(losses["temporal"], (text + 2.0 * drift) / 6)
    torch.testing.assert_close(metrics["drift"], drift / 6)


def test_windows_of_a_text():
    objective = Temporal([{"text": "abcdefghij"}, {"text": "abcdef"}], window=3, rank=2)
    _, _, batch = ready(objective, rows=2)
    assert [len(r["ids"]) for r in objective.rows] == [9, 6]  # the rest is dropped
    assert batch["segments"].sum(-1).tolist() == [[3, 3, 3], [3, 3, 0]]
    cut = Temporal([{"text": "abcdefghij"}], window=3, max_length=8)
    ready(cut, rows=1)
    assert [len(r["ids"]) for r in cut.rows] == [6]  # whole windows only


# ---- reinforcement learning ----


def test_curiosity_is_paid_by_token_and_its_target_is_the_base_models(tmp_path):
    plain, curious = rl(curiosity_reward=0.0), rl(curiosity_reward=2.0)
    batches, runs = [], []
    for objective in (plain, curious):
        runs.append(trainer(tmp_path, objective, made(), per_device_train_batch_size=4))
        batches.append(objective.batches(runs[-1].forward, 0, runs[-1].share("ppo"))[0])
    a, b = batches
    assert torch.equal(a["input_ids"], b["input_ids"]) and "intrinsic" not in b
    mask = b["completion_mask"][:, 1:].float()
    reference = runs[1].forward.reference(b).hidden
    torch.testing.assert_close(b["next_states"], curious.curiosity.target(reference), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        error = curious.curiosity(runs[1].forward.current("ppo", b).hidden, b["input_ids"], b["next_states"]) * mask
    torch.testing.assert_close(b["metric.intrinsic_reward"], 2.0 * error.sum(1).mean(), rtol=1e-4, atol=1e-5)
    # values start at 0 and gamma is 1, so with lam = 1 returns are what is still to come
    assert (b["returns"] - a["returns"])[mask > 0].min() > 0
    losses, metrics = curious.losses(runs[1].forward.current("ppo", b), b)
    torch.testing.assert_close(losses["curiosity"], error.sum() / mask.sum(), rtol=1e-4, atol=1e-5)
    assert losses.keys() == {"policy", "value", "entropy", "kl", "advantage", "curiosity"}
    assert {"advantage_explained", "intrinsic_reward"} <= metrics.keys()


def test_advantages_are_read_after_the_token_they_belong_to(tmp_path):
    objective = rl(advantage_coef=3.0)
    run = trainer(tmp_path, objective, made(), per_device_train_batch_size=4)
    batch = objective.batches(run.forward, 0, run.share("ppo"))[0]
    outputs = run.forward.current("ppo", batch)
    total = []
    for i, mask in enumerate(batch["completion_mask"].bool()):
        for t in mask.nonzero()[:, 0]:
            said = objective.advantage_head(outputs.hidden[i, t])[0]
            total.append(0.5 * (said - batch["advantages"][i, t - 1]).square())
    losses, _ = objective.losses(outputs, batch)
    torch.testing.assert_close(losses["advantage"], 3.0 * torch.stack(total).mean(), rtol=1e-4, atol=1e-5)


# ---- state ----


def test_heads_are_saved_and_resumed_to_the_bit(tmp_path):
    """All signals at once, stopped after step 2 in the middle of a rollout."""
    common = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 4}
    whole = trainer(tmp_path, whole_table(), made(), **common)
    whole.train()
    again = trainer(tmp_path, whole_table(), made(), **common)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert unchanged(snapshot(whole.model.state_dict()), again.model.state_dict())
    for name, objective in whole.objectives.items():
        if (head := objective.head()) is not None:
            assert unchanged(head.state_dict(), again.objectives[name].head().state_dict()), name
    assert losses_of(whole)[-1] == losses_of(again)[-1]


def test_without_the_new_coefficients_ppo_is_what_it_was(tmp_path):
    objective = rl(advantage_coef=0.0, curiosity_coef=0.0, curiosity_reward=0.0)
    run = trainer(tmp_path, objective, model(), per_device_train_batch_size=4)
    assert objective.head() is objective.value_head and objective.signals == ("policy", "value", "entropy", "kl")
    assert "next_states" not in objective.batches(run.forward, 0, run.share("ppo"))[0]


def test_one_adapter_for_all_signals_and_none_work_too(tmp_path):
    """The controls: a bundle that owns several signals, and a model without bundles, whose heads read everything."""
    bundles = config().bundles
    bundles["b_lm"].signals["confusion"] = 1.0
    run = trainer(tmp_path, Confusion(judged()), model(bundles=bundles))
    assert run.objectives["confusion"].reader.basis.shape == (64, 24)
    base = made().unload()
    assert torch.equal(subspace(base, "confusion"), torch.eye(64)) and owners(base, "confusion") == []
