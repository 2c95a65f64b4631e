"""distill_to_lora: the LoRA starts as the base, ends near the bundles, and is a plain LoRA."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from models import EOS, TINY, attached, batch, bundle_config, generated, logits, perturb, snapshot, unchanged, weights
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

from peft_bundles import BundleConfig
from peft_bundles.evaluation import negative_loss
from peft_bundles.evaluation.distillation import distill_to_lora, kl


SETTING = {"b_mlp": 1.0, "b_linear": 0.5, "b_diag": 0.0}
TRAIN = [{"input_ids": batch(32, 12, seed=i)} for i in range(8)]
HELD_OUT = [{"input_ids": batch(8, 12, seed=100)}]


def distilled(model: PeftModel, alphas=SETTING, **changes):
    given = {"held_out": HELD_OUT, "steps": 80, "learning_rate": 1e-2, "progress": False, **changes}
    return distill_to_lora(model, alphas, given.pop("dataset", TRAIN), **given)


def test_kl_is_torch_s_own():
    teacher, student = (torch.randn(3, 5, 20, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    wanted = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    torch.testing.assert_close(kl(teacher, student), wanted)
    assert kl(teacher, teacher).abs().max() < 1e-6


def test_top_k_is_a_lower_bound_that_grows_to_the_whole():
    teacher, student = (
        torch.randn(50, 20, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (0, 1)
    )
    bounds = torch.stack([kl(teacher, student, k) for k in range(1, 20)] + [kl(teacher, student)])
    assert (bounds[1:] >= bounds[:-1] - 1e-12).all() and (bounds[0] > 0).all()
    torch.testing.assert_close(bounds[18], bounds[19])  # nineteen of twenty, and the rest is the twentieth
    p, q = teacher[0].softmax(-1), student[0].softmax(-1)  # by hand for k = 1
    top = p.argmax()
    by_hand = p[top] * (p[top] / q[top]).log() + (1 - p[top]) * ((1 - p[top]) / (1 - q[top])).log()
    torch.testing.assert_close(bounds[0, 0], by_hand)


@pytest.mark.parametrize("top_k", [None, 32])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_kl_falls(name, top_k, tmp_path):
    model = perturb(attached(name), scale=0.7, seed=1)
    before = snapshot(model.state_dict())
    said = generated(model, batch(8, 4, seed=7), alphas=SETTING)
    tasks = {"t": {"input_ids": said}}
    student, report = distilled(model, top_k=top_k, tasks=tasks, eval_fn=negative_loss)
    assert unchanged(before, model.state_dict()) and not model.training
    assert report.kl["lora"] < 0.25 * report.kl["base"] and report.agreement["lora"] > report.agreement["base"]
    assert report.losses[-1] < 0.25 * report.losses[0] and len(report.losses) == report.steps == 80
    assert report.alphas == SETTING
    scores = report.scores["t"]
    assert abs(scores["lora"] - scores["bundles"]) < 0.5 * abs(scores["base"] - scores["bundles"])
    assert json.loads(json.dumps(report.to_dict()))["kl"] == report.kl

    # The figures, from the models themselves.
    ids = HELD_OUT[0]["input_ids"]
    teacher, plain = logits(model, ids, alphas=SETTING), logits(TINY[name](), ids)
    assert report.kl["base"] == pytest.approx(kl(teacher, plain).mean().item(), rel=1e-4)
    assert report.kl["lora"] == pytest.approx(kl(teacher, logits(student, ids)).mean().item(), rel=1e-4)
    assert report.agreement["base"] == pytest.approx((teacher.argmax(-1) == plain.argmax(-1)).float().mean().item())
    with model.alphas(SETTING), torch.no_grad():
        assert scores["bundles"] == pytest.approx(negative_loss(model, tasks["t"]).mean().item(), rel=1e-5)

    # A plain LoRA: only its tensors in the folder, and PEFT loads it on the plain base model.
    student.save_pretrained(tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(TINY[name](), tmp_path / "lora").eval()
    assert torch.equal(logits(loaded, ids), logits(student, ids))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, ids), logits(student, ids), rtol=1e-4, atol=1e-4)


def test_the_lora_starts_as_the_base_model_and_shares_its_weights():
    model = attached()
    student, _ = distilled(model, steps=1, learning_rate=1e-12)
    ids = batch()
    with student.disable_adapter():
        assert torch.equal(logits(student, ids), logits(TINY["llama"](), ids))
    theirs = {p.data_ptr() for p in model.parameters()}
    own = [n for n, p in student.named_parameters() if p.data_ptr() not in theirs]
    assert own and all("lora_" in n for n in own)
    assert not any("bundle" in n for n, _ in student.named_parameters())
    assert all(p.requires_grad for p in weights(model).values())  # the bundles can go on learning


def test_padding_counts_nothing():
    """With what is behind the mask changed, everything is the same."""
    ids = batch(4, 12)
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    found = []
    for fill in (EOS, 17):
        rows = [{"input_ids": torch.where(mask == 1, ids, fill), "attention_mask": mask}]
        _, report = distilled(attached(), dataset=rows, held_out=rows, steps=3)
        found.append((report.losses, report.kl))
    assert found[0] == found[1]


def test_the_same_seed_gives_the_same_lora():
    first, second, other = (distilled(attached(), steps=3, seed=seed)[0] for seed in (0, 0, 1))
    assert unchanged(snapshot(first.state_dict()), second.state_dict())
    assert not unchanged(snapshot(first.state_dict()), other.state_dict())


def test_a_lora_of_the_user_s_own_and_alphas_that_were_set():
    model = attached()
    model.set_alphas({"b_mlp": 0.25})
    own = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    student, report = distilled(model, {"b_diag": 0.0}, lora=own, steps=1)
    assert report.alphas == {"b_mlp": 0.25, "b_linear": 1.0, "b_diag": 0.0}
    assert report.parameters == sum(p.numel() for n, p in student.named_parameters() if "lora_" in n) == 2 * 2 * 2 * 64


@pytest.mark.parametrize(
    ("alphas", "changes", "message"),
    [
        ({"b_x": 1.0}, {}, r"unknown bundle\(s\) \['b_x'\]; the model has"),
        ({"b_mlp": [0.5, 1.0]}, {}, "the alpha of 'b_mlp' is .*; give one number: a LoRA imitates one fixed alpha"),
        (SETTING, {"dataset": []}, "dataset is empty; give at least one batch"),
        (SETTING, {"held_out": []}, "held_out is empty; give at least one batch"),
        (
            SETTING,
            {"dataset": ["text"]},
            r"dataset is not a list of batches; give dicts with input_ids, e.g. \[evaluation.text_batch",
        ),
        (SETTING, {"held_out": TRAIN[0]}, "held_out is not a list of batches; give dicts with input_ids"),
        (SETTING, {"steps": 0}, "steps=0, .* must be positive"),
        (SETTING, {"learning_rate": -1.0}, "learning_rate=-1.0 .* must be positive"),
        (SETTING, {"top_k": 0}, "top_k=0 must be positive"),
        (SETTING, {"tasks": {"t": TRAIN[0]}}, "tasks was given without eval_fn; add one"),
    ],
)
def test_bad_input(alphas, changes, message):
    with pytest.raises(ValueError, match=message):
        distilled(attached(), alphas, **changes)


def test_no_plain_base_to_start_from():
    trunk = get_peft_model(TINY["llama"](), BundleConfig(preset="baseline", task_type="CAUSAL_LM"))
    for model in (trunk, attached(modules_to_save=["lm_head"])):
        with pytest.raises(ValueError, match=r"(is gone; distil an adapter that has only bundles|no bundles)"):
            distilled(model, {})


def test_a_learning_rate_that_blows_up_says_so():
    model = attached()
    with pytest.raises(RuntimeError, match=r"the KL of step .* is (nan|inf); use a lower learning_rate"):
        distilled(model, steps=50, learning_rate=1e18)
    assert torch.isfinite(logits(model, batch())).all()


def test_auto_class_loads_it_with_the_base_named(tmp_path):
    TINY["llama"]().save_pretrained(tmp_path / "base")
    base = type(TINY["llama"]()).from_pretrained(tmp_path / "base")
    student, _ = distilled(perturb(get_peft_model(base, bundle_config())), steps=2)
    student.save_pretrained(tmp_path / "lora")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").eval()
    assert torch.equal(logits(loaded, batch()), logits(student, batch()))


def test_the_record_is_what_its_seeds_give(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    distill = importlib.import_module("distill")
    record = json.loads((root / "benchmarks" / "results" / "distill.json").read_text())
    assert record["over_seeds"] == distill.over_seeds(record["seeds"])
