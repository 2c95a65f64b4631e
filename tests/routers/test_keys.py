"""Routing by keys: the gates of one pass, in every kind of forward that generation has."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import PAD, TINY, attached, batch, bundle_config, every, generated, logits, reference
from routed import HALVES, PLACES, RANGES, ids_of, mixed, nobodys, places, routed
from transformers import DynamicCache

import peft_bundles
from peft_bundles import KeyRouter, learn_keys, learn_null
from peft_bundles.core.evidence import CHUNK, KEPT, EvidenceLayer, attended_tokens, running_sum
from peft_bundles.keys import spread_out
from peft_bundles.routers import keys as keys_module


# ---- the sums ----


@pytest.mark.parametrize("length", [1, 2, CHUNK - 1, CHUNK + 1, 2 * CHUNK + 5])
def test_evidence_adds_up_as_written(length):
    scores = torch.randn(2, length, 3, dtype=torch.float64)
    past = torch.randn(2, 3, dtype=torch.float64)
    for before in (None, past):
        expected, last = [], torch.zeros(2, 3, dtype=torch.float64) if before is None else before
        for t in range(length):
            last = scores[:, t] + 0.9 * last
            expected.append(last)
        assert torch.allclose(running_sum(scores, 0.9, before), torch.stack(expected, 1), atol=1e-10)


def test_masks_of_every_form_say_the_same():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    causal = torch.ones(5, 5, dtype=torch.bool).tril()[None, None] & mask[:, None, None].bool()
    added = torch.zeros(causal.shape).masked_fill(~causal, -torch.inf)
    for form in (mask, causal, added, {"sliding_attention": None, "full_attention": causal}):
        assert torch.equal(attended_tokens(form, 5, 0), mask.bool())
        assert torch.equal(attended_tokens(form, 2, 3), mask[:, 3:].bool())
    assert attended_tokens(None, 5, 0) is None
    with pytest.raises(ValueError, match="attention_mask of type str"):
        attended_tokens("flex", 5, 0)


def test_the_null_solves_with_its_covariance():
    model = attached()
    null = learn_null(model, [{"input_ids": r} for r in batch(64, 16).tolist()], tokens=1024, progress=False)
    covariance = torch.diag(null.diagonal_Pd[1].double()) + null.factor_Pdr[1].double() @ null.factor_Pdr[1].double().T
    right = torch.randn(64, 3, dtype=torch.float64)
    assert torch.allclose(covariance @ null.solve(1, right), right, atol=1e-8)


def test_a_full_factor_is_the_covariance(monkeypatch):
    states = torch.randn(200, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    covariance = torch.cov(states.T)
    diagonal, factor = peft_bundles.keys.low_rank(covariance, 8)
    shrunk = 0.9 * covariance + 0.1 * covariance.diagonal().mean() * torch.eye(8)
    assert torch.allclose(torch.diag(diagonal) + factor @ factor.T, shrunk, atol=1e-10)


def test_what_is_remembered_is_the_nearest_state():
    model = routed()
    state = model.base_model._state
    folded, null, at = state.router.folded(state), state.null, keys_module.remembered_at(3)
    covariance = torch.diag(null.diagonal_Pd[at]) + null.factor_Pdr[at] @ null.factor_Pdr[at].T
    project = keys_module.projection(covariance)
    inverse = (project.T @ covariance.double() @ project).inverse()
    x_BTd = torch.randn(2, 5, 64)
    distances = []
    for name in folded.classes[folded.kinds :]:
        apart = (x_BTd.double() @ project)[..., None, :] - state.keys[name].remembered.double()
        distances.append((apart @ inverse * apart).sum(-1).amin(-1) / 2)
    farther = torch.stack(distances, -1)
    expected = -keys_module.RECALL * (farther - farther.amin(-1, keepdim=True))
    assert torch.allclose(folded._recalled(at, x_BTd).double(), expected, rtol=1e-3, atol=1e-1)
    assert not folded._recalled(at - 1, x_BTd).any()


def test_a_key_must_lead_the_null_and_memory_decides_near_ties():
    state = routed().base_model._state
    folded, K = state.router.folded(state), state.null.mean_PKd.shape[1]
    lead = folded.leads[1]
    enough, few = keys_module.MARGIN * 4 + 0.1, keys_module.MARGIN * 4 - 0.1

    def decided(leads, recalled=(0.0, 0.0, 0.0), tokens=4.0):
        return int(folded.decide(1, torch.tensor([[[0.0] * K + [*leads, tokens, *recalled]]]))) - K

    assert decided([enough * lead[0], 0.0, 0.0]) == 0 and decided([few * lead[0], 0.0, 0.0]) < 0
    high = 10 * float(lead.max())
    near, far = keys_module.TIE * high + 0.1, keys_module.TIE * high - 0.1
    assert decided([high, near, 0.0]) == 0
    assert decided([high, near, 0.0], (-2 * high, 0.0, 0.0)) == 1
    assert decided([high, far, 0.0], (-2 * high, 0.0, 0.0)) == 0


def test_remembered_states_lie_far_apart():
    states = torch.cat([torch.zeros(50, 4), torch.eye(4), torch.zeros(50, 4)])
    assert len(spread_out(states, 200)) == len(states)
    assert {tuple(row) for row in spread_out(states, 5).tolist()} == {
        tuple(row) for row in states.unique(dim=0).tolist()
    }


def test_halves_of_one_kind_are_told_apart_by_what_is_remembered():
    """Two bundles share their form and differ in one id of a row."""
    model = routed()
    form = ids_of("b_mlp", 1, 10)[0].tolist()
    rows = {b: [{"input_ids": [*form[:4], first, *form[4:]]} for first in range(*at)] for b, at in HALVES.items()}
    learn_keys(model, rows, progress=False)
    for bundle, of_bundle in rows.items():
        shares = []
        for remembered in (False, True):
            model.set_router(KeyRouter(remembered=remembered, always_on=["b_diag"]))
            gates = model.gates(torch.tensor([row["input_ids"] for row in of_bundle]))
            shares.append(gates.values[:, 4:, gates.bundles.index(bundle)].mean().item())
        assert shares[1] > 0.95 and shares[0] < shares[1]


# ---- gates ----


@places
@every
def test_the_bundle_whose_rows_are_read_is_on(name, place):
    model = routed(name, place)
    for bundle in RANGES:
        gates = model.gates(ids_of(bundle, 16, seed=5))
        share = dict(zip(gates.bundles, gates.values[:, 4:].mean((0, 1)).tolist()))
        assert max(share, key=share.get) == bundle and share[bundle] > 0.6, share  # of random models; by chance 0.25
        assert gates.values.sum(-1).max() <= 1


def test_gates_act_as_alphas(monkeypatch):
    """One class for all depths: then the router's forward is that with its gates as alphas."""
    ids = mixed()
    for place in PLACES:
        model = routed(place=place)
        model.set_router(KeyRouter(remembered=False))
        folded = model.base_model._state.router.folded(model.base_model._state)
        for depth in range(1, len(folded.maps)):  # evidence from the embeddings alone
            folded.maps[depth].zero_()
            folded.offsets[depth].zero_()
        folded.leads[:] = folded.leads[0]
        gates = model.gates(ids)
        assert 0 < gates.values.mean() < 1
        routed_logits = logits(model, ids)
        with model.router(None):
            expected = logits(model, ids, alphas={n: gates.values[..., k] for k, n in enumerate(gates.bundles)})
            assert not torch.allclose(logits(model, ids), expected, atol=1e-3)
        assert torch.allclose(routed_logits, expected, atol=1e-5)


@places
def test_where_null_text_wins_the_model_is_the_base_bit_for_bit(place):
    model = routed(place=place)
    folded = model.base_model._state.router.folded(model.base_model._state)
    for offset in folded.offsets:
        offset[1:-1] -= 1e6
    ids = mixed()
    assert torch.equal(logits(model, ids), logits(reference("llama"), ids))
    assert torch.equal(generated(model, ids), generated(reference("llama"), ids))


@places
def test_alphas_multiply_gates(place):
    model, ids = routed(place=place), mixed()
    on = logits(model, ids)
    assert torch.equal(logits(model, ids, alphas=dict.fromkeys(RANGES, 0.0)), logits(reference("llama"), ids))
    half = logits(model, ids, alphas={"b_mlp": 0.5})
    assert not torch.equal(half, on)
    row = torch.ones(len(ids))
    row[0] = 0.0
    mixed_rows = logits(model, ids, alphas=dict.fromkeys(RANGES, row))
    assert torch.allclose(mixed_rows[1:], on[1:], atol=1e-5)
    assert torch.allclose(mixed_rows[0], logits(reference("llama"), ids)[0], atol=1e-5)


def test_a_block_is_read_before_its_own_bundles_act(monkeypatch):
    model, ids = routed(), ids_of("b_mlp")
    folded, states = model.base_model._state.router.folded(model.base_model._state), {}
    scores = folded.scores

    def noted(depth, hidden):
        states[depth] = hidden.clone()
        return scores(depth, hidden)

    monkeypatch.setattr(folded, "scores", noted)
    logits(model, ids)
    assert len(states) == 3
    expected = reference("llama")(input_ids=ids, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], expected[0]) and torch.equal(states[1], expected[1])


def test_a_router_taken_away_in_the_middle_of_a_forward_leaves_nothing_behind():
    model, ids = routed(), mixed()
    block = model.get_base_model().model.layers[1]
    handle = block.register_forward_pre_hook(lambda *_: model.base_model.set_router(None))
    logits(model, ids)
    handle.remove()
    left = logits(model, ids)
    with torch.no_grad():
        assert torch.equal(left, copy.deepcopy(model)(input_ids=ids).logits)


def test_a_router_changes_nothing_in_training_mode():
    model, ids = routed(), mixed()
    with pytest.raises(ValueError, match="in eval mode only"):
        model.train().gates(ids)
    trained = model.train()(input_ids=ids, labels=ids).logits
    model.base_model.set_router(None)
    assert torch.equal(trained, model(input_ids=ids, labels=ids).logits)


def test_gradients_in_eval_mode_are_those_of_the_gated_forward():
    model, ids = routed(), mixed()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    with torch.no_grad():
        assert torch.allclose(loss, model(input_ids=ids, labels=ids).loss, atol=1e-6)


# ---- one pass, many forms of it ----


@places
@every
def test_prefill_and_decoding_agree(name, place):
    model, ids = routed(name, place), mixed()
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=True)
        spoke = model.base_model._state.call.heard.spoke
        out, pieces, cache = None, [], None
        name_of = "cache_params" if name == "mamba" else "past_key_values"
        for start, end in ((0, 5), (5, 8), (8, 9), (9, 10), (10, 12)) if name != "mamba" else ((0, 11), (11, 12)):
            out = model(input_ids=ids[:, start:end], use_cache=True, **({name_of: cache} if cache is not None else {}))
            cache = getattr(out, name_of)
            pieces.append(out.logits)
        assert torch.equal(model.base_model._state.call.heard.spoke, spoke)
        assert len(spoke.unique()) > 2
    assert torch.allclose(torch.cat(pieces, 1), whole.logits, atol=1e-4)


@places
def test_generation_is_the_same_in_every_way(place):
    model, ids = routed(place=place), mixed()
    plain = generated(model, ids)
    for ways in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"past_key_values": DynamicCache()},
    ):
        assert torch.equal(generated(model, ids, **ways), plain), ways
    for row, expected in zip(ids, plain):
        assert torch.equal(generated(model, row[None], prompt_lookup_num_tokens=3)[0], expected)


def test_an_assistant_changes_nothing():
    model, ids = routed(), mixed()
    assistant = TINY["llama"](seed=0)
    for row in ids:
        expected = generated(model, row[None])
        assert torch.equal(generated(model, row[None], assistant_model=assistant), expected)


@places
def test_beams_keep_their_evidence(place):
    model, ids = routed(place=place), mixed()
    cached = generated(model, ids, num_beams=3)
    assert torch.equal(cached, generated(model, ids, num_beams=3, use_cache=False))


@places
@pytest.mark.parametrize("ways", [{}, {"cache_implementation": "static"}])
def test_padding_on_the_left_changes_nothing(place, ways):
    model, ids = routed(place=place), mixed()
    padded = torch.cat([torch.full((len(ids), 4), PAD), ids], 1)
    mask = (torch.arange(padded.shape[1]) >= 4).long().expand(len(ids), -1)
    result, gates = generated(model, padded, attention_mask=mask, return_gates=True, **ways)
    assert torch.equal(result[:, 4:], generated(model, ids))
    assert torch.equal(gates.values[:, 4:], model.gates(result[:, 4:-1]).values)


def test_return_gates_are_those_of_a_fresh_prefill():
    model, ids = routed(), mixed()
    result, gates = generated(model, ids, return_gates=True)
    fresh = model.gates(result[:, :-1])
    assert gates.bundles == fresh.bundles and torch.equal(gates.values, fresh.values)
    with pytest.raises(ValueError, match="cannot follow beams"):
        generated(model, ids, return_gates=True, num_beams=2)
    with pytest.raises(ValueError, match="needs a router"):
        generated(model, ids, return_gates=True, router=None)


@places
def test_a_prompt_read_twice_is_a_tag(place):
    model, ids = routed(place=place), mixed()
    gates = model.gates(ids)
    last = {name: gates.values[:, -1, k] for k, name in enumerate(gates.bundles)}
    tagged = generated(model, ids, router=None, alphas=last)
    model.set_router(KeyRouter(scope="prompt"))
    result, told = generated(model, ids, return_gates=True)
    assert torch.equal(result, tagged) and told.values.shape[1] == result.shape[1] - 1
    assert torch.equal(told.values[:, 0], gates.values[:, -1]) and torch.equal(told.values[:, -1], gates.values[:, -1])
    assert torch.equal(generated(model, ids, num_beams=2), generated(model, ids, num_beams=2, router=None, alphas=last))
    off = dict.fromkeys(RANGES, 0.0)
    assert torch.equal(generated(model, ids, alphas=off), generated(reference("llama"), ids))
    assert torch.equal(generated(model, ids, alphas={b: torch.ones(4) for b in RANGES}), tagged)
    with pytest.raises(ValueError, match="one gate; use scope='token'"):
        generated(model, ids, alphas={"b_mlp": torch.ones(ids.shape)})
    with pytest.raises(ValueError, match="needs token ids"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), max_new_tokens=1)
    with pytest.raises(ValueError, match="scope='row' is unknown"):
        KeyRouter(scope="row")


def test_continuous_batching_is_refused():
    with pytest.raises(ValueError, match="packs rows into one"):
        routed().generate_batch([[3, 4]])


def test_rows_name_their_adapters():
    model, ids = routed(), mixed()
    model.add_adapter("other", bundle_config(bundles={"b_other": {"rank": 5, "sub_bases": ["right"]}}))
    learn_keys(model, {"b_other": [{"input_ids": r} for r in nobodys(8, 12).tolist()]}, adapter="other", progress=False)
    on = logits(model, ids)
    named = logits(model, ids, adapter_names=["default", "default", "__base__", "default"])
    assert torch.allclose(named[[0, 1, 3]], on[[0, 1, 3]], atol=1e-5)
    assert torch.allclose(named[2], logits(reference("llama"), ids)[2], atol=1e-5)


def test_a_cache_without_evidence_is_refused():
    model, ids = routed(), mixed()
    with torch.no_grad(), model.router(None):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="read without a router"):
        logits(model, ids[:, :1], past_key_values=cache)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with model.router(KeyRouter()), pytest.raises(ValueError, match="evidence of another router"):
        logits(model, ids[:, :1], past_key_values=cache)


def test_tokens_are_taken_back_as_far_as_they_are_kept():
    kept = EvidenceLayer(None)
    for n in range(KEPT + 8):
        kept.add(torch.full((2, 1, 3, 4), float(n)), torch.ones(2, dtype=torch.bool), torch.full((2, 1), n))
    assert kept.kept.shape[1] == KEPT and kept.get_seq_length() == KEPT + 8
    kept.crop(-3)
    assert kept.spoke[0, -1] == KEPT + 4 == kept.kept[0, -1, 0, 0]
    with pytest.raises(ValueError, match="70 tokens are to be taken off"):
        EvidenceLayer.crop(_long(), 70)
    kept.reorder_cache(torch.tensor([1, 1]))
    kept.batch_repeat_interleave(2)
    assert kept.kept.shape[0] == 4
    kept.crop(1000)
    assert kept.kept is None and kept.get_seq_length() == 0


def _long() -> EvidenceLayer:
    kept = EvidenceLayer(None)
    kept.add(torch.zeros(1, KEPT, 1, 1), torch.ones(1, dtype=torch.bool), torch.zeros(1, 2 * KEPT))
    return kept


def test_threads_have_routers_of_their_own():
    model, ids = routed(), mixed()
    with model.router(None):
        off = logits(model, ids)
    on = logits(model, ids)

    def run(number: int) -> bool:
        if number % 2:
            with model.router(None):
                return torch.equal(logits(model, ids), off)
        return torch.equal(logits(model, ids), on)

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(run, range(12)))


def test_a_copy_of_the_model_has_a_router_of_its_own():
    model, ids = routed(), mixed()
    on = logits(model, ids)
    other = copy.deepcopy(model)
    model.set_router(None)
    assert not torch.equal(logits(model, ids), on)
    assert torch.equal(logits(other, ids), on)
    assert not any("_read" in str(hook) for block in model.modules() for hook in block._forward_hooks.values())


def test_a_compiled_model_computes_the_same():
    model, ids = routed(), mixed()
    expected = logits(model, ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    assert torch.allclose(logits(compiled, ids), expected, atol=1e-5)


def test_disabled_adapters_are_the_base():
    model, ids = routed(), mixed()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), logits(reference("llama"), ids))
