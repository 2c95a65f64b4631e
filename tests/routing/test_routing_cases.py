"""Routing where it is easy to get wrong: micro-batches, routed beside unrouted forwards, compilation, state."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import TINY, attached, layers, perturb, quietly_loaded
from peft import get_peft_model
from test_signals import (
    EXACT,
    NO_DROPOUT,
    added,
    assert_same,
    batch,
    config,
    gradients,
    loss_of,
    make,
    plain_gradients,
    weighted,
)

import peft_bundles
from peft_bundles import BundleConfig, BundleLayer
from peft_bundles.core.walking import bundle_parameters
from peft_bundles.routing.graph import walk


RL = ("policy", "value", "kl")


def own(model, *signals, rows=slice(None)) -> dict:
    return added(*(weighted(model, plain_gradients(model, s, rows), s) for s in signals))


def losses(logits, signals=RL) -> dict:
    return {s: loss_of(s, logits) for s in signals}


def times(grads: dict, factor: float) -> dict:
    return {k: None if g is None else g * factor for k, g in grads.items()}


def test_weights_are_applied_once_however_a_loss_is_routed():
    model = make("gpt2")
    for signals in ("policy", ["policy"] * 6, ("policy",)):
        with model.route(signals):
            logits = model(batch()).logits
        model.routed_backward({"policy": loss_of("policy", logits)})
        model.finalize_grads()
        ours = gradients(model)
        assert_same(ours, own(model, "policy"), **EXACT)
    with model.route(["lm", "logic"] * 3):
        logits = model(batch()).logits
    model.routed_backward({"lm": loss_of("lm", logits[0::2]), "logic": loss_of("logic", logits[1::2])})
    ours = gradients(model)
    expected = added(own(model, "lm", rows=slice(0, 6, 2)), own(model, "logic", rows=slice(1, 6, 2)))
    assert_same(ours, expected, **EXACT)


def test_micro_batches_under_one_route():
    model = make("gpt2")
    with model.route(RL):
        for _ in range(2):
            model.routed_backward(losses(model(batch()).logits))
    model.finalize_grads()
    ours = gradients(model)
    assert_same(ours, times(own(model, *RL), 2.0), **EXACT)


def test_two_forwards_in_flight():
    model = make("gpt2")
    with model.route(RL):
        first, second = model(batch()[:2]).logits, model(batch()[2:]).logits
    model.routed_backward(losses(second))
    model.routed_backward(losses(first))
    model.finalize_grads()
    ours = gradients(model)
    assert_same(ours, own(model, *RL), **EXACT)


def test_rows_of_several_forwards_in_one_call():
    model = make("gpt2")
    with model.route("lm"):
        text = model(batch()[:3]).logits
    with model.route(RL):
        rollout = model(batch()[3:]).logits
    model.routed_backward({"lm": loss_of("lm", text), **losses(rollout)})
    model.finalize_grads()
    ours = gradients(model)
    assert_same(ours, added(own(model, "lm", rows=slice(0, 3)), own(model, *RL, rows=slice(3, 6))), **EXACT)


def test_an_evaluation_inside_a_route_changes_nothing():
    model = make("gpt2")
    with model.route(RL), torch.no_grad():
        model(batch())
    model.routed_backward(losses(model(batch()).logits))  # an unrouted forward
    model.finalize_grads()
    ours = gradients(model)
    assert_same(ours, own(model, *RL), **EXACT)


def test_routed_and_unrouted_forwards_in_one_step():
    model = make("gpt2")
    with model.route("lm"):
        loss_of("lm", model(batch()).logits).backward()
    loss_of("value", model(batch()).logits).backward()  # nobody's signal: every bundle learns
    model.finalize_grads()
    ours = gradients(model)
    assert_same(ours, added(own(model, "lm"), plain_gradients(model, "value")), **EXACT)


def test_retain_graph_keeps_the_graph_and_only_then():
    model = make("gpt2")
    with model.route(RL):
        found = losses(model(batch()).logits)
    model.routed_backward(found, retain_graph=True)
    model.routed_backward(found)
    model.finalize_grads()
    ours = gradients(model)
    assert_same(ours, times(own(model, *RL), 2.0), **EXACT)
    with pytest.raises(RuntimeError, match="second time"):
        model.routed_backward(found)


def test_weights_are_folded_back_once_for_all_passes():
    model, calls = make("gpt2"), []
    with model.route(RL):
        found = losses(model(batch()).logits)
    folds = {node for reach in walk([*found.values()]) for node, _ in reach.folds}
    handles = [node.register_hook(lambda *_: calls.append(1)) for node in folds]
    model.routed_backward(found)
    assert len(calls) == len(folds) >= 2
    [handle.remove() for handle in handles]
    model.finalize_grads()
    ours = gradients(model)
    assert_same(ours, own(model, *RL), **EXACT)


@pytest.mark.parametrize("first", [True, False])
def test_a_penalty_on_the_weights_in_one_of_the_losses(first):
    """They are reached beside D and E: then it must not get lost, and reach the owners of that loss only."""
    model = make("gpt2")
    owners = model.peft_config["default"].column("value")
    table = {name: parameters for (_, name), parameters in bundle_parameters(model).items()}
    with model.route(RL):
        found = losses(model(batch()).logits)
    penalty = sum(p.square().sum() for of in table.values() for p in of)
    found["value"] = penalty + found["value"] if first else found["value"] + penalty
    model.routed_backward(found)
    model.finalize_grads()
    ours = gradients(model)
    expected = own(model, *RL)
    for name, number in expected:
        if owners[name]:
            expected[name, number] = expected[name, number] + 2 * table[name][number].detach()
    assert_same(ours, expected, **EXACT)


def test_a_loss_of_an_earlier_layer_is_none_to_later_ones():
    """And not 0, with which AdamW would move their weights."""
    model = make("gpt2")
    with model.route(RL):
        out = model(batch(), output_hidden_states=True)
    model.routed_backward({**losses(out.logits, ("policy", "kl")), "value": out.hidden_states[1].square().mean()})
    grads = {n: p.grad for n, p in model.named_parameters() if "b_value" in n}
    assert all((grad is None) == (".h.1." in n) for n, grad in grads.items()) and len(grads) >= 4


def test_what_is_not_finite_stays_with_its_owners():
    """Of bundles whose hidden units lie side by side, and between each other's."""
    model = make("gpt2")
    model.routed_backward(losses(model(batch()).logits))
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with model.route(RL):
        found = losses(model(batch()).logits)
    model.routed_backward({**found, "policy": found["policy"] * float("nan")})
    owners = {n: w for n, w in model.peft_config["default"].column("policy").items() if w}
    spoilt = {n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()}
    assert spoilt and all(n.rpartition(".")[2] in owners for n in spoilt)
    for name in wanted.keys() - spoilt:
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, wanted[name], **EXACT)


@pytest.fixture
def compiled():
    """A function that compiles every layer of a model."""
    torch._dynamo.reset()

    def run(model):
        for layer in model.modules():
            if isinstance(layer, BundleLayer):
                layer.compile(backend="aot_eager")

    yield run
    torch._dynamo.reset()


@pytest.mark.parametrize("signals", [RL, ["lm", "policy", "lm", "value", "kl", "logic"], ["policy"] * 6])
def test_compiled_layers_route_as_eager_ones(signals, compiled):
    model = make("gpt2")
    if signals == RL:
        expected = own(model, *RL)
    else:
        expected = added(*(own(model, s, rows=slice(i, i + 1)) for i, s in enumerate(signals)))
    compiled(model)
    for _ in range(2):  # the second time from the compiler's cache
        with model.route(signals):
            logits = model(batch()).logits
        if signals == RL:
            model.routed_backward(losses(logits))
        else:
            sum(loss_of(s, logits[i : i + 1]) for i, s in enumerate(signals)).backward()
        model.finalize_grads()
        assert_same(gradients(model), expected, **EXACT)


def test_a_compiled_forward_that_cannot_be_told_apart_is_refused(compiled):
    model = make("gpt2")
    compiled(model)
    with model.route("policy"):
        logits = model(batch()).logits
    with pytest.raises(RuntimeError, match="compiled forward"):
        model.routed_backward({"policy": loss_of("policy", logits)})


def test_alphas_per_row_and_a_route_together():
    model = make("gpt2")
    gates = torch.tensor([[1.0, 0.5, 0.0, 2.0, 1.0]] * 3 + [[0.3, 1.0, 1.0, 0.0, 0.7]] * 3, dtype=torch.float64)
    rows = ["lm", "policy", "lm", "value", "kl", "logic"]
    with model.route(rows), model.alphas(gates):
        logits = model(batch()).logits
        sum(loss_of(s, logits[i : i + 1]) for i, s in enumerate(rows)).backward()
    ours = gradients(model)
    parts = []
    for i, s in enumerate(rows):
        with model.alphas(gates[i]):
            loss_of(s, model(batch()[i : i + 1]).logits).backward()
        parts.append(weighted(model, gradients(model), s))
    expected = added(*parts)
    for key, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(ours[key], gradient, **EXACT)
    assert any(g is not None and g.abs().max() > 1e-6 for g in expected.values())


def test_two_active_adapters_are_routed_by_their_own_tables():
    model = make("gpt2")
    other = BundleConfig(
        task_type="CAUSAL_LM",
        sub_bases={"a": 16},
        basis_seed=5,
        bundles={"c_lm": {"rank": 8, "sub_bases": ["a"], "signals": {"lm": 0.5}}},
    )
    model.add_adapter("other", other)
    perturb(model, "other")
    model.double()
    model.base_model.set_adapter(["default", "other"])
    loss_of("lm", model(batch()).logits).backward()
    free = gradients(model)
    with model.route("lm"):
        loss_of("lm", model(batch()).logits).backward()
    model.finalize_grads()
    columns = {**model.peft_config["default"].column("lm"), **other.column("lm")}
    for (name, i), gradient in gradients(model).items():
        if columns[name]:
            torch.testing.assert_close(gradient, free[name, i] * columns[name], **EXACT)
        else:
            assert gradient is None
    with model.route("policy"):
        loss_of("policy", model(batch()).logits).backward()
    assert all(g is None for (name, _), g in gradients(model).items() if name == "c_lm")


def test_generating_lets_nobody_learn():
    """A rollout between steps must not count as a forward that every bundle learns from."""
    model = make("llama", torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    loss_of("kl", model(batch()).logits).backward()
    model.finalize_grads()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)  # zeros, as plain DDP leaves them
    model.generate(input_ids=batch(), attention_mask=torch.ones_like(batch()), max_new_tokens=2)
    with torch.no_grad():
        model(batch())
    with model.route("lm"):
        loss_of("lm", model(batch()).logits).backward()
    model.finalize_grads(reduce=False)
    found = gradients(model)
    learnt = {name for (name, _), g in found.items() if g is not None}
    assert learnt == {"b_lm", "b_both"}


def test_forwards_of_an_injected_model_count():
    model = TINY["gpt2"](**NO_DROPOUT["gpt2"])
    model.add_adapter(config())
    perturb(model)
    with peft_bundles.route(model, "lm"):
        loss_of("lm", model(batch()).logits).backward()
    loss_of("policy", model(batch()).logits).backward()
    peft_bundles.finalize_grads(model)
    assert all(g is not None for g in gradients(model).values())


def test_what_finalize_complains_of_does_not_reach_the_next_step():
    model = make("gpt2")
    loss_of("kl", model(batch()).logits)  # every bundle took part, and no backward followed
    with pytest.raises(RuntimeError, match="no gradient reached"):
        model.finalize_grads()
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    with model.route("lm"):
        loss_of("lm", model(batch()).logits).backward()
    model.finalize_grads()
    assert {name for (name, _), g in gradients(model).items() if g is not None} == {"b_lm", "b_both"}


def test_every_signal_must_reach_one_of_its_owners():
    model = make("gpt2")
    with model.route(["lm"] * 3 + [("policy", "value")] * 3), model.alphas(b_value=0.0, b_anchor=0.0):
        logits = model(batch()).logits
    with pytest.raises(RuntimeError, match="loss of 'value' reached none"):
        model.routed_backward({"lm": loss_of("lm", logits[:3]), **losses(logits[3:], ("policy", "value"))})


def test_a_signal_that_trains_nothing_is_missed_though_another_trains_its_owner():
    model = make("gpt2")
    shared = {n: 0.0 for n, w in model.peft_config["default"].column("value").items() if w}
    gates = {n: torch.zeros(()) if n in shared else torch.ones(()) for n in model.peft_config["default"].bundles}
    with model.route(("policy", "value")), model.alphas(gates):
        first = model(batch()).logits
    with model.route("kl"):
        second = model(batch()).logits
    with pytest.raises(RuntimeError, match="loss of 'value' reached none"):
        model.routed_backward({**losses(first, ("policy", "value")), **losses(second, ("kl",))})


def test_a_loss_of_routed_and_unrouted_forwards_is_refused():
    model = make("gpt2")
    with model.route("lm"):
        routed = model(batch()).logits
    loss = loss_of("lm", routed) + loss_of("lm", model(batch()).logits)
    with pytest.raises(ValueError, match="inside and outside"):
        model.routed_backward({"lm": loss})


def test_bundles_that_moved_since_the_route_was_entered_are_noticed():
    model = make("gpt2")
    layer = next(m for m in model.modules() if isinstance(m, BundleLayer))
    with model.route(["lm", "policy"]), pytest.raises(RuntimeError, match="were not on meta"):
        layer.state.call.route.gate("default", torch.empty(2, 3, 64, device="meta"))


signal_rows = st.lists(
    st.lists(st.sampled_from(["lm", "policy", "value", "entropy", "kl", "logic"]), min_size=1, max_size=3, unique=True),
    min_size=1,
    max_size=4,
)
gates = st.lists(st.sampled_from([1.0, 0.5, -1.0, 2.0]), min_size=5, max_size=5)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(signal_rows, gates, st.booleans()), min_size=1, max_size=3), st.booleans())
def test_any_mixture_of_rows_signals_alphas_and_forwards(forwards, at_once):
    """Against each loss of each row by itself: plain autograd, times the weight, summed."""
    model = make("gpt2")
    expected, found, graphs = [], {}, []
    for number, (rows, numbers, per_row) in enumerate(forwards):
        ids = batch(8)[2 * number : 2 * number + len(rows)]
        table = torch.tensor(numbers, dtype=torch.float64)
        alphas = table * torch.linspace(0.5, 1.5, len(rows), dtype=torch.float64)[:, None] if per_row else table
        with model.route([tuple(row) for row in rows]), model.alphas(alphas):
            logits = model(ids).logits
        here: dict = {}
        for i, row in enumerate(rows):
            for s in row:
                loss = loss_of(s, logits[i : i + 1])
                here[s] = here.get(s, 0.0) + loss
                found[s] = found.get(s, 0.0) + loss
        graphs.append(here)
    if at_once:
        model.routed_backward(found)
    else:
        for here in reversed(graphs):
            model.routed_backward(here)
    model.finalize_grads()
    ours = gradients(model)
    for number, (rows, numbers, per_row) in enumerate(forwards):
        for i, row in enumerate(rows):
            scale = torch.linspace(0.5, 1.5, len(rows), dtype=torch.float64)[i] if per_row else 1.0
            for s in row:
                with model.alphas(torch.tensor(numbers, dtype=torch.float64) * scale):
                    logits = model(batch(8)[2 * number + i : 2 * number + i + 1]).logits
                    loss_of(s, logits).backward()
                expected.append(weighted(model, gradients(model), s))
    assert_same(ours, added(*expected), rtol=1e-9, atol=1e-10)


def test_baseline_trains_the_trunk_in_the_same_loop(tmp_path):
    base = TINY["gpt2"](**NO_DROPOUT["gpt2"])
    model = get_peft_model(base, BundleConfig(preset="baseline", task_type="CAUSAL_LM")).train()
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == everything
    with model.route(RL):
        logits = model(batch()).logits
    model.routed_backward(losses(logits))
    model.finalize_grads()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sum(losses(model(batch()).logits).values()).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(expected[name], p.grad, rtol=1e-4, atol=1e-6)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.eval().save_pretrained(tmp_path)
    again = peft_bundles.BundleConfig.from_pretrained(tmp_path)
    assert again.bundles == {}
    loaded = quietly_loaded(TINY["gpt2"](seed=3), tmp_path)
    assert torch.equal(loaded(batch()).logits, model(batch()).logits)
    assert not any(p.requires_grad for p in loaded.parameters())
    with pytest.warns(UserWarning, match="does not undo it"), model.disable_adapter():
        pass
    with pytest.raises(ValueError, match="attach it alone"):
        model.add_adapter("second", config())


def test_a_gate_knows_its_route_and_the_units_that_no_row_lets_learn():
    model = attached()
    layer = layers(model)[0]
    packing, hidden = layer.packing("default"), torch.zeros(2, 3, 64)
    with model.route([("lm", "policy"), "lm"]):
        route = layer.state.call.route
        gate = route.gate("default", hidden)
    assert gate.route is route and gate.weights.isnan().any() and gate.span is None and gate.others is None
    names, weights = packing.names, gate.weights
    for signals in ({"lm"}, {"policy"}, set()):
        route.choose(signals)
        assert gate.weights is weights  # rewritten in place: the graph holds this tensor
        first, last = gate.span
        off = set() if gate.others is None else set(gate.others.tolist())
        learning = {int(unit) for unit in weights.flatten(0, -2).any(0).nonzero()}
        owners = {names[packing.owner[unit]] for unit in learning}
        assert owners == {n for n in names if any(model.peft_config["default"].column(s)[n] for s in signals)}
        assert learning - set(range(len(packing.owner) - packing.padding, len(packing.owner))) <= (
            set(range(first, last)) - off
        )
    route.choose(None)
    assert gate.weights.isnan().any()


@pytest.mark.parametrize("signals", [None, 3, {"lm": 1.0}, [None], [3, "lm"], ["lm", [("lm", "two")]], ("lm", 3)])
def test_what_is_no_signal_is_refused(signals):
    with pytest.raises(ValueError, match="give a signal such as 'lm'"), peft_bundles.route(attached(), signals):
        pass


@pytest.mark.parametrize("losses", [torch.tensor(1.0), [torch.tensor(1.0)], {"lm": 1.0}, None])
def test_what_is_no_table_of_losses_is_refused(losses):
    with pytest.raises(ValueError, match="give a dict of signal -> loss"):
        peft_bundles.routed_backward(attached(), losses)
