"""The penalty's gradient: in whatever loss, once a step, and in no weight that learns nothing."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import TINY, attached, batch, bundle_config, layers, perturb, weights
from peft import PeftModel, get_peft_model

from peft_bundles import BundleConfig, calibrate
from peft_bundles.core.walking import state_of


LM, POLICY = {"b_mlp", "b_diag"}, {"b_linear"}


@pytest.fixture(scope="module")
def made() -> PeftModel:
    """Calibrated and moved, float64, so that sums in another order differ by 1e-15 and not by what a test looks for."""
    model = get_peft_model(TINY["llama"](), bundle_config(quiet=3.0))
    calibrate(model, tokens=512, max_length=32, progress=False)
    return perturb(model).double().train()


@pytest.fixture
def model(made) -> PeftModel:
    return copy.deepcopy(made)


def gradients(model) -> dict:
    return {n: p.grad.clone() for n, p in weights(model).items() if p.grad is not None}


def bundles(grads) -> set:
    return {name.rsplit(".", 1)[1] for name in grads}


def own_loss(model, ids=None, **kwargs):
    """What a trainer makes itself: cross-entropy of the logits."""
    ids = batch() if ids is None else ids
    logits = model(input_ids=ids, **kwargs).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def silenced(model):
    state_of(model).configs["default"].quiet = 0.0
    return model


def loud(model):
    """The same weights, without a penalty."""
    return silenced(copy.deepcopy(model))


def penalty_of(model, of=None) -> dict:
    """The gradient of the penalty alone, taken by hand; `of`: of the bundles that learn in this route."""
    other = copy.deepcopy(model)
    if of is None:
        other(batch())
    else:
        with other.route(of):
            other(batch())
    other.quiet_loss().backward()
    return gradients(other)


def close(grads, wanted) -> None:
    assert grads.keys() == wanted.keys() and grads
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-9, atol=1e-10)


def added(model, run) -> dict:
    """What is in the gradients of `run(model)` that would not be there without a penalty."""
    bare = loud(model)
    for each in (model, bare):
        each.zero_grad()
        run(each)
    with_penalty, without = gradients(model), gradients(bare)
    assert with_penalty.keys() == without.keys()
    return {name: grad - without[name] for name, grad in with_penalty.items()}


def half_and_half(model, parts, loss=own_loss):
    for ids in batch(4).split(4 // parts):
        (loss(model, ids) / parts).backward()


ONCE = {
    "a loss of logits": lambda m: own_loss(m).backward(),
    "the model's own loss": lambda m: m(input_ids=batch(), labels=batch()).loss.backward(),
    "both": lambda m: (lambda out: (out.loss + out.logits.square().mean()).backward())(m(batch(), labels=batch())),
    "a part of the model's own loss": lambda m: (0.1 * m(input_ids=batch(), labels=batch()).loss).backward(),
    "two micro-batches": lambda m: half_and_half(m, 2),
    "four, of the model's own loss": lambda m: half_and_half(m, 4, lambda m, ids: m(ids, labels=ids).loss),
    "tokens of the whole step": lambda m: [
        m(input_ids=x, labels=x, num_items_in_batch=32).loss.backward() for x in batch(4).split(2)
    ],
    "two forwards, one backward": lambda m: (own_loss(m) + own_loss(m, batch(seed=1))).backward(),
    "one forward, two backwards": lambda m: (lambda loss: (loss.backward(retain_graph=True), loss.backward()))(
        own_loss(m)
    ),
    "by hand in the loss": lambda m: (own_loss(m) + m.quiet_loss()).backward(),
    "by hand, before": lambda m: (own_loss(m), by_hand(m), own_loss(m).backward()),
    "by hand, afterwards": lambda m: (own_loss(m).backward(), by_hand(m)),
    "by hand in every micro-batch": lambda m: half_and_half(m, 2, lambda m, ids: own_loss(m, ids) + m.quiet_loss()),
    "routed_backward": lambda m: m.routed_backward({"lm": own_loss(m), "policy": own_loss(m, batch(seed=1))}),
    "routed_backward, rows of several signals": lambda m: routed(m),
    "routed_backward and by hand": lambda m: (routed(m), by_hand(m), m.finalize_grads()),
    "a forward without a backward first": lambda m: (own_loss(m, batch(seed=2)), own_loss(m).backward()),
    "gradients that start as zeros": lambda m: (
        [setattr(p, "grad", torch.zeros_like(p)) for p in weights(m).values()],
        own_loss(m).backward(),
    ),
    "past PeftModel": lambda m: own_loss(m.get_base_model()).backward(),
}


def by_hand(model):
    loss = model.quiet_loss()
    if loss.requires_grad:
        loss.backward()


def routed(model):
    with model.route(("lm", "policy")):
        logits = model(batch()).logits
    model.routed_backward({"lm": logits.logsumexp(-1).mean(), "policy": logits.square().mean()})


@pytest.mark.parametrize("run", ONCE.values(), ids=ONCE.keys())
def test_it_is_added_once_whatever_the_loss_is_made_of(model, run):
    close(added(model, run), penalty_of(model))


NONE = {
    "eval mode": lambda m: own_loss(m.eval()).backward(),
    "eval mode, after a step": lambda m: (own_loss(m).backward(), m.zero_grad(), own_loss(m.eval()).backward()),
    "eval mode, after a forward": lambda m: (own_loss(m), own_loss(m.eval()).backward()),
    "quiet set to 0 after a step": lambda m: (
        own_loss(m).backward(),
        m.zero_grad(),
        silenced(m),
        own_loss(m).backward(),
    ),
}


@pytest.mark.parametrize("run", NONE.values(), ids=NONE.keys())
def test_an_eval_forward_has_none(model, run):
    assert not any(bool(grad.any()) for grad in added(model, run).values())


def test_the_loss_itself_is_that_of_the_base_and_a_no_grad_forward_adds_nothing(model):
    ids = batch()
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids)
    torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, out.loss)
    state = state_of(model).penalty
    assert state.read() is None
    own_loss(model).backward()
    torch.testing.assert_close(state.read(), model.quiet_loss().item())
    assert state.read() is None


STEPS = {
    "zeros": lambda o, m: o.zero_grad(set_to_none=False),
    "None": lambda o, m: o.zero_grad(),
    "zeros by the model": lambda o, m: m.zero_grad(set_to_none=False),
}


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clear", STEPS.values(), ids=STEPS.keys())
def test_every_step_has_it_again(model, clear, fused, skipped):
    """However gradients are cleared, whether the optimizer tells torch that it changed weights, and if it did not."""
    optimizer = torch.optim.AdamW(weights(model).values(), lr=1e-3, fused=fused)
    for _ in range(2):
        half_and_half(model, 2)
        torch.nn.utils.clip_grad_norm_(weights(model).values(), 1e-3)
        if not skipped:
            optimizer.step()
        clear(optimizer, model)
    bare = loud(model)
    half_and_half(model, 2)
    half_and_half(bare, 2)
    without = gradients(bare)
    close({n: g - without[n] for n, g in gradients(model).items()}, penalty_of(model))


@pytest.mark.parametrize(("signal", "owners"), [("lm", LM), ("policy", POLICY)])
def test_under_a_route_only_owners_have_it_and_the_others_stay_none(model, signal, owners):
    def run(m):
        with m.route(signal):
            loss = own_loss(m)
        loss.backward()

    grads = added(model, run)
    assert bundles(grads) == owners
    close(grads, penalty_of(model, signal))


def test_a_bundle_whose_loss_is_not_given_stays_none(model):
    with model.route(("lm", "policy")):
        loss = own_loss(model)
    model.routed_backward({"lm": loss})
    assert bundles(gradients(model)) == LM


def test_micro_batches_of_different_signals_bring_each_bundle_its_own(model):
    def run(m):
        for signal in ("lm", "policy", "lm"):
            with m.route(signal):
                loss = own_loss(m)
            loss.backward()

    close(added(model, run), penalty_of(model))


def test_two_forwards_of_different_signals_before_their_backwards(model):
    def run(m):
        losses = []
        for signal in ("lm", "policy"):
            with m.route(signal):
                losses.append(own_loss(m))
        for loss in losses:
            loss.backward()

    close(added(model, run), penalty_of(model))


def test_bundles_of_one_signal_count_together_if_they_learn_before_the_same_backward(model):
    """b_diag and b_mlp learn from lm. What one adds changes the other's gradient where both learn, and nowhere else."""

    def run(m):
        with m.alphas(b_diag=0.0):
            first = own_loss(m)
        with m.alphas(b_mlp=0.0):
            (first + own_loss(m)).backward()

    close(added(model, run), penalty_of(model))

    def alone(m):  # in the step before, both learnt
        own_loss(m).backward()
        m.zero_grad()
        with m.alphas(b_diag=0.0):
            own_loss(m).backward()

    other = copy.deepcopy(model)
    with other.alphas(b_diag=0.0):
        other(batch())
    other.quiet_loss().backward()
    close(added(model, alone), gradients(other))


def test_a_penalty_by_hand_for_one_signal_leaves_the_bundles_of_others_their_own(model):
    with model.route("lm"):
        model(batch())
    model.quiet_loss().backward()
    model.finalize_grads()

    def run(m):
        with m.route("policy"):
            loss = own_loss(m)
        loss.backward()

    close(added(model, run), penalty_of(model, "policy"))


def test_weights_below_one_do_not_attenuate_it(model):
    """b_diag learns from lm with weight 0.5: outside a route, `routed_backward` scales its whole gradient."""
    run = lambda m: m.routed_backward({"lm": own_loss(m)})  # noqa: E731
    close(added(model, run), penalty_of(model, "lm"))


def test_looking_at_the_penalty_by_hand_leaves_the_next_step_alone(model):
    model(batch())
    torch.autograd.grad(model.quiet_loss(), next(iter(weights(model).values())))
    close(added(model, ONCE["a loss of logits"]), penalty_of(model))
    model.quiet_loss().backward()
    close(added(model, ONCE["a loss of logits"]), penalty_of(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(model, reentrant):
    ids = batch()
    run = lambda m: (m.gradient_checkpointing_enable({"use_reentrant": reentrant}), own_loss(m, ids).backward())  # noqa: E731
    model.enable_input_require_grads()
    wanted = penalty_of(model)  # before: re-entrant checkpointing runs bundles without gradients until the backward
    close(added(model, run), wanted)


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def compiled(model):
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize("how", [copied, pickled, pytest.param(compiled, marks=pytest.mark.slow)])
def test_copies_and_compiled_models_have_it(model, how):
    wanted = penalty_of(model)
    bare = loud(model)
    other = how(model).train()
    for each in (other, bare):
        each.zero_grad()
        for part in range(2):
            (own_loss(each, batch(seed=part)) / 2).backward()
    without = gradients(bare)
    close({n: g - without[n] for n, g in gradients(other).items()}, wanted)
    torch._dynamo.reset()


def test_weights_that_a_checkpoint_replaced_have_it(model, tmp_path):
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    close(added(model.train(), ONCE["a loss of logits"]), penalty_of(model))


def test_only_the_active_adapter_has_it(model):
    model.add_adapter("two", bundle_config(bundles={"b_other": {"rank": 5, "sub_bases": ["right"]}}))
    close(added(model, ONCE["a loss of logits"]), penalty_of(model))
    assert all(p.grad is None for p in weights(model, "two").values())


def test_an_adapter_that_transformers_attached_has_it():
    def run(quiet):
        base = TINY["llama"]()
        base.add_adapter(bundle_config(quiet=quiet), "default")
        calibrate(base, tokens=512, max_length=32, progress=False)
        perturb(base).train()
        own_loss(base).backward()
        return gradients(base), base

    (grads, base), (without, _) = run(3.0), run(0.0)
    assert grads.keys() == without.keys()
    assert sum(float((grads[n] - without[n]).norm()) for n in grads) > 0.1
    assert state_of(base).penalty.read() > 0


def test_float16_autocast_has_it_in_the_models_own_loss_and_refuses_another(model):
    ids, scale = batch(), 4.0
    model.float()
    with torch.autocast("cpu", torch.float16):
        out = model(input_ids=ids, labels=ids)
        plain = loud(model)(input_ids=ids, labels=ids)
    torch.testing.assert_close(out.loss - plain.loss, model.quiet_loss().detach(), rtol=1e-2, atol=1e-3)
    with torch.autocast("cpu", torch.float16):  # the trainer divides by the tokens of a step of two such micro-batches
        half = model(input_ids=ids, labels=ids, num_items_in_batch=2 * ids[:, 1:].numel()).loss
    torch.testing.assert_close(2 * half, out.loss, rtol=1e-2, atol=1e-3)
    with pytest.raises(RuntimeError, match=r"loss scale .* Train in bfloat16"):
        (scale * out.logits.logsumexp(-1).mean()).backward()
    assert not gradients(model)
    with torch.autocast("cpu", torch.float16):
        loss = model(input_ids=ids, labels=ids).loss
        bare = loud(model)
        own = bare(input_ids=ids, labels=ids).loss
    (scale * loss).backward()
    (scale * own).backward()
    flat = lambda grads: torch.cat([grad.flatten() for grad in grads.values()])  # noqa: E731
    error = (flat(gradients(model)) - flat(gradients(bare))) / scale - flat(penalty_of(model))
    assert error.norm() < 0.05 * flat(penalty_of(model)).norm()


def test_training_without_calibration_warns_once():
    ids = batch()
    model, without = attached("llama"), attached("llama", quiet=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)
        without.train()(ids)
        with torch.no_grad():
            model.train()(ids)
    with pytest.warns(UserWarning, match=r"quiet=20.*peft_bundles.calibrate\(model\).*quiet=0"):
        model.train()(ids)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids)


def test_weights_that_fsdp_has_sharded_are_refused_before_a_forward(model):
    class Sharded(torch.nn.Parameter):
        device_mesh = None

    table = layers(model)[0].bundle_up["default"]
    table._parameters["b_mlp"] = Sharded(table["b_mlp"].detach())
    silenced(model).train()
    state_of(model).configs["default"].quiet = 3.0
    with pytest.raises(ValueError, match=r"FSDP has sharded .* BundleTrainer"):
        model.train()


@pytest.mark.parametrize("place", [None, "mlp"])
def test_a_bundle_with_a_third_of_the_rows_has_a_third_of_the_penalty(place):
    """The mean of a loss over the rows gives it a third of the gradient."""
    bundles = {n: {"rank": 4, "sub_bases": ["a"], "signals": {n[2:]: 1.0}} for n in ("b_lm", "b_policy")}
    config = BundleConfig(bundles=bundles, sub_bases={"a": 8}, place=place, quiet=3.0, task_type="CAUSAL_LM")
    model = get_peft_model(TINY["llama"](), config)
    calibrate(model, tokens=128, max_length=32, progress=False)
    perturb(model).train()
    penalties = {}
    for rows in (["lm"] * 3, ["lm", "policy", "policy"]):
        model.zero_grad()
        with model.route(rows):
            (model(input_ids=batch()).logits.sum() * 0).backward()
        model.finalize_grads()
        penalties[len(set(rows))] = {n: p.grad.clone() for n, p in weights(model).items() if ".b_lm" in n}
    for name, whole in penalties[1].items():
        torch.testing.assert_close(penalties[2][name], whole / 3, rtol=1e-4, atol=1e-7)
