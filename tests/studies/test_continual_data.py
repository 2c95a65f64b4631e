"""The continual study's data: which rows stand in a step, and what may be asked where."""

import copy

import continual_data
import pytest
import torch

from studies.continual import data as data_of


pytestmark = pytest.mark.studies


@pytest.mark.parametrize("routing", ["tags", "random", "wrong", "replay"])
@pytest.mark.parametrize("schedule", ["sequence", "mixture"])
def test_rows_of_one_tag_stand_together(schedule, routing):
    rows = data_of.plan(schedule, routing, data_of.TASKS, 1, 30)
    tags = [tag for _, tag in rows]
    assert len(rows) == 30 and [t for n, t in enumerate(tags) if n == 0 or tags[n - 1] != t] == list(
        dict.fromkeys(tags)
    )
    wrong = sum(task != tag for task, tag in rows)
    assert wrong == {"tags": 0, "random": 20 if schedule == "sequence" else 18, "wrong": 6, "replay": 0}[routing]
    if routing == "replay" and schedule == "sequence":
        assert sum(task == "memory" for task, _ in rows) == 3
    if schedule == "mixture" and routing != "replay":
        assert all(sum(task == t for task, _ in rows) == 10 for t in data_of.TASKS)


def test_all_conditions_draw_the_same_rows_of_a_task():
    items = {task: [([n, n + 1, n + 2], 1) for n in range(20)] for task in data_of.TASKS}
    alone = data_of.draws(items, 3)
    mixed = data_of.draws(items, 3)
    first = [alone.draw("logic") for _ in range(30)]
    assert first == [mixed.draw(task) for _ in range(30) for task in ("memory", "logic")][1::2]
    batches = data_of.draws({"logic": [([1, 2, 3, 4, 5], 3), ([1, 2], 1)]}, 0).batches(["logic"] * 2, 1, 9)
    ids, where, target = batches.ids[0].flatten(), batches.where[0], batches.target[0]
    assert torch.equal(ids[where + 1], target)  # each position is the one before its target


def test_judged_questions_come_right_and_wrong():
    facts = [
        [f"In which town was {n} Smith born?", town, "biographies"] for n, town in zip(["Ann", "Bob"], ["Ely", "Rye"])
    ]
    facts += [["What is the profession of Ann Smith?", "baker", "biographies"]]
    facts += [["What is the profession of Bob Smith?", "nurse", "biographies"]]
    sums = [[f"{n} + 1 =", str(n + 1), "chain_sum"] for n in range(3, 9)]
    found = data_of.judge({"biographies": facts, "chain_sum": sums}, lambda q, a: True, 2)
    assert len(found) == 2 * (2 * len(facts)) + 2 * len(sums)
    for question, answer, family in found:
        given = question.split("Proposed answer: ")[1].split("\n")[0]
        asked = question.split("\n")[0].removeprefix("Question: ")
        right = next(a for q, a, _ in facts + sums if q == asked)
        assert (given == right) == (answer == "Yes")
        if family == "biographies":  # a town for a town
            assert (given in ("Ely", "Rye")) == ("town" in asked)


def test_a_leak_is_an_error():
    good = continual_data.data()
    data_of.check(good)
    for task, split in (("logic", "test"), ("meta", "validation")):
        bad = copy.deepcopy(good)
        bad["train"][task].append(bad[split][task][0])
        with pytest.raises(ValueError, match=f"{split} question of {task} is trained on"):
            data_of.check(bad)
    good["validation"]["memory"].append(good["test"]["memory"][0])
    with pytest.raises(ValueError, match="asked in validation and in test"):
        data_of.check(good)
