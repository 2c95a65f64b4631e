"""`alphas=` of a forward and of `generate` reach the bundles, however PEFT made the model."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import TINY, attached, batch, generated, logits, perturb, quietly_loaded
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import GenerationConfig

import peft_bundles
import peft_bundles.model
from peft_bundles import BundleConfig
from peft_bundles.core import calling


HALF = {"b_mlp": 0.5, "b_linear": -2.0, "b_diag": 0.0}


def made(how, folder, name="gpt2"):
    """The same model with bundles, made in another way."""
    model = attached(name)
    if how == "get_peft_model":
        return model
    if how == "deepcopy":
        return copy.deepcopy(model)
    model.save_pretrained(folder / "adapter")
    if how == "from_pretrained":
        return quietly_loaded(TINY[name](), folder / "adapter").eval()
    if how == "compose":
        return peft_bundles.compose(TINY[name](), [folder / "adapter"])
    TINY[name]().save_pretrained(folder / "base")
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    model.save_pretrained(folder / "adapter")
    return AutoPeftModelForCausalLM.from_pretrained(folder / "adapter").eval()


@pytest.mark.parametrize(
    "how", ["get_peft_model", "deepcopy", "from_pretrained", "compose", "AutoPeftModelForCausalLM"]
)
def test_alphas_of_a_call(how, tmp_path):
    model, ids = made(how, tmp_path), batch()
    with model.alphas(HALF):
        wanted, tokens = logits(model, ids), generated(model, ids)
    assert torch.equal(logits(model, ids, alphas=HALF), wanted)
    assert torch.equal(generated(model, ids, alphas=HALF), tokens)
    assert not torch.allclose(logits(model, ids), wanted, atol=1e-4)  # and they end with the call


def test_they_are_set_once_a_call(monkeypatch):
    """PEFT hands them to the tuner twice; a second look at a tensor would wait for the GPU again."""
    calls, real = [], calling.alphas
    monkeypatch.setattr(calling, "alphas", lambda *args, **kw: calls.append(args) or real(*args, **kw))
    model, ids = attached(), batch()
    logits(model, ids, alphas=HALF)
    generated(model, ids, alphas=HALF)
    model.base_model(input_ids=ids, alphas=HALF)
    assert len(calls) == 3


def test_a_call_inside_of_a_call_has_its_own():
    model, ids, inside = attached(), batch(), []

    def processor(_, scores):
        with model.alphas(b_mlp=7.0):
            inside.extend(logits(each, ids, alphas=HALF) for each in (model, model.base_model))  # the same object
        return scores

    generated(model, ids, alphas=HALF, logits_processor=[processor])
    assert all(torch.equal(each, logits(model, ids, alphas=HALF)) for each in inside)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_without_a_task_type_the_fix_is_named(name):
    """PEFT's untyped model calls the base model directly: its forward ignores `alphas`, its `generate` does not."""
    model, ids = attached(name, task_type=None), batch()
    assert type(model) is PeftModel
    with model.alphas(HALF):
        wanted = logits(model, ids)
    assert torch.equal(logits(model, ids, alphas=HALF), wanted)
    with pytest.raises(ValueError, match=r"task_type='CAUSAL_LM'.*with model\.alphas"):
        generated(model, ids, alphas=HALF)
    assert torch.equal(logits(model, ids), logits(attached(name), ids))


ORDERS = {
    "peft first": "from peft import get_peft_model; import transformers; from peft_bundles import BundleConfig",
    "peft_bundles first": "from peft_bundles import BundleConfig; from peft import get_peft_model",
}


@pytest.mark.slow
@pytest.mark.parametrize("imports", ORDERS.values(), ids=ORDERS)
def test_order_of_imports(imports):
    program = f"""
{imports}
import torch
from models import TINY, batch
model = get_peft_model(TINY["gpt2"](), BundleConfig(sub_bases={{"a": 8}}, task_type="CAUSAL_LM", init_weights=False,
    bundles={{"b": {{"rank": 8, "sub_bases": ["a"]}}}})).eval()
with model.disable_adapter():
    off = model(batch()).logits
assert torch.equal(model(batch(), alphas={{"b": 0.0}}).logits, off)
assert not torch.allclose(model(batch()).logits, off)
"""
    tests = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], cwd=tests, check=True)


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_wrong_alphas_are_told_as_what_they_are(task_type):
    with pytest.raises(ValueError, match="has 2 rows, but the batch has 3"):
        attached(task_type=task_type)(batch(), alphas={"b_mlp": torch.ones(2)})
    model = perturb(get_peft_model(TINY["llama"](), BundleConfig(preset="single_adapter", task_type=task_type)))
    with pytest.raises(ValueError, match="unknown bundle"):
        model(batch(), alphas={"b_other": 1.0})


# ---- alphas per token of a prompt, and threads that a call does not reach ----

PROMPT = batch(1, 9)
PER_TOKEN = {"b_mlp": torch.tensor([[9.0, -6, 0, 15, 3, -12, 6, 0, 4.5]])}


def in_parts(how: str, model: PeftModel, alphas=None) -> dict:
    """Arguments of `generate` with which its forwards have a part of the prompt, or more than one new token."""
    if how == "chunks":
        return {"prefill_chunk_size": 4}
    if how == "assistant":
        return {"assistant_model": TINY["llama"]()}
    with model.alphas(alphas or {}):
        return {"past_key_values": model(PROMPT[:, :4], use_cache=True).past_key_values}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("how", ["chunks", "assistant", "cached prompt"])
def test_a_prompt_in_parts_has_no_alphas_per_token(how, compiled):
    model, options = attached(), {"output_logits": True, "return_dict_in_generate": True}
    model.base_model._state.compiled = compiled  # plans are made before the forward, as for a compiled model
    with pytest.raises(ValueError, match=r"for the 9 tokens of the prompt, but .* has \d+ tokens\. .* each row"):
        generated(model, PROMPT, alphas=PER_TOKEN, **in_parts(how, model))
    for alphas in (HALF, {"b_mlp": torch.tensor([2.0])}):  # a number, or one for each row
        parts = generated(model, PROMPT, alphas=alphas, **options, **in_parts(how, model, alphas))
        whole = generated(model, PROMPT, alphas=alphas, **options)
        torch.testing.assert_close(parts.logits[0], whole.logits[0], atol=1e-5, rtol=1e-4)


def test_a_prompt_cached_but_for_its_last_token_has_them():
    model = attached()
    with torch.no_grad(), model.alphas({"b_mlp": PER_TOKEN["b_mlp"][:, :8]}):
        cache = model(PROMPT[:, :8], use_cache=True).past_key_values
    out = generated(model, PROMPT, alphas=PER_TOKEN, past_key_values=cache, output_logits=True,
                    return_dict_in_generate=True)  # fmt: skip
    whole = generated(model, PROMPT, alphas=PER_TOKEN, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(out.logits[0], whole.logits[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("compiled", [False, True])
def test_without_a_cache_new_tokens_keep_the_last_alpha(compiled):
    model = attached()
    model.base_model._state.compiled = compiled
    options = {"alphas": PER_TOKEN, "output_logits": True, "return_dict_in_generate": True}
    cached, whole = (generated(model, PROMPT, **options, use_cache=use) for use in (True, False))
    for one, other in zip(cached.logits, whole.logits):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_continuous_batching_sees_set_alphas_only():
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": 99, "pad_token_id": 0}
    settings = GenerationConfig(**settings, num_blocks=8, block_size=8)
    model, off = attached(), dict.fromkeys(HALF, 0.0)

    def tokens(**kwargs):
        (out,) = model.generate_batch(inputs=[[5, 6, 7]], generation_config=settings, **kwargs).values()
        return out.generated_tokens

    wanted = generated(model, torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=0, alphas=off)[0, 3:].tolist()
    assert tokens() != wanted
    with pytest.raises(ValueError, match=r"generate_batch runs in a thread of its own.*model\.set_alphas"):
        tokens(alphas=off)
    with model.alphas(off), pytest.raises(ValueError, match="generate_batch runs in a thread of its own"):
        tokens()
    model.set_alphas(off)
    assert tokens() == wanted
