"""The penalty that keeps bundles quiet on calibration text: its value, whom it moves, and that it does its work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import TINY, attached, batch, bundle_config, layers, perturb, weights
from peft import PeftModel, get_peft_model

from peft_bundles import BundleConfig, BundleSpec, calibrate
from peft_bundles.core.layer import BundleLayer
from peft_bundles.core.quiet import DRAW, _Energy, _loudness, loudness
from peft_bundles.core.walking import state_of


def calibrated(**fields):
    model = get_peft_model(TINY["llama"](), bundle_config(**fields))
    calibrate(model, tokens=512, max_length=32, progress=False)
    return perturb(model)


def added_by(model, layer, names, states):
    """What some bundles add together to states (N, d), from the layer's own forward."""
    alphas = dict.fromkeys(state_of(model).bundle_names(), 0.0) | dict.fromkeys(names, 1.0)
    with model.alphas(alphas), torch.no_grad():
        return layer(states[None])[0] - states


@pytest.mark.parametrize("kinds", ["projected", "with a full one"])
@pytest.mark.parametrize("projection", ["none", "tied"])
@pytest.mark.parametrize("input_norm", ["standard", "none"])
def test_it_is_the_mean_square_of_what_is_added_to_the_kept_states(projection, input_norm, kinds):
    bundles = dict(bundle_config().bundles)
    if kinds == "with a full one":
        bundles["b_full"] = {"rank": 1, "adapter": "full", "bottleneck": 0.1, "signals": {"policy": 1.0}}
    model = calibrated(projection=projection, input_norm=input_norm, quiet=3.0, bundles=bundles)
    model.train()(input_ids=batch(), labels=batch())  # every bundle may learn
    wanted = 0.0
    for layer in layers(model):
        states = layer.bundle_states["default"].float()
        assert 100 < len(states) <= DRAW  # so few that all are looked at
        scale = layer.bundle_scale["default"] if input_norm == "standard" else 1.0
        if kinds == "projected":  # they are kept in coordinates of U
            states = states @ layer.bundle_basis["default"].T * scale
        if input_norm == "standard":
            states = states + layer.bundle_mean["default"]
        for together in (("b_mlp", "b_diag"), tuple(bundles)[1:2] + tuple(bundles)[3:]):  # by what they learn from
            added = added_by(model, layer, together, states).square().sum(-1).mean()
            wanted += added / layer.bundle_scale["default"].square().sum()
    torch.testing.assert_close(model.quiet_loss(), 3.0 * wanted, rtol=1e-4, atol=1e-6)


def test_kept_states_are_those_of_the_text(monkeypatch):
    """In coordinates of U: the same penalty, to bfloat16's rounding, as from the states themselves."""
    given = {}
    keep = BundleLayer.keep_states
    monkeypatch.setattr(
        BundleLayer, "keep_states", lambda self, *args: (given.update({self.index: args[1]}), keep(self, *args))
    )
    model = calibrated(quiet=1.0)
    model.train()(input_ids=batch(), labels=batch())
    wanted = 0.0
    for layer in layers(model):
        for together in (("b_mlp", "b_diag"), ("b_linear",)):
            added = added_by(model, layer, together, given[layer.index].float()).square().sum(-1).mean()
            wanted += added / layer.bundle_scale["default"].square().sum()
    torch.testing.assert_close(model.quiet_loss(), wanted, rtol=1e-2, atol=0)


@pytest.mark.parametrize("names", [["b_mlp", "b_linear", "b_diag"], ["b_diag"]])
def test_layers_looked_at_together_or_one_by_one_are_as_loud(names):
    """Together is how a GPU does it, one by one a CPU."""
    model = calibrated()
    tables = [layer.tables("default") for layer in layers(model)]
    together = _loudness(layers(model), "default", names, tables, {})
    found, losses = [], (together, loudness(layers(model), "default", names))
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(weights(model).values()), allow_unused=True)
        found.append({n: g for n, g in zip(weights(model), gradients) if g is not None})
    torch.testing.assert_close(*losses)
    assert {n.rsplit(".")[-1] for n in found[0]} == set(names)
    torch.testing.assert_close(*found)


def test_layers_that_kept_different_numbers_of_states_count_alike():
    model = calibrated(quiet=1.0).train()
    for layer in layers(model):
        layer.bundle_states["default"] = layer.bundle_states["default"][:200]
    model(input_ids=batch(), labels=batch())
    before = model.quiet_loss()
    layers(model)[0].bundle_states["default"] = layers(model)[0].bundle_states["default"].repeat(2, 1)
    torch.testing.assert_close(model.quiet_loss(), before)


def test_many_bundles_are_as_loud_as_one_that_adds_the_same():
    sub_bases, signals = {"main": 16}, {"lm": 1.0}
    one = BundleConfig(sub_bases=sub_bases, bundles={"b": BundleSpec(16, ["main"], bottleneck=8, signals=signals)})
    parts = {f"b_{i}": BundleSpec(16, ["main"], bottleneck=2, signals=signals) for i in range(4)}
    models = [
        get_peft_model(TINY["llama"](), config) for config in (one, BundleConfig(sub_bases=sub_bases, bundles=parts))
    ]
    for model in models:
        calibrate(model, tokens=512, max_length=32, progress=False)
    perturb(models[0])
    with torch.no_grad():
        for whole, split in zip(layers(models[0]), layers(models[1])):
            for what, dim in (("bundle_down", 0), ("bundle_up", 1)):
                pieces = getattr(whole, what)["default"]["b"].chunk(4, dim)
                for name, piece in zip(parts, pieces):
                    getattr(split, what)["default"][name].copy_(piece)
    for model in models:
        model.train()(input_ids=batch())
    torch.testing.assert_close(models[1].quiet_loss(), models[0].quiet_loss())


@pytest.mark.parametrize(("signal", "owners"), [("lm", {"b_mlp", "b_diag"}), ("policy", {"b_linear"})])
def test_under_a_route_it_moves_the_owners_only_and_does_not_depend_on_the_others(signal, owners):
    model, ids = calibrated(), batch()
    model.train()
    with model.route(signal):
        model(input_ids=ids)  # no labels, no penalty
    model.quiet_loss().backward()
    grads = {name: p.grad for name, p in weights(model).items()}
    assert {name.rsplit(".", 1)[1] for name, grad in grads.items() if grad is not None} == owners
    assert all(bool(grad.any()) for grad in grads.values() if grad is not None)
    with torch.no_grad():
        for name, parameter in weights(model).items():
            if name.rsplit(".", 1)[1] not in owners:
                parameter.normal_()
    model.zero_grad()
    model.quiet_loss().backward()
    for name, parameter in weights(model).items():
        if grads[name] is not None:
            torch.testing.assert_close(parameter.grad, grads[name])


def test_a_bundle_that_is_off_stays_out_of_it():
    """b_diag learns from lm as b_mlp does, but a bundle at alpha 0 learns nothing, and nothing of it counts."""
    model, ids = calibrated().train(), batch()
    found = []
    for _ in range(2):
        model.zero_grad()
        with model.alphas(b_diag=0.0, b_linear=0.0):
            model(input_ids=ids)
        loss = model.quiet_loss()
        loss.backward()
        model.finalize_grads()
        grads = {name: p.grad for name, p in weights(model).items() if p.grad is not None}
        assert {name.rsplit(".", 1)[1] for name in grads} == {"b_mlp"}
        found.append((loss.detach(), grads))
        with torch.no_grad():
            for name, parameter in weights(model).items():
                if not name.endswith("b_mlp"):
                    parameter.normal_()
    torch.testing.assert_close(found[1], found[0])


def test_without_calibration_or_at_weight_0_there_is_none():
    ids = batch()
    for model in (perturb(attached("llama")), calibrated(quiet=0.0)):
        model.train()(input_ids=ids, labels=ids)
        assert model.quiet_loss().item() == 0.0


def test_states_are_not_saved_and_can_be_renewed_for_a_trained_adapter(tmp_path):
    model = calibrated()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(TINY["llama"](), tmp_path, is_trainable=True)
    assert not any("bundle_states" in key for key in loaded.state_dict())
    basis = {layer.index: layer.bundle_basis["default"].clone() for layer in layers(loaded)}
    with pytest.raises(RuntimeError, match="states_only=True"):
        calibrate(loaded, tokens=512, max_length=32, progress=False)
    calibrate(loaded, tokens=512, max_length=32, progress=False, states_only=True)
    for mine, before in zip(layers(loaded), layers(model)):
        assert torch.equal(mine.bundle_basis["default"], basis[mine.index])
        assert torch.equal(mine.bundle_states["default"], before.bundle_states["default"])
    ids = batch()
    for each in (model, loaded):
        each.train()(input_ids=ids, labels=ids)
    assert torch.equal(loaded.quiet_loss(), model.quiet_loss())


def test_loading_weights_into_a_calibrated_adapter_keeps_its_states(tmp_path):
    """What a trainer does when it resumes: the script calibrates, then the checkpoint's weights come."""
    model = calibrated()
    model.save_pretrained(tmp_path)
    kept = [layer.bundle_states["default"].clone() for layer in layers(model)]
    model.load_adapter(tmp_path, "default", is_trainable=True)
    assert all(torch.equal(layer.bundle_states["default"], k) for layer, k in zip(layers(model), kept))


def train(model, ids, steps=120):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


def disturbance(model, base_logits, ids):
    """KL(base || model) a token."""
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits.log_softmax(-1)
    return (base_logits.softmax(-1) * (base_logits.log_softmax(-1) - logprobs)).sum(-1).mean().item()


def test_the_default_disturbs_less_than_what_it_replaced():
    """A guard on the defaults (docs/results/learning.md): they learn as much and disturb the base's own text less.

    The controls are what the defaults won against: no penalty, and a projector of the same number of parameters.
    """
    base = TINY["llama"](initializer_range=0.2)
    ids = batch(4, 16, seed=1)
    torch.manual_seed(5)
    text = base.generate(
        input_ids=batch(16, 1, seed=2),
        attention_mask=torch.ones(16, 1),
        do_sample=True,
        max_new_tokens=31,
        min_new_tokens=31,
    )
    with torch.no_grad():
        base_logits = base(input_ids=text).logits
    found = {}
    for name, fields in {
        "default": {},
        "loud": {"quiet": 0.0},
        "projected": {"quiet": 0.0, "projection": "tied"},
    }.items():
        model = get_peft_model(TINY["llama"](initializer_range=0.2), BundleConfig(task_type="CAUSAL_LM", **fields))
        calibrate(model, tokens=2048, max_length=32, progress=False)
        train(model, ids)
        with torch.no_grad():
            found[name] = model(input_ids=ids, labels=ids).loss.item(), disturbance(model, base_logits, text)
    start = torch.nn.functional.cross_entropy(base(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert found["default"][0] < 0.25 * start.item()
    assert found["default"][1] < 0.5 * found["loud"][1]
    assert found["default"][1] < 0.5 * found["projected"][1]


def test_under_autocast_it_is_the_same_to_its_rounding():
    model, ids = calibrated().train(), batch()
    found = []
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model(input_ids=ids)
            loss = model.quiet_loss()
        loss.backward()
        found.append((loss, torch.cat([p.grad.flatten() for p in weights(model).values()])))
    (exact, grad), (loss, rounded) = found
    assert loss.dtype == torch.float32 and rounded.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)
    assert 0 < (rounded - grad).norm() / grad.norm() < 2e-2


@pytest.mark.parametrize("nonlinear", [0, 4, 7])
def test_energy_and_its_gradient(nonlinear):
    def drawn(*shape):
        return torch.randn(*shape, dtype=torch.float64)

    x, maps = drawn(2, 5, 6), drawn(2, 2, 7, 6).requires_grad_()
    ours = torch.tensor([1, 0, 1, 1, 1, 0, 1], dtype=torch.float64)
    groups = [([(0, 2)], 1.0), ([(2, 1), (4, 2)], 0.5)]  # units 3 and 6 are of bundles that learn nothing

    def plain(maps):
        s = x @ maps[:, 0].mT
        a = torch.cat([F.gelu(s[..., :nonlinear]), s[..., nonlinear:]], -1) * ours
        of = [(a[..., units] @ maps[:, 1, units]).square().sum((1, 2)) for units in ([0, 1], [2, 4, 5])]
        return of[0] + 0.5 * of[1]

    energy = lambda maps: _Energy.apply(x, *maps.unbind(1), ours, nonlinear, groups)  # noqa: E731
    torch.testing.assert_close(energy(maps), plain(maps))
    found, wanted = (torch.autograd.grad(f(maps).square().sum(), maps)[0] for f in (energy, plain))
    torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradcheck(energy, maps)
