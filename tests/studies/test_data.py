"""Task families: splits that do not leak, right and wrong answers, the table of sources; all without a network."""

import gzip
import json
import random

import pytest

from peft_bundles.taxonomy import TOPICS
from studies.data import FAMILIES, SOURCES, check_leaks, corrupt, gsm8k, gsm8k_solutions, judgements, load, logic
from studies.data import families as families_module
from studies.data.mem import biographies, reworded
from studies.data.topic_texts import labelled
from studies.measures.answers import same_answer


pytestmark = pytest.mark.studies


@pytest.mark.parametrize("family", FAMILIES)
def test_made_questions_are_new_in_the_test_and_the_same_each_time(family):
    train, test = logic(family, 60, 30)
    assert len({row["question"] for row in train + test}) == 90
    check_leaks(train, test)
    assert (train, test) == logic(family, 60, 30)
    assert logic(family, 60, 30, seed=1)[0] != train


def test_seeds_lie_further_apart_than_the_lists_are_long():
    """Item i of seed s of reasoning-gym is item 0 of seed s + i: with near seeds the test would be trained."""
    from reasoning_gym import create_dataset

    near = create_dataset("products", size=2, seed=1, **FAMILIES["products"])
    assert create_dataset("products", size=2, seed=0, **FAMILIES["products"])[1]["question"] == near[0]["question"]


def test_load_tags_rows_and_keeps_splits_apart():
    train, test = (load("biographies", split) for split in ("train", "test"))
    assert {row["task"] for row in train} == {"mem"} and train[0]["source"] == "biographies"
    assert {row["answer"] for row in train} == {row["answer"] for row in test}  # the same facts in other words
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    assert load("chain_sum", rows=5) == load("chain_sum", rows=5)
    with pytest.raises(ValueError, match="has 300 train rows, not 301"):
        load("biographies", rows=301)


def test_every_fact_has_another_wording():
    for question, answer in biographies():
        other = reworded(question)
        assert other != question and answer not in other
    with pytest.raises(ValueError, match="no other wording"):
        reworded("Why?")


def test_text_is_split_by_document_and_shared_lines_are_dropped(monkeypatch):
    def line(n):
        return f"line number {n} of a text that is long enough to count"

    documents = {f"d{d}": "\n".join(line(100 * d + i) for i in range(40)) for d in range(10)}
    documents["d4"] += "\n" + "\n".join(line(i) for i in range(40))  # held out, and half a copy of d0
    documents["d9"] = documents["d9"].upper() + "\n" + "\n".join(line(i).upper() + "  " for i in range(40))
    source = families_module.Source(
        "lm", "law", "made here", 0, "none", "by document", families_module._text(lambda: documents)
    )
    monkeypatch.setitem(SOURCES, "made", source)
    train, test = load("made"), load("made", "test")
    check_leaks(train, test)
    assert test and {row["topic"] for row in test} == {"law"}
    assert all("number 4" in row["text"] or "NUMBER 9" in row["text"] for row in test)
    families_module._parts.cache_clear()


def test_a_leak_is_found_whatever_its_case_and_breaks():
    train = [
        {"question": "How many legs has a spider?"},
        {"text": "A sentence that is quite long.\nAnother one, which is also long enough."},
    ]
    for row in (
        {"question": "how many  LEGS has\na spider?"},
        {"text": "new\nanother one, which is  ALSO long enough.  \nnew"},
    ):
        with pytest.raises(ValueError, match="a test row stands in the training rows"):
            check_leaks(train, [row])
    check_leaks(
        train,
        [{"question": "How many legs has an ant?"}, {"text": "Another one, which is long enough, and different."}],
    )


def test_every_source_says_where_it_is_from():
    assert {source.task for source in SOURCES.values()} == {"lm", "mem", "logic"}
    assert set(TOPICS) <= {source.topic for source in SOURCES.values()}
    assert all(source.package and source.licence and source.split for source in SOURCES.values())
    with pytest.raises(ValueError, match="source 'gsm9k' is unknown; choose one of"):
        load("gsm9k")
    with pytest.raises(ValueError, match="split='dev' is unknown"):
        load("biographies", "dev")


def test_judgements_are_balanced_and_say_the_truth():
    rows = [row for family in FAMILIES for row in logic(family, 40, 0)[0]]
    found = judgements(rows, seed=3)
    assert len(found) == 2 * len(rows) and sum(row["correct"] for row in found) == len(rows)
    for row in found:
        assert row["correct"] == same_answer(row["answer"], row["reference"])
    by_item = {row["item"]: [r for r in found if r["item"] == row["item"]] for row in found}
    assert all({r["correct"] for r in pair} == {True, False} for pair in by_item.values())
    assert found == judgements(rows, seed=3) != judgements(rows, seed=4)


def test_the_models_own_answers_are_marked_by_the_checker():
    rows = [{"question": "1+1", "answer": "2", "topic": "x"}, {"question": "2+2", "answer": "4", "topic": "x"}]
    own = [row for row in judgements(rows, sample=lambda qs: [f"{q} = 2" for q in qs]) if row["origin"] == "model"]
    assert {(row["question"], row["correct"]) for row in own} == {("1+1", True), ("2+2", False)}
    assert all(row["topic"] == "x" for row in own)
    with pytest.raises(ValueError, match="gave 1 answers to 2 questions"):
        judgements(rows, sample=lambda qs: ["2"])
    with pytest.raises(ValueError, match="rows have 1 different answers"):
        judgements(rows[:1])


@pytest.mark.parametrize("right", ["7", "-12", "0", "10", "2 apples, then 5\n#### 1200", "yes", "3.5"])
def test_corrupted_answers_are_wrong_and_look_alike(right):
    rng = random.Random(0)
    made = {corrupt(right, ["yes", "no", "maybe"], rng) for _ in range(30)}
    assert not any(same_answer(wrong, right) for wrong in made) and len(made) > 1
    if right != "yes":
        assert all(any(c.isdigit() for c in wrong) for wrong in made)
    with pytest.raises(ValueError, match="nothing wrong to offer"):
        corrupt("yes", ["yes", "Yes."], rng)


def test_gsm8k_from_a_folder(tmp_path):
    row = {"question": "Ann has 3 and buys 4.", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}
    solved = {
        "question": "q",
        "ground_truth": "A: 7",
        "6b": {"is_correct": True, "solution": "A: 7"},
        "3b": {"is_correct": False, "solution": "A: 8"},
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "test.jsonl.gz").write_bytes(gzip.compress(json.dumps({**row, "question": "Bo?"}).encode()))
    (tmp_path / "example_model_solutions.jsonl").write_text(json.dumps(solved))
    assert gsm8k(tmp_path, "train")[0] == {**row, "answer": "7", "solution": row["answer"]}
    assert load("gsm8k", "test", folder=tmp_path)[0]["question"] == "Bo?"
    assert [(r["model"], r["correct"]) for r in gsm8k_solutions(tmp_path)] == [("6b", True), ("3b", False)]
    with pytest.raises(ValueError, match=r"has no train.jsonl"):
        gsm8k(tmp_path / "nowhere", "train")


def test_dictionary_senses_lose_the_label_that_names_their_topic():
    text = (
        "Dog \\Dog\\ (d[o^]g), n.\n\n   1. (Zool.) A quadruped of the genus {Canis}, of many breeds.\n"
        "      [1913 Webster]\n\n"
        "   2. A mean, worthless fellow; a wretch, of no field at all.\n\n"
        "Writ \\Writ\\, n. (Law)\n   An instrument in writing under seal, from some court.\n"
    )
    assert list(labelled(text, "Zool")) == [("Dog", "A quadruped of the genus Canis, of many breeds.")]
    assert list(labelled(text, "Law")) == [("Writ", "An instrument in writing under seal, from some court.")]
