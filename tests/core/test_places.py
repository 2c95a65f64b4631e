"""Which linear layers a place names, on every kind of block."""

from __future__ import annotations

import pytest
import torch
from models import HIDDEN, LAYERS, TINY, batch, logits, perturb
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, BitsAndBytesConfig

from peft_bundles import PRESETS, BundleConfig, calibrate, load_basis, save_basis
from peft_bundles.core.places import Site
from peft_bundles.core.walking import bundle_layers


ATTENTION, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
PLACES = {
    "llama": (ATTENTION, MLP),
    "gpt2": ({"c_attn", "c_proj"}, {"c_fc", "c_proj"}),
    "qwen2": (ATTENTION, MLP),
    "gemma2": (ATTENTION, MLP),
    "opt": ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc1", "fc2"}),
    "gpt_neox": ({"query_key_value", "dense"}, {"dense_h_to_4h", "dense_4h_to_h"}),
    "mistral": (ATTENTION, MLP),
    "mixtral": (ATTENTION, None),  # the experts are one tensor
    "mamba": (None, {"in_proj", "x_proj", "out_proj"}),  # dt_proj is not called
    "gptj": ({"q_proj", "k_proj", "v_proj", "out_proj"}, {"fc_in", "fc_out"}),
}


def placed(place, base, **fields):
    bundles = {"b_one": {"rank": 4, "place": place, "signals": {"lm": 1.0}}}
    return get_peft_model(base, BundleConfig(bundles=bundles, task_type="CAUSAL_LM", quiet=0.0, **fields))


def sites(model, adapter="default"):
    return [layer.site for layer in bundle_layers(model) if layer.holds(adapter)]


def names(model, block=0):
    return {site.path.rpartition(".")[2] for site in sites(model) if site.block == block}


@pytest.mark.parametrize("name", list(PLACES))
def test_places_of_every_model(name):
    attention, mlp = PLACES[name]
    for place, wanted in (("attention", attention), ("mlp", mlp)):
        if wanted is None:
            with pytest.raises(ValueError, match=f"place='{place}' names no linear layer of the decoder blocks"):
                placed(place, TINY[name]())
        else:
            assert names(placed(place, TINY[name]())) == wanted
    assert names(placed("all-linear", TINY[name]())) == (attention or set()) | (mlp or set())


OTHERS = {
    "falcon": ({"hidden_size": HIDDEN}, {"query_key_value", "dense"}, {"dense_h_to_4h", "dense_4h_to_h"}),
    "phi3": ({"hidden_size": HIDDEN, "intermediate_size": 96, "pad_token_id": 0}, {"qkv_proj", "o_proj"},
             {"gate_up_proj", "down_proj"}),
    "qwen2_moe": ({"hidden_size": HIDDEN, "num_experts": 4, "num_key_value_heads": 4,
                   "shared_expert_intermediate_size": 48}, ATTENTION, MLP),
}  # fmt: skip


@pytest.mark.parametrize("name", list(OTHERS))
def test_fused_layers_and_shared_experts_act_on_the_rows_they_are_given(name):
    """A shared expert gets all rows in one; what chooses experts is left alone."""
    fields, attention, mlp = OTHERS[name]
    config = AutoConfig.for_model(name, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, **fields)
    torch.manual_seed(0)
    model = placed("all-linear", AutoModelForCausalLM.from_config(config).eval())
    assert names(model) == attention | mlp
    perturb(model, scale=0.1).eval()
    ids = batch()
    one, off = logits(model, ids), logits(model, ids, alphas={"b_one": 0.0})
    rows = logits(model, ids, alphas={"b_one": torch.tensor([1.0, 0.0, 1.0])})
    assert (one - off).abs().max() > 1e-3
    torch.testing.assert_close(rows[1], off[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rows[[0, 2]], one[[0, 2]], atol=1e-5, rtol=1e-4)
    with model.route(["lm", "lm", "lm"]):
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.bundle_parameters("b_one"))


def test_only_the_language_model_has_bundles_and_not_a_tower():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    vision = {**small, "image_size": 16, "patch_size": 8, "model_type": "clip_vision_model"}
    text = {**small, "vocab_size": 100, "model_type": "llama"}
    config = AutoConfig.for_model("llava", vision_config=vision, text_config=text, image_token_index=99)
    model = placed("all-linear", AutoModelForImageTextToText.from_config(config))
    owners = {n for n, m in model.named_modules() if n.endswith("_proj.bundles")}
    assert owners and all("language_model" in name for name in owners)


def test_several_places_of_one_bundle_and_of_several_adapters():
    model = placed(["o_proj", "mlp", "down_proj"], TINY["llama"]())
    assert names(model) == MLP | {"o_proj"}
    model.add_adapter("other", BundleConfig(bundles={"b_two": {"rank": 2, "place": "q_proj"}}))
    assert sites(model, "other") == [Site(i, "self_attn.q_proj") for i in range(LAYERS)]
    assert [str(site) for site in sites(model, "other")] == ["0.self_attn.q_proj", "1.self_attn.q_proj"]


def test_layers_and_modules_that_are_left_out():
    assert {s.block for s in sites(placed("mlp", TINY["llama"](), layers_to_transform=[1]))} == {1}
    assert names(placed("mlp", TINY["llama"](), exclude_modules=["up_proj"])) == MLP - {"up_proj"}


def test_a_regex_that_names_other_layers_in_the_next_block_is_refused():
    config = {"bundles": {"b_one": {"rank": 2}}, "target_modules": r".*\.0\..*q_proj|.*\.1\..*k_proj"}
    with pytest.raises(ValueError, match="other linear layers in one decoder block than in the next"):
        get_peft_model(TINY["llama"](), BundleConfig(**config))
    one = get_peft_model(TINY["llama"](), BundleConfig(**{**config, "target_modules": r".*\.1\..*k_proj"}))
    assert sites(one) == [Site(1, "self_attn.k_proj")]


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
@pytest.mark.parametrize("fields", [{"bundles": {"b_one": {"rank": 4, "place": "mlp"}}}, {"place": "mlp"}])
def test_target_modules_that_no_bundle_would_use_are_refused(targets, fields):
    config = BundleConfig(**{"bundles": {"b_one": {"rank": 4}}, **fields}, target_modules=targets)
    with pytest.raises(ValueError, match="every bundle has one; leave target_modules out, or the place"):
        get_peft_model(TINY["llama"](), config)


def test_excluding_every_layer_of_a_place_is_refused():
    with pytest.raises(ValueError, match="leave no decoder block of 2 and no linear layer for bundles"):
        placed("q_proj", TINY["llama"](), exclude_modules=["q_proj"])


def test_one_module_in_two_blocks_has_its_bundles_once(tmp_path):
    def base():
        model = TINY["llama"]()
        model.model.layers[1].mlp = model.model.layers[0].mlp
        return model

    model = perturb(placed("mlp", base()), scale=0.1).eval()
    assert {str(site) for site in sites(model)} == {f"0.mlp.{name}" for name in MLP}
    ids = batch()
    assert torch.equal(logits(model, ids, alphas={"b_one": 0.0}), logits(base(), ids))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path).eval(), ids), logits(model, ids))


def test_an_adapter_without_bundles_behind_blocks_has_no_basis(tmp_path):
    model = placed("mlp", TINY["llama"]())
    behind = get_peft_model(TINY["llama"](), BundleConfig(bundles={"b": {"rank": 4, "sub_bases": ["a"]}},
                                                          sub_bases={"a": 8}))  # fmt: skip
    for use in (lambda: save_basis(model, tmp_path), lambda: load_basis(model, save_basis(behind, tmp_path / "b"))):
        with pytest.raises(ValueError, match="sit at linear layers, and a basis serves bundles behind blocks only"):
            use()
    assert not (tmp_path / "basis.safetensors").exists()


@pytest.mark.parametrize("place", ["q_prj", "lm_head", ["mlp", "nowhere"]])
def test_a_place_that_is_none_is_refused_with_the_names_that_there_are(place):
    with pytest.raises(ValueError, match=r"names no linear layer.*They have \['mlp.down_proj', .*Name some of these"):
        placed(place, TINY["llama"]())


@pytest.mark.parametrize("place", ["", [], [1], 3])
def test_a_place_that_is_no_name_is_refused(place):
    with pytest.raises(ValueError, match=r"place=.* must be 'block', one of mlp, attention, all-linear"):
        BundleConfig(bundles={"b_one": {"rank": 4, "place": place}})


def test_kinds_belong_to_places():
    for spec, message in (
        (
            {"rank": 4, "place": "mlp", "kind": "diag"},
            r"kind='diag' acts behind blocks only.*kind='lora' or 'mlp' there",
        ),
        ({"rank": 4, "place": "block", "kind": "lora", "sub_bases": ["a"]}, "kind='lora' acts at linear layers only"),
        ({"rank": 4, "place": ["block", "mlp"], "kind": "full"}, "kind='full' acts behind blocks only"),
    ):
        with pytest.raises(ValueError, match=message):
            BundleConfig(bundles={"b_one": spec}, sub_bases={"a": 8})


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear", r".*mlp\.up_proj"])
def test_target_modules_are_places_for_kinds_too(targets):
    """What they name is known only when the adapter is attached."""
    bundles = {"b_one": {"rank": 4, "kind": "diag"}}
    with pytest.raises(ValueError, match="kind='diag' acts behind blocks only"):
        get_peft_model(TINY["llama"](), BundleConfig(bundles=bundles, target_modules=targets))
    bundles["b_one"]["kind"] = "lora"
    model = get_peft_model(TINY["llama"](), BundleConfig(bundles=bundles, target_modules=targets))
    assert {site.block for site in sites(model)} == set(range(LAYERS)) and all(site.path for site in sites(model))
    for bundle, message in (
        (bundles["b_one"], "kind='lora' acts at linear"),
        ({"rank": 4, "sub_bases": ["x"]}, "unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            get_peft_model(TINY["llama"](), BundleConfig(bundles={"b": bundle}, target_modules=r".*layers\.\d+"))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_moves_to_linear_layers(preset):
    model = get_peft_model(TINY["llama"](), BundleConfig(preset=preset, place="o_proj", task_type="CAUSAL_LM"))
    wanted = {Site(i, "self_attn.o_proj") for i in range(LAYERS)} if PRESETS[preset]["bundles"] else set()
    assert set(sites(model)) - {Site(i) for i in range(LAYERS)} == wanted
    ids = batch()
    assert torch.equal(logits(model.eval(), ids), logits(TINY[next(iter(TINY))](), ids))


def test_linears_with_lora_on_them():
    """LoRA first: the bundles go on the outer layer, once."""
    lora = get_peft_model(TINY["llama"](), LoraConfig(target_modules=["q_proj"])).get_base_model()
    assert names(placed("attention", lora)) == ATTENTION


def test_calibrate_refuses_a_layer_that_is_never_called():
    base = TINY["llama"]()
    attention = base.model.layers[0].self_attn
    attention.unused_proj = torch.nn.Linear(HIDDEN, HIDDEN)
    model = placed("attention", base)
    with pytest.raises(ValueError, match=r"\['0.self_attn.unused_proj'\] were never called"):
        calibrate(model, tokens=128, max_length=32, progress=False)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_linears(bits, tmp_path):
    TINY["llama"]().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    ids = batch()
    plain = logits(base, ids)
    model = placed("all-linear", base).eval()
    assert names(model) == ATTENTION | MLP
    assert torch.equal(logits(model, ids), plain)
    calibrate(model, tokens=128, max_length=32, progress=False)  # |W v|^2 is of the layer's output
    perturb(model, scale=0.1)
    assert (logits(model, ids) - plain).abs().max() > 1e-3
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.bundle_parameters("b_one"))


def test_qlora_s_path(tmp_path):
    """A 4-bit base, prepared as PEFT does it, trained with gradient checkpointing and merged in the end."""
    TINY["llama"]().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True)
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu")
    base = prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": False})
    bundles = {n: {"rank": 4, "signals": {n: 1.0}} for n in ("lm", "policy", "idle")}
    config = BundleConfig(place="all-linear", bundles=bundles, task_type="CAUSAL_LM", quiet=2.0)
    model, ids = get_peft_model(base, config), batch()
    calibrate(model, tokens=128, max_length=32, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        with model.train().route(["lm", "policy", "lm"]):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.finalize_grads()
        optimizer.step()
        assert all(p.grad is None for p in model.bundle_parameters("idle"))
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = logits(model.eval(), ids)
    with pytest.warns(UserWarning, match="rounded with it"):
        merged = model.merge_and_unload()
    assert (logits(merged, ids) - trained).norm() < 0.3 * trained.norm()
