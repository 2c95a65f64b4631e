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

import peft_bundles
import peft_bundles.model
from peft_bundles import BundleConfig


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
    calls, real = [], peft_bundles.model.alphas
    monkeypatch.setattr(peft_bundles.model, "alphas", lambda *args, **kw: calls.append(args) or real(*args, **kw))
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
