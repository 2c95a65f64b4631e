"""What holds for every architecture, whatever its blocks look like."""

from __future__ import annotations

import copy

import pytest
import torch
from models import BLOCKS, LAYERS, TINY, VOCABULARY, batch, bundle_config, layers, logits, perturb, reference, weights
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from peft_bundles import calibrate, set_alphas
from peft_bundles.core.base import find_blocks
from peft_bundles.core.functional import bundle_reference


@pytest.fixture(params=list(TINY))
def name(request):
    return request.param


def attached(name, **fields):
    return get_peft_model(TINY[name](), bundle_config(**fields)).eval()


def test_blocks_are_found(name):
    base = TINY[name]()
    found = find_blocks(base)
    assert found == [f"{BLOCKS[name]}.{i}" for i in range(LAYERS)]
    model = get_peft_model(base, bundle_config())
    assert [layer.get_base_layer() for layer in layers(model)] == [base.get_submodule(block) for block in found]
    assert [layer.index for layer in layers(model)] == list(range(LAYERS))
    assert find_blocks(base) == found  # bundles inside do not change what is found


def test_blocks_are_found_in_the_headless_model(name):
    inner = TINY[name]().base_model
    prefix = TINY[name]().base_model_prefix
    assert [f"{prefix}.{block}" for block in find_blocks(inner)] == find_blocks(TINY[name]())


SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
TEXT = {**SHAPE, "intermediate_size": 64, "vocab_size": 120}
SIZES = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
SEES = {"model_type": "clip_vision_model", **SIZES, "image_size": 16, "patch_size": 8}
HEARS = {"model_type": "qwen2_audio_encoder", "d_model": 32, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}


def composite(tower, depth, width=32):
    """A language model beside a tower for images or sound."""
    text = {**TEXT, "model_type": "qwen2" if tower == "audio" else "llama"}
    if tower == "audio":
        hears = {**HEARS, "encoder_layers": depth, "num_hidden_layers": depth, "num_mel_bins": 8}
        config = AutoConfig.for_model("qwen2_audio", text_config=text, audio_config=hears, audio_token_index=110)
        return AutoModelForMultimodalLM.from_config(config).eval()
    sees = {**SEES, "num_hidden_layers": depth, "hidden_size": width}
    config = AutoConfig.for_model("llava", text_config=text, vision_config=sees, image_token_index=110)
    return AutoModelForImageTextToText.from_config(config).eval()


@pytest.mark.parametrize(
    ("tower", "depth", "width"),
    [("vision", 1, 32), ("vision", 2, 32), ("vision", 3, 32), ("vision", 2, 64), ("audio", 2, 32)],
)
def test_bundles_sit_on_the_language_model_and_not_on_a_tower(tower, depth, width, tmp_path):
    base, ids = composite(tower, depth, width), batch(2, 6)
    bare, expected = copy.deepcopy(base), logits(base, ids)
    model = perturb(get_peft_model(base, bundle_config())).eval()
    blocks = list(base.get_decoder().layers)
    assert [layer.get_base_layer() for layer in layers(model)] == blocks
    assert (logits(model, ids) - expected).abs().max() > 0.1
    if tower == "vision":
        seen = {
            "input_ids": torch.tensor([[5, 110, 110, 110, 110, 6]]),
            "pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
        }
        with torch.no_grad():
            off = model(**seen, alphas=dict.fromkeys(bundle_config().bundles, 0.0)).logits
            assert torch.equal(off, bare(**seen).logits)
            assert not torch.equal(off, model(**seen).logits)
    fresh = get_peft_model(copy.deepcopy(bare), bundle_config())
    assert calibrate(fresh, tokens=256, max_length=16, progress=False)["tokens"] == 256
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(bare, tmp_path).eval(), ids), logits(model, ids))


def encoders():
    small = {**SIZES, "num_hidden_layers": 2}
    t5 = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "vocab_size": 100}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    bart = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 100, **heads}
    whisper = {**bart, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0}
    return {
        "t5": (AutoModelForSeq2SeqLM, t5, "encoder-decoder"),
        "bart": (AutoModelForSeq2SeqLM, bart, "encoder-decoder"),
        "whisper": (AutoModel, whisper, "encoder-decoder"),
        "bert": (AutoModelForMaskedLM, small, "an encoder"),
        "roberta": (AutoModelForCausalLM, small, "an encoder"),
        "deberta-v2": (AutoModelForSequenceClassification, small, "an encoder"),
        "vit": (AutoModel, {**small, "image_size": 16, "patch_size": 8}, "an encoder"),
        "clip": (
            AutoModel,
            {"text_config": {**small, "vocab_size": 50}, "vision_config": {**SEES, **small}},
            "encoder",
        ),
    }


@pytest.mark.parametrize("kind", list(encoders()))
@pytest.mark.parametrize("targets", [None, r".*(layer|layers|block)\.\d+"])
def test_models_that_are_no_causal_language_models_are_refused(kind, targets):
    auto, fields, what = encoders()[kind]
    base = auto.from_config(AutoConfig.for_model(kind, **fields))
    with pytest.raises(ValueError, match=f"{what}.* but bundles sit on the decoder blocks of a causal language model"):
        get_peft_model(base, bundle_config(target_modules=targets, task_type=None))
    assert not layers(base)


@pytest.mark.parametrize("kind", ["bert", "bart"])
def test_the_decoders_of_such_models_work(kind, tmp_path):
    fields = {**TEXT, "vocab_size": VOCABULARY, "d_model": 64, "decoder_layers": 2, "encoder_layers": 2}
    fields |= {"decoder_attention_heads": 2, "is_decoder": True}
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()
    bare, ids = copy.deepcopy(base), batch()
    expected = logits(bare, ids)
    model = perturb(get_peft_model(base, bundle_config())).eval()
    assert not torch.equal(logits(model, ids), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)


def test_a_tower_that_is_named_is_refused():
    with pytest.raises(ValueError, match=r"names blocks outside of the language model, such as .*vision_tower"):
        get_peft_model(composite("vision", 2), bundle_config(target_modules=r".*vision_tower.*layers\.\d+"))


def test_two_lists_of_blocks_are_not_chosen_from():
    base = TINY["llama"]()
    base.model.others = copy.deepcopy(base.model.layers)
    with pytest.raises(ValueError, match=r"several lists of blocks \(\['model.layers', 'model.others'\]\)"):
        get_peft_model(base, bundle_config())
    model = get_peft_model(base, bundle_config(target_modules=r"model\.layers\.\d+"))
    assert [layer.get_base_layer() for layer in layers(model)] == list(base.model.layers)


def test_no_blocks_asks_for_target_modules():
    base = TINY["llama"]()
    base.model.layers = nn.ModuleDict({f"l{i}": block for i, block in enumerate(base.model.layers)})
    with pytest.raises(ValueError, match="target_modules"):
        get_peft_model(base, bundle_config())


def test_fresh_adapter_is_the_base_model(name):
    ids = batch()
    expected = logits(reference(name), ids)
    assert torch.equal(logits(attached(name), ids), expected)
    assert torch.equal(logits(attached(name).to(torch.bfloat16), ids), logits(reference(name).to(torch.bfloat16), ids))


def test_weights_change_the_output_and_alphas_zero_undo_it(name):
    ids = batch()
    expected = logits(reference(name), ids)
    model = perturb(attached(name))
    assert (logits(model, ids) - expected).abs().max() > 1e-3
    zero = dict.fromkeys(model.peft_config["default"].bundles, 0.0)
    with model.alphas(zero):
        assert torch.equal(logits(model, ids), expected)
    assert torch.equal(logits(model, ids, alphas=zero), expected)
    set_alphas(model, zero)
    assert torch.equal(logits(model, ids), expected)


def test_every_layer_acts(name):
    ids, model = batch(), attached(name)
    before = logits(model, ids)
    for layer in layers(model):
        single = perturb(attached(name))
        for other in layers(single):
            if other.index != layer.index:
                other.enable_adapters(False)
        assert (logits(single, ids) - before).abs().max() > 1e-4


def test_block_keeps_the_kind_of_its_output(name):
    def outputs(model):
        seen = []
        handles = [
            model.get_submodule(block).register_forward_hook(lambda module, args, output: seen.append(output))
            for block in find_blocks(model)
        ]
        logits(model, batch())
        for handle in handles:
            handle.remove()
        return seen

    base = outputs(TINY[name]())
    model = perturb(attached(name)).get_base_model()
    bundled = outputs(model)
    assert [type(output) for output in bundled] == [type(output) for output in base]
    assert all(isinstance(output, tuple) == (name == "gptj") for output in bundled)
    for before, after in zip(base, bundled):
        if isinstance(before, tuple):
            assert len(after) == len(before)
            before, after = before[0], after[0]
        assert after.shape == before.shape
        assert after.dtype == before.dtype
        assert not torch.equal(after, before)


def test_generate_is_the_argmax_of_forward(name):
    model = perturb(attached(name), scale=0.6)
    ids = batch(2, 6)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, min_new_tokens=6)
    assert out.shape == (2, 12)
    scores = logits(model, out[:, :-1])
    scores[..., model.config.eos_token_id] = -torch.inf  # min_new_tokens forbids it
    assert torch.equal(scores[:, 5:].argmax(-1), out[:, 6:])


@pytest.mark.parametrize("projection", ["none", "tied"])
def test_gradient_reaches_every_bundle_of_every_layer(name, projection):
    model = perturb(attached(name, projection=projection)).train()
    ids = batch()
    model(input_ids=ids, labels=ids).loss.backward()
    table = weights(model)
    assert len(table) == LAYERS * (2 + 2 + 1 + 3 * (projection == "tied"))  # down and up (a diag has no down), and W
    for key, parameter in table.items():
        assert parameter.grad is not None, key
        assert bool(parameter.grad.any()), key
    assert all(p.grad is None for key, p in model.named_parameters() if key not in table)


def test_a_fresh_adapter_can_learn(name):
    """The last map starts at zero: it must get the first gradient, or nothing ever moves."""
    model, ids = attached(name), batch()
    model(input_ids=ids, labels=ids).loss.backward()
    for key, parameter in weights(model).items():
        assert bool(parameter.grad.any()) == (".bundle_up." in key), key


def test_values_and_gradients_are_those_of_the_written_equations(name):
    """The whole model against one whose blocks run `bundle_reference`, which autograd differentiates by itself."""
    model, ids = perturb(attached(name)), batch()
    written = copy.deepcopy(model)
    for layer in layers(written):
        layer.enable_adapters(False)
        for parameter in layer.parameters():
            parameter.requires_grad_(True)

        def hook(block, args, output, layer=layer):
            hidden = output[0] if isinstance(output, tuple) else output
            bundles, basis = layer.bundle_weights("default"), layer.bundle_basis["default"]
            mean, scale = layer.bundle_mean["default"], layer.bundle_scale["default"]
            hidden = bundle_reference(hidden, bundles, basis, mean, scale, torch.ones(len(bundles)))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        layer.get_base_layer().register_forward_hook(hook)
    mix = torch.randn(*ids.shape, VOCABULARY, generator=torch.Generator().manual_seed(1))
    outputs = [m(input_ids=ids).logits for m in (model, written)]
    for output in outputs:
        (output * mix).sum().backward()
    assert torch.allclose(outputs[0], outputs[1], atol=1e-4)
    expected = weights(written)
    for key, parameter in weights(model).items():
        assert torch.allclose(parameter.grad, expected[key].grad, rtol=1e-3, atol=1e-4), key


@pytest.mark.parametrize("route", [None, "lm", "policy", ["lm", "policy"]])
def test_hook_compiles_without_graph_break(route):
    model = perturb(attached("llama"))
    layer = layers(model)[0]
    hidden = torch.randn(2, 5, layer.hidden_size, generator=torch.Generator().manual_seed(0), requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for run in (layer, compiled):
        model.zero_grad()
        hidden.grad = None
        if route is None:
            out = run(hidden)
        else:
            with model.route(route):
                out = run(hidden)
        out.square().sum().backward()
        grads = {k: p.grad for k, p in layer.named_parameters() if p.grad is not None}
        results.append((out.detach(), hidden.grad.clone(), grads))
    (out, d_hidden, grads), (out_2, d_hidden_2, grads_2) = results
    assert torch.allclose(out_2, out, atol=1e-5)
    assert torch.allclose(d_hidden_2, d_hidden, atol=1e-4)
    assert grads.keys() == grads_2.keys()
    assert len(grads) == {"lm": 2 + 1, "policy": 2}.get(str(route), 2 + 1 + 2)
    for key, grad in grads.items():
        assert torch.allclose(grads_2[key], grad, atol=1e-4), key
    torch._dynamo.reset()


@pytest.mark.parametrize("value", [0.5, torch.tensor([0.0, 2.0]), torch.rand(2, 5)])
def test_hook_compiles_with_alphas(value):
    model = perturb(attached("llama"))
    layer = layers(model)[0]
    hidden = torch.randn(2, 5, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with model.alphas(b_mlp=value):
        assert torch.allclose(compiled(hidden), layer(hidden), atol=1e-5)
    assert torch.allclose(compiled(hidden), layer(hidden), atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_block_with_its_hook_adds_no_graph_break(name):
    def breaks(model):
        torch._dynamo.reset()
        explained = torch._dynamo.explain(model)(input_ids=batch(2, 5), use_cache=False)
        torch._dynamo.reset()
        return explained.graph_break_count

    assert breaks(perturb(attached(name)).get_base_model()) == breaks(TINY[name]())


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    TINY["llama"]().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_quantised_base(saved_base, bits, checkpointing):
    quantisation = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})

    def base():
        return AutoModelForCausalLM.from_pretrained(
            saved_base, quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
        )

    ids = batch()
    expected = logits(base(), ids)
    assert not torch.equal(expected, logits(TINY["llama"](), ids))  # it is quantised
    model = get_peft_model(base(), bundle_config())
    assert torch.equal(logits(model.eval(), ids), expected)
    table = weights(model)
    assert {p.dtype for p in table.values()} == {torch.float32}

    perturb(model, scale=0.1)
    frozen = {k: p.detach().clone() for k, p in model.named_parameters() if k not in table}
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(table.values(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in table.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, frozen[k]) for k, p in model.named_parameters() if k in frozen)
    model.eval()
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), expected)


def test_quantised_base_round_trip(saved_base, tmp_path):
    def base():
        quantisation = BitsAndBytesConfig(load_in_4bit=True)
        return AutoModelForCausalLM.from_pretrained(
            saved_base, quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
        )

    model = perturb(get_peft_model(base(), bundle_config())).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(again, batch()), logits(model, batch()))
