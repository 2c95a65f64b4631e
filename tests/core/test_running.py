"""What a model with bundles gives however it is run: cached, padded, in mixed batches, checkpointed, copied, cast."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from models import (
    BLOCKS,
    LAYERS,
    PAD,
    TINY,
    attached,
    batch,
    bundle_config,
    every,
    generated,
    layers,
    logits,
    perturb,
    reference,
    snapshot,
    some,
    two_adapters,
    weights,
)
from peft import PeftModel, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import peft_bundles
from peft_bundles.core.walking import bundle_layers


# ---- generation, padding, hidden states ----


@every
def test_cache_changes_nothing(name):
    model, ids = attached(name), batch()
    kwargs = {"output_logits": True, "return_dict_in_generate": True}
    cached, plain = (generated(model, ids, use_cache=use, **kwargs) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences)
    for a, b in zip(cached.logits, plain.logits):
        assert torch.allclose(a, b, atol=1e-4)
    assert not torch.equal(generated(reference(name), ids, **kwargs).logits[0], cached.logits[0])


@pytest.mark.parametrize("name", [n for n in TINY if n != "mamba"])
def test_left_padding_does_not_change_a_row(name):
    model, short, pads = attached(name), batch(1, 6), 4
    ids = torch.cat([torch.full((1, pads), PAD), short], 1)
    ids = torch.cat([ids, batch(1, 6 + pads, seed=1)])
    mask = (ids != PAD).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = logits(model, ids, attention_mask=mask, position_ids=positions)
    assert torch.allclose(padded[0, pads:], logits(model, short)[0], atol=1e-5)
    out = generated(model, ids, attention_mask=mask)
    assert torch.equal(out[:1, pads:], generated(model, short))


@every
def test_hidden_states_are_those_after_the_bundles(name):
    model, ids = attached(name), batch()
    blocks = [layer.get_base_layer() for layer in layers(model) if not layer.site.path]
    entered = []
    handles = [
        b.register_forward_pre_hook(lambda m, args, kwargs: entered.append(args[0]), with_kwargs=True) for b in blocks
    ]
    with torch.no_grad():
        out = model(input_ids=ids, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    assert len(out.hidden_states) == LAYERS + 1
    start = 0 if name == "mamba" else 1  # others show the embeddings first
    for state, into in zip(out.hidden_states[start:], entered[1:]):
        assert torch.equal(state, into)  # what a block gets is what the one before shows
    head = model.get_output_embeddings()(out.hidden_states[-1])
    if (cap := getattr(model.config, "final_logit_softcapping", None)) is not None:
        head = torch.tanh(head / cap) * cap
    assert torch.allclose(head, out.logits, atol=1e-6)
    with torch.no_grad():
        base = reference(name)(input_ids=ids, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states[:start], base.hidden_states[:start]))
    for state, before in zip(out.hidden_states[start:], base.hidden_states[start:]):
        assert (state - before).abs().max() > 1e-3


@pytest.mark.parametrize("attach_first", [False, True])
@some
def test_a_users_hook_sees_the_block_after_its_bundles(name, attach_first):
    """Also a hook that was there before the bundles, and transformers' own capture of hidden states."""
    base, ids, seen = TINY[name](), batch(), []
    if attach_first:
        get_peft_model(base, bundle_config())
    block = base.get_submodule(f"{BLOCKS[name]}.{LAYERS - 1}")
    handle = block.register_forward_hook(lambda m, args, output: seen.append(output))
    with torch.no_grad():
        base(input_ids=ids, output_hidden_states=True)
    if not attach_first:
        get_peft_model(base, bundle_config())
    perturb(base)
    seen.clear()
    with torch.no_grad():
        out = base(input_ids=ids, output_hidden_states=True)
    handle.remove()
    norm = next(m for n, m in base.named_modules() if n.endswith((".norm", ".ln_f")))
    assert torch.allclose(norm(seen[0]), out.hidden_states[-1], atol=1e-6)
    assert torch.allclose(base.get_output_embeddings()(norm(seen[0])), out.logits, atol=1e-6)


# ---- mixed batches ----

MIX = ["one", "__base__", "two"]


def rows_alone(model, run):
    """What `run` gives for each of MIX when it is the only one."""
    model.set_adapter("one")
    one = run()
    model.set_adapter("two")
    two = run()
    with model.disable_adapter():
        base = run()
    model.set_adapter("one")
    assert not torch.equal(one, two)
    assert not torch.equal(one, base)
    assert not torch.equal(two, base)
    return one, base, two


@every
def test_mixed_batch(name):
    model, ids = two_adapters(name), batch()
    mixed = logits(model, ids, adapter_names=MIX)
    for row, alone in enumerate(rows_alone(model, lambda: logits(model, ids))):
        assert torch.allclose(mixed[row], alone[row], atol=1e-5)
        assert all(not torch.allclose(mixed[other], alone[other], atol=1e-4) for other in range(3) if other != row)
    assert torch.equal(logits(model, ids), logits(attached(name, "one"), ids))  # nothing of the call stays


@pytest.mark.parametrize("beams", [1, 3])
@some
def test_mixed_batch_generates(name, beams):
    model, ids = two_adapters(name), batch(3, 6)

    def scores(**kwargs):
        out = generated(model, ids, num_beams=beams, output_scores=True, return_dict_in_generate=True, **kwargs)
        return out.scores[0].view(3, beams, -1)

    mixed, sequences = scores(adapter_names=MIX), generated(model, ids, num_beams=beams, adapter_names=MIX)
    for row, alone in enumerate(rows_alone(model, scores)):
        assert torch.allclose(mixed[row], alone[row], atol=1e-5)
    for row, adapter in enumerate(MIX):
        alone = generated(model, ids, num_beams=beams, adapter_names=[adapter] * 3)
        assert torch.equal(sequences[row], alone[row])


def test_mixed_batch_returns_several_sequences():
    model, ids = two_adapters(), batch(3, 6)
    kwargs = {"num_beams": 4, "num_return_sequences": 2}
    mixed = generated(model, ids, adapter_names=MIX, **kwargs).view(3, 2, -1)
    for row, alone in enumerate(rows_alone(model, lambda: generated(model, ids, **kwargs).view(3, 2, -1))):
        assert torch.equal(mixed[row], alone[row])


def test_mixed_batch_errors():
    model, ids = two_adapters(), batch()
    with pytest.raises(ValueError, match="nobody"):
        model(input_ids=ids, adapter_names=["one", "nobody", "two"])
    with pytest.raises(ValueError, match="nobody"):
        generated(model, ids, adapter_names=["one", "nobody", "two"])
    with pytest.raises(ValueError, match=r"2 .*3"):
        model(input_ids=ids, adapter_names=["one", "two"])
    with pytest.raises(ValueError, match=r"2 .*3"):
        generated(model, ids, adapter_names=["one", "two"])
    with pytest.raises(ValueError, match="training"):
        model.train()(input_ids=ids, adapter_names=MIX)
    model.eval()
    assert torch.equal(logits(model, ids), logits(attached("llama", "one"), ids))


# ---- gradient checkpointing ----


@pytest.mark.parametrize("use_reentrant", [False, True])
@every
def test_gradient_checkpointing_gives_the_same_gradients(name, use_reentrant):
    def gradients(model):
        model.zero_grad()
        torch.manual_seed(0)  # of the bundles' dropout, which the second forward has to repeat
        model(input_ids=batch(), labels=batch()).loss.backward()
        return {n: p.grad.clone() for n, p in weights(model).items()}

    model = attached(name, dropout=0.5).train()
    plain = gradients(model)
    if use_reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    for n, gradient in gradients(model).items():
        assert torch.allclose(gradient, plain[n], rtol=1e-4, atol=1e-6), n


def test_gradient_checkpointing_under_a_route():
    """The second forward of a checkpointed block runs in backward, after the route's block has ended."""

    def gradients(checkpointing, rows):
        model = attached().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with model.route(rows):
            loss = model(input_ids=batch(2), labels=batch(2)).loss
        loss.backward()
        model.finalize_grads()
        return {n: p.grad for n, p in weights(model).items()}

    for rows in ("lm", ["lm", "policy"]):
        plain, other = gradients(False, rows), gradients(True, rows)
        assert any(g is not None for g in plain.values())
        for n, gradient in plain.items():
            assert (gradient is None) == (other[n] is None), n
            assert gradient is None or torch.allclose(gradient, other[n], rtol=1e-4, atol=1e-6), n


def test_checkpointing_from_outside_of_the_blocks_is_refused_where_it_would_lose_the_call():
    model = attached().train()
    inner = model.get_base_model().model
    inner.layers[0] = checkpoint_wrapper(inner.layers[0])
    for call in (lambda: model.route("lm"), lambda: model.alphas(b_mlp=0.5)):
        with pytest.raises(RuntimeError, match=r"checkpoint_wrapper .* runs their bundles again in backward"):
            with call():
                pass
    with torch.no_grad(), model.alphas(b_mlp=0.5):  # no backward, nothing to lose
        model(batch())


def test_checkpointing_around_the_decoder_is_refused_and_inside_of_a_block_changes_nothing():
    model = attached().train()
    whole = model.get_base_model()
    whole.model = checkpoint_wrapper(whole.model)
    with pytest.raises(RuntimeError, match="checkpoint_wrapper"), model.route("lm"):
        pass

    def gradients(wrapped):
        model = attached().train()
        for block in model.get_base_model().model.layers if wrapped else ():
            block.mlp = checkpoint_wrapper(block.mlp)
        with model.route(["lm", "policy"]), model.alphas(b_mlp=torch.tensor([0.5, 2.0])):
            model(input_ids=batch(2), labels=batch(2)).loss.backward()
        return [p.grad for p in weights(model).values() if p.grad is not None]

    plain, other = gradients(False), gradients(True)
    assert len(plain) == len(other) > 0
    for gradient, expected in zip(other, plain):
        assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-6)


@every
def test_a_walk_that_stops_at_the_blocks_finds_all_bundle_layers(name):
    model = attached(name)
    assert len([layer for layer in layers(model) if not layer.site.path]) == LAYERS
    for each in (model, model.get_base_model(), copy.deepcopy(model), nn.Sequential(model, model)):
        assert bundle_layers(each) == layers(each)


def test_gradient_checkpointing_under_alphas():
    def gradients(checkpointing):
        model = attached().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with model.alphas(b_mlp=0.0, b_linear=torch.tensor([0.5, 2.0])):
            loss = model(input_ids=batch(2), labels=batch(2)).loss
        loss.backward()
        return {n: p.grad for n, p in weights(model).items()}

    plain, other = gradients(False), gradients(True)
    for n, gradient in plain.items():
        if gradient is None:
            assert other[n] is None or not bool(other[n].any()), n
        else:
            assert torch.allclose(gradient, other[n], rtol=1e-4, atol=1e-6), n


# ---- copies and dtypes ----


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@some
def test_copies_are_independent(name, make):
    model, ids = attached(name), batch()
    before, expected = logits(model, ids), logits(reference(name), ids)
    other = make(model)
    assert torch.equal(logits(other, ids), before)
    zero = dict.fromkeys(model.peft_config["default"].bundles, 0.0)
    other.set_alphas(zero)
    assert torch.equal(logits(other, ids), expected)
    assert torch.equal(logits(model, ids), before)
    with model.alphas(zero):
        assert torch.equal(logits(model, ids), expected)
        third = make(model)
    assert torch.equal(logits(third, ids), before)  # a copy starts with no call in progress
    perturb(third, seed=5)
    assert not torch.equal(logits(third, ids), before)
    assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(third.unload(), ids), expected)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_can_be_calibrated_by_itself(make, tmp_path):
    model, ids = get_peft_model(TINY["llama"](), bundle_config()).eval(), batch()
    other = make(model)
    peft_bundles.calibrate(other, tokens=200, max_length=16, progress=False)
    assert model.peft_config["default"].calibration is None
    assert other.peft_config["default"].calibration is not None
    assert torch.equal(logits(perturb(model), ids), logits(attached(), ids))
    perturb(other).eval().save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(TINY["llama"](), tmp_path), ids), logits(other, ids))


@every
def test_bfloat16(name):
    model = attached(name)
    behind = [layer for layer in layers(model) if "default" in layer.bundle_basis]
    bases = [layer.bundle_basis["default"].clone() for layer in behind]
    full = logits(model, batch())
    model.to(torch.bfloat16)
    assert {p.dtype for p in weights(model).values()} == {torch.bfloat16}
    for layer, before in zip(behind, bases):
        after = layer.bundle_basis["default"]
        assert after.dtype == torch.float32
        assert torch.equal(after, before)
    half = logits(model, batch())
    assert half.dtype == logits(reference(name).to(torch.bfloat16), batch()).dtype
    assert (half.float() - full).norm() < 0.1 * full.norm()
    assert generated(model, batch()).shape == (3, 9 + 5)
    model.train()(input_ids=batch(), labels=batch()).loss.backward()
    assert all(p.grad.dtype == torch.bfloat16 and bool(p.grad.any()) for p in weights(model).values())


@some
def test_autocast(name):
    model, ids = attached(name), batch()
    full = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = logits(model, ids)
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert not torch.equal(mixed.float(), full)
    assert (mixed.float() - full).norm() < 0.1 * full.norm()
    autocast = snapshot({n: p.grad for n, p in weights(model).items()})
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    for n, p in weights(model).items():
        assert autocast[n].dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(autocast[n].flatten(), p.grad.flatten(), 0) > 0.9, n


@pytest.mark.parametrize("grad", [False, True])
def test_an_exported_program_computes_the_same(grad):
    """`torch.export` in grad mode and without: LoRA and the base can be exported in both."""
    model, ids = attached("llama").eval(), batch(2, 5)
    with torch.set_grad_enabled(grad):
        program = torch.export.export(model, (), {"input_ids": ids, "use_cache": False}, strict=False)
        out = program.module()(input_ids=ids, use_cache=False)
    torch.testing.assert_close(out.logits.detach(), logits(model, ids))
