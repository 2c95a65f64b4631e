"""Behaviour that shows in no other test: each of these failed for a change of one line that all others let pass."""

from __future__ import annotations

import copy

import pytest
import torch
from models import TINY, attached, batch, bundle_config, layers, logits, perturb, quietly_loaded, weights
from peft import get_peft_model

import peft_bundles
from peft_bundles import calibrate
from peft_bundles.core.quiet import DRAW, loudness


def calibrated(**fields):
    model = get_peft_model(TINY["llama"](), bundle_config(**fields))
    calibrate(model, tokens=256, max_length=32, progress=False)
    return perturb(model)


# ---- the quiet penalty ----


def test_the_penalty_draws_from_all_kept_states():
    model = calibrated()
    layer = layers(model)[0]
    states = layer.bundle_states["default"]
    many = states.new_zeros(4 * DRAW, states.shape[1])
    many[DRAW:] = states[torch.arange(3 * DRAW) % len(states)]  # the first ones say nothing
    layer.bundle_states["default"] = many
    torch.manual_seed(0)
    drawn = loudness([layer], "default", ["b_mlp"])
    torch.manual_seed(0)
    layer.bundle_states["default"] = many[torch.randint(len(many), (1, DRAW))[0]]
    assert drawn > 0 and torch.equal(drawn, loudness([layer], "default", ["b_mlp"]))
    layer.bundle_states["default"] = many
    assert not torch.equal(drawn, loudness([layer], "default", ["b_mlp"]))  # other states the next time


# ---- dropout ----


def test_dropout_keeps_the_mean_and_acts_without_gradients_too():
    linear = {"b_linear": {"rank": 6, "sub_bases": ["left"], "adapter": "linear", "signals": {"lm": 1.0}}}
    model = attached(dropout=0.5, bundles=linear)
    layer, hidden = layers(model)[0], torch.randn(1, 1, 64).expand(1, 20_000, 64)
    with torch.no_grad():
        whole = (layer(hidden) - hidden)[0, 0]
        model.train()
        once, again = layer(hidden) - hidden, layer(hidden) - hidden
    assert not torch.equal(once, again)
    assert float((once[0].mean(0) - whole).norm()) < 0.05 * float(whole.norm())


# ---- loading and copying ----


def test_loaded_tensors_do_not_point_into_the_file(tmp_path):
    """A tensor in a mapped file is not aligned, which changes the rounding of matrix products."""
    calibrated().save_pretrained(tmp_path)
    model = quietly_loaded(TINY["llama"](), tmp_path, low_cpu_mem_usage=True)
    for layer in layers(model):
        for what in layer.other_param_names:
            tensor = getattr(layer, what)["default"]
            assert tensor.data_ptr() % 64 == 0, what  # as PyTorch allocates them


def test_a_copy_keeps_the_norm_budget():
    model, ids = attached(), batch()
    peft_bundles.set_norm_budget(model, 0.01)
    assert torch.equal(logits(copy.deepcopy(model), ids), logits(model, ids))
    assert not torch.equal(logits(model, ids), logits(attached(), ids))


# ---- gradients ----


def test_a_bundle_that_is_off_in_every_row_has_no_gradient():
    model, ids = attached().train(), batch()
    model(input_ids=ids, labels=ids, alphas={"b_mlp": torch.zeros(len(ids))}).loss.backward()
    for name, parameter in weights(model).items():
        assert (parameter.grad is None) == name.endswith("b_mlp"), name


def same_rows(model, signals=("lm", "policy")):
    ids = batch()
    with model.route(signals):
        out = model(input_ids=ids, labels=ids)
    return {"lm": out.loss, "policy": out.logits.logsumexp(-1).mean()}


def test_routes_that_wait_for_their_losses_are_not_forgotten():
    model = attached().train()
    first, second = same_rows(model), same_rows(model)
    model.routed_backward(first)
    with pytest.raises(RuntimeError, match="route"):
        model.finalize_grads()
    model.zero_grad()
    model.routed_backward(same_rows(model))
    model.finalize_grads()
    del second


def test_with_projectors_one_broken_loss_spoils_its_owners_only():
    """Gradients of several losses must not be added up before they go back to the projectors."""
    model = attached(projection="tied").train()
    losses = same_rows(model)
    model.routed_backward({"lm": losses["lm"], "policy": losses["policy"] * float("inf")})
    broken = {name.rpartition(".")[2] for name, p in weights(model).items() if not p.grad.isfinite().all()}
    assert broken == {"b_linear"}
