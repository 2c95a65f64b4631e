"""The anchor: KL to the base model on its own samples, in the bundles that own it."""

import pytest
import torch
import torch.nn.functional as F
from models import batch, logits
from training import config, losses_of, model, texts, tokenizer, trainer

from peft_bundles import own_samples
from peft_bundles.core.walking import bundle_parameters
from peft_bundles.objectives import LM, Anchor, Forward
from peft_bundles.objectives.base import Share


def anchored(**fields):
    bundles = config().bundles
    bundles["b_lm"].signals["anchor"] = 1.0
    return model(bundles=bundles, **fields)


def rows(on, count=16):
    return own_samples(on, tokenizer(), tokens=count * 12, max_length=12, batch_size=4)


def test_it_is_the_kl_to_the_model_without_bundles():
    made = anchored()
    objective = Anchor([{"input_ids": r["input_ids"][: 12 - i % 3]} for i, r in enumerate(rows(made))], coef=0.5)
    objective.setup(tokenizer(), made)
    forward = Forward(made, {"anchor": ("anchor",)}, {"anchor": {}})
    (given,) = objective.batches(forward, 0, Share(4))
    losses, metrics = objective.losses(forward({"anchor": given})["anchor"], given)
    wanted, count = 0.0, 0
    for ids, mask in zip(given["input_ids"], given["attention_mask"].bool()):
        ids = ids[mask][None]
        with made.alphas(dict.fromkeys(config().bundles, 0.0)):
            base = logits(made, ids)[0, :-1].log_softmax(-1)
        found = logits(made, ids)[0, :-1].log_softmax(-1)
        wanted += F.kl_div(found, base, log_target=True, reduction="sum")
        count += len(base)
    torch.testing.assert_close(metrics["kl"], wanted / count)
    torch.testing.assert_close(losses["anchor"], 0.5 * wanted / count)
    assert metrics["kl"] > 1e-4


def test_a_fresh_adapter_has_none_and_only_owners_are_held():
    made = anchored(moved=False)
    fresh = Anchor(rows(made))
    fresh.setup(tokenizer(), made)
    forward = Forward(made, {"anchor": ("anchor",)}, {"anchor": {}})
    (given,) = fresh.batches(forward, 0, Share(4))
    assert fresh.losses(forward({"anchor": given})["anchor"], given)[0]["anchor"] == 0.0
    made = anchored()
    forward = Forward(made, {"anchor": ("anchor",)}, {"anchor": {}})
    fresh.losses(forward({"anchor": given})["anchor"], given)[0]["anchor"].backward()
    moved = {name for (_, name), ps in bundle_parameters(made).items() if any(p.grad is not None for p in ps)}
    assert moved == {"b_lm"}


def test_text_is_learnt_with_less_harm_beside_it(tmp_path):
    harm = {}
    for name, coef in (("alone", None), ("anchored", 30.0)):
        made = anchored(moved=False)
        samples = rows(made, 48)
        objectives = [LM(texts())] + ([Anchor(samples[:32], coef=coef)] if coef else [])
        run = trainer(tmp_path / name, objectives, made, max_steps=30, rows={"anchor": 8} if coef else None)
        run.train()
        assert losses_of(run)[-1]["loss/lm"] < losses_of(run)[0]["loss/lm"] - 0.2
        held_out = torch.tensor([r["input_ids"] for r in samples[32:]])
        now = logits(made, held_out).log_softmax(-1)
        with made.alphas(dict.fromkeys(config().bundles, 0.0)):
            base = logits(made, held_out).log_softmax(-1)
        harm[name] = (base.exp() * (base - now)).sum(-1).mean().item()
    assert harm["anchored"] < 0.5 * harm["alone"]


def test_own_samples_are_the_base_models_and_leave_everything_as_it_was():
    made = model().train()
    before = torch.random.get_rng_state()
    found = rows(made)
    assert torch.equal(torch.random.get_rng_state(), before) and made.training
    assert [len(r["input_ids"]) for r in found] == [12] * 16
    assert found == rows(model(moved=False))  # bundles are off while it samples
    ids = batch()
    assert not torch.equal(logits(made.eval(), ids), logits(model(moved=False).eval(), ids))


def test_bad_coefficients_are_refused():
    with pytest.raises(ValueError, match="'anchor': coef=0"):
        Anchor(texts(), coef=0)
