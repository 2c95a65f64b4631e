"""Bundles at linear layers as plain LoRA checkpoints, and LoRA checkpoints as bundles."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from models import BLOCKS, TINY, batch, logits, perturb
from peft import BdLoraConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_bundles import BundleConfig, compose, from_lora, to_lora


BUNDLES = {
    "b_one": {"rank": 3, "place": "all-linear", "signals": {"lm": 1.0}},
    "b_two": {"rank": 5, "place": "attention", "use_rslora": True, "lora_alpha": 7, "signals": {"policy": 1.0}},
}


def double(name):
    return TINY[name]().double()


def bundled(name="llama", bundles=BUNDLES, **fields):
    config = BundleConfig(bundles=bundles, task_type="CAUSAL_LM", quiet=0.0, **fields)
    return perturb(get_peft_model(double(name), config, autocast_adapter_dtype=False), scale=0.1).eval()


def plain(folder, name="llama"):
    return PeftModel.from_pretrained(double(name), folder, autocast_adapter_dtype=False).eval()


ALPHAS = {"numbers": {"b_one": 0.5, "b_two": -1.25}, "by layer": {"b_one": [0.5, 2.0], "b_two": 0.0}, "as they are": {}}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "opt"])  # fused and Conv1D layers among them
@pytest.mark.parametrize("alphas", ALPHAS.values(), ids=list(ALPHAS))
def test_an_export_computes_what_the_model_computes(name, alphas, tmp_path):
    model, ids = bundled(name), batch()
    model.set_alphas(b_two=0.75)
    lora = plain(to_lora(model, alphas, tmp_path), name)
    with model.alphas({n: v for n, v in alphas.items() if isinstance(v, list)}, per="layer"):
        wanted = logits(model, ids, alphas={n: v for n, v in alphas.items() if not isinstance(v, list)})
    torch.testing.assert_close(logits(lora, ids), wanted, rtol=0, atol=1e-10)
    assert not torch.allclose(wanted, logits(double(name), ids), atol=1e-3)
    assert not any(".bundle" in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_an_export_in_bfloat16_is_near(tmp_path):
    model, ids = bundled().to(torch.bfloat16), batch()
    lora = PeftModel.from_pretrained(TINY["llama"]().to(torch.bfloat16), to_lora(model, {}, tmp_path)).eval()
    moved = logits(model, ids).float() - logits(TINY["llama"](), ids)
    assert (logits(lora, ids).float() - logits(model, ids).float()).norm() < 0.02 * moved.norm()


def test_plain_peft_loads_it_without_this_package(tmp_path):
    folder = to_lora(bundled(), {"b_one": 1.0, "b_two": 1.0}, tmp_path / "lora")
    double("llama").save_pretrained(tmp_path / "base")
    code = f"""
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r}), {str(folder)!r})
assert model.peft_config["default"].peft_type == "LORA" and "peft_bundles" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning:peft", "-c", code], check=True)


REFUSED = {
    "another kind": ({"b_mlp": {"rank": 3, "place": "mlp", "kind": "mlp"}}, {}, "b_mlp.* kind 'mlp'"),
    "behind blocks": (
        {"b_old": {"rank": 4, "sub_bases": ["a"]}},
        {},
        "b_old.* cannot be exported.* behind blocks.*distill_to_lora",
    ),
    "all off": (BUNDLES, {"b_one": 0.0, "b_two": 0.0}, "all bundles are off"),
    "by row": (BUNDLES, {"b_one": torch.tensor([0.0, 1.0])}, "b_one.* differ between rows or tokens"),
    "unknown": (BUNDLES, {"b_three": 1.0}, "unknown bundle.*b_three"),
}


@pytest.mark.parametrize(("bundles", "alphas", "message"), REFUSED.values(), ids=list(REFUSED))
def test_what_no_lora_computes_is_refused(bundles, alphas, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        to_lora(bundled(bundles=bundles, sub_bases={"a": 8}), alphas, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_off_may_be_of_any_kind(tmp_path):
    model = bundled(bundles={**BUNDLES, "b_old": {"rank": 4, "sub_bases": ["a"]}}, sub_bases={"a": 8})
    lora = plain(to_lora(model, {"b_old": 0.0}, tmp_path))
    torch.testing.assert_close(logits(lora, batch()), logits(model, batch(), alphas={"b_old": 0.0}), rtol=0, atol=1e-10)


LORAS = {
    "plain": {"r": 4, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4, "lora_alpha": 3, "target_modules": "all-linear", "alpha_pattern": {"v_proj": 5},
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6},
    },
    "rslora": {"r": 4, "use_rslora": True, "target_modules": r".*\.o_proj"},
    "one layer": {"r": 4, "target_modules": ["gate_proj"], "layers_to_transform": [1]},
}  # fmt: skip


def lora_saved(folder, base, **fields):
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **fields), autocast_adapter_dtype=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("fields", LORAS.values(), ids=list(LORAS))
def test_a_lora_becomes_a_bundle(fields, tmp_path):
    model = lora_saved(tmp_path / "lora", double("llama"), **fields)
    folder = from_lora(tmp_path / "lora", tmp_path / "bundle", name="b_code", base_model=double("llama"))
    bundle = compose(double("llama"), [folder])
    wanted = logits(model, batch())
    torch.testing.assert_close(logits(bundle, batch()), wanted, rtol=0, atol=1e-10)
    assert torch.equal(logits(bundle, batch(), alphas={"b_code": 0.0}), logits(double("llama"), batch()))
    again = to_lora(bundle, {}, tmp_path / "again")
    torch.testing.assert_close(logits(plain(again), batch()), wanted, rtol=0, atol=1e-10)
    twice = compose(double("llama"), [from_lora(again, tmp_path / "twice", name="b_two", base_model=double("llama"))])
    torch.testing.assert_close(logits(twice, batch()), wanted, rtol=0, atol=1e-10)


def test_a_lora_beside_a_bundle_adds_up(tmp_path):
    model = lora_saved(tmp_path / "lora", double("gpt2"), r=3, target_modules=["c_attn", "c_proj"])
    folder = from_lora(tmp_path / "lora", tmp_path / "bundle", name="b_code", base_model=double("gpt2"))
    both = compose(double("gpt2"), [folder])
    ids = batch()
    assert both.base_model.model.transformer.h[0].attn.c_attn.bundles.in_features == 64
    torch.testing.assert_close(logits(both, ids), logits(model, ids), rtol=0, atol=1e-10)
    assert BLOCKS["gpt2"] == "transformer.h"


@pytest.mark.parametrize(
    ("fields", "called"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_bdlora": BdLoraConfig(target_modules_bd_b=["q_proj"], nblocks=2)}, "BD-LoRA"),
        ({"trainable_token_indices": [1, 2]}, "trainable tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head.* no map of a linear layer"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.* no map of a linear layer"),
        ({"target_modules": r".*\.0\..*q_proj|.*\.1\..*k_proj"}, "other linear layers in one decoder block"),
    ],
)
def test_parts_that_bundles_do_not_have_are_refused_by_name(fields, called, tmp_path):
    lora_saved(tmp_path / "lora", double("llama"), **{"r": 2, "target_modules": ["q_proj"], **fields})
    with pytest.raises(ValueError, match=called):
        from_lora(tmp_path / "lora", tmp_path / "bundle", name="b", base_model=double("llama"))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
def test_a_lora_on_a_base_of_its_own_is_refused_until_it_is_converted(init, tmp_path):
    base, ids = TINY["llama"](), batch()
    torch.manual_seed(0)
    model = lora_saved(tmp_path / "lora", copy.deepcopy(base), r=2, target_modules=["q_proj"], init_lora_weights=init)

    def load(folder):
        return compose(copy.deepcopy(base), [from_lora(folder, tmp_path / "bundle", name="b", base_model=base)])

    with pytest.raises(ValueError, match=f"init_lora_weights='{init}', which changes the weights of the base model"):
        load(tmp_path / "lora")
    torch.manual_seed(0)
    first = get_peft_model(
        copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init, task_type="CAUSAL_LM")
    )
    first.peft_config["default"].init_lora_weights = True  # as PEFT's guide says
    first.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    torch.testing.assert_close(logits(load(tmp_path / "plain"), ids), logits(model, ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [{"lora_alpha": 11}, {"use_rslora": True}, {"lora_alpha": 0}, {"lora_alpha": -3}])
def test_maps_in_bfloat16_keep_their_values(scale, tmp_path):
    """The scale is the bundle's, so B is not rounded again: the float64 model is that of PEFT, which upcasts too."""
    lora_saved(tmp_path / "lora", TINY["llama"]().bfloat16(), r=3, target_modules=["q_proj"], **scale)
    folder = from_lora(tmp_path / "lora", tmp_path / "bundle", name="b", base_model=double("llama"))
    lora = PeftModel.from_pretrained(double("llama"), tmp_path / "lora").double().eval()
    bundle = compose(double("llama"), [folder]).double()
    torch.testing.assert_close(logits(bundle, batch()), logits(lora, batch()), rtol=0, atol=1e-10)


def test_there_and_back_gives_the_same_tensors(tmp_path):
    """With other ranks at other sites: the ranks of zeros that a bundle needs are not exported."""
    once = to_lora(bundled(), {"b_one": 0.5, "b_two": -1.25}, tmp_path / "once")
    bundle = from_lora(once, tmp_path / "bundle", name="b", base_model=double("llama"))
    again = to_lora(compose(double("llama"), [bundle]), {}, tmp_path / "again")
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (once, again))
    assert first.keys() == second.keys() and len({len(t) for key, t in first.items() if "lora_A" in key}) == 2
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("weights", ["fresh", "zeros"])
def test_a_bundle_that_adds_nothing_is_exported(weights, tmp_path):
    model = get_peft_model(double("llama"), BundleConfig(bundles=BUNDLES, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if weights == "zeros" and ".bundle_" in name:
            parameter.data.zero_()
    lora = plain(to_lora(model, {}, tmp_path))
    assert torch.equal(logits(lora, batch()), logits(double("llama"), batch()))


def test_present_alphas_are_those_of_the_block_around(tmp_path):
    model, ids = bundled(), batch()
    model.set_alphas(b_one=2.0)
    with model.alphas(b_one=0.25, b_two=0.0):
        folder, wanted = to_lora(model, {}, tmp_path), logits(model, ids)
    torch.testing.assert_close(logits(plain(folder), ids), wanted, rtol=0, atol=1e-10)


def test_damaged_loras_are_refused(tmp_path):
    lora_saved(tmp_path / "lora", double("llama"), r=2, target_modules=["q_proj"])
    config, weights = tmp_path / "lora" / "adapter_config.json", tmp_path / "lora" / "adapter_model.safetensors"
    kept, tensors = config.read_text(), load_file(weights)

    def load():
        from_lora(tmp_path / "lora", tmp_path / "bundle", name="b", base_model=double("llama"))

    config.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load()
    config.write_text(json.dumps({**json.loads(kept), "peft_type": "IA3"}))
    with pytest.raises(ValueError, match="type 'IA3'"):
        load()
    config.write_text(kept)
    few = copy.copy(tensors)
    few.pop(next(key for key in few if "lora_B" in key))
    save_file(few, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="do not fit"):
        load()
    weights.unlink()
    with pytest.raises(ValueError, match="pickled weights are never loaded"):
        load()
