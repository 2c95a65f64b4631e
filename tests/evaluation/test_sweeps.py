"""alpha_sweep: the batched pass is the plain loop, and its figures are what they say."""

from __future__ import annotations

import math

import pytest
import torch
from models import EOS, attached, batch, generated, logits
from scipy.stats import spearmanr
from training import tokenizer

from peft_bundles.evaluation import AlphaSweep, alpha_sweep, negative_loss, spearman, text_batch


VALUES = [0.0, 0.25, 0.5, 1.0, 1.5]


def tasks() -> dict[str, dict[str, torch.Tensor]]:
    return {"one": {"input_ids": batch(3, 9)}, "two": {"input_ids": batch(5, 7, seed=1)}}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("max_rows", [1, 4, 7, 32])
def test_one_pass_is_the_loop_over_alphas(name, max_rows):
    model = attached(name)
    with model.alphas(b_linear=0.3):
        found = alpha_sweep(model, "b_mlp", VALUES, negative_loss, tasks(), max_rows=max_rows)
    for task, rows in tasks().items():
        for i, value in enumerate(VALUES):
            with torch.no_grad(), model.alphas(b_linear=0.3, b_mlp=value):
                alone = negative_loss(model, rows)
            torch.testing.assert_close(found.scores[task][i].float(), alone, rtol=1e-5, atol=1e-5)
    assert len(found.scores["one"][:, 0].unique()) == len(VALUES)  # every alpha does something else
    wanted = {1: 5 * (3 + 5), 4: 5 + 2 * 5, 7: 3 + 5, 32: 1 + 1}
    assert found.passes == wanted[max_rows]


def test_alpha_zero_is_the_base_model():
    model = attached(bundles={"b_only": {"rank": 8, "sub_bases": ["left"], "signals": {"lm": 1.0}}})
    found = alpha_sweep(model, "b_only", [0.0, 1.0], negative_loss, tasks())
    with model.disable_adapter(), torch.no_grad():
        base = negative_loss(model, tasks()["one"])
    torch.testing.assert_close(found.scores["one"][0].float(), base, rtol=1e-6, atol=1e-6)


def test_scores_may_come_from_generation():
    """Rows of generate have their alphas too; what is no tensor is handed on, a copy an alpha."""
    model, ids = attached(), batch(2, 5)

    def ends(model, given):
        assert given["wanted"] == ["a", "b"] * (len(given["wanted"]) // 2)
        return generated(model, given["input_ids"])[:, -1].float()

    found = alpha_sweep(model, "b_mlp", VALUES, ends, {"t": {"input_ids": ids, "wanted": ["a", "b"]}})
    assert found.passes == 1
    for i, value in enumerate(VALUES):
        assert found.scores["t"][i].tolist() == generated(model, ids, alphas={"b_mlp": value})[:, -1].tolist()


def test_the_model_is_left_as_it_was():
    model = attached().train()
    before = logits(model, batch())
    alpha_sweep(model, "b_mlp", VALUES, negative_loss, tasks())
    assert model.training and torch.equal(logits(model, batch()), before)
    with pytest.raises(RuntimeError, match="halfway"):
        alpha_sweep(model, "b_mlp", VALUES, lambda *_: (_ for _ in ()).throw(RuntimeError("halfway")), tasks())
    assert model.training and torch.equal(logits(model, batch()), before)


def test_negative_loss_is_transformers_own():
    model, ids = attached(), batch(1, 8)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
        padded = torch.cat([ids, torch.full((1, 3), EOS)], 1)
        mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 3, dtype=torch.long)], 1)
        assert negative_loss(model, {"input_ids": ids}).item() == pytest.approx(-loss.item(), rel=1e-5)
        masked = negative_loss(model, {"input_ids": padded, "attention_mask": mask})
        assert masked.item() == pytest.approx(-loss.item(), rel=1e-5)
        labels = ids.clone()
        labels[:, :5] = -100
        loss = model(input_ids=ids, labels=labels).loss
        given = {"input_ids": padded, "labels": torch.cat([labels, torch.full((1, 3), -100)], 1)}
        assert negative_loss(model, given).item() == pytest.approx(-loss.item(), rel=1e-5)


def made(**curves: list[float]) -> AlphaSweep:
    """A sweep whose rows have those mean scores, and differ."""
    shift = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
    scores = {task: torch.tensor(curve, dtype=torch.float64)[:, None] + shift for task, curve in curves.items()}
    return AlphaSweep("b", [0.0, 0.5, 1.0, 2.0], scores, 1)


def test_monotonicity():
    found = made(up=[0, 1, 2, 50], down=[3, 2, 1, -9], still=[1, 1, 1, 1], bent=[0, 2, 3, 1])
    assert found.monotonicity("up") == pytest.approx(1) and found.monotonicity("down") == pytest.approx(-1)
    assert math.isnan(found.monotonicity("still"))
    # Spearman of n ranks is 1 - 6 sum d^2 / (n (n^2 - 1)); d = 0, 1, 1, 2
    assert found.monotonicity("bent") == pytest.approx(1 - 6 * 6 / (4 * 15))


def test_spearman_is_scipy_s_with_ties_too():
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 5, 9) * 5:
        x, y = torch.randint(4, (2, size), generator=generator).tolist()
        if len(set(x)) == 1 or len(set(y)) == 1:
            assert math.isnan(spearman(x, y))
        else:
            assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)


def test_effect_and_selectivity():
    found = made(own=[0, 1, 2, 3], other=[0, 0, 0, 0])
    assert found.effect("own") == pytest.approx(2) and found.effect("other") == 0
    assert found.selectivity("own") == 1 and found.selectivity("other") == 0
    assert made(own=[5, 4, 3, 2], other=[0, 1, 2, 3], third=[0, 1, 2, 3]).selectivity("own") == pytest.approx(0.5)
    assert math.isnan(made(own=[1, 1, 1, 1], other=[0, 0, 0, 0]).selectivity("own"))
    written = made(own=[1, 1, 1, 1], other=[0, 1, 2, 3]).to_dict("own")
    assert written["selectivity"] == 0 and written["tasks"]["own"]["spearman"] is None
    assert written["tasks"]["other"]["mean"] == [0, 1, 2, 3]
    assert written["tasks"]["other"]["standard_error"][0] == pytest.approx(0.5 / 3**0.5, abs=1e-6)


def test_plot(tmp_path):
    from matplotlib.figure import Figure

    found = made(own=[0, 1, 2, 3], other=[4, 4, 4, 4])
    axes = Figure().subplots()
    found.draw(axes, now=0.5)
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    assert list(lines["own"]) == [0, 1, 2, 3] and list(lines["other"]) == [0, 0, 0, 0]
    assert axes.get_xlabel() == "alpha of b" and [t.get_text() for t in axes.get_legend().texts] == ["own", "other"]
    picture = found.plot(tmp_path / "sweep.png").read_bytes()
    assert picture[:4] == b"\x89PNG" and len(picture) > 5_000


def test_text_batch():
    found = text_batch(["abc", "abcdef"], tokenizer(), max_length=5)
    assert found["input_ids"].shape == (2, 5) and found["attention_mask"].sum(1).tolist() == [3, 5]
    with pytest.raises(ValueError, match=r"text\(s\) at \[1\] have fewer than two tokens"):
        text_batch(["abc", "a"], tokenizer())


def no_scores(model, given):
    return torch.zeros(2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bundle": "b_x"}, r"unknown bundle\(s\) \['b_x'\]; the model has"),
        ({"values": []}, r"values=\[\] must be finite numbers, at least one"),
        ({"values": [0.0, math.inf]}, "must be finite numbers"),
        ({"values": 0.5}, "values=0.5 is one number; give a list of alphas"),
        ({"tasks": {}}, "tasks is empty"),
        ({"tasks": [{"input_ids": batch(2)}]}, "tasks is a list; give a dict, name -> batch"),
        (
            {"tasks": {"t": ["some text"]}},
            r"task 't' is a list; give a dict of tensors, such as evaluation.text_batch",
        ),
        (
            {"tasks": {"t": {"input_ids": batch(2), "x": [1]}}},
            r"task 't' has entries with \{'input_ids': 2, 'x': 1\} rows",
        ),
        ({"tasks": {"t": {"input_ids": batch(0)}}}, r"task 't' has entries with \{'input_ids': 0\} rows"),
        ({"max_rows": 0}, "max_rows=0 must be at least 1"),
        ({"eval_fn": no_scores}, r"task 'one': eval_fn returned scores of shape \(2,\) for 15 rows"),
    ],
)
def test_bad_input(change, message):
    good = {"bundle": "b_mlp", "values": VALUES, "eval_fn": negative_loss, "tasks": tasks()}
    with pytest.raises(ValueError, match=message):
        alpha_sweep(attached(), **{**good, **change})


def test_questions_a_sweep_cannot_answer():
    with pytest.raises(ValueError, match=r"own='x': the sweep has the tasks .*; name one of them"):
        made(own=[0, 1, 2, 3], other=[0, 0, 0, 0]).selectivity("x")
    with pytest.raises(ValueError, match=r"own='own': .* sweep at least two"):
        made(own=[0, 1, 2, 3]).selectivity("own")
    with pytest.raises(ValueError, match=r"values=\[1.0, 2.0\]: .* sweep 0.0 and at least one other value"):
        AlphaSweep("b", [1.0, 2.0], {"t": torch.zeros(2, 3)}, 1).effect("t")
