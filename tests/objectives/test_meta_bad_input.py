"""Wrong rows of the meta and representation signals: the answer names objective, row and fix, before any compute."""

import pytest
from meta_rows import HEADS, explained, judged, length, made, paraphrases, plans, sides, statements
from models import snapshot, unchanged
from training import tokenizer, trainer

from peft_bundles.objectives import (
    PPO,
    Calibration,
    Confusion,
    Consistency,
    Contrastive,
    Forward,
    MetaCorrectness,
    Temporal,
    document_pairs,
)


@pytest.fixture(scope="module")
def on():
    """One model for all rows that are refused: they must not touch it."""
    return made()


def changed_row(rows: list, number: int, **fields) -> list:
    return [{**row, **fields} if i == number else row for i, row in enumerate(rows)]


@pytest.mark.parametrize("kind", [Confusion, Calibration, MetaCorrectness])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{**r, "correct": 2 * r["correct"]} for r in judged()], r"row 0 has correct=2; give true or false, 1 or 0"),
        ([{**r, "correct": 0.5} for r in judged()], r"row 0 has correct=0.5"),
        ([{**r, "correct": True} for r in judged()], r"correct is True in all 12 rows.*add rows of the other class"),
        (changed_row(judged(), 3, completion=" "), r"row 3 has an empty 'completion' \(' '\); drop it"),
        (changed_row(judged(), 3, correct=None), r"row 3 has no 'correct' \(None\)"),
        ([{"prompt": "a", "completion": "b"}], r"needs the columns .*correct"),
    ],
)
def test_judged_rows(on, kind, rows, message):
    objective = kind(rows)
    with pytest.raises(ValueError, match=f"'{objective.name}'.*{message}"):
        objective.setup(tokenizer(), on)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (MetaCorrectness(changed_row(sides(), 2, rejected="4")), r"row 2: chosen and rejected are the same"),
        (MetaCorrectness(changed_row(sides(), 2, chosen="")), r"row 2 has an empty 'chosen'"),
        (Consistency(changed_row(statements(), 1, statements=["a"])), r"row 1 has 1 statements; give at least two"),
        (Consistency(changed_row(statements(), 1, statements=["a", " ", "b"])), r"row 1: statements\[1\]=' ' is empty"),
        (
            Consistency(changed_row(statements(), 1, contradicts=[False, True])),
            r"row 1 has 3 statements and contradicts=\[False, True\]; give true or false for each statement",
        ),
        (
            Consistency(changed_row(statements(), 1, contradicts=[True, False, False])),
            r"row 1 .*false for the first",
        ),
        (
            Consistency([{"statements": ["a", "b"], "contradicts": [0, 2]}]),
            r"row 0 has contradicts=\[0, 2\]; give true or false",
        ),
        (
            Consistency([{**r, "contradicts": [False] * 3} for r in statements()]),
            r"contradicts is .* in all 24 rows",
        ),
        (Contrastive(changed_row(paraphrases(), 5, positive="")), r"row 5 has an empty 'positive' \(''\); drop it"),
        (Contrastive(changed_row(paraphrases(), 5, positive="5 and 2")), r"row 5: anchor and positive are the same"),
        (Contrastive([{**r, "document": "x"} for r in paraphrases()]), r"all 12 train rows are of one document"),
        (Temporal(changed_row(plans(), 4, segments=["one"])), r"row 4 has 1 segments; give at least two"),
        (Temporal(changed_row(plans(), 4, segments=["one", ""])), r"row 4: segments\[1\]='' is empty"),
        (Temporal([{"segments": [["x"], ["y"]]}]), r"row 0: segments\[0\]=\['x'\]; give a string"),
        (Temporal([{"text": "abcdef"}]), r"rows of text need window="),
        (
            Temporal([{"text": "abcdefgh"}, {"text": "abcde"}], window=4),
            r"row 1 has 5 tokens, fewer than two windows of 4; lower window",
        ),
        (Temporal(plans(), max_length=3), r"none of the 12 train rows has a token to learn from"),
        (Confusion(judged(), max_length=3), r"none of the 12 train rows has a token to learn from"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learnt_from(tmp_path, on, objective, message):
    before = snapshot(on.state_dict())
    with pytest.raises(ValueError, match=f"objective '{objective.name}'.*({message})"):
        trainer(tmp_path, objective, on)
    assert unchanged(before, on.state_dict())


def test_rows_that_max_length_would_cut_are_left_out_with_a_warning(on):
    rows = [*judged(), {"prompt": "1+1=", "completion": "2" * 40, "correct": True}]
    objective = Confusion(rows, max_length=30)
    with pytest.warns(UserWarning, match=r"'confusion': 1 of 13 train rows are left out"):
        objective.setup(tokenizer(), on)


def test_a_batch_of_one_class_is_a_batch_like_any_other(on):
    """A mean over rows needs no second class; only a whole dataset of one is refused."""
    for name in ("confusion", "calibration", "meta_correctness"):
        objective = HEADS[name]()
        objective.setup(tokenizer(), on)
        rows = [row for row in objective.rows if row["correct"] in (1.0, [1.0])][:3]
        batch = objective.collate(rows)
        outputs = Forward(on, {}, {name: {}}).current(name, batch)
        loss, metrics = objective.losses(outputs, batch)
        assert loss[name].isfinite() and all(v.isfinite() for v in metrics.values())


def test_contrast_needs_a_negative_in_every_batch(tmp_path, on):
    run = trainer(tmp_path, Contrastive(paraphrases()), on, per_device_train_batch_size=1)
    with pytest.raises(
        ValueError, match=r"'contrastive': the 1 row\(s\) of a micro-batch .*set rows={'contrastive': 8}"
    ):
        run.train()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Confusion([], entropy_weight=0.0, correct_weight=0.0), "must be >= 0, and not both 0"),
        (lambda: Calibration([], ece_weight=-1), "ece_weight=-1 must be a number >= 0"),
        (lambda: Calibration([], bins=1), "bins=1 at least 2"),
        (lambda: MetaCorrectness([], explanation_weight=float("nan")), "explanation_weight=nan"),
        (lambda: Contrastive([], temperature=0), "temperature=0 must be > 0"),
        (lambda: Temporal([], window=0), "window=0 must be at least 1"),
        (lambda: Temporal([], rank=0), "rank=0 must be at least 1"),
        (lambda: Temporal([], consistency=-1), "consistency=-1 a number >= 0"),
        (lambda: PPO([], length, advantage_coef=-1), "advantage_coef=-1 must be a number >= 0"),
        (lambda: PPO([], length, curiosity_reward=1.0), "set curiosity_coef, e.g. 1.0"),
    ],
)
def test_numbers_that_cannot_be_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_documents_that_cannot_be_paired():
    with pytest.raises(ValueError, match=r"document 'x' has 1 piece\(s\); give at least two"):
        document_pairs({"x": ["a"]})


def test_explanations_must_be_texts(on):
    rows = [{**row, "explanation": ["a", "list"]} for row in explained()]
    with pytest.raises(ValueError, match=r"'meta_correctness': row 0 has explanation=\['a', 'list'\]; give it as text"):
        MetaCorrectness(rows).setup(tokenizer(), on)
