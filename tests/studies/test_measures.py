"""Metrics against values worked out by hand and against the models and harness themselves."""

import itertools
import math

import pytest
import torch

from studies.measures.answers import f1, last_number, same_answer
from studies.measures.code import human_eval_problems, pass_rate, run_completion
from studies.measures.probabilities import auc, brier, ece


pytestmark = pytest.mark.studies


def test_answers():
    assert f1(["The  Paris.", "rome"], ["paris", ["Milan", "Rome"]]) == 1.0
    assert f1(["Paris, France"], ["Paris"]) == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert f1(["x", ""], ["y", ""]) == 0.5
    assert last_number("so 3 + 4 = 7.") == 7 and last_number("1,200 dollars") == 1200 and last_number("none") is None
    assert last_number("#### 5\n9") == 5
    assert last_number("a 3/4 cup") * 4 == 3 and last_number("is -2.50") == -2.5 and last_number("1/0") is None
    assert same_answer("12 + 7 = 19.", "19") and not same_answer("19", "-19") and same_answer("An Aunt", "aunt")
    assert not same_answer("", "5") and same_answer("it is 18", "16 + 2 = 18\n#### 18")
    with pytest.raises(ValueError, match="1 predictions and 0 references"):
        f1(["a"], [])


def test_probabilities_by_hand():
    correct, p = [1, 0, 1, 0], [0.95, 0.15, 0.65, 0.75]
    assert brier(correct, torch.tensor(p)) == pytest.approx((0.05**2 + 0.15**2 + 0.35**2 + 0.75**2) / 4)
    assert ece(correct, p, bins=10) == pytest.approx((0.05 + 0.15 + 0.35 + 0.75) / 4)
    assert ece(correct, p, bins=1) == pytest.approx(abs(2.5 - 2) / 4)
    assert ece([1, 1], [1.0, 1.0]) == 0
    assert auc(correct, p) == 0.75  # of four pairs, only (0.65, 0.75) is the wrong way round


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([1, 1], [0.1, 0.2]), "all 2 labels are 1"),
        (lambda: brier([0, 2], [0.1, 0.2]), r"labels \[2.0\] must be 0"),
        (lambda: brier([0, 1], [0.1, 1.2]), r"from 0.1 to 1.2 must be in \[0, 1\]"),
        (lambda: ece([0, 1], [0.1]), "2 labels and 1 scores"),
        (lambda: ece([0], [0.1], bins=0), "bins=0"),
        (lambda: ece([], []), "give at least one"),
        (lambda: ece([1], [math.nan]), "not all finite"),
        (lambda: run_completion({"prompt": ""}, ""), r"lacks \['entry_point', 'test'\]"),
        (lambda: pass_rate({"HumanEval/999": [""]}), "HumanEval/999"),
        (lambda: pass_rate({"HumanEval/0": [""]}, k=2), r"at least 2 completions of every task; \['HumanEval/0'\]"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_human_eval_runs_its_own_tests():
    problem = human_eval_problems()["HumanEval/0"]
    assert run_completion(problem, problem["canonical_solution"]) == "passed"
    assert run_completion(problem, "    return not numbers\n").startswith("failed")
    assert run_completion(problem, "    return (\n").startswith("failed")


def test_limits_of_time_memory_and_files(tmp_path):
    problem = human_eval_problems()["HumanEval/0"]
    assert run_completion(problem, "    while True: pass\n", seconds=1.0) == "timed out"
    swallows = "    try:\n        while True: pass\n    except BaseException:\n        while True: pass\n"
    assert run_completion(problem, swallows, seconds=1.0) in ("timed out", "failed: ended with -9")
    assert run_completion(problem, "    x = bytearray(2**32)\n    return True\n").startswith("failed")
    target = tmp_path / "big"
    assert run_completion(problem, f"    open({str(target)!r}, 'w').write('x' * 2**22)\n").startswith("failed")
    assert not target.exists() or target.stat().st_size <= 2**20
    prints = "    import os, sys\n    os.write(1, b'[\"passed\"]')\n    sys.exit(0)\n"
    assert run_completion(problem, prints) != "passed"


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    problem = human_eval_problems()["HumanEval/0"]
    right, wrong = problem["canonical_solution"], "    return None\n"
    tried = [right, wrong, wrong]
    found = pass_rate({"HumanEval/0": tried}, k=2)
    subsets = list(itertools.combinations(range(3), 2))
    assert found["pass@2"] == pytest.approx(sum(0 in s for s in subsets) / len(subsets))
    assert (found["passed"], found["completions"]) == (1, 3)
