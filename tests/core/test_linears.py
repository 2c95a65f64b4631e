"""Bundles at linear layers compute the written equation, route and are penalised as those behind blocks."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from models import TINY, batch, logits, perturb, weights
from peft import LoraConfig, get_peft_model

from peft_bundles import BundleConfig, calibrate, compose, merge_bundles, orthogonality, report, save_bundle
from peft_bundles.core.functional import linear_reference
from peft_bundles.core.walking import bundle_layers


BUNDLES = {
    "b_one": {"rank": 3, "place": "all-linear", "signals": {"lm": 1.0, "policy": 0.5}},
    "b_two": {"rank": 6, "place": "mlp", "kind": "mlp", "lora_alpha": 5, "signals": {"policy": 1.0}},
    "b_three": {"rank": 4, "place": "all-linear", "use_rslora": True, "signals": {"value": 1.0}},
}


def bundled(name="llama", bundles=BUNDLES, **fields):
    config = BundleConfig(**{"bundles": bundles, "task_type": "CAUSAL_LM", "quiet": 0.0, **fields})
    base = TINY[name]().double()
    return perturb(get_peft_model(base, config, autocast_adapter_dtype=False), scale=0.1).eval()


@contextlib.contextmanager
def written_out(model, alphas):
    """The model with `linear_reference` in place of the bundles' own operation."""
    handles = []
    for layer in bundle_layers(model):
        layer._disable_adapters = True
        if layer.holds("default"):

            def hook(module, args, output, layer=layer):
                names = layer.packing("default").names
                x, y = args[0], output
                if x.dim() == 2:  # OPT puts all rows in one
                    x, y = (t.view(layer.state.call.shape[0], -1, t.shape[-1]) for t in (x, y))
                gates = torch.stack([alphas[n].expand(x.shape[:2]) for n in names], -1)
                return linear_reference(x, y, layer.bundle_weights("default"), gates).view_as(output)

            handles.append(layer.get_base_layer().register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in bundle_layers(model):
            layer._disable_adapters = False


def gradients(model):
    return {n: None if p.grad is None else p.grad.clone() for n, p in weights(model).items()}


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("by", ["row", "token", "number"])
def test_values_and_gradients_are_those_of_the_written_equation(name, by):
    model, ids = bundled(name), batch()
    size = {"row": (3, 1), "token": (3, 9), "number": (1, 1)}[by]
    gates = {n: torch.rand(size, dtype=torch.float64) * 2 - 0.5 for n in BUNDLES}
    given = {n: g.squeeze(-1) if by == "row" else float(g) if by == "number" else g for n, g in gates.items()}
    out = model(input_ids=ids, alphas=given).logits
    (out.square().sum() / 100).backward()
    ours = gradients(model)
    model.zero_grad()
    with written_out(model, gates):
        wanted = model(input_ids=ids).logits
        (wanted.square().sum() / 100).backward()
    torch.testing.assert_close(out, wanted, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(logits(model, ids, alphas=given), wanted.detach(), rtol=1e-9, atol=1e-10)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-8, atol=1e-9)


def test_it_is_peft_s_lora():
    """The same maps, scale and layers: outputs and gradients."""
    targets = ["q_proj", "gate_proj", "down_proj"]
    model = bundled(bundles={"b": {"rank": 4, "lora_alpha": 6, "place": targets}})
    config = LoraConfig(r=4, lora_alpha=6, target_modules=targets)
    lora = get_peft_model(TINY["llama"]().double(), config, autocast_adapter_dtype=False).eval()
    ours = {n.removesuffix(".bundles"): m for n, m in model.named_modules() if n.endswith("_proj.bundles")}
    theirs = {n: m for n, m in lora.named_modules() if hasattr(m, "lora_A")}
    assert ours.keys() == theirs.keys()
    ids = batch()
    with torch.no_grad():
        for name, layer in theirs.items():
            layer.lora_A["default"].weight.copy_(ours[name].bundle_down["default"]["b"])
            layer.lora_B["default"].weight.copy_(ours[name].bundle_up["default"]["b"].T)
    outputs = [m(input_ids=ids, labels=ids) for m in (model, lora)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=0, atol=1e-12)
    for output in outputs:
        output.loss.backward()
    for name, layer in theirs.items():
        down, up = ours[name].bundle_down["default"]["b"].grad, ours[name].bundle_up["default"]["b"].grad
        torch.testing.assert_close(down, layer.lora_A["default"].weight.grad, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(up.T, layer.lora_B["default"].weight.grad, rtol=1e-9, atol=1e-12)


def test_dropout_of_hidden_units():
    model, ids = bundled(dropout=0.5).train(), batch()
    torch.manual_seed(0)
    one = model(input_ids=ids).logits
    torch.manual_seed(0)
    assert torch.equal(one, model(input_ids=ids).logits) and not torch.allclose(one, model(input_ids=ids).logits)


def own(model, ids, signal):
    """The gradients of one row's loss alone, unrouted, times each bundle's weight for the signal."""
    model.zero_grad()
    model(input_ids=ids[None], labels=ids[None]).loss.backward()
    column = model.peft_config["default"].column(signal)
    return {n: g * column[n.rsplit(".", 1)[1]] for n, g in gradients(model).items()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_rows_of_several_signals_give_each_bundle_its_own_rows_times_their_weights(checkpointing):
    """Guarantees 1 to 3; recomputed blocks still have the route, after it has closed and alphas have changed."""
    model, ids = bundled(), batch()
    rows = ["lm", "policy", "policy"]
    parts = [own(model, ids[i], signal) for i, signal in enumerate(rows)]
    model.zero_grad()
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with model.route(rows):
        loss = model(input_ids=ids, labels=ids).loss
    model.set_alphas(b_two=2.0)
    (loss * 3).backward()
    for name, gradient in gradients(model).items():
        if name.endswith(".b_three"):
            assert gradient is None
        else:
            torch.testing.assert_close(gradient, sum(part[name] for part in parts), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_losses_on_the_same_rows_go_to_their_owners(checkpointing):
    """Guarantee 4."""
    model, ids = bundled(), batch()
    wanted = {}
    for signal, power in (("lm", 1), ("policy", 2), ("value", 3)):
        model.zero_grad()
        (model(input_ids=ids).logits.abs().pow(power).mean()).backward()
        column = model.peft_config["default"].column(signal)
        for name, gradient in gradients(model).items():
            if weight := column[name.rsplit(".", 1)[1]]:
                wanted[name] = wanted.get(name, 0) + weight * gradient
    model.zero_grad()
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    with model.route(("lm", "policy", "value")):
        out = model(input_ids=ids).logits.abs()
    model.routed_backward({s: out.pow(p).mean() for s, p in (("lm", 1), ("policy", 2), ("value", 3))})
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-8, atol=1e-10)


def test_off_owner_weights_are_bitwise_unchanged_after_a_step():
    model, ids = bundled().train(), batch()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for signal in ("value", "lm"):  # momentum first
        before = {n: p.detach().clone() for n, p in weights(model).items()}
        with model.route(signal):
            model(input_ids=ids, labels=ids).loss.backward()
        model.finalize_grads()
        optimizer.step()
        optimizer.zero_grad()
    for name, parameter in weights(model).items():
        assert torch.equal(parameter, before[name]) == (not name.endswith(".b_one")), name


def test_re_entrant_checkpointing_is_refused_where_it_would_lose_the_call():
    model = bundled().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for call in (lambda: model.route("lm"), lambda: model.alphas(b_one=0.5)):
        with pytest.raises(RuntimeError, match=r'use_reentrant": False'), call():
            pass


def penalty(model, names, quiet):
    """Design: w * sum over linears of E_v |what the bundles of each set of signals add|^2 / E |W v|^2."""
    total, specs = 0.0, model.peft_config["default"].bundles
    for layer in bundle_layers(model):
        kept = layer.bundle_states["default"].double()
        of = dict(zip(layer.packing("default").names, layer.bundle_weights("default")))
        groups = {}
        for name in of:
            if name in names:
                groups.setdefault(frozenset(specs[name].signals), []).append(of[name])
        for members in groups.values():
            added = linear_reference(kept[None], 0.0, members, torch.ones(1, dtype=torch.float64))
            total = total + added.square().sum(-1).mean() / layer.bundle_energy["default"].double()
    return quiet * total


@pytest.mark.parametrize("signal", [None, "policy"])
def test_the_penalty_is_the_written_one_and_joins_any_loss(signal):
    model = bundled(quiet=3.0)
    calibrate(model, tokens=192, max_length=32, progress=False)  # fewer than a step draws
    for layer in bundle_layers(model):
        if layer.holds("default"):
            assert len(layer.bundle_states["default"]) <= 256
            layer.bundle_states["default"] = layer.bundle_states["default"].double()
    layers = [layer for layer in bundle_layers(model) if layer.holds("default")]
    model.train()
    names = [n for n in BUNDLES if signal is None or signal in BUNDLES[n]["signals"]]
    holder = type("Holder", (), {"peft_config": model.peft_config})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "bundle_layers", lambda model: layers)
        wanted = penalty(holder, names, 3.0)
    wanted.backward()
    by_hand = gradients(model)
    for way in ("by hand", "in any loss"):
        model.zero_grad()
        with model.route(signal) if signal else contextlib.nullcontext():
            out = model(input_ids=batch())
        if way == "by hand":
            loss = model.quiet_loss()
            torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=0)
            loss.backward()
        else:
            (out.logits.sum() * 0).backward()
        model.finalize_grads()
        for name, gradient in gradients(model).items():
            assert (gradient is None) == (name.rsplit(".", 1)[1] not in names)
            if gradient is not None:
                torch.testing.assert_close(gradient, by_hand[name], rtol=1e-5, atol=1e-8)


def test_inputs_that_layers_share_are_kept_once():
    model = bundled(quiet=3.0)
    calibrate(model, tokens=192, max_length=32, progress=False)
    block = model.get_base_model().model.layers[0]
    kept = {n: m.bundles.bundle_states["default"].data_ptr() for n, m in block.named_modules() if n.endswith("_proj")}
    assert len(set(kept.values())) == 4
    assert kept["mlp.gate_proj"] == kept["mlp.up_proj"] and kept["self_attn.q_proj"] == kept["self_attn.v_proj"]


def test_single_bundles_are_saved_composed_and_put_together(tmp_path):
    mixed = {
        **BUNDLES,
        "b_block": {"rank": 4, "sub_bases": ["a"], "place": ["block", "o_proj"], "signals": {"lm": 1.0}},
    }
    model, ids = bundled(bundles=mixed, sub_bases={"a": 8}), batch()
    folders = [save_bundle(model, name, tmp_path / name) for name in mixed]
    composed = compose(TINY["llama"]().double(), folders)
    torch.testing.assert_close(logits(composed, ids), logits(model, ids), rtol=0, atol=1e-10)
    alone = compose(TINY["llama"]().double(), [folders[1]])
    off = {n: 0.0 for n in mixed if n != "b_two"}
    torch.testing.assert_close(logits(alone, ids), logits(model, ids, alphas=off), rtol=0, atol=1e-10)
    assert not any("basis" in key for key in alone.state_dict() if "bundle_basis" in key)
    merged = merge_bundles([folders[0], folders[0]], [0.5, 0.25], tmp_path / "merged", name="b_sum")
    summed = compose(TINY["llama"]().double(), [merged])
    wanted = logits(model, ids, alphas={**dict.fromkeys(mixed, 0.0), "b_one": 0.75})
    torch.testing.assert_close(logits(summed, ids), wanted, rtol=0, atol=1e-10)
    halved = merge_bundles([folders[0], folders[0]], [0.5, 0.25], tmp_path / "linear", method="linear", name="b_sum")
    summed = compose(TINY["llama"]().double(), [halved])
    torch.testing.assert_close(logits(summed, ids), wanted, rtol=0, atol=1e-10)
    for pair, message in (
        ((0, 2), "rank"),
        ((0, 1), "on other layers"),
        ((3, 3), "behind blocks and at linear layers"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_bundles([folders[i] for i in pair], [1, 1], tmp_path / "no", method="ties")


def test_reports():
    model = bundled()
    text = str(report(model, angles=True))
    assert "mlp+all-linear" not in text and "all-linear" in text and "basis:" not in text
    overlap = orthogonality(model)
    assert overlap.names == list(BUNDLES) and torch.allclose(
        overlap.reads.diagonal(), torch.ones(3, dtype=torch.float64)
    )


def test_copies_act_on_their_own():
    model, ids = bundled(), batch()
    copied = copy.deepcopy(model)
    wanted = logits(model, ids)
    for parameter in weights(copied).values():
        parameter.data.zero_()
    assert torch.equal(logits(model, ids), wanted)
    assert torch.equal(logits(copied, ids), logits(TINY["llama"]().double(), ids))


def test_inputs_by_keyword_and_of_one_token():
    model = bundled()
    linear, x = model.get_base_model().model.layers[0].mlp.down_proj, torch.randn(128, dtype=torch.float64)
    with torch.no_grad():
        wanted = linear(x[None, None])
        assert torch.equal(linear(input=x[None, None]), wanted)
    called = model.get_base_model().model.layers[0].mlp
    called.forward = lambda h: called.down_proj(
        input=called.act_fn(called.gate_proj(input=h)) * called.up_proj(input=h)
    )
    assert calibrate(model, tokens=64, max_length=16, progress=False)["tokens"] >= 64
    with torch.no_grad():
        torch.testing.assert_close(linear(x), wanted[0, 0], rtol=0, atol=1e-12)


def with_axes(model, shape):
    """The tokens of a row on two axes of this shape, inside each MLP."""

    def split(mlp):
        def forward(h):
            x = h.unflatten(1, shape)
            return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)).flatten(1, 2)

        mlp.forward = forward

    for block in model.get_base_model().model.layers:
        split(block.mlp)
    return model


def test_inputs_with_more_axes_are_tokens_of_their_rows():
    plain, split, ids = bundled(), with_axes(bundled(), (3, 3)), batch()
    by_row, by_token = torch.tensor([0.0, 1.0, -0.5]), torch.linspace(-1, 1, 27).view(3, 9)
    for alphas in ({}, {"b_one": by_row}, {"b_two": by_token, "b_three": by_row}, dict.fromkeys(BUNDLES, 0.0)):
        torch.testing.assert_close(
            logits(split, ids, alphas=alphas), logits(plain, ids, alphas=alphas), rtol=0, atol=1e-12
        )
    for model in (plain, split):
        with model.route(["lm", "policy", "policy"]):
            model(input_ids=ids, labels=ids, alphas={"b_one": by_row}).loss.backward()
    wanted = gradients(plain)
    for name, gradient in gradients(split).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-12)
    with split.disable_adapter():
        assert torch.equal(logits(split, ids), logits(TINY["llama"]().double(), ids))
    assert calibrate(with_axes(plain, (-1, 1)), tokens=64, max_length=16, progress=False)["tokens"] >= 64
