"""Keys: what is always on or shared, what is refused, and how keys are saved, composed and exchanged."""

from __future__ import annotations

import pytest
import torch
from models import TINY, attached, batch, bundle_config, logits
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from routed import RANGES, ids_of, mixed, places, routed

import peft_bundles
from peft_bundles import KeyRouter, Null, learn_keys, learn_null
from peft_bundles.core.state import Key
from peft_bundles.routers import keys as keys_module


# ---- always on, shared keys, refusals ----


def test_always_on_and_followers():
    model, ids = routed(), ids_of("b_mlp")
    model.set_router(KeyRouter(always_on=["b_diag"], follows={"b_linear": "b_mlp"}))
    gates = model.gates(ids)
    values = dict(zip(gates.bundles, gates.values.unbind(-1)))
    assert values["b_diag"].min() == 1 and torch.equal(values["b_linear"], values["b_mlp"])
    assert values["b_mlp"][:, 4:].mean() > 0.9


def test_what_cannot_be_routed_is_refused(tmp_path):
    model = attached()
    with pytest.raises(ValueError, match=r"call peft_bundles\.learn_null"):
        model.set_router("keys")
    rows = [{"input_ids": row} for row in batch(32, 16).tolist()]
    null = learn_null(model, rows, tokens=512, progress=False)
    with pytest.raises(ValueError, match=r"have no key; make one with peft_bundles.learn_keys"):
        model.set_router("keys")
    with pytest.raises(ValueError, match="router='kays' is unknown"):
        model.set_router("kays")
    with pytest.raises(ValueError, match="is not a router"):
        model.set_router(3)
    with pytest.raises(ValueError, match="names \\['b_x'\\]"):
        model.set_router(KeyRouter(always_on=["b_x"]))
    with pytest.raises(ValueError, match="has no router"):
        model.gates(batch())
    for bad, message in (
        ({}, "at least one bundle"),
        ({"b_x": rows}, "no bundles \\['b_x'\\]"),
        ({"b_mlp": []}, "has no rows"),
        ({"b_mlp": ["text"]}, "tokenizer is None"),
        ({"b_mlp": [{"input_ids": [4]}]}, "no token besides the first"),
        ({"b_mlp": [{"ids": [4]}]}, "tokenizer is None"),
    ):
        with pytest.raises(ValueError, match=message):
            learn_keys(model, bad, progress=False)
    with pytest.raises(ValueError, match="one string"):
        learn_null(model, "text", progress=False)
    null.save(tmp_path / "null.safetensors")
    loaded = Null.load(tmp_path / "null.safetensors")
    assert loaded.kinds == null.kinds and torch.equal(loaded.factor_Pdr, null.factor_Pdr)
    attached().set_null(loaded)
    with pytest.raises(ValueError, match="another base model"):
        attached("gpt2").set_null(loaded)
    safe = tmp_path / "other.safetensors"
    peft_bundles.routers.keys.save_file({"a": torch.zeros(1)}, safe)
    with pytest.raises(ValueError, match=r"not written by Null\.save"):
        Null.load(safe)


def test_a_key_that_wins_null_text_is_refused():
    model = routed()
    state = model.base_model._state
    state.keys["default", "b_mlp"] = Key(1.01 * state.null.mean_PKd[:, 0], state.null.mean_PKd[:1, 0])
    model.base_model.set_router(None)
    with pytest.raises(ValueError, match=r"'b_mlp': 0\.\d+"):
        model.set_router("keys")


def test_states_that_are_not_finite_are_refused():
    model = attached()
    model.get_base_model().model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        learn_keys(model, {"b_mlp": [{"input_ids": [3, 4, 5]}]}, progress=False)


def test_the_first_token_gives_no_evidence():
    model = routed()
    ids = ids_of("b_mlp")
    ids[:, 0] = ids_of("b_diag")[:, 0]
    changed = ids.clone()
    changed[:, 0] = ids_of("b_linear")[:, 0]
    state = model.base_model._state
    model.gates(ids)
    first = state.call.heard.kept[:, 0, 0]
    model.gates(changed)
    assert torch.equal(first, torch.zeros_like(first)) and torch.equal(state.call.heard.kept[:, 0, 0], first)
    assert keys_module.DECAY == 0.9


# ---- keys travel ----


def test_keys_are_saved_loaded_cut_and_joined(tmp_path):
    model, ids = routed(), mixed()
    expected, null = logits(model, ids), model.base_model._state.null
    model.save_pretrained(tmp_path / "whole")
    loaded = PeftModel.from_pretrained(TINY["llama"](), tmp_path / "whole").eval()
    loaded.set_null(null)
    loaded.set_router("keys")
    assert torch.equal(logits(loaded, ids), expected)
    parts = [peft_bundles.save_bundle(model, bundle, tmp_path / bundle) for bundle in RANGES]
    with pytest.raises(ValueError, match="was not measured yet"):
        peft_bundles.compose(TINY["llama"](), parts, router="keys")
    composed = peft_bundles.compose(TINY["llama"](), parts, router="keys", null=null)
    assert torch.allclose(logits(composed, ids), expected, atol=1e-5)
    peft_bundles.remove_bundle(composed, "b_mlp")
    assert composed.gates(ids).bundles == ["b_linear", "b_diag"]
    peft_bundles.load_bundle(composed, tmp_path / "b_mlp")
    assert torch.allclose(logits(composed, ids), expected, atol=1e-5)


def test_a_config_that_trained_before_brings_no_keys(tmp_path):
    model = routed()
    config = model.peft_config["default"]
    assert set(config.keys) == set(RANGES)
    fresh = get_peft_model(TINY["llama"](), bundle_config())
    fresh.peft_config["default"].keys = dict(config.keys)
    fresh.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(TINY["llama"](), tmp_path).peft_config["default"].keys is None
    shared = bundle_config()
    one, other = (get_peft_model(TINY["llama"](), shared) for _ in range(2))
    learn_keys(one, {"b_mlp": [{"input_ids": [4, 5, 6]}]}, progress=False)
    assert one.peft_config["default"].keys and other.peft_config["default"].keys is None and shared.keys is None


def test_weights_that_are_set_leave_the_keys_alone():
    model, ids = routed(), mixed()
    expected, keys = logits(model, ids), dict(model.base_model._state.keys)
    tensors = get_peft_model_state_dict(model)
    plain = {name: tensor for name, tensor in tensors.items() if "bundle_keys" not in name}
    for state_dict in (plain, tensors):
        set_peft_model_state_dict(model, state_dict)
        assert model.base_model._state.keys.keys() == keys.keys() and torch.equal(logits(model, ids), expected)


@places
def test_a_merged_bundle_has_no_key(place, tmp_path):
    model = routed(place=place)
    peft_bundles.save_bundle(model, "b_linear", tmp_path / "one")
    peft_bundles.merge_bundles([tmp_path / "one"] * 2, [0.5, 0.5], tmp_path / "both")
    composed = peft_bundles.compose(TINY["llama"](), [tmp_path / "both"])
    assert not composed.base_model._state.keys
    learn_keys(composed, {"merged": [{"input_ids": row} for row in ids_of("b_linear").tolist()]}, progress=False)
    peft_bundles.save_bundle(composed, "merged", tmp_path / "keyed")
    assert peft_bundles.compose(TINY["llama"](), [tmp_path / "keyed"]).base_model._state.keys


def test_a_running_model_takes_no_bundle_that_it_cannot_route(tmp_path):
    model, ids = routed(), mixed()
    peft_bundles.save_bundle(model, "b_mlp", tmp_path / "keyed")
    composed = peft_bundles.compose(
        TINY["llama"](), [tmp_path / "keyed"], router="keys", null=model.base_model._state.null
    )
    before, adapters = logits(composed, ids), list(composed.peft_config)
    state = model.base_model._state
    state.keys["default", "b_diag"] = Key(1.01 * state.null.mean_PKd[:, 0], state.keys["default", "b_diag"].remembered)
    peft_bundles.save_bundle(model, "b_diag", tmp_path / "greedy")
    state.take_keys("default", {})
    model.peft_config["default"].keys = None
    peft_bundles.save_bundle(model, "b_linear", tmp_path / "keyless")
    for folder, message in (("greedy", "'b_diag': 0"), ("keyless", r"\['b_linear'\] have no key")):
        with pytest.raises(ValueError, match=message):
            peft_bundles.load_bundle(composed, tmp_path / folder)
        assert list(composed.peft_config) == adapters and torch.equal(logits(composed, ids), before)


def test_a_changed_key_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = routed()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(name for name in tensors if name.endswith("bundle_keys.b_mlp.mean"))
    for change, message in (
        ({key: tensors[key] + 1}, "not those that were saved"),
        ({key: None}, "has keys of|not those that were saved"),
    ):
        save_file({k: v for k, v in {**tensors, **change}.items() if v is not None}, path)
        for load in (
            lambda: PeftModel.from_pretrained(TINY["llama"](), tmp_path),
            lambda: peft_bundles.compose(TINY["llama"](), [tmp_path]),
        ):
            with pytest.raises(ValueError, match=message):
                load()
