"""Training the trunk in subspaces of signals, and the hinge on a bundle's KL to the base model."""

import math

import pytest
import torch
from models import TINY, perturb
from peft import get_peft_model
from training import bundles_of, config, model, pairs, texts, trainer

from peft_bundles import BundleConfig
from peft_bundles.objectives import LM, Preference
from peft_bundles.objectives.kl_clamp import KLClamp
from peft_bundles.routing.backward import routed_backward
from peft_bundles.trainer.trunk import TrunkProjection, trunk_parameters


def trunk_of(made) -> dict:
    return {name: p.detach().clone() for name, p in trunk_parameters(made).items()}


# ---- the trunk ----


def test_a_frozen_trunk_stays_and_a_full_one_moves(tmp_path):
    for trunk in ("frozen", "full"):
        made = model()
        before = trunk_of(made)
        run = trainer(tmp_path, [LM(texts()), Preference(pairs())], made, trunk=trunk)
        run.train()
        after = trunk_of(made)
        assert all(torch.equal(before[n], after[n]) for n in before) == (trunk == "frozen")
        assert any("the trunk is trained" in line for line in run.promises()) == (trunk == "full")


@pytest.mark.parametrize("module", ["lm_head", "norm", "embed_tokens"])
def test_the_reference_is_the_base_where_other_modules_are_trained(tmp_path, module):
    """As with PEFT's `disable_adapter`; alphas of 0 turn off bundles only."""
    made = get_peft_model(TINY["llama"](), config(modules_to_save=[module]))
    frozen = made.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.weight")
    run = trainer(tmp_path, Preference(pairs()), made, learning_rate=5e-2)
    rows = run.objectives["preference"]
    batch = rows.on(run.forward, rows.collate([rows.rows[i] for i in range(4)]))
    before = run.forward.reference(batch)
    run.train()
    after = run.forward.reference(batch)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.hidden, after.hidden)
    ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad(), made.eval().disable_adapter():
        assert torch.equal(made(**ids).logits, after.logits)
    with torch.no_grad(), made.alphas(dict.fromkeys(made.peft_config["default"].bundles, 0.0)):
        assert not torch.equal(made(**ids).logits, after.logits)
    (line,) = run.promises()
    assert line.startswith("modules_to_save are trained") and not frozen.requires_grad


def test_a_model_without_bundles_is_fine_tuned_by_all(tmp_path):
    made = get_peft_model(TINY["llama"](), BundleConfig(preset="baseline", task_type="CAUSAL_LM"))
    before = trunk_of(made)
    objectives = [LM(texts()), Preference(pairs(), loss="orpo")]
    run = trainer(tmp_path, objectives, made, max_steps=4, save_strategy="steps", save_steps=2)
    run.train()
    kept = trunk_of(made)
    assert not any(torch.equal(before[n], kept[n]) for n in before)
    assert len(run.promises()) == 1 and "the trunk is trained" in run.promises()[0]
    again = get_peft_model(TINY["llama"](), BundleConfig(preset="baseline", task_type="CAUSAL_LM"))
    trainer(tmp_path, objectives, again, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, kept[n]) for n, p in trunk_of(again).items())


def _gradients(ranks: dict, *, passes: int = 1) -> tuple[dict, TrunkProjection, dict]:
    made = model()
    for parameter in trunk_parameters(made).values():
        parameter.requires_grad_()
    projection = TrunkProjection(trunk_parameters(made), ranks, refresh=10)
    ids = torch.randint(4, 100, (4, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(passes):
        with made.route(["lm", "lm", "preference", "preference"]):
            logits = made(ids).logits
        losses = {
            "lm": -logits[:2].log_softmax(-1)[..., 5].mean(),
            "preference": -logits[2:].log_softmax(-1)[..., 7].mean(),
        }
        if passes == 1 and not ranks:
            routed_backward(made, losses)
        else:
            projection.backward(made, losses, step=0)
    return {n: p.grad for n, p in projection.parameters.items()}, projection, dict(made.named_parameters())


def test_a_projected_gradient_is_the_best_of_its_rank_and_full_rank_is_the_whole():
    whole, _, named = _gradients({})
    full, _, projected_named = _gradients({"lm": 64, "preference": 64})
    for name, gradient in whole.items():
        if gradient.dim() == 2:
            torch.testing.assert_close(full[name], gradient, rtol=1e-4, atol=1e-6)
        else:
            assert full[name] is None  # a norm has no subspace
    for name, p in named.items():  # the bundles get what they got
        if ".bundle_" in name and p.grad is not None:
            torch.testing.assert_close(projected_named[name].grad, p.grad, rtol=1e-4, atol=1e-7)
    held, projection, _ = _gradients({"lm": 3, "preference": 64})
    for (signal, name), p in projection.projectors.items():
        torch.testing.assert_close(p.T @ p, torch.eye(p.shape[1]), rtol=1e-4, atol=1e-5)
        if signal == "lm":
            own = held[name] - full[name]  # what is missing is the lm part outside of its subspace
            short = own.T if own.shape[0] > own.shape[1] else own
            assert torch.linalg.matrix_rank(p) == 3 and (p.T @ short).abs().max() < 1e-5 + 1e-3 * short.abs().max()
    assert any((held[n] - whole[n]).abs().max() > 1e-6 for n in whole if whole[n].dim() == 2)


def test_projected_gradients_accumulate():
    once, _, _ = _gradients({"lm": 3})
    twice, _, _ = _gradients({"lm": 3}, passes=2)
    for name, gradient in once.items():
        if gradient is not None:
            torch.testing.assert_close(twice[name], 2 * gradient, rtol=1e-4, atol=1e-7)


def test_the_subspace_stays_until_it_is_refreshed(tmp_path):
    run = trainer(tmp_path, LM(texts()), trunk="full", trunk_ranks={"lm": 2}, trunk_refresh=3, max_steps=4)
    seen, choose = [], run.trunk.backward

    def spy(model, losses, step):
        choose(model, losses, step)
        seen.append({k: p.clone() for k, p in run.trunk.projectors.items()})

    run.trunk.backward = spy
    run.train()
    same = [all(torch.equal(seen[i][k], seen[i + 1][k]) for k in seen[i]) for i in range(3)]
    assert same == [True, True, False]


def test_an_update_with_sgd_stays_in_the_subspace(tmp_path):
    made = model()
    before = trunk_of(made)
    run = trainer(tmp_path, LM(texts()), made, trunk="full", trunk_ranks={"lm": 2}, optim="sgd", weight_decay=0.0)
    run.train()
    moved = {n: p - before[n] for n, p in trunk_of(made).items() if p.dim() == 2}
    assert moved and all(int(torch.linalg.matrix_rank(m, rtol=1e-3)) <= 2 for m in moved.values())
    assert any(m.abs().max() > 0 for m in moved.values())


# ---- the clamp ----


def wide_model(scale: float = 0.3, **fields):
    made = get_peft_model(TINY["llama"](initializer_range=0.2), config(**fields))
    return perturb(made, scale=scale) if scale else made


CLAMP = {"strength": {"lm": 1.0}, "beta": {"b_policy": 1.0, "b_kl": 0.5}}


def clamp_of(run, batch, **fields):
    made = run.model
    clamp = KLClamp.from_config({**CLAMP, **fields}, made, run.forward.signals)
    metrics: dict = {}
    outputs = run.forward({"lm": batch})["lm"]
    return clamp(run.forward, "lm", outputs, batch, metrics), metrics, clamp, outputs


@pytest.mark.parametrize(("projection", "width"), [("none", 24), ("tied", 6)])
def test_kl_is_that_of_the_projected_readouts(tmp_path, projection, width):
    objective = LM(texts())
    run = trainer(tmp_path, objective, wide_model(projection=projection))
    (batch,) = objective.batches(run.forward, 0, run.share("lm"))
    penalty, metrics, clamp, outputs = clamp_of(run, batch, tokens=10**6)
    kept = batch["attention_mask"].bool()
    head = run.model.get_output_embeddings()
    for bundle in CLAMP["beta"]:
        q = clamp.subspace(bundle)
        torch.testing.assert_close(q.T @ q, torch.eye(width), rtol=1e-4, atol=1e-5)
        projector = q @ q.T
        now, base = (
            head(h[kept] @ projector).log_softmax(-1) for h in (outputs.hidden, run.forward.reference(batch).hidden)
        )
        expected = torch.nn.functional.kl_div(base, now, reduction="batchmean", log_target=True)
        torch.testing.assert_close(metrics[f"clamp_kl/{bundle}"], expected.detach(), rtol=1e-4, atol=1e-6)
        assert expected > 0
    total = metrics["clamp_kl/b_policy"] + 0.5 * metrics["clamp_kl/b_kl"]
    torch.testing.assert_close(penalty["lm"].detach(), total)


def test_the_hinge_is_off_below_tau_and_has_a_gradient_above(tmp_path):
    objective = LM(texts())
    run = trainer(tmp_path, objective, wide_model())
    (batch,) = objective.batches(run.forward, 0, run.share("lm"))
    _, metrics, _, _ = clamp_of(run, batch)
    total = metrics["clamp_kl/b_policy"] + 0.5 * metrics["clamp_kl/b_kl"]
    for tau, active in ((2 * float(total), False), (0.5 * float(total), True)):
        penalty, _, _, _ = clamp_of(run, batch, tau=tau)
        run.model.zero_grad()
        penalty["lm"].backward()
        gradients = [p.grad for p in run.model.bundle_parameters("b_lm")]
        assert (penalty["lm"] > 0) == active
        assert any(g is not None and bool(g.any()) for g in gradients) == active


def test_a_model_that_is_its_base_is_at_zero(tmp_path):
    objective = LM(texts())
    run = trainer(tmp_path, objective, wide_model(scale=0.0))
    (batch,) = objective.batches(run.forward, 0, run.share("lm"))
    _, metrics, _, _ = clamp_of(run, batch)
    assert all(abs(float(v)) < 1e-6 for v in metrics.values())


def test_training_under_the_clamp_moves_the_readout_less_and_only_owners_move(tmp_path):
    ends = {}
    for strength in (None, 300.0):
        made = wide_model(scale=0.0)
        before = bundles_of(made)
        clamp = strength and {"strength": {"lm": strength}, "beta": {"b_policy": 1.0}, "tau": 0.0}
        objective = LM(texts())
        run = trainer(tmp_path, objective, made, max_steps=15, kl_clamp=clamp, per_device_train_batch_size=4)
        run.train()
        (batch,) = objective.batches(run.forward, 0, run.share("lm"))
        _, metrics, _, _ = clamp_of(run, batch)
        ends[strength] = float(metrics["clamp_kl/b_policy"])
        assert ("lm/clamp" in run.state.log_history[-2]) == bool(strength)
        after = bundles_of(made)
        assert [n for n in before if not all(torch.equal(a, b) for a, b in zip(before[n], after[n]))] == ["b_lm"]
    assert 0 < ends[300.0] < 0.5 * ends[None] and math.isfinite(ends[None])


def test_protected_bundles_are_clamped_when_none_is_named():
    bundles = config().bundles
    bundles["b_kl"].protected = True
    made = model(bundles=bundles)
    clamp = KLClamp(made, {"lm": 1.0}, signals={"lm": ("lm",)})
    assert clamp.beta == {"b_kl": 1.0}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": {"lmm": 1.0}}, r"strength names \['lmm'\]; choose from \['lm'\]"),
        ({"strength": {"lm": 1.0}}, r"beta is empty; name at least one of"),
        ({**CLAMP, "beta": {"b_x": 1.0}}, r"beta names \['b_x'\]"),
        ({**CLAMP, "tau": -1}, r"tau=-1 must be >= 0"),
        ({**CLAMP, "strength": {"lm": 0.0}}, r"strength=\{'lm': 0.0\} must be positive"),
        ({"beta": {"b_kl": 1.0}}, r"strength is missing"),
        ({**CLAMP, "sigma": 1.0}, r"unknown field\(s\) \['sigma'\]"),
    ],
)
def test_a_clamp_that_cannot_be_is_refused(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, LM(texts()), kl_clamp=fields)
